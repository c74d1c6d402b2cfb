"""The JSON Schema: generated from the models, checked in beside them, and the second opinion on every document."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, cast

from pydantic.json_schema import GenerateJsonSchema

from config_schema.config import Config
from config_schema.errors import Finding, Problem
from config_schema.reader import Json

SCHEMA_PATH = Path(__file__).parent / "schema" / "slipstream.schema.json"
"""The checked-in JSON Schema (draft 2020-12). ``python -m config_schema.generate`` writes it."""


def json_schema() -> dict[str, Any]:
    """The JSON Schema of ``Config``, generated from the models as they are now."""
    return {"$schema": GenerateJsonSchema.schema_dialect, **Config.model_json_schema()}


def generated_text() -> str:
    """The text that the checked-in schema must have."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def schema_text() -> str:
    """The text of the checked-in schema."""
    return SCHEMA_PATH.read_text(encoding="utf-8")


def schema_problems(document: Json) -> list[Problem]:
    """What the checked-in JSON Schema, by way of the ``jsonschema`` library, has against ``document``.

    The messages are that library's. For the file that users write, ``load_config`` has better ones.
    """
    return [
        Finding(tuple(error.absolute_path), error.message).problem() for error in _validator().iter_errors(document)
    ]


@functools.cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator  # here, since importing it costs as much as all of pydantic

    return Draft202012Validator(cast(dict[str, Any], json.loads(schema_text())))
