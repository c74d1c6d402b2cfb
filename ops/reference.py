"""The ops by their definitions, in plain PyTorch: what every kernel set is tested against. Written for clarity, not for
speed.

All of them compute in the dtype they are given; tests call them in fp64 or fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ops.spec import Activation, NormKind, RotaryPositions


def norm(x: Tensor, kind: NormKind, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm (Ba et al., arXiv 1607.06450) or RMSNorm (Zhang and Sennrich, arXiv 1910.07467) of the last axis of
    ``x``."""
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    scaled = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight
    return scaled if bias is None else scaled + bias


def activation(x: Tensor, kind: Activation) -> Tensor:
    """The activation of that name; GELU after Hendrycks and Gimpel, arXiv 1606.08415."""
    if kind == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if kind == "quick_gelu":
        return x / (1 + torch.exp(-1.702 * x))
    if kind == "silu":
        return x / (1 + torch.exp(-x))
    if kind == "tanh":
        return torch.tanh(x)
    return torch.maximum(x, torch.zeros_like(x))


def rotary(x: Tensor, positions: Tensor, rotary: RotaryPositions) -> Tensor:
    """Rotates the first ``rotary.dim`` elements of each head of ``x`` [T, heads, head_dim] by its position [T].

    Each pair (a, b) turns by ``position * inv_freq``: (a cos - b sin, b cos + a sin).
    """
    angles = positions.to(x.dtype)[:, None] * torch.tensor(rotary.inv_freq, dtype=x.dtype, device=x.device)
    cos, sin = torch.cos(angles)[:, None] * rotary.factor, torch.sin(angles)[:, None] * rotary.factor
    turned, rest = x[..., : rotary.dim], x[..., rotary.dim :]
    if rotary.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        pairs = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((pairs, rest), dim=-1)


def attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention of one sequence.

    ``queries`` [Tq, heads, d] are the last Tq of the Tk tokens whose ``keys`` and ``values`` [Tk, kv_heads, d] are
    given. ``window`` limits a query to its last so many keys, itself included; ``slopes`` [heads] are ALiBi's. Returns
    [Tq, heads, d]. A query that sees no key gives zeros.
    """
    tq, heads, _ = queries.shape
    tk, kv_heads, _ = keys.shape
    keys = keys.repeat_interleave(heads // kv_heads, dim=1)
    values = values.repeat_interleave(heads // kv_heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    query_at = torch.arange(tk - tq, tk, device=queries.device)[:, None]
    distance = query_at - torch.arange(tk, device=queries.device)[None, :]
    if slopes is not None:
        scores = scores - slopes.to(scores.dtype)[:, None, None] * distance
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden |= distance < 0
    if window is not None:
        hidden |= distance >= window
    weights = torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, values)
