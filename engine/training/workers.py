"""The worker processes of an engine that started them itself, and what happens where one of them fails.

This process is rank 0. A call that all ranks must make is sent to the workers and made here; it is over when all have
answered. Where a worker fails, this process may stand in an exchange with it, which nothing can interrupt: the workers
are ended then, which Gloo notices, and NCCL's communicators are aborted.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Condition, RLock, Timer
from typing import Any, TypeVar

import torch.distributed as dist

from engine.errors import EngineError, is_of_exchange
from engine.training.ranks import in_seconds
from engine.training.worker_process import GRACE, WorkerProcess

T = TypeVar("T")

#: Seconds for the others to say what they met, once one has failed: which was the first is seen from all.
SETTLE = 0.5
#: Seconds for this process to come back from an exchange that was broken off; then it ends.
LAST = 30.0
#: Where the store is through which the processes find each other: on this machine alone.
HOST = "127.0.0.1"

_current: Workers | None = None


def live() -> bool:
    """Whether this process's group is one of workers that it has started."""
    return _current is not None and not _current.over


def end_others(mine: Workers | None = None) -> None:
    """Ends the workers of any other engine: a process has one process group."""
    if _current is not None and _current is not mine:
        _current.end("another engine began to train")


class WorkerFailed(EngineError):
    """A worker failed: its rank, and its own traceback or the signal that ended it."""


def first_failure(failures: Sequence[tuple[int, Mapping[str, Any]]]) -> WorkerFailed:
    """The error of the worker that failed first: one that is gone, else one whose failure is no mere echo of another's.

    ``failures``: ranks and their events (:mod:`engine.worker`) in the order in which they came, at least one.
    """
    gone = [one for one in failures if one[1]["event"] == "ended"]
    own = [one for one in failures if not one[1].get("exchange")]
    rank, event = [*gone, *own, *failures][0]
    if event["event"] == "ended" or event["user_error"]:
        return WorkerFailed(f"rank {rank} failed: {event['text']}")
    return WorkerFailed(f"rank {rank} failed with {event['type']}: {event['text']}\n{event['traceback'].rstrip()}")


