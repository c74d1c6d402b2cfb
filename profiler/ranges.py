"""Ranges in a recording for the modules, regions and priced functions that run, by which ``attribution`` knows them."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._C._profiler import _RecordFunctionFast
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ops.costs import CostFunction, Parameters, hearing, listening, observed
from profiler.attribution import FUNCTION, MODULE
from profiler.errors import ProfilerError
from profiler.module_tree import ModuleTree, Place

#: torch says that a compiled module runs global hooks once more, which is what is wanted here.
_WARNING = r"Using `torch\.compile\(module\)` when there are global hooks"


class Ranges:
    """Opens a range around each module, region and priced function.

    A range costs a microsecond or two; it is there for torch's profiler only while that runs.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._tree = ModuleTree()
        if model is not None:
            self._tree.add(model, prefixed=False)
        #: Numbers of places in the names of ranges.
        self._numbers: dict[Place, int] = {}
        self._open: list[_RecordFunctionFast] = []
        self._regions: list[Place] = []
        self._thread = 0
        #: Whether any region has been entered yet.
        self.heard = False

    @property
    def names(self) -> list[str]:
        """Names of modules and regions, by their numbers."""
        return [place.name for place in self._numbers]

    @contextmanager
    def opened(self, regions: bool) -> Iterator[None]:
        """While this is open, there are ranges; afterwards no hook is left.

        Args:
            regions: hear regions and priced functions, too. slipstream's runtime then replays no CUDA graph.

        Raises (on entering):
            ProfilerError: a counter or another timer is open.
        """
        assert_nobody_observes()
        self._thread = threading.get_ident()
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", _WARNING)
            stack.callback(self._leave, 0)
            if regions:
                stack.enter_context(listening(self._priced))
                stack.enter_context(hearing(self))
            for handle in (
                register_module_forward_pre_hook(self._module_enters),
                register_module_forward_hook(self._module_leaves, always_call=True),
            ):
                stack.callback(handle.remove)
            yield

    def region_enters(self, name: str, kind: str, parameters: Parameters) -> None:
        """A part of slipstream's own runtime begins (``ops.costs.region``)."""
        if threading.get_ident() == self._thread:
            self.heard = True
            self._regions.append(self._tree.enter_region(name, kind, parameters))
            self._enter()

    def region_leaves(self) -> None:
        """It has ended."""
        if threading.get_ident() == self._thread:
            self._tree.leave_region(self._regions.pop())
            self._leave(self._tree.depth)

    def _module_enters(self, module: nn.Module, args: Any) -> None:
        depth = self._tree.depth
        if torch.compiler.is_compiling():  # what is compiled shall not have the hooks in it
            return
        if depth and isinstance(module, torch.fx.GraphModule) and not self._tree.knows(module):
            return  # what a module was compiled to
        self._tree.enter(module)
        if self._tree.depth == depth:  # what ``torch.compile`` put around a module, which may not be entered itself
            self._tree.enter(_within(module))
        self._enter()

    def _module_leaves(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        depth = self._tree.depth
        self._tree.leave(module)
        if self._tree.depth == depth and hasattr(module, "_orig_mod"):
            self._tree.leave(_within(module))
        self._leave(self._tree.depth)

    def _enter(self) -> None:
        number = self._numbers.setdefault(self._tree.current, len(self._numbers))
        opened = _RecordFunctionFast(f"{MODULE}{number}")
        opened.__enter__()
        self._open.append(opened)

    def _leave(self, depth: int) -> None:
        while len(self._open) > depth:
            self._open.pop().__exit__(None, None, None)

    def _priced(
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


def assert_nobody_observes() -> None:
    """Raises:
    ProfilerError: a counter or another timer is open.
    """
    if observed():
        raise ProfilerError("something is counted or timed already in this process: leave that first")


def _within(compiled: nn.Module) -> nn.Module:
    module = compiled._orig_mod
    assert isinstance(module, nn.Module)
    return module
