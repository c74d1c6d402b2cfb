"""From pydantic's errors to one line for each mistake of the document.

Pydantic says where and which kind; the words come from the JSON Schema at that place, so that messages list what is
allowed without a second copy of it. Pydantic puts the tags of unions into its locations: walking the schema beside the
location tells tags from keys, and lets the errors of all branches of a union fall together into one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic_core import ErrorDetails

from config_schema.describe import Schema, alternatives, closest, got, hint, resolved, wanted
from config_schema.errors import Finding, Location, json_path, quote
from config_schema.reader import Json
from config_schema.section import exactly_one_of_reason


@dataclass(frozen=True)
class _Place:
    """A location without tags, the schema there, and the objects on the way to it (place and schema of each)."""

    location: Location
    schema: Schema | None
    objects: tuple[tuple[Location, Schema], ...]


def section_findings(
    errors: list[ErrorDetails], document: Json, schema: Schema, known: frozenset[Location] = frozenset()
) -> list[Finding]:
    """One finding for each mistake.

    Args:
        errors: pydantic's errors for ``document``.
        document: what was validated.
        schema: JSON Schema of the root model.
        known: places whose values are known to be wrong. Nothing more is said about these, but for an unknown key.
    """
    findings: dict[tuple[Location, bool], Finding] = {}
    for error in errors:
        place = _locate(schema, error["loc"])
        of_key = error["type"] == "extra_forbidden"
        if not of_key and _is_within(place.location, known):
            continue
        for finding in _finding(error, place, document, schema):
            findings.setdefault((finding.location, of_key), finding)
        for finding in _missing_choices(place, document, known):
            findings.setdefault((finding.location, False), finding)
    return list(findings.values())


def _is_within(location: Location, known: frozenset[Location]) -> bool:
    """Whether ``location`` or a place around it is in ``known``. The top level, ``()``, stands for no place."""
    return any(location[:end] in known for end in range(1, len(location) + 1))


def _locate(root: Schema, loc: tuple[int | str, ...]) -> _Place:
    """Follow pydantic's ``loc`` through the schema, at most to a union without a discriminator: one line does there."""
    node: Schema | None = root
    location: Location = ()
    objects: list[tuple[Location, Schema]] = []
    rest = list(loc)
    while node is not None:
        branches = [branch for branch in alternatives(root, node) if branch.get("type") != "null"]
        if len(branches) != 1:
            break
        (branch,) = branches
        if "discriminator" in branch:
            if not rest:
                break
            node = {"$ref": branch["discriminator"]["mapping"][rest.pop(0)]}
            continue
        if "properties" in branch:
            objects.append((location, branch))
        if not rest:
            break
        element = rest.pop(0)
        location = (*location, element)
        node = _child(branch, element)
    return _Place(location, node, tuple(objects))


def _child(node: Schema, element: int | str) -> Schema | None:
    if isinstance(element, str):
        child: Schema | None = node.get("properties", {}).get(element)
    else:
        child = dict(enumerate(node.get("prefixItems", ()))).get(element, node.get("items"))
    return child


def value_at(document: Json, location: Location) -> Json:
    """The value at ``location``; None where there is none."""
    for element in location:
        if isinstance(document, dict) and isinstance(element, str):
            document = document.get(element)
        elif isinstance(document, list) and isinstance(element, int) and element < len(document):
            document = document[element]
        else:
            return None
    return document


def _finding(error: ErrorDetails, place: _Place, document: Json, root: Schema) -> Iterator[Finding]:
    kind = error["type"]
    if kind == "exactly_one_of":
        return
    if kind == "extra_forbidden":
        yield Finding(place.location, _unknown_key(place, root))
    elif kind in ("union_tag_not_found", "union_tag_invalid") and place.schema is not None:
        yield _bad_tag(place, document, root)
    elif place.schema is None:
        yield Finding(place.location, error["msg"])
    elif kind == "missing" and _is_absent(place.location, document):
        yield Finding(place.location, f"missing, wanted {wanted(root, place.schema)}")
    else:
        value = value_at(document, place.location)
        if kind == "too_short" and isinstance(value, list) and value:
            return  # pydantic counts only valid items; those that are not have lines of their own
        reason = f"{got(root, place.schema, value)}, wanted {wanted(root, place.schema)}"
        yield Finding(place.location, f"got {reason}{hint(root, place.schema, value)}")


def _is_absent(location: Location, document: Json) -> bool:
    container = value_at(document, location[:-1])
    return isinstance(container, dict) and location[-1] not in container


def _bad_tag(place: _Place, document: Json, root: Schema) -> Finding:
    """The tag of an object is missing or unknown."""
    assert place.schema is not None
    (union,) = (branch for branch in alternatives(root, place.schema) if "discriminator" in branch)
    name = union["discriminator"]["propertyName"]
    tag_schema: Schema = {"enum": list(union["discriminator"]["mapping"]), "type": "string"}
    location = (*place.location, name)
    container = value_at(document, place.location)
    if not isinstance(container, dict) or name not in container:
        return Finding(location, f"missing, wanted {wanted(root, tag_schema)}")
    value = container[name]
    reason = f"got {got(root, tag_schema, value)}, wanted {wanted(root, tag_schema)}"
    return Finding(location, reason + hint(root, tag_schema, value))


def _unknown_key(place: _Place, root: Schema) -> str:
    key = str(place.location[-1])
    allowed = list(place.objects[-1][1]["properties"])
    elsewhere = [path for path in _homes_of(key, root) if path != json_path(place.location)]
    guess = closest(key, allowed)
    if elsewhere:
        guessed = f", did you mean {' or '.join(elsewhere)}?"
    else:
        guessed = f", did you mean {quote(guess)}?" if guess else ""
    return f"unknown key{guessed} (allowed: {', '.join(allowed)})"


def _homes_of(key: str, root: Schema) -> list[str]:
    """Where a key of this very name does exist: at the top level or in a section that is no tagged union."""
    homes = [json_path((key,))] if key in root["properties"] else []
    for name, node in root["properties"].items():
        if key in resolved(root, node).get("properties", {}):
            homes.append(json_path((name, key)))
    return homes


def _missing_choices(place: _Place, document: Json, known: frozenset[Location]) -> Iterator[Finding]:
    """Objects on the way of an error in which not exactly one of several keys is given.

    Pydantic checks this only after all fields of an object are valid; the user is told at once. A key whose value is
    known to be wrong is given all the same.
    """
    for location, schema in place.objects:
        if "oneOf" not in schema:
            continue
        names = [choice["required"][0] for choice in schema["oneOf"]]
        container = value_at(document, location)
        if not isinstance(container, dict):
            continue
        given = [name for name in names if container.get(name) is not None or (*location, name) in known]
        reason = exactly_one_of_reason(names, given)
        if reason:
            yield Finding(location, reason)


def in_document_order(findings: list[Finding], document: Json) -> list[Finding]:
    """Sorted by where they are in the text, without repetitions; what is missing comes after what its object has."""
    positions: dict[int, dict[str, int]] = {}

    def position(finding: Finding) -> list[int]:
        node, steps = document, []
        for element in finding.location:
            if isinstance(element, int):
                steps.append(element)
            elif isinstance(node, dict):
                if id(node) not in positions:
                    positions[id(node)] = {key: index for index, key in enumerate(node)}
                steps.append(positions[id(node)].get(element, len(node)))
            node = value_at(node, (element,))
        return steps

    return sorted(dict.fromkeys(findings), key=position)
