"""Whether an exchange of signs pays: both exchanges timed at the model's own sizes, the arithmetic that goes with each
on a sample of it, and one verdict for all ranks."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ops.compression import Errors, GradientCollective
from ops.optimizers.base import MomentOptimizer
from ops.optimizers.batch import BUCKET_ELEMENTS, Batch, batches, flattened
from ops.optimizers.moments import ARITHMETIC, Arithmetic

log = logging.getLogger("slipstream.optimizers")

#: Timed rounds of each exchange, behind one to warm up. An odd number: the median is one of them.
ROUNDS = 3
#: Elements on which the arithmetic is timed: few enough to be copied beside a model, enough to keep a GPU busy.
SAMPLE = 1 << 22

#: ``"auto"``: only where it is measured to be faster than averaging gradients in full.
Compression = Literal["always", "auto"]


@dataclass(frozen=True)
class Verdict:
    """Seconds of a step among ``size`` processes: by a full-precision mean of all gradients, and by a compressed
    exchange."""

    full: float
    compressed: float
    size: int

    @property
    def pays(self) -> bool:
        """Whether the compressed exchange is the faster one."""
        return self.compressed < self.full

    def __str__(self) -> str:
        if self.size == 1:
            return "one process has nothing to compress: the warm-up goes on"
        what = "signs are exchanged" if self.pays else "nothing is compressed, the warm-up goes on"
        return (
            f"on {self.size} processes a step by a full mean of the gradients takes {self.full:.3g} s, one by a "
            f"compressed exchange {self.compressed:.3g} s: {what}"
        )


class MeasuredOptimizer(MomentOptimizer):
    """Base of optimizers that may find by themselves that an exchange of signs does not pay (the option
    ``compression``). A subclass asks :meth:`compresses` before it begins."""

    #: What was measured where ``compression`` is "auto"; None before.
    verdict: Verdict | None = None
    collective: GradientCollective
    _errors: dict[int, Errors]

    def check_options(self, options: Mapping[str, Any], where: str) -> None:
        """Checks what all have, and ``compression``."""
        super().check_options(options, where)
        if options["compression"] not in ("always", "auto"):
            raise self.error(f"compression{where} is {options['compression']!r}: use 'always' or 'auto'")

    @abstractmethod
    def warm_up(self, arithmetic: Arithmetic, batch: Batch, group: Mapping[str, Any]) -> None:
        """A step on mean gradients."""

    @abstractmethod
    def arrived_at_once(self, arithmetic: Arithmetic, batch: Batch) -> Any:
        """What :meth:`send` gives, as if zeros had come."""

    @abstractmethod
    def finish(self, bucket: Any, group: Mapping[str, Any]) -> None:
        """A step along what has come."""

    def prepare(self, states: Sequence[dict[str, Any]]) -> None:
        """Adds to the states of parameters what steps by signs need beside moments."""

    @abstractmethod
    def send(self, arithmetic: Arithmetic, batch: Batch, flat: Tensor, index: int) -> Any:
        """Begins the exchange of the step's bucket ``index``."""

    def compresses(self) -> bool:
        """Whether signs are exchanged once that is due. With "auto" measured when it is first asked, by all processes
        together."""
        if self.defaults["compression"] == "always":
            return True
        if self.verdict is None:
            self.verdict = measure(self)
            if self.collective.rank == 0:
                log.info("%s: %s", type(self).__name__, self.verdict)
        return self.verdict.pays

    @contextmanager
    def scratch_errors(self) -> Iterator[None]:
        """What is exchanged meanwhile has errors of its own, which nobody keeps."""
        kept, self._errors = self._errors, {}
        try:
            yield
        finally:
            self._errors = kept


@torch.no_grad()
def measure(optimizer: MeasuredOptimizer) -> Verdict:
    """Times both kinds of step of ``optimizer`` on its own collective. All ranks call it together, and get the same.

    Of what can be told by a step: its parameters that have a variance, as on each rank alike. Numbers and errors are
    scratch, and let go of one exchange before the other's are made; no state changes. On a fast network the arithmetic
    decides, of which signs need more.
    """
    collective = optimizer.collective
    if collective.size == 1:
        return Verdict(0.0, 0.0, 1)
    with _gradients(optimizer) as parameters:
        device = optimizer.param_groups[0]["params"][0].device
        full = _seconds(collective, device, _full(optimizer, parameters))
        compressed = _seconds(collective, device, lambda: _compressed(optimizer))
        if parameters:
            with _sample(optimizer, parameters) as (share, warm_up, finish):
                full += share * _seconds(collective, device, warm_up)
                compressed += share * _seconds(collective, device, finish)
    return Verdict(full, compressed, collective.size)


