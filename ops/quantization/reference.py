"""Quantization in plain PyTorch: what every kernel is tested against, and what quantize-aware training rounds with.

All arithmetic is fp32. Integers are computed against the scale *as stored*, so that fake and real quantization agree
bit for bit. The stored scale is rounded up, never down: a group's range then always covers its weights, nothing is
clamped by more than half a step, and nearest rounding obeys ``|weight - dequantized| <= scale / 2`` (one symmetric
bit apart) whatever the scale's dtype, fp16 subnormals included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ops.quantization.tensor import SCALE_DTYPES, QuantizationError, QuantizedTensor

Rounding = Literal["nearest", "stochastic"]
#: Fake-quantization starts above what is ever stored: a schedule walks down from 16 bits.
MAX_FAKE_BITS = 16
MAX_BITS = 8


def _nearest(values: Tensor, generator: torch.Generator | None) -> Tensor:
    return values.round()


def _stochastic(values: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = torch.rand(values.shape, generator=generator, device=values.device, dtype=values.dtype)
    down = values.floor()
    return down + (noise < values - down)


_ROUND: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {"nearest": _nearest, "stochastic": _stochastic}


def quantize(
    weight: Tensor,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool = True,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedTensor:
    """Quantizes ``weight`` [out, in], of any floating dtype and strides, to nearest (half to even) or stochastically.

    Symmetric: ``scale = max(largest / (2^(b-1) - 1), -smallest / 2^(b-1))``, the least that covers the group. One
    symmetric bit is the sign with the mean magnitude as scale (XNOR-Net, arXiv 1603.05279). Asymmetric: the range,
    widened to include zero, in ``2^b - 1`` steps, with an integer zero point, so that zero is exact. A group of zeros
    has scale 0. ``rounding="stochastic"`` rounds up with a probability equal to the fraction (unbiased), drawing one
    number per weight from ``generator`` (on the weight's device; None is PyTorch's global one).

    Raises :class:`QuantizationError` for a weight that holds inf or NaN, a scale too large for ``scale_dtype``, or
    arguments out of range. Waits for the device to know.
    """
    _check_arguments(weight, bits, MAX_BITS, group_size, rounding, scale_dtype)
    integers, scales, zero_points = _encode(weight, bits, group_size, symmetric, rounding, generator, scale_dtype)
    if not bool(scales.isfinite().all()):
        raise QuantizationError(_why_not_finite(weight, scale_dtype))
    return QuantizedTensor.from_integers(integers, scales, zero_points, bits=bits, group_size=group_size)


def dequantize(tensor: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out, in] in ``dtype``: computed in fp32 (exact for fp16 and bf16 scales) and rounded once."""
    return _decode(tensor.integers(), tensor.scales, tensor.zero_points, tensor.group_size).to(dtype)


