"""The one canonical form of a quantized weight; every kernel's packing is derived from it.

A weight [out, in] is cut into groups of ``group_size`` columns of one row (the last group of a row may be short). Each
group has a scale and, if asymmetric, a zero point:

    weight[o, i] = (integer[o, i] - zero_point[o, g]) * scale[o, g]    (g = i // group_size; zero_point 0 if symmetric)

============  =============================  ==========================================================================
              integers                       stored in ``values``
============  =============================  ==========================================================================
bits 5 to 8   symmetric: -2^(b-1)..2^(b-1)-1  int8 [out, in]
              asymmetric: 0..2^b-1            uint8 [out, in]
bits 1 to 4   the same, as nibbles            uint8 [out, ceil(in / 2)]: column 2j in the low nibble of byte j, column
              (symmetric: two's complement)   2j + 1 in the high one; the high nibble after an odd tail is 0
============  =============================  ==========================================================================

One symmetric bit holds -1 and +1 (0 and -1 would lose every positive weight); it rides in the nibble like any other
integer.

In a safetensors file the weight ``name`` is ``name.qvalues``, ``name.scales`` and, if asymmetric,
``name.zero_points``, in the dtypes and shapes above. The header's metadata has, under ``name.quantization``, the JSON
object ``{"format": "slipstream.quantized.1", "bits": 4, "group_size": 64, "symmetric": true, "shape": [out, in]}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from config_schema.errors import SlipstreamError

FORMAT = "slipstream.quantized.1"
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FIELDS = {"format", "bits", "group_size", "symmetric", "shape"}


class QuantizationError(SlipstreamError, ValueError):
    """A weight cannot be quantized as asked, or the parts of a quantized tensor do not fit each other."""


def pack_nibbles(integers: Tensor) -> Tensor:
    """Integers [out, in] of any integer dtype to uint8 [out, ceil(in / 2)], four low bits each, low nibble first."""
    if integers.shape[1] % 2:
        integers = F.pad(integers, (0, 1))
    nibbles = integers.to(torch.uint8) & 0xF
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, columns: int, *, signed: bool) -> Tensor:
    """The first ``columns`` integers of each row: int8 if ``signed`` (two's complement), else uint8."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)[:, :columns]
    return (nibbles.to(torch.int8) ^ 8) - 8 if signed else nibbles.contiguous()


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantized weight in canonical form (see the module's docstring for the layout).

    values:      the integers, packed.
    scales:      [out, groups] in fp32, fp16 or bf16, finite and not negative; 0 for a group of zeros.
    zero_points: [out, groups] uint8, or None if symmetric.
    bits:        1 to 8; 1 to 4 are stored in nibbles.
    group_size:  columns that share a scale; None is the whole row.
    shape:       (out, in), the logical shape.

    Raises :class:`QuantizationError` (a ``ValueError``) if shapes, dtypes or devices contradict each other. The
    contents are not looked at, so that building one never waits for a GPU.
    """

    values: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    group_size: int | None
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        out, inner = self.shape
        if not 1 <= self.bits <= 8:
            raise QuantizationError(f"{self.bits} bits: a quantized tensor has 1 to 8")
        if out < 0 or inner < 1:
            raise QuantizationError(f"shape ({out}, {inner}): a quantized tensor has at least one column")
        if self.group_size is not None and self.group_size < 1:
            raise QuantizationError(f"group size {self.group_size}: use 1 or more, or None for the whole row")
        whole = torch.int8 if self.symmetric else torch.uint8
        columns, dtype = ((inner + 1) // 2, torch.uint8) if self.packed else (inner, whole)
        self._check("values", self.values, (out, columns), (dtype,))
        self._check("scales", self.scales, (out, self.groups), SCALE_DTYPES)
        if self.zero_points is not None:
            self._check("zero_points", self.zero_points, (out, self.groups), (torch.uint8,))

    def _check(self, part: str, tensor: Tensor, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]) -> None:
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            raise QuantizationError(
                f"{part} is {tensor.dtype} {list(tensor.shape)}, but shape {list(self.shape)} at {self.bits} bits and "
                f"group size {self.group_size} needs {' or '.join(map(str, dtypes))} {list(shape)}"
            )
        if tensor.device != self.values.device:
            raise QuantizationError(f"{part} is on {tensor.device}, the values are on {self.values.device}")

    @classmethod
    def from_integers(
        cls, integers: Tensor, scales: Tensor, zero_points: Tensor | None, *, bits: int, group_size: int | None
    ) -> QuantizedTensor:
        """Packs integers [out, in] of any integer dtype, which must lie in the range that ``bits`` allow."""
        out, inner = integers.shape
        dtype = torch.int8 if zero_points is None else torch.uint8
        values = pack_nibbles(integers) if bits <= 4 else integers.to(dtype).contiguous()
        return cls(values, scales, zero_points, bits, group_size, (out, inner))

    @property
    def symmetric(self) -> bool:
        """Zero is the integer 0 and the integers are signed."""
        return self.zero_points is None

    @property
    def packed(self) -> bool:
        """Two integers share a byte."""
        return self.bits <= 4

    @property
    def groups(self) -> int:
        """Groups of one row."""
        return 1 if self.group_size is None else -(-self.shape[1] // self.group_size)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored: values, scales, zero points."""
        return sum(part.numel() * part.element_size() for part in self._parts().values())

    @property
    def device(self) -> torch.device:
        """Where all parts lie."""
        return self.values.device

    def integers(self) -> Tensor:
        """The integers [out, in], unpacked: int8 if symmetric, else uint8."""
        return unpack_nibbles(self.values, self.shape[1], signed=self.symmetric) if self.packed else self.values

    def to(self, device: torch.device | str, *, copy: bool = False) -> QuantizedTensor:
        """The same tensor on ``device``; ``copy``: with memory of its own in any case."""

        def moved(part: Tensor) -> Tensor:
            return part.to(device, copy=copy)

        zero_points = None if self.zero_points is None else moved(self.zero_points)
        return replace(self, values=moved(self.values), scales=moved(self.scales), zero_points=zero_points)

    @classmethod
    def stack(cls, parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
        """Weights of one width, bits and grouping, one below the other (QKV of a layer; the chunks of one weight)."""
        first = parts[0]
        if len(parts) == 1:
            return first
        kinds = {(part.bits, part.group_size, part.symmetric, part.scales.dtype, part.shape[1]) for part in parts}
        if len(kinds) > 1:
            raise QuantizationError("weights to stack differ in bits, group size, symmetry, scales or columns")
        zero_points = [part.zero_points for part in parts if part.zero_points is not None]
        return replace(
            first,
            values=torch.cat([part.values for part in parts]),
            scales=torch.cat([part.scales for part in parts]),
            zero_points=torch.cat(zero_points) if zero_points else None,
            shape=(sum(part.shape[0] for part in parts), first.shape[1]),
        )

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Rows ``[start, stop)`` as views (a column-parallel slice)."""
        self._check_slice("rows", start, stop, self.shape[0])
        zero_points = None if self.zero_points is None else self.zero_points[start:stop]
        shape = (stop - start, self.shape[1])
        return replace(
            self, values=self.values[start:stop], scales=self.scales[start:stop], zero_points=zero_points, shape=shape
        )

    def columns(self, start: int, stop: int) -> QuantizedTensor:
        """A copy of columns ``[start, stop)`` (a row-parallel slice), which dequantizes to exactly those columns.

        ``start`` must be a multiple of the group size, unless one group is the whole row: then any columns share its
        scale.
        """
        self._check_slice("columns", start, stop, self.shape[1])
        if start == stop:
            raise QuantizationError(f"columns [{start}, {stop}): a quantized tensor has at least one column")
        size = self.shape[1] if self.groups == 1 else self.group_size
        assert size is not None
        if start % size and self.groups > 1:
            raise QuantizationError(f"columns [{start}, {stop}) begin inside a group: start at a multiple of {size}")
        group = slice(start // size, -(-stop // size))
        scales = self.scales[:, group].contiguous()
        zero_points = None if self.zero_points is None else self.zero_points[:, group].contiguous()
        shape = (self.shape[0], stop - start)
        if not self.packed:
            values = self.values[:, start:stop].contiguous()
        else:
            # An odd start (an odd group size) swaps the nibbles of every byte, and an odd stop leaves one to be
            # cleared.
            values = pack_nibbles(self.integers()[:, start:stop])
        return replace(self, values=values, scales=scales, zero_points=zero_points, shape=shape)

    def select_rows(self, index: Tensor) -> QuantizedTensor:
        """Rows gathered by ``index`` [n] (int32 or int64, same device); nothing is dequantized."""
        if index.dim() != 1:
            raise QuantizationError(f"select_rows takes an index of one dimension, not {list(index.shape)}")
        zero_points = None if self.zero_points is None else self.zero_points.index_select(0, index)
        return replace(
            self,
            values=self.values.index_select(0, index),
            scales=self.scales.index_select(0, index),
            zero_points=zero_points,
            shape=(index.numel(), self.shape[1]),
        )

    def to_tensors(self, name: str) -> dict[str, Tensor]:
        """The parts by their names in a safetensors file; save them with :meth:`to_metadata`."""
        return {f"{name}.{part}": tensor.contiguous() for part, tensor in self._parts().items()}

    def to_metadata(self, name: str) -> dict[str, str]:
        """The entry that this tensor adds to the metadata of a safetensors header."""
        facts = {
            "format": FORMAT,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "shape": list(self.shape),
        }
        return {f"{name}.quantization": json.dumps(facts)}

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> QuantizedTensor:
        """The inverse of :meth:`to_tensors` and :meth:`to_metadata`.

        Raises :class:`QuantizationError`, naming the tensor, if a part is missing or does not fit the metadata.
        """
        bits, group_size, symmetric, shape = _read_metadata(name, metadata)
        wanted = ("qvalues", "scales") if symmetric else ("qvalues", "scales", "zero_points")
        for part in wanted:
            if f"{name}.{part}" not in tensors:
                raise QuantizationError(f"{name}.{part} is missing: the quantized tensor {name} is not complete")
        if symmetric and f"{name}.zero_points" in tensors:
            raise QuantizationError(f"{name}.zero_points is there, but the metadata call {name} symmetric")
        zero_points = None if symmetric else tensors[f"{name}.zero_points"]
        try:
            return cls(tensors[f"{name}.qvalues"], tensors[f"{name}.scales"], zero_points, bits, group_size, shape)
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from error

    def _parts(self) -> dict[str, Tensor]:
        parts = {"qvalues": self.values, "scales": self.scales}
        return parts if self.zero_points is None else {**parts, "zero_points": self.zero_points}

    def _check_slice(self, what: str, start: int, stop: int, size: int) -> None:
        if not 0 <= start <= stop <= size:
            raise QuantizationError(f"{what} [{start}, {stop}) do not lie in a quantized tensor of {size} {what}")


def _read_metadata(name: str, metadata: Mapping[str, str]) -> tuple[int, int | None, bool, tuple[int, int]]:
    key = f"{name}.quantization"
    if key not in metadata:
        raise QuantizationError(f"the header's metadata have no {key}: {name} was not saved as a quantized tensor")
    try:
        facts = json.loads(metadata[key])
    except json.JSONDecodeError as error:
        raise QuantizationError(f"metadata {key} is not JSON: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or set(facts) != _FIELDS:
        raise QuantizationError(f"metadata {key} is not of format {FORMAT}: {metadata[key][:200]}")
    bits, group_size, symmetric, shape = (facts[field] for field in ("bits", "group_size", "symmetric", "shape"))
    counts = [bits, 1 if group_size is None else group_size, *(shape if isinstance(shape, list) else [None])]
    if len(counts) != 4 or any(type(count) is not int for count in counts) or not isinstance(symmetric, bool):
        raise QuantizationError(f"metadata {key} has a field of the wrong type: {metadata[key][:200]}")
    return bits, group_size, symmetric, (shape[0], shape[1])
