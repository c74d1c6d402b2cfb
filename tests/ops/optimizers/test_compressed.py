"""1-bit Adam, 1-bit LAMB and 0/1 Adam: the papers' equations, torch's AdamW and LAMB, and what goes wrong."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ops.compression import Errors, GradientCollective, Pending, Sent, SimulatedCollective, SingleProcess
from ops.compression.errors import chunk_of
from ops.optimizers import LAMB, OneBitAdam, OneBitLamb, OptimizerError, ZeroOneAdam
from ops.optimizers.compressed import CompressedOptimizer
from tests.ops.optimizers.compressed_equations import (
    Mean,
    PaperOneBitAdam,
    PaperOneBitLamb,
    PaperZeroOneAdam,
    SignMean,
    exact_mean,
)

SHAPES = ((7, 5), (5,), (4, 3, 2))
COUNT = sum(int(np.prod(shape)) for shape in SHAPES)
KINDS: dict[str, Callable[..., CompressedOptimizer]] = {
    "adam": OneBitAdam, "lamb": OneBitLamb, "zero_one": ZeroOneAdam
}  # fmt: skip


class Exact:
    """A collective whose compressed mean is exact: what is left is the algorithm."""

    def __init__(self, inner: GradientCollective) -> None:
        self._inner, self.rank, self.size, self.sent = inner, inner.rank, inner.size, Sent()

    def mean(self, tensors: Sequence[Tensor]) -> Pending:
        """As it is."""
        return self._inner.mean(tensors)

    def compressed_mean(self, buffer: Tensor, errors: Errors, parts: Sequence[int] | None = None) -> Pending:
        """The mean."""
        return self._inner.mean([buffer])


class Doubles(Exact):
    """Signs in double precision, as the equations are."""

    def compressed_mean(self, buffer: Tensor, errors: Errors, parts: Sequence[int] | None = None) -> Pending:
        """By the equations' own :class:`SignMean`, of which each process has one."""
        n = buffer.numel()
        mean = vars(errors).setdefault("paper", SignMean(bounds_of(n, self.size), list(parts or [n])))
        given = [torch.zeros_like(buffer) for _ in range(self.size)]
        given[self.rank] = buffer * self.size
        self._inner.mean(given).wait()
        buffer.copy_(torch.from_numpy(mean([one.numpy() for one in given])))
        return SingleProcess().compressed_mean(buffer, errors)


