# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False
"""What :mod:`ops.compression.signs` defines, as Triton kernels: one launch for each pass over the data. Scales and
soundness stay on the device, nothing waits for the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.generic.launch import assert_runs_here, on

#: Elements of a program.
BLOCK = 4096


@triton.jit
def _measure_kernel(x, error, squares, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    b = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + tl.load(error + at, mask=mask, other=0.0)
    tl.store(squares + tl.program_id(0), tl.sum(b * b, 0))


@triton.jit
def _pack_kernel(x, error, scale, sound, packed, n, size, BLOCK: tl.constexpr):
    """A row of the block is a byte, so that a thread sums its bits in registers."""
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    bit = tl.arange(0, 8)[None, :]
    at = byte[:, None] * 8 + bit
    mask = at < n
    b = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + tl.load(error + at, mask=mask, other=0.0)
    positive = b >= 0
    step = tl.load(scale)
    bits = tl.sum(tl.where(positive & mask, 1, 0) << bit, 1)
    tl.store(packed + byte, bits.to(tl.uint8), mask=byte < size)
    keep = tl.load(sound) != 0
    tl.store(error + at, tl.where(positive, b - step, b + step), mask=mask & keep)


@triton.jit
def _mean_kernel(packed, scales, out, n, rows, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(rows):
        signs = tl.load(packed + at // 8, mask=mask, other=0)
        packed += stride
        step = tl.load(scales + row)
        total += tl.where((signs >> (at % 8).to(tl.uint8)) & 1 != 0, step, -step)
    tl.store(out + at, total / rows, mask=mask)


@triton.jit
def _unpack_kernel(packed, scales, out, n, chunk, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    row = at // chunk
    within = at - row * chunk
    signs = tl.load(packed + row * stride + within // 8, mask=mask, other=0)
    step = tl.load(scales + row, mask=mask, other=0.0)
    value = tl.where((signs >> (within % 8).to(tl.uint8)) & 1 != 0, step, -step)
    tl.store(out + at, value, mask=mask)


def measure(x: Tensor, error: Tensor) -> Tensor:
    """As :func:`ops.compression.signs.measure`."""
    assert_runs_here("measure", x)
    n = x.numel()
    squares = torch.zeros(max(triton.cdiv(n, BLOCK), 1), device=x.device)
    if n:
        with on(x.device):
            _measure_kernel[(triton.cdiv(n, BLOCK),)](x, error, squares, n, BLOCK=BLOCK, num_warps=8)
    return squares.sum(dtype=torch.float64).div(max(n, 1)).sqrt().float().view(1)


def pack(x: Tensor, error: Tensor, scale: Tensor, sound: Tensor, packed: Tensor) -> None:
    """As :func:`ops.compression.signs.pack`; where unsound the signs are of no use rather than 0."""
    assert_runs_here("pack", x)
    if packed.numel():
        with on(x.device):
            _pack_kernel[(triton.cdiv(packed.numel() * 8, BLOCK),)](
                x, error, scale, sound.view(torch.uint8), packed, x.numel(), packed.numel(), BLOCK=BLOCK, num_warps=8
            )


def mean_of_signs(packed: Tensor, scales: Tensor, out: Tensor) -> None:
    """As :func:`ops.compression.signs.mean_of_signs`."""
    assert_runs_here("mean_of_signs", out)
    n = out.numel()
    if n:
        with on(out.device):
            _mean_kernel[(triton.cdiv(n, BLOCK),)](
                packed, scales, out, n, packed.shape[0], packed.stride(0), BLOCK=BLOCK, num_warps=8
            )


def unpack(packed: Tensor, scales: Tensor, chunk: int, out: Tensor) -> None:
    """As :func:`ops.compression.signs.unpack`."""
    assert_runs_here("unpack", out)
    n = out.numel()
    if n:
        with on(out.device):
            _unpack_kernel[(triton.cdiv(n, BLOCK),)](
                packed, scales, out, n, chunk, packed.stride(0), BLOCK=BLOCK, num_warps=8
            )
