"""Batches in an order that follows from a seed and a position: what a resumed run, on any number of processes, gets is
what the run that was never stopped would have got."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import EngineError
from engine.training.data.samples import Samples
from engine.training.data.streams import permutation

#: Orders of epochs that are kept: a batch may lie across two.
ORDERS = 2


@dataclass(frozen=True)
class Batch:
    """One rank's part of a batch.

    inputs: what the model takes. indices, epochs: [B], the samples and the epoch of each.
    real:   how many of them count, from the front: all, but at the end of a finite iteration, where a rank that has
            nothing left repeats another's sample (``real`` is 0), so that all ranks make the same number of steps.
    """

    inputs: dict[str, Tensor]
    indices: NDArray[np.int64]
    epochs: NDArray[np.int64]
    real: int


class Batches(Iterator[Batch]):
    """An iterator over batches of ``batch_size`` samples a rank, of which ``world`` ranks take one each at a time.

    The samples of all epochs, each shuffled by ``seed`` and its number, form one sequence without end, the same on
    every rank. The position in it counts samples. A step takes the next ``batch_size * world`` of them, rank ``r`` the
    ``r``-th part; a batch may lie across two epochs, and no sample is left out.

    passes:  None is without end, for training; a number of epochs is for evaluation: the last batch may be smaller.
    shuffle: whether epochs are shuffled, or all in the order of the data.
    threads: background threads that make batches ahead, ``ahead`` of them at most; 0 makes each when it is asked for.
             Neither the order nor what is drawn at random depends on them. :meth:`close` ends them.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        *,
        passes: int | None = None,
        shuffle: bool = True,
        threads: int = 0,
        ahead: int = 4,
    ) -> None:
        if not len(samples):
            raise EngineError("the data set is empty: it has no samples")
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("passes", passes or 1, 1)):
            if value < least or value >= 2**63:
                raise EngineError(f"{name}: got {value}, wanted {least} or more")
        if not 0 <= rank < world:
            raise EngineError(f"rank {rank} is none of {world} processes: they count from 0")
        self.samples, self.batch_size, self.seed, self.rank, self.world = samples, batch_size, seed, rank, world
        self.passes, self.shuffle = passes, shuffle
        self.position = 0
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(threads, "slipstream-data") if threads else None
        self._ahead = max(ahead, 1)
        self._coming: deque[Future[Batch]] = deque()

    @property
    def step(self) -> int:
        """Samples that all ranks together take at a time."""
        return self.batch_size * self.world

    @property
    def epoch(self) -> float:
        """How often the data have been gone through."""
        return self.position / len(self.samples)

    def __len__(self) -> int:
        """Batches that are left. Raises TypeError where there is no end."""
        if self.passes is None:
            raise TypeError("this iterator has no end")
        return -(-max(self.passes * len(self.samples) - self.position, 0) // self.step)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        if self._ended(self.position):
            raise StopIteration
        batch = self._make(self.position) if self._pool is None else self._next_made(self._pool)
        self.position = self._after(self.position)
        return batch

    def _next_made(self, pool: ThreadPoolExecutor) -> Batch:
        start = self.position + len(self._coming) * self.step
        while len(self._coming) < self._ahead and not self._ended(start):
            self._coming.append(pool.submit(self._make, start))
            start += self.step
        try:
            return self._coming.popleft().result()
        except BaseException:
            self._drop()  # what was made ahead stands behind a batch that is still to come
            raise

    def _ended(self, position: int) -> bool:
        return self.passes is not None and position >= self.passes * len(self.samples)

    def _after(self, position: int) -> int:
        if self.passes is None:
            return position + self.step
        return min(position + self.step, self.passes * len(self.samples))

    def _make(self, position: int) -> Batch:
        """The batch of this rank at ``position``: depends on nothing else, so that any thread may make it."""
        there = self._after(position) - position
        share = -(-there // self.world)
        first = min(self.rank * share, there)
        real = min(share, there - first)
        places = np.arange(position + first, position + first + real) if real else np.array([position])
        epochs, at = np.divmod(places, len(self.samples))
        indices = at.copy()
        if self.shuffle:
            for epoch in np.unique(epochs):
                mine = epochs == epoch
                indices[mine] = self._order(int(epoch))[at[mine]]
        return Batch(self.samples.batch(indices, epochs, self.seed), indices, epochs, real)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        with self._lock:
            if epoch not in self._orders:
                for old in sorted(self._orders)[: max(len(self._orders) + 1 - ORDERS, 0)]:
                    del self._orders[old]
                self._orders[epoch] = permutation(self.seed, epoch, len(self.samples))
            return self._orders[epoch]

    def state_dict(self) -> dict[str, Any]:
        """Where the iterator stands, counted in batches that were given out; the same on every rank."""
        return {
            "position": self.position,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "samples": len(self.samples),
            "fingerprint": getattr(self.samples, "fingerprint", None),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken, also with another ``world`` or ``batch_size``.

        Raises :class:`EngineError` where the data, the seed or ``shuffle`` are others: the batches would not be those
        that were to come.
        """
        mine = self.state_dict()
        for name, what in (("samples", "samples in the data"), ("seed", "seed"), ("shuffle", "shuffle")):
            if state[name] != mine[name]:
                raise EngineError(
                    f"the saved state has another {what}: {state[name]}, here it is {mine[name]}: "
                    "resume with what was trained on, or begin anew"
                )
        if None not in (state["fingerprint"], mine["fingerprint"]) and state["fingerprint"] != mine["fingerprint"]:
            raise EngineError(
                "the saved state belongs to other data (as many samples, other contents): "
                "resume with the data, tokenizer and length that were trained on, or begin anew"
            )
        self._drop()
        self.position = int(state["position"])

    def close(self) -> None:
        """Ends the background threads; later batches are made when they are asked for."""
        self._drop()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _drop(self) -> None:
        for future in self._coming:
            future.cancel()
        self._coming.clear()
