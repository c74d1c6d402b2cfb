"""What a data set is to the training loop: samples that can be asked for by number, and batches of padded tensors."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Label of a token that counts for no loss, PyTorch's ``ignore_index``.
IGNORED = -100
#: Padded lengths are multiples of this: tensor cores read rows in eights of 16-bit values.
MULTIPLE = 8

Ids = NDArray[np.int32]


@runtime_checkable
class Samples(Protocol):
    """A data set. ``fingerprint`` (an int) may be there as well: a resumed run compares it."""

    def __len__(self) -> int: ...

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64], seed: int) -> dict[str, Tensor]:
        """The inputs of a model for the samples ``indices`` [B], each drawn in its epoch ``epochs`` [B].

        What is random follows from ``seed``, the epoch and the index alone. Called by several threads at once.
        """
        ...


@dataclass(frozen=True)
class Ragged:
    """Rows of unequal length end to end: row ``i`` is ``flat[starts[i] : starts[i + 1]]``."""

    flat: Ids
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Ids:
        return self.flat[self.starts[index] : self.starts[index + 1]]


@dataclass
class RaggedBuilder:
    """Collects the rows of a :class:`Ragged`, a block at a time."""

    parts: list[Ids] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def add(self, rows: Sequence[Sequence[int]]) -> None:
        """Appends rows of integers."""
        sizes = [len(row) for row in rows]
        self.parts.append(np.fromiter(chain.from_iterable(rows), np.int32, sum(sizes)))
        self.lengths += sizes

    def finish(self) -> Ragged:
        """All rows so far."""
        starts = np.zeros(len(self.lengths) + 1, np.int64)
        np.cumsum(self.lengths, out=starts[1:])
        return Ragged(np.concatenate(self.parts) if self.parts else np.zeros(0, np.int32), starts)


def width(lengths: Iterable[int], limit: int) -> int:
    """The longest of ``lengths`` rounded up to a multiple of MULTIPLE, but not beyond ``limit``, which a model may be
    unable to read."""
    return min(-(-max(lengths) // MULTIPLE) * MULTIPLE, limit)


def pad(rows: Sequence[NDArray[Any]], value: int, to: int) -> NDArray[np.int64]:
    """``rows`` as [B, to], filled up with ``value`` on the right."""
    out = np.full((len(rows), to), value, np.int64)
    for at, row in enumerate(rows):
        out[at, : len(row)] = row
    return out


def attention(lengths: Sequence[int], to: int) -> NDArray[np.int64]:
    """[B, to]: 1 for the tokens of each row, 0 for its padding."""
    return (np.arange(to) < np.asarray(lengths)[:, None]).astype(np.int64)


def tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Arrays as tensors, which share their memory."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def crc(*arrays: NDArray[Any]) -> int:
    """A checksum of arrays, by which a data set is known again."""
    found = 0
    for array in arrays:
        found = zlib.crc32(np.ascontiguousarray(array).tobytes(), found)
    return found
