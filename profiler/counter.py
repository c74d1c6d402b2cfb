"""Counting at the dispatcher: ``Counter`` around any code, ``count`` around one call. docs/profiler.md says what of.

Nothing of torch is patched. While a counter runs there are one dispatch mode, three hooks on modules and two on
optimizers, all of which go with it; what is computed is the same bit for bit.
"""

from __future__ import annotations

import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from ops.costs import Cost, CostFunction, Parameters, hearing, listening
from ops.errors import KernelError
from profiler.counts import Counts, Work
from profiler.errors import ProfilerError
from profiler.formulas import cost_of, has_formula
from profiler.formulas.call import Call, storage_key, tensors_in
from profiler.module_tree import ModuleTree, Place

R = TypeVar("R")

_aten = torch.ops.aten
#: Questions about sizes that subclasses of Tensor answer through the dispatcher: theirs to answer, and free.
_QUESTIONS = {
    *(getattr(_aten, name).default for name in ("size", "stride", "storage_offset", "numel", "dim")),
    *(getattr(_aten, f"sym_{name}").default for name in ("size", "stride", "storage_offset", "numel")),
    *(_aten.is_contiguous.default, _aten.is_contiguous.memory_format, _aten.sym_is_contiguous.default),
    *(_aten.is_strides_like_format.default, _aten.is_non_overlapping_and_dense.default),
    *(torch.ops.prim.layout.default, torch.ops.prim.device.default),
}


