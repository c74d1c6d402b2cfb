"""Lines of metrics: what stands there after a run, a crash and a resume."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine.errors import EngineError
from engine.training import metrics_log
from engine.training.metrics_log import MetricsLog


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_line_a_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, {"loss": 2.5, "lr": 0.1})
        assert lines(path) == [{"step": 1, "loss": 2.5, "lr": 0.1}], "there at once, not when the run ends"
        log.write(2, {"loss": float("nan"), "norm": float("inf"), "accuracy": None})
    assert lines(path)[1] == {"step": 2, "loss": None, "norm": None, "accuracy": None}


def test_a_resumed_run_cuts_off_what_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, 6):
            log.write(step, {"loss": float(step)})
    path.write_text(path.read_text("utf-8") + '{"step": 6, "lo', "utf-8")  # a crash in the middle of a line
    with MetricsLog(path, resume_step=3) as log:
        log.write(4, {"loss": 40.0})
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_the_start_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for loss in (1.0, 2.0):
        with MetricsLog(path) as log:
            log.write(1, {"loss": loss})
    assert lines(path) == [{"step": 1, "loss": 2.0}]


def test_tensorboard_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, directory: str, purge_step: int) -> None:
            seen.append((directory, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def close(self) -> None:
            seen.append(("closed",))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(metrics_log, "find_spec", lambda name: object())
    with MetricsLog(tmp_path / "m.jsonl", tensorboard=tmp_path / "events", resume_step=4) as log:
        log.write(5, {"loss": 0.5, "norm": None})
    assert seen == [(str(tmp_path / "events"), 5), ("loss", 0.5, 5), ("closed",)]


def test_what_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(EngineError, match=r"file/metrics.jsonl: metrics cannot be written there \(.*\)"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl")
    monkeypatch.setattr(metrics_log, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="TensorBoard is not installed: pip install tensorboard"):
        MetricsLog(tmp_path / "m.jsonl", tensorboard=tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full here")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    log = MetricsLog.__new__(MetricsLog)
    log.path, log._file, log._events = path, path.open("a", encoding="utf-8"), None
    with pytest.raises(EngineError, match=r"metrics.jsonl: metrics cannot be written \(No space left on device\)"):
        log.write(1, {"loss": 1.0})
