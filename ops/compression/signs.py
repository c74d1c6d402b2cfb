"""Signs with a scale and an error that is carried on (arXiv 2102.02888), in plain PyTorch: the reference, and what runs
on a CPU.

``b = x + error``, ``scale = ||b||_2 / sqrt(n)``, ``error = b - scale * sign(b)`` with ``sign(0) = +1``. Bit ``k`` of
byte ``i`` is 1 where element ``8 i + k`` is not negative; bits behind the last element are 0.

A buffer has consecutive parts, each with a scale of its own (and an ``n`` of its own in it): ``parts`` are their
numbers of elements, which add up to the buffer's and may be 0. The bits run on across parts, so that a part may begin
within a byte.

The scale must be known before the error, so the data is read twice: at least 20 bytes an element of fp32 (8 read to
measure; 8 read and 4 written to pack) or 16 of fp16 and bf16, and 1/8 for the signs. The sum is not kept between the
passes: writing it would cost what reading again does, and the error stays as it was until all ranks are known to be
sound.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

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


def measure(x: Tensor, error: Tensor, parts: tuple[int, ...]) -> Tensor:
    """The scales of ``x + error``: fp32 [parts], 0 for a part of no elements. ``x`` [n] fp32, bf16 or fp16; ``error``
    [n] fp32."""
    found, total = [], torch.empty(min(SUMMED, max(parts)))
    for mine, carried in zip(x.split(parts), error.split(parts), strict=True):
        squares = 0.0
        for part, owed in zip(mine.split(SUMMED), carried.split(SUMMED), strict=True):
            torch.add(owed, part, out=total[: len(part)])
            squares += float(torch.dot(total[: len(part)], total[: len(part)]))
        found.append((squares / max(len(mine), 1)) ** 0.5)
    return torch.tensor(found, dtype=torch.float32)


def pack(x: Tensor, error: Tensor, parts: tuple[int, ...], scales: Tensor, sound: Tensor, packed: Tensor) -> None:
    """Writes the signs of ``x + error`` to ``packed`` (uint8, at least [ceil(n / 8)]; what is over becomes 0), and what
    they miss to ``error``. ``scales`` fp32 [parts]; where ``sound`` (bool, scalar) is false, the error stays as it
    is."""
    if not sound:
        packed.zero_()
        return
    used = -(-x.numel() // 8)
    packed[used:] = 0
    if not used:
        return
    steps = scales.view(torch.int32).tolist()
    signed = torch.empty(min(BLOCK, x.numel()))
    words = torch.empty(min(BLOCK // 8, used), dtype=torch.int64)
    blocks = zip(x.split(BLOCK), error.split(BLOCK), packed[:used].split(BLOCK // 8), _runs(parts), strict=True)
    for part, owed, out, runs in blocks:
        # The zero makes +0 of -0.
        owed.add_(part).add_(0.0)
        n = len(owed)
        # Integers, because comparing and choosing are not vectorized: the sign bit over the scale's, then 0 or -1.
        bits = signed[:n].view(torch.int32)
        torch.bitwise_and(owed.view(torch.int32), _SIGN, out=bits)
        for index, begin, end in runs:
            bits[begin:end].bitwise_or_(steps[index])
        owed -= signed[:n]
        negative = words[: len(out)].view(torch.int8)
        negative[n:] = -1
        negative[:n] = bits.bitwise_right_shift_(31)
        gathered = words[: len(out)].mul_(_GATHER_BYTES).view(torch.uint8)
        torch.bitwise_not(gathered[7::8], out=out)


def mean_of_signs(packed: Tensor, scales: Tensor, parts: tuple[int, ...], out: Tensor) -> None:
    """``out`` [n] fp32 becomes the mean of all rows' ``scale * sign``. ``packed`` is uint8 [rows, bytes], ``scales``
    fp32 [rows, parts]."""
    scratch, at = torch.empty(min(BLOCK, max(parts)) + 7), 0
    for part, steps in zip(out.split(parts), scales.T.tolist(), strict=True):
        tables = [_table(scale, out.dtype) for scale in steps]
        for piece in part.split(BLOCK) if len(part) else ():
            # As far from a multiple of eight elements as the piece itself.
            other = scratch[at % 8 :][: len(piece)]
            _expand(packed[0], at, tables[0], piece)
            for row, table in zip(packed[1:], tables[1:], strict=True):
                piece += _expand(row, at, table, other)
            piece /= len(tables)
            at += len(piece)


def unpack(packed: Tensor, scales: Tensor, pieces: tuple[tuple[int, ...], ...], out: Tensor) -> None:
    """``out`` [n] (fp32, bf16, fp16) becomes ``scale * sign``, each row of ``packed`` (uint8 [rows, bytes]) as many
    elements as it has bits, the last ones fewer. ``pieces`` are the parts of each row, ``scales`` (fp32 [rows, most])
    theirs; those behind a row's pieces are ignored."""
    for row, steps, sizes, chunk in zip(packed, scales.tolist(), pieces, out.split(8 * packed.shape[1]), strict=False):
        at = 0
        for part, scale in zip(chunk.split(sizes), steps, strict=False):
            table = _table(scale, out.dtype)
            for piece in part.split(BLOCK) if len(part) else ():
                _expand(row, at, table, piece)
                at += len(piece)


def _runs(parts: tuple[int, ...]) -> Iterator[list[tuple[int, int, int]]]:
    """Of each block of elements: index, begin and end (within the block) of the parts that meet it."""
    found: list[tuple[int, int, int]] = []
    filled = 0
    for index, left in enumerate(parts):
        while left:
            taken = min(left, BLOCK - filled)
            found.append((index, filled, filled + taken))
            filled, left = filled + taken, left - taken
            if filled == BLOCK:
                yield found
                found, filled = [], 0
    if found:
        yield found


@cache
def _signs() -> Tensor:
    """-1 or 1 for the eight bits of every byte: fp32 [256, 8]."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (bits * 2 - 1).float()


def _table(scale: float, dtype: torch.dtype) -> Tensor:
    """``scale * sign`` of the eight bits of every byte: [256, 8]."""
    return _signs().mul(scale).to(dtype)


def _expand(packed: Tensor, start: int, table: Tensor, out: Tensor) -> Tensor:
    """``out`` [n], from the rows of ``table`` that the bytes of ``packed`` name, beginning with bit ``start``; bits
    behind the last are ignored."""
    before = min(-start % 8, len(out))
    if before:
        out[:before] = table[int(packed[start // 8])][start % 8 :][:before]
    middle, first = out[before:], (start + before) // 8
    whole = len(middle) // 8
    # Words of 16 bytes are copied fastest, and must begin at a multiple of 8 elements.
    word = torch.complex128 if middle.storage_offset() % 8 == 0 else out.dtype
    rows = table.view(word).squeeze(1)
    if whole:
        target = middle[: 8 * whole].view(word).view(whole, *rows.shape[1:])
        torch.index_select(rows, 0, packed[first : first + whole].int(), out=target)
    if 8 * whole < len(middle):
        middle[8 * whole :] = table[int(packed[first + whole])][: len(middle) - 8 * whole]
    return out
