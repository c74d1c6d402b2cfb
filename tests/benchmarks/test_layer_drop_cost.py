"""The figures of the cost benchmark from steps whose times are known, and a small run whose gates are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import layer_drop_cost as cost
from benchmarks.layer_drop_cost import WARM, Case, Step, evaluate, text_of, without_stalls
from benchmarks.masked_lm import Shape
from engine.training.layer_drop import Schedule, draw_gates
from tests.benchmarks.small import call, read

CASE = Case("postln", Shape(), 64, "bf16", "eager", "cpu")


def test_figures_of_known_times() -> None:
    """A step takes 1 ms, and 2 a layer (3 ms with a drop); gates keep 9, 8 and 10 layers."""
    fixed = {count: [Step(0.001 + 0.002 * count, count)] * 5 for count in (0, 6, 12)}
    dropped = [Step(0.003 + 0.002 * layers, layers) for layers in (9, 8, 10, 10)]
    found = evaluate(fixed, dropped)
    assert found.share == pytest.approx(24 / 25)
    assert found.expected == 8.75
    assert found.executed == 9.25
    assert found.ceiling == pytest.approx(3.25 / 12 * 24 / 25)
    assert found.dropped == pytest.approx(0.0215)
    assert found.adjusted == pytest.approx(0.0205), "at 8.75 layers, not at those that were drawn"
    assert found.saved == pytest.approx(1 - 0.0205 / 0.025)
    text = text_of(CASE, found)
    assert "the layers' share of the step: 96.0%" in text
    assert "ceiling: 27.1% of it, 26.0%" in text
    assert "saved: 18.0% of the time a sample (as measured 14.0%; goal 24%): MISSED" in text
    assert "of the ceiling: 69.2% (bar 90%): MISSED" in text
    assert "9.250 of 8.750 expected, +5.71% (bar 1%; luck: 8.32%): MISSED" in text
    assert max(map(len, text.splitlines())) <= 80


def test_what_luck_is() -> None:
    """The deviation of the mean of that many draws."""
    p = torch.tensor(Schedule(0.5, gamma=1e6).keep_probabilities(1, 12))
    draws = torch.bernoulli(p.expand(100_000, 12), generator=torch.Generator().manual_seed(0)).sum(1)
    assert cost._variance(12) == pytest.approx(float(draws.var()), rel=0.02)


def test_a_perfect_drop_reaches_the_ceiling() -> None:
    fixed = {count: [Step(0.005 + 0.002 * count, count)] * 3 for count in (0, 2, 4)}
    found = evaluate(fixed, [Step(0.005 + 0.002 * layers, layers) for layers in (1, 2, 3, 4)])
    assert found.saved == pytest.approx(found.ceiling)
    assert "100.0% (bar 90%): ok" in text_of(CASE, found)


def test_stalls_are_told_from_slow_steps() -> None:
    """A step of twelve layers is not held up because it takes longer than those of six."""
    steps = [Step(1.0, 6), Step(1.1, 6), Step(0.9, 6), Step(2.0, 12), Step(2.1, 12), Step(1.9, 12), Step(9.0, 6)]
    assert without_stalls(steps) == steps[:-1]


@pytest.mark.parametrize("norm", ["postln", "preln"])
def test_the_layers_that_ran_are_those_that_were_drawn(
    norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    given = ["--toy", "--device", "cpu", "--rounds", "3", "--steps", "2", "--factor", "4", "--precision", "fp32"]
    assert call(cost.main, monkeypatch, *given, "--norm", norm, "--json", path) == 0
    (case,) = read(path)["cases"]
    steps = case["every_step"]
    assert {name: len(found) for name, found in steps.items()} == {
        "0 layers": 6, "2 layers": 6, "4 layers": 6, "layer drop": 24,
    }  # fmt: skip
    p = Schedule(0.5, gamma=cost.AT_ONCE).keep_probabilities(1, 4)
    drawn = [sum(draw_gates(p, 0, step, 0)) for step in range(WARM, WARM + 24)]
    assert [layers for _, layers in steps["layer drop"]] == drawn
    assert case["executed"] == pytest.approx(sum(drawn) / 24)
    assert [layers for _, layers in steps["2 layers"]] == [2] * 6
    assert 0 < case["share"] < 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:])) <= 80


def fake_gpu(monkeypatch: pytest.MonkeyPatch, rate: Any, bytes_a_sequence: int) -> list[int]:
    """A GPU of 1000 bytes on which ``rate`` (batch) sequences are done a second; gives the batches that were tried."""
    tried: list[int] = []

    class Arm:
        def __init__(self, case: Case, layers: int, drop: bool) -> None:
            assert (layers, drop) == (case.shape.layers, False)
            self.batch = case.batch
            tried.append(case.batch)

        def steps(self, count: int) -> Sequence[Step]:
            return [Step(self.batch / rate(self.batch), 12)] * count

    monkeypatch.setattr(cost, "Arm", Arm)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: tried[-1] * bytes_a_sequence)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1000))
    return tried


def test_the_batch_grows_while_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASE, device="cuda")
    tried = fake_gpu(monkeypatch, lambda batch: 1000.0 * min(batch, 100), 1)
    assert cost.largest_batch(case)[0] == 128
    assert tried == [16, 32, 64, 128, 256]


def test_the_batch_grows_while_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = fake_gpu(monkeypatch, lambda batch: 1000.0 * batch, 5)
    assert cost.largest_batch(replace(CASE, device="cuda"))[0] == 128
    assert tried == [16, 32, 64, 128], "256 would need 1280 bytes, 128 leave room for the other arms"


def test_a_case_that_is_compiled_runs_the_same_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """``compile`` puts the compiled model under the same loop: here without a compiler's work."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    case = Case("preln", Shape(2, 32, 2, 16, 200), 2, "fp32", "compile", "cpu")
    arm = cost.Arm(case, 2, True)
    assert len(compiled) == 1
    assert {step.layers for step in arm.steps(3)} <= {0.0, 1.0, 2.0}
