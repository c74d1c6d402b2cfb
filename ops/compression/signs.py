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

import torch
from torch import Tensor

#: Elements of a block: what is made of them stays in the cache, and starting an op takes little beside running it.
BLOCK = 1 << 19
#: Squares that are summed up in fp32: on one thread, more of them lose digits (2e-4 of the scale at 2^19).
SUMMED = 1 << 17
#: Moves the low bit of byte ``k`` of a little-endian word to bit ``56 + k``, without carries, where bytes are 0 or 1.
_GATHER = 0x0102040810204080
#: The same where they are 0 or 255: 255 is odd, so it can be divided by modulo 2^64.
_GATHER_BYTES = (_GATHER * pow(255, -1, 1 << 64) + (1 << 63)) % (1 << 64) - (1 << 63)
_SIGN = -(1 << 31)


def measure(x: Tensor, error: Tensor) -> Tensor:
    """The scale of ``x + error``: fp32 [1], 0 for no elements. ``x`` [n] fp32, bf16 or fp16; ``error`` [n] fp32."""
    squares, total = 0.0, torch.empty(min(SUMMED, x.numel()))
    for part, owed in zip(x.split(SUMMED), error.split(SUMMED), strict=True):
        torch.add(owed, part, out=total[: len(part)])
        squares += float(torch.dot(total[: len(part)], total[: len(part)]))
    return torch.tensor([(squares / max(x.numel(), 1)) ** 0.5], dtype=torch.float32)


def pack(x: Tensor, error: Tensor, scale: Tensor, sound: Tensor, packed: Tensor) -> None:
    """Writes the signs of ``x + error`` to ``packed`` (uint8, at least [ceil(n / 8)]; what is over becomes 0), and what
    they miss to ``error``. ``scale`` fp32 [1]; where ``sound`` (bool, scalar) is false, the error stays as it is."""
    if not sound:
        packed.zero_()
        return
    used = -(-x.numel() // 8)
    packed[used:] = 0
    step = int(scale.view(torch.int32))
    signed = torch.empty(min(BLOCK, x.numel()))
    words = torch.empty(min(BLOCK // 8, used), dtype=torch.int64)
    parts = zip(x.split(BLOCK), error.split(BLOCK), packed[:used].split(BLOCK // 8), strict=True)
    for part, owed, out in parts:
        # The zero makes +0 of -0.
        owed.add_(part).add_(0.0)
        n = len(owed)
        # Integers, because comparing and choosing are not vectorized: the sign bit over the scale's, then 0 or -1.
        bits = signed[:n].view(torch.int32)
        torch.bitwise_and(owed.view(torch.int32), _SIGN, out=bits).bitwise_or_(step)
        owed -= signed[:n]
        negative = words[: len(out)].view(torch.int8)
        negative[n:] = -1
        negative[:n] = bits.bitwise_right_shift_(31)
        gathered = words[: len(out)].mul_(_GATHER_BYTES).view(torch.uint8)
        torch.bitwise_not(gathered[7::8], out=out)


def mean_of_signs(packed: Tensor, scales: Tensor, out: Tensor) -> None:
    """``out`` [n] fp32 becomes the mean of all rows' ``scale * sign``. ``packed`` is uint8 [rows, bytes], ``scales``
    fp32 [rows]."""
    tables = [_table(scale, out.dtype) for scale in scales.tolist()]
    other = torch.empty(min(BLOCK, out.numel()))
    for start in range(0, out.numel(), BLOCK):
        part, at = out[start : start + BLOCK], slice(start // 8, (start + BLOCK) // 8)
        _expand(packed[0, at], tables[0], part)
        for row, table in zip(packed[1:, at], tables[1:], strict=True):
            part += _expand(row, table, other[: len(part)])
        part /= len(tables)


def unpack(packed: Tensor, scales: Tensor, chunk: int, out: Tensor) -> None:
    """``out`` [n] (fp32, bf16, fp16) becomes ``scale * sign``, one row of ``packed`` (uint8 [rows, bytes]) with its
    scale (fp32 [rows]) for each ``chunk`` elements. ``chunk`` is a multiple of 8."""
    for row, scale, part in zip(packed, scales.tolist(), out.split(chunk), strict=False):
        table = _table(scale, out.dtype)
        for start, piece in enumerate(part.split(BLOCK)):
            _expand(row[start * BLOCK // 8 : (start + 1) * BLOCK // 8], table, piece)


def _table(scale: float, dtype: torch.dtype) -> Tensor:
    """``scale * sign`` of the eight bits of every byte: [256, 8]."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (bits * 2 - 1).float().mul_(scale).to(dtype)


def _expand(packed: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """``out`` [n], from the rows of ``table`` that the bytes of ``packed`` name; bytes behind the last are ignored."""
    whole = len(out) // 8
    # Words of 16 bytes are copied fastest, and must begin at a multiple of 8 elements.
    word = torch.complex128 if out.storage_offset() % 8 == 0 else out.dtype
    rows = table.view(word).squeeze(1)
    torch.index_select(rows, 0, packed[:whole].int(), out=out[: 8 * whole].view(word).view(whole, *rows.shape[1:]))
    if 8 * whole < len(out):
        out[8 * whole :] = table[int(packed[whole])][: len(out) - 8 * whole]
    return out
