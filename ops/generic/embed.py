# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False
"""Token, position and type embeddings and their sum, and the norm behind them, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.closed_forms import norm_flops
from ops.costs import Cost, priced
from ops.errors import KernelError
from ops.generic.launch import (
    WIDEST_ROW,
    assert_indices,
    assert_runs_here,
    assert_shape,
    on,
    piece,
    power_of_two,
    warps,
)
from ops.generic.norm import _norm_of_row, assert_norm, norm
from ops.spec import NormKind
from ops.triton_support import check
from ops.weights import Norm


@triton.jit
def _embed_kernel(
    ids, positions, types, table, position_table, type_table, raw, weight, norm_bias, normed, n, offset, scale, eps,
    BLOCK: tl.constexpr, LAYERNORM: tl.constexpr,
):  # fmt: skip
    """With ``weight`` a block holds a whole row; the norm is of the sum before it is rounded."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n
    source = row
    if ids is not None:
        source = tl.load(ids + row)
    value = tl.load(table + source * n + column, mask=mask, other=0.0).to(tl.float32) * scale
    if position_table is not None:
        place = (tl.load(positions + row) + offset) * n
        value += tl.load(position_table + place + column, mask=mask, other=0.0).to(tl.float32)
    if type_table is not None:
        kind = row * 0
        if types is not None:
            kind = tl.load(types + row) * n
        value += tl.load(type_table + kind + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(raw + row * n + column, value, mask=mask)
    if weight is not None:
        y = _norm_of_row(value, column, mask, n, weight, norm_bias, eps, LAYERNORM)
        tl.store(normed + row * n + column, y, mask=mask)


def _embed_cost(
    result: tuple[Tensor, Tensor | None], ids: Tensor | None, table: Tensor, *, scale: float = 1.0,
    positions: Tensor | None = None, position_table: Tensor | None = None, offset: int = 0,
    types: Tensor | None = None, type_table: Tensor | None = None, weights: Norm | None = None,
    kind: NormKind = "layernorm", eps: float = 0.0,
) -> Cost:  # fmt: skip
    """Of each table as much is read as the result has."""
    raw, _ = result
    rows, n = raw.shape
    flops = ((scale != 1.0) + (position_table is not None) + (type_table is not None)) * raw.numel()
    read = sum(raw.nbytes for one in (table, position_table, type_table) if one is not None)
    read += sum(one.nbytes for one in (ids, positions, types) if one is not None)
    if weights is not None:
        flops += norm_flops(rows, n, kind, weights.bias is not None)
        read += sum(one.nbytes for one in (weights.weight, weights.bias) if one is not None)
    return Cost(flops, bytes_read=read)


@priced(_embed_cost)
def embed(
    ids: Tensor | None,
    table: Tensor,
    *,
    scale: float = 1.0,
    positions: Tensor | None = None,
    position_table: Tensor | None = None,
    offset: int = 0,
    types: Tensor | None = None,
    type_table: Tensor | None = None,
    weights: Norm | None = None,
    kind: NormKind = "layernorm",
    eps: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """``scale * table[ids] + position_table[positions + offset] + type_table[types]`` [T, n], and its norm or None.

    ids:       [T] int64 rows of ``table``; None if ``table`` [T, n] is what was looked up already (and projected).
    positions: [T] int64, with ``position_table`` [P, n]; every ``positions + offset`` lies in it.
    types:     [T] int64, with ``type_table`` [types, n]; None with a table takes its first row.
    weights:   a norm of the sum, of ``kind`` and ``eps``, or None.

    Computed in fp32, each result rounded once. Ids are not checked: that would wait for the device. Raises
    :class:`KernelError` for tensors that do not fit together.
    """
    rows = _check(ids, table, positions, position_table, types, type_table, weights)
    n = table.shape[1]
    raw = table.new_empty(rows, n)
    whole = weights if n <= WIDEST_ROW else None
    normed = None if whole is None else torch.empty_like(raw)
    if raw.numel():
        block = piece(rows, n) if whole is None else power_of_two(n)
        with on(table.device):
            _embed_kernel[(rows, triton.cdiv(n, block))](
                ids, positions, types, table, position_table, type_table, raw,
                whole.weight if whole else None, whole.bias if whole else None, normed, n, offset, scale, eps,
                BLOCK=block, LAYERNORM=kind == "layernorm", num_warps=warps(block),
            )  # fmt: skip
    if weights is not None and normed is None:
        normed = norm(raw, weights.weight, weights.bias, kind, eps)
    return raw, normed


def _check(
    ids: Tensor | None,
    table: Tensor,
    positions: Tensor | None,
    position_table: Tensor | None,
    types: Tensor | None,
    type_table: Tensor | None,
    weights: Norm | None,
) -> int:
    """Refuses what does not fit together; gives the number of tokens."""
    op = "embed"
    assert_runs_here(op, table)
    check(op, table, position_table=position_table, type_table=type_table)
    if table.dim() != 2:
        raise KernelError(f"{op}: x has shape {list(table.shape)}, wanted [rows, n]")
    if position_table is not None and positions is None:
        raise KernelError(f"{op}: position_table without positions: give both or neither")
    rows = table.shape[0] if ids is None else ids.shape[0]
    for name, index in (("ids", ids), ("positions", positions), ("types", types)):
        assert_indices(op, name, index, table, torch.int64, rows)
    for name, rest in (("position_table", position_table), ("type_table", type_table)):
        if rest is not None:
            assert_shape(op, name, rest, rest.shape[0], table.shape[1])
    if weights is not None:
        assert_norm(op, table, weights.weight, weights.bias)
    return rows
