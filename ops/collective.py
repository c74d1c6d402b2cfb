"""The collective that row-parallel macro-ops reduce their partial sums with. One process is an object, not an
``if``."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Collective(Protocol):
    """What a kernel set asks of a group of processes that share a model."""

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def reduce(self, partial: Tensor) -> Tensor:
        """The sum of every rank's ``partial`` (any shape, same on all ranks); may be the same tensor, summed in
        place."""
        ...


class SingleProcess:
    """A group of one: every sum is already complete."""

    rank = 0
    size = 1

    def reduce(self, partial: Tensor) -> Tensor:
        """Returns ``partial`` itself."""
        return partial
