# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False
"""Attention of whole sequences, and of chunks of new tokens over the paged cache; single new tokens have kernels of
their own (``attention_decode.py``).

Flash attention (Dao et al., arXiv 2205.14135): a program takes a block of one sequence's queries of one head, goes over
the keys they see block by block, and keeps the softmax of each query running. No scores reach memory, sequences of any
lengths lie end to end without padding, and blocks of keys that none of the queries sees are not read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.closed_forms import attention_flops, pairs
from ops.costs import Cost, priced
from ops.errors import KernelError
from ops.generic.attention_decode import decode_attention
from ops.generic.attention_scores import (
    Scoring,
    _absorbed,
    _divided,
    _scores,
    _slopes,
    assert_dense,
    assert_keys,
    assert_pools,
    assert_queries,
    assert_table,
    count_multiprocessors,
)
from ops.generic.launch import assert_indices, assert_shape, on, power_of_two
from ops.triton_support import dependent_launch, interpreted, launch_options

__all__ = ["Tile", "cached_attention", "decode_attention", "sequence_attention"]


@triton.jit
def _first_element(page, token, key, stride, kv_head, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr):
    """Offset of each key's first element: in a pool through its ``page``, or in a sequence that starts at ``token``."""
    if PAGE:
        return ((page.to(tl.int64) * PAGE + key % PAGE) * KV_HEADS + kv_head) * HEAD
    else:
        return (token + key).to(tl.int64) * stride + kv_head * HEAD


