"""A :class:`ops.weights.WeightSource` over one or several weight files of any format."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor


class TensorFile(Protocol):
    """One opened file of named tensors. Opening has read and checked everything but the tensors' own bytes."""

    @property
    def label(self) -> str:
        """The file's name inside the checkpoint's directory, for messages."""
        ...

    def names(self) -> Collection[str]:
        """Every tensor's name, in the file's order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; ``KeyError`` for a name that is not there."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype :meth:`tensor` returns."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The whole tensor; a view of the mapped file where the format allows it."""
        ...


class FileSource:
    """The tensors of a checkpoint on disk, each read from the file that holds it.

    The mapped pages belong to the file: reading adds none to the process's private memory. A file that is shortened or
    rewritten in place while it is mapped cannot be noticed (one that is replaced by a rename stays as it was).
    """

    def __init__(self, holders: Mapping[str, TensorFile]) -> None:
        self._holders = dict(holders)

    @classmethod
    def single(cls, file: TensorFile) -> FileSource:
        """Every tensor of one file."""
        return cls(dict.fromkeys(file.names(), file))

    @property
    def version(self) -> int:
        """Always 0: a checkpoint that is being read does not change."""
        return 0

    def names(self) -> Collection[str]:
        """Every tensor's name, in the order of the index or of the file."""
        return self._holders.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape. Raises ``KeyError`` for a name that is not there."""
        return self._holders[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's stored dtype (float32 for what GGUF quantized)."""
        return self._holders[name].dtype(name)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or rows ``[rows.start, rows.stop)`` of it, on the CPU (:meth:`ops.weights.WeightSource.read`)."""
        return take_rows(self._holders[name].tensor(name), rows)

    def locate(self, name: str) -> str:
        """``FILE: TENSOR``."""
        return f"{self._holders[name].label}: {name}"


def take_rows(tensor: Tensor, rows: slice | None) -> Tensor:
    """Rows ``[rows.start, rows.stop)`` of the first axis, as a view; the tensor itself if ``rows`` is None."""
    if rows is None:
        return tensor
    start, stop = rows.start or 0, len(tensor) if rows.stop is None else rows.stop
    assert rows.step in (None, 1), f"rows {rows} with a step"
    assert 0 <= start <= stop <= len(tensor), f"rows {rows} of {tuple(tensor.shape)}"
    return tensor[start:stop]
