"""Checkpoints of quantized weights in slipstream's own layout (docs/quantization.md)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.safetensors_file import SafetensorsFile
from engine.checkpoint.sources import take_rows
from engine.errors import CheckpointError
from ops.quantization import QuantizationError, QuantizedTensor, Scheme
from ops.quantization.tensor import FORMAT
from ops.spec import ModelSpec

BLOCK = "quantization_config"
METHOD = "slipstream"
SCALES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_KEYS = {"quant_method", "format", "bits", "group_size", "symmetric", "scale_dtype"}
_PARTS = (".qvalues", ".scales", ".zero_points")


@dataclass(frozen=True)
class Stored:
    """The config block: what all quantized weights of a checkpoint have in common. ``bits`` is 8 or 4, the room that
    an integer takes."""

    bits: int
    group_size: int | None
    symmetric: bool
    scale_dtype: str

    @classmethod
    def of(cls, scheme: Scheme) -> Stored:
        """The block that ``scheme`` leaves."""
        name = next(name for name, dtype in SCALES.items() if dtype == scheme.scale_dtype)
        return cls(scheme.bits, scheme.group_size, scheme.symmetric, name)

    def to_json(self) -> dict[str, Any]:
        """For config.json, under :data:`BLOCK`."""
        return {
            "quant_method": METHOD,
            "format": FORMAT,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "scale_dtype": self.scale_dtype,
        }

    @classmethod
    def from_json(cls, block: Mapping[str, Any], where: str) -> Stored:
        """The inverse of :meth:`to_json`. Raises ``CheckpointError`` headed by ``where``."""
        if block.keys() != _KEYS or block["format"] != FORMAT:
            raise CheckpointError(f"{where}: {BLOCK} is not of format {FORMAT}: quantize the model anew")
        bits, size, symmetric, scales = (block[key] for key in ("bits", "group_size", "symmetric", "scale_dtype"))
        sized = size is None or (type(size) is int and size > 0)
        if bits not in (4, 8) or not sized or not isinstance(symmetric, bool) or scales not in SCALES:
            raise CheckpointError(f"{where}: {BLOCK} has a value that it cannot have: {dict(block)}")
        return cls(bits, size, symmetric, scales)


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that slipstream quantized the weights beside it."""
    block = config.get(BLOCK)
    return isinstance(block, Mapping) and block.get("quant_method") == METHOD


class QuantizedFile:
    """The weights of a quantized checkpoint: a :class:`ops.weights.WeightSource` of canonical names that is an
    :class:`ops.weights.QuantizedSource` too.

    Raises ``CheckpointError`` if a quantized weight is not whole or does not fit ``stored``.
    """

    def __init__(self, path: Path, stored: Stored) -> None:
        self._file, self._path, self.stored = SafetensorsFile(path), path, stored
        names = self._file.names()
        suffix = ".qvalues"
        self._whole = {n.removesuffix(suffix): self._open(n.removesuffix(suffix)) for n in names if n.endswith(suffix)}
        self._plain = [name for name in names if not name.endswith(_PARTS)]
        if not self._whole:
            raise CheckpointError(
                f"{path}: holds no quantized weight, but config.json says so: quantize the model anew"
            )

    def _open(self, name: str) -> QuantizedTensor:
        there = self._file.names()
        tensors = {f"{name}{part}": self._file.tensor(f"{name}{part}") for part in _PARTS if f"{name}{part}" in there}
        try:
            found = QuantizedTensor.from_tensors(name, tensors, self._file.metadata())
        except QuantizationError as error:
            raise CheckpointError(f"{self._path}: {error}") from None
        said, own = self.stored, (4 if found.packed else 8, found.group_size, found.symmetric)
        if own != (said.bits, said.group_size, said.symmetric):
            wanted = f"{said.bits} bits, group size {said.group_size}, symmetric {said.symmetric}"
            raise CheckpointError(
                f"{self._path}: {name}: {own[0]} bits, group size {own[1]}, symmetric {own[2]}, "
                f"but config.json says {wanted}: quantize the model anew"
            )
        if found.scales.dtype != SCALES[said.scale_dtype]:
            raise CheckpointError(
                f"{self._path}: {name}: scales in {found.scales.dtype}, but config.json says {said.scale_dtype}: "
                "quantize the model anew"
            )
        return found

    @property
    def version(self) -> int:
        """Always 0: a checkpoint that is being read does not change."""
        return 0

    @property
    def modules(self) -> frozenset[str]:
        """Canonical names of the quantized ones."""
        return frozenset(name.removesuffix(".weight") for name in self._whole)

    def names(self) -> Collection[str]:
        """Canonical names."""
        return [*self._whole, *self._plain]

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape."""
        return self._whole[name].shape if name in self._whole else self._file.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype; of a quantized weight that of its scales."""
        return self._whole[name].scales.dtype if name in self._whole else self._file.dtype(name)

    def quantized(self, name: str) -> QuantizedTensor:
        """Views of the mapped file."""
        return self._whole[name]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A weight that is not quantized. Raises ``CheckpointError`` for one that is: nothing asks for it in floats."""
        if name in self._whole:
            raise CheckpointError(f'{self.locate(name)}: is quantized: set "precision" to "auto"')
        return take_rows(self._file.tensor(name), rows)

    def locate(self, name: str) -> str:
        """``FILE: TENSOR``."""
        return f"{self._file.label}: {name}"

    def checked(self, spec: ModelSpec) -> ModelSpec:
        """``spec``, less an encoder's pooler where none was saved. Raises ``CheckpointError`` for a weight that is
        missing, surplus or of another shape."""
        head = spec.head
        if head is not None and head.task == "embedding" and "head.dense.weight" not in self.names():
            spec = replace(spec, head=None)
        wanted = spec.weight_shapes()
        problems = [f"{self._path}: {name}: missing" for name in wanted.keys() - set(self.names())]
        problems += [
            f"{self.locate(name)}: this model has no such weight" for name in set(self.names()) - wanted.keys()
        ]
        problems += [
            f"{self.locate(name)}: shape {list(self.shape(name))}, but config.json calls for {list(shape)}"
            for name, shape in wanted.items()
            if name in self.names() and tuple(self.shape(name)) != shape
        ]
        if problems:
            raise CheckpointError("\n".join(sorted(problems)[:10]))
        return spec
