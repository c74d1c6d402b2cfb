"""One model under one profiler, in a process of its own: what DeepSpeed patches, and leaves patched after an error, is
gone with it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import interleaved, seconds
from benchmarks.profiler_subjects import SUBJECTS
from profiler import Counter, Timer
from profiler.formulas import cost_of
from profiler.formulas.call import Call


@dataclass
class Found:
    """What a profiler said of a model. FLOPs by operator where it tells; seconds of forward passes by kind."""

    flops: int = 0
    macs: int = 0
    executed: int = 0
    forward: dict[str, int] = field(default_factory=dict)
    backward: dict[str, int] = field(default_factory=dict)
    #: Calls of operators, the backward pass's too, and those that nobody gave a cost, by name.
    calls: int = 0
    unknown: dict[str, int] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    #: Of torch: multiply-accumulates with every product in an operator that it knows.
    whole: int = 0
    #: Of DeepSpeed: what its count of forward and backward pass is beyond that of the forward pass; FLOPs (ours) of
    #: operators outside of all that it counts; the first line of the error that it raised.
    beyond: int = 0
    unseen: dict[str, int] = field(default_factory=dict)
    error: str = ""


class Runs:
    """A model's forward pass, and with a backward pass behind it."""

    def __init__(self, name: str, toy: bool, rounds: int) -> None:
        torch.manual_seed(0)
        self._rounds = rounds
        self.model, self._given = SUBJECTS[name](toy)
        self.model.eval()

    def forward(self) -> None:
        """Without gradients."""
        with torch.no_grad():
            self.model(**self._given)

    def loss(self) -> Tensor:
        """The sum of what the model returns first."""
        output = self.model(**self._given)
        found: Tensor = (output if isinstance(output, Tensor) else output[0]).sum()
        return found

    def times(self, profiled: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of plain forward passes and ``profiled`` ones, in turn."""
        runs = {"plain": self.forward, **profiled}
        return interleaved({kind: partial(seconds, run) for kind, run in runs.items()}, self._rounds)


def slipstream(runs: Runs) -> Found:
    """Counts by ``Counter``, times by ``Timer``."""

    def counted(run: Callable[[], object]) -> Any:
        with Counter(runs.model) as counter:
            run()
        return counter.counts()

    def timed() -> None:
        timer = Timer(runs.model)
        with timer.step():
            runs.forward()
        timer.timing()

    counts, both = counted(runs.forward), counted(lambda: runs.loss().backward())
    total = counts.total()
    return Found(
        flops=total.flops,
        macs=total.macs,
        executed=total.executed_flops,
        forward={name: work.flops for name, work in counts.root.operators("forward").items()},
        backward={name: work.flops for name, work in both.root.operators("backward").items()},
        calls=both.total().operators,
        unknown=dict(both.unknown),
        times=runs.times({"counted": lambda: counted(runs.forward), "timed": timed}),
    )


def torch_counter(runs: Runs) -> Found:
    """``FlopCounterMode`` as it is; then with attention, LSTMs and experts taken apart into products that it knows."""

    def counted(run: Callable[[], object]) -> dict[str, int]:
        with FlopCounterMode(display=False) as mode:
            run()
        return {str(operator): flops for operator, flops in mode.get_flop_counts().get("Global", {}).items()}

    forward, loss = counted(runs.forward), runs.loss()
    backward = counted(loss.backward)
    times = runs.times({"counted": lambda: counted(runs.forward)})
    apart = getattr(runs.model, "set_experts_implementation", None)
    if apart is not None:
        apart("eager")
    with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
        whole = counted(runs.forward)
    macs = sum(forward.values()) // 2
    return Found(2 * macs, macs, forward=forward, backward=backward, times=times, whole=sum(whole.values()) // 2)


def deepspeed(runs: Runs) -> Found:
    """``FlopsProfiler`` as it is; then what runs outside of the functions that it replaces."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.profiling.flops_profiler import profiler as theirs

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

    def counted(run: Callable[[], object], watching: Any = None) -> tuple[int, int]:
        profiler = theirs.FlopsProfiler(runs.model)
        profiler.start_profile()
        try:
            with watching or nullcontext():
                run()
            return int(profiler.get_total_flops()), int(profiler.get_total_macs())
        finally:
            profiler.end_profile()

    try:
        flops, macs = counted(runs.forward)
        times = runs.times({"counted": lambda: counted(runs.forward)})
        beyond = counted(lambda: runs.loss().backward())[0] - counted(runs.loss)[0]
    except Exception as error:  # of any kind: that it raises is what is found
        return Found(error=f"{type(error).__name__}: {error}".splitlines()[0])
    outside = Outside()
    outside.watch(theirs, runs.model)
    counted(runs.forward, outside)
    return Found(flops, macs, times=times, beyond=beyond, unseen=outside.flops)


class Outside(TorchDispatchMode):
    """FLOPs, by our formulas, of the operators that run in no function and no module that DeepSpeed counts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[str, int] = {}
        self._inside = 0

    def watch(self, theirs: Any, model: nn.Module) -> None:
        """Have DeepSpeed's next patches, and modules that it counts by their class, say when they begin and end."""
        wrap = theirs.wrapFunc

        def watched(function: Callable[..., Any], cost: Callable[..., Any]) -> Callable[..., Any]:
            counted = wrap(function, cost)

            def call(*args: Any, **kwargs: Any) -> Any:
                self._inside += 1
                try:
                    return counted(*args, **kwargs)
                finally:
                    self._inside -= 1

            call.__str__ = counted.__str__  # type: ignore[method-assign] # the key by which DeepSpeed puts the function back
            return call

        theirs.wrapFunc = watched
        for module in model.modules():
            if type(module) in theirs.MODULE_HOOK_MAPPING:
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self._inside += 1

    def _leave(self, *_: Any) -> None:
        self._inside -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        cost = cost_of(Call(func, args, kwargs or {}, result))
        if cost is not None and cost.flops and not self._inside:
            name = str(func.overloadpacket)
            self.flops[name] = self.flops.get(name, 0) + cost.flops
        return result


SIDES: dict[str, Callable[[Runs], Found]] = {
    "slipstream": slipstream,
    "torch": torch_counter,
    "DeepSpeed": deepspeed,
}


def run(side: str, name: str, toy: bool, rounds: int, threads: int) -> Found:
    """``name`` under the profiler ``side``: ``rounds`` of its times, ``threads`` of torch (0: as it chooses)."""
    warnings.filterwarnings("ignore")
    if threads:
        torch.set_num_threads(threads)
    return SIDES[side](Runs(name, toy, rounds))
