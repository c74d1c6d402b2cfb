"""Compressed optimizers on another number of processes than before, in several buckets, and where all come together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ops.compression import Errors, GradientCollective, Pending, SingleProcess
from ops.compression.errors import served
from ops.optimizers import OneBitAdam, OptimizerError, ZeroOneAdam, compressed, zero_one_adam
from ops.optimizers.compressed import CompressedOptimizer
from tests.ops.optimizers.test_compressed import COUNT, KINDS, Exact, gradients, together, trained

#: Of ZeroOneAdam: alone for up to four steps from its third on.
APART: dict[str, Any] = {"var_freeze_step": 2, "local_step_scaler": 1, "local_step_clipper": 4, "lr": 0.01}


def begun(
    collective: GradientCollective, kind: str = "adam", dtype: torch.dtype = torch.float32
) -> tuple[CompressedOptimizer, nn.Parameter]:
    """An optimizer of 13 elements that compresses from its third step on."""
    weight = nn.Parameter(torch.linspace(-1, 1, 13).to(dtype))
    options = APART if kind == "zero_one" else {"freeze_step": 2, "lr": 0.01}
    return KINDS[kind]([weight], collective=collective, **options), weight


def go_on(optimizer: CompressedOptimizer, weight: nn.Parameter, first: int, last: int) -> Tensor:
    """The weight after steps ``first`` to ``last``, with gradients of each rank's own."""
    for step in range(first, last):
        seed = 100 * step + optimizer.collective.rank
        weight.grad = torch.randn(13, generator=torch.Generator().manual_seed(seed)).to(weight.dtype)
        optimizer.step()
    return weight.detach().clone()


def saved(collective: GradientCollective, steps: int = 6) -> tuple[Any, Any, Tensor]:
    """What all ranks have alike after some steps, what is this rank's own, and the weight."""
    optimizer, weight = begun(collective)
    go_on(optimizer, weight, 0, steps)
    return *copy.deepcopy(optimizer.split_ranks(optimizer.state_dict())), weight.detach().clone()


def resumed(parts: list[tuple[Any, Any, Tensor]], collective: GradientCollective) -> CompressedOptimizer:
    """An optimizer that goes on from there."""
    optimizer, weight = begun(collective)
    with torch.no_grad():
        weight.copy_(parts[0][2])
    optimizer.load_state_dict(OneBitAdam.join_ranks(parts[0][0], [own for _, own, _ in parts]))
    return optimizer


