"""The equations of arXiv 2102.02888, section 4, in double precision, element by element where that is plainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Exact:
    """The errors of all ranks: ``workers[i]`` [n], ``server`` [n] (each element with the rank that serves it)."""

    workers: list[Tensor]
    server: Tensor


def nothing_owed(n: int, size: int) -> Exact:
    return Exact([torch.zeros(n, dtype=torch.float64) for _ in range(size)], torch.zeros(n, dtype=torch.float64))


def compress(b: Tensor, parts: Sequence[int]) -> Tensor:
    """Each part with a scale of its own."""
    scales = [(part.square().sum() / part.numel()).sqrt() for part in b.split(list(parts)) if part.numel()]
    each = torch.cat([scale.expand(part) for scale, part in zip(scales, filter(None, parts), strict=True)] or [b])
    return torch.where(b >= 0, each, -each)


def step(buffers: Sequence[Tensor], errors: Exact, parts: Sequence[int] | None = None) -> Tensor:
    """The compressed mean of doubles [n]; ``errors`` are updated. An element's scale is that of its part, and behind
    the server that of its part and chunk."""
    size, n = len(buffers), buffers[0].numel()
    parts = [n] if parts is None else parts
    sent = []
    for rank, buffer in enumerate(buffers):
        b = buffer + errors.workers[rank]
        sent.append(compress(b, parts))
        errors.workers[rank] = b - sent[-1]
    c = torch.stack(sent).mean(0) + errors.server
    eighths = (n + 8 * size - 1) // (8 * size)
    of = torch.arange(len(parts)).repeat_interleave(torch.tensor(parts, dtype=torch.int64)) * (size + 1)
    pieces = (of + torch.arange(n) // max(8 * eighths, 1)).unique_consecutive(return_counts=True)[1].tolist()
    result = compress(c, pieces)
    errors.server = c - result
    return result


def noise(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))
