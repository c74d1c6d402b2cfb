"""Several processes in one: threads that exchange as processes do, to train with more of them than there are GPUs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ops.compression.collective import Errors, Pending, average, first_half, settle

T = TypeVar("T")


class SimulatedProcesses:
    """``size`` virtual processes; :meth:`of` is the collective of one, for a thread of its own.

    A thread that fails calls :meth:`abort`, and the others get ``threading.BrokenBarrierError`` in place of a wait that
    never ends.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._given: list[object] = [None] * size
        self._barrier = threading.Barrier(size)

    def of(self, rank: int) -> SimulatedCollective:
        """The collective of one of them."""
        return SimulatedCollective(self, rank)

    def abort(self) -> None:
        """Ends all waits, now and later, with an error."""
        self._barrier.abort()

    def exchange(self, rank: int, own: T) -> list[T]:
        """What each has given, in order of rank. All call it."""
        self._given[rank] = own
        self._barrier.wait()
        found = list(self._given)
        self._barrier.wait()
        return found  # type: ignore[return-value]


class SimulatedCollective:
    """One virtual process. ``sent`` is what a real one would send."""

    def __init__(self, processes: SimulatedProcesses, rank: int) -> None:
        self._processes, self.rank, self.size = processes, rank, processes.size
        self.sent = 0

    def mean(self, tensors: Sequence[Tensor]) -> Pending:
        """Sums in order of rank."""
        given = self._processes.exchange(self.rank, [tensor.detach().clone() for tensor in tensors])
        for index, tensor in enumerate(tensors):
            tensor.copy_(torch.stack([own[index] / self.size for own in given]).sum(0))
            self.sent += 2 * (self.size - 1) * tensor.numel() * tensor.element_size() // self.size
        self._processes.exchange(self.rank, None)  # all have read
        return Pending()

    def compressed_mean(self, buffer: Tensor, errors: Errors) -> Pending:
        """The same arithmetic as that of real processes."""
        own = first_half(buffer, errors, self.size)
        chunk = own.packed.numel() // self.size
        self.sent += 2 * (self.size - 1) * (chunk + 4)
        given = self._processes.exchange(self.rank, own)
        if not chunk:
            return Pending()
        scales = torch.stack([half.scale for half in given])
        received = [half.packed.chunk(self.size)[self.rank] for half in given]
        mean = average(received, scales, errors, self.rank)
        means = self._processes.exchange(self.rank, mean)
        sizes = torch.stack([half.scale for half in means])
        settle(buffer, [half.packed for half in means], sizes, scales, errors, own, mean)
        return Pending()
