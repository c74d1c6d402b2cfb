"""Signs with a scale and an error that is carried on (arXiv 2102.02888), in plain PyTorch: the reference, and what runs
on a CPU.

``b = x + error``, ``scale = ||b||_2 / sqrt(n)``, ``error = b - scale * sign(b)`` with ``sign(0) = +1``. Bit ``k`` of
byte ``i`` is 1 where element ``8 i + k`` is not negative; bits behind the last element are 0.

The scale must be known before the error, so the data is read twice: at least 20 bytes an element of fp32 (8 read to
measure; 8 read and 4 written to pack) or 16 of fp16 and bf16, and 1/8 for the signs. The sum is not kept between the
passes: writing it would cost what reading again does, and the error stays as it was until all ranks are known to be
sound.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

#: Elements of a block: what is made of them stays in the cache.
BLOCK = 1 << 17
#: Moves the low bit of byte ``k`` of a little-endian word to bit ``56 + k``, without carries.
_GATHER = 0x0102040810204080
_ONES = 0x0101010101010101
_SIGN = -(1 << 31)


def measure(x: Tensor, error: Tensor) -> Tensor:
    """The scale of ``x + error``: fp32 [1], 0 for no elements. ``x`` [n] fp32, bf16 or fp16; ``error`` [n] fp32."""
    squares = 0.0
    for start in range(0, x.numel(), BLOCK):
        total = torch.add(error[start : start + BLOCK], x[start : start + BLOCK])
        squares += float(torch.dot(total, total))
    return torch.tensor([(squares / max(x.numel(), 1)) ** 0.5], dtype=torch.float32)


def pack(x: Tensor, error: Tensor, scale: Tensor, sound: Tensor, packed: Tensor) -> None:
    """Writes the signs of ``x + error`` to ``packed`` (uint8, at least [ceil(n / 8)]; what is over becomes 0), and what
    they miss to ``error``. ``scale`` fp32 [1]; where ``sound`` (bool, scalar) is false, the error stays as it is."""
    packed.zero_()
    if not sound:
        return
    step = int(scale.view(torch.int32))
    words = torch.empty(BLOCK // 8, dtype=torch.int64)
    signed = torch.empty(BLOCK)
    for start in range(0, x.numel(), BLOCK):
        owed = error[start : start + BLOCK]
        # The zero makes +0 of -0.
        owed.add_(x[start : start + BLOCK]).add_(0.0)
        n = owed.numel()
        whole = -(-n // 8)
        # Integers, because comparing and choosing are not vectorized: the sign bit over the scale's, then 0 or -1.
        bits = signed[:n].view(torch.int32)
        torch.bitwise_and(owed.view(torch.int32), _SIGN, out=bits).bitwise_or_(step)
        owed -= signed[:n]
        negative = words[:whole].view(torch.int8)
        negative[n:] = -1
        negative[:n] = bits.bitwise_right_shift_(31)
        words[:whole].bitwise_not_().bitwise_and_(_ONES).mul_(_GATHER)
        packed[start // 8 : start // 8 + whole] = words[:whole].view(torch.uint8)[7::8]


def mean_of_signs(packed: Tensor, scales: Tensor, out: Tensor) -> None:
    """``out`` [n] fp32 becomes the mean of all rows' ``scale * sign``. ``packed`` is uint8 [rows, bytes], ``scales``
    fp32 [rows]."""
    out.zero_()
    for row, scale in zip(packed, scales.tolist(), strict=True):
        for start in range(0, out.numel(), BLOCK):
            part = out[start : start + BLOCK]
            part += _signs(row[start // 8 : (start + BLOCK) // 8], scale, torch.float32)[: part.numel()]
    out /= packed.shape[0]


def unpack(packed: Tensor, scales: Tensor, chunk: int, out: Tensor) -> None:
    """``out`` [n] (fp32, bf16, fp16) becomes ``scale * sign``, one row of ``packed`` (uint8 [rows, bytes]) with its
    scale (fp32 [rows]) for each ``chunk`` elements. ``chunk`` is a multiple of 8."""
    for row, scale, part in zip(packed, scales.tolist(), out.split(chunk), strict=False):
        for start in range(0, part.numel(), BLOCK):
            piece = part[start : start + BLOCK]
            piece.copy_(_signs(row[start // 8 : (start + BLOCK) // 8], scale, out.dtype)[: piece.numel()])


@cache
def _table() -> Tensor:
    """The eight signs of every byte, int8 in a word: int64 [256]."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (bits * 2 - 1).to(torch.int8).view(torch.int64).view(-1)


def _signs(packed: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return _table().index_select(0, packed.int()).view(torch.int8).to(dtype).mul_(scale)
