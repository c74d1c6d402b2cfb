"""Attention of the ``eager`` set: within whole sequences (encoders), and over the paged KV cache (decoders)."""

from __future__ import annotations

import math
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.plan import CacheView, StepInputs
from ops.spec import ALiBiPositions, ModelSpec


def append(cache: CacheView, layer: int, keys: Tensor, values: Tensor) -> None:
    """Writes the step's new ``keys`` and ``values`` [T, kv_heads, head_dim] into their slots of the layer's pools."""
    for pool, new in ((cache.keys[layer], keys), (cache.values[layer], values)):
        pool.view(-1, *pool.shape[2:]).index_copy_(0, cache.slots, new)


def attend(spec: ModelSpec, layer: int, inputs: StepInputs, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of each sequence's new queries [T, heads, head_dim]: [T, heads * head_dim]."""
    if inputs.cache is None:
        out = _within_sequences(spec, layer, inputs, queries, keys, values)
    elif len(inputs.lengths) > 1 and queries.shape[0] == len(inputs.lengths) and not _cheap_rows(inputs.cache):
        out = _decode_batch(spec, layer, inputs, inputs.cache, queries)
    else:
        out = _over_cache(spec, layer, inputs, inputs.cache, queries)
    return out.reshape(queries.shape[0], -1)


def _cheap_rows(cache: CacheView) -> bool:
    """Rows read one by one cost no copy where pages are consecutive; worth it where a launch costs little (the CPU)."""
    return cache.slots.device.type == "cpu" and None not in cache.starts


def _within_sequences(
    spec: ModelSpec, layer: int, inputs: StepInputs, queries: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Sequences of equal length share a call: no padding is computed, and the calls are few."""
    lengths = inputs.lengths
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0])
        q, k, v = (x.unflatten(0, shape) for x in (queries, keys, values))
        return _attention(spec, layer, q, k, v).flatten(0, 1)
    out = torch.empty_like(queries)
    for group in _equal_lengths(inputs, queries.device):
        q, k, v = queries[group], keys[group], values[group]
        out[group] = _attention(spec, layer, q, k, v)
    return out


def _equal_lengths(inputs: StepInputs, device: torch.device) -> list[Tensor]:
    """For every length that occurs, the token rows [sequences, length] of the sequences that have it; once a step."""
    groups: list[Tensor] | None = inputs.memo.get("equal_lengths")
    if groups is None:
        starts: dict[int, list[int]] = {}
        for end, length in zip(accumulate(inputs.lengths), inputs.lengths, strict=True):
            starts.setdefault(length, []).append(end - length)
        groups = [
            torch.tensor(first, device=device)[:, None] + torch.arange(length, device=device)
            for length, first in starts.items()
        ]
        inputs.memo["equal_lengths"] = groups
    return groups


def _over_cache(spec: ModelSpec, layer: int, inputs: StepInputs, cache: CacheView, queries: Tensor) -> Tensor:
    """Sequence by sequence over its cached keys, the step's own included."""
    outs = []
    row = 0
    for index, (new, total) in enumerate(zip(inputs.lengths, cache.lengths, strict=True)):
        q = queries[row : row + new].unsqueeze(0)
        k, v = (_cached(pool, cache, index, total).unsqueeze(0) for pool in (cache.keys[layer], cache.values[layer]))
        outs.append(_attention(spec, layer, q, k, v).squeeze(0))
        row += new
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _cached(pool: Tensor, cache: CacheView, index: int, total: int) -> Tensor:
    """The first ``total`` cached rows of a sequence: a view where its pages are consecutive, else gathered."""
    start = cache.starts[index]
    if start is not None:
        return pool.view(-1, *pool.shape[2:])[start : start + total]
    pages = cache.block_table[index, : -(-total // pool.shape[1])]
    return pool[pages].flatten(0, 1)[:total]


def _decode_batch(spec: ModelSpec, layer: int, inputs: StepInputs, cache: CacheView, queries: Tensor) -> Tensor:
    """One new token a sequence, all sequences in one call over gathered pages; what lies past a sequence is masked."""
    pool = cache.keys[layer]
    longest = max(cache.lengths)
    pages = cache.block_table[:, : -(-longest // pool.shape[1])]
    k, v = (pool[pages].flatten(1, 2)[:, :longest] for pool in (cache.keys[layer], cache.values[layer]))
    window = spec.window(layer)
    key = f"decode_mask_{window}"
    if key not in inputs.memo:
        total = torch.tensor(cache.lengths, device=queries.device)[:, None]
        at = torch.arange(longest, device=queries.device)[None]
        seen = at < total
        if window is not None:
            seen &= at >= total - window
        inputs.memo[key] = (total - 1 - at, seen)
    distance, seen = inputs.memo[key]
    return _masked(spec, queries[:, None], k, v, seen[:, None], distance[:, None]).squeeze(1)


def _attention(spec: ModelSpec, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Sequences of one shape: queries [B, Tq, heads, d] are the last Tq of the Tk keys [B, Tk, kv_heads, d]."""
    tq, tk = queries.shape[1], keys.shape[1]
    window = spec.window(layer)
    if tq == 1 and window is not None and window < tk and spec.causal:
        keys, values, tk = keys[:, -window:], values[:, -window:], window
    windowed = None if window is None or window >= tk else window
    if windowed is None and (not spec.causal or tq == 1 or tq == tk) and not _needs_scores(spec, queries):
        return _fused(spec, queries, keys, values, None, causal=spec.causal and tq > 1)
    distance = torch.arange(tk - tq, tk, device=queries.device)[:, None] - torch.arange(tk, device=queries.device)
    seen = distance >= 0 if spec.causal else torch.ones_like(distance, dtype=torch.bool)
    if windowed is not None:
        seen = seen & (distance < windowed)
    return _masked(spec, queries, keys, values, seen, distance)


def _needs_scores(spec: ModelSpec, queries: Tensor) -> bool:
    """Whether the scores need what the fused call cannot give: a soft cap, a bias, or fp32."""
    in_fp32 = spec.scores_in_fp32 and queries.dtype != torch.float32
    return spec.attention_softcap is not None or isinstance(spec.positions, ALiBiPositions) or in_fp32


def _masked(spec: ModelSpec, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, distance: Tensor) -> Tensor:
    """Attention where ``seen`` [(B,) Tq, Tk]; ``distance`` of the same shape is query position minus key position."""
    per_head = seen if seen.dim() == 2 else seen[:, None]
    if not _needs_scores(spec, queries):
        return _fused(spec, queries, keys, values, per_head, causal=False)
    group = spec.heads // spec.kv_heads
    precise = torch.float32 if spec.scores_in_fp32 else queries.dtype
    q = queries.transpose(1, 2).to(precise)
    k = keys.transpose(1, 2).to(precise).repeat_interleave(group, dim=1)
    scores = q @ k.transpose(2, 3) * spec.attention_scale
    if spec.attention_softcap is not None:
        scores = spec.attention_softcap * torch.tanh(scores / spec.attention_softcap)
    if isinstance(spec.positions, ALiBiPositions):
        slopes = torch.tensor(spec.positions.slopes, dtype=scores.dtype, device=scores.device)
        scores = scores - slopes[:, None, None] * (distance if distance.dim() == 2 else distance[:, None])
    weights = torch.softmax(scores.masked_fill(~per_head, -math.inf), dim=-1, dtype=torch.float32).to(values.dtype)
    return (weights @ values.transpose(1, 2).repeat_interleave(group, dim=1)).transpose(1, 2)


def _fused(
    spec: ModelSpec, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, causal: bool
) -> Tensor:
    """PyTorch's fused attention. With one query a sequence, the heads that share keys are read as queries of one
    head."""
    batch, tq, heads, size = queries.shape
    k, v = keys.transpose(1, 2), values.transpose(1, 2)
    grouped = spec.heads != spec.kv_heads
    if grouped and tq == 1:
        q = queries.view(batch, spec.kv_heads, heads // spec.kv_heads, size)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.attention_scale)
        return out.reshape(batch, 1, heads, size)
    q = queries.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=spec.attention_scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)
