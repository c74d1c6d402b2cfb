"""Which weights of a model are quantized, and how; and quantizing one while it is read, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.quantization.reference import quantize
from ops.quantization.tensor import QuantizedTensor

#: Elements that are in fp32 at a time while a weight is quantized: arithmetic needs several copies of them.
CHUNK = 1 << 20


@dataclass(frozen=True)
class Scheme:
    """How the weights of one model are quantized.

    bits:        8 or 4.
    group_size:  columns that share a scale; None is the whole row.
    symmetric:   zero is the integer 0; otherwise each group has a zero point.
    scale_dtype: of the scales.
    modules:     canonical names (``layers.3.down``, ``embed.token``) of those that are quantized; the others stay.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    scale_dtype: torch.dtype
    modules: frozenset[str]

    def quantized(
        self, read: Callable[[slice], Tensor], shape: tuple[int, int], device: torch.device
    ) -> QuantizedTensor:
        """The weight [out, in] of ``shape`` that ``read`` gives by rows, on ``device``. Rounded to nearest.

        Rows do not depend on each other, so this is ``quantize`` of the whole, which is never in memory.
        """
        rows = max(1, CHUNK // shape[1])
        parts = []
        for start in range(0, shape[0], rows):
            piece = read(slice(start, min(start + rows, shape[0]))).to(device)
            parts.append(
                quantize(
                    piece,
                    bits=self.bits,
                    group_size=self.group_size,
                    symmetric=self.symmetric,
                    scale_dtype=self.scale_dtype,
                )
            )
        return QuantizedTensor.stack(parts)
