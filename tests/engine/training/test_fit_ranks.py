"""Runs on one process, then two, then one again, beside runs that one process does alone; and processes that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine import Engine
from tests.conftest import PYTHONPATH
from tests.engine.training.fit_ranks import CASES, engine_of, rows
from tests.engine.training.trained import Stack, bert, config

SCRIPT = Path(__file__).with_name("fit_ranks.py")
ALONE, TOGETHER, END = 3, 6, 8


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script on two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=250, env=environment)


def lines(output: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without what depends on the clock."""
    text = (output / "metrics.jsonl").read_text(encoding="utf-8")
    return [{k: v for k, v in json.loads(line).items() if k != "samples_per_second"} for line in text.splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each case: all steps alone in ``whole``; and in ``parts`` on one process, on two, on one."""
    home = tmp_path_factory.mktemp("ranks")
    for case in CASES:
        engine_of(home / "whole", case, END, together=False).fit(rows(), rows(5))
        engine_of(home / "parts", case, ALONE, together=False).fit(rows())
    done = torchrun(str(home / "parts"), str(TOGETHER), *CASES)
    assert done.returncode == 0, done.stdout + done.stderr
    for case in CASES:
        engine = engine_of(home / "parts", case, END, together=False)
        assert engine.fit(rows(), rows(5)).begun == TOGETHER
    return home


@pytest.mark.parametrize("case", CASES)
def test_one_process_two_and_one_are_one(home: Path, case: str) -> None:
    """The same losses, norms and layers with accumulation, clipping and loss scales; each step once in the metrics."""
    whole = [line for line in lines(home / "whole" / case) if "loss" in line]
    parts = [line for line in lines(home / "parts" / case) if "loss" in line]
    assert [line["step"] for line in parts] == [line["step"] for line in whole] == list(range(1, END + 1))
    assert json.loads((home / "parts" / case / "two.json").read_text(encoding="utf-8"))["begun"] == ALONE
    assert (whole[0]["epoch"] > 8 / 24) == case.endswith("fp16"), "a step was skipped: its batch counts, it does not"
    near = 2e-2 if case.endswith("fp16") else 2e-4
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in parts] == pytest.approx([line[name] for line in whole], rel=near), name
    for name in ("lr", "epoch", "layer_drop/layers"):
        assert [line.get(name) for line in parts] == [line.get(name) for line in whole], name


@pytest.mark.parametrize("case", [case for case in CASES if "fp16" not in case])
def test_figures_and_files_are_of_the_whole(home: Path, case: str) -> None:
    """What two processes evaluate and save is what one process gets of their checkpoint."""
    output = home / "parts" / case
    engine = Engine(config(training={"output": str(output)}), model=bert(dropout=0.0))
    engine._trainer.checkpoints().restore({"model": engine.model}, TOGETHER)
    figures = json.loads((output / "two.json").read_text(encoding="utf-8"))["figures"]
    assert engine.evaluate(rows(5)) == pytest.approx(figures, rel=1e-5)
    saved = transformers.AutoModelForMaskedLM.from_pretrained(output / "saved")
    for (name, mine), other in zip(engine.model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(mine, other), name
    facts = json.loads((output / "saved" / "config.json").read_text(encoding="utf-8"))
    assert facts["architectures"] == ["BertForMaskedLM"]


def test_a_layer_that_is_not_used_is_told_or_stands_by(home: Path) -> None:
    said = json.loads((home / "parts" / "idle.json").read_text(encoding="utf-8"))
    first = f"{float(Stack()(torch.ones(4, 6)).detach().square().mean()):.5f}"
    assert said["shard True"] == said["shard False"] == said["replicate True"] == first
    assert said["replicate False"].startswith("the loss does not depend on some of the model's parameters")


def test_a_process_that_fails_takes_the_others_down(tmp_path: Path) -> None:
    """One that waits for it in an exchange, although it is still there."""
    start = time.monotonic()
    done = torchrun(str(tmp_path), "fail")
    assert done.returncode != 0
    assert time.monotonic() - start < 100, "the failed process sleeps for two minutes"
    assert "ValueError: this row is broken" in done.stderr
    assert "rank 0 ends because rank 1 failed" in done.stderr
