"""How one shape is run: a launch's parameters, the key they are kept under, a choice for shapes that nobody tuned, and
what tuning tries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ops.errors import KernelError

MAX_ROWS = 64
#: Shapes are tuned for these numbers of rows; others take the next larger one's entry.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_LEAST = {"fma": (1, 8), "mma": (8, 32), "ring": (16, 16)}


@dataclass(frozen=True)
class GemmConfig:
    """Parameters of one launch. Any config runs any number of rows, if its tiles fit the GPU.

    kind:    ``fma`` (plain arithmetic), ``mma`` (matrix units, tiles in registers; fp16 and bf16) or ``ring`` (matrix
             units, tiles in shared memory). :mod:`ops.gemm.kernels` says when which is good.
    block_n: columns of y a program computes.
    block_k: elements of K taken at a time: by a program (``fma``), by each warp (``mma``), by each slice (``ring``).
    warps:   warps of a program.
    slices:  slices along K in a program, one warp each (``ring``).
    stages:  steps in the ring.
    """

    kind: Literal["fma", "mma", "ring"]
    block_n: int
    block_k: int
    warps: int = 4
    slices: int = 1
    stages: int = 1

    def __post_init__(self) -> None:
        """Refuses what no kernel could run."""
        powers = (self.block_n, self.block_k, self.warps, self.slices)
        if self.kind not in _LEAST or any(type(value) is not int or value < 1 for value in (*powers, self.stages)):
            raise KernelError(f"{self}: kind is one of {', '.join(_LEAST)}, and the numbers are positive integers")
        if any(value & (value - 1) for value in powers) or self.warps > 32:
            raise KernelError(f"{self}: block_n, block_k, warps and slices must be powers of two, warps at most 32")
        least_n, least_k = _LEAST[self.kind]
        if self.block_n < least_n or self.block_k < least_k:
            raise KernelError(f'{self}: kind "{self.kind}" wants block_n >= {least_n} and block_k >= {least_k}')
        if self.kind != "ring" and (self.slices, self.stages) != (1, 1):
            raise KernelError(f'{self}: slices and stages belong to kind "ring"')

    def rows(self, rows: int) -> int:
        """Rows of x in a program's tile, where there are ``rows`` in all."""
        if self.kind == "fma":
            return min(4, bucket(rows))
        return min(16 if self.kind == "mma" else MAX_ROWS, max(8, bucket(rows)))

    def once(self, inner: int) -> bool:
        """Whether all of K (``inner`` elements) lies in the program's first tile."""
        if self.kind == "mma":
            blocks = -(-inner // 32)
            return -(-blocks // self.warps) * 32 <= self.block_k
        return inner <= self.block_k


def bucket(rows: int) -> int:
    """The smallest bucket that holds ``rows`` (1 to 64)."""
    return next(size for size in BUCKETS if size >= rows)


def key(dtype: torch.dtype, rows: int, columns: int, inner: int, gated: bool, normed: bool) -> str:
    """The name of a shape in a table of tuned configs, ``fp16/m1/2304x768/norm`` for example."""
    kind = "+".join(name for name, there in (("norm", normed), ("gated", gated)) if there) or "plain"
    return f"{DTYPES[dtype]}/m{bucket(rows)}/{columns}x{inner}/{kind}"


def heuristic(dtype: torch.dtype, rows: int, columns: int, inner: int, gated: bool) -> GemmConfig:
    """A config for a shape without an entry: the neighbourhood of what wins on Hopper among shapes like it."""
    if rows == 1 or (dtype == torch.float32 and rows <= 8):
        block_n = 1 if gated or rows > 2 else 2
        return GemmConfig("fma", block_n, 1024, 2) if inner < 4096 else GemmConfig("fma", block_n, 2048, 4)
    if rows > 16 or dtype == torch.float32:
        narrow = columns < 64 * 64
        return GemmConfig("ring", 16, 64, 4, slices=4, stages=3) if narrow else GemmConfig("ring", 64, 64, stages=3)
    block_n = 8 if columns < 132 * 16 else 16
    warps = 8 if inner >= 2048 else 4
    return GemmConfig("mma", block_n, 128 if not gated else 64, warps)


def candidates(dtype: torch.dtype, rows: int, columns: int, inner: int, gated: bool) -> list[GemmConfig]:
    """The configs that tuning tries for a shape, wide enough to hold the winners of all shapes seen so far."""
    half = dtype != torch.float32
    found = []
    if rows <= 4 or (not half and rows <= 16):
        found += _fma_candidates(rows, inner, gated, half)
    if half and rows <= 16:
        found += _mma_candidates(rows, inner, gated)
    if rows > 1:
        found += _ring_candidates(rows, gated, 2 if half else 4)
    # a block for each multiprocessor at least, where narrower blocks can give it
    return [one for one in found if one.block_n <= 16 or -(-columns // one.block_n) >= 64]


def _fma_candidates(rows: int, inner: int, gated: bool, half: bool) -> list[GemmConfig]:
    """Of each thread at least one vector of 16 bytes, and sums that fit its registers."""
    tile_rows = min(4, bucket(rows))
    return [
        GemmConfig("fma", n, k, warps)
        for n in (1, 2, 4, 8)
        for k in (512, 1024, 2048, 4096)
        for warps in (2, 4, 8)
        if (8 if half else 4) <= n * k // (32 * warps) <= 64 // tile_rows
        if (not gated or n < 8) and (k == 512 or k < 2 * inner)
    ]


def _mma_candidates(rows: int, inner: int, gated: bool) -> list[GemmConfig]:
    """From 16 to 64 registers of a thread for a tile of the weight: a warp keeps 32 columns of 8 rows in 4."""
    found = []
    for n in (8, 16, 32, 64):
        for k in (32, 64, 128, 256):
            weight = n // 8 * (k // 32) * 4 * (2 if gated else 1)
            x = (2 if rows > 8 or n == 8 else 1) * (k // 32) * 4
            if not 16 <= weight <= 64 or weight + x > 96:
                continue
            for warps in (2, 4, 8, 16):
                config = GemmConfig("mma", n, k, warps)
                share = -(-inner // (32 * warps)) * 32
                crowded = warps == 16 and weight + x > 48 and not config.once(inner)  # 128 registers a thread
                if k < 2 * share and not crowded and (warps < 16 or share >= 64):
                    found.append(config)
    return found


def _ring_candidates(rows: int, gated: bool, itemsize: int) -> list[GemmConfig]:
    """Rings of 20 to 110 KB, so that two programs fit a multiprocessor."""
    tile_rows = max(8, bucket(rows))
    layouts = [(n, k, s, s) for s in (2, 4, 8) for n in (16, 32) for k in (64, 128)]
    layouts += [(n, k, 1, warps) for n, warps in ((16, 1), (32, 2), (64, 4), (128, 4)) for k in (64, 128, 256)]
    found = []
    for n, k, slices, warps in layouts:
        for stages in (2, 3, 4, 6):
            size = stages * slices * k * (n * (2 if gated else 1) + tile_rows) * itemsize
            if 20_000 <= size <= 110_000 and slices * n * k * itemsize <= 65_536:
                found.append(GemmConfig("ring", n, k, warps, slices=slices, stages=stages))
    return found
