"""What the benchmarks of training share: the device, rounds in turn, times of single steps, how much to measure."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import machine
from engine.bench.options import count
from engine.training.feature import Feature
from engine.training.loop import Loop, LossFunction
from engine.training.optimizer import build_optimizer
from engine.training.precision import Mode, Precision
from engine.training.schedules import build_schedule

CLIP_NORM, WEIGHT_DECAY = 1.0, 0.01


def device_of(name: str) -> torch.device:
    """``auto`` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def device_in_words(device: torch.device) -> str:
    """The GPU's name, or the machine in one line."""
    return f"{torch.cuda.get_device_name(device)}; {machine()}" if device.type == "cuda" else machine()


def wait(device: torch.device) -> None:
    """Until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free() -> None:
    """Gives back what models that are no longer there held: hooks keep a model in a cycle until it is collected."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"... {text}", file=sys.stderr, flush=True)


def in_turn(
    runs: Mapping[str, Callable[[], Any]], rounds: int, deadline: float, what: str = ""
) -> dict[str, list[Any]]:
    """What each run gave in each round. Each runs once a round, and every other round goes the other way around, so
    that a machine whose speed drifts is fair to all. Whole rounds, at least one; none begins after ``deadline``."""
    found: dict[str, list[Any]] = {name: [] for name in runs}
    for at in range(rounds):
        if at and time.monotonic() > deadline:
            say(f"{what}: the time is up after {at} of {rounds} rounds")
            break
        for name in list(runs)[:: -1 if at % 2 else 1]:
            found[name].append(runs[name]())
    return found


class Marks:
    """Moments between steps. On a GPU they are events, so that nothing waits before :meth:`seconds` is asked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moments: list[Any] = []

    def mark(self) -> None:
        """Now, in the order of the device's work."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append(event)
        else:
            self._moments.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each mark to the next."""
        wait(self._device)
        pairs = list(zip(self._moments, self._moments[1:], strict=False))
        if self._device.type == "cuda":
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]


def adamw_loop(
    model: nn.Module,
    loss: LossFunction,
    *,
    precision: Mode,
    device: torch.device,
    lr: float,
    steps: int,
    warmup: int,
    features: Sequence[Feature] = (),
) -> Loop:
    """slipstream's loop with fused AdamW, clipping, and a linear schedule: ``steps``, ``warmup`` of them to warm up."""
    optimizer = build_optimizer(model, "AdamW", {"lr": lr, "weight_decay": WEIGHT_DECAY})
    return Loop(
        model,
        optimizer,
        loss,
        features,
        schedule=build_schedule("linear", optimizer, warmup, steps),
        precision=Precision(precision, device.type),
        clip_norm=CLIP_NORM,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the commands of training take all."""
    parser.add_argument("--device", default="auto", help="as in a config: auto is the GPU where there is one (auto)")
    parser.add_argument("--limit-seconds", metavar="S", type=count, default=550, help="begin no round then (550)")
    parser.add_argument("--threads", metavar="N", type=count, help="threads of torch (as torch chooses)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was measured to this file")
