"""One ``pytorch_model.bin``: read with ``weights_only``, so that nothing in it can run."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.files import read_head, what_it_is
from engine.errors import CheckpointError

logger = logging.getLogger("slipstream.checkpoint")

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
_CONVERT = "where you trust its origin, convert it: load it with transformers and save_pretrained() writes safetensors"


class BinFile:
    """An opened ``.bin`` (see :class:`engine.checkpoint.sources.TensorFile`).

    The zip format (torch 1.6 and later) is memory-mapped. The older format cannot be, and is held in memory while the
    checkpoint is open, which is logged. Raises ``CheckpointError`` for a file that is damaged, holds anything but a
    flat dictionary of dense tensors, or needs more than ``weights_only`` to load.
    """

    def __init__(self, path: Path, state: Any = None, remedy: str = _CONVERT) -> None:
        """``state``: what :func:`load_plain` made of the file, or the part of it to take; None loads it. ``remedy``
        ends the errors of what is no plain tensor."""
        self.label = path.name
        self._tensors = _checked(path, load_plain(path, remedy) if state is None else state, remedy)

    def names(self) -> Collection[str]:
        """Every tensor's name, in the order of the file."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's stored dtype."""
        return self._tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        """The tensor: a view of the map, or for the older format of the copy in memory."""
        return self._tensors[name]


def load_plain(path: Path, remedy: str = _CONVERT) -> Any:
    """What a file of ``torch.save`` holds, as far as nothing has to run for that: tensors on the CPU (views of the
    mapped file in the zip format), numbers, texts and containers of them. Raises ``CheckpointError``."""
    head = read_head(path)
    if not head.startswith((_ZIP, _PICKLE)):
        raise CheckpointError(f"{path}: not a file of torch.save, but {what_it_is(head) or 'something else'}")
    mapped = head.startswith(_ZIP)
    if not mapped:
        logger.warning("%s: saved by torch before 1.6: cannot be memory-mapped, its weights are in memory twice", path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        needs = re.search(r"GLOBAL (\S+)", str(error))
        what = f"needs {needs[1]}, which is code" if needs else f"cannot be read as weights only ({_first_line(error)})"
        raise CheckpointError(f"{path}: {what}: a pickle is not run; {remedy}") from error
    except Exception as error:  # a damaged pickle or archive can make the reader raise anything
        raise CheckpointError(f"{path}: damaged or cut off: {_first_line(error)}; fetch the file again") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]


def _checked(path: Path, state: Any, remedy: str) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: must hold a dictionary of tensors, holds {type(state).__name__}; {remedy}")
    for name, value in state.items():
        if isinstance(value, Mapping):
            raise CheckpointError(
                f"{path}: {name}: a dictionary inside the dictionary (a training checkpoint?); {remedy}"
            )
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name}: a {type(value).__name__} where a tensor must be; {remedy}")
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            kind = "quantized" if value.is_quantized else f"{value.layout}, {value.dtype}"
            raise CheckpointError(f"{path}: {name}: not a plain dense tensor ({kind}); {remedy}")
    return {name: value.detach() for name, value in state.items()}