def gradients(steps: int, ranks: int) -> list[list[list[Tensor]]]:
    """[step][rank][parameter], of sizes that differ from parameter to parameter."""
    generator = torch.Generator().manual_seed(5)

    def one(i: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 3.0**i

    return [[[one(i, shape) for i, shape in enumerate(SHAPES)] for _ in range(ranks)] for _ in range(steps)]


def started() -> list[Tensor]:
    """Weights to begin with."""
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def together(ranks: int, run: Callable[[GradientCollective], Any]) -> list[Any]:
    """``run`` in a thread for each rank; their results, or the first error."""
    virtual = SimulatedCollective(ranks, timeout=20).ranks
    results: list[Any] = [None] * ranks
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            results[rank] = run(virtual[rank])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return results


def trained(
    kind: str, collective: GradientCollective, grads: Sequence[Sequence[Sequence[Tensor]]], **options: Any
) -> list[Tensor]:
    """A rank's weights behind all steps."""
    weights = [nn.Parameter(weight) for weight in started()]
    optimizer = KINDS[kind](weights, collective=collective, lr=0.01, weight_decay=0.1, **options)
    for step in grads:
        for weight, grad in zip(weights, step[collective.rank], strict=True):
            weight.grad = grad.clone()
        optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("freeze", [5, 100])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("kind", ["adam", "lamb"])
def test_the_papers_equations(kind: str, ranks: int, freeze: int, signs: bool) -> None:
    """Step for step, through warm-up, freeze and compression."""
    grads = gradients(14, ranks)
    wrap = Doubles if signs else Exact
    found = together(ranks, lambda one: trained(kind, wrap(one), grads, freeze_step=freeze, foreach=bool(one.rank % 2)))
    of_signs = {"adam": signs_of_each_size, "lamb": signs_of_one_size}[kind]
    mean: Mean = of_signs(ranks) if signs else exact_mean
    paper = {"adam": PaperOneBitAdam, "lamb": PaperOneBitLamb}[kind](
        [weight.numpy() for weight in started()], freeze, mean, decay=0.1
    )
    for step in grads:
        paper.step([[grad.numpy() for grad in rank] for rank in step], 0.01)
    for weights in found:
        for weight, wanted in zip(weights, paper.weights, strict=True):
            np.testing.assert_allclose(weight.numpy(), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("freeze", [5, 12, 100])
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_equations_of_0_1_adam(ranks: int, freeze: int, signs: bool) -> None:
    """Intervals of the variance and of local steps; each rank has weights of its own between two exchanges."""
    grads = gradients(30, ranks)
    wrap = Doubles if signs else Exact
    options = {"var_freeze_step": freeze, "var_update_scaler": 2, "local_step_scaler": 3, "local_step_clipper": 4}
    found = together(ranks, lambda one: trained("zero_one", wrap(one), grads, **options))
    means = (signs_of_each_size(ranks), signs_of_each_size(ranks)) if signs else (exact_mean, exact_mean)
    paper = PaperZeroOneAdam([weight.numpy() for weight in started()], ranks, freeze, means, decay=0.1)
    for step in grads:
        paper.step([[grad.numpy() for grad in rank] for rank in step], 0.01)
    for weights, wanted in zip(found, paper.weights, strict=True):
        flat = torch.cat([weight.reshape(-1) for weight in weights]).numpy()
        np.testing.assert_allclose(flat, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_0_1_adam_s_processes_meet_at_the_same_weights(dtype: torch.dtype) -> None:
    """To the last bit, however they got there, and are apart in between."""
    grads = gradients(40, 3)

    def run(collective: GradientCollective) -> list[tuple[bool, Tensor]]:
        weights = [nn.Parameter(weight.to(dtype)) for weight in started()]
        options = {"var_freeze_step": 5, "local_step_scaler": 4, "local_step_clipper": 4, "weight_decay": 0.1}
        optimizer = ZeroOneAdam(weights, 0.01, collective=collective, **options)  # type: ignore[arg-type]
        found = []
        for step in grads:
            for weight, grad in zip(weights, step[collective.rank], strict=True):
                weight.grad = grad.to(dtype)
            optimizer.step()
            state = [optimizer.state[weight].get("master_weight", weight) for weight in weights]
            found.append((optimizer.together, torch.cat([one.detach().reshape(-1).clone() for one in state])))
        return found

    for (whole, first), *others in zip(*together(3, run), strict=True):
        assert all(torch.equal(first, other) is whole is same for same, other in others)


def test_a_rate_of_zero_leaves_0_1_adam_s_numbers_finite() -> None:
    """As at the end of a schedule: momentum and weights stay numbers, and go on once there is a rate again."""
    optimizer, weight = small("zero_one")
    make_steps(optimizer, weight, 4)
    assert optimizer.frozen
    optimizer.param_groups[0]["lr"] = 0.0
    make_steps(optimizer, weight, 3, seed=1)
    before = weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.01
    make_steps(optimizer, weight, 1, seed=2)
    assert weight.isfinite().all()
    assert not torch.equal(weight, before)


def bounds_of(count: int, ranks: int) -> list[int]:
    """Of the ranks' chunks of so many elements."""
    chunk = chunk_of(count, ranks)
    return [min(i * chunk, count) for i in range(ranks + 1)]


def signs_of_one_size(ranks: int) -> Mean:
    """Of all parameters together, whose momenta 1-bit LAMB brings to one size."""
    return SignMean(bounds_of(COUNT, ranks), [COUNT])


def signs_of_each_size(ranks: int) -> Mean:
    """A size for each parameter, as DeepSpeed's are in fp32."""
    return SignMean(bounds_of(COUNT, ranks), [weight.numel() for weight in started()])


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_of_small_gradients_keeps_its_steps(kind: str) -> None:
    """Such as a key's bias, beside one of large gradients: signs of one size would move it 1e6 times the rate."""
    freeze = {"var_freeze_step": 5} if kind == "zero_one" else {"freeze_step": 5}

    def run(one: GradientCollective) -> float:
        # Of the one in the middle both ranks serve a part, beside a part of a neighbour.
        weights = [nn.Parameter(torch.zeros(64)) for _ in range(3)]
        optimizer = KINDS[kind](weights, collective=one, lr=0.01, **freeze)
        generator = torch.Generator().manual_seed(one.rank)
        for _ in range(20):
            for weight, size in zip(weights, (1.0, 1e-6, 1.0), strict=True):
                weight.grad = size * torch.randn(64, generator=generator)
            optimizer.step()
        return float(weights[1].detach().abs().max())

    assert max(together(2, run)) < 20 * 10 * 0.01, "a few times the rate, at each step"


@pytest.mark.parametrize("kind", KINDS)
def test_without_compression_they_are_adamw_and_lamb(kind: str) -> None:
    grads = gradients(8, 1)
    never = {"var_freeze_step": 100, "var_update_scaler": 100, "bias_correction": True}
    found = trained(kind, SingleProcess(), grads, **(never if kind == "zero_one" else {"freeze_step": 100}))
    weights = [nn.Parameter(weight) for weight in started()]
    other: Any = LAMB if kind == "lamb" else torch.optim.AdamW
    optimizer = other(weights, lr=0.01, weight_decay=0.1)
    for step in grads:
        for weight, grad in zip(weights, step[0], strict=True):
            weight.grad = grad.clone()
        optimizer.step()
    for mine, wanted in zip(found, weights, strict=True):
        torch.testing.assert_close(mine, wanted.detach(), rtol=1e-9, atol=1e-12)


def small(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[CompressedOptimizer, nn.Parameter]:
    """An optimizer of one parameter that compresses from its third step on."""
    weight = nn.Parameter(torch.linspace(-1, 1, 24).view(6, 4).to(dtype))
    late = "var_freeze_step" if kind == "zero_one" else "freeze_step"
    # One virtual rank: it exchanges with itself, where a single process leaves its momentum as it is.
    alone = SimulatedCollective(1).ranks[0]
    return KINDS[kind]([("w", weight)], collective=alone, lr=0.01, **{late: 2, **options}), weight


def make_steps(optimizer: CompressedOptimizer, weight: nn.Parameter, count: int, seed: int = 0) -> list[Tensor]:
    """The weight behind each step."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()
        found.append(weight.detach().clone())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at", [1, 4, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_comes_back_bit_for_bit(kind: str, at: int, dtype: torch.dtype) -> None:
    """In the warm-up, in compression, and between two exchanges of 0/1 Adam; errors and all."""
    options = {"local_step_scaler": 2, "local_step_clipper": 4} if kind == "zero_one" else {}
    one, weight = small(kind, dtype, **options)
    make_steps(one, weight, at)
    other, copy = small(kind, dtype, **options)
    with torch.no_grad():
        copy.copy_(weight)
    other.load_state_dict(one.state_dict())
    for mine, wanted in zip(make_steps(other, copy, 6, 1), make_steps(one, weight, 6, 1), strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_that_is_none_skips_the_step_on_all(kind: str) -> None:
    """In either stage, on whichever process; nothing has changed, and training goes on."""

    def run(collective: GradientCollective) -> None:
        weight = nn.Parameter(torch.ones(5, 3))
        late = "var_freeze_step" if kind == "zero_one" else "freeze_step"
        optimizer = KINDS[kind]([weight], collective=collective, lr=0.1, **{late: 2})
        for step in range(5):
            weight.grad = torch.full_like(weight, 0.5 + collective.rank)
            if step in (1, 4) and collective.rank == 1:
                weight.grad[2, 1] = torch.nan if step == 1 else torch.inf
            before, owed = weight.detach().clone(), copy.deepcopy(optimizer._errors)
            optimizer.step()
            assert optimizer.skipped == (step in (1, 4))
            assert torch.equal(before, weight) == optimizer.skipped
            for index, errors in owed.items() if optimizer.skipped else ():
                assert torch.equal(errors.worker, optimizer._errors[index].worker)
                assert torch.equal(errors.server, optimizer._errors[index].server)
        for errors in optimizer._errors.values():
            assert errors.worker.isfinite().all()
            assert errors.server.isfinite().all()

    together(2, run)


@pytest.mark.parametrize("freeze", [100, 1])
def test_clipping_takes_one_factor_for_all(freeze: int) -> None:
    """That of the mean gradient's norm, or of the root mean square of the processes' norms where no mean is known."""

    def run(collective: GradientCollective) -> Tensor:
        weight = nn.Parameter(torch.zeros(4))
        optimizer = OneBitAdam([weight], collective=Exact(collective), freeze_step=freeze, max_grad_norm=1.0)
        weight.grad = torch.zeros(4)
        optimizer.step()
        weight.grad = torch.tensor([3.0, 0.0, 0.0, 0.0] if collective.rank else [0.0, 4.0, 0.0, 0.0])
        optimizer.step()
        return weight.grad

    first, second = together(2, run)
    if freeze == 100:
        torch.testing.assert_close(first, torch.tensor([1.5, 2.0, 0, 0]) / 2.5, rtol=1e-5, atol=0)
    else:
        torch.testing.assert_close(first, torch.tensor([0, 4.0, 0, 0]) / 12.5**0.5, rtol=1e-5, atol=0)
        torch.testing.assert_close(second, torch.tensor([3.0, 0, 0, 0]) / 12.5**0.5, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_never_had_a_gradient_stay(kind: str) -> None:
    """Positions beyond all sequences, for example: signs know no zero."""
    optimizer, weight = small(kind)
    before = weight.detach().clone()
    for _ in range(8):
        weight.grad = torch.randn(6, 4)
        weight.grad[3:] = 0
        optimizer.step()
    assert torch.equal(weight[3:], before[3:])
    assert not torch.equal(weight[:3], before[:3])


def test_a_parameter_without_a_gradient_counts_as_zeros() -> None:
    """Once signs are exchanged; before, it is left alone."""
    weights = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
    optimizer = OneBitAdam(weights, freeze_step=3, lr=0.1)
    for step in range(6):
        weights[0].grad = torch.ones(4)
        weights[1].grad = None if step in (1, 4) else torch.ones(4)
        before = weights[1].detach().clone()
        optimizer.step()
        assert torch.equal(before, weights[1]) == (step == 1), "a momentum moves on"


def test_processes_with_other_gradients_are_told() -> None:
    """Before gradients are exchanged, at which real processes would hang."""

    def run(collective: GradientCollective) -> None:
        weight = nn.Parameter(torch.ones(3 + collective.rank))
        weight.grad = torch.ones_like(weight)
        OneBitAdam([weight], collective=collective).step()

    with pytest.raises(
        OptimizerError, match=r"processes have not the same gradients: \d elements here, 3.5 in the mean"
    ):
        together(2, run)


def test_auto_freezes_where_the_variance_stands() -> None:
    """Not while it grows, nor while the learning rate does."""
    weight = nn.Parameter(torch.zeros(50))
    optimizer = OneBitAdam([weight], freeze_step="auto", betas=(0.9, 0.98), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    frozen = []
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1.0, step / 200)
        weight.grad = torch.randn(50, generator=generator)
        optimizer.step()
        frozen.append(optimizer.frozen)
    assert not any(frozen[:200]), "the rate still grew"
    assert frozen[-1]


def test_errors_of_another_world_begin_anew(caplog: pytest.LogCaptureFixture) -> None:
    one, weight = small("adam")
    make_steps(one, weight, 5)
    state = one.state_dict()
    state["compression"] = {**state["compression"], "size": 4}
    other, _ = small("adam")
    other.load_state_dict(state)
    assert "errors are those of rank 0 of 4 processes, this is rank 0 of 1: compensation begins anew" in caplog.text
    assert other.frozen
    assert not other._errors


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("adam", {"freeze_step": 0}, "freeze_step is 0: use a number of steps from 1, or"),
        ("adam", {"collective": "nccl"}, "collective is 'nccl': use one of ops.compression, or None for one process"),
        ("adam", {"freeze_step": "never"}, "freeze_step is 'never'"),
        ("adam", {"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
        ("lamb", {"factor_min": 5.0}, "factor_min is 5.0, above factor_max 4.0"),
        ("lamb", {"coeff_beta": 1.0}, "coeff_beta is 1.0"),
        ("zero_one", {"var_freeze_step": "auto"}, "var_freeze_step is 'auto': use a number of steps"),
        ("zero_one", {"local_step_clipper": 0}, "local_step_clipper is 0: use a whole number from 1"),
    ],
)
def test_options_out_of_range(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptimizerError, match=message):
        KINDS[kind]([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(("ranks", "averaged"), [(2, True), (3, True), (3, False), (1, True)])
def test_gradients_that_somebody_has_averaged_are_told(
    ranks: int, averaged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, at the first step, and by one process."""
    own = gradients(3, ranks)
    grads = [[step[0] if averaged else rank for rank in step] for step in own]
    together(ranks, lambda one: trained("adam", Exact(one), grads, freeze_step=2))
    told = [record for record in caplog.records if "the same norm on all" in record.getMessage()]
    assert len(told) == (1 if averaged and ranks > 1 else 0)
