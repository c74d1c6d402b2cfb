"""Profiling from end to end: ``Profiler`` around the steps of any loop, ``profile`` for a function that makes one."""

from __future__ import annotations

import logging
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

import torch
from torch import nn

from ops.machine import cpu_model
from profiler.ceilings import Ceilings, ceilings
from profiler.counter import Counter
from profiler.counts import Counts
from profiler.energy import energy as energy_of
from profiler.errors import ProfilerError
from profiler.report import Energy, Mode, Report, Workload
from profiler.timer import Timer
from profiler.units import many

_LOG = logging.getLogger("slipstream.profiler")

#: Peaks of the device are looked up or measured; None: nothing is judged.
Limits = Ceilings | Literal["auto"] | None

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class _Step(NamedTuple):
    """What is around a step, and what the log says as it begins."""

    around: Callable[[], AbstractContextManager[None]]
    said: str = ""


class Profiler:
    """Profiles steps of a loop that goes on anyhow: one is counted, ``warm_up`` pass by, one rehearses, ``repeats``
    plain ones and as many timed ones follow in turn. Every step computes what it would without the profiler, and is
    slower while it is counted or timed; steps after these have nothing around them.

        profiler = Profiler(model)
        for batch in batches:
            with profiler.step():
                train(batch)
            if profiler.done:
                print(profiler.report())
                break

    Args:
        model: whose modules go by their names in ``named_modules``. Modules of other models, and all of them without
            one, get names that begin with their model's class.
        device: whose time it is, and whose limits hold. None: where the model's first parameter is, a CPU without one.
        warm_up: steps that pass by before the first is timed.
        repeats: steps that are timed; 0: counted only.
        events: keep what a timeline needs.
        counts: of the same step, counted before: then none is counted.

    Raises:
        ProfilerError: neither a CPU nor a GPU of "cuda"; a negative number of steps.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        device: torch.device | str | None = None,
        warm_up: int = 1,
        repeats: int = 3,
        events: bool = False,
        counts: Counts | None = None,
    ) -> None:
        if warm_up < 0 or repeats < 0:
            raise ProfilerError(f"warm_up is {warm_up} and repeats is {repeats}: numbers of steps are not negative")
        self._model = model
        self._device = _device(model, device)
        self._counts = counts
        self._timer = Timer(model, self._device, events)
        self._now: Counter | Timer | None = None
        self._warm_up = warm_up + 1 if repeats else 0
        self._seconds = {"counting": 0.0, "timing": 0.0}
        plan = [] if counts else [_Step(self._counted, "counting a step")]
        if repeats:
            ready = [*[_Step(nullcontext)] * warm_up, _Step(self._timer.rehearsal)]
            plan += [ready[0]._replace(said=f"warming up: {many(len(ready), 'step')}"), *ready[1:]]
        for repeat in range(1, repeats + 1):
            plan += [_Step(self._timer.plain, f"timing a step, {repeat} of {repeats}"), _Step(self._timed)]
        self._plan = deque(plan)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step. One that raises is not kept, and the next takes its place.

        Raises (on entering):
            ProfilerError: as for ``Counter`` and ``Timer.step``.
        """
        if not self._plan:
            yield
            return
        what, step = "counting" if self.counting else "timing", self._plan[0]
        if step.said:
            _LOG.info("%s", step.said)
        start = time.perf_counter()
        with step.around():
            yield
        self._seconds[what] += time.perf_counter() - start
        self._plan.popleft()

    @property
    def counting(self) -> bool:
        """Whether the step to come, or the one that runs, is the one that is counted."""
        return bool(self._plan) and self._plan[0].around == self._counted

    @property
    def done(self) -> bool:
        """Whether all steps that it wants have been made."""
        return not self._plan

    @contextmanager
    def optimizer_step(self) -> Iterator[None]:
        """What runs inside, apart from modules and backward passes, is the optimizer's step: clipping, say. Steps of
        ``torch.optim.Optimizer`` are known without it."""
        with nullcontext() if self._now is None else self._now.optimizer_step():
            yield

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with Counter(self._model) as counter, self._current(counter):
            yield
        self._counts = counter.counts()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        with self._timer.step(), self._current(self._timer):
            yield

    @contextmanager
    def _current(self, what: Counter | Timer) -> Iterator[None]:
        self._now = what
        try:
            yield
        finally:
            self._now = None

    @property
    def mode(self) -> Mode:
        """``training`` if a backward pass was counted, else ``call``."""
        return "training" if self._counts and self._counts.total("backward").operators else "call"

    def report(
        self,
        workload: Workload | None = None,
        *,
        limits: Limits = "auto",
        energy: Energy | None = None,
        name: str | None = None,
        notes: tuple[str, ...] = (),
    ) -> Report:
        """What was found.

        Args:
            workload: what a step does. None: training if there was a backward pass, else a call, in the precision
                that most of the model's parameters have.
            limits: the device's, "auto" to look them up or measure them; None not to judge.
            name: None: the model's class.

        Raises:
            ProfilerError: steps are still to be made, or the device has no peak in the workload's precision.
        """
        if self._plan or self._counts is None:
            raise ProfilerError(f"{len(self._plan)} more steps are needed for a profile: run them in `profiler.step()`")
        timed = self._warm_up > 0
        if limits == "auto":
            limits = ceilings(self._device) if timed else None
        if workload is None:
            precision, limits, why = _precision(self._model, limits)
            workload, notes = Workload(self.mode, precision), (*notes, *why)
        return Report(
            name=name or (type(self._model).__name__ if self._model is not None else "step"),
            workload=workload,
            counts=self._counts,
            timing=self._timer.timing(self._warm_up) if timed else None,
            limits=limits,
            energy=energy,
            counting_seconds=self._seconds["counting"],
            timing_seconds=self._seconds["timing"],
            machine=_machine(self._device),
            notes=notes,
        )


