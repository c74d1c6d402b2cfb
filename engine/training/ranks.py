"""The processes that do something together: one alone, or the ranks of a process group.

Each call below is made by every rank. An error on one of them is raised on all of them, so that none waits for ever.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

import torch.distributed as dist

from engine.errors import EngineError

T = TypeVar("T")


class Ranks(Protocol):
    """rank: of this process, from 0; size: how many there are; group: what torch's calls take (None: the default)."""

    @property
    def rank(self) -> int:
        """Of this process."""

    @property
    def size(self) -> int:
        """How many processes there are."""

    @property
    def alone(self) -> bool:
        """Whether there is no process group to speak through."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        """What torch's calls take: None is the default group."""

    def first(self, run: Callable[[], T]) -> T:
        """Runs on rank 0 and gives every rank the result."""

    def each(self, run: Callable[[], T]) -> T:
        """Runs on each rank and gives each its own result."""

    def every(self, run: Callable[[], T]) -> list[T]:
        """Runs on each rank and gives every rank all the results, in the order of ranks."""


class Alone:
    """One process."""

    rank, size, alone = 0, 1, True
    group: dist.ProcessGroup | None = None

    def first(self, run: Callable[[], T]) -> T:
        """Runs it."""
        return run()

    def each(self, run: Callable[[], T]) -> T:
        """Runs it."""
        return run()

    def every(self, run: Callable[[], T]) -> list[T]:
        """Runs it."""
        return [run()]


class Together:
    """The ranks of a process group. What they exchange is pickled, between processes of one run."""

    alone = False

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def first(self, run: Callable[[], T]) -> T:
        """Runs on rank 0 and broadcasts the result or the error."""
        outcome: list[Any] = [_outcome(run) if self.rank == 0 else None]
        source = dist.get_global_rank(self.group, 0) if self.group is not None else 0
        dist.broadcast_object_list(outcome, src=source, group=self.group)
        return cast(T, _result(outcome[0]))

    def each(self, run: Callable[[], T]) -> T:
        """Runs; the error of the lowest rank that has one is raised. Results stay where they are."""
        outcome: tuple[Any, Exception | None] = _outcome(run)
        self._gather((None, outcome[1]))
        return cast(T, outcome[0])

    def every(self, run: Callable[[], T]) -> list[T]:
        """Runs and gathers results; the error of the lowest rank that has one is raised."""
        return self._gather(_outcome(run))

    def _gather(self, outcome: tuple[Any, Exception | None]) -> list[Any]:
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, outcome, group=self.group)
        return [_result(outcome) for outcome in outcomes]


def in_seconds(timeout: float | None) -> timedelta | None:
    """As torch takes it; None is torch's own."""
    return None if timeout is None else timedelta(seconds=timeout)


def ranks(group: dist.ProcessGroup | None = None) -> Ranks:
    """The ranks of ``group``, of the default group where None, or this process where no group was initialized."""
    return Together(group) if dist.is_available() and dist.is_initialized() else Alone()


def _outcome(run: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return run(), None
    except Exception as error:
        return None, _portable(error)


def _result(outcome: tuple[Any, Exception | None]) -> Any:
    result, error = outcome
    if error is not None:
        raise error
    return result


def _portable(error: Exception) -> Exception:
    """The error, or its words where another process could not read it (its constructor wants other arguments)."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return EngineError(f"{type(error).__name__}: {error}")
    return error
