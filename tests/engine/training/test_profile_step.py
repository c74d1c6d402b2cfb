"""Profiles that a run makes of itself: nothing of the training changes, and nothing stays behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules import module as hooks
from torch.optim import optimizer as optimizers

from engine import Engine
from engine.training.loop import NoNumber
from engine.training.profile_step import WANTED, ProfileStep
from ops import costs
from profiler import Counter
from profiler.report import Report
from tests.conftest import PYTHONPATH
from tests.engine.training.trained import bert, config, masked
from tests.profiler.reports import LIMITS

BATCHES = [masked(4, seed) for seed in range(12)]


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring those of this machine would take seconds."""
    monkeypatch.setattr("engine.profiling.ceilings", lambda device: LIMITS)


def engine_of(section: dict[str, Any] | None = None, **training: Any) -> Engine:
    sections = {} if section is None else {"flops_profiler": {"enabled": True, **section}}
    torch.manual_seed(5)
    return Engine(config(training={"max_steps": 12, **training}, **sections), model=bert())


def feature(engine: Engine) -> ProfileStep:
    return next(one for one in engine._trainer.loop.features if isinstance(one, ProfileStep))


def installed(engine: Engine) -> tuple[int, ...]:
    """Hooks of torch and of the model, and listeners."""
    model = engine.model
    tables = (
        hooks._global_forward_pre_hooks, hooks._global_forward_hooks, model._forward_pre_hooks, model._forward_hooks,
        optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks,
    )  # fmt: skip
    return (*map(len, tables), int(costs.observed()))


def trained(engine: Engine, steps: int = 12) -> list[float]:
    torch.manual_seed(7)
    return [engine.train_batch(batch).loss for batch in BATCHES[:steps]]


def test_losses_are_the_same_bit_for_bit_and_nothing_stays(capsys: pytest.CaptureFixture[str]) -> None:
    """With dropout, clipping and accumulation."""
    plain, profiled = engine_of(clip_norm=0.5), engine_of({"profile_step": 2}, clip_norm=0.5)
    before = installed(plain)
    assert trained(profiled) == trained(plain)
    assert installed(profiled) == before == installed(engine_of())
    for name, parameter in profiled.model.named_parameters():
        assert torch.equal(parameter, dict(plain.model.named_parameters())[name]), name
    report = feature(profiled).report
    assert report is not None
    assert report.name in capsys.readouterr().out


def test_the_report_is_that_of_a_step() -> None:
    """Counts: those of the same step by a counter of our own."""
    engine = engine_of({"profile_step": 1}, clip_norm=0.5)
    assert installed(engine) == installed(engine_of())
    trained(engine)
    report = feature(engine).report
    assert report is not None
    assert report.timing is not None
    workload = report.workload
    assert (workload.mode, workload.samples, workload.tokens) == ("training", 4, BATCHES[0]["input_ids"].numel())
    assert (workload.micro_batches, workload.world_size, workload.precision) == (2, 1, "fp32")
    assert report.timing.steps == 3
    other = engine_of(clip_norm=0.5)
    trained(other, 1)
    with Counter(other.model) as counter:
        other.train_batch(BATCHES[1])
    wanted, found = counter.counts(), report.counts
    assert found.total("backward") == wanted.total("backward")
    top = type(other.model).__name__
    assert found.module(top).total("forward") == wanted.module(top).total("forward")
    # Clipping is among it; a counter that is not told takes it for what lies between modules.
    assert found.total("step").operators > wanted.total("step").operators


@pytest.mark.parametrize(("steps", "timed"), [(3, None), (7, 1), (8, 1), (9, 2), (11, 3)])
def test_a_short_run_times_fewer_steps(steps: int, timed: int | None) -> None:
    engine = engine_of({"profile_step": 2}, max_steps=steps)
    trained(engine, steps)
    report = feature(engine).report
    assert report is not None
    assert report.counts.total("step").operators
    assert (report.timing.steps if report.timing else None) == timed


def test_files(tmp_path: Path) -> None:
    section = {"output_file": str(tmp_path / "p.json"), "formats": ["json", "table", "chrome_trace"], "top_modules": 2}
    engine = engine_of(section)
    trained(engine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "p.trace.json", "p.txt"]
    found = Report.load(tmp_path / "p.json")
    assert found.counts == feature(engine).report.counts  # type: ignore[union-attr]


def test_off_is_nothing_at_all() -> None:
    engine = engine_of({"enabled": False})
    trained(engine, 2)
    assert not any(isinstance(one, ProfileStep) for one in engine._trainer.loop.features)


def test_a_step_that_raises_leaves_nothing_and_the_next_takes_its_place() -> None:
    engine = engine_of({"profile_step": 1})
    before = installed(engine_of())
    trained(engine, 1)
    weights = [p.detach().clone() for p in engine.model.parameters()]
    with torch.no_grad():
        engine.model.cls.predictions.bias.fill_(float("nan"))
    with pytest.raises(NoNumber):
        engine.train_batch(BATCHES[1])
    assert installed(engine) == before
    for parameter, weight in zip(engine.model.parameters(), weights, strict=True):
        parameter.data.copy_(weight)
    for batch in BATCHES[1:]:
        engine.train_batch(batch)
    assert feature(engine).report is not None
    assert feature(engine).report.workload.samples == 4  # type: ignore[union-attr]


def test_a_skipped_step_is_not_kept() -> None:
    engine = Engine(
        config(
            precision="fp16",
            training={"loss_scale": {"initial": 2.0**20}, "max_steps": 50},
            flops_profiler={"enabled": True, "profile_step": 0},
        ),
        model=bert(dropout=0.0),
    )
    reports = []
    while (report := feature(engine).report) is None:
        reports.append(engine.train_batch(masked(4, 0)))
    assert reports[0].skipped
    assert sum(not one.skipped for one in reports) == WANTED
    assert report.counts.total("step").operators
    assert report.workload.samples == 4


def test_dropped_layers_are_not_counted() -> None:
    drop = {"theta": 0.1, "gamma": 50.0}
    section = {"enabled": True, "profile_step": 4}
    engine = Engine(config(flops_profiler=section, progressive_layer_drop=drop), model=bert())
    trained(engine)
    report = feature(engine).report
    assert report is not None
    work = [one.total("forward").macs for one in report.counts.root.walk() if one.kind == "BertLayer"]
    assert work[0] > 0
    assert work[-1] < work[0]
    assert any("dropped at random" in note for note in report.notes)


def test_two_processes(tmp_path: Path) -> None:
    """Each has its own report, which says how long all of them took."""
    script = Path(__file__).with_name("profile_ranks.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, str(tmp_path)], capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = [Report.load(tmp_path / f"profile.rank{rank}.json") for rank in (0, 1)]
    for rank, report in enumerate(reports):
        workload = report.workload
        assert (workload.rank, workload.world_size, workload.data_parallel, workload.samples) == (rank, 2, 2, 4)
        assert any("of 2 processes" in note and "slowest (rank" in note for note in report.notes)
        assert report.timing is not None
        assert report.timing.communication
        assert "c10d.allreduce_" in report.counts.root.operators()
    assert reports[0].counts.total("forward") == reports[1].counts.total("forward")
    both = [json.loads((tmp_path / f"losses{rank}.json").read_text("utf-8")) for rank in (0, 1)]
    assert both[0] == both[1]