def _full(optimizer: MeasuredOptimizer, parameters: list[Tensor]) -> Callable[[], object]:
    """What a step of the warm-up sends."""
    scratch = [torch.zeros_like(parameter.grad) for parameter in parameters if parameter.grad is not None]
    return lambda: optimizer.collective.mean(scratch).wait()


def _compressed(optimizer: MeasuredOptimizer) -> None:
    """What a step behind the warm-up sends, and what is done to that on the way."""
    under_way: list[Any] = []
    for group in optimizer.param_groups:
        known = [parameter for parameter in group["params"] if _is_known(optimizer, parameter)]
        for batch in batches(known, [optimizer.state[parameter] for parameter in known], BUCKET_ELEMENTS):
            moments = flattened(batch.exp_avgs)
            under_way.append(optimizer.send(ARITHMETIC[False], batch, moments.lerp_(moments, 0.1), len(under_way)))
    for bucket in under_way:
        bucket.wait()


@contextmanager
def _sample(
    optimizer: MeasuredOptimizer, parameters: Sequence[Tensor]
) -> Iterator[tuple[float, Callable[[], object], Callable[[], object]]]:
    """The arithmetic of both kinds of step on a copy of a part of the largest parameter; of how many such parts all
    parameters are."""
    known = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    largest = max(parameters, key=Tensor.numel)
    group, copied = known[id(largest)], _part(largest)
    copied.grad = torch.zeros_like(copied)
    optimizer.state[copied] = {
        name: _part(value) if value.shape == largest.shape else value.clone()
        for name, value in optimizer.state[largest].items()
    }
    optimizer.prepare([optimizer.state[copied]])
    try:
        (batch,) = batches([copied], [optimizer.state[copied]])
        arithmetic = ARITHMETIC[False]
        share = sum(parameter.numel() for parameter in parameters) / copied.numel()
        yield (
            share,
            lambda: optimizer.warm_up(arithmetic, batch, group),
            lambda: optimizer.finish(optimizer.arrived_at_once(arithmetic, batch), group),
        )
    finally:
        del optimizer.state[copied]


def _part(tensor: Tensor) -> Tensor:
    """A copy of the first elements, flat."""
    return tensor.detach().reshape(-1)[:SAMPLE].clone()


def _seconds(collective: GradientCollective, device: torch.device, exchange: Callable[[], object]) -> float:
    """The median of some rounds, of each its time on the slowest rank: the same bits on all ranks."""
    found = torch.zeros(ROUNDS, collective.size, dtype=torch.float64)
    for at in range(-1, ROUNDS):
        collective.mean([torch.zeros(1, device=device)]).wait()  # all begin together
        _settle(device)
        start = time.perf_counter()
        exchange()
        _settle(device)
        if at >= 0:
            found[at, collective.rank] = time.perf_counter() - start
    found = found.to(device)
    # Each number is summed up with zeros alone, which rounds nothing, in whatever order the ranks are summed.
    collective.mean([found]).wait()
    return float((found * collective.size).amax(1).median())


def _settle(device: torch.device) -> None:
    """Waits for what the device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _is_known(optimizer: MeasuredOptimizer, parameter: Tensor) -> bool:
    """Whether it has had a gradient: on all ranks, or on none."""
    return "exp_avg" in optimizer.state.get(parameter, {})


@contextmanager
def _gradients(optimizer: MeasuredOptimizer) -> Iterator[list[Tensor]]:
    """The parameters that are known, each with a gradient, and errors of nobody's, for as long as this lasts: which
    gradients this step has has not been compared between the ranks yet."""
    known = [p for group in optimizer.param_groups for p in group["params"] if _is_known(optimizer, p)]
    lacking = [parameter for parameter in known if parameter.grad is None]
    with optimizer.scratch_errors():
        try:
            for parameter in lacking:
                parameter.grad = torch.zeros_like(parameter)
            yield known
        finally:
            for parameter in lacking:
                parameter.grad = None
