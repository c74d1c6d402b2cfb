"""Learning rate schedules: warm-up, then constant, linear, cosine or one-cycle. All are functions of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from engine.errors import EngineError

Name = Literal["constant", "linear", "cosine", "one_cycle"]
#: Where one_cycle begins and ends, as shares of the highest rate: the defaults of PyTorch's OneCycleLR.
BEGIN, END = 1 / 25, 1 / 25 / 1e4


def build_schedule(name: Name, optimizer: Optimizer, warmup_steps: int = 0, total_steps: int | None = None) -> LambdaLR:
    """A schedule of ``optimizer``'s learning rates (of each group: its own is the highest), to step once an optimizer
    step.

    warmup_steps: steps in which the rate rises from 0 in a straight line; one_cycle: from a 25th, along a cosine.
    total_steps:  step at which linear and cosine reach 0, and one_cycle a 10,000th of where it began; past it they stay
                  there. constant needs none.

    (PyTorch's OneCycleLR raises past its end, transformers' cosine rises again.) Raises :class:`EngineError` for steps
    that contradict each other.
    """
    if name not in get_args(Name):
        raise EngineError(f"no schedule {name!r}: there are {', '.join(get_args(Name))}")
    if warmup_steps < 0:
        raise EngineError(f"warmup_steps is {warmup_steps}: it cannot be negative")
    if name == "constant":
        return LambdaLR(optimizer, lambda step: _warm(step, warmup_steps))
    if total_steps is None:
        raise EngineError(f"schedule {name} needs total_steps, the step at which it ends")
    if not 0 < total_steps >= warmup_steps:
        raise EngineError(f"total_steps is {total_steps} and warmup_steps {warmup_steps}: the warm-up must fit in")
    if name == "one_cycle":
        return LambdaLR(optimizer, _one_cycle(warmup_steps, total_steps))
    fall: Callable[[float], float] = (lambda share: 1 - share) if name == "linear" else _cosine

    def factor(step: int) -> float:
        if step < warmup_steps:
            return _warm(step, warmup_steps)
        return fall(min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0))

    return LambdaLR(optimizer, factor)


def _warm(step: int, warmup_steps: int) -> float:
    return min(step / warmup_steps, 1.0) if warmup_steps else 1.0


def _cosine(share: float) -> float:
    """From 1 to 0 as ``share`` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * share))


def _one_cycle(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """As PyTorch counts: the highest rate is the warm-up's last, the lowest the last of all."""
    top, last = max(warmup_steps - 1, 0), max(total_steps - 1, 1)

    def factor(step: int) -> float:
        if step < top:
            return 1 + (BEGIN - 1) * _cosine(step / top)
        return END + (1 - END) * _cosine(min((step - top) / max(last - top, 1), 1.0))

    return factor
