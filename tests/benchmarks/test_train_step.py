"""The step benchmark compares loops that do the same work, in one process each for memory, and says so where not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import train_step
from benchmarks.steps import Marks, device_of, in_turn
from benchmarks.train_step import OURS, PLAIN, RUNS, UNREAD, Case, Row, Running, batches, build, ratios, text_of
from engine.training.data.samples import IGNORED
from tests.benchmarks.small import call, read

TOY = Case("bert-base", "fp32", 2, 2, 16, "cpu", toy=True)


@pytest.mark.parametrize("model", ["bert-base", "gpt2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_loops_compute_the_same(model: str, precision: Any) -> None:
    """Losses and weights after some steps, dropout included."""
    case = replace(TOY, model=model, precision=precision)
    found = {}
    for name in RUNS:
        weights = build(case)
        step = RUNS[name](case, weights)
        torch.manual_seed(5)
        losses = [step(micro_batches) for micro_batches in batches(case, 200)]
        found[name] = losses, [parameter.detach().clone() for parameter in weights.parameters()]
    assert found[OURS][0] == pytest.approx(found[PLAIN][0], rel=1e-6)
    assert found[UNREAD][0] == [None] * 4
    start = list(build(case).parameters())
    for mine, plain, unread, before in zip(*(found[name][1] for name in RUNS), start, strict=True):
        assert torch.allclose(mine, plain, atol=1e-7)
        assert torch.equal(unread, plain)
        assert before.ndim < 2 or not torch.equal(mine, before)


def test_labels_are_a_seventh_of_bert_s_tokens_and_all_of_gpt_s() -> None:
    bert = batches(replace(TOY, batch=64, length=128), 200)
    assert [len(step) for step in bert] == [2] * 4
    share = float(torch.stack([batch["labels"] != IGNORED for step in bert for batch in step]).float().mean())
    assert share == pytest.approx(0.15, abs=0.02)
    gpt = batches(replace(TOY, model="gpt2"), 200)
    assert all(torch.equal(batch["labels"], batch["input_ids"]) for step in gpt for batch in step)


def test_loops_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(case: Case, model: torch.nn.Module) -> train_step.Step:
        step = train_step.by_hand(case, model, True)
        return lambda micro_batches: 1.01 * (step(micro_batches) or 0)

    monkeypatch.setitem(RUNS, OURS, wrong)
    with pytest.raises(SystemExit, match="2"):
        call(train_step.main, monkeypatch, "--toy", "--device", "cpu", "--models", "gpt2", "--accumulation", "1")
    assert "the losses differ" in capsys.readouterr().err


def test_the_command_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    given = ["--toy", "--device", "cpu", "--rounds", "3", "--processes", "0", "--accumulation", "1,2"]
    assert call(train_step.main, monkeypatch, *given, "--precisions", "fp32", "--json", path) == 0
    rows = read(path)["rows"]
    assert [(row["case"]["model"], row["case"]["accumulation"], row["run"]) for row in rows] == [
        (model, count, run) for model in ("bert-base", "gpt2") for count in (1, 2) for run in (OURS, PLAIN, UNREAD)
    ]
    assert all(len(row["seconds"]) == 3 and min(row["seconds"]) > 0 for row in rows)
    assert all(list(row["ratios"]) == ["time"] for row in rows)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120


def test_memory_is_that_of_the_process_alone() -> None:
    """What the steps need, and not what the process that asks has held before."""
    held = torch.zeros(512, 2**20 // 4).fill_(1.0)  # 512 MiB
    case = replace(TOY, model="gpt2", batch=16, length=256)
    logits = case.batch * case.length * 200 * 4
    assert 3 * logits < train_step.peak_memory_apart(PLAIN, case) < held.numel() * 4 / 2


def test_verdicts() -> None:
    rows = [
        Row(TOY, OURS, [1.0, 2.04, 3.0], [103, 103], 1.0),
        Row(TOY, PLAIN, [1.0, 2.0, 2.0], [100, 100], 1.0),
        Row(TOY, UNREAD, [1.0, 2.0, 2.0], [100, 100], None),
    ]
    assert ratios(rows) == {"time": pytest.approx(1.02), "memory": pytest.approx(1.03)}
    text = text_of(rows)
    assert "time: 1.0200 of the loop by hand (bar 1.03): ok" in text
    assert "memory: 1.0300 of the loop by hand (bar 1.02): MISSED" in text
    assert max(map(len, text.splitlines())) <= 80


def test_rounds_go_both_ways_and_end_in_time() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    assert in_turn(runs, 3, float("inf")) == {"a": [None] * 3, "b": [None] * 3}
    assert "".join(order) == "abbaab"
    assert len(in_turn(runs, 3, 0.0)["a"]) == 1, "at least one"


def test_marks_and_times_of_running_steps() -> None:
    marks = Marks(device_of("cpu"))
    for _ in range(3):
        marks.mark()
    assert len(marks.seconds()) == 2
    assert min(marks.seconds()) >= 0
    running = Running(OURS, replace(TOY, model="gpt2"))
    assert running.seconds(2) > 0
    assert len(running.losses(3)) == 3
