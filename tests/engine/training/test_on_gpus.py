"""Training on one GPU in every precision, and on two by workers of the engine's own and by torchrun."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine import Engine
from engine.training import workers
from engine.training.workers import WorkerFailed
from tests.engine.training.test_workers import (
    document,
    has_steps,
    home,
    is_gone,
    kill_in_the_midst,
    lines,
    start,
    wait_for,
    worker_pids,
)

__all__ = ["home"]

STEPS = 12
#: Relative, of losses: sums of another order, in 24 or 11 or 8 bits.
NEAR = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2}


@pytest.fixture(autouse=True)
def _no_process_left() -> Any:
    yield
    workers.end_others()
    assert not worker_pids(os.getpid()), "a worker outlives its engine"


def gpu_document(home: Path, output: Path, precision: str = "fp32", **training: Any) -> dict[str, Any]:
    """The classifier without dropout on the GPU, its layers dropped by half."""
    training = {"output": str(output), "max_steps": STEPS, **training}
    if precision == "fp16":
        training = {"loss_scale": {"initial": 2.0**10}, **training}
    found = document(home, "plain", **training)
    found["optimizer"]["eps"] = 1e-3  # where a gradient is nothing but rounding, Adam makes a step of it otherwise
    return {**found, "device": "cuda", "precision": precision, "progressive_layer_drop": {"theta": 0.5, "gamma": 1.0}}


def losses(output: Path) -> list[float]:
    """Of each step."""
    return [line["loss"] for line in lines(output) if "loss" in line]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_trains_as_fp32_does(home: Path, tmp_path: Path, precision: str) -> None:
    """Gates and batches are the same; an overflow skips a step, whose batch counts, so fp16 is compared by its end."""
    for name in ("fp32", precision):
        rate = {"type": "AdamW", "lr": 0.01 if precision == "bf16" else 1e-9}
        scale = {"loss_scale": {"initial": 2.0**24}} if name == "fp16" else {}  # overflows a few times
        config = gpu_document(home, tmp_path / name, name, processes=1, **scale)
        Engine({**config, "optimizer": rate}).fit()
    whole, half = losses(tmp_path / "fp32"), losses(tmp_path / precision)
    assert len(whole) == len(half) == STEPS
    if precision == "bf16":
        assert half == pytest.approx(whole, rel=NEAR[precision])
        assert half[-1] < half[0], "it learns"
    else:  # weights stand still: a loss is that of its batch, and some batches were skipped
        assert all(any(abs(one - other) < NEAR["fp16"] * other for other in whole) for one in half[:4])
        assert losses(tmp_path / "fp16") != whole


@pytest.mark.multigpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("how", ["replicate", "shard"])
def test_two_gpus_compute_what_one_does(home: Path, tmp_path: Path, how: str, precision: str) -> None:
    """A run on two that is saved, then goes on; the losses of one. And its weights are saved whole."""
    # Micro-batches of one step draw gates of their own: there are as many of them in either run.
    for name, sizes in (("one", {"processes": 1, "micro_batch_size": 4}), ("two", {"processes": 2})):
        shared = how if name == "two" else "auto"
        config = gpu_document(home, tmp_path / name, precision, data_parallel=shared, **sizes)
        for steps in (STEPS // 2, STEPS):
            config["training"]["max_steps"] = steps
            engine = Engine(config)
            summary = engine.fit()
            assert summary.begun == steps - STEPS // 2, "it goes on from its checkpoint"
        figures = engine.evaluate()
        engine.save_pretrained(tmp_path / name / "saved")
        workers.end_others()
        saved = {**config, "model": {"path": str(tmp_path / name / "saved"), "task": "sequence_classification"}}
        saved["training"] = {
            **config["training"],
            "processes": 1,
            "data_parallel": "auto",
            "output": str(tmp_path / "x"),
        }
        assert Engine(saved).evaluate() == pytest.approx(figures, rel=NEAR[precision])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=NEAR[precision])


@pytest.mark.multigpu
def test_torchrun_computes_the_same(home: Path, tmp_path: Path) -> None:
    """And a run whose first process was killed goes on from its checkpoint."""
    (tmp_path / "train.json").write_text(json.dumps(gpu_document(home, tmp_path / "own", max_steps=40)), "utf-8")
    whole = start(
        tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "engine", "run", "train.json", "--set", f"training.output={tmp_path / 'whole'}",
    )  # fmt: skip
    killed = start(tmp_path, "-m", "engine", "run", "train.json")
    metrics = tmp_path / "own" / "metrics.jsonl"
    wait_for(lambda: has_steps(metrics, 6) or killed.poll() is not None, 180)
    assert killed.poll() is None, killed.communicate()[1]
    (worker,) = worker_pids(killed.pid)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    wait_for(partial(is_gone, worker), 20)
    last = start(tmp_path, "-m", "engine", "run", "train.json")
    _, err = last.communicate(timeout=200)
    assert last.returncode == 0, err
    _, err = whole.communicate(timeout=200)
    assert whole.returncode == 0, err
    assert losses(tmp_path / "own") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.multigpu
def test_a_killed_worker_is_told_within_seconds(home: Path, tmp_path: Path) -> None:
    """This process stands in NCCL's exchange then."""
    engine = Engine(gpu_document(home, tmp_path, max_steps=10**6, checkpoint_every=None))
    killed: list[float] = []

    def kill() -> None:
        kill_in_the_midst(tmp_path)
        killed.append(time.monotonic())

    (tmp_path / "metrics.jsonl").touch()
    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(WorkerFailed, match=r"rank 1 failed: its process \d+ was ended by SIGKILL"):
        engine.fit()
    killer.join()
    assert time.monotonic() - killed[0] < 20
    # The device is still good for another engine, with workers of its own.
    again = Engine(gpu_document(home, tmp_path / "again"))
    assert again.fit().steps == STEPS
