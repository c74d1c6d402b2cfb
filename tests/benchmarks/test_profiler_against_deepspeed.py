"""Profilers side by side: ours is torch's count on all ten models, what is said of DeepSpeed's is so, tables fit."""

from __future__ import annotations

from dataclasses import asdict
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import profiler_against_deepspeed
from benchmarks.profiler_against_deepspeed import off, text_of
from benchmarks.profiler_sides import Found, Outside, Runs, deepspeed, slipstream, torch_counter
from benchmarks.profiler_subjects import SUBJECTS
from profiler import count
from tests.benchmarks.small import call, read

with_deepspeed = pytest.mark.skipif(util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.mark.parametrize("name", SUBJECTS)
def test_ours_counts_the_products_that_torch_counts(name: str) -> None:
    runs = Runs(name, toy=True, rounds=1)
    ours, torchs = slipstream(runs), torch_counter(runs)
    assert ours.macs == torchs.whole > 0
    assert ours.unknown == {}
    assert {operator: ours.forward[operator] for operator in torchs.forward} == torchs.forward
    # A convolution in groups, whose weight's gradient torch takes for that of a dense one.
    differ = {operator for operator, flops in torchs.backward.items() if ours.backward[operator] != flops}
    assert differ == ({"aten.convolution_backward"} if name == "mobilenet-v2" else set())
    assert set(ours.times) == {"plain", "counted", "timed"}
    assert all(len(each) == 1 and each[0] > 0 for each in ours.times.values())


def test_torch_does_not_know_every_product_of_a_cpu() -> None:
    found = torch_counter(Runs("lstm", toy=True, rounds=1))
    assert found.macs == 18 * 32 * 64  # the head alone
    assert found.whole == found.macs + 2 * 18 * 4 * 32 * (32 + 32)


def test_what_runs_outside_of_counted_functions() -> None:
    """A profiler that wraps ``F.gelu`` and counts LSTMs by their class."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return theirs.gelu(self.lstm(x)[0]).mul(2.0)

    theirs = SimpleNamespace(wrapFunc=lambda function, cost: function, MODULE_HOOK_MAPPING={nn.LSTM: None})
    outside, model, x = Outside(), Model(), torch.randn(3, 2, 8)
    outside.watch(theirs, model)
    theirs.gelu = theirs.wrapFunc(F.gelu, None)
    with torch.no_grad(), outside:
        model(x)
    assert outside.flops == {"aten.mul": 48}
    theirs.gelu = F.gelu
    with torch.no_grad(), outside:
        model(x)
    assert outside.flops == {"aten.mul": 96, "aten.gelu": count(F.gelu, x)[1].total().flops}


def found(**more: object) -> Found:
    times = {"plain": [0.1, 0.1, 0.2], "counted": [0.3, 0.2, 0.25], "timed": [0.15, 0.15, 0.15]}
    values = {"flops": 2_200, "macs": 1_000, "executed": 2_300, "whole": 1_000, "calls": 200, "times": times}
    return Found(**{**values, "backward": {"aten.mm": 4_000}, **more})


def test_the_tables() -> None:
    theirs = found(flops=2_090, macs=900, unseen={"aten.mul": 20, "aten.add": 90}, backward={})
    row = {"slipstream": found(unknown={"mine.op": 2}), "torch": found(macs=500), "DeepSpeed": theirs}
    text = text_of({"mixtral-small": row, "mobilenet-v2": {**row, "DeepSpeed": Found(error="TypeError: no q")}})
    products, operations, costs, unseen = (part.splitlines()[1:] for part in text.split("\n\n"))
    assert products[2].split() == ["mixtral-small", "500", "1.00", "K", "1.00", "K", "0", "900", "-10%"]
    assert products[3].split()[-2:] == ["error", "-"]
    assert operations[2].split() == ["mixtral-small", "2.20", "K", "2.30", "K", "2.09", "K", "-5%", "5.0%", "0", "no"]
    assert costs[2].split() == ["mixtral-small", "99%", "100", "ms", "2.50", "x", "1.50", "x", "2.50", "x", "2.50", "x"]
    assert costs[3].split()[-3:] == ["-", "2.50", "x"]
    assert unseen == [
        "mixtral-small: add 90, mul 20",
        "mixtral-small, unknown to slipstream: mine.op",
        "mobilenet-v2: TypeError: no q",
        "mobilenet-v2, unknown to slipstream: mine.op",
    ]
    assert max(map(len, text.splitlines())) <= 80


def test_off_is_zero_only_where_both_are_equal() -> None:
    assert [off(*both) for both in ((100, 100), (1_000_001, 1_000_000), (11, 100))] == ["0", "+0.0001%", "-89%"]


@with_deepspeed
def test_deepspeed_as_it_is() -> None:
    runs = Runs("lstm", toy=True, rounds=1)
    ours, theirs = slipstream(runs), deepspeed(runs)
    assert theirs.error == ""
    assert 0 < theirs.macs < ours.macs  # its hook on LSTMs says FLOPs, no MACs
    assert theirs.beyond == 0
    assert F.linear.__module__ != "deepspeed.profiling.flops_profiler.profiler"


@with_deepspeed
def test_an_error_of_deepspeed_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    class Keywords(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(query=x, key=x, value=x)

    monkeypatch.setitem(SUBJECTS, "lstm", lambda toy: (Keywords(), {"x": torch.randn(1, 2, 4, 8)}))
    error = deepspeed(Runs("lstm", toy=True, rounds=1)).error
    assert error.startswith("TypeError: _attn_flops_compute() missing 3 required positional arguments")


@with_deepspeed
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    given = ("--toy", "--only", "unet-block", "--rounds", "1", "--threads", "1", "--json", path)
    assert call(profiler_against_deepspeed.main, monkeypatch, *given) == 0
    rows = {name: {side: Found(**one) for side, one in row.items()} for name, row in read(path)["rows"].items()}
    assert text_of(rows) in capsys.readouterr().out
    assert asdict(rows["unet-block"]["DeepSpeed"])["unseen"]["aten.add"] > 0
