"""Quantized weights on a CPU: torch's own products of bf16 activations with weights of 8 and 4 bits.

For a few rows these read a quarter or half of what bf16 weights take (``benchmarks/RESULTS.md`` has the figures). In
fp32 and fp16 torch has scalar code behind the same operators, slower than expanding the weight tile by tile
(:func:`ops.eager.linear.tiled_product`); and from some ten rows on the tiles, which go through a CPU's matrix units,
are ahead in bf16 too. So bf16 alone is packed, and each product chooses by its rows.

Like the other operators of :mod:`ops.eager.cpu_linear` these are for torch's own compiler and not documented: each is
used only where it is found and gives the right product. Their layouts were tried out: 8 bits need rows of a multiple of
32 columns (others read past their end), 4 bits need multiples of 16 rows and groups of 32 to 256.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ops.eager.cpu_linear import log
from ops.eager.linear import tiled_product
from ops.quantization.reference import dequantize, quantize
from ops.quantization.tensor import QuantizedTensor
from ops.weights import PackedWeight

#: The most rows of a product that torch's kernels are ahead for.
FEW_ROWS = 8
INT4_GROUPS = (32, 64, 128, 256)
#: Rows of a weight that are unpacked at a time: a multiple of what torch's layout interleaves.
ROWS = 4096


@dataclass(frozen=True)
class Int8Rows:
    """A symmetric weight of 8 bits with one scale a row, in its canonical form; computes in bf16, sums in fp32."""

    weight: QuantizedTensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Logical (out, in)."""
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """Of the canonical form."""
        return self.weight.nbytes

    def apply(self, x: Tensor) -> Tensor:
        """``x W^T``: [T, in] to [T, out] in bf16."""
        if not 0 < x.shape[0] <= FEW_ROWS:
            return tiled_product(x, self.weight)
        return _int8_product(x.contiguous(), self.weight.values, self.scales)


@dataclass(frozen=True)
class Int4Groups:
    """A weight of 4 bits in torch's layout, which stands beside the canonical one where that has another user.

    packed: uint8 [out, in / 2], rows interleaved as the CPU's vectors are wide.
    scales: bf16 [groups, out, 2]: scale, and what the integer 8 stands for.
    weight: the canonical form, for products of many rows.
    """

    packed: Tensor
    scales: Tensor
    weight: QuantizedTensor

    @property
    def shape(self) -> tuple[int, int]:
        """Logical (out, in)."""
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """Of what a product reads."""
        return self.weight.nbytes

    def apply(self, x: Tensor) -> Tensor:
        """``x W^T``: [T, in] to [T, out] in bf16."""
        if not 0 < x.shape[0] <= FEW_ROWS:
            return tiled_product(x, self.weight)
        assert self.weight.group_size is not None, "a row that is one group is not packed"
        return _int4_product(x.contiguous(), self.packed, self.weight.group_size, self.scales)


def pack_quantized_for_cpu(weight: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor | PackedWeight:
    """The fastest form of a quantized CPU weight for activations in ``dtype``; ``weight`` itself where none serves."""
    if dtype != torch.bfloat16 or 0 in weight.shape:
        return weight
    if weight.bits > 4:
        serves = weight.symmetric and weight.groups == 1 and weight.shape[1] % 32 == 0
        if serves and int8_works():
            return Int8Rows(weight, weight.scales[:, 0].to(dtype))
        return weight
    rows, inner = weight.shape
    size = weight.group_size
    if size not in INT4_GROUPS or inner % size or rows % 16 or not int4_works():
        return weight
    return Int4Groups(*_int4_layout(weight), weight)


def _int4_layout(weight: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """torch's layout of the integers, and its pairs of scale and value of the integer 8, in bf16."""
    symmetric = weight.zero_points is None
    scales = weight.scales.float()
    middle = torch.zeros_like(scales) if weight.zero_points is None else (8 - weight.zero_points.float()) * scales
    packed = []
    for start in range(0, weight.shape[0], ROWS):  # in int32 a piece at a time: it takes eight times the room
        integers = weight.rows(start, min(start + ROWS, weight.shape[0])).integers().to(torch.int32)
        packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers + 8 * symmetric, 1))
    return torch.cat(packed), torch.stack((scales.t(), middle.t()), dim=-1).to(torch.bfloat16).contiguous()


def _int8_product(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    return torch._weight_int8pack_mm(x, values, scales)


def _int4_product(x: Tensor, packed: Tensor, group_size: int, scales: Tensor) -> Tensor:
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales)
    return product


@cache
def fast_bf16() -> bool:
    """Whether this CPU multiplies in bf16, by whole weights (for many rows) and by quantized ones (for few)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and int8_works() and int4_works()


@cache
def int8_works() -> bool:
    """Whether torch's product with weights of 8 bits is here and right."""

    def product(x: Tensor, weight: QuantizedTensor) -> Tensor:
        return _int8_product(x, weight.values, weight.scales[:, 0].to(x.dtype))

    return _probe("the product with 8-bit weights", product, bits=8, group_size=None)


@cache
def int4_works() -> bool:
    """Whether torch's product with weights of 4 bits is here and right."""

    def product(x: Tensor, weight: QuantizedTensor) -> Tensor:
        packed, scales = _int4_layout(weight)
        return _int4_product(x, packed, 32, scales)

    return _probe("the product with 4-bit weights", product, bits=4, group_size=32)


def _probe(
    what: str, product: Callable[[Tensor, QuantizedTensor], Tensor], *, bits: int, group_size: int | None
) -> bool:
    """Runs ``product`` once on small whole numbers that bf16 holds exactly, their sums included."""
    x = torch.arange(-64, 64, dtype=torch.float32).remainder(3).view(2, 64).sub(1).bfloat16()
    numbers = torch.arange(80 * 64, dtype=torch.float32).mul(7).remainder(15).view(80, 64).sub(7)
    numbers[:, ::32] = 7.0 if bits == 4 else 127.0  # so that every scale is 1
    weight = quantize(numbers, bits=bits, group_size=group_size)
    try:
        found = product(x, weight)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        log.info("%s is not available (%s): weights are expanded", what, str(error).splitlines()[0])
        return False
    wanted = (x.double() @ dequantize(weight).double().t()).bfloat16()
    if not torch.equal(found, wanted):
        log.warning("%s is wrong on this machine: weights are expanded", what)
        return False
    return True
