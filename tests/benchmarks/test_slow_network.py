"""Ranks on slow hosts: real all-reduces are counted and timed, and one that fails ends the others."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.slow_network import expected_seconds
from tests.conftest import PYTHONPATH, ROOT


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command."""
    command = [sys.executable, "-m", "benchmarks.slow_network", *arguments]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": PYTHONPATH}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, env=environment)


def test_what_a_ring_needs() -> None:
    """Two halves of two megabytes and their headers, at 100 Mbit/s."""
    assert expected_seconds(1_000_000, "fp16", 2, "100mbit") == pytest.approx(0.16 * 1514 / 1448)
    assert expected_seconds(1_000_000, "fp32", 4, "1gbit") == pytest.approx(0.048 * 1514 / 1448)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give a command behind -- or --measure all-reduce"),
        (("--measure", "all-reduce", "--", "true"), "one of the two"),
        (("--dtype", "fp16", "--", "true"), "--dtype is of --measure, and a command is given: leave it out"),
        (("--rate", "fast", "--", "true"), 'rate: got "fast", wanted a number with kbit, mbit or gbit'),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.netns
def test_an_all_reduce_takes_what_its_bytes_need(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    sizes = ("--hosts", "2", "--rate", "50mbit", "--measure", "all-reduce", "--elements", "5e5", "--rounds", "1")
    done = run(*sizes, "--json", str(path))
    assert done.returncode == 0, done.stderr
    text = path.read_text("utf-8")
    (row,) = next(value for value in json.loads(text).values() if isinstance(value, list) and "ideal s" in value[0])
    assert row["step s"] > row["ideal s"] * 1448 / 1514 * 0.9, "no faster than the link"
    assert row["step MB"] >= 1.0
    assert row["step MB"] < 1.3


@pytest.mark.netns
def test_a_rank_that_fails_ends_the_others() -> None:
    script = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit('broken'); time.sleep(90)"
    begun = time.monotonic()
    done = run("--hosts", "3", "--rate", "1gbit", "--", sys.executable, "-c", script)
    assert done.returncode == 2
    assert "[1] broken" in done.stdout
    assert done.stderr.endswith("error: rank 1 failed (exit code 1):\nbroken\n")
    assert time.monotonic() - begun < 60
