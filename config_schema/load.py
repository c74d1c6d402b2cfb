"""``load_config``: from a file, a mapping or a loaded configuration to a valid ``Config``.

Stages: read (JSON, UTF-8, size, depth, unique keys), overrides, environment variables, sections (pydantic, then the
checked-in JSON Schema as a second opinion), rules across sections. What an early stage finds does not keep the later
ones from running; a place that has a finding already gets no second one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from config_schema.config import Config
from config_schema.describe import got
from config_schema.environment import interpolate
from config_schema.errors import ConfigError, Finding, Problem
from config_schema.messages import in_document_order, section_findings
from config_schema.overrides import override
from config_schema.reader import Json, parse_text, plain_document, read_file
from config_schema.rules import RULES
from config_schema.schema_file import json_schema, schema_problems

MAX_PROBLEMS = 100
"""Most problems of one document that are listed."""

_MAX_ERRORS = 10 * MAX_PROBLEMS
"""Most of pydantic's errors that are put into words; several can belong to one problem."""


def load_config(
    source: str | os.PathLike[str] | Mapping[str, object] | Config, *, overrides: Sequence[str] = ()
) -> Config:
    """A valid configuration, or ``ConfigError`` with every problem of ``source``.

    Args:
        source: path of a JSON file, a mapping of plain JSON values (lists, not tuples; strings, not paths), or a
            ``Config``, which is validated again as a whole.
        overrides: changes such as ``"generation.top_k=40"``, applied in order before validation (see ``overrides.py``).

    ``${NAME}`` and ``${NAME:-default}`` in string values are replaced by environment variables, in files and mappings.
    """
    value, name = _read(source)
    try:
        document, findings = plain_document(value)
    except ConfigError as error:
        raise ConfigError(error.problems, name) from None
    if not isinstance(document, dict):
        wrong_kind = [Problem("$", f"got {_kind(document)}, wanted an object: {{...}}")]
        raise ConfigError([finding.problem() for finding in findings] or wrong_kind, name)
    findings += override(document, overrides)
    expanded, references = interpolate(document, os.environ)
    return _validated(expanded, findings + references, name)


def _read(source: object) -> tuple[object, str | None]:
    """The raw value of a source, and what errors call it."""
    if isinstance(source, Config):
        return source.to_dict(), None
    if isinstance(source, Mapping):
        return source, None
    if isinstance(source, (str, os.PathLike)):
        path = os.fsdecode(source)
        return parse_text(read_file(path), path), path
    raise ConfigError([Problem("", f"wanted a path, a mapping or a Config, not {type(source).__name__}")])


def _kind(value: Json) -> str:
    return got({}, {}, value)


def _validated(document: Json, findings: list[Finding], source: str | None) -> Config:
    valid: dict[str, Any] = {}
    invalid = {str(finding.location[0]) for finding in findings if finding.location}
    config: Config | None = None
    try:
        config = Config.model_validate_json(json.dumps(document), context=valid)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        known = frozenset(finding.location for finding in findings)
        invalid |= {str(detail["loc"][0]) for detail in details}
        findings += section_findings(details[:_MAX_ERRORS], document, json_schema(), known)
    problems = [finding.problem() for finding in in_document_order(findings, document)]
    problems += _rule_problems(valid, invalid)
    if problems:
        raise ConfigError(_first(problems), source)
    assert config is not None, "what pydantic refuses has a problem"
    disagreement = schema_problems(document)
    if disagreement:
        reason = "the checked-in JSON Schema refuses it; run python -m config_schema.generate"
        raise ConfigError([Problem(item.path, f"{item.message} ({reason})") for item in disagreement], source)
    return config


def _rule_problems(valid: dict[str, Any], invalid: set[str]) -> list[Problem]:
    """Run the rules whose sections are valid; sections that are not given have their defaults."""
    known = {name: value for name, value in valid.items() if name not in invalid}
    partial = Config.model_construct(**known)
    readable = Config.model_fields.keys() - invalid
    return [problem for rule in RULES if rule.reads <= readable for problem in rule.check(partial)]


def _first(problems: list[Problem]) -> list[Problem]:
    if len(problems) <= MAX_PROBLEMS:
        return problems
    return [*problems[:MAX_PROBLEMS], Problem("$", f"there are more problems than these {MAX_PROBLEMS}")]
