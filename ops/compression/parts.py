"""Which elements of a buffer share a scale: consecutive parts, cut where the ranks' chunks begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ops.compression.errors import chunk_of, served
from ops.errors import KernelError

#: Bytes of a scale on the wire, fp32.
SCALE = 4


@dataclass(frozen=True)
class Cut:
    """Parts of a buffer of n elements, and what of them each rank serves.

    parts:  elements of each part; they add up to n.
    firsts: of each rank, the part in which its first piece lies.
    pieces: of each rank, elements of the pieces of parts in its chunk; one empty piece where the chunk is empty.
    row:    bytes of the signs of a chunk.
    """

    parts: tuple[int, ...]
    firsts: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]
    row: int

    @property
    def most(self) -> int:
        """Pieces of the chunk that has the most."""
        return max(map(len, self.pieces))

    @property
    def sent(self) -> int:
        """Bytes that a rank sends to each other one: signs and scales of both phases."""
        return 2 * self.row + SCALE * (len(self.parts) + self.most)


def parts_of(n: int, parts: Sequence[int] | None) -> tuple[int, ...]:
    """``parts`` of a buffer of ``n`` elements, one part if None; at least one. Raises :class:`KernelError` where they
    do not fit."""
    if parts is None:
        return (n,)
    found = tuple(parts) or (0,)
    if min(found) < 0:
        raise KernelError(f"compressed_mean: part {found.index(min(found))} has {min(found)} elements: use 0 or more")
    if sum(found) != n:
        raise KernelError(f"compressed_mean: the parts have {sum(found)} elements in all, the buffer {n}")
    return found


@lru_cache(maxsize=1024)
def cut(parts: tuple[int, ...], size: int) -> Cut:
    """``parts`` as ``size`` ranks serve them."""
    n = sum(parts)
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part)
    firsts, pieces, first = [], [], 0
    for rank in range(size):
        chunk = served(n, rank, size)
        while first < len(parts) - 1 and starts[first + 1] <= chunk.start:
            first += 1
        last = first
        while last < len(parts) - 1 and starts[last + 1] < chunk.stop:
            last += 1
        bounds = [(max(starts[at], chunk.start), min(starts[at + 1], chunk.stop)) for at in range(first, last + 1)]
        firsts.append(first)
        pieces.append(tuple(end - begin for begin, end in bounds) if chunk.stop > chunk.start else (0,))
    return Cut(parts, tuple(firsts), tuple(pieces), chunk_of(n, size) // 8)
