"""Timing one step at a time: ``Timer`` around steps of any code, ``timed`` for a function. docs/profiler.md says how.

torch's profiler records, and there are two hooks on modules (``ranges.py``), which go with it. On a GPU that is so in
a rehearsal alone: steps behind it record kernels and nothing of the host, and a kernel belongs where the same one, in
the same order, belonged in the rehearsal. Between the steps, and in those that are not timed, there is nothing.
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
from profiler.ranges import Ranges, assert_nobody_observes
from profiler.recording import Record, recording
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
        self._rehearsed: tuple[Placed, ...] = ()
        #: Whether steps have the kernels of the rehearsal, as far as is known.
        self._alike = True
        self._steps: list[Measured] = []
        self._plain: list[float] = []

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Time a step that is not kept. torch's profiler sets itself up, which takes seconds on a GPU; and later steps
        know from it whose kernels are, in the same order, without the host being watched: it should not be the first,
        which makes an optimizer's state and the like. If what runs is slipstream's runtime, it runs launch by launch,
        which tells the parts of a model that its CUDA graphs do not.

        Raises (on entering):
            ProfilerError: as ``step``.
        """
        found: list[Measured] = []
        with self._watched(found, regions=True):
            yield
        self._rehearsed = tuple(found[0].placed)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time what runs inside as one step. One that raises is not kept.

        On a GPU, behind a rehearsal: if more than a few kernels are not those of the rehearsal (layers that drop out at
        random, say), the steps to come are watched on the host as well, which costs more, and are the ones that count.

        Raises (on entering):
            ProfilerError: a counter or torch's profiler is running, or another step is being timed.
        """
        follows = bool(self._rehearsed) and self._alike and not self._events
        found: list[Measured] = []
        with self._followed(found) if follows else self._watched(found, regions=not self._rehearsed):
            yield
        (measured,) = found
        self._steps.append(measured)
        if measured.alike:
            return
        # The runtime's rehearsal has a few launches that its graphs have not, and tells more than the host could.
        self._alike = self._ranges.heard
        if measured.strangers or not self._ranges.heard:
            _LOG.warning(
                "of %d kernels of a step %d were not in its rehearsal, and %d that were did not come%s",
                *(len(measured.placed), measured.strangers, measured.missing),
                "" if self._alike else ": the steps to come are watched on the host",
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
        steps = [step for step in self._steps if step.alike] or self._steps
        middle = sorted(steps, key=lambda step: step.seconds)[(len(steps) - 1) // 2]
        return Timing(
            clock=self._clock,
            modules=middle.modules,
            communication=middle.communication,
            step_seconds=middle.seconds,
            idle_seconds=middle.idle,
            plain_seconds=statistics.median(self._plain) if self._plain else 0.0,
            steps=len(steps),
            warm_up=warm_up,
            events=tuple(middle.events),
        )

    @contextmanager
    def _watched(self, found: list[Measured], regions: bool) -> Iterator[None]:
        """The host tells whose the kernels are, and the rehearsal, if there was one, those of the runtime's graphs."""
        with recording(self._device) as records, self._ranges.opened(regions):
            self._wait()
            with _RecordFunctionFast(STEP):
                yield
                self._wait()
        rehearsed = self._rehearsed if self._ranges.heard else ()
        found.append(attribute(records, self._ranges.names, self._clock, self._events, rehearsed))

    @contextmanager
    def _followed(self, found: list[Measured]) -> Iterator[None]:
        """The rehearsal alone tells whose the kernels are."""
        assert_nobody_observes()
        with recording(self._device, host=False) as records:
            self._wait()
            start = time.time_ns()  # the clock that torch's profiler gives its times in
            yield
            self._wait()
            end = time.time_ns()
        step = Record(STEP, "host", start, end, row=0, correlation=-1)  # 0 is what kernels have that nothing is around
        found.append(attribute([step, *records], (), "device", False, self._rehearsed))

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
