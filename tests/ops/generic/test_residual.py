"""Bias, residual and the norm behind them against their definitions in fp64."""

from __future__ import annotations

import pytest
import torch

from ops import reference
from ops.errors import KernelError
from ops.generic.launch import WIDEST_ROW
from ops.generic.residual import add_residual, add_residual_norm
from ops.spec import NormKind
from ops.weights import Norm
from tests.ops.devices import DEVICES
from tests.ops.specs import assert_near, noise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 300), (5, 33), (0, 8), (2, 1), (1, WIDEST_ROW + 3)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_add_residual(device: str, dtype: torch.dtype, shape: tuple[int, int], biased: bool) -> None:
    partial, residual = noise(*shape, dtype=dtype), noise(*shape, dtype=dtype, seed=1)
    bias = noise(shape[1], dtype=dtype, seed=2) if biased else None
    exact = reference.add_residual(partial.double(), None if bias is None else bias.double(), residual.double())
    moved = partial.to(device), None if bias is None else bias.to(device), residual.to(device)
    assert_near(add_residual(*moved), exact, dtype, 1)
    for kind in ("layernorm", "rmsnorm"):
        _check_normed(device, dtype, moved, exact, kind)


def _check_normed(
    device: str,
    dtype: torch.dtype,
    moved: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
    exact: torch.Tensor,
    kind: NormKind,
) -> None:
    n = exact.shape[1]
    weight = noise(n, dtype=dtype, seed=3) + 1
    norm_bias = noise(n, dtype=dtype, seed=4) if kind == "layernorm" else None
    weights = Norm(weight.to(device), None if norm_bias is None else norm_bias.to(device))
    raw, normed = add_residual_norm(*moved, weights, kind, 1e-5)
    assert raw.dtype == normed.dtype == dtype
    assert_near(raw, exact, dtype, 1)
    double = None if norm_bias is None else norm_bias.double()
    assert_near(normed, reference.norm(exact, kind, weight.double(), double, 1e-5), dtype, n)


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_stay_as_they_are(device: str) -> None:
    partial, residual = noise(3, 9, device=device), noise(3, 9, seed=1, device=device)
    before = partial.clone(), residual.clone()
    add_residual_norm(partial, None, residual, Norm(noise(9, device=device)), "rmsnorm", 1e-5)
    assert torch.equal(partial, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_fit_is_refused(device: str) -> None:
    x = noise(4, 6, device=device)
    with pytest.raises(KernelError, match=r"add_residual: residual has strides \(1, 4\)"):
        add_residual(x, None, noise(6, 4, device=device).t())
    with pytest.raises(KernelError, match=r"add_residual: residual has shape \[3, 6\], wanted \[4, 6\]"):
        add_residual(x, None, x[:3])
    with pytest.raises(KernelError, match=r"add_residual: bias has shape \[4\], wanted \[6\]"):
        add_residual(x, noise(4, device=device), x)
    with pytest.raises(KernelError, match=r"add_residual: residual is torch\.float16"):
        add_residual(x, None, x.half())
    with pytest.raises(KernelError, match=r"add_residual_norm: weight has shape \[4\], wanted \[6\]"):
        add_residual_norm(x, None, x, Norm(noise(4, device=device)), "rmsnorm", 1e-5)
    with pytest.raises(KernelError, match=r"add_residual: x has shape \[6\], wanted \[T, n\]"):
        add_residual(x[0], None, x[0])