class Workers:
    """``size - 1`` workers, started and joined; ``backend`` is torch's name of what they exchange through.

    ``setup`` is what all are told, ``directory`` where they start. over: why they have ended, empty while they have
    not. Raises :class:`WorkerFailed` where one cannot be started.
    """

    def __init__(self, size: int, backend: str, directory: str, setup: Mapping[str, Any]) -> None:
        global _current
        end_others()
        self.over = ""
        self._pid, self._backend = os.getpid(), backend
        self._lock, self._changed = RLock(), Condition()
        self._answers: dict[int, Mapping[str, Any]] = {}
        self._failures: list[tuple[int, Mapping[str, Any]]] = []
        self._calls, self._working, self._broken = 0, 0, False
        self._group: Any = None
        self._processes: list[WorkerProcess] = []
        _current = self
        try:
            self._start(size, directory, setup)
        except BaseException:
            self.end("they could not be started")
            raise

    def _start(self, size: int, directory: str, setup: Mapping[str, Any]) -> None:
        # Bound here, so that nobody else can take the port, and to this machine alone.
        listening = socket.create_server((HOST, 0))
        port = listening.getsockname()[1]
        options: Any = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listening.detach()}
        store = dist.TCPStore(HOST, port, size, **options)  # type: ignore[attr-defined]
        for rank in range(1, size):
            self._processes.append(WorkerProcess(rank, directory, self._hear))
        for process in self._processes:
            process.say({**setup, "rank": process.rank, "world": size, "backend": self._backend, "store": [HOST, port]})
        self._await("imported")
        hook = sys.excepthook
        with self._at_work():
            timeout = in_seconds(setup["timeout"])
            dist.init_process_group(self._backend, store=store, rank=0, world_size=size, timeout=timeout)
            self._group = dist.group.WORLD
        sys.excepthook = hook  # torch's puts a rank before each line, of a script's own errors too
        self._await("ready")

    # ---- a call ----

    def run(self, line: Mapping[str, Any], own: Callable[[], T], bodies: Sequence[bytes] = ()) -> T:
        """``own`` here, and what ``line`` says in the workers, each with its own of ``bodies``, until all are done.

        An error that all meet alike is raised as it is, and the workers stay; any other ends them.
        """
        with self._lock:
            with self._changed:
                self._answers.clear()
            self._assert_there()
            for process, body in zip(self._processes, bodies or [b""] * len(self._processes), strict=True):
                process.say(line, body)
            try:
                with self._at_work():
                    result = own()
                self._await("done")
                return result
            except WorkerFailed as error:
                self.end(str(error))
                raise
            except Exception as error:
                found = self._cause_of(error)
                if found is error:
                    raise
                raise found from error
            except BaseException as error:
                self.end(f"{type(error).__name__} ended the call")
                raise

    def _assert_there(self) -> None:
        """Raises where a worker has gone since the last call."""
        if self._failures:
            error = self._failure()
            self.end(str(error))
            raise error

    def check(self) -> None:
        """Raises where a worker was broken off: what was exchanged with it means nothing."""
        if self._broken:
            raise self._failure()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """While this process may stand in an exchange."""
        with self._changed:
            self._calls += 1
            self._working = self._calls
            if self._failures:
                self._break_off_soon()
        try:
            yield
        finally:
            with self._changed:
                self._working = 0

    def _await(self, event: str) -> None:
        """Until all workers have said ``event``. Raises :class:`WorkerFailed` where one fails before."""
        with self._changed:
            while not self._failures:
                if sum(answer["event"] == event for answer in self._answers.values()) == len(self._processes):
                    return
                self._changed.wait(1.0)
        time.sleep(SETTLE)
        raise self._failure()

    def _cause_of(self, error: Exception) -> Exception:
        """What to raise where ``error`` was met here; the workers are over unless all have met the same."""
        count = len(self._processes)
        with self._changed:
            self._changed.wait_for(lambda: self._broken or len(self._answers) == count, GRACE)
            mine = [(type(error).__name__, str(error), False)] * count
            if mine == [(e.get("type"), e.get("text"), e.get("exchange")) for e in self._answers.values()]:
                self._failures.clear()
                return error
            found = self._silence(error) or (self._failure() if self._failures else error)
        self.end(str(found))
        return found

    def _silence(self, error: Exception) -> WorkerFailed | None:
        """Of whom nothing is heard, where an exchange has ended with ``error`` and nobody says what ended it."""
        silent = [process.rank for process in self._processes if process.rank not in self._answers]
        if not silent or not is_of_exchange(error) or any(not event.get("exchange") for _, event in self._failures):
            return None
        which = f"rank {silent[0]} does" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))} do"
        return WorkerFailed(f"{which} not answer: standing still, or slower than $.training.exchange_timeout")

    # ---- a failure ----

    def _hear(self, rank: int, event: Mapping[str, Any]) -> None:
        """What a worker says. Called from the thread that listens to it."""
        with self._changed:
            if self.over or self._broken:
                return
            if event["event"] in ("failed", "ended") and rank not in dict(self._failures):
                self._failures.append((rank, event))
                if self._working:
                    self._break_off_soon()
            self._answers[rank] = event
            self._changed.notify_all()

    def _failure(self) -> WorkerFailed:
        return first_failure(self._failures)

    def _break_off_soon(self) -> None:
        self._later(GRACE, self._break_off, self._working)

    def _later(self, seconds: float, run: Callable[[int], None], call: int) -> None:
        timer = Timer(seconds, run, (call,))
        timer.daemon = True
        timer.start()

    def _break_off(self, call: int) -> None:
        """Ends the workers so that the exchange ends in which this process still stands."""
        with self._changed:
            if self._working != call or self.over:
                return
            self._broken = True
        for process in self._processes:
            process.end()
        if self._backend == "nccl" and self._group is not None:
            self._group.abort()
        self._later(LAST, self._give_up, call)

    def _give_up(self, call: int) -> None:
        if self._working == call:
            print(f"slipstream: error: {self._failure()}", file=sys.stderr, flush=True)
            os._exit(1)

    # ---- the end ----

    def end(self, reason: str) -> None:
        """Ends the workers and leaves the group; also where they have ended by themselves."""
        with self._changed:
            if self.over or os.getpid() != self._pid:  # a fork of this process has none of its own
                return
            self.over = reason
        for process in self._processes:
            process.leave()
        last = time.monotonic() + GRACE
        for process in self._processes:
            process.end(max(last - time.monotonic(), 0.0))
        group = self._group
        if group is not None and dist.is_initialized() and group == dist.group.WORLD:
            if self._backend == "nccl":
                group.abort()  # the others are gone: they take no part in a farewell
            dist.destroy_process_group()
