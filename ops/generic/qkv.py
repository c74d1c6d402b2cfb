# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False
"""What lies between the fused projection and attention, in one launch: bias, norms of queries and keys, rotary, the
split into heads, and the append to the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.closed_forms import norm_flops, rotary_flops
from ops.costs import Cost, priced
from ops.errors import KernelError
from ops.generic.launch import assert_indices, assert_runs_here, assert_shape, on, power_of_two, warps
from ops.generic.norm import _scaled, _statistics
from ops.spec import NormKind
from ops.triton_support import check


@dataclass(frozen=True)
class HeadNorm:
    """Norms of each query and key head: weights [head_dim], and the kind and eps of :func:`ops.reference.norm`."""

    query: Tensor
    key: Tensor
    kind: NormKind
    eps: float


@dataclass(frozen=True)
class Rotary:
    """:class:`ops.spec.RotaryPositions` with ``inv_freq`` [dim / 2] fp32 on the device."""

    inv_freq: Tensor
    factor: float = 1.0
    interleaved: bool = False


@triton.jit
def _load_heads(fused, bias, at, mask):
    """Elements ``at`` of one token's fused projection plus bias, in fp32."""
    value = tl.load(fused + at, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _scaled_heads(value, mean, scale, query_norm, key_norm, query, key, d, mask):
    """Rows that are ``query`` or ``key`` normed, each with its own weight; the others (values) as they are."""
    as_query = _scaled(value, mean, scale, query_norm, None, d, mask)
    as_key = _scaled(value, mean, scale, key_norm, None, d, mask)
    return tl.where(query, as_query, tl.where(key, as_key, value))


@triton.jit
def _split_kernel(
    fused, bias, positions, slots, query_norm, key_norm, inv_freq, queries, keys, values, new_keys, new_values,
    eps, factor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    LAYERNORM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one token, of whatever role: heads of queries stand first, then of keys, then of values.

    The step's keys and values go to ``slots`` of the pools ``keys`` and ``values`` (or, without slots, to the token's
    own row), and also to ``new_keys`` and ``new_values`` where these are given. DIM elements are rotated, 0 for none.
    """
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < ALL) & (d < SIZE)
    query = head < HEADS
    key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    base = fused + token * (ALL * SIZE)
    value = _load_heads(base, bias, head * SIZE + d, mask)
    mean = tl.zeros((BLOCK_H, 1), tl.float32)
    scale = mean
    if query_norm is not None:
        mean, scale = _statistics(value, mask, SIZE, eps, LAYERNORM, 1)
        value = _scaled_heads(value, mean, scale, query_norm, key_norm, query, key, d, d < SIZE)
    if DIM > 0:
        HALF: tl.constexpr = DIM // 2
        turned = d < DIM
        first = d % 2 == 0 if INTERLEAVED else d < HALF
        step = 1 if INTERLEAVED else HALF
        partner = tl.where(first, d + step, d - step)
        pair = d // 2 if INTERLEAVED else d % HALF
        other = _load_heads(base, bias, head * SIZE + partner, mask & turned)
        if query_norm is not None:
            other = _scaled_heads(other, mean, scale, query_norm, key_norm, query, key, partner, turned)
        angle = tl.load(positions + token).to(tl.float32) * tl.load(inv_freq + pair, mask=turned, other=0.0)
        # Rounded as a table in the compute dtype would be, which is what the model was trained with
        cos = (tl.cos(angle) * factor).to(fused.dtype.element_ty).to(tl.float32)
        sin = (tl.sin(angle) * factor).to(fused.dtype.element_ty).to(tl.float32)
        rotated = value * cos + tl.where(first, -other, other) * sin
        value = tl.where((query | key) & turned, rotated, value)
    tl.store(queries + (token * HEADS + head) * SIZE + d, value, mask=mask & query)
    is_value = head >= HEADS + KV_HEADS
    as_key = (head - HEADS) * SIZE + d
    as_value = as_key - KV_HEADS * SIZE
    row = token * (KV_HEADS * SIZE)
    if new_keys is not None:
        tl.store(new_keys + row + as_key, value, mask=mask & key)
        tl.store(new_values + row + as_value, value, mask=mask & is_value)
    if slots is not None:
        row = tl.load(slots + token) * (KV_HEADS * SIZE)
        tl.store(keys + row + as_key, value, mask=mask & key)
        tl.store(values + row + as_value, value, mask=mask & is_value)


def _split_cost(
    result: tuple[Tensor, Tensor | None, Tensor | None], fused: Tensor, positions: Tensor, *, heads: int,
    kv_heads: int, head_dim: int, bias: Tensor | None = None, head_norm: HeadNorm | None = None,
    rotary: Rotary | None = None, pools: tuple[Tensor, Tensor] | None = None, slots: Tensor | None = None,
    keep: bool = False,
) -> Cost:  # fmt: skip
    """Norms and rotation of queries and keys; the bias is the product's, which the dense convention leaves out. Of the
    pools the new tokens' slots are written."""
    tokens, flops = fused.shape[0], 0
    turned, read = heads + kv_heads, fused.nbytes + sum(x.nbytes for x in (bias, slots) if x is not None)
    if head_norm is not None:
        flops += norm_flops(tokens * turned, head_dim, head_norm.kind, False)
        read += head_norm.query.nbytes + head_norm.key.nbytes
    if rotary is not None:
        flops += rotary_flops(tokens, turned, 2 * rotary.inv_freq.shape[0])
        read += positions.nbytes + rotary.inv_freq.nbytes
    written = sum(x.nbytes for x in result if x is not None)
    if pools is not None:
        written += 2 * tokens * kv_heads * head_dim * fused.element_size()
    executed = flops + (bias is not None) * fused.numel()
    return Cost(flops, executed_flops=executed, bytes_read=read, bytes_written=written)


@priced(_split_cost)
def split_qkv(
    fused: Tensor,
    positions: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bias: Tensor | None = None,
    head_norm: HeadNorm | None = None,
    rotary: Rotary | None = None,
    pools: tuple[Tensor, Tensor] | None = None,
    slots: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Queries [T, heads, head_dim] and the new keys and values [T, kv_heads, head_dim], contiguous.

    fused:     [T, (heads + 2 kv_heads) head_dim], the projection without its ``bias`` (of one row, or None).
    positions: [T] int64, read only if there is a ``rotary``.
    pools:     a layer's key and value pools [pages, page_size, kv_heads, head_dim], with the flat ``slots`` [T] int64
               that the new keys and values are written to. With pools these are also returned only if ``keep``, else
               None stands for them.

    Computed in fp32 and rounded once; only cosines and sines are rounded on the way, as a table of them would be.
    Raises :class:`KernelError` for tensors that do not fit together.
    """
    _check(fused, positions, heads, kv_heads, head_dim, bias, head_norm, rotary, pools, slots)
    tokens = fused.shape[0]
    queries = fused.new_empty(tokens, heads, head_dim)
    keys = values = None
    if pools is None or keep:
        keys, values = (fused.new_empty(tokens, kv_heads, head_dim) for _ in range(2))
    if not tokens:
        return queries, keys, values
    every = heads + 2 * kv_heads
    block_d = power_of_two(head_dim)
    block_h = min(power_of_two(every), max((256 if tokens <= 32 else 2048) // block_d, 1))
    pool_keys, pool_values = pools or (None, None)
    with on(fused.device):
        _split_kernel[(tokens, triton.cdiv(every, block_h))](
            fused, bias, positions, slots,
            head_norm.query if head_norm else None, head_norm.key if head_norm else None,
            rotary.inv_freq if rotary else None, queries, pool_keys, pool_values, keys, values,
            head_norm.eps if head_norm else 0.0, rotary.factor if rotary else 1.0,
            HEADS=heads, KV_HEADS=kv_heads, SIZE=head_dim, DIM=2 * rotary.inv_freq.shape[0] if rotary else 0,
            INTERLEAVED=rotary.interleaved if rotary else False,
            LAYERNORM=head_norm.kind == "layernorm" if head_norm else False,
            BLOCK_H=block_h, BLOCK_D=block_d, num_warps=warps(block_h * block_d),
        )  # fmt: skip
    return queries, keys, values


def _check(
    fused: Tensor,
    positions: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bias: Tensor | None,
    head_norm: HeadNorm | None,
    rotary: Rotary | None,
    pools: tuple[Tensor, Tensor] | None,
    slots: Tensor | None,
) -> None:
    op = "split_qkv"
    assert_runs_here(op, fused)
    if (pools is None) != (slots is None):
        raise KernelError(f"{op}: pools and slots go together: give both or neither")
    pool_keys, pool_values = pools or (None, None)
    query, key = (head_norm.query, head_norm.key) if head_norm else (None, None)
    check(op, fused, bias=bias, key_pool=pool_keys, value_pool=pool_values, query_norm=query, key_norm=key)
    width = (heads + 2 * kv_heads) * head_dim
    tokens = fused.shape[0]
    assert_shape(op, "x", fused, tokens, width)
    assert_shape(op, "bias", bias, width)
    assert_shape(op, "query_norm", query, head_dim)
    assert_shape(op, "key_norm", key, head_dim)
    assert_indices(op, "positions", positions, fused, torch.int64, tokens)
    assert_indices(op, "slots", slots, fused, torch.int64, tokens)
    for name, pool in (("key_pool", pool_keys), ("value_pool", pool_values)):
        if pool is not None:
            assert_shape(op, name, pool, *pool.shape[:2], kv_heads, head_dim)
    if rotary is not None:
        half = rotary.inv_freq.shape[0]
        assert_indices(op, "inv_freq", rotary.inv_freq, fused, torch.float32, half)
        if not 0 < 2 * half <= head_dim:
            raise KernelError(f"{op}: inv_freq turns {2 * half} elements, a head has {head_dim}")