class Counter:
    """Counts what runs while it is open, in this thread and in the backward passes it starts.

    Args:
        model: whose modules go by their names in ``named_modules``. Modules of other models, and all of them without
            one, get names that begin with their model's class.

    Raises (on entering):
        ProfilerError: another counter is open.
    Raises (from what runs inside):
        ProfilerError: something is captured in, or replayed from, a CUDA graph where a counter can see it.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._tree = ModuleTree()
        if model is not None:
            self._tree.add(model, prefixed=False)
        self._unknown: Tally[str] = Tally()
        self._activations = _Activations()
        self._steps = 0
        self._covered = 0
        self._thread = 0
        self._regions: list[Place] = []
        self._open: ExitStack | None = None

    def __enter__(self) -> Counter:
        self._thread = threading.get_ident()
        with ExitStack() as stack:
            try:
                stack.enter_context(listening(self._heard))
                stack.enter_context(hearing(self))
            except KernelError as error:
                raise ProfilerError(str(error)) from None
            for handle in (
                register_module_forward_pre_hook(self._module_enters),
                register_module_forward_hook(self._module_leaves, always_call=True),
                register_optimizer_step_pre_hook(self._step_begins),
                register_optimizer_step_post_hook(self._step_ends),
            ):
                stack.callback(handle.remove)
            # Compiled functions run as they were written: a dispatch mode does not see into compiled code.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_Mode(self))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._open is not None
        self._open.close()
        self._open = None
        self._activations.settle()
        self._steps = 0

    def counts(self) -> Counts:
        """What was counted so far; more may follow."""
        return Counts(self._tree.root.counts(), dict(self._unknown))

    @contextmanager
    def optimizer_step(self) -> Iterator[None]:
        """Count what runs inside, apart from modules and backward passes, as the optimizer's step: clipping, say.
        Steps of ``torch.optim.Optimizer`` are known without it."""
        self._steps += 1
        try:
            yield
        finally:
            self._steps -= 1

    # ---- what regions, the hooks and the mode call ----

    def region_enters(self, name: str, kind: str, parameters: Parameters) -> None:
        """A part of slipstream's own runtime begins (``ops.costs.region``)."""
        if threading.get_ident() == self._thread:
            self._regions.append(self._tree.enter_region(name, kind, parameters))

    def region_leaves(self) -> None:
        """It has ended."""
        if threading.get_ident() != self._thread:
            return
        self._tree.leave_region(self._regions.pop())
        if not self._tree.depth and not torch.is_grad_enabled():
            self._activations.settle()

    def _module_enters(self, module: nn.Module, args: Any) -> None:
        forward = module.__dict__.get("forward")
        if forward is not None and forward.__module__ == "torch.cuda.graphs":
            raise ProfilerError(
                f"{type(module).__name__} replays a CUDA graph, whose operators cannot be counted: "
                "count the model before make_graphed_callables"
            )
        self._tree.enter(module)

    def _module_leaves(self, module: nn.Module, args: Any, output: Any) -> None:
        self._tree.leave(module)
        if not self._tree.depth and not torch.is_grad_enabled():
            self._activations.settle()

    def _step_begins(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._steps += 1

    def _step_ends(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._steps -= 1

    def _heard(
        self,
        name: str,
        cost: CostFunction,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A function that is ``priced`` is called: count it, and not what it calls."""
        if self._covered or threading.get_ident() != self._thread:
            return function(*args, **kwargs)
        self._covered += 1
        try:
            result = function(*args, **kwargs)
            found = cost(result, *args, **kwargs)  # which may look at values, by operators that are nobody's
        finally:
            self._covered -= 1
        self._add(Call(function, args, kwargs, result), name, found)
        return result

    def _ran(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """An operator has run."""
        call = Call(op, args, kwargs, result)
        place, phase = self._tree.locate(bool(self._steps))
        if phase == "forward":
            self._activations.made(call, place)
        elif phase == "backward":
            self._activations.settle()
        if not self._covered:
            self._add(call, str(getattr(op, "_overloadpacket", op)), cost_of(call))

    def _add(self, call: Call, name: str, cost: Cost | None) -> None:
        place, phase = self._tree.locate(bool(self._steps))
        if cost is None:
            self._unknown[name] += 1
            cost = Cost(0)
        read, written = cost.bytes_read, cost.bytes_written
        if read is None or written is None:
            counted = call.traffic()
            read, written = counted[0] if read is None else read, counted[1] if written is None else written
        executed = cost.flops if cost.executed_flops is None else cost.executed_flops
        place.add(phase, name, Work(1, cost.flops, executed, cost.macs, read, written))


class _Mode(TorchDispatchMode):
    """Runs every operator and tells the counter."""

    supports_higher_order_operators = True

    def __init__(self, counter: Counter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counter = counter
        #: Operators of wrapping subclasses that run now, and whether one is on its way to its subclass.
        self._wrapped = 0
        self._handed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _QUESTIONS:
            return NotImplemented
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return self._unwrapped(func, args, kwargs)
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise ProfilerError("a CUDA graph is being captured: count the same work before it is captured")
        if isinstance(func, torch._ops.OpOverload) and not has_formula(func):
            # In inference mode operators arrive whole that autograd would have taken apart.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        named = getattr(func, "namespace", "") == "profiler"  # a range in a trace
        if not named and not (self._wrapped and FakeTensor in types):
            self._counter._ran(func, args, kwargs, result)
        return result

    def _unwrapped(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A subclass that wraps tensors (DTensor, jagged tensors) makes operators of its own: those are counted, but
        not the fake ones by which it learns shapes."""
        if self._handed:
            self._handed = False
            return NotImplemented
        self._handed = True
        self._wrapped += 1
        try:
            with self:
                return func(*args, **kwargs)
        finally:
            self._wrapped -= 1
            self._handed = False


class _Activations:
    """Storages that operators made since the last backward pass, and what of them is still there when one begins."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[StorageWeakRef, Place, int]] = {}
        self._most = 0
        self._noted: list[Place] = []

    def made(self, call: Call, place: Place) -> None:
        """Note the storages that a call returned and was not given."""
        results = list(tensors_in(call.result))
        known = {storage_key(tensor) for tensor in call.inputs}
        for tensor in results:
            key = storage_key(tensor)
            if key and key not in known:
                storage = tensor.untyped_storage()
                # The weak reference keeps the address from being given to another storage.
                self._made[key] = (StorageWeakRef(storage), place, storage.nbytes())

    def settle(self) -> None:
        """The forward pass has ended: of several, that which kept most stands."""
        kept = [(place, size) for reference, place, size in self._made.values() if not reference.expired()]
        self._made.clear()
        total = sum(size for _, size in kept)
        if total <= self._most:
            return
        for place in self._noted:
            place.activation_bytes = 0
        for place, size in kept:
            place.activation_bytes += size
        self._most, self._noted = total, [place for place, _ in kept]


def count(function: Callable[..., R], *args: Any, **kwargs: Any) -> tuple[R, Counts]:
    """Call ``function(*args, **kwargs)`` once and count it.

    Args:
        function: an ``nn.Module``, or anything that can be called: with a backward pass and a step in it, those are
            counted too. What the call changes (gradients, running averages, random numbers) it changes as ever.

    Returns:
        What the function returned, and the counts.

    Raises:
        ProfilerError: as for ``Counter``.
    """
    with Counter(function if isinstance(function, nn.Module) else None) as counter:
        result = function(*args, **kwargs)
    return result, counter.counts()