def profile(
    step: Callable[[], object],
    model: nn.Module | None = None,
    *,
    mode: Mode | None = None,
    precision: str | None = None,
    samples: int | None = None,
    tokens: int | None = None,
    device: torch.device | str | None = None,
    warm_up: int = 1,
    repeats: int = 3,
    events: bool = False,
    energy: bool = True,
    limits: Limits = "auto",
) -> Report:
    """Count a step, then time it, and put it beside what the device can do.

    Args:
        step: forward, or forward, backward and optimizer, of any number of micro-batches. What it changes (weights,
            gradients, random numbers) it changes each time: it runs ``2 + warm_up + 2 * repeats`` times, and for two
            more seconds where energy is measured.
        mode: as ``Workload`` has it. None: training if there is a backward pass, else a call.
        precision: whose peak the products are held against. None: that of most parameters; say it under autocast.
        samples, tokens: of one step.
        model, device, warm_up, repeats, events: as for ``Profiler``.
        energy: measure it, where NVML can.
        limits: as for ``Profiler.report``.

    Raises:
        ProfilerError: as for ``Profiler`` and its methods; the device has no peak in ``precision``.
    """
    profiler = Profiler(model, device=device, warm_up=warm_up, repeats=repeats, events=events)
    if limits == "auto":
        limits = ceilings(_device(model, device)) if repeats else None
    notes: tuple[str, ...] = ()
    if precision is None:
        precision, limits, notes = _precision(model, limits)
    if limits is not None:
        limits.peak(precision)  # raises before anything has run
    while not profiler.done:
        with profiler.step():
            kept = step()  # a forward pass with gradients keeps its activations as long as its result is there
        del kept
    joules = energy_of(step, _device(model, device)) if energy and repeats else None
    workload = Workload(mode or profiler.mode, precision, samples, tokens)
    return profiler.report(workload, limits=limits, energy=joules, notes=notes)


def _device(model: nn.Module | None, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    parameter = next(model.parameters(), None) if model is not None else None
    return torch.device("cpu") if parameter is None else parameter.device


def _precision(model: nn.Module | None, limits: Ceilings | None) -> tuple[str, Ceilings | None, tuple[str, ...]]:
    """That of most elements of the parameters, as ``held_against`` has it."""
    sizes: Tally[torch.dtype] = Tally()
    for parameter in model.parameters() if model is not None else ():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    most = max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
    name = _NAMES.get(most, str(most).removeprefix("torch."))
    return (name, None, ()) if limits is None else held_against(limits, name)


def held_against(limits: Ceilings, precision: str) -> tuple[str, Ceilings | None, tuple[str, ...]]:
    """The name of the peak that products in ``precision`` are held against ("tf32" where torch multiplies fp32 so), and
    the limits; no limits, and a note why, where they have no such peak."""
    if precision == "fp32" and "tf32" in limits.flops and torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"
    if precision in limits.flops:
        return precision, limits, ()
    return precision, None, (f"not judged: there is no ceiling for {precision} of {limits.device}",)


def _machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    found = {"device": name, "torch": torch.__version__}
    try:
        found["slipstream"] = version("slipstream-runtime")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return found
    return found
