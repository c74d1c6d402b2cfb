"""Which tile a GEMM of a few hundred rows takes: measured where somebody measured, else by a small model of the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """How one block computes its part of ``x W^T``.

    rows, columns: of the result, one tile. depth: elements of K a step (of a slice).
    warps, stages: of the block, and how many steps its loads are ahead.
    slices:        1, or ``warps``: each warp takes a slice of K by itself, and they add up at the end. A tile that is
                   too small to be shared by warps keeps them all busy that way.
    split:         blocks that share a tile, each with a part of K; the last one to finish adds up.
    """

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3
    slices: int = 1
    split: int = 1

    def blocks(self, m: int, n: int) -> int:
        """How many blocks compute a result [m, n]."""
        return -(-m // self.rows) * -(-n // self.columns) * self.split

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory a block takes for its loads, or to add up its slices."""
        ring = self.stages * self.slices * (self.rows + self.columns) * self.depth * itemsize
        return max(ring, self.slices * self.rows * self.columns * 4 if self.slices > 1 else 0)


#: A block may have 227 KB, but two should fit: the next launch's blocks arrive while this one's still run.
SHARED_BYTES = 113 * 1024
MULTIPROCESSORS = 132
#: The model's constants, bytes and FLOPs a microsecond on an H200: L2 as a whole and one multiprocessor's share of it,
#: tensor cores of one multiprocessor as warp groups and as single warps use them; and microseconds.
L2, L2_ONE, WGMMA, MMA = 5.5e6, 0.1e6, 3.5e6, 2.2e6
STEP, ADD_SLICES, ADD_SPLIT = 0.11, 0.5, 1.0

#: Serves what is too small for every other.
SMALLEST = Tile(16, 16, 32, 4, 2)
#: What sweeps found (benchmarks/encoder_kernels.py), 16-bit weights on an H100: (rows up to, N, K) to tile.
TABLE: dict[tuple[int, int, int], Tile] = {
    (128, 2304, 768): Tile(64, 32, 128, 4, 4, 1, 1),
    (128, 768, 768): Tile(64, 32, 64, 4, 4, 1, 1),
    (128, 3072, 768): Tile(64, 32, 128, 4, 4, 1, 1),
    (128, 768, 3072): Tile(64, 32, 128, 4, 4, 1, 1),
    (128, 3072, 1024): Tile(64, 32, 128, 4, 4, 1, 1),
    (128, 1024, 1024): Tile(64, 32, 128, 4, 4, 1, 1),
    (128, 4096, 1024): Tile(64, 64, 128, 4, 3, 1, 1),
    (128, 1024, 4096): Tile(64, 64, 128, 4, 3, 1, 4),
}
#: (hidden, ffn) of the models whose forwards by these tiles were measured ahead of the graph of ``generic``, from how
#: many tokens to how many. cuBLAS is faster elsewhere (benchmarks/RESULTS.md).
AHEAD: dict[tuple[int, int], tuple[int, int]] = {(768, 3072): (17, 128), (1024, 4096): (1, 96)}
#: (hidden, ffn) of the models whose forwards by the persistent kernel were measured ahead of both, up to how many
#: tokens, a multiple of 16.
AHEAD_PERSISTENT: dict[tuple[int, int], int] = {(768, 3072): 32, (1024, 4096): 32}


def candidates(m: int, n: int, k: int, itemsize: int) -> Iterator[Tile]:
    """The tiles worth trying for [m, k] times [n, k] transposed."""
    if itemsize == 4:
        yield from (Tile(rows, columns, 32, warps=4, stages=2) for rows in (16, 32, 64) for columns in (32, 64))
        return
    for tile in (*_whole(), *_sliced()):
        idle_rows = tile.rows > 16 and tile.rows >= 2 * m
        idle_depth = tile.depth * tile.slices * tile.split > 2 * k
        if tile.shared(itemsize) <= SHARED_BYTES and not idle_rows and not idle_depth:
            yield tile


def _whole() -> Iterator[Tile]:
    """Tiles whose warps share the result; those of 64 rows or more use warp group instructions."""
    sizes = ((32, 64), (64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128))
    for rows, columns in sizes:
        for depth in (64, 128):
            for split in (1, 2, 3, 4, 6):
                for stages in (3, 4):
                    yield Tile(rows, columns, depth, 8 if rows * columns > 8192 else 4, stages, 1, split)


def _sliced() -> Iterator[Tile]:
    """Tiles that each warp computes whole over its own part of K."""
    for rows, columns in ((16, 16), (16, 32), (16, 64), (32, 16), (32, 32), (32, 64), (64, 32)):
        for warps in (4, 8):
            for depth in (32, 64):
                for stages in (2, 3):
                    yield Tile(rows, columns, depth, warps, stages, warps)


def estimate(tile: Tile, m: int, n: int, k: int, itemsize: int) -> float:
    """Microseconds a launch may take once its weights are in L2: whichever is slowest of L2, the way from it to one
    multiprocessor, the tensor cores and the chain of steps, and what adding up costs."""
    blocks = tile.blocks(m, n)
    waves = -(-blocks // MULTIPROCESSORS)
    span = -(-k // tile.split)
    bytes_each = (tile.rows + tile.columns) * span * itemsize
    flops_each = 2 * tile.rows * tile.columns * span
    rate = WGMMA if tile.rows >= 64 and tile.slices == 1 and itemsize == 2 else MMA
    steps = -(-span // (tile.depth * tile.slices))
    chain = steps * STEP * max(1.0, tile.slices * tile.depth / 128)
    time = max(blocks * bytes_each / L2, waves * max(bytes_each / L2_ONE, flops_each / rate, chain))
    if tile.split > 1:
        share = tile.rows * tile.columns * 4
        time += ADD_SPLIT + 2 * blocks * share / L2 + tile.split * share / L2_ONE
    return time + (ADD_SLICES if tile.slices > 1 else 0.0)


@cache
def tile_for(m: int, n: int, k: int, dtype: torch.dtype) -> Tile:
    """The tile for ``x`` [m, k] times ``weight`` [n, k] transposed."""
    measured = [] if dtype.itemsize != 2 else [key for key in TABLE if key[1:] == (n, k) and key[0] >= m]
    if measured:
        return TABLE[min(measured)]
    worth_trying = candidates(m, n, k, dtype.itemsize)
    return min(worth_trying, key=lambda tile: estimate(tile, m, n, k, dtype.itemsize), default=SMALLEST)
