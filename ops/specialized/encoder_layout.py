"""How the persistent encoder kernel cuts its products, as measured where somebody measured, and divides its shared
memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ops.errors import KernelError
from ops.spec import ModelSpec
from ops.specialized.persistent import SHARED_LIMIT
from ops.specialized.tile_map import TILE

PARTS, STAGED_BYTES = 128, 4 * 16 * (4 * 64 + 16)
#: Columns that one instruction multiplies with, at most, and the fewest tiles that are on their way at a time.
WIDEST, FEWEST_STAGES, MOST_STAGES = 256, 4, 24
#: For the choice of units where nobody measured, fitted to sweeps on an H100 of a version with barriers. Microseconds
#: of a step, of a column of results, of a part of K (written, and read by a norm), and of a byte of sums; bytes that a
#: multiprocessor gets from L2 in one.
STEP, COLUMN, PART, SUM, INGEST = 0.07, 0.005, 0.06, 0.1e-6, 190e3


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Units:
    """How a product [rows, k] by [n, k] is cut: ``wide`` columns, and K in ``split`` parts."""

    wide: int
    split: int

    @classmethod
    def of(cls, n: int, k: int, rows: int, blocks: int, *, longest: int, widest: int, splits: bool) -> Units:
        """The cut that should take the shortest, ``longest`` columns of K and ``widest`` of the result at most."""
        parts = (1, 2, 3, 4, 6, 8, 12, 16) if splits else (1,)
        found = [cls(wide, split) for wide in range(16, widest + 1, 8) for split in parts]
        usable = [units for units in found if units.every_part_has_a_tile(k) and units.steps(k) * TILE <= longest]
        return min(usable, key=lambda units: units.microseconds(n, k, rows, blocks))

    def steps(self, k: int) -> int:
        """Tiles of a part of K; the last part may have fewer."""
        return ceil_div(ceil_div(k, TILE), self.split)

    def every_part_has_a_tile(self, k: int) -> bool:
        """The kernel would wait forever for one that has none."""
        return (self.split - 1) * self.steps(k) < ceil_div(k, TILE)

    def microseconds(self, n: int, k: int, rows: int, blocks: int) -> float:
        """What it may take: the units of a block, and the parts' sums, written and read."""
        steps, count = self.steps(k), ceil_div(rows, TILE) * ceil_div(n, self.wide) * self.split
        size = 128 * steps * (rows_of_x(rows) + self.wide)
        one = STEP * steps + COLUMN * self.wide + size / INGEST
        sums = PART * self.split + SUM * 4 * rows * n * self.split if self.split > 1 else 0.0
        return ceil_div(count, blocks) * one + sums


#: What sweeps found (benchmarks/encoder_cuts.py) on an H100: (hidden, ffn, rows that the kernel is compiled for) to the
#: cuts of QKV, projection, up and down.
CUTS: dict[tuple[int, int, int], tuple[Units, Units, Units, Units]] = {
    (768, 3072, 16): (Units(24, 1), Units(32, 3), Units(24, 1), Units(32, 4)),
    (768, 3072, 32): (Units(24, 1), Units(40, 6), Units(24, 1), Units(32, 4)),
    (1024, 4096, 16): (Units(24, 1), Units(32, 4), Units(32, 1), Units(48, 6)),
    (1024, 4096, 32): (Units(24, 1), Units(32, 4), Units(32, 1), Units(32, 4)),
}


def rows_of_x(rows: int) -> int:
    """Of a tile of x, as many as there are."""
    return min(ceil_div(rows, 16) * 16, TILE)


def compiled_rows(rows: int) -> int:
    """Of the kernel that serves so many rows: a multiple of 16 in one tile, else whole tiles."""
    return rows_of_x(rows) if rows <= TILE else ceil_div(rows, TILE) * TILE


@dataclass(frozen=True)
class Layout:
    """The kernel's sizes for so many tiles of rows on so many blocks."""

    row_tiles: int
    x_rows: int
    """Rows of a tile of x that there are."""
    blocks: int
    qkv: Units
    out: Units
    up: Units
    down: Units
    stage_bytes: int
    stages: int

    @property
    def units(self) -> tuple[Units, ...]:
        """Of the products, in their order."""
        return self.qkv, self.out, self.up, self.down

    @classmethod
    def of(cls, spec: ModelSpec, rows: int, blocks: int) -> Layout:
        """The layout for a model that :func:`ops.specialized.persistent_encoder.structure` has let through: cut as
        in :data:`CUTS`, else by :meth:`Units.microseconds`."""
        measured = CUTS.get((spec.hidden, spec.ffn, compiled_rows(rows)))
        if measured is not None:
            return cls.cut(spec, rows, blocks, *measured)
        shapes = (
            (3 * spec.hidden, spec.hidden, False),
            (spec.hidden, spec.hidden, True),
            (spec.ffn, spec.hidden, False),
            (spec.hidden, spec.ffn, True),
        )
        # QKV and up take all of a row of x: no part of down needs to be longer.
        steps = ceil_div(spec.hidden, TILE)
        widest = min(ring_bytes(spec, rows, steps) // (128 * FEWEST_STAGES), WIDEST)
        if widest < 16:
            raise KernelError(f"the persistent encoder's shared memory does not hold {spec.hidden} columns")
        qkv, out, up, down = (
            Units.of(n, k, rows, blocks, longest=TILE * steps, widest=widest, splits=splits) for n, k, splits in shapes
        )
        return cls.cut(spec, rows, blocks, qkv, out, up, down)

    @classmethod
    def cut(cls, spec: ModelSpec, rows: int, blocks: int, qkv: Units, out: Units, up: Units, down: Units) -> Layout:
        """The layout with products cut like that, and as long a ring as there is room for."""
        row_tiles, x_rows = ceil_div(rows, TILE), rows_of_x(rows)
        for units, k in ((out, spec.hidden), (down, spec.ffn)):
            if not units.every_part_has_a_tile(k):
                raise KernelError(f"the persistent encoder: {k} columns are too few for {units.split} parts")
        stage = 128 * max(qkv.wide, out.wide, up.wide, down.wide)
        steps = max(
            units.steps(k) for units, k in zip((qkv, out, up, down), (*3 * (spec.hidden,), spec.ffn), strict=True)
        )
        stages = min(ring_bytes(spec, rows, steps) // stage, MOST_STAGES)
        if stages < FEWEST_STAGES or stages * stage < 128 * TILE:
            raise KernelError(f"the persistent encoder's shared memory does not hold {spec.hidden} columns")
        return cls(row_tiles, x_rows, blocks, qkv, out, up, down, stage, stages)


def ring_bytes(spec: ModelSpec, rows: int, steps: int) -> int:
    """Shared memory that is left for weights, beside ``steps`` tiles of x."""
    scratch = max(PARTS * (2 * spec.head_dim + 16), 4 * 16 * spec.head_dim * 4, STAGED_BYTES)
    tables = 4 * 16 * 8 + ceil_div(rows, TILE) * TILE * 4 + MOST_STAGES * 16 + 1024
    return SHARED_LIMIT - 128 * rows_of_x(rows) * steps - scratch - tables


#: Chooses the layout for a model, rows and blocks.
Choice = Callable[[ModelSpec, int, int], Layout]
