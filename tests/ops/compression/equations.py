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


def compress(b: Tensor) -> Tensor:
    if not b.numel():
        return b
    scale = (b.square().sum() / b.numel()).sqrt()
    return torch.where(b >= 0, scale, -scale)


def step(buffers: Sequence[Tensor], errors: Exact) -> Tensor:
    """The compressed mean of doubles [n]; ``errors`` are updated."""
    size, n = len(buffers), buffers[0].numel()
    sent = []
    for rank, buffer in enumerate(buffers):
        b = buffer + errors.workers[rank]
        sent.append(compress(b))
        errors.workers[rank] = b - sent[-1]
    c = torch.stack(sent).mean(0) + errors.server
    eighths = (n + 8 * size - 1) // (8 * size)
    result = torch.cat([compress(part) for part in c.split(max(8 * eighths, 1))])
    errors.server = c - result
    return result


def noise(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))
