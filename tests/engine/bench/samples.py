"""Rows, jobs and workers that the tests of the bench share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.bench.job import Case, Job, Subject
from engine.bench.report import Row

#: The beginning of a worker that plays a part: reads its job, and has ``say``, ``measure`` and ``go`` at hand.
PRELUDE = """
import json, os, signal, subprocess, sys, time
job = json.loads(sys.stdin.readline())["job"]
cases = job["cases"]
def say(**event):
    print(json.dumps(event), flush=True)
def ready():
    for index, case in enumerate(cases):
        say(event="case", case=index)
    say(event="ready", name="played", versions="Python 0")
    assert sys.stdin.readline() == "go\\n"
def measure(index):
    say(event="case", case=index)
    say(event="measured", case=index, ms=[1.0, float(cases[index]["batch"]), 9.0], note="")
"""


def player(script: str, *arguments: str) -> Callable[[str | None], list[str]]:
    """What a pool starts in place of our workers: real processes that run ``script`` behind the prelude."""
    return lambda python: [sys.executable, "-c", PRELUDE + script, *arguments]


def job(*batches: int, runner: str = "hf", directory: str = "nowhere", **changes: Any) -> Job:
    """A job on the CPU with one case a batch: 8 tokens behind a prompt of 16."""
    subject = Subject(
        name="tiny",
        config={"model": {"path": directory}, "device": "cpu", "precision": "fp32"},
        random=False,
        directory=directory,
        gguf_file=None,
        hf_class="AutoModelForCausalLM",
        vocab=64,
        device="cpu",
        precision="fp32",
    )
    values = {"cases": tuple(Case(batch, 16, 8) for batch in batches), "rounds": 1, **changes}
    return Job(runner, subject, **values)


def row(run: str, ms: float | None, **changes: Any) -> Row:
    """A row of GPT-2 on a GPU that nobody has measured."""
    values: dict[str, Any] = {
        "model": "gpt2",
        "kind": "decode",
        "run": run,
        "batch": 1,
        "tokens": 128,
        "new": 64,
        "precision": "fp16",
        "ms": ms,
        "ms_min": None if ms is None else ms * 0.9,
        "ms_max": None if ms is None else ms * 1.5,
        "samples": 0 if ms is None else 5,
        "gpu_ms": ms,
        "launches": None if ms is None else 100,
        "floor_ms": 0.059,
        "percent": None if ms is None else 5.9 / ms,
        "bytes": 253e6,
        "flops": 2.5e8,
        "read": 4.24e12,
        "rate": 7.4e14,
        "note": "",
        "error": "",
        "date": "2026-11-25T12:00:00+00:00",
        "device": "NVIDIA H200",
        "versions": "Python 3.12.3, torch 2.11.0",
        "command": "slipstream bench my.json",
    }
    return Row(**{**values, **changes})


def size_of_png(path: Path) -> tuple[int, int]:
    """Width and height that a PNG file's header gives; asserts that it is one."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    assert data[-8:-4] == b"IEND"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
