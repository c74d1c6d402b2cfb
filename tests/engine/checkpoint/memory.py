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


def private_bytes() -> int:
    """Bytes of resident memory of this process that belong to no file, counted page by page."""
    return _kibibytes(Path("/proc/self/smaps_rollup"), "Anonymous:") * 1024


def approximate_private_bytes() -> int:
    """The same from the kernel's running counter, which may lag by some pages on each core and costs next to nothing.

    Walking the page tables every few milliseconds would hold up every allocation of the process that is measured.
    """
    return _kibibytes(Path("/proc/self/status"), "RssAnon:") * 1024


def _kibibytes(path: Path, field: str) -> int:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise OSError(f"{path} has no line {field!r}")


class PeakMemory:
    """The highest :func:`private_bytes` inside a ``with`` block above that at its start.

    A thread takes :func:`approximate_private_bytes` every ``interval`` seconds; :meth:`sample` adds an exact
    sample at a moment that matters.
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
        """Take one exact sample now."""
        self.peak = max(self.peak, private_bytes())

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self.peak = max(self.peak, approximate_private_bytes())

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
