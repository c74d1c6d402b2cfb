"""In words: what a part of the JSON Schema wants, and what a document has there instead."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from config_schema.errors import quote
from config_schema.reader import Json

Schema: TypeAlias = Mapping[str, Any]
"""A part of a JSON Schema, as pydantic makes it."""

_LONGEST_INTEGER = 20

_UNQUOTED = (
    (re.compile(r"true|false"), {"boolean"}),
    (re.compile(r"null"), {"null"}),
    (re.compile(r"-?[0-9]+"), {"integer", "number"}),
    (re.compile(r"-?[0-9]+\.[0-9]+"), {"number"}),
)
"""Texts that would be a value without their quotes, and of which types."""


def resolved(root: Schema, node: Schema) -> Schema:
    """``node`` with its ``$ref`` into ``root`` followed."""
    while "$ref" in node:
        name = str(node["$ref"]).removeprefix("#/$defs/")
        node = root["$defs"][name]
    return node


def alternatives(root: Schema, node: Schema) -> list[Schema]:
    """The schemas of which a value must satisfy one: the branches of ``anyOf``, or the node itself."""
    node = resolved(root, node)
    if "anyOf" not in node:
        return [node]
    return [branch for inner in node["anyOf"] for branch in alternatives(root, inner)]


def wanted(root: Schema, node: Schema) -> str:
    """What ``node`` accepts, such as ``an integer from 0 to 20 or null``."""
    choices: list[str] = []
    phrases: list[str] = []
    null: list[str] = []
    for branch in alternatives(root, node):
        if "enum" in branch or "const" in branch:
            choices += [json.dumps(choice) for choice in branch.get("enum", [branch.get("const")])]
        elif branch.get("type") == "null":
            null = ["null"]
        elif branch.get("type") == "boolean":
            phrases += ["true", "false"]
        else:
            phrases.append(_wanted_of_one(root, branch))
    if len(choices) > 1:
        return " or ".join([f"one of {', '.join(choices)}", *phrases, *null])
    return _joined([*phrases, *choices, *null])


def _joined(phrases: Sequence[str]) -> str:
    """``a``, ``a or b``, ``a, b or c``."""
    return " or ".join(part for part in (", ".join(phrases[:-1]), phrases[-1]) if part)


def _wanted_of_one(root: Schema, node: Schema) -> str:
    if "errorMessage" in node:
        return str(node["errorMessage"])
    if "discriminator" in node:
        return "an object"
    kind = node["type"]
    if kind in ("integer", "number"):
        return ("an integer" if kind == "integer" else "a number") + _range(node)
    if kind == "string":
        return "a non-empty string" if node.get("minLength") else "a string"
    if kind == "array":
        return _wanted_array(root, node)
    return "an object"


def _wanted_array(root: Schema, node: Schema) -> str:
    if "prefixItems" in node:
        return f"an array of {len(node['prefixItems'])} {_plural(node['prefixItems'][0])}"
    items = " or ".join(_plural(branch) for branch in alternatives(root, node["items"]))
    return f"{'a non-empty array' if node.get('minItems') else 'an array'} of {items}"


def _plural(node: Schema) -> str:
    if "prefixItems" in node:
        return f"arrays of {len(node['prefixItems'])} {_plural(node['prefixItems'][0])}"
    return f"{'non-empty ' if node.get('minLength') else ''}{node['type']}s" if "type" in node else "objects"


def _range(node: Schema) -> str:
    least, above, most = node.get("minimum"), node.get("exclusiveMinimum"), node.get("maximum")
    below = node.get("exclusiveMaximum")
    if least is not None and most is not None:
        return f" from {_number(least)} to {_number(most)}"
    bounds = [
        f"{word} {_number(bound)}"
        for word, bound in (("at least", least), ("above", above), ("at most", most), ("below", below))
        if bound is not None
    ]
    if not bounds:
        return ""
    return (" of " if least is not None else " ") + " and ".join(bounds)


def _number(value: int | float) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)


def got(root: Schema, node: Schema, value: Json) -> str:
    """What the document has, in its own notation: ``the string "yes"``, ``an array of 3``, ``1.5``."""
    if isinstance(value, str):
        takes_strings = any(_takes_strings(branch) for branch in alternatives(root, node))
        return quote(value) if takes_strings else f"the string {quote(value)}"
    if isinstance(value, list):
        return f"an array of {len(value)}" if value else "an empty array"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, int) and not isinstance(value, bool) and len(str(value)) > _LONGEST_INTEGER:
        return f"{float(value):.6g}"
    return json.dumps(value)


def _takes_strings(node: Schema) -> bool:
    return node.get("type") == "string"


def hint(root: Schema, node: Schema, value: Json) -> str:
    """A likely intention behind a wrong string: a misspelt choice, or a value in needless quotes. Empty if none."""
    if not isinstance(value, str):
        return ""
    branches = alternatives(root, node)
    choices = [choice for branch in branches for choice in branch.get("enum", [branch.get("const")])]
    guess = closest(value, [choice for choice in choices if isinstance(choice, str)])
    if guess is not None:
        return f"; did you mean {quote(guess)}?"
    kinds = {branch.get("type") for branch in branches}
    unquoted = next((kinds & fits for pattern, fits in _UNQUOTED if pattern.fullmatch(value)), None)
    return "; remove the quotes" if unquoted else ""


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that ``word`` probably stands for, whatever its case; None where nothing is near."""
    by_folded = {choice.casefold(): choice for choice in choices}
    matches: Sequence[str] = difflib.get_close_matches(word[:100].casefold(), list(by_folded), n=1)
    return by_folded[matches[0]] if matches else None
