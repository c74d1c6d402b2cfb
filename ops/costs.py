"""Costs beside the op: what an operator of ours computes and moves, registered where the operator is defined.

``register_cost`` is for operators that the dispatcher sees (``torch.library``); ``priced`` is for plain functions that
launch a kernel by themselves; ``region`` names the part of a model that runs, where no ``nn.Module`` does. Whoever
counts or times (``profiler``) reads the first and listens to the others; nothing here knows the profiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch

from ops.errors import KernelError

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call of an operator costs.

    ``flops`` counts floating point operations by the dense convention: a multiplication and an addition are two, and
    nothing is taken off for masks. ``macs`` are the multiply-accumulates of matrix products alone.
    """

    flops: int
    macs: int = 0
    #: Operations that the call really performs; None: ``flops``.
    executed_flops: int | None = None
    #: Bytes; None: each tensor among the arguments, or the results, once.
    bytes_read: int | None = None
    bytes_written: int | None = None


CostFunction = Callable[..., Cost]
"""Called as ``function(result, *args, **kwargs)`` with what the operator returned and was given; must not write."""

Operator = torch._ops.OpOverloadPacket | torch._ops.HigherOrderOperator
Listener = Callable[[str, CostFunction, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

#: Read by the counter; written by ``register_cost`` alone.
COSTS: dict[Operator, CostFunction] = {}


class Weight(NamedTuple):
    """A weight that a region reads: what tells it from others, its elements, and the bytes it lies in."""

    key: int
    elements: int
    bytes: int


Parameters = tuple[Weight, ...]
"""Of a region. A weight that several regions read counts at the first."""


class RegionListener(Protocol):
    """Hears regions; each ``region_leaves`` belongs to the latest ``region_enters`` that is still open."""

    def region_enters(self, name: str, kind: str, parameters: Parameters) -> None:
        """What runs from here on belongs to the region ``name``, a dotted path below the region that is open."""
        ...

    def region_leaves(self) -> None:
        """The region that was entered last has ended, well or not."""
        ...


_listener: Listener | None = None
_regions: RegionListener | None = None
_NOWHERE: AbstractContextManager[None] = nullcontext()


def register_cost(op: Operator, function: CostFunction) -> None:
    """Say what a call of ``op`` costs, all overloads of it.

    Args:
        op: for example ``torch.ops.mylib.myop``.
        function: takes the result, then the operator's arguments as they were given, and returns a ``Cost``.

    Raises:
        KernelError: ``op`` is no operator, or has a cost already.
    """
    if not isinstance(op, Operator):
        raise KernelError(f"register_cost: {op!r} is no operator: give torch.ops.NAMESPACE.NAME without an overload")
    if op in COSTS:
        raise KernelError(f"register_cost: {op} has a cost already")
    COSTS[op] = function


def priced(cost: CostFunction, name: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a plain function: its calls are counted as one operator of that name, or of the function's, at
    ``cost``, which is asked once the function has returned.

    The operators that the function itself calls are then not counted. Without a counter a call costs one look at a
    global.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def counted(*args: P.args, **kwargs: P.kwargs) -> R:
            if _listener is None:
                return function(*args, **kwargs)
            result: R = _listener(name or function.__name__, cost, function, args, kwargs)
            return result

        return counted

    return decorate


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """While this is open, calls of ``priced`` functions go through ``listener(name, cost, function, args, kwargs)``,
    which calls the function and returns its result. One at a time, for the whole process.

    Raises:
        KernelError: somebody listens already.
    """
    global _listener
    if _listener is not None:
        raise KernelError("a counter runs already in this process: leave it before the next one starts")
    _listener = listener
    try:
        yield
    finally:
        _listener = None


def region(name: str, kind: str, parameters: Parameters = ()) -> AbstractContextManager[None]:
    """What runs inside belongs to the part ``name`` of a model, a dotted path below the region around it. ``kind`` is
    what parts of several layers have in common. Nothing where nobody listens."""
    return _NOWHERE if _regions is None else _region(_regions, name, kind, parameters)


@contextmanager
def _region(listener: RegionListener, name: str, kind: str, parameters: Parameters) -> Iterator[None]:
    listener.region_enters(name, kind, parameters)
    try:
        yield
    finally:
        listener.region_leaves()


def observed() -> bool:
    """Whether somebody counts or times: what is else replayed from a CUDA graph then runs launch by launch, since a
    graph tells neither its operators nor whose they are."""
    return _listener is not None or _regions is not None


@contextmanager
def hearing(listener: RegionListener) -> Iterator[None]:
    """While this is open, ``listener`` hears regions. One at a time, for the whole process.

    Raises:
        KernelError: somebody hears them already.
    """
    global _regions
    if _regions is not None:
        raise KernelError("a profiler runs already in this process: leave it before the next one starts")
    _regions = listener
    try:
        yield
    finally:
        _regions = None
