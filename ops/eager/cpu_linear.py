"""Weights packed for a CPU: the linear layers of the ``eager`` set there.

``F.linear`` leaves half of two cores idle on one token and reads fp32 weights from a layout made for large products.
Two packings do better, each one copy of the weight that replaces the plain one:

* fp16 in FBGEMM's layout, where every weight is *exactly* representable in fp16 after a power-of-two scale (bf16
  checkpoints are): half the bytes to read, activations and sums in fp32, so that the result is that of the fp32 weight
  to rounding.
* oneDNN's blocked layout otherwise, in the weight's own dtype.

Measured figures are in benchmarks/RESULTS.md. Both are operators that PyTorch ships for its own quantization and
compiler backends and does not document; each is used only where it is found and gives the right product, and
``F.linear`` serves everywhere else.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.costs import Cost, register_cost
from ops.weights import PackedWeight

log = logging.getLogger("slipstream.kernels")

FP16_MAX = 65504.0
#: Rows that oneDNN's layout is chosen for; 16 serves one row as well as any and large products better than 1 does.
BLOCKED_FOR_ROWS = 16


@dataclass(frozen=True)
class HalfPacked:
    """A weight [out, in] whose every element is exact in fp16 times ``1 / scale``; computes in fp32."""

    packed: Any
    scale: float
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Two for each element."""
        return 2 * math.prod(self.shape)

    def apply(self, x: Tensor) -> Tensor:
        """``x W^T``: [T, in] fp32 to [T, out] fp32."""
        x = x if self.scale == 1.0 else x * self.scale
        result: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.contiguous(), self.packed)
        return result


@dataclass(frozen=True)
class Blocked:
    """A weight [out, in] in oneDNN's layout, or plain where another user needs it so; computes in the weight's
    dtype."""

    weight: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Of the plain weight: blocks that fill a layout up are not counted."""
        return math.prod(self.shape) * self.weight.element_size()

    def apply(self, x: Tensor) -> Tensor:
        """``x W^T``: [T, in] to [T, out] in one dtype."""
        if x.shape[0] == 0:
            return x.new_zeros(0, self.shape[0])
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return result


def _half_cost(result: Tensor, x: Tensor, packed: Any) -> Cost:
    """2 M N K; the weight is read in fp16."""
    read = x.nbytes + 2 * x.shape[-1] * result.shape[-1]
    return Cost(2 * x.shape[-1] * result.numel(), macs=x.shape[-1] * result.numel(), bytes_read=read)


if hasattr(torch.ops.quantized, "linear_dynamic_fp16"):
    register_cost(torch.ops.quantized.linear_dynamic_fp16, _half_cost)


def pack_for_cpu(weight: Tensor, *, shared: bool = False) -> Tensor | PackedWeight:
    """The fastest form of a CPU weight [out, in] that costs no second copy of it.

    ``shared`` says that the plain tensor stays anyway (an embedding that is also the output projection): then only a
    smaller copy is worth its memory. Returns ``weight`` itself where no packing serves; a packing keeps no reference to
    it otherwise.
    """
    if 0 in weight.shape:
        return weight
    if weight.dtype == torch.float32 and half_works():
        scale = exact_scale(weight)
        if scale is not None:
            packed = torch.ops.quantized.linear_prepack_fp16(weight if scale == 1 else weight * scale, None)
            return HalfPacked(packed, 1 / scale, (weight.shape[0], weight.shape[1]))
    if weight.dtype in (torch.float32, torch.bfloat16) and blocked_works(weight.dtype):
        shape = (weight.shape[0], weight.shape[1])
        if shared:
            return Blocked(weight, shape) if weight.dtype == torch.float32 else weight
        return Blocked(torch.ops.mkldnn._reorder_linear_weight(weight, BLOCKED_FOR_ROWS), shape)
    return weight


def exact_scale(weight: Tensor) -> float | None:
    """A power of two that makes every element of an fp32 ``weight`` exact in fp16, or None if there is none."""
    least, most = weight.aminmax()
    largest = max(-float(least), float(most))
    if not math.isfinite(largest):
        return None
    candidates = [1.0] if largest == 0 else [1.0, 2.0 ** (14 - math.frexp(largest)[1])]
    for scale in candidates:
        if largest * scale <= FP16_MAX and _exact(weight, scale):
            return scale
    return None


def _exact(weight: Tensor, scale: float, rows: int = 4096) -> bool:
    """Checked a few thousand rows at a time, so that no second copy of a large embedding is made."""
    pieces = (piece if scale == 1 else piece * scale for piece in weight.split(rows))
    return all(torch.equal(piece.half().float(), piece) for piece in pieces)


@cache
def half_works() -> bool:
    """Whether FBGEMM's fp16 product is here and right."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
        result: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, packed)
        return result

    return _probe("FBGEMM's fp16 linear", product, torch.float32)


@cache
def blocked_works(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed product is here and right for ``dtype``."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight, BLOCKED_FOR_ROWS)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, blocked, None, "none", [], "")
        return result

    return _probe(f"oneDNN's packed linear ({dtype})", product, dtype)


def _probe(what: str, product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> bool:
    """Runs ``product`` once on small integers, whose product every layout must give exactly."""
    x = torch.arange(-24, 24, dtype=torch.float32).remainder(5).view(3, 16).to(dtype)
    weight = torch.arange(-80, 80, dtype=torch.float32).remainder(7).view(10, 16).to(dtype)
    try:
        right = torch.equal(product(x, weight).float(), F.linear(x.float(), weight.float()))
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        log.info("%s is not available (%s): F.linear serves", what, str(error).splitlines()[0])
        return False
    if not right:
        log.warning("%s gives wrong products on this machine: F.linear serves", what)
    return right
