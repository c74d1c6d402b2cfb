"""Weight quantization: the canonical saved form, and the plain-PyTorch reference for kernels and training."""

from __future__ import annotations

from ops.quantization.reference import Rounding, dequantize, fake_quantize, lookup, quantize
from ops.quantization.schedule import LARGEST_FACTOR, BitSchedule, Stage, factor_of
from ops.quantization.scheme import Scheme
from ops.quantization.tensor import QuantizationError, QuantizedTensor, pack_nibbles, unpack_nibbles

__all__ = [
    "LARGEST_FACTOR",
    "BitSchedule",
    "QuantizationError",
    "QuantizedTensor",
    "Rounding",
    "Scheme",
    "Stage",
    "dequantize",
    "factor_of",
    "fake_quantize",
    "lookup",
    "pack_nibbles",
    "quantize",
    "unpack_nibbles",
]
