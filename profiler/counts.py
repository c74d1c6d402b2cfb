"""What a counter found, as plain frozen data: a tree of modules, their work by phase and operator. JSON both ways."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from profiler.errors import ProfilerError

Phase = Literal["forward", "recompute", "backward", "step"]
"""``recompute`` is forward work done within a backward pass (activation checkpointing); ``step`` the optimizer's."""

PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True, slots=True)
class Work:
    """Sums over calls of operators; they add up."""

    #: Calls of operators, also of those that cost nothing.
    operators: int = 0
    #: Floating point operations by torch's dense convention.
    flops: int = 0
    #: Floating point operations that are really performed: masks taken off, sums of biases added.
    executed_flops: int = 0
    #: Multiply-accumulates of matrix products, convolutions and attention; element-wise operators have none.
    macs: int = 0
    #: Bytes: each operand of each call read once, each result written once.
    bytes_read: int = 0
    bytes_written: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.operators + other.operators,
            self.flops + other.flops,
            self.executed_flops + other.executed_flops,
            self.macs + other.macs,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
        )


@dataclass(frozen=True, slots=True)
class ModuleCounts:
    """One module: what it did itself, and its children. Every number but those of ``total`` is its own."""

    #: Fully qualified, as in ``named_modules``; a tree's top has the name of its class, what lies between modules "".
    name: str
    kind: str
    #: Elements and bytes of the parameters it holds; one that is shared counts at the first module that holds it.
    parameters: int = 0
    parameter_bytes: int = 0
    #: Calls of the module in ``forward`` and ``recompute``.
    calls: Mapping[str, int] = field(default_factory=dict)
    #: Phase, operator (``aten.mm``), work.
    own: Mapping[str, Mapping[str, Work]] = field(default_factory=dict)
    #: Bytes of the storages its operators made that were still alive when the forward pass ended.
    activation_bytes: int = 0
    children: tuple[ModuleCounts, ...] = ()

    def walk(self) -> Iterator[ModuleCounts]:
        """This module and all below it, each before its children."""
        yield self
        for child in self.children:
            yield from child.walk()

    def own_work(self, phase: Phase | None = None) -> Work:
        """Its own work in a phase, or in all."""
        phases = self.own.values() if phase is None else [self.own.get(phase, {})]
        return sum((work for operators in phases for work in operators.values()), Work())

    def total(self, phase: Phase | None = None) -> Work:
        """Its work and that of all modules below it, in a phase or in all."""
        return sum((module.own_work(phase) for module in self.walk()), Work())

    def operators(self, phase: Phase | None = None) -> dict[str, Work]:
        """Work by operator, of the module and all below it, in a phase or in all."""
        found: dict[str, Work] = {}
        for module in self.walk():
            for name, operators in module.own.items():
                if phase in (None, name):
                    for operator, work in operators.items():
                        found[operator] = found.get(operator, Work()) + work
        return found

    @property
    def total_parameters(self) -> int:
        """Elements of the parameters of the module and all below it, each once."""
        return sum(module.parameters for module in self.walk())

    @property
    def total_parameter_bytes(self) -> int:
        """Bytes of the same."""
        return sum(module.parameter_bytes for module in self.walk())

    @property
    def total_activation_bytes(self) -> int:
        """``activation_bytes`` of the module and all below it."""
        return sum(module.activation_bytes for module in self.walk())


@dataclass(frozen=True, slots=True)
class Counts:
    """What was counted. ``root`` stands for the whole: its own work is what ran between modules, and in optimizers'
    steps; its children are the models that were called."""

    root: ModuleCounts
    #: Operators that nobody gave a cost, with their calls. Their bytes are counted, their FLOPs are not.
    unknown: Mapping[str, int] = field(default_factory=dict)

    def module(self, name: str) -> ModuleCounts:
        """The module of that fully qualified name.

        Raises:
            ProfilerError: there is none such.
        """
        names = {module.name: module for module in self.root.walk()}
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ProfilerError(f"no module {name!r} was counted" + (f": did you mean {near[0]!r}?" if near else ""))
        return names[name]

    def total(self, phase: Phase | None = None) -> Work:
        """All work, in a phase or in all."""
        return self.root.total(phase)

    def to_dict(self) -> dict[str, Any]:
        """Dictionaries, lists, strings and integers, for ``json.dumps``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Counts:
        """The opposite of ``to_dict``, also after a way through JSON."""
        return cls(_module(data["root"]), dict(data["unknown"]))


def _module(data: Mapping[str, Any]) -> ModuleCounts:
    own = {
        phase: {operator: Work(**work) for operator, work in operators.items()}
        for phase, operators in data["own"].items()
    }
    return ModuleCounts(**{**data, "own": own, "children": tuple(map(_module, data["children"]))})
