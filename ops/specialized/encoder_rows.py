# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False
"""The launches of an encoder that work on rows: its embeddings, which also check the ids, and its norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.closed_forms import norm_flops
from ops.costs import Cost, priced
from ops.errors import KernelError
from ops.generic.launch import WIDEST_ROW, assert_indices, assert_runs_here, assert_shape, on, power_of_two, warps
from ops.generic.norm import _norm_of_row, assert_norm
from ops.spec import NormKind
from ops.specialized.tile_gemm import Statistics
from ops.triton_support import check, launch_options


@triton.jit
def _embed_kernel(
    ids, kinds, starts, token, position, kind_table, out, stats, wrong, vocabulary, positions, types, offset, plane,
    scale, N: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    STARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row. No table is read past its end: ``wrong`` is set instead, if the row belongs to a sequence."""
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    begin = tl.load(starts + tl.arange(0, STARTS))
    place = row - tl.max(tl.where(begin <= row, begin, 0), 0) + offset
    index = tl.load(ids + row)
    known = (index >= 0) & (index < vocabulary)
    part, lane = tl.arange(0, BLOCK_PARTS)[:, None], tl.arange(0, WIDTH)[None, :]
    column = part * WIDTH + lane
    inside = column < N
    value = tl.load(token + index * N + column, mask=inside & known, other=0.0).to(tl.float32) * scale
    if position is not None:
        there = inside & (place < positions)
        value += tl.load(position + place.to(tl.int64) * N + column, mask=there, other=0.0).to(tl.float32)
    if kind_table is not None:
        kind = index * 0
        if kinds is not None:
            kind = tl.load(kinds + row)
            known = known & (kind >= 0) & (kind < types)
        value += tl.load(kind_table + kind * N + column, mask=inside & known, other=0.0).to(tl.float32)
    y = value.to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * N + column, y, mask=inside)
    value = tl.where(inside, y.to(tl.float32), 0.0)
    count = tl.minimum(tl.maximum(N - tl.arange(0, BLOCK_PARTS) * WIDTH, 1), WIDTH)
    mean = tl.sum(value, 1) / count
    away = tl.where(inside, value - mean[:, None], 0.0)
    at = row.to(tl.int64) * PARTS + tl.arange(0, BLOCK_PARTS)
    whole = tl.arange(0, BLOCK_PARTS) < PARTS
    tl.store(stats + at, mean, mask=whole)
    tl.store(stats + plane + at, tl.sum(away * away, 1), mask=whole)
    tl.store(wrong, 1, mask=(row < tl.max(begin, 0)) & (known == 0))


@triton.jit
def _norm_kernel(x, weight, bias, y, n, eps, BLOCK: tl.constexpr, LAYERNORM: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * n
    column = tl.arange(0, BLOCK)
    mask = column < n
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row + column, _norm_of_row(value, column, mask, n, weight, bias, eps, LAYERNORM), mask=mask)


@dataclass(frozen=True)
class Tables:
    """The tables of the input: token [vocabulary, n], position [P, n] with the row of place 0, type [types, n]."""

    token: Tensor
    position: Tensor | None = None
    offset: int = 0
    token_type: Tensor | None = None
    scale: float = 1.0


def _embed_cost(
    result: None, ids: Tensor, types: Tensor | None, starts: Tensor, tables: Tables, *, out: Tensor, **_: object
) -> Cost:
    """Of each table as much is read as the result has."""
    flops = ((tables.scale != 1.0) + (tables.position is not None) + (tables.token_type is not None)) * out.numel()
    looked_up = sum(out.nbytes for one in (tables.token, tables.position, tables.token_type) if one is not None)
    read = looked_up + ids.nbytes + starts.nbytes + (0 if types is None else types.nbytes)
    return Cost(flops, bytes_read=read, bytes_written=out.nbytes)


