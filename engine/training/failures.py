"""When one process of a run fails, the others end within seconds, also where they wait for it in an exchange.

NCCL does not notice that a process is gone, and a signal cannot interrupt its wait; so a process that fails says so in
the store through which the processes found each other, and a thread in each looks there.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

import torch.distributed as dist

from engine.errors import EngineError
from engine.training.ranks import ranks

#: Seconds between two looks, and those that a process has to end by itself once another has failed.
LOOK, GRACE = 0.5, 3.0

_runs = itertools.count()


@contextmanager
def failing_together() -> Iterator[None]:
    """Around what all processes of a run do. One alone does it as without.

    Raises :class:`EngineError` in place of whatever this process met because another had failed before.
    """
    team = ranks()
    if team.alone:
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    key, over = f"slipstream/failed/{next(_runs)}", Event()

    def failed() -> str | None:
        """The rank that failed first, or None; also where the store has gone: it goes when the run ends."""
        try:
            return store.get(key).decode() if store.check([key]) else None
        except RuntimeError:
            return None

    def watch() -> None:
        while not over.wait(LOOK):
            if failed() is not None and not over.wait(GRACE):
                print(f"slipstream: rank {team.rank} ends because rank {failed()} failed", file=sys.stderr, flush=True)
                os._exit(1)

    thread = Thread(target=watch, name="slipstream-failures", daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        first = failed()
        if first is None:
            store.set(key, str(team.rank))
            raise
        raise EngineError(f"rank {team.rank} ends because rank {first} failed, which says why") from error
    finally:
        over.set()
        thread.join()
