"""Plain residual blocks of every kind, as a user may write them, and a model around a stack of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 8


class OneBranch(nn.Module):
    """x + A x: linear, the branch is a submodule's output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Inline(OneBranch):
    """The same with a branch that no submodule returns."""

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(x, self.inner.weight)


class TwoBranches(nn.Module):
    """h = x + A x; h + B h."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + x
        return x + self.second(x)


class PreNorm(nn.Module):
    """A pre-norm block with one dropout for both branches, that returns a tuple as Hugging Face's 4.x blocks do."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, use_cache: bool = False) -> tuple[Any, ...]:
        hidden = hidden + self.dropout(self.mix(self.norm(hidden)))
        hidden = hidden + self.dropout(self.down(F.gelu(self.up(self.norm2(hidden)))))
        return (hidden, (hidden.detach(), hidden.detach())) if use_cache else (hidden,)


class PostNorm(nn.Module):
    """N(x + A(x)); N(h + F(h)), with dropout that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + F.dropout(self.mix(x), 0.0, self.training))
        return self.norm2(F.dropout(self.down(F.gelu(self.up(x))), 0.0, self.training) + x)


class Parallel(PostNorm):
    """(x + A(N(x))) + F(N(x))."""

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.mix(normed) + self.down(F.gelu(self.up(normed)))


class Stacked(nn.Module):
    """Blocks between two linear layers; each block called through ``checkpoint`` if ``reentrant`` says in which way."""

    def __init__(self, block: Any, count: int, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.start, self.end = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(block() for _ in range(count))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for block in self.blocks:
            out = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
            x = out[0] if isinstance(out, tuple) else out
        result: Tensor = self.end(x)
        return result


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error of a model on (inputs, targets)."""
    return (model(batch[0]) - batch[1]).square().mean()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches for :class:`Stacked`."""
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(6, 4, generator=generator), torch.randn(6, 1, generator=generator)) for _ in range(count)]
