"""One safetensors file: its header checked in full, its tensors as views of a memory map.

The format: 8 bytes, little-endian, give the length of a JSON header, which maps each name to its dtype, shape and byte
range in what follows. Source: https://huggingface.co/docs/safetensors (the section "Format"). The library checks most
of this too, but names neither the file nor the tensor: the header is read here, the tensors through the library.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint.files import JSON_LIMIT, parse_json, read_head, what_it_is
from engine.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that are read, by the format's names for them."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a header: its bytes lie at ``[begin, end)`` after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """An opened safetensors file (see :class:`engine.checkpoint.sources.TensorFile`).

    Raises ``CheckpointError`` naming file and tensor if it is no safetensors file, is cut off or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.label = path.name
        self._entries = read_header(path)
        try:
            self._map: Any = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: the safetensors library cannot open it: {error}") from error

    def names(self) -> Collection[str]:
        """Every tensor's name, in the order of the header."""
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's stored dtype."""
        return self._entries[name].dtype

    def metadata(self) -> dict[str, str]:
        """The header's own strings."""
        return dict(self._map.metadata() or {})

    def tensor(self, name: str) -> Tensor:
        """A view of the map. The map is private: writing to the view would not reach the file."""
        tensor: Tensor = self._map.get_tensor(name)
        return tensor


def read_header(path: Path) -> dict[str, Entry]:
    """The header of ``path``, checked: every tensor's bytes are there, fit its shape, and belong to it alone."""
    head = read_head(path)
    # A header of 128 bytes makes the file begin like a pickle; the brace that must follow the length tells them apart.
    kind = None if head[8:9] == b"{" else what_it_is(head)
    if kind is not None:
        raise CheckpointError(f"{path}: not a safetensors file, but {kind}")
    size = path.stat().st_size
    if size < 8:
        raise CheckpointError(f"{path}: not a safetensors file: {size} bytes are too few for one")
    length = int.from_bytes(head[:8], "little")
    if length > JSON_LIMIT:
        raise CheckpointError(
            f"{path}: not a safetensors file: its first 8 bytes give a header of {length:,} bytes "
            f"(limit {JSON_LIMIT:,})"
        )
    if length > size - 8:
        raise CheckpointError(
            f"{path}: cut off inside its header: that takes {length:,} bytes, and {size - 8:,} follow; "
            "fetch the file again"
        )
    with path.open("rb") as file:
        file.seek(8)
        header = parse_json(file.read(length), f"{path}: header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header: must be a JSON object of tensors")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields) for name, fields in header.items()}
    _check_layout(path, entries, size - 8 - length)
    return entries


def _entry(path: Path, name: str, fields: Any) -> Entry:
    where = f"{path}: {name}"
    if not isinstance(fields, dict) or not fields.keys() >= {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: the header must give its dtype, shape and data_offsets")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: bad header: shape {shape!r}, data_offsets {offsets!r}")
    dtype = DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{where}: dtype {fields['dtype']!r} is not supported (supported: {', '.join(DTYPES)}); "
            "convert the checkpoint to one of these"
        )
    entry = Entry(dtype, tuple(shape), offsets[0], offsets[1])
    needed = math.prod(shape) * dtype.itemsize
    if entry.end - entry.begin != needed:
        raise CheckpointError(
            f"{where}: shape {shape} of {fields['dtype']} takes {needed:,} bytes, "
            f"data_offsets {offsets} give {entry.end - entry.begin:,}"
        )
    return entry


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(path: Path, entries: dict[str, Entry], available: int) -> None:
    """The byte ranges follow each other without overlap or gap and fill the ``available`` bytes after the header."""
    end, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < end:
            raise CheckpointError(f"{path}: {name}: overlaps {before} (bytes {entry.begin:,} to {end:,})")
        if entry.end > available:
            raise CheckpointError(
                f"{path}: {name}: ends at byte {entry.end:,} of the data, of which the file has {available:,}: "
                "cut off (an interrupted download or copy?); fetch the file again"
            )
        if entry.begin > end:
            raise CheckpointError(f"{path}: {name}: {entry.begin - end:,} bytes before it belong to no tensor")
        end, before = entry.end, name
    if end != available:
        raise CheckpointError(f"{path}: {available - end:,} bytes at its end belong to no tensor; fetch the file again")
