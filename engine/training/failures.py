"""When one process of a run fails, the others end within seconds, also where they wait for it in an exchange; and one
that does not answer is named.

NCCL does not notice that a process is gone, and a signal cannot interrupt its wait; so a process that fails says so in
the store through which the processes found each other, and a thread in each looks there. TCP notices a cut link only by
the exchange's timeout, and the error then names a neighbour in the exchange at best; so each process counts up in the
store while it lives, and whose count stands still is the one. A call of the store on a cut link does not come back
either: no such call is made by a thread that others wait for without end.
"""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any, TypeVar

import torch.distributed as dist

from engine.errors import EngineError, is_of_exchange
from engine.training.ranks import Ranks, ranks

#: Seconds between two looks, and those that a process has to end by itself once another has failed, or to count up.
LOOK, GRACE = 0.5, 3.0

T = TypeVar("T")

_runs = itertools.count()
_pulse: Pulse | None = None


class Pulse(Thread):
    """Counts up for this process in ``store``, for as long as there is one."""

    def __init__(self, store: Any, rank: int) -> None:
        super().__init__(name="slipstream-pulse", daemon=True)
        self.store, self._rank, self._over = store, rank, Event()
        # A thread that comes back from torch while the interpreter is being taken down aborts the process.
        atexit.register(self.end)

    def run(self) -> None:
        """Until the store has gone."""
        try:
            while not self._over.is_set():
                self.store.add(_count_of(self._rank), 1)
                self._over.wait(LOOK)
        except RuntimeError:
            return

    def end(self) -> None:
        """No more. Does not wait for a store that does not answer."""
        self._over.set()
        self.join(LOOK)
        atexit.unregister(self.end)


def begin_pulse() -> None:
    """To be called by all processes that have joined a group; once for each group is enough."""
    global _pulse
    store = dist.distributed_c10d._get_default_store()
    if _pulse is None or _pulse.store is not store:
        if _pulse is not None:
            _pulse.end()
        _pulse = Pulse(store, dist.get_rank())
        _pulse.start()


@contextmanager
def naming_the_silent() -> Iterator[None]:
    """Around a call of all processes: where an exchange fails, the error says which of them does not answer."""
    try:
        yield
    except Exception as error:
        team = ranks()
        if team.alone or not is_of_exchange(error):
            raise
        raise EngineError(f"rank {team.rank} ends because {_why(team, error)}") from error


@contextmanager
def failing_together() -> Iterator[None]:
    """Around what all processes of a run do. One alone does it as without.

    Raises :class:`EngineError` in place of whatever this process met because another had failed before, or did not
    answer in an exchange.
    """
    team = ranks()
    if team.alone:
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    key, over = f"slipstream/failed/{next(_runs)}", Event()

    def failed() -> str:
        """Why the others end, of the first that says so; empty while nobody does."""
        return store.get(key).decode() if store.check([key]) else ""

    def watch() -> None:
        while not over.wait(LOOK):
            try:
                why = failed()
            except RuntimeError:  # the store has gone: it goes when the run ends
                return
            if why and not over.wait(GRACE):
                print(f"slipstream: rank {team.rank} ends because {why}", file=sys.stderr, flush=True)
                os._exit(1)

    thread = Thread(target=watch, name="slipstream-failures", daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        answer = _within(GRACE, failed)
        why = answer or ""
        if not why and is_of_exchange(error):
            why = _out_of_reach() if answer is None else _why(team, error)
        if answer == "":
            said = why or f"rank {team.rank} failed, which says why"
            _within(GRACE, lambda: store.set(key, said))
        if not why:
            raise
        raise EngineError(f"rank {team.rank} ends because {why}") from error
    finally:
        over.set()
        thread.join(LOOK)


def _why(team: Ranks, error: BaseException) -> str:
    """Who does not answer, where ``error`` ended an exchange."""
    silent = _within(2 * GRACE, lambda: _silent(team))
    if silent is None:
        return _out_of_reach()
    if silent:
        which = f"rank {silent[0]} does" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))} do"
        return f"{which} not answer: gone, standing still, or behind a cut link"
    said = str(error).partition("\n")[0]
    slow = "; one may take longer than $.training.exchange_timeout" if "imed out" in said else ""
    return f"an exchange failed though all processes answer{slow}: {said}"


def _out_of_reach() -> str:
    """Who does not answer, where the store does not."""
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    where = f" at {store.host}" if hasattr(store, "host") else ""
    return (
        f"rank 0 does not answer, nor does the store of the processes{where}: gone, or behind a cut link, which may be "
        "this host's own"
    )


def _silent(team: Ranks) -> list[int]:
    """The ranks whose count stands still."""
    store, others = dist.distributed_c10d._get_default_store(), [r for r in range(team.size) if r != team.rank]
    before = [store.add(_count_of(rank), 0) for rank in others]
    time.sleep(GRACE)
    return [r for r, count in zip(others, before, strict=True) if store.add(_count_of(r), 0) == count]


def _count_of(rank: int) -> str:
    return f"slipstream/pulse/{rank}"


def _within(seconds: float, ask: Callable[[], T]) -> T | None:
    """What the store answers; None where it does not within so many seconds, or has gone."""
    found: list[T] = []

    def run() -> None:
        try:
            found.append(ask())
        except RuntimeError:
            return

    thread = Thread(target=run, name="slipstream-asks", daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