@triton.jit
def _over_keys(
    query, top, weight, acc, k, v, table, token, position, kv_head, slope, start, stop, window, k_stride, v_stride,
    factor, cap, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """The running softmax of the queries at ``position`` once the keys from ``start`` to ``stop`` count as well, block
    by block. Without MASKED all of these queries see all of these keys, and the blocks are whole."""
    lane, column = tl.arange(0, KEYS), tl.arange(0, query.shape[1])[None, :]
    page = lane
    if PAGE:
        page = tl.load(table + (start + lane) // PAGE, mask=start + lane < stop, other=0)
    for begin in tl.range(start, stop, KEYS):
        key = begin + lane
        k_at = _first_element(page, token, key, k_stride, kv_head, KV_HEADS, HEAD, PAGE)
        v_at = k_at if PAGE else _first_element(page, token, key, v_stride, kv_head, KV_HEADS, HEAD, PAGE)
        if PAGE:  # a block ahead, and in registers: a load behind a load would halve the depth of the pipeline
            page = tl.load(table + (key + KEYS) // PAGE, mask=key + KEYS < stop, other=0)
        mask = column < HEAD
        if MASKED:
            mask = mask & (key < stop)[:, None]
        keys = tl.load(k + k_at[:, None] + column, mask=mask, other=0.0)
        values = tl.load(v + v_at[:, None] + column, mask=mask, other=0.0)
        if WIDEN:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        s = _scores(tl.dot(query, tl.trans(keys), input_precision="ieee"), factor, cap, CAPPED)
        distance = position[:, None] - key[None, :]
        if ALIBI:
            s -= slope * distance.to(tl.float32)
        if MASKED:
            seen = (key < stop)[None, :]
            if CAUSAL:
                seen = seen & (distance >= 0)
            if WINDOWED:
                seen = seen & (distance < window)
            s = tl.where(seen, s, float("-inf"))
        top, weight, acc, p = _absorbed(s, top, weight, acc, 1)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision="ieee")
    return top, weight, acc


@triton.jit(do_not_specialize=["pages", "window"])
def _flash_kernel(
    q, k, v, table, context, starts, slopes, out, q_stride, k_stride, v_stride, pages, window, factor, cap,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    PHASES: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head. PAGE is zero where keys and values are a sequence's own, laid out like ``q``.

    With PHASES the blocks that all queries see whole are taken first and without masks, which weigh beside products on
    tensor cores (beside those in fp32 they do not).
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head, b = tl.program_id(1), tl.program_id(2)
    token = tl.load(starts + b)
    count = tl.load(starts + b + 1) - token
    # The last queries first: behind a causal mask they have the most keys
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    if row >= count:
        return
    total = count
    if PAGE:
        total = tl.minimum(tl.load(context + b), pages * PAGE)
        table += b.to(tl.int64) * pages
    lowest = total - count + row
    rows, column = row + tl.arange(0, QUERIES), tl.arange(0, D)[None, :]
    position = total - count + rows
    mask = (rows < count)[:, None] & (column < HEAD)
    query = tl.load(q + (token + rows).to(tl.int64)[:, None] * q_stride + head * HEAD + column, mask=mask, other=0.0)
    if WIDEN:
        query = query.to(tl.float32)
    slope = 0.0 if slopes is None else _slopes(slopes, head, True)
    start = tl.maximum(lowest - window + 1, 0) if WINDOWED else 0
    stop = tl.minimum(lowest + QUERIES, total) if CAUSAL else total
    top = tl.full((QUERIES,), -1e30, tl.float32)  # not -inf: a difference of maxima must not be NaN
    weight = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, D), tl.float32)
    kv_head = head // (HEADS // KV_HEADS)
    if PHASES:
        whole = tl.maximum(tl.minimum(lowest + 1, total) if CAUSAL else total, 0) // KEYS * KEYS
        top, weight, acc = _over_keys(
            query, top, weight, acc, k, v, table, token, position, kv_head, slope, start, whole, window, k_stride,
            v_stride, factor, cap, KV_HEADS, HEAD, PAGE, KEYS, CAUSAL, WINDOWED, CAPPED, slopes is not None, False,
            WIDEN,
        )  # fmt: skip
        start = whole
    top, weight, acc = _over_keys(
        query, top, weight, acc, k, v, table, token, position, kv_head, slope, start, stop, window, k_stride,
        v_stride, factor, cap, KV_HEADS, HEAD, PAGE, KEYS, CAUSAL, WINDOWED, CAPPED, slopes is not None, True, WIDEN,
    )  # fmt: skip
    at = out + ((token + rows).to(tl.int64)[:, None] * HEADS + head) * HEAD + column
    tl.store(at, _divided(acc, weight[:, None]), mask=mask)


class Tile(NamedTuple):
    """How much a program of :func:`sequence_attention` and :func:`cached_attention` takes at a time, and with what."""

    queries: int
    keys: int
    warps: int
    stages: int

    @staticmethod
    def of(sequences: int, heads: int, longest: int, width: int, like: Tensor) -> Tile:
        """For so many sequences of up to ``longest`` queries, and heads that fill ``width`` (a power of two) columns.

        Large blocks of queries read the keys less often; small ones keep more multiprocessors busy where there is
        little to do. Below 64 rows the warps share out the keys of a block, else its queries.
        """
        if like.dtype == torch.float32:
            return Tile(32, 32, 8, 2) if width <= 128 else Tile(32, 16, 8, 2)
        if width > 128:
            return Tile(64, 32, 4, 2)
        programs, multiprocessors = sequences * heads, count_multiprocessors(like.device)
        if programs * -(-longest // 128) >= 2 * multiprocessors:
            return Tile(128, 64, 8, 3)
        if programs * -(-longest // 64) >= multiprocessors // 2:
            return Tile(64, 64, 4, 3)
        return Tile(32, 64, 4, 3)


class _Cache(NamedTuple):
    """What :func:`cached_attention` has more than :func:`sequence_attention`."""

    page: int = 0
    block_table: Tensor | None = None
    context: Tensor | None = None
    pages: int = 0


def _sequence_cost(
    result: Tensor, queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, *, causal: bool, window: int | None,
    **_: object,
) -> Cost:  # fmt: skip
    """Each sequence's queries over all of its keys; what the masks leave is executed. Softmax and scores' extras are in
    neither column, as in torch."""
    heads, size = queries.shape[1:]
    lengths = [int(length) for length in starts.diff().tolist()]
    dense = attention_flops(heads, size, sum(length * length for length in lengths))
    seen = sum(pairs(length, length, causal=causal, window=window) for length in lengths)
    return Cost(dense, macs=dense // 2, executed_flops=attention_flops(heads, size, seen))


@priced(_sequence_cost)
def sequence_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    *,
    longest: int,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    slopes: Tensor | None,
    pdl: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """Attention within whole sequences that lie end to end: [T, H * d] in the queries' dtype.

    ``queries`` [T, H, d], ``keys`` and ``values`` [T, KH, d], where each token's heads lie end to end (views of a fused
    projection will do); sequence b is the tokens from ``starts[b]`` to ``starts[b + 1]`` of them, ``starts`` [B + 1]
    int32 from 0 to T on the device, none of more than ``longest``. ``slopes`` [H] fp32 or None; for the other arguments
    and the formula see :func:`ops.reference.attention`.

    ``pdl`` lets the kernel start while the one before it drains (Hopper and newer; ignored elsewhere). ``tile``
    overrides the choice, for tests and tuning. Raises :class:`KernelError` for tensors that do not fit together.
    """
    op = "sequence_attention"
    assert_queries(op, queries, slopes, window)
    for name, x in (("keys", keys), ("values", values)):
        if x.dim() != 3 or x.shape[0] != queries.shape[0]:
            raise KernelError(f"{op}: {name} have shape {list(x.shape)}, the queries {list(queries.shape)}")
        assert_keys(op, name, x, queries)
        assert_dense(op, name, x)
    assert_shape(op, "values", values, *keys.shape)
    scoring = Scoring.of(scale, softcap)
    return _flash(op, queries, keys, values, starts, _Cache(), slopes, longest, causal, window, scoring, tile, pdl)


def _cached_cost(
    result: Tensor, queries: Tensor, key_pool: Tensor, value_pool: Tensor, block_table: Tensor, context: Tensor,
    starts: Tensor, *, window: int | None, causal: bool = True, **_: object,
) -> Cost:  # fmt: skip
    """Of the pools the sequences' own tokens are read, each once."""
    heads, size = queries.shape[1:]
    totals = [int(total) for total in context.tolist()]
    news = [int(new) for new in starts.diff().tolist()]
    both = list(zip(news, totals, strict=True))
    dense = attention_flops(heads, size, sum(new * total for new, total in both))
    seen = sum(pairs(new, total, causal=causal, window=window) for new, total in both)
    read = (
        queries.nbytes + 2 * sum(totals) * key_pool[0, 0].nbytes + block_table.nbytes + context.nbytes + starts.nbytes
    )
    return Cost(
        dense, macs=dense // 2, executed_flops=attention_flops(heads, size, seen), bytes_read=read,
        bytes_written=result.nbytes,
    )  # fmt: skip


@priced(_cached_cost)
def cached_attention(
    queries: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_table: Tensor,
    context: Tensor,
    starts: Tensor,
    *,
    longest_new: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    slopes: Tensor | None,
    causal: bool = True,
    tile: Tile | None = None,
) -> Tensor:
    """Attention of chunks of new tokens, already appended, over the paged cache: [T, H * d] in the queries' dtype.

    ``queries`` [T, H, d] as in :func:`sequence_attention`: those from ``starts[b]`` to ``starts[b + 1]``, no more than
    ``longest_new``, are the last of the ``context[b]`` tokens of sequence b. The pools [pages, page, KH, d],
    ``block_table`` [B, pages a sequence] int32 and ``context`` [B] int32 are as in :class:`ops.plan.CacheView`. Raises
    :class:`KernelError` for tensors that do not fit together.
    """
    op = "cached_attention"
    assert_queries(op, queries, slopes, window)
    assert_pools(op, key_pool, value_pool, queries)
    assert_table(op, block_table, context, queries, starts.numel() - 1)
    cache = _Cache(key_pool.shape[1], block_table, context, block_table.shape[1])
    scoring = Scoring.of(scale, softcap)
    return _flash(
        op, queries, key_pool, value_pool, starts, cache, slopes, longest_new, causal, window, scoring, tile, False
    )


def _flash(
    op: str, queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, cache: _Cache, slopes: Tensor | None,
    longest: int, causal: bool, window: int | None, scoring: Scoring, tile: Tile | None, pdl: bool,
) -> Tensor:  # fmt: skip
    assert_indices(op, "starts", starts, queries, torch.int32, max(starts.numel(), 1))
    assert_dense(op, "queries", queries)
    tokens, heads, size = queries.shape
    out = queries.new_empty(tokens, heads * size)
    if tokens == 0:
        return out
    sequences = starts.numel() - 1
    if sequences < 1 or longest < 1:
        raise KernelError(f"{op}: {tokens} tokens in {sequences} sequences of up to {longest}")
    width = max(power_of_two(size), 16)
    if tile is None:
        tile = Tile.of(sequences, heads, longest, width, queries)
    dependent = pdl and dependent_launch(queries.device)
    with on(queries.device):
        _flash_kernel[(-(-longest // tile.queries), heads, sequences)](
            queries, keys, values, cache.block_table, cache.context, starts, slopes, out,
            queries.stride(0), keys.stride(0), values.stride(0), cache.pages, window or 0, scoring.factor, scoring.cap,
            HEADS=heads, KV_HEADS=keys.shape[-2], HEAD=size, D=width, PAGE=cache.page,
            QUERIES=tile.queries, KEYS=tile.keys, CAUSAL=causal, WINDOWED=window is not None, CAPPED=scoring.capped,
            PHASES=window is None and longest > 4 * tile.keys and queries.dtype != torch.float32,
            WIDEN=interpreted() and queries.dtype != torch.float32, PDL=dependent,
            num_warps=tile.warps, num_stages=tile.stages, **launch_options(dependent),
        )  # fmt: skip
    return out
