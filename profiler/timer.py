"""Timing one step at a time: ``Timer`` around steps of any code, ``timed`` for a function. docs/profiler.md says how.

torch's profiler records; while a step is timed there are two hooks on modules, which go with it. Between the steps, and
in those that are not timed, there is nothing.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._C._profiler import _RecordFunctionFast
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ops.costs import CostFunction, listening
from ops.errors import KernelError
from profiler.attribution import FUNCTION, MODULE, OPTIMIZER, STEP, Measured, attribute
from profiler.errors import ProfilerError
from profiler.module_tree import ModuleTree, Place
from profiler.recording import recording
from profiler.times import Timing

#: torch says that a compiled module runs global hooks once more, which is what is wanted here.
_WARNING = r"Using `torch\.compile\(module\)` when there are global hooks"


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
        self._events = events
        self._tree = ModuleTree()
        if model is not None:
            self._tree.add(model, prefixed=False)
        #: Numbers of places in the names of ranges.
        self._numbers: dict[Place, int] = {}
        self._ranges: list[_RecordFunctionFast] = []
        self._steps: list[Measured] = []
        self._plain: list[float] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time what runs inside as one step. One that raises is not kept.

        Raises (on entering):
            ProfilerError: a counter or torch's profiler is running, or another step is being timed.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(listening(self._heard))
            except KernelError as error:
                raise ProfilerError(str(error)) from None
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", _WARNING)
            records = stack.enter_context(recording(self._device))
            stack.callback(self._leave, depth=0)
            for handle in (
                register_module_forward_pre_hook(self._module_enters),
                register_module_forward_hook(self._module_leaves, always_call=True),
            ):
                stack.callback(handle.remove)
            self._wait()
            with _RecordFunctionFast(STEP):
                yield
                self._wait()
        names = [place.name for place in self._numbers]
        clock = "device" if self._device.type == "cuda" else "host"
        self._steps.append(attribute(records, names, clock, self._events))

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
            clock="device" if self._device.type == "cuda" else "host",
            modules=middle.modules,
            communication=middle.communication,
            step_seconds=middle.seconds,
            idle_seconds=middle.idle,
            plain_seconds=statistics.median(self._plain) if self._plain else 0.0,
            steps=len(self._steps),
            warm_up=warm_up,
            events=tuple(middle.events),
        )

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    # ---- what the hooks call ----

    def _module_enters(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():  # what is compiled shall not have the hooks in it
            return
        depth = self._tree.depth
        self._tree.enter(module)
        if self._tree.depth == depth:  # what ``torch.compile`` put around a module, which may not be entered itself
            self._tree.enter(module._orig_mod)  # type: ignore[arg-type]
        place = self._tree.current
        number = self._numbers.setdefault(place, len(self._numbers))
        opened = _RecordFunctionFast(f"{MODULE}{number}")
        opened.__enter__()
        self._ranges.append(opened)

    def _module_leaves(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        depth = self._tree.depth
        self._tree.leave(module)
        if self._tree.depth == depth and hasattr(module, "_orig_mod"):
            self._tree.leave(module._orig_mod)  # type: ignore[arg-type]
        self._leave(self._tree.depth)

    def _leave(self, depth: int) -> None:
        """End the ranges of modules that were left, also by an exception that passed their hooks by."""
        while len(self._ranges) > depth:
            self._ranges.pop().__exit__(None, None, None)

    def _heard(
        self,
        name: str,
        cost: CostFunction,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A function that is ``priced`` is one operator here too."""
        with _RecordFunctionFast(f"{FUNCTION}{name}"):
            return function(*args, **kwargs)


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
        warm_up: plain steps that come first; one timed step, which is not kept either, follows.
        repeats: timed steps, and plain ones.

    Raises:
        ProfilerError: as for ``Timer`` and ``Timer.step``; or ``repeats`` is less than 1.
    """
    if repeats < 1:
        raise ProfilerError(f"repeats is {repeats}: at least one step must be timed")
    for _ in range(warm_up):
        step()
    with Timer(model, device).step():  # the profiler sets itself up once
        step()
    timer = Timer(model, device, events)
    for _ in range(repeats):
        with timer.plain():
            step()
        with timer.step():
            step()
    return timer.timing(warm_up + 1)


def _device_of(model: nn.Module | None, device: torch.device | str | None) -> torch.device:
    if device is None:
        parameter = next(model.parameters(), None) if model is not None else None
        device = "cpu" if parameter is None else parameter.device
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type not in ("cpu", "cuda"):
        raise ProfilerError(f"{device}: steps are timed on cpu and cuda devices")
    return device
