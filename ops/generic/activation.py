# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False
"""Bias and activation, and the gate of gated feed-forwards, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ops.closed_forms import ACTIVATION_FLOPS
from ops.costs import Cost, priced
from ops.errors import KernelError
from ops.generic.launch import assert_runs_here, assert_shape, on, piece, warps
from ops.spec import Activation
from ops.triton_support import check


@triton.jit
def _tanh(x):
    """tanh without libdevice, which the interpreter lacks: a series where 1 - exp(-2|x|) would cancel."""
    square = x * x
    small = x * (1.0 + square * (-0.33333334 + square * (0.13333334 + square * -0.05396825)))
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(square < 0.04, small, tl.where(x < 0.0, -large, large))


@triton.jit
def _activation(x, ACT: tl.constexpr):
    """The activation named ACT of ``x`` in fp32; see :func:`ops.reference.activation`."""
    if ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u), which cancels nowhere
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    elif ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "tanh":
        return _tanh(x)
    else:
        return tl.where(x < 0.0, 0.0, x)  # not a maximum, which would hide NaN


@triton.jit
def _activate_kernel(x, bias, y, n, ACT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n
    at = x + row * (2 * n if GATED else n) + column
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    value = _activation(value, ACT)
    if GATED:
        up = tl.load(at + n, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            up += tl.load(bias + n + column, mask=mask, other=0.0).to(tl.float32)
        value *= up
    tl.store(y + row * n + column, value, mask=mask)


def _activate_cost(
    result: Tensor, x: Tensor, bias: Tensor | None, activation: Activation, *, gated: bool = False
) -> Cost:
    """The bias is the product's, which the dense convention leaves out."""
    flops = (ACTIVATION_FLOPS[activation] + gated) * result.numel()
    return Cost(flops, executed_flops=flops + (bias is not None) * x.numel())


@priced(_activate_cost)
def activate(x: Tensor, bias: Tensor | None, activation: Activation, *, gated: bool = False) -> Tensor:
    """``activation(x + bias)``; if ``gated``, ``activation(gate) * up`` of the halves ``gate, up`` of ``x + bias``.

    ``x`` is [T, n], or [T, 2 n] if gated, ``bias`` as wide or None; the result [T, n] is rounded once, to ``x``'s
    dtype. Raises :class:`KernelError` for tensors that do not fit together.
    """
    assert_runs_here("activate", x)
    check("activate", x, bias=bias)
    if x.dim() != 2 or (gated and x.shape[1] % 2):
        wanted = "[T, 2 n]" if gated else "[T, n]"
        raise KernelError(f"activate: x has shape {list(x.shape)}, wanted {wanted}")
    rows, width = x.shape
    assert_shape("activate", "bias", bias, width)
    n = width // 2 if gated else width
    y = x.new_empty(rows, n)
    if y.numel():
        block = piece(rows, n)
        grid = (rows, triton.cdiv(n, block))
        with on(x.device):
            _activate_kernel[grid](x, bias, y, n, ACT=activation, GATED=gated, BLOCK=block, num_warps=warps(block))
    return y