def test_the_errors_of_all_ranks_give_each_its_own() -> None:
    """On as many ranks nothing is lost: the next steps are those of a run that never stopped."""
    parts = together(2, saved)
    whole = together(2, lambda one: go_on(*begun(one), 0, 9))

    def again(one: GradientCollective) -> Tensor:
        optimizer = resumed(parts, one)
        (weight,) = optimizer.param_groups[0]["params"]
        return go_on(optimizer, weight, 6, 9)

    for mine, wanted in zip(together(2, again), whole, strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("size", [3, 1])
def test_on_another_number_of_ranks_as_much_is_owed(size: int) -> None:
    """Element by element, by the definition of what is owed: the mean of workers' errors and all servers' errors."""
    parts = together(2, saved)
    with pytest.warns(UserWarning, match=f"errors of 2 ranks go on with {size}"):
        found: list[Errors] = together(size, lambda one: resumed(parts, one)._errors[0])
    before = torch.stack([own["errors"]["0"]["worker"] for _, own, _ in parts]).mean(0)
    before += torch.cat([own["errors"]["0"]["server"] for _, own, _ in parts])
    after = torch.stack([each.worker for each in found]).mean(0) + torch.cat([each.server for each in found])
    torch.testing.assert_close(after, before)
    assert before.abs().min() > 0, "there was something"
    for rank, each in enumerate(found):
        part = served(13, rank, size)
        assert each.server.numel() == part.stop - part.start


def test_one_process_owes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    parts = [saved(SingleProcess())]
    assert parts[0][1] == {"errors": {}}
    assert not together(2, lambda one: resumed(parts, one)._errors)[1]
    assert not caplog.text
    assert not resumed(together(2, saved), SingleProcess())._errors
    assert "one process compresses nothing: the errors of 2 processes are left out" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_meeting_makes_all_the_same_to_the_last_bit(steps: int, dtype: torch.dtype) -> None:
    """In the warm-up, where an exchange has been, and between two: the mean, as far as an exchange is exact."""

    def run(one: GradientCollective, exact: bool) -> tuple[bool, Tensor, Tensor, Tensor]:
        optimizer, weight = begun(Exact(one) if exact else one, "zero_one", dtype)
        before = go_on(optimizer, weight, 0, steps)
        apart = not optimizer.together
        optimizer.meet()
        assert optimizer.together
        assert {float(state["step"]) for state in optimizer.state.values()} == {float(steps)}
        met = weight.detach().clone()
        optimizer.split_ranks(optimizer.state_dict())
        return apart, before, met, optimizer.state[weight]["exp_avg"].clone()

    for exact in (True, False):
        found = together(3, partial(run, exact=exact))
        assert {apart for apart, _, _, _ in found} == {steps == 6}
        for _, _, met, moments in found:
            assert torch.equal(met, found[0][2])
            assert torch.equal(moments, found[0][3])
        if exact:
            mean = torch.stack([before for _, before, _, _ in found]).float().mean(0)
            torch.testing.assert_close(met.float(), mean, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(found[0][1], found[1][1]) or steps > 1


def test_between_two_exchanges_a_state_is_not_for_all() -> None:
    def run(one: GradientCollective) -> None:
        optimizer, weight = begun(one, "zero_one")
        go_on(optimizer, weight, 0, 6)
        optimizer.split_ranks(optimizer.state_dict())

    with pytest.raises(OptimizerError, match=r"weights of their own at this step: call meet\(\) on all of them"):
        together(2, run)
    run(SingleProcess())  # one has only its own


def test_weights_given_to_all_count() -> None:
    """Between two exchanges of 0/1 Adam, the way back would lead to other weights in each process."""

    def run(one: GradientCollective, told: bool) -> Tensor:
        optimizer, weight = begun(one, "zero_one")
        go_on(optimizer, weight, 0, 6)
        with torch.no_grad():
            weight.fill_(0.5)
        if told:
            optimizer.start_together()
        return go_on(optimizer, weight, 6, 14)

    for told in (True, False):
        one, other = together(2, partial(run, told=told))
        assert torch.allclose(one, other, atol=1e-6) == told


def test_a_parameter_may_not_come_where_its_variance_is_not_known() -> None:
    """It would stay where it is without a word. 0/1 Adam's parameters may be without a gradient between two means."""
    weights = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
    optimizer = OneBitAdam([("a", weights[0]), ("b", weights[1])], freeze_step=2)
    for _ in range(2):
        weights[0].grad = torch.ones(4)
        optimizer.step()
    weights[1].grad = torch.ones(4)
    with pytest.raises(OptimizerError, match="b has its first gradient behind the warm-up, where its variance"):
        optimizer.step()
    optimizer = ZeroOneAdam(weights, var_update_scaler=1)
    for step in range(8):
        weights[1].grad = None if step in (2, 5) else torch.ones(4)
        optimizer.step()


@pytest.mark.parametrize("freeze", [100, 1])
def test_the_norm_that_is_clipped_by_is_told(freeze: int) -> None:
    """The mean gradient's in the warm-up, then the root mean square of the processes'; none without clipping."""

    def run(one: GradientCollective, limit: float) -> float | None:
        weight = nn.Parameter(torch.zeros(2))
        optimizer = OneBitAdam([weight], collective=one, freeze_step=freeze, max_grad_norm=limit)
        for gradient in ([1.0, 1.0], [3.0, 0.0] if one.rank else [0.0, 4.0]):
            weight.grad = torch.tensor(gradient)
            optimizer.step()
        return optimizer.grad_norm

    assert together(2, partial(run, limit=0.1)) == pytest.approx([2.5 if freeze == 100 else 12.5**0.5] * 2)
    assert together(2, partial(run, limit=0.0)) == [None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_several_buckets(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes together is a matter of the exchange: where that is exact, weights are the same."""
    grads = gradients(14, 2)
    options = {"var_freeze_step": 5, "local_step_scaler": 3} if kind == "zero_one" else {"freeze_step": 5}
    asked: list[int] = []

    class Watched(Exact):
        def compressed_mean(self, buffer: Tensor, errors: Errors, parts: Sequence[int] | None = None) -> Pending:
            asked.append(buffer.numel())
            return super().compressed_mean(buffer, errors, parts)

    def run() -> list[Tensor]:
        return together(2, lambda one: trained(kind, Watched(one), grads, **options))[0]

    whole = run()
    assert set(asked) == {COUNT}
    asked.clear()
    for module in (compressed, zero_one_adam):
        monkeypatch.setattr(module, "BUCKET_ELEMENTS", 30)
    for mine, wanted in zip(run(), whole, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-14)
    assert set(asked) == {35, 29}, "the first is larger than a bucket, the others are one"
