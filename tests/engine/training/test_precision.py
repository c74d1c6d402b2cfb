"""Mixed precision: what is computed in what, and what an overflow does."""

from __future__ import annotations

import copy
import logging
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from engine.errors import EngineError
from engine.training.feature import Feature, Progress
from engine.training.loop import Loop
from engine.training.precision import LossScale, Precision
from engine.training.schedules import build_schedule


def line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).float().square().mean()


class Skipped(Feature):
    name: ClassVar[str] = "skipped"

    def __init__(self) -> None:
        self.steps: list[str] = []

    def step_skipped(self, progress: Progress) -> None:
        self.steps.append(f"skipped {progress.step}")

    def optimizer_step_end(self, progress: Progress) -> None:
        self.steps.append(f"done {progress.step}")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("mode", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_products_are_computed_in_it_and_weights_stay_in_fp32(mode: str, dtype: torch.dtype) -> None:
    model, seen = line(), []

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        out = module(batch)
        seen.append(out.dtype)
        return out.float().square().mean()

    Loop(model, sgd(model), loss, precision=Precision(mode)).train_batch([torch.randn(4, 3)])  # type: ignore[arg-type]
    assert seen == [dtype]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_scale_leaves_gradients_as_they_are() -> None:
    """Scaled, unscaled and clipped: the same weights as without a scale, to the rounding of fp16."""
    model = line()
    twin = copy.deepcopy(model)
    batch = torch.randn(4, 3)
    first = Loop(model, sgd(model), squared, precision=Precision("fp16"), clip_norm=0.5).train_batch([batch, batch])
    second = Loop(twin, sgd(twin), squared, clip_norm=0.5).train_batch([batch, batch])
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=2e-3)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


def test_an_overflow_skips_the_step_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model, feature = line(), Skipped()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = sgd(model)
    schedule = build_schedule("linear", optimizer, 0, 10)
    precision = Precision("fp16", scale=LossScale(initial=2.0**40, growth_interval=1000))
    loop = Loop(model, optimizer, squared, (feature,), schedule=schedule, precision=precision, clip_norm=1.0)
    batch = torch.randn(4, 3)
    with caplog.at_level(logging.WARNING, "slipstream.training"):
        reports = [loop.train_batch([batch]) for _ in range(2)]
    assert [report.skipped for report in reports] == [True, True]
    assert [report.step for report in reports] == [0, 0]
    assert [record.message for record in caplog.records] == [
        "a gradient overflowed in fp16: the step is skipped, the loss scale is 5.49756e+11 now "
        "(later ones are not told)"
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert feature.steps == ["skipped 0", "skipped 0"]
    while loop.train_batch([batch]).skipped:
        pass
    assert loop.progress.step == 1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9), "the schedule has made one step"
    assert feature.steps[-1] == "done 0"
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_scale_and_schedule_are_state() -> None:
    def loop() -> Loop:
        model = line()
        optimizer = sgd(model)
        schedule = build_schedule("cosine", optimizer, 2, 9)
        precision = Precision("fp16", scale=LossScale(initial=2.0**8, growth_interval=2))
        return Loop(model, optimizer, squared, schedule=schedule, precision=precision)

    torch.manual_seed(3)
    batches = [torch.randn(4, 3) for _ in range(6)]
    whole = loop()
    reports = [whole.train_batch([batch]) for batch in batches]
    first = loop()
    for batch in batches[:3]:
        first.train_batch([batch])
    second = loop()
    second.progress.model.load_state_dict(first.progress.model.state_dict())
    second.progress.optimizer.load_state_dict(first.progress.optimizer.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [second.train_batch([batch]) for batch in batches[3:]] == reports[3:]
    assert second.precision.scale == whole.precision.scale
    assert whole.precision.scale == 2.0**11, "six steps, three times doubled"


def test_states_of_other_runs_are_refused() -> None:
    plain, model = Loop(line(), sgd(line()), squared), line()
    scaled = Loop(model, sgd(model), squared, precision=Precision("fp16"))
    with pytest.raises(EngineError, match="the checkpoint has a loss scale, this run is in fp32"):
        plain.load_state_dict(scaled.state_dict())
    with pytest.raises(EngineError, match="the checkpoint lacks a loss scale, this run is in fp16"):
        scaled.load_state_dict(plain.state_dict())
    optimizer = sgd(model)
    scheduled = Loop(model, optimizer, squared, schedule=build_schedule("constant", optimizer))
    with pytest.raises(EngineError, match="the checkpoint lacks a schedule"):
        scheduled.load_state_dict(plain.state_dict())


def test_what_has_no_effect_or_cannot_be_right() -> None:
    with pytest.raises(EngineError, match=r'a loss scale has no effect in bf16: leave it out, or set .* to "fp16"'):
        Precision("bf16", scale=LossScale())
    model = line().half()
    with pytest.raises(EngineError, match=r"weight is torch.float16: training in fp16 keeps weights in fp32"):
        Loop(model, sgd(model), squared, precision=Precision("fp16"))
