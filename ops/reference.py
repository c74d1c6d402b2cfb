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


def skinny_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_kind: NormKind = "layernorm",
    eps: float = 1e-5,
    activate: Activation | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer [out, in] of ``x`` [rows, in] with a norm in front (if it has a weight), and behind it bias,
    activation, gate (``weight`` holds the gate's rows, then the up projection's) and residual, in this order."""
    if norm_weight is not None:
        x = norm(x, norm_kind, norm_weight, norm_bias, eps)
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    value, up = y.chunk(2, dim=-1) if gated else (y, None)
    if activate is not None:
        value = activation(value, activate)
    if up is not None:
        value = value * up
    return value if residual is None else value + residual


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


def activate(x: Tensor, bias: Tensor | None, kind: Activation, gated: bool) -> Tensor:
    """``activation(x + bias)`` of ``x`` [T, n]; if ``gated``, ``activation(gate) * up`` of its halves (gate, up)."""
    biased = x if bias is None else x + bias
    if not gated:
        return activation(biased, kind)
    gate, up = biased.chunk(2, dim=-1)
    return activation(gate, kind) * up


def add_residual(partial: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """``partial + bias + residual``, all [T, n], ``bias`` [n]."""
    return partial + residual if bias is None else partial + bias + residual


def fused_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: Activation | None, residual: Tensor | None
) -> Tensor:
    """``activation(x W^T + bias) + residual``: ``x`` [T, K], ``weight`` [N, K], ``residual`` [T, N]."""
    y = x @ weight.T if bias is None else x @ weight.T + bias
    y = y if kind is None else activation(y, kind)
    return y if residual is None else y + residual


def partial_statistics(x: Tensor, width: int) -> Tensor:
    """Of every ``width`` columns of ``x`` [T, n], mean and sum of squared deviations: [2, T, parts]."""
    pieces = x.split(width, dim=1)
    means = torch.stack([piece.mean(1) for piece in pieces], dim=1)
    squares = [(piece - mean[:, None]).square().sum(1) for piece, mean in zip(pieces, means.unbind(1), strict=True)]
    return torch.stack((means, torch.stack(squares, dim=1)))


def embed(
    rows: Tensor,
    scale: float = 1.0,
    positions: Tensor | None = None,
    position_table: Tensor | None = None,
    types: Tensor | None = None,
    type_table: Tensor | None = None,
) -> Tensor:
    """``scale * rows`` [T, n] plus rows of the position and type tables; without ``types``, the type table's first."""
    total = rows * scale
    if position_table is not None and positions is not None:
        total = total + position_table[positions]
    if type_table is not None:
        total = total + (type_table[0] if types is None else type_table[types])
    return total


def split_qkv(
    fused: Tensor,
    positions: Tensor,
    heads: int,
    kv_heads: int,
    bias: Tensor | None = None,
    head_norms: tuple[Tensor, Tensor] | None = None,
    kind: NormKind = "rmsnorm",
    eps: float = 0.0,
    turns: RotaryPositions | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, heads, d], keys and values [T, kv_heads, d] of a fused projection [T, (heads + 2 kv_heads) d].

    ``head_norms`` are the weights [d] of the norms of each query and each key head, which come before the rotation.
    """
    biased = fused if bias is None else fused + bias
    split = biased.unflatten(-1, (heads + 2 * kv_heads, -1))
    queries, keys, values = split.split((heads, kv_heads, kv_heads), dim=1)
    if head_norms is not None:
        queries, keys = (
            norm(x, kind, weight, None, eps) for x, weight in zip((queries, keys), head_norms, strict=True)
        )
    if turns is not None:
        queries, keys = rotary(queries, positions, turns), rotary(keys, positions, turns)
    return queries, keys, values


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
