"""What DeepSpeed's reader (Hjson) lets pass in a file of JSON, and JSON does not: comments and trailing commas."""

from __future__ import annotations

import re

# Each runs to the end of the text where it is not closed, so that no text takes more than one pass.
_STRING = r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)'
_COMMENT = re.compile(rf"{_STRING}|//[^\n]*|\#[^\n]*|/\*(?:[^*]|\*(?!/))*+(?:\*/|\Z)", re.DOTALL)
_TRAILING_COMMA = re.compile(rf"{_STRING}|,(?=\s*[}}\]])", re.DOTALL)


def plain_json(text: str) -> str:
    """``text`` with spaces in the place of comments and trailing commas, so that lines and columns stay.

    Hjson's other liberties (strings and keys without quotes, missing commas) stay errors.
    """
    for pattern in (_COMMENT, _TRAILING_COMMA):
        text = pattern.sub(lambda found: found[0] if found[0][0] == '"' else re.sub(r"[^\n]", " ", found[0]), text)
    return text
