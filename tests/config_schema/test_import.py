"""The package starts fast: it brings neither torch nor, before a document is validated, jsonschema."""

from __future__ import annotations

import subprocess
import sys


def modules_after(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in result.stdout.split()}


def test_import_is_light() -> None:
    modules = modules_after("import config_schema")
    assert not modules & {"torch", "numpy", "transformers", "jsonschema", "ops", "profiler", "engine"}
    assert "pydantic" in modules


def test_validating_needs_no_torch() -> None:
    modules = modules_after("import config_schema; config_schema.load_config({'model': {'path': 'm'}})")
    assert not modules & {"torch", "numpy", "transformers"}
    assert "jsonschema" in modules


def test_generate_runs_as_a_module() -> None:
    command = [sys.executable, "-W", "error", "-m", "config_schema.generate", "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
