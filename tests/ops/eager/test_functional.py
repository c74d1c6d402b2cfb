"""The small ops of the eager set against their definitions in fp64."""

from __future__ import annotations

import pytest
import torch

from ops import reference
from ops.eager import functional
from ops.plan import StepInputs
from ops.spec import Activation, NormKind, RotaryPositions
from ops.weights import Norm
from tests.ops.specs import assert_near, noise, spec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("shape", [(1, 48), (7, 33), (0, 16), (3, 5, 8), (2, 1)])
def test_norm(dtype: torch.dtype, kind: NormKind, shape: tuple[int, ...]) -> None:
    x = noise(*shape, dtype=dtype) * 3 + 1
    weight = noise(shape[-1], dtype=dtype, seed=1) + 1
    bias = noise(shape[-1], dtype=dtype, seed=2) if kind == "layernorm" else None
    ours = functional.norm(x, Norm(weight, bias), spec(norm=kind))
    exact = reference.norm(x.double(), kind, weight.double(), None if bias is None else bias.double(), 1e-5)
    assert_near(ours, exact, dtype, shape[-1])


def test_norm_of_strided_rows() -> None:
    wide = noise(6, 40)
    ours = functional.norm(wide[:, ::2], Norm(noise(20, seed=1), None), spec())
    exact = reference.norm(wide[:, ::2].double(), "rmsnorm", noise(20, seed=1).double(), None, 1e-5)
    assert_near(ours, exact, torch.float32, 20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(functional.ACTIVATIONS))
def test_activation(dtype: torch.dtype, kind: Activation) -> None:
    x = torch.cat((noise(9, 7, dtype=dtype) * 4, torch.zeros(1, 7, dtype=dtype)))
    assert_near(functional.ACTIVATIONS[kind](x), reference.activation(x.double(), kind), dtype, 4)


def test_activations_are_different_things() -> None:
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)
    values = [reference.activation(x, kind) for kind in functional.ACTIVATIONS]
    for i, one in enumerate(values):
        assert all(float((one - other).abs().max()) > 1e-4 for other in values[:i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("size", "dim"), [(8, 8), (16, 6), (5, 2)])
@pytest.mark.parametrize("tokens", [1, 5, 0])
def test_rotary(dtype: torch.dtype, interleaved: bool, size: int, dim: int, tokens: int) -> None:
    rotary = RotaryPositions(dim, tuple(100.0 ** (-2 * i / dim) for i in range(dim // 2)), 1.2, interleaved)
    positions = torch.arange(tokens) * 3
    x = noise(tokens, 4, size, dtype=dtype)
    inputs = StepInputs(positions, positions, (tokens,))
    assert_near(functional.rotate(x, inputs, rotary), reference.rotary(x.double(), positions, rotary), dtype, 6)


def test_rotary_keeps_lengths_and_relative_angles() -> None:
    """What makes it rotary: scores depend on the distance alone, and no vector changes its length."""
    rotary = RotaryPositions(8, (1.0, 0.5, 0.1, 0.01))
    q, k = noise(1, 1, 8).double(), noise(1, 1, 8, seed=3).double()

    def score(at: int, distance: int) -> float:
        turned = [reference.rotary(x, torch.tensor([p]), rotary) for x, p in ((q, at), (k, at - distance))]
        assert torch.allclose(turned[0].norm(), q.norm())
        return float((turned[0] * turned[1]).sum())

    assert score(40, 7) == pytest.approx(score(9, 7))
    assert score(40, 7) != pytest.approx(score(40, 8))
