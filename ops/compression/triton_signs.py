# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False
"""What :mod:`ops.compression.signs` defines, as Triton kernels: one launch for each pass over the data, and one for the
scales, however many parts there are. Scales and soundness stay on the device, nothing waits for the host.

A row of a block is a byte of signs, so that a thread holds its eight bits in registers. ``starts`` says where parts
begin and, as one more, where the last one ends; ``spans`` holds of each block its first part and the one behind its
last. Nearly all blocks have one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.costs import Cost, priced
from ops.generic.launch import assert_runs_here, on

#: Elements of a program.
BLOCK = 4096
#: Sums of blocks that are added up at a time.
SUMS = 4096


@triton.jit
def _scales_at(scales, starts, spans, block, at):
    """The scale of each element ``at`` of a block: the first part's, and from the start of each further one its own."""
    first = tl.load(spans + 2 * block)
    end = tl.load(spans + 2 * block + 1)
    found = tl.zeros(at.shape, dtype=tl.float32) + tl.load(scales + first)
    for part in range(first + 1, end):
        found = tl.where(at >= tl.load(starts + part), tl.load(scales + part), found)
    return found


@triton.jit
def _measure_kernel(x, error, starts, spans, squares, n, BLOCK: tl.constexpr):
    """The sum of squares of each part within a block. Blocks and parts both only go on, so that block + part is a place
    of its own, and those of one part lie side by side."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    b = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + tl.load(error + at, mask=mask, other=0.0)
    square = b * b
    for part in range(tl.load(spans + 2 * block), tl.load(spans + 2 * block + 1)):
        within = (at >= tl.load(starts + part)) & (at < tl.load(starts + part + 1))
        tl.store(squares + block + part, tl.sum(tl.where(within, square, 0.0), 0))


@triton.jit
def _scale_kernel(squares, starts, scales, BLOCK: tl.constexpr, SUMS: tl.constexpr):
    """The scale of a part from its blocks' sums, which are added up in fp64 and always in the same order."""
    part = tl.program_id(0)
    start = tl.load(starts + part)
    stop = tl.load(starts + part + 1)
    first = start // BLOCK
    end = tl.where(stop > start, (stop + BLOCK - 1) // BLOCK, first)
    total = tl.zeros((SUMS,), dtype=tl.float64)
    for block in range(first, end, SUMS):
        at = block + tl.arange(0, SUMS)
        total += tl.load(squares + part + at, mask=at < end, other=0.0).to(tl.float64)
    mean = tl.sum(total, 0) / tl.maximum(stop - start, 1).to(tl.float64)
    tl.store(scales + part, tl.sqrt(mean).to(tl.float32))


@triton.jit
def _pack_kernel(x, error, scales, starts, spans, sound, packed, n, size, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    byte = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    bit = tl.arange(0, 8)[None, :]
    at = byte[:, None] * 8 + bit
    mask = at < n
    b = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + tl.load(error + at, mask=mask, other=0.0)
    positive = b >= 0
    bits = tl.sum(tl.where(positive & mask, 1, 0) << bit, 1)
    tl.store(packed + byte, bits.to(tl.uint8), mask=byte < size)
    first = tl.load(spans + 2 * block)
    step = tl.load(scales + first)
    missed = tl.where(positive, b - step, b + step)
    for part in range(first + 1, tl.load(spans + 2 * block + 1)):
        step = tl.load(scales + part)
        missed = tl.where(at >= tl.load(starts + part), tl.where(positive, b - step, b + step), missed)
    keep = tl.load(sound) != 0
    tl.store(error + at, missed, mask=mask & keep)


@triton.jit
def _mean_kernel(packed, scales, starts, spans, out, n, rows, stride, scales_stride, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    byte = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    bit = tl.arange(0, 8)[None, :]
    at = byte[:, None] * 8 + bit
    total = tl.zeros((BLOCK // 8, 8), dtype=tl.float32)
    for _ in range(rows):
        signs = tl.load(packed + byte, mask=byte * 8 < n, other=0).to(tl.int32)
        step = _scales_at(scales, starts, spans, block, at)
        total += tl.where((signs[:, None] >> bit) & 1 != 0, step, -step)
        packed += stride
        scales += scales_stride
    tl.store(out + at, total / rows, mask=at < n)


@triton.jit
def _unpack_kernel(packed, scales, starts, spans, out, n, size, stride, BLOCK: tl.constexpr):
    """The second axis of programs is the row, so that nothing is divided to find it; blocks begin where rows do."""
    row = tl.program_id(1).to(tl.int64)
    block = row * tl.num_programs(0) + tl.program_id(0)
    within = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    byte = row * size + within
    there = (within < size) & (byte * 8 < n)
    signs = tl.load(packed + row * stride + within, mask=there, other=0).to(tl.int32)
    bit = tl.arange(0, 8)[None, :]
    at = byte[:, None] * 8 + bit
    positive = (signs[:, None] >> bit) & 1 != 0
    mask = there[:, None] & (at < n)
    first = tl.load(spans + 2 * block)
    end = tl.load(spans + 2 * block + 1)
    if end == first + 1:
        step = tl.load(scales + first)
        tl.store(out + at, tl.where(positive, step, -step), mask=mask)
    else:
        steps = _scales_at(scales, starts, spans, block, at)
        tl.store(out + at, tl.where(positive, steps, -steps), mask=mask)


class _Table(NamedTuple):
    """Of parts on a device: starts int64 [parts + 1], spans int64 [blocks, 2]."""

    starts: Tensor
    spans: Tensor


@lru_cache(maxsize=1024)
def _made(pieces: tuple[tuple[int, ...], ...], row: int, block: int, device: torch.device) -> _Table:
    """Made on the host. ``pieces`` are the parts of each row of ``row`` elements, which blocks of ``block`` elements
    cut from its start on; parts are numbered row by row, as many in each as the longest has."""
    most, blocks = max(map(len, pieces)), triton.cdiv(row, block)
    sizes = torch.zeros(len(pieces), most, dtype=torch.int64)
    for at, each in enumerate(pieces):
        sizes[at, : len(each)] = torch.tensor(each)
    ends = sizes.view(-1).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    spans = torch.empty(len(pieces), blocks, 2, dtype=torch.int64)
    for at, each in enumerate(pieces):
        own = starts[at * most :][: len(each)].contiguous()
        begins = own[0] + torch.arange(blocks) * block
        # The last that begins no later than the block, and the first that begins no earlier than it ends.
        first = torch.searchsorted(own, begins, right=True) - 1
        end = torch.searchsorted(own, begins + block)
        spans[at] = at * most + torch.stack([first, end], 1)
    # A copy that waits, once: any stream may read it from now on.
    return _Table(starts.to(device), spans.view(-1, 2).to(device))


def _table(pieces: tuple[tuple[int, ...], ...], row: int, device: torch.device) -> _Table:
    found = _made(pieces, row, BLOCK, device)
    if device.type == "cuda":
        # It may be dropped from the cache while kernels of this stream still wait to read it.
        for tensor in found:
            tensor.record_stream(torch.cuda.current_stream(device))
    return found


def _measure_cost(result: Tensor, x: Tensor, error: Tensor, parts: tuple[int, ...]) -> Cost:
    """Of each element a sum, a square and their sum; of each part a quotient and a root."""
    return Cost(3 * x.numel() + 2 * len(parts))


@priced(_measure_cost)
def measure(x: Tensor, error: Tensor, parts: tuple[int, ...]) -> Tensor:
    """As :func:`ops.compression.signs.measure`."""
    assert_runs_here("measure", x)
    n = x.numel()
    blocks = triton.cdiv(n, BLOCK)
    scales = torch.empty(len(parts), device=x.device)
    squares = torch.empty(blocks + len(parts), device=x.device)
    with on(x.device):
        starts, spans = _table((parts,), n, x.device)
        if n:
            _measure_kernel[(blocks,)](x, error, starts, spans, squares, n, BLOCK=BLOCK, num_warps=8)
        _scale_kernel[(len(parts),)](squares, starts, scales, BLOCK=BLOCK, SUMS=SUMS, num_warps=8)
    return scales


def _pack_cost(
    result: None, x: Tensor, error: Tensor, parts: tuple[int, ...], scales: Tensor, sound: Tensor, packed: Tensor
) -> Cost:
    """Of each element the sum with its error, its sign, and what the sign with its scale misses."""
    read = x.nbytes + error.nbytes + scales.nbytes
    return Cost(4 * x.numel(), bytes_read=read, bytes_written=error.nbytes + packed.nbytes)


@priced(_pack_cost)
def pack(x: Tensor, error: Tensor, parts: tuple[int, ...], scales: Tensor, sound: Tensor, packed: Tensor) -> None:
    """As :func:`ops.compression.signs.pack`; where unsound the signs are of no use rather than 0."""
    assert_runs_here("pack", x)
    size = packed.numel()
    if size:
        with on(x.device):
            starts, spans = _table((parts,), 8 * size, x.device)
            _pack_kernel[(triton.cdiv(8 * size, BLOCK),)](
                x, error, scales, starts, spans, sound.view(torch.uint8), packed, x.numel(), size, BLOCK=BLOCK,
                num_warps=8,
            )  # fmt: skip


def _mean_cost(result: None, packed: Tensor, scales: Tensor, parts: tuple[int, ...], out: Tensor) -> Cost:
    """Of each element the scale with its sign and the sum, row by row, and a quotient."""
    flops = (2 * packed.shape[0] + 1) * out.numel()
    return Cost(flops, bytes_read=packed.nbytes + scales.nbytes, bytes_written=out.nbytes)


@priced(_mean_cost)
def mean_of_signs(packed: Tensor, scales: Tensor, parts: tuple[int, ...], out: Tensor) -> None:
    """As :func:`ops.compression.signs.mean_of_signs`."""
    assert_runs_here("mean_of_signs", out)
    n = out.numel()
    if n:
        with on(out.device):
            starts, spans = _table((parts,), n, out.device)
            _mean_kernel[(triton.cdiv(n, BLOCK),)](
                packed, scales, starts, spans, out, n, packed.shape[0], packed.stride(0), scales.stride(0),
                BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip


def _unpack_cost(
    result: None, packed: Tensor, scales: Tensor, pieces: tuple[tuple[int, ...], ...], out: Tensor
) -> Cost:
    """Of each element the scale with its sign."""
    return Cost(out.numel(), bytes_read=packed.nbytes + scales.nbytes, bytes_written=out.nbytes)


@priced(_unpack_cost)
def unpack(packed: Tensor, scales: Tensor, pieces: tuple[tuple[int, ...], ...], out: Tensor) -> None:
    """As :func:`ops.compression.signs.unpack`."""
    assert_runs_here("unpack", out)
    n, size = out.numel(), packed.shape[1]
    if n:
        with on(out.device):
            starts, spans = _table(pieces, 8 * size, out.device)
            _unpack_kernel[(triton.cdiv(8 * size, BLOCK), len(pieces))](
                packed, scales, starts, spans, out, n, size, packed.stride(0), BLOCK=BLOCK, num_warps=8
            )
