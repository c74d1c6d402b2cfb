"""Fused attention: two products for each pair of query and key, five in the backward pass.

``flops`` is torch's dense convention: 2 B H Sq Sk (Dq + Dv) forward, 2 B H Sq Sk (3 Dq + 2 Dv) backward, where the
scores are made again (Dao et al. 2022, algorithm 4); H are the heads of the query, so that grouped queries (GQA) count
each of theirs. ``executed_flops`` counts the pairs that a causal mask leaves, S (S + 1) / 2 for a square, or the blocks
of a block mask. The softmax inside is in neither, as in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ops.costs import Cost
from profiler.formulas.call import Call

Lengths = Sequence[tuple[int, int]]


def causal_pairs(queries: int, keys: int, bottom_right: bool = False) -> int:
    """Pairs (i, j) that a causal mask keeps: j <= i, or j <= i + keys - queries where it ends in the lower right
    corner."""
    shift = keys - queries if bottom_right else 0
    first, last = 1 + shift, queries + shift  # what the first and the last query see, before clipping
    below = max(0, min(last, keys) - max(first, 1) + 1)
    growing = (max(first, 1) + min(last, keys)) * below // 2
    return growing + max(0, last - max(keys, first - 1)) * keys


def attention_cost(heads: int, lengths: Lengths, sizes: tuple[int, int], backward: bool, pairs: int | None) -> Cost:
    """``heads`` of all sequences' batch, ``lengths`` (queries, keys) of each sequence, ``sizes`` (Dq, Dv); ``pairs``
    are those of one head that are computed, None for all."""
    query_size, value_size = sizes
    each = 2 * (3 * query_size + 2 * value_size if backward else query_size + value_size)
    dense = heads * sum(queries * keys for queries, keys in lengths)
    executed = dense if pairs is None else heads * pairs
    return Cost(each * dense, macs=each * dense // 2, executed_flops=each * executed)


def _sdpa(backward: bool) -> Callable[[Call], Cost]:
    """query [B, H, Sq, Dq], key [B, Hkv, Sk, Dq], value [B, Hkv, Sk, Dv]; the mask begins in the upper left corner."""

    def formula(call: Call) -> Cost:
        query, key, value = call["query"], call["key"], call["value"]
        batch, heads, queries, size = query.shape
        keys = key.shape[2]
        pairs = causal_pairs(queries, keys) if call["is_causal"] else None
        return attention_cost(batch * heads, [(queries, keys)], (size, value.shape[-1]), backward, pairs)

    return formula


def _lengths(offsets: Tensor, longest: int) -> list[int]:
    """Lengths from cumulated ones; without values (fake tensors) the longest for each."""
    if offsets.device.type == "meta" or isinstance(offsets, FakeTensor):
        return [longest] * (offsets.numel() - 1)
    found: list[int] = offsets.diff().tolist()
    return found


def _packed(names: tuple[str, str, str, str], backward: bool) -> Callable[[Call], Cost]:
    """Flash and memory-efficient attention called directly: [B, S, H, D], or sequences end to end with offsets."""
    offsets_q, offsets_k, longest_q, longest_k = names

    def formula(call: Call) -> Cost:
        query, key, value = call["query"], call["key"], call["value"]
        heads, sizes = query.shape[-2], (query.shape[-1], value.shape[-1])
        if call[offsets_q] is None:
            heads *= query.shape[0]
            lengths = [(query.shape[1], key.shape[1])]
        else:
            both = (_lengths(call[offsets_q], call[longest_q]), _lengths(call[offsets_k], call[longest_k]))
            lengths = list(zip(*both, strict=True))
        kind = call.get("custom_mask_type", 2 * bool(call.get("is_causal")))  # 0 none, 1 upper left, 2 lower right
        pairs = sum(causal_pairs(*pair, bottom_right=kind == 2) for pair in lengths) if kind else None
        return attention_cost(heads, lengths, sizes, backward, pairs)

    return formula


def _flex(backward: bool) -> Callable[[Call], Cost]:
    """``flex_attention``: the blocks that its block mask lists are executed; score and mask functions are in neither
    column."""

    def formula(call: Call) -> Cost:
        query, key, value = call.args[:3]
        mask = next(item for item in call.args[4:] if isinstance(item, tuple) and len(item) > 10)
        batch, heads, queries, size = query.shape
        keys = key.shape[2]
        whole = [(queries, keys)]
        cost = attention_cost(batch * heads, whole, (size, value.shape[-1]), backward, None)
        executed = _block_pairs(mask, batch * heads, queries * keys)
        each = cost.flops // (batch * heads * queries * keys) if cost.flops else 0
        return Cost(cost.flops, macs=cost.macs, executed_flops=each * executed)

    return formula


def _block_pairs(mask: tuple[Any, ...], heads: int, most: int) -> int:
    """Pairs in the blocks that are computed, of all heads: what ``BlockMask.as_tuple`` holds of them."""
    partial, full = mask[2], mask[4]
    if partial.device.type == "meta" or isinstance(partial, FakeTensor):
        return heads * most
    rows, columns = mask[-3:-1]
    blocks = int(partial.sum()) + (int(full.sum()) if full is not None else 0)
    listed = int(partial.shape[0]) * int(partial.shape[1])
    return min(blocks * int(rows) * int(columns) * heads // listed, heads * most)


_FLASH = ("cum_seq_q", "cum_seq_k", "max_q", "max_k")
_EFFICIENT = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_KERNELS = ("efficient_attention", "flash_attention", "cudnn_attention", "fused_attention_overrideable")

FORMULAS: dict[str, Callable[[Call], Cost]] = {
    **{f"_scaled_dot_product_{kernel}": _sdpa(backward=False) for kernel in _KERNELS},
    **{f"_scaled_dot_product_{kernel}_backward": _sdpa(backward=True) for kernel in _KERNELS},
    "_scaled_dot_product_flash_attention_for_cpu": _sdpa(backward=False),
    "_scaled_dot_product_flash_attention_for_cpu_backward": _sdpa(backward=True),
    "_flash_attention_forward": _packed(_FLASH, backward=False),
    "_flash_attention_backward": _packed(_FLASH, backward=True),
    "_efficient_attention_forward": _packed(_EFFICIENT, backward=False),
    "_efficient_attention_backward": _packed(_EFFICIENT, backward=True),
    "flex_attention": _flex(backward=False),
    "flex_attention_backward": _flex(backward=True),
}