@priced(_embed_cost)
def embed_sequences(
    ids: Tensor,
    types: Tensor | None,
    starts: Tensor,
    tables: Tables,
    *,
    out: Tensor,
    statistics: Statistics,
    wrong: Tensor,
    pdl: bool = False,
) -> None:
    """``scale * token[ids] + position[place + offset] + token_type[types]`` into ``out`` [T, n], rounded once.

    ids:        [T] int64. types: [T] int64, or None for the first row of the table.
    starts:     [S] int32, where each sequence begins and, last, where the last one ends: ``place`` is the distance from
                there. Rows behind the end belong to nothing; what they hold is computed and means nothing.
    statistics: get those of ``out``.
    wrong:      [1] int32, set to 1 where an id or a type of a sequence lies outside its table; never set to 0. May lie
                in pinned memory of the host.

    Raises :class:`KernelError` for tensors that do not fit together.
    """
    op, n, rows = "embed_sequences", out.shape[-1], out.shape[0]
    assert_runs_here(op, tables.token)
    check(op, tables.token, out=out, position=tables.position, token_type=tables.token_type)
    for name, table in (("token", tables.token), ("position", tables.position), ("token_type", tables.token_type)):
        assert_shape(op, name, table, 0 if table is None else table.shape[0], n)
    for name, index in (("ids", ids), ("types", types)):
        assert_indices(op, name, index, out, torch.int64, rows)
    assert_indices(op, "starts", starts, out, torch.int32, starts.numel())
    statistics.assert_fit("statistics", out, n)
    if wrong.dtype != torch.int32 or wrong.numel() != 1 or (wrong.device != out.device and not wrong.is_pinned()):
        raise KernelError(f"{op}: wrong is {wrong.dtype} on {wrong.device}, wanted one int32 there or in pinned memory")
    if starts.numel() != power_of_two(starts.numel()):
        raise KernelError(f"{op}: {starts.numel()} starts: repeat the last one up to a power of two")
    if rows == 0:
        return
    width = statistics.width
    position, kind = tables.position, tables.token_type
    with on(out.device):
        _embed_kernel[(rows,)](
            ids, types, starts, tables.token, position, kind, out, statistics.values, wrong, tables.token.shape[0],
            0 if position is None else position.shape[0], 0 if kind is None else kind.shape[0], tables.offset,
            statistics.values.stride(0), tables.scale, N=n, PARTS=-(-n // width), WIDTH=width,
            BLOCK_PARTS=power_of_two(-(-n // width)), STARTS=starts.numel(), PDL=pdl,
            num_warps=min(warps(power_of_two(n)), 4), **launch_options(pdl),
        )  # fmt: skip


def _norm_cost(
    result: None, x: Tensor, weight: Tensor, bias: Tensor | None, kind: NormKind, eps: float, *, out: Tensor,
    pdl: bool = False,
) -> Cost:  # fmt: skip
    n = x.shape[-1]
    read = sum(one.nbytes for one in (x, weight, bias) if one is not None)
    return Cost(norm_flops(x.numel() // n, n, kind, bias is not None), bytes_read=read, bytes_written=out.nbytes)


@priced(_norm_cost)
def norm_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: NormKind, eps: float, *, out: Tensor, pdl: bool = False
) -> None:
    """The norm of each row of ``x`` [T, n] (see :func:`ops.reference.norm`) into ``out`` [T, n].

    As :func:`ops.generic.norm.norm`, for a place that stays and in a chain of dependent launches.
    """
    op, n = "norm_rows", x.shape[-1]
    assert_norm(op, x, weight, bias)
    if n > WIDEST_ROW:
        raise KernelError(f"{op}: rows of {n} elements, at most {WIDEST_ROW} fit a block")
    check(op, x, out=out)
    assert_shape(op, "out", out, *x.shape)
    if x.numel() == 0:
        return
    block = power_of_two(n)
    with on(x.device):
        _norm_kernel[(x.numel() // n,)](
            x, weight, bias, out, n, eps, BLOCK=block, LAYERNORM=kind == "layernorm", PDL=pdl,
            num_warps=min(warps(block), 8), **launch_options(pdl),
        )  # fmt: skip
