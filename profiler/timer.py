"""Timing one step at a time: ``Timer`` around steps of any code, ``timed`` for a function. docs/profiler.md says how.

torch's profiler records, and while a step is timed there are two hooks on modules (``ranges.py``), which go with it.
Between the steps, and in those that are not timed, there is nothing.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._C._profiler import _RecordFunctionFast

from profiler.attribution import OPTIMIZER, STEP, Measured, Placed, attribute
from profiler.errors import ProfilerError
from profiler.ranges import Ranges
from profiler.recording import recording
from profiler.times import Clock, Timing

_LOG = logging.getLogger("slipstream.profiler.timer")


class Timer:
    """Measures steps, and whose the time is.

    Args:
        model: whose modules go by their names in ``named_modules``. Modules of other models, and all of them without
            one, get names that begin with their model's class.
        device: whose time it is: kernels of a GPU, or the wall clock of a CPU. None: where the model's first parameter
            is, a CPU without one.
        events: keep every module, operator and kernel for a timeline.

    Raises:
        ProfilerError: the device is neither a CPU nor a GPU of "cuda".
    """

    def __init__(
        self, model: nn.Module | None = None, device: torch.device | str | None = None, events: bool = False
    ) -> None:
        self._device = _device_of(model, device)
        self._clock: Clock = "device" if self._device.type == "cuda" else "host"
        self._events = events
        self._ranges = Ranges(model)
        self._rehearsed: tuple[Placed, ...] | None = None
        self._steps: list[Measured] = []
        self._plain: list[float] = []

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Time a step that is not kept. torch's profiler sets itself up, which takes seconds on a GPU; and if what runs
        is slipstream's runtime on a GPU, it runs launch by launch, from which later steps know the parts of a model
        that its CUDA graphs do not tell: the same kernels come in the same order.

        Raises (on entering):
            ProfilerError: as ``step``.
        """
        measured: list[Measured] = []
        with self._measuring(measured, regions=True):
            yield
        if self._clock == "device" and self._ranges.heard:
            self._rehearsed = tuple(measured[0].placed)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time what runs inside as one step. One that raises is not kept.

        Raises (on entering):
            ProfilerError: a counter or torch's profiler is running, or another step is being timed.
        """
        with self._measuring(self._steps, regions=self._rehearsed is None):
            yield
        if self._steps[-1].strangers:
            _LOG.warning(
                "%d of %d kernels of a step were not in its rehearsal: they count where they were launched",
                self._steps[-1].strangers,
                len(self._steps[-1].placed),
            )

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Measure what runs inside as a step that is not timed in any detail, to compare with."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self._plain.append(time.perf_counter() - start)

    @contextmanager
    def optimizer_step(self) -> Iterator[None]:
        """What runs inside, apart from modules and backward passes, is the optimizer's step: clipping, say. Steps of
        ``torch.optim.Optimizer`` are known without it."""
        with _RecordFunctionFast(OPTIMIZER):
            yield

    def timing(self, warm_up: int = 0) -> Timing:
        """The median of the timed steps (of an even number the faster of the two), and of the plain ones.

        Args:
            warm_up: how many steps ran before, for the record.

        Raises:
            ProfilerError: no step has been timed.
        """
        if not self._steps:
            raise ProfilerError("no step has been timed: run one in `with timer.step():`")
        middle = sorted(self._steps, key=lambda step: step.seconds)[(len(self._steps) - 1) // 2]
        return Timing(
            clock=self._clock,
            modules=middle.modules,
            communication=middle.communication,
            step_seconds=middle.seconds,
            idle_seconds=middle.idle,
            plain_seconds=statistics.median(self._plain) if self._plain else 0.0,
            steps=len(self._steps),
            warm_up=warm_up,
            events=tuple(middle.events),
        )

    @contextmanager
    def _measuring(self, found: list[Measured], regions: bool) -> Iterator[None]:
        with recording(self._device) as records, self._ranges.opened(regions):
            self._wait()
            with _RecordFunctionFast(STEP):
                yield
                self._wait()
        found.append(attribute(records, self._ranges.names, self._clock, self._events, self._rehearsed or ()))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def timed(
    step: Callable[[], object],
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    warm_up: int = 2,
    repeats: int = 3,
    events: bool = False,
) -> Timing:
    """Run a step several times, plainly and timed in turn, after a warm-up.

    Args:
        step: forward, or forward, backward and optimizer, of any number of micro-batches. What it changes (weights,
            gradients, random numbers) it changes each time: ``warm_up + 1 + 2 * repeats`` times in all.
        model, device, events: as for ``Timer``.
        warm_up: plain steps that come first; a rehearsal, which is not kept either, follows.
        repeats: timed steps, and plain ones.

    Raises:
        ProfilerError: as for ``Timer`` and ``Timer.step``; or ``repeats`` is less than 1.
    """
    if repeats < 1:
        raise ProfilerError(f"repeats is {repeats}: at least one step must be timed")
    timer = Timer(model, device, events)
    for _ in range(warm_up):
        step()
    with timer.rehearsal():
        step()
    for _ in range(repeats):
        with timer.plain():
            step()
        with timer.step():
            step()
    return timer.timing(warm_up + 1)


def _device_of(model: nn.Module | None, device: torch.device | str | None) -> torch.device:
    if device is None:
        parameter = None if model is None else next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
    found = torch.device(device)
    if found.type not in ("cpu", "cuda"):
        raise ProfilerError(f"{found}: steps are timed on cpu and cuda devices")
    return torch.empty(0, device=found).device  # with its index
