"""The private memory of this process, and its peak: the ruler of the memory tests.

USS, "unique set size", is what would be freed if the process ended: ``Private_Clean + Private_Dirty`` in
``/proc/self/smaps``. It counts the pages of a mapped file as soon as this process is the only one that touched them,
though they are the page cache's and can be dropped at any time; those of a file just written count as
``Private_Dirty`` even where the mapping is only read. What loading costs is the rest: pages of no file, ``Anonymous``
in smaps. These are the heap, large allocations, and pages of a private mapping that were written to (and so copied).
The kernel sums them over all mappings in ``/proc/self/smaps_rollup``.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

ROLLUP = Path("/proc/self/smaps_rollup")


def private_bytes() -> int:
    """Bytes of resident memory of this process that belong to no file."""
    for line in ROLLUP.read_text(encoding="ascii").splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{ROLLUP} has no line 'Anonymous'")


class PeakMemory:
    """The highest :func:`private_bytes` inside a ``with`` block above that at its start.

    A thread samples every ``interval`` seconds; :meth:`sample` adds a sample at a moment that matters.
    """

    def __init__(self, interval: float = 0.005) -> None:
        self.interval = interval
        self.start = self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def rise(self) -> int:
        """Bytes."""
        return self.peak - self.start

    def sample(self) -> None:
        """Take one sample now."""
        self.peak = max(self.peak, private_bytes())

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self.sample()

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = private_bytes()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.sample()
