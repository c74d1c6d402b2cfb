"""How many bits a weight has after so many optimizer steps: MoQ's schedule (DeepSpeed 0.4, ``runtime/quantize.py``).

Rounding begins ``offset`` steps into the training, at ``start_bits``. With ``u`` steps done since then, a weight loses
a bit when ``u`` reaches its period, until it has ``target_bits``; the period is then multiplied by ``2 factor``:

    period_1 = period        period_(k+1) = 2 factor_k period_k        factor = 1 + floor(4 eigenvalue)

``eigenvalue`` in [0, 1] is the block's largest Hessian eigenvalue as a share of the largest block's; without them
``factor`` is 1 and bit ``k`` goes at ``offset + period 2^(k-1)``. ``u`` counts optimizer steps, where DeepSpeed's grew
by ``6 max(layers, 1)`` a step, so that its period was none of steps.

With a change ratio the weight that is computed with is ``r w + (1 - r) Q(w)``: ``r`` is 1 where rounding begins and
after each lost bit, and falls by the ratio a step, to 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ops.quantization.reference import MAX_FAKE_BITS
from ops.quantization.tensor import QuantizationError

#: Of the block with the largest eigenvalue.
LARGEST_FACTOR = 5


@dataclass(frozen=True)
class Stage:
    """Where a weight stands. bits: it has. since: the optimizer step from which it has them; period: steps since the
    schedule's offset at which it loses the next one."""

    bits: int
    since: int
    period: int


@dataclass(frozen=True)
class BitSchedule:
    """start_bits, target_bits: 1 to 16, the second not above the first; equal, they are plain quantize-aware training.
    period, offset: optimizer steps. change_ratio: in (0, 1], or None to round in full at once.

    Raises :class:`QuantizationError` where one is out of range.
    """

    start_bits: int
    target_bits: int
    period: int
    offset: int = 0
    change_ratio: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.target_bits <= self.start_bits <= MAX_FAKE_BITS:
            raise QuantizationError(
                f"from {self.start_bits} to {self.target_bits} bits: use 1 to {MAX_FAKE_BITS}, and a target that is "
                "not above the start"
            )
        if self.period < 1 or self.offset < 0:
            raise QuantizationError(
                f"a period of {self.period} steps behind {self.offset}: use at least 1, behind at least 0"
            )
        if self.change_ratio is not None and not 0 < self.change_ratio <= 1:
            raise QuantizationError(f"a change ratio of {self.change_ratio}: use more than 0 and at most 1")

    def first(self) -> Stage:
        """Before the first bit is lost."""
        return Stage(self.start_bits, self.offset, self.period)

    def due(self, stage: Stage, step: int) -> bool:
        """Whether a bit goes after ``step`` optimizer steps."""
        return stage.bits > self.target_bits and step - self.offset >= stage.period

    def advance(self, stage: Stage, step: int) -> Stage:
        """The stage after ``step`` optimizer steps; to be asked for at each step. The next bit goes at twice the
        steps."""
        return Stage(stage.bits - 1, step, 2 * stage.period) if self.due(stage, step) else stage

    def stretched(self, stage: Stage, factor: int) -> Stage:
        """The next bit stays ``factor`` (1 to 5, see above) times as long: once after each lost bit."""
        return replace(stage, period=factor * stage.period)

    def kept(self, stage: Stage, step: int) -> float:
        """``r``, the share of the weight that is not rounded: 1 before the offset, 0 where all of it is."""
        if step < self.offset:
            return 1.0
        return 0.0 if self.change_ratio is None else max(0.0, 1.0 - self.change_ratio * (step - stage.since))

    def reached(self, factor: int = 1) -> int:
        """Optimizer steps after which the weight has its target bits and is rounded in full, with the same factor at
        each lost bit."""
        lost = self.start_bits - self.target_bits
        last = self.offset + (self.period * (2 * factor) ** (lost - 1) if lost else 0)
        return last + (0 if self.change_ratio is None else math.ceil(1 / self.change_ratio))


def factor_of(eigenvalue: float) -> int:
    """How much longer the next bit is kept than without eigenvalues: 1 to 5, ``eigenvalue`` in [0, 1]."""
    if not 0 <= eigenvalue <= 1:
        raise QuantizationError(f"an eigenvalue of {eigenvalue}: blocks' are given as a share of the largest, 0 to 1")
    return 1 + math.floor(4 * eigenvalue)
