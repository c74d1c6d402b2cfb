# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False
"""LayerNorm and RMSNorm of whole rows, and the device functions of which other launches build their own norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.closed_forms import norm_flops
from ops.costs import Cost, priced
from ops.errors import KernelError
from ops.generic.launch import WIDEST_ROW, assert_runs_here, assert_shape, on, power_of_two, warps
from ops.spec import NormKind
from ops.triton_support import check


@triton.jit
def _statistics(x, mask, n, eps, LAYERNORM: tl.constexpr, AXIS: tl.constexpr):
    """Mean (zero for an RMSNorm) and reciprocal deviation of ``x`` along AXIS, which stays as an axis of one.

    ``x`` is fp32 and zero where not ``mask``. The squares are of what is left after the mean: the difference of
    E[x^2] and E[x]^2 would cancel where the mean is large.
    """
    if LAYERNORM:
        mean = tl.sum(x, AXIS, keep_dims=True) / n
        centred = tl.where(mask, x - mean, 0.0)
        squares = tl.sum(centred * centred, AXIS, keep_dims=True)
    else:
        squares = tl.sum(x * x, AXIS, keep_dims=True)
        mean = tl.zeros_like(squares)
    return mean, tl.rsqrt(squares / n + eps)


@triton.jit
def _scaled(x, mean, scale, weight, bias, column, mask):
    """The norm of ``x`` from its statistics, in fp32; ``bias`` may be None."""
    y = (x - mean) * scale * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _norm_of_row(x, column, mask, n, weight, bias, eps, LAYERNORM: tl.constexpr):
    """The norm of one row held in registers: ``x`` is fp32 and zero where not ``mask``."""
    mean, scale = _statistics(x, mask, n, eps, LAYERNORM, 0)
    return _scaled(x, mean, scale, weight, bias, column, mask)


@triton.jit
def _norm_kernel(x, weight, bias, y, n, eps, BLOCK: tl.constexpr, LAYERNORM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * n
    column = tl.arange(0, BLOCK)
    mask = column < n
    value = tl.load(x + row + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row + column, _norm_of_row(value, column, mask, n, weight, bias, eps, LAYERNORM), mask=mask)


@triton.jit
def _wide_norm_kernel(x, weight, bias, y, n, eps, BLOCK: tl.constexpr, LAYERNORM: tl.constexpr):
    """As :func:`_norm_kernel` for rows that no block holds: the row is read once more for each statistic."""
    row = tl.program_id(0).to(tl.int64) * n
    lane = tl.arange(0, BLOCK)
    mean = tl.zeros((1,), tl.float32)
    if LAYERNORM:
        sums = tl.zeros((BLOCK,), tl.float32)
        for at in range(0, n, BLOCK):
            sums += tl.load(x + row + at + lane, mask=at + lane < n, other=0.0).to(tl.float32)
        mean = tl.sum(sums, 0, keep_dims=True) / n
    squares = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, n, BLOCK):
        mask = at + lane < n
        value = tl.load(x + row + at + lane, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, value - mean, 0.0)
        squares += centred * centred
    scale = tl.rsqrt(tl.sum(squares, 0, keep_dims=True) / n + eps)
    for at in range(0, n, BLOCK):
        mask = at + lane < n
        value = tl.load(x + row + at + lane, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + row + at + lane, _scaled(value, mean, scale, weight, bias, at + lane, mask), mask=mask)


def _norm_cost(
    result: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, kind: NormKind, *_: object, **__: object
) -> Cost:
    n = x.shape[-1]
    return Cost(norm_flops(x.numel() // n, n, kind, bias is not None))


@priced(_norm_cost)
def norm(x: Tensor, weight: Tensor, bias: Tensor | None, kind: NormKind, eps: float) -> Tensor:
    """The norm of the last axis of ``x`` [..., n] (see :func:`ops.reference.norm`), computed in fp32, in ``x``'s dtype.

    ``weight`` and ``bias`` are [n]. Raises :class:`KernelError` for tensors that do not fit together.
    """
    assert_norm("norm", x, weight, bias)
    y = torch.empty_like(x)
    n = x.shape[-1]
    if x.numel() == 0:
        return y
    kernel, block = (_norm_kernel, power_of_two(n)) if n <= WIDEST_ROW else (_wide_norm_kernel, WIDEST_ROW // 2)
    with on(x.device):
        kernel[(x.numel() // n,)](
            x, weight, bias, y, n, eps, BLOCK=block, LAYERNORM=kind == "layernorm", num_warps=warps(block)
        )
    return y


def assert_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuses a norm's weights that do not fit the rows of ``x`` [..., n]."""
    assert_runs_here(op, x)
    check(op, x, weight=weight, bias=bias)
    if x.dim() < 1:
        raise KernelError(f"{op}: x is a single number, wanted rows")
    assert_shape(op, "weight", weight, x.shape[-1])
    assert_shape(op, "bias", bias, x.shape[-1])
