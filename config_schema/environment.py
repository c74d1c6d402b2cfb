"""``${NAME}`` and ``${NAME:-default}`` in the string values of a document.

As in a shell, the default serves for a variable that is unset or empty. ``$${`` stands for a literal ``${``. Keys are
left alone, what a variable holds is not expanded again, and a default holds no braces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from config_schema.errors import Finding, Location
from config_schema.reader import Json

_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^{}]*))?\}|\$\{")


def interpolate(document: Json, variables: Mapping[str, str]) -> tuple[Json, list[Finding]]:
    """A copy of ``document`` with every reference replaced, and what is wrong with the references.

    A string with a reference that cannot be replaced stays as it is.
    """
    findings: list[Finding] = []

    def replaced(value: Json, location: Location) -> Json:
        if isinstance(value, dict):
            return {key: replaced(item, (*location, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [replaced(item, (*location, index)) for index, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        text, reason = _expand(value, variables)
        if reason:
            findings.append(Finding(location, reason))
        return text

    return replaced(document, ()), findings


def _expand(text: str, variables: Mapping[str, str]) -> tuple[str, str | None]:
    reasons: list[str] = []

    def replacement(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name, default = match["name"], match["default"]
        if name is None:
            reasons.append('"${" needs a variable: "${NAME}" or "${NAME:-default}"; a literal "${" is written "$${"')
            return match[0]
        value = variables.get(name)
        if default is not None and not value:
            return str(default)
        if value is None:
            reasons.append(
                f'the environment variable {name} is not set; set it, or give a default: "${{{name}:-default}}"'
            )
            return match[0]
        if not _is_unicode(value):
            reasons.append(f"the environment variable {name} is not UTF-8")
            return match[0]
        return value

    expanded = _REFERENCE.sub(replacement, text)
    return (text, reasons[0]) if reasons else (expanded, None)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def escaped(value: Json) -> Json:
    """The document that ``interpolate`` turns into ``value``: each ``${`` of its strings written as ``$${``."""
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escaped(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value
