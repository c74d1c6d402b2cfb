# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False
"""Attention of one new token a sequence over the paged KV cache.

A program takes a sequence, a KV head and a share of the keys; the query heads on that KV head use what it reads. Long
contexts are split (flash-decoding): each program leaves maximum, denominator and weighted sum of its share, and a
second, small kernel puts them together.

In fp16 and bf16 the products run on tensor cores. The warps of a program do not share the work on a block of keys: each
has keys of its own (the first axis of the batched products) and its own softmax, so that none waits for another. Tensor
cores would round fp32; there every key of a block has its own softmax, and products are plain multiplications.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.closed_forms import attention_flops, pairs
from ops.costs import Cost, priced
from ops.generic.attention_scores import (
    Scoring,
    _absorbed,
    _divided,
    _scores,
    _slopes,
    assert_dense,
    assert_pools,
    assert_queries,
    assert_table,
    count_multiprocessors,
)
from ops.generic.launch import on, power_of_two
from ops.triton_support import dependent_launch, interpreted, launch_options

#: Up to so many keys a second launch costs more than the splitting saves.
UNSPLIT_KEYS = 512
#: A split is worth its overhead from so many keys on.
SPLIT_KEYS = 256
MAX_SPLITS = 64
WARPS = 4
_OPEN = ["pages", "window", "splits"]  # integers that change from call to call must not compile a kernel anew


@triton.jit
def _span(context, b, pages, window, splits, PAGE: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr):
    """First key, end, and keys a split of sequence ``b``: the splits share what there is, in whole blocks."""
    total = tl.minimum(tl.load(context + b), pages * PAGE)
    begin = tl.maximum(total - window, 0) if WINDOWED else total * 0
    share = tl.cdiv(tl.cdiv(total - begin, splits), KEYS) * KEYS
    return begin, total, tl.maximum(share, KEYS)


@triton.jit
def _merged(top, weight, acc, ONE: tl.constexpr):
    """The parts of ``top``, ``weight`` [parts, rows] and ``acc`` [parts, rows, D] put together, as one part.

    With ONE only the first row counts, and is picked before the warps meet: there is less to exchange.
    """
    if ONE:
        row = tl.arange(0, acc.shape[1])
        top = tl.max(tl.where(row[None, :] == 0, top, float("-inf")), 1, keep_dims=True)
        weight = tl.sum(tl.where(row[None, :] == 0, weight, 0.0), 1, keep_dims=True)
        acc = tl.sum(tl.where(row[None, :, None] == 0, acc, 0.0), 1, keep_dims=True)
    highest = tl.max(top, 0, keep_dims=True)
    shrink = tl.exp2(top - highest)
    weight = tl.sum(weight * shrink, 0, keep_dims=True)
    return highest, weight, tl.sum(acc * shrink[:, :, None], 0, keep_dims=True)


@triton.jit
def _leave(out, sums, maxima, b, head, left, split, splits, top, weight, acc,
           HEADS: tl.constexpr, HEAD: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """Stores what a program found for its ``left`` heads from ``head`` on.

    Split, the parts go to ``maxima`` [B, H, splits * parts, 2] (with the denominators) and ``sums`` [B, H, splits *
    parts, HEAD]; else there is one, and its quotient goes to ``out`` [B, H, HEAD].
    """
    part, row, column = tl.arange(0, acc.shape[0]), tl.arange(0, acc.shape[1]), tl.arange(0, acc.shape[2])
    at = b.to(tl.int64) * HEADS + head + row[None, :]
    mask = (row < left)[None, :, None] & (column < HEAD)[None, None, :]
    if SPLIT:
        at = (at * splits + split) * acc.shape[0] + part[:, None]
        tl.store(maxima + at * 2, top, mask=(row < left)[None, :])
        tl.store(maxima + at * 2 + 1, weight, mask=(row < left)[None, :])
        tl.store(sums + at[:, :, None] * HEAD + column[None, None, :], acc, mask=mask)
    else:
        tl.store(out + at[:, :, None] * HEAD + column[None, None, :], _divided(acc, weight[:, :, None]), mask=mask)


@triton.jit(do_not_specialize=_OPEN)
def _decode_kernel(
    q, k_pool, v_pool, table, context, slopes, out, sums, maxima, q_stride, pages, window, splits, factor, cap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr, EXACT: tl.constexpr, SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A block of keys has PARTS parts of LANES keys, each part with its own softmax; see the module's docstring."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    CHUNKS: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    KEYS: tl.constexpr = PARTS * LANES
    b, split = tl.program_id(2), tl.program_id(1)
    kv_head, done = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS * ROWS
    begin, total, share = _span(context, b, pages, window, splits, PAGE, KEYS, WINDOWED)
    start = begin + split * share
    stop = tl.minimum(start + share, total)
    if SPLIT and start >= stop:
        return
    head, left = kv_head * GROUP + done, GROUP - done
    table += b.to(tl.int64) * pages
    row, column = tl.arange(0, ROWS)[None, :, None], tl.arange(0, D)[None, None, :]
    part, lane = tl.arange(0, PARTS)[:, None, None] * LANES, tl.arange(0, LANES)
    key = start + part + lane[None, :, None]
    page = tl.load(table + key // PAGE, mask=key < stop, other=0)
    at = q + b.to(tl.int64) * q_stride + (head + row) * HEAD + column
    query = tl.load(at, mask=(row < left) & (column < HEAD), other=0.0)
    query = tl.broadcast_to(query.to(tl.float32) if WIDEN else query, (1 if EXACT else PARTS, ROWS, D))
    slope = 0.0 if slopes is None else _slopes(slopes, head + row, row < left)
    top = tl.full((PARTS, ROWS), -1e30, tl.float32)  # not -inf: a difference of maxima must not be NaN
    weight = tl.zeros((PARTS, ROWS), tl.float32)
    acc = tl.zeros((PARTS, ROWS, D), tl.float32)
    for first in tl.range(start, stop, KEYS):
        key = first + part + lane[None, :, None]
        place = ((page.to(tl.int64) * PAGE + key % PAGE) * KV_HEADS + kv_head) * HEAD + column
        k = tl.load(k_pool + place, mask=(key < stop) & (column < HEAD), other=0.0)
        v = tl.load(v_pool + place, mask=(key < stop) & (column < HEAD), other=0.0)
        # A block ahead, and in registers: a load behind a load would halve the depth of the pipeline
        page = tl.load(table + (key + KEYS) // PAGE, mask=key + KEYS < stop, other=0)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        s = tl.sum(query * k, 2)[:, :, None] if EXACT else tl.dot(query, tl.permute(k, (0, 2, 1)))
        s = _scores(s, factor, cap, CAPPED)
        at_key = first + part + lane[None, None, :]
        if slopes is not None:
            s += slope * (at_key - (total - 1)).to(tl.float32)
        top, weight, acc, p = _absorbed(tl.where(at_key < stop, s, float("-inf")), top, weight, acc, 2)
        acc = acc + p * v if EXACT else tl.dot(p.to(v.dtype), v, acc)
    if EXACT or not SPLIT:
        top, weight, acc = _merged(top, weight, acc, GROUP == 1 and not EXACT)
    _leave(out, sums, maxima, b, head, left, split, splits, top, weight, acc, KV_HEADS * GROUP, HEAD, SPLIT)


@triton.jit(do_not_specialize=_OPEN)
def _combine_kernel(
    sums, maxima, context, out, pages, window, splits,
    HEADS: tl.constexpr, HEAD: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, PARTS: tl.constexpr,
    KEYS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, WINDOWED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Puts the parts of one head of one sequence together; reads only those that hold keys."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head, b = tl.program_id(0), tl.program_id(1)
    begin, total, share = _span(context, b, pages, window, splits, PAGE, KEYS, WINDOWED)
    parts = tl.cdiv(total - begin, share) * PARTS
    at = b.to(tl.int64) * HEADS + head
    out += at * HEAD
    maxima += at * splits * PARTS * 2
    sums += at * splits * PARTS * HEAD
    every, column = tl.arange(0, BLOCK), tl.arange(0, D)
    highest = tl.max(tl.load(maxima + every * 2, mask=every < parts, other=-1e30), 0)
    weight = tl.zeros((CHUNK,), tl.float32)
    acc = tl.zeros((CHUNK, D), tl.float32)
    for first in tl.range(0, parts, CHUNK):
        part = first + tl.arange(0, CHUNK)
        shrink = tl.exp2(tl.load(maxima + part * 2, mask=part < parts, other=float("-inf")) - highest)
        weight += shrink * tl.load(maxima + part * 2 + 1, mask=part < parts, other=0.0)
        mask = (part < parts)[:, None] & (column < HEAD)[None, :]
        acc += shrink[:, None] * tl.load(sums + part[:, None] * HEAD + column[None, :], mask=mask, other=0.0)
    tl.store(out + column, _divided(tl.sum(acc, 0), tl.sum(weight, 0)), mask=column < HEAD)


class Tile(NamedTuple):
    """How a program takes its keys: blocks of ``parts`` parts of ``lanes`` keys, ``rows`` query heads at a time."""

    rows: int
    parts: int
    lanes: int
    stages: int

    @staticmethod
    def of(group: int, width: int, dtype: torch.dtype) -> Tile:
        """For ``group`` query heads a KV head, and heads that fill ``width`` (a power of two) columns."""
        if dtype == torch.float32:
            rows = min(power_of_two(group), 4)
            return Tile(rows, max(min(4096 // (width * rows), 64), 4), 1, 1)
        # 16 rows are what a tensor core takes; a warp's sums of 4096 elements fill half its registers
        rows = max(min(power_of_two(group), 4096 // width), 16)
        return Tile(rows, WARPS, 16, 4 if width <= 64 else 3)


def choose_splits(programs: int, longest: int, window: int | None, device: torch.device) -> int:
    """Into how many splits keys go where ``programs`` programs read up to ``longest`` of them each: enough for two
    programs a multiprocessor, if each still has work."""
    keys = longest if window is None else min(longest, window)
    if keys <= UNSPLIT_KEYS:
        return 1
    room = 2 * count_multiprocessors(device) // programs
    return max(min(room, -(-keys // SPLIT_KEYS), MAX_SPLITS), 1)


def _decode_cost(
    result: Tensor, queries: Tensor, key_pool: Tensor, value_pool: Tensor, block_table: Tensor, context: Tensor, *,
    window: int | None, **_: object,
) -> Cost:  # fmt: skip
    """Each query over the keys it sees: one query's window is a slice of its keys rather than a mask."""
    seen = sum(pairs(1, int(total), causal=True, window=window) for total in context.tolist() if total)
    flops = attention_flops(queries.shape[1], queries.shape[2], seen)
    read = queries.nbytes + 2 * seen * key_pool[0, 0].nbytes + block_table.nbytes + context.nbytes
    return Cost(flops, macs=flops // 2, bytes_read=read, bytes_written=result.nbytes)


@priced(_decode_cost)
def decode_attention(
    queries: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_table: Tensor,
    context: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    slopes: Tensor | None,
    longest: int,
    pdl: bool = False,
    splits: int | None = None,
) -> Tensor:
    """Attention of one new token a sequence, its key and value already in the cache: [B, H * d] in the queries' dtype.

    ``queries`` [B, H, d], where each token's heads lie end to end (a view of a fused projection will do); the pools
    [pages, page, KH, d], ``block_table`` [B, pages a sequence] int32 and ``context`` [B] int32 (tokens in the cache,
    the new one included) as in :class:`ops.plan.CacheView`; ``slopes`` [H] fp32 or None. For the other arguments and
    the formula see :func:`ops.reference.attention`. A sequence with a context of zero gives zeros.

    ``longest`` bounds the contexts and alone decides how keys are split, so that a captured launch serves while they
    grow. ``pdl`` lets the kernels start while the one before them drains (Hopper and newer; ignored elsewhere).
    ``splits`` overrides the choice, for tests and tuning. Raises :class:`KernelError` for tensors that do not fit.
    """
    _check(queries, key_pool, value_pool, block_table, context, slopes, window)
    (batch, heads, size), (_, page, kv_heads, _) = queries.shape, key_pool.shape
    out = queries.new_empty(batch, heads * size)
    if batch == 0:
        return out
    group, width = heads // kv_heads, max(power_of_two(size), 16)
    tile = Tile.of(group, width, queries.dtype)
    programs = kv_heads * -(-group // tile.rows)
    if splits is None:
        splits = choose_splits(programs * batch, longest, window, queries.device)
    exact, dependent = queries.dtype == torch.float32, pdl and dependent_launch(queries.device)
    parts = splits * (1 if exact else tile.parts)
    sums = maxima = None
    if splits > 1:
        sums = out.new_empty(batch, heads, parts, size, dtype=torch.float32)
        maxima = out.new_empty(batch, heads, parts, 2, dtype=torch.float32)
    scoring, pages = Scoring.of(scale, softcap), block_table.shape[1]
    with on(queries.device):
        _decode_kernel[(programs, splits, batch)](
            queries, key_pool, value_pool, block_table, context, slopes, out, sums, maxima,
            queries.stride(0), pages, window or 0, splits, scoring.factor, scoring.cap,
            KV_HEADS=kv_heads, GROUP=group, HEAD=size, D=width, PAGE=page, ROWS=tile.rows, PARTS=tile.parts,
            LANES=tile.lanes, EXACT=exact, SPLIT=splits > 1, WINDOWED=window is not None, CAPPED=scoring.capped,
            WIDEN=interpreted() and not exact, PDL=dependent, num_warps=WARPS, num_stages=tile.stages,
            **launch_options(dependent),
        )  # fmt: skip
        if splits > 1:
            _combine_kernel[(heads, batch)](
                sums, maxima, context, out, pages, window or 0, splits, HEADS=heads, HEAD=size, D=width, PAGE=page,
                PARTS=parts // splits, KEYS=tile.parts * tile.lanes, BLOCK=power_of_two(parts), CHUNK=4096 // width,
                WINDOWED=window is not None, PDL=dependent, num_warps=WARPS, **launch_options(dependent),
            )  # fmt: skip
    return out


def _check(
    queries: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_table: Tensor,
    context: Tensor,
    slopes: Tensor | None,
    window: int | None,
) -> None:
    op = "decode_attention"
    assert_queries(op, queries, slopes, window)
    assert_pools(op, key_pool, value_pool, queries)
    assert_table(op, block_table, context, queries, queries.shape[0])
    assert_dense(op, "queries", queries)
