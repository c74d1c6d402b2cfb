"""Writing a safetensors file so that a crash or a full disk leaves the old file whole."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.safetensors_file import DTYPES
from engine.errors import CheckpointError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_safetensors(
    tensors: Mapping[str, Tensor], path: Path | str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` to the safetensors file ``path``.

    Written to a file beside it, flushed to the disk and renamed: ``path`` is at all times the old file or the new one.
    Tensors may lie on any device, be views or share memory (each name gets its own bytes); one at a time is copied to
    the CPU, where the library's own ``save_file`` takes the whole model at once and refuses shared memory. ``metadata``
    are strings for the header; without it, ``{"format": "pt"}``, which transformers asks for. Raises
    ``CheckpointError`` if a tensor cannot be stored in this format or the file cannot be written; nothing is left
    behind then.
    """
    path = Path(path)
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header = _header(tensors, order, {"format": "pt"} if metadata is None else metadata, path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with aside.open("xb") as file:
            file.write(header)
            for name in order:
                file.write(_bytes(tensors[name]))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        size = sum(map(_size, tensors.values())) + len(header)
        raise CheckpointError(
            f"{path}: cannot be written ({size:,} bytes): {error.strerror or error}; what was there before is unchanged"
        ) from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _header(tensors: Mapping[str, Tensor], order: list[str], metadata: Mapping[str, str], path: Path) -> bytes:
    """Length and JSON header. Wide dtypes come first and the header is padded to 8 bytes: every tensor is aligned."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for name in order:
        tensor = tensors[name]
        if name == "__metadata__" or tensor.dtype not in _NAMES or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{path}: {name}: a {tensor.dtype} tensor ({tensor.layout}, {tensor.device}) of this name cannot be "
                "stored as safetensors"
            )
        end = begin + _size(tensor)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in row-major order; safetensors is little-endian, as every machine PyTorch runs CUDA on."""
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable, so that a power cut does not bring the old file back."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(
            f"{directory}: the file is written, but not its name: {error.strerror or error}"
        ) from error
