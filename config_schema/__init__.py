"""What a configuration may say: strict pydantic models, the JSON Schema generated from them, and clear errors.

One section of the JSON file is one model in one file (``config.py`` tells how to add one). Imports neither torch nor
anything of the other packages.
"""

from __future__ import annotations

from config_schema.config import Config
from config_schema.errors import ConfigError, Problem, SlipstreamError
from config_schema.load import load_config
from config_schema.overrides import apply_overrides
from config_schema.schema_file import SCHEMA_PATH, json_schema, schema_problems, schema_text

__all__ = [
    "SCHEMA_PATH",
    "Config",
    "ConfigError",
    "Problem",
    "SlipstreamError",
    "apply_overrides",
    "json_schema",
    "load_config",
    "schema_problems",
    "schema_text",
]
