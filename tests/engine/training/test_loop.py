"""The loop walks its features in order, accumulates exactly, and learns."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from engine.errors import EngineError
from engine.training.feature import Feature, Progress
from engine.training.loop import Loop
from engine.training.schedules import build_schedule
from tests.engine.tiny import tiny, token_rows


class Recorder(Feature):
    """Writes down each hook, and doubles the loss."""

    name: ClassVar[str] = "recorder"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def setup(self, progress: Progress) -> None:
        self.seen.append("setup")

    def step_start(self, progress: Progress) -> None:
        assert all(p.grad is None for p in progress.model.parameters())
        self.seen.append("step_start")

    @contextmanager
    def forward_context(self, progress: Progress) -> Iterator[None]:  # type: ignore[override]
        self.seen.append(f"forward {progress.micro_batch}")
        yield
        self.seen.append("forward end")

    def loss(self, progress: Progress, loss: Tensor) -> Tensor:
        self.seen.append("loss")
        return loss * 2

    def backward_end(self, progress: Progress) -> None:
        self.seen.append("backward_end")

    def optimizer_step_start(self, progress: Progress) -> None:
        self.before = [p.detach().clone() for p in progress.model.parameters()]
        self.seen.append("optimizer_step_start")

    def optimizer_step_end(self, progress: Progress) -> None:
        assert any(not torch.equal(a, b) for a, b in zip(self.before, progress.model.parameters(), strict=True))
        self.seen.append("optimizer_step_end")

    def step_end(self, progress: Progress) -> Mapping[str, float]:
        self.seen.append("step_end")
        return {"hooks": float(len(self.seen))}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = list(state["seen"])


class Plain(Feature):
    name: ClassVar[str] = "plain"


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(count)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_hooks_are_called_in_order() -> None:
    model, recorder = line(), Recorder()
    loop = Loop(model, sgd(model), squared, (Plain(), recorder))
    report = loop.train_batch(batches(2))
    micro = ["loss", "backward_end"]
    assert recorder.seen == [
        "setup",
        "step_start",
        *["forward 0", "forward end", *micro],
        *["forward 1", "forward end", *micro],
        "optimizer_step_start",
        "optimizer_step_end",
        "step_end",
    ]
    assert report.step == 1
    assert report.metrics == {"recorder/hooks": 13.0}


def test_micro_batches_give_the_gradient_of_the_whole() -> None:
    model = line()
    twin = copy.deepcopy(model)
    two = batches(2)
    Loop(model, sgd(model), squared).train_batch(two)
    whole = tuple(torch.cat(parts) for parts in zip(*two, strict=True))
    Loop(twin, sgd(twin), squared, (Plain(),)).train_batch([whole])
    assert all(torch.allclose(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_feature_can_change_the_loss() -> None:
    model = line()
    twin = copy.deepcopy(model)
    one = batches(1)
    report = Loop(model, sgd(model), squared, (Recorder(),)).train_batch(one)
    assert report.loss == pytest.approx(float(squared(twin, one[0]).detach())), "the report is the model's own loss"
    Loop(twin, torch.optim.SGD(twin.parameters(), lr=0.2), squared).train_batch(one)
    assert all(torch.allclose(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_hugging_face_model_learns() -> None:
    model = copy.deepcopy(tiny("gpt2", "causal_lm").model)
    batch = torch.tensor([row * 2 for row in token_rows(160, (8, 8))])

    def loss(module: nn.Module, ids: Tensor) -> Tensor:
        found: Tensor = module(ids, labels=ids).loss
        return found

    loop = Loop(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loss, (Plain(),))
    losses = [loop.train_batch([batch]).loss for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_state_goes_with_the_features_that_saved_it() -> None:
    model, recorder = line(), Recorder()
    loop = Loop(model, sgd(model), squared, (recorder,))
    loop.train_batch(batches(1))
    state = copy.deepcopy(loop.state_dict())
    other = Recorder()
    resumed = Loop(model, sgd(model), squared, (other,))
    resumed.load_state_dict(state)
    assert resumed.progress.step == 1
    assert other.seen == recorder.seen
    with pytest.raises(EngineError, match=r"state of features \['recorder'\], this run has \['plain'\]"):
        Loop(model, sgd(model), squared, (Plain(),)).load_state_dict(state)


def test_bit_for_bit_what_a_loop_written_by_hand_gives() -> None:
    """AdamW, linear schedule with warm-up, clipping, three micro-batches a step."""
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 1))
    twin = copy.deepcopy(model)
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, twin))
    loop = Loop(model, ours, squared, schedule=build_schedule("linear", ours, 2, 8), clip_norm=0.3)
    schedule = torch.optim.lr_scheduler.LambdaLR(theirs, lambda n: n / 2 if n < 2 else 1 - min((n - 2) / 6, 1.0))
    data = batches(30)
    for step in range(10):
        three = data[3 * step : 3 * step + 3]
        rate = theirs.param_groups[0]["lr"]
        theirs.zero_grad()
        losses = [squared(twin, batch) for batch in three]
        for loss in losses:
            (loss / 3).backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.3)
        theirs.step()
        schedule.step()
        report = loop.train_batch(three)
        assert report.loss == sum(float(loss.detach()) for loss in losses) / 3
        assert report.grad_norm == float(norm)
        assert report.learning_rates == (rate,)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_the_three_calls_are_the_one() -> None:
    model = line()
    twin = copy.deepcopy(model)
    data, recorder, other = batches(4), Recorder(), Recorder()
    whole = Loop(model, sgd(model), squared, (recorder,))
    parts = Loop(twin, sgd(twin), squared, (other,), accumulation=2)
    reports = [whole.train_batch(data[:2]), whole.train_batch(data[2:])]
    found = []
    for batch in data:
        parts.backward(parts.forward(batch))
        found.append(parts.step())
    assert found == [None, reports[0], None, reports[1]]
    assert other.seen == recorder.seen
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_calls_out_of_turn_are_told() -> None:
    model = line()
    loop = Loop(model, sgd(model), squared, accumulation=2)
    with pytest.raises(EngineError, match=r"call forward\(\) and backward\(\) before step\(\)"):
        loop.step()
    (one,) = batches(1)
    loop.backward(loop.forward(one))
    with pytest.raises(EngineError, match=r"1 micro-batches wait for their step: call step\(\) first"):
        loop.train_batch([one])
    with pytest.raises(EngineError, match="save between steps"):
        loop.state_dict()
    loop.backward(loop.forward(one))
    with pytest.raises(EngineError, match=r"a step is 2 micro-batches, and all have come: call step\(\)"):
        loop.backward(loop.forward(one))
    assert loop.step() is not None


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_loss_that_is_no_number_leaves_the_weights(clip: float | None) -> None:
    model = line()
    before = copy.deepcopy(model.state_dict())
    loop = Loop(model, sgd(model), squared, clip_norm=clip)
    good, bad = batches(2)
    bad[1][2] = torch.nan
    with pytest.raises(EngineError, match=r"step 1: the loss of micro-batch 1 is nan\. The weights are as before"):
        loop.train_batch([good, bad])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert loop.train_batch([good]).step == 1, "and training can go on"


def test_gradients_that_are_no_numbers_leave_the_weights() -> None:
    model = line()
    before = copy.deepcopy(model.state_dict())

    def steep(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (module(batch[0]) * 0).sqrt().mean()  # a finite loss with an infinite slope

    with pytest.raises(EngineError, match="step 1: the norm of the gradients is nan"):
        Loop(model, sgd(model), steep, clip_norm=1.0).train_batch(batches(1))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_cannot_be_trained_is_told() -> None:
    model = line()
    with pytest.raises(EngineError, match="each may stand once"):
        Loop(model, sgd(model), squared, (Plain(), Plain()))
    with pytest.raises(EngineError, match="at least one micro-batch"):
        Loop(model, sgd(model), squared).train_batch([])
    with pytest.raises(EngineError, match="clip_norm is 0: it must be above 0"):
        Loop(model, sgd(model), squared, clip_norm=0)
    with pytest.raises(EngineError, match="accumulation is 0"):
        Loop(model, sgd(model), squared, accumulation=0)