def fake_quantize(
    weight: Tensor,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool = True,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """``dequantize(quantize(weight, ...), weight.dtype)`` bit for bit, without packing; up to 16 bits.

    Never waits for the device: inf or NaN, or a scale too large for ``scale_dtype``, leaves nothing finite in its
    group, so that it shows in the loss. Carries no gradient; training adds its own straight-through estimator.
    """
    _check_arguments(weight, bits, MAX_FAKE_BITS, group_size, rounding, scale_dtype)
    integers, scales, zero_points = _encode(weight, bits, group_size, symmetric, rounding, generator, scale_dtype)
    return _decode(integers, scales, zero_points, group_size).to(weight.dtype)


def lookup(tensor: QuantizedTensor, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Embedding lookup: rows ``index`` [...] of the table as [..., in]; only those rows are dequantized."""
    return dequantize(tensor.select_rows(index.flatten()), dtype).view(*index.shape, tensor.shape[1])


def _check_arguments(
    weight: Tensor, bits: int, most: int, group_size: int | None, rounding: str, scale_dtype: torch.dtype
) -> None:
    if weight.dim() != 2 or weight.shape[1] < 1 or not weight.is_floating_point():
        raise QuantizationError(
            f"a weight to quantize is floating-point [out, in], not {weight.dtype} {list(weight.shape)}"
        )
    if not 1 <= bits <= most:
        raise QuantizationError(f"{bits} bits: use 1 to {most}")
    if group_size is not None and group_size < 1:
        raise QuantizationError(f"group size {group_size}: use 1 or more, or None for the whole row")
    if rounding not in _ROUND:
        raise QuantizationError(f"rounding {rounding!r}: use one of {', '.join(_ROUND)}")
    if scale_dtype not in SCALE_DTYPES:
        raise QuantizationError(f"scales in {scale_dtype}: use one of {', '.join(map(str, SCALE_DTYPES))}")


@torch.no_grad()
def _encode(
    weight: Tensor,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    rounding: str,
    generator: torch.Generator | None,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers [out, in] int32, scales [out, groups], zero points [out, groups] (uint8, above 8 bits int32) or None."""
    weight = weight.to(torch.float32)
    inner = weight.shape[1]
    size = inner if group_size is None else min(group_size, inner)
    binary = symmetric and bits == 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    smallest, largest, magnitude = _group_statistics(weight, size)
    if binary:
        scale = magnitude
    elif symmetric:
        scale = torch.maximum(largest / high, smallest / low)
    else:
        scale = (largest - smallest) / high
    stored = _round_up(scale, scale_dtype)
    divisor = stored.to(torch.float32).masked_fill(stored == 0, 1.0)
    steps = weight / _spread(divisor, size, inner)
    if binary:
        return _ROUND[rounding]((steps + 1) / 2, generator).clamp(0, 1).to(torch.int32) * 2 - 1, stored, None
    integers = _ROUND[rounding](steps, generator)
    if symmetric:
        return integers.clamp(low, high).to(torch.int32), stored, None
    zero_points = (-smallest / divisor).round().clamp(low, high)
    integers = (integers + _spread(zero_points, size, inner)).clamp(low, high).to(torch.int32)
    return integers, stored, zero_points.to(torch.uint8 if bits <= MAX_BITS else torch.int32)


@torch.no_grad()
def _decode(integers: Tensor, scales: Tensor, zero_points: Tensor | None, group_size: int | None) -> Tensor:
    inner = integers.shape[1]
    size = inner if group_size is None else min(group_size, inner)
    values = integers.to(torch.float32)
    if zero_points is not None:
        values = values - _spread(zero_points.to(torch.float32), size, inner)
    return values * _spread(scales.to(torch.float32), size, inner)


def _group_statistics(weight: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest (at most 0), largest (at least 0) and mean magnitude of each group, each [out, groups]."""
    out, inner = weight.shape
    groups = -(-inner // size)
    short = groups * size - inner
    # Zeros change neither statistic: the range includes zero in any case, and the mean divides by the true count.
    grouped = F.pad(weight, (0, short)).view(out, groups, size)
    counts = torch.full((groups,), float(size), device=weight.device)
    counts[-1] -= short
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0), grouped.abs().sum(-1) / counts


def _spread(per_group: Tensor, size: int, inner: int) -> Tensor:
    """[out, groups] to [out, inner], or [out, 1] where one group is the row: each column's group's number."""
    if size == inner:
        return per_group
    return per_group.repeat_interleave(size, dim=1)[:, :inner]


def _round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32, not negative, to the nearest number of ``dtype`` that is not smaller."""
    stored = scale.to(dtype)
    if dtype == torch.float32:
        return stored
    # The bits of floats that are not negative, read as integers, are in the floats' order.
    following = (stored.view(torch.int16) + 1).view(dtype)
    return torch.where(stored.to(torch.float32) < scale, following, stored)


def _why_not_finite(weight: Tensor, scale_dtype: torch.dtype) -> str:
    bad = (~weight.isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        value = weight[row, column].item()
        return f"the weight holds {value} at row {row}, column {column} ({len(bad)} such): it cannot be quantized"
    largest = weight.abs().max().item()
    return f"weights up to {largest:g} need a scale that {scale_dtype} cannot hold: use bfloat16 or float32 scales"
