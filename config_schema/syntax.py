"""What is wrong with a text that is not JSON, in terms of the usual mistakes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from config_schema.errors import Problem

_HINTS: tuple[tuple[Callable[[str, int], bool], str], ...] = (
    (
        lambda text, at: _is_trailing_comma(text, at),
        'a comma before "}" or "]" is not allowed; remove it',
    ),
    (
        lambda text, at: text.startswith(("//", "/*", "#"), at),
        "JSON has no comments; remove it",
    ),
    (
        lambda text, at: text.startswith("'", at),
        "strings take double quotes, not single ones",
    ),
    (
        lambda text, at: text[at : at + 1] in ("\u201c", "\u201d", "\u201e", "\u2018", "\u2019"),
        'a typographic quote; strings take plain double quotes (")',
    ),
    (
        lambda text, at: re.match(r"(True|False|None)\b", text[at : at + 6]) is not None,
        "JSON writes true, false and null",
    ),
    (
        lambda text, at: not text[at:].strip(),
        "the text ends too early; a brace, a bracket or a quote is not closed",
    ),
    (
        lambda text, at: re.match(r"[+.]\d", text[at : at + 2]) is not None,
        "a number starts with a digit or with -",
    ),
)

_MEANINGS = (
    ("Expecting property name", "wanted a key in double quotes"),
    ("Expecting ',' delimiter", "wanted a comma or the closing bracket here"),
    ("Expecting ':' delimiter", 'wanted ":" after the key'),
    ("Expecting value", "wanted a value"),
    ("Extra data", "something follows the end of the JSON value"),
    ("Unterminated string", "the string that starts here is not closed"),
    ("Invalid control character", 'a line break or control character inside a string; write "\\n", "\\t" or "\\u00XX"'),
    ("Invalid \\", 'a backslash inside a string is written "\\\\"'),
)


def syntax_problem(text: str, error: json.JSONDecodeError) -> Problem:
    """One line that says where ``text`` stops to be JSON (line and column count from 1) and what to change."""
    hint = next((hint for applies, hint in _HINTS if applies(text, error.pos)), None)
    meaning = next((meaning for start, meaning in _MEANINGS if error.msg.startswith(start)), error.msg)
    return Problem("", f"line {error.lineno}, column {error.colno}: not JSON: {hint or meaning}")


def _is_trailing_comma(text: str, at: int) -> bool:
    """Python up to 3.12 stops at the bracket, later versions at the comma."""
    if text.startswith(",", at):
        return text[at + 1 :].lstrip()[:1] in ("}", "]")
    return text[at : at + 1] in ("}", "]") and text[:at].rstrip().endswith(",")
