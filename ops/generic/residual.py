# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False
"""Bias and residual behind a reduce, and with them the norm that the next macro-op reads, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.closed_forms import norm_flops
from ops.costs import Cost, priced
from ops.errors import KernelError
from ops.generic.launch import WIDEST_ROW, assert_runs_here, assert_shape, on, piece, power_of_two, warps
from ops.generic.norm import _norm_of_row, assert_norm, norm
from ops.spec import NormKind
from ops.triton_support import check
from ops.weights import Norm


@triton.jit
def _add_residual_kernel(
    partial, bias, residual, raw, weight, norm_bias, normed, n, eps, BLOCK: tl.constexpr, LAYERNORM: tl.constexpr
):
    """With ``weight`` a block holds a whole row; the norm is of the sum before it is rounded."""
    row = tl.program_id(0).to(tl.int64) * n
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n
    value = tl.load(partial + row + column, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(residual + row + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(raw + row + column, value, mask=mask)
    if weight is not None:
        y = _norm_of_row(value, column, mask, n, weight, norm_bias, eps, LAYERNORM)
        tl.store(normed + row + column, y, mask=mask)


def _add_cost(result: Tensor, partial: Tensor, bias: Tensor | None, residual: Tensor) -> Cost:
    return Cost((1 + (bias is not None)) * partial.numel())


def _add_norm_cost(
    result: tuple[Tensor, Tensor], partial: Tensor, bias: Tensor | None, residual: Tensor, weights: Norm,
    kind: NormKind, eps: float,
) -> Cost:  # fmt: skip
    """The tensors of a ``Norm`` are not seen among the arguments."""
    normed = norm_flops(partial.shape[0], partial.shape[1], kind, weights.bias is not None)
    given = [x.nbytes for x in (partial, bias, residual, weights.weight, weights.bias) if x is not None]
    return Cost(_add_cost(result[0], partial, bias, residual).flops + normed, bytes_read=sum(given))


@priced(_add_cost)
def add_residual(partial: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """``partial + bias + residual`` [T, n], rounded once; ``bias`` [n] or None.

    Raises :class:`KernelError` for tensors that do not fit together.
    """
    _check("add_residual", partial, bias, residual)
    rows, n = partial.shape
    raw = torch.empty_like(partial)
    if raw.numel():
        block = piece(rows, n)
        grid = (rows, triton.cdiv(n, block))
        with on(partial.device):
            _add_residual_kernel[grid](
                partial, bias, residual, raw, None, None, None, n, 0.0,
                BLOCK=block, LAYERNORM=False, num_warps=warps(block),
            )  # fmt: skip
    return raw


@priced(_add_norm_cost)
def add_residual_norm(
    partial: Tensor, bias: Tensor | None, residual: Tensor, weights: Norm, kind: NormKind, eps: float
) -> tuple[Tensor, Tensor]:
    """``partial + bias + residual`` and its norm, both [T, n], in one launch where a block holds a row.

    Raises :class:`KernelError` for tensors that do not fit together.
    """
    n = partial.shape[-1]
    if n > WIDEST_ROW:
        raw = add_residual(partial, bias, residual)
        return raw, norm(raw, weights.weight, weights.bias, kind, eps)
    _check("add_residual_norm", partial, bias, residual)
    assert_norm("add_residual_norm", partial, weights.weight, weights.bias)
    raw, normed = torch.empty_like(partial), torch.empty_like(partial)
    if raw.numel():
        block = power_of_two(n)
        with on(partial.device):
            _add_residual_kernel[(partial.shape[0], 1)](
                partial, bias, residual, raw, weights.weight, weights.bias, normed, n, eps,
                BLOCK=block, LAYERNORM=kind == "layernorm", num_warps=warps(block),
            )  # fmt: skip
    return raw, normed


def _check(op: str, partial: Tensor, bias: Tensor | None, residual: Tensor) -> None:
    assert_runs_here(op, partial)
    check(op, partial, bias=bias, residual=residual)
    if partial.dim() != 2:
        raise KernelError(f"{op}: x has shape {list(partial.shape)}, wanted [T, n]")
    assert_shape(op, "bias", bias, partial.shape[1])
    assert_shape(op, "residual", residual, *partial.shape)
