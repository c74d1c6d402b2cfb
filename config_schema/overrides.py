"""``--set a.b.c=value``: change one value of a document before it is validated.

The path is dotted (``model.path``, ``job.prompts.0``; a leading ``$.`` is ignored). A number indexes an array, or
appends where it is the array's length. Missing objects, and arrays where a number follows, are made. The value is taken
as JSON where it is JSON, otherwise as a plain string.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from config_schema.errors import ConfigError, Finding, Location, json_path, quote
from config_schema.reader import Json, parse_text, plain_document


def apply_overrides(document: Mapping[str, object], overrides: Sequence[str]) -> dict[str, Json]:
    """A copy of ``document`` with each override applied, in order. Does not look at the schema.

    Raises ``ConfigError`` with a problem for each override (and each value of the document) that cannot be used.
    """
    plain, findings = plain_document(document)
    assert isinstance(plain, dict)
    findings += override(plain, overrides)
    if findings:
        raise ConfigError([finding.problem() for finding in findings])
    return plain


def override(document: dict[str, Json], overrides: Sequence[str]) -> list[Finding]:
    """Apply each override to ``document`` in place; what is wrong with the others."""
    return [finding for text in overrides for finding in _override_one(document, text)]


def _override_one(document: dict[str, Json], text: str) -> list[Finding]:
    path, equals, value_text = text.partition("=")
    keys = path.strip().removeprefix("$.").split(".")
    if not equals or not all(keys):
        wanted = "wanted a.b.c=value, with a key or an index between the dots"
        return [Finding((), f"the override {quote(text)} cannot be read: {wanted}")]
    value, findings = _value(value_text)
    if findings:
        return [Finding((), f"the override {quote(text)}: {finding.message}") for finding in findings]
    reason = _put(document, keys, value)
    return [Finding((), f"the override {quote(text)} cannot be applied: {reason}")] if reason else []


def _value(text: str) -> tuple[Json, list[Finding]]:
    try:
        parsed = parse_text(text)
    except ConfigError:
        parsed = text
    return plain_document(parsed)


def _put(document: dict[str, Json], keys: Sequence[str], value: Json) -> str | None:
    """Set the value at ``keys``; the reason where there is no such place."""
    node: Json = document
    location: Location = ()
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        following: Json = value if last else ([] if _is_index(keys[depth + 1]) else {})
        if isinstance(node, dict):
            if last or node.get(key) is None:
                node[key] = following
            node, location = node[key], (*location, key)
        elif isinstance(node, list):
            if not _is_index(key) or int(key) > len(node):
                return (
                    f"{json_path(location)} is an array of {len(node)}; its indices go from 0 to {len(node)} (append)"
                )
            index = int(key)
            if index == len(node):
                node.append(following)
            elif last or node[index] is None:
                node[index] = following
            node, location = node[index], (*location, index)
        else:
            return f"{json_path(location)} is neither an object nor an array, so it has no {quote(key)}"
    return None


def _is_index(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) < 10
