"""The rules of the house over this repository's own files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.house import rules

PACKAGES = ("config_schema", "ops", "profiler", "engine", "sample_configs")
CODE = (*PACKAGES, "scripts", "benchmarks")


@pytest.fixture(scope="module")
def packages() -> list[rules.Source]:
    return rules.read_sources(ROOT, PACKAGES)


@pytest.fixture(scope="module")
def code() -> list[rules.Source]:
    return rules.read_sources(ROOT, CODE)


@pytest.fixture(scope="module")
def tests() -> list[rules.Source]:
    return rules.read_sources(ROOT, ["tests"])


def test_the_sources_are_found(packages, tests):
    roots = {source.path.split("/")[0] for source in packages}
    assert roots == set(PACKAGES)
    assert "tests/house/test_tree.py" in {source.path for source in tests}


def test_files_are_short(code, tests):
    assert not rules.long_files(code, 400) + rules.long_files(tests, 600)


def test_functions_are_short(code):
    assert not rules.long_functions(code, 60)


def test_public_things_are_documented(code):
    assert not rules.undocumented(code)


def test_public_things_are_annotated(code):
    assert not rules.unannotated(code)


def test_no_exception_is_swallowed(code, tests):
    assert not rules.swallowed_exceptions([*code, *tests])


def test_nothing_is_left_for_later(code, tests):
    assert not rules.unfinished_marks([*code, *tests])


def test_no_import_cycle(packages):
    assert rules.import_cycle(packages) is None


def test_every_folder_of_tests_is_a_package():
    folders = {file.parent for file in (ROOT / "tests").rglob("*.py")}
    assert not [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter in ``folder`` with the pyproject.toml that lies there."""
    program = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as run; run()"
    command = [sys.executable, "-c", program, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_layers_hold():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("ops/core.py", "from engine import build"),
        ("config_schema/core.py", "import ops"),
        ("profiler/core.py", "import engine.build"),
        ("config_schema/core.py", "import torch"),
        ("ops/core.py", "from transformers import AutoModel"),
        ("ops/core.py", "from config_schema.config import Config"),
    ],
)
def test_layers_break_on(module, text, tmp_path):
    for package in ("config_schema", "ops", "profiler", "engine"):
        (tmp_path / package).mkdir()
        for name in ("__init__.py", "core.py", "build.py", "config.py"):
            (tmp_path / package / name).write_text("", encoding="utf-8")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / module).write_text(text, encoding="utf-8")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout
