"""Which module an operator belongs to: names of modules, the stack of those that run, and whose a backward node is.

Forward: hooks push and pop. Backward: autograd numbers its nodes as it makes them, so that noting the next number
whenever a module is entered or left tells, for every node, the module that made it; no hook on tensors is needed.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from ops.costs import Parameters
from profiler.counts import ModuleCounts, Phase, Work


class Place:
    """One module under one of its names, as it is being counted."""

    def __init__(self, name: str, kind: str, path: tuple[str, ...]) -> None:
        self.name = name
        self.kind = kind
        self.path = path
        #: A part that says its name itself (``ops.costs.region``), rather than a module.
        self.region = False
        self.children: list[Place] = []
        self.parameters = 0
        self.parameter_bytes = 0
        self.activation_bytes = 0
        self.calls: dict[str, int] = defaultdict(int)
        self.own: dict[str, dict[str, Work]] = defaultdict(dict)

    def add(self, phase: Phase, operator: str, work: Work) -> None:
        """Add to the work of an operator."""
        operators = self.own[phase]
        operators[operator] = operators.get(operator, _NOTHING) + work

    def counts(self) -> ModuleCounts:
        """What was counted so far, here and below."""
        return ModuleCounts(
            name=self.name,
            kind=self.kind,
            parameters=self.parameters,
            parameter_bytes=self.parameter_bytes,
            calls=dict(self.calls),
            own={phase: dict(operators) for phase, operators in self.own.items()},
            activation_bytes=self.activation_bytes,
            children=tuple(child.counts() for child in self.children),
        )


_NOTHING = Work()


class Marks:
    """Numbers of autograd nodes and the places that were current when they were given, of one thread."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._places: list[Place] = []

    def note(self, place: Place) -> None:
        """From the next node on, nodes are made in ``place``."""
        number = torch._C._autograd._get_sequence_nr()
        if self._numbers and self._numbers[-1] == number:
            self._places[-1] = place
        else:
            self._numbers.append(number)
            self._places.append(place)

    def find(self, number: int) -> Place | None:
        """Where the node of that number was made."""
        position = bisect_right(self._numbers, number)
        return self._places[position - 1] if position else None


class ModuleTree:
    """Places of modules, and which of them is current. ``root`` is what lies between modules."""

    def __init__(self) -> None:
        self.root = Place("", "", ())
        #: What was entered (a module, or the place of a region), where it counts, and within which backward pass.
        self._stack: list[tuple[nn.Module | Place, Place, int]] = []
        #: By identity: a module may call itself equal to another. The module is kept, so that its id stays its own.
        self._known: dict[int, tuple[nn.Module, list[Place]]] = {}
        self._owners: dict[int, tuple[nn.Parameter, Place]] = {}
        #: Nodes are numbered thread by thread, and backward passes on a GPU run in threads of their own.
        self._marks: dict[int, Marks] = defaultdict(Marks)
        self._newest: Marks = self._marks[threading.get_ident()]
        self._tasks: dict[int, Marks] = {}

    def add(self, model: nn.Module, prefixed: bool) -> None:
        """Give every module below ``model`` a place. With ``prefixed`` names begin with the model's own, which keeps
        several models apart."""
        if _is_compiled(model):
            model = cast(nn.Module, model._orig_mod)
        kind = type(model).__name__
        top = self._free(kind)
        places: dict[str, Place] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            path = (top, *(name.split(".") if name else ()))
            full = ".".join(path) if prefixed or not name else name
            place = Place(full, type(module).__name__, path)
            places[name] = place
            (places[name.rpartition(".")[0]] if name else self.root).children.append(place)
            self._known.setdefault(id(module), (module, []))[1].append(place)
            self._own_parameters(module, place)

    def _free(self, kind: str) -> str:
        """A name that no place has yet."""
        taken = {place.name for place in _walk(self.root)}
        return next(name for name in _numbered(kind) if name not in taken)

    def _own_parameters(self, module: nn.Module, place: Place) -> None:
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in self._owners and not isinstance(parameter, nn.UninitializedParameter):
                self._owners[id(parameter)] = (parameter, place)
                place.parameters += parameter.numel()
                place.parameter_bytes += parameter.numel() * parameter.element_size()

    @property
    def current(self) -> Place:
        """The module that runs now."""
        return self._stack[-1][1] if self._stack else self.root

    @property
    def depth(self) -> int:
        """How many modules run within each other."""
        return len(self._stack)

    def knows(self, module: nn.Module) -> bool:
        """Whether it has a place."""
        return id(module) in self._known

    def enter(self, module: nn.Module) -> None:
        """A module's forward begins."""
        if id(module) not in self._known:
            if _is_compiled(module):
                return  # what ``torch.compile`` put around a model, which is entered next
            self.add(module, prefixed=True)
        path = self.current.path
        place = max(self._known[id(module)][1], key=lambda candidate: _common(candidate.path, path))
        self._push(module, place)

    def leave(self, module: nn.Module) -> None:
        """A module's forward has ended, well or not."""
        if any(entered is module for entered, _, _ in self._stack):
            self._own_parameters(module, self._pop(module))  # lazy modules have them only now

    def enter_region(self, name: str, kind: str, parameters: Parameters) -> Place:
        """A part of a model that is no module begins: ``name`` is its dotted path below what runs now. What it says of
        its parameters counts the first time. ``leave_region`` takes what is returned."""
        place = self.current
        for part in name.split("."):
            found = next((child for child in place.children if child.path[-1] == part and child.region), None)
            place = found or self._add_region(place, part)
        if not place.calls:
            place.kind, place.parameters, place.parameter_bytes = kind, parameters.elements, parameters.bytes
        self._push(place, place)
        return place

    def leave_region(self, place: Place) -> None:
        """The region has ended, well or not."""
        self._pop(place)

    def _add_region(self, parent: Place, part: str) -> Place:
        top = self._free(part) if parent is self.root else part
        name = top if parent is self.root else f"{parent.name}.{part}"
        place = Place(name, "layer" if part.isdigit() else part, (*parent.path, part))
        place.region = True
        parent.children.append(place)
        return place

    def _push(self, entered: nn.Module | Place, place: Place) -> None:
        task = torch._C._current_graph_task_id()
        self._stack.append((entered, place, task))
        place.calls["forward" if task == -1 else "recompute"] += 1
        self._note()

    def _pop(self, entered: nn.Module | Place) -> Place:
        """Leaves what was entered, and all that was entered within and not left."""
        last, place, _ = self._stack.pop()
        while last is not entered:
            last, place, _ = self._stack.pop()
        self._note()
        return place

    def _note(self) -> None:
        self._newest = self._marks[threading.get_ident()]
        self._newest.note(self.current)

    def locate(self, stepping: bool) -> tuple[Place, Phase]:
        """Where an operator that runs now belongs; ``stepping`` while an optimizer does."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return self.current, "step" if stepping and not self._stack else "forward"
        # The marks of the thread that ran modules last are those of the graph: a nested task (reentrant
        # checkpointing) begins right after its forward pass, in the thread of the outer task.
        marks = self._tasks.setdefault(task, self._newest)
        if self._stack and self._stack[-1][2] == task:
            return self.current, "recompute"
        place = self._of_node(torch._C._current_autograd_node(), marks)
        # Gradients are on within a backward pass where something is computed anew, and under create_graph.
        again = torch.is_grad_enabled() and not torch._C._autograd._get_current_graph_task_keep_graph()
        return place, "recompute" if again else "backward"

    def _of_node(self, node: Any, marks: Marks) -> Place:
        if node is None:
            return self.root
        parameter = getattr(node, "variable", None)  # of nodes that add to ``.grad``: they are not numbered
        if parameter is not None:
            owner = self._owners.get(id(parameter))
            return owner[1] if owner else self.root
        return marks.find(node._sequence_nr()) or self.root


def _is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` put this around a module."""
    from torch._dynamo import OptimizedModule  # takes a second to import

    return isinstance(module, OptimizedModule)


def _walk(place: Place) -> list[Place]:
    return [place, *(below for child in place.children for below in _walk(child))]


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}#{number}"
        number += 1


def _common(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """Length of the common beginning."""
    length = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        length += 1
    return length
