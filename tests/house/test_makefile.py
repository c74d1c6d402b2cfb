"""The Makefile's words: help that teaches, and one clear line where Python is missing or too old."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

TARGETS = (
    "demo",
    "models",
    "browser",
    "test",
    "test-oldest",
    "test-gpu",
    "sanitize",
    "lint",
    "format",
    "schema",
    "dry-run",
    "clean",
    "distclean",
)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make without what an outer make passes on."""
    command = ["env", "-u", "MAKEFLAGS", "-u", "MAKELEVEL", "-u", "PYTHON", "make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def fake_python(folder: Path, version: tuple[int, int]) -> Path:
    """An executable that answers the version check as that version would."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nexit {int(version < (3, 11))}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_help_is_the_default_and_lists_every_target():
    done = make()
    assert done.returncode == 0
    assert set(TARGETS) <= set(re.findall(r"^  make (\S+)", done.stdout, re.MULTILINE))


def test_every_listed_target_is_phony():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = {name for line in re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE) for name in line.split()}
    assert {*TARGETS, "help"} <= phony


def test_no_python_at_all_is_one_clear_line():
    done = make("check-python", "PYTHON=")
    assert done.returncode != 0
    assert "Python 3.11 or newer" in done.stderr
    assert "PYTHON=/path/to/python3.12" in done.stderr


@pytest.mark.parametrize(("version", "accepted"), [((3, 10), False), ((3, 11), True), ((3, 12), True)])
def test_old_python_is_refused_by_name(tmp_path, version, accepted):
    python = fake_python(tmp_path, version)
    done = make("check-python", f"PYTHON={python}")
    assert (done.returncode == 0) is accepted
    assert (f"{python} does not run, or is older than Python 3.11" in done.stderr) is not accepted


def test_without_compute_sanitizer_one_line_says_where_it_comes_from(tmp_path):
    done = make("sanitize", f"PYTHON={fake_python(tmp_path, (3, 12))}", "SANITIZER=no-such-sanitizer")
    assert done.returncode != 0
    first, *rest = done.stderr.splitlines()
    assert first.startswith("no-such-sanitizer is not on the PATH. It comes with the CUDA toolkit")
    assert "make sanitize SANITIZER=" in first
    assert all(line.startswith("make:") for line in rest)


def test_an_unknown_tool_is_refused_by_name(tmp_path):
    done = make("sanitize", f"PYTHON={fake_python(tmp_path, (3, 12))}", "TOOL=memchek", "SANITIZER=true")
    assert done.returncode != 0
    assert done.stderr.startswith("TOOL=memchek: there are memcheck, racecheck, synccheck and initcheck")


def test_the_sanitizer_starts_pytest_without_the_caching_allocator(tmp_path):
    sanitizer = tmp_path / "sanitizer"
    sanitizer.write_text('#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING" "$@"\n', encoding="utf-8")
    sanitizer.chmod(0o755)
    python = fake_python(tmp_path, (3, 12))
    done = make("-s", "sanitize", f"PYTHON={python}", f"SANITIZER={sanitizer}", "TOOL=racecheck", "ARGS=-k ring")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 --tool racecheck --error-exitcode 1 --target-processes all")
    assert f"{python} -m pytest -m gpu and sanitize -x" in done.stdout
    assert done.stdout.endswith("tests/ops -k ring\n")


@pytest.mark.parametrize("target", ["demo", "test", "test-oldest", "lint"])
def test_targets_plan_without_an_error(target):
    done = make("--dry-run", target)
    assert done.returncode == 0, done.stderr


def test_ci_script_runs_make_targets_that_exist():
    script = ROOT / ".ci" / "run"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    called = re.findall(r"make --no-print-directory (\S+)", script.read_text(encoding="utf-8"))
    assert called == ["browser", "test", "lint", "dry-run", "test-oldest"]
