"""Leaving modules out of a report's tree: what they did and held becomes their parents'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import nn

from profiler.counts import ModuleCounts, Phase, Work
from profiler.report import Report
from profiler.times import Spent

P = TypeVar("P", bound=str)
T = TypeVar("T", Work, Spent)


def without(report: Report, model: nn.Module, kinds: Sequence[type[nn.Module]]) -> Report:
    """The report without rows for modules of ``model`` whose class is one of ``kinds``, not a subclass of it; the sums
    are the same. The model itself stays."""
    names = {name for name, module in model.named_modules(remove_duplicate=False) if name and type(module) in kinds}
    moved: dict[str, str] = {}
    root = _without(report.counts.root, names, moved)
    timing = report.timing
    if timing is not None:
        timing = replace(timing, modules=_moved_times(timing.modules, moved))
    return replace(report, counts=replace(report.counts, root=root), timing=timing)


def _without(module: ModuleCounts, names: set[str], moved: dict[str, str]) -> ModuleCounts:
    """``module`` with the ignored ones below it merged into it; ``moved`` tells whose time goes where."""
    children: list[ModuleCounts] = []
    for child in (_without(child, names, moved) for child in module.children):
        if child.name not in names:
            children.append(child)
            continue
        moved[child.name] = module.name
        children += child.children
        module = replace(
            module,
            parameters=module.parameters + child.parameters,
            parameter_bytes=module.parameter_bytes + child.parameter_bytes,
            activation_bytes=module.activation_bytes + child.activation_bytes,
            own=_added(module.own, child.own, Work()),
        )
    return replace(module, children=tuple(children))


def _moved_times(
    modules: Mapping[str, Mapping[Phase, Mapping[str, Spent]]], moved: Mapping[str, str]
) -> dict[str, Mapping[Phase, Mapping[str, Spent]]]:
    found: dict[str, Mapping[Phase, Mapping[str, Spent]]] = {}
    for name, phases in modules.items():
        while name in moved:  # the parent may be ignored as well
            name = moved[name]
        found[name] = _added(found.get(name, {}), phases, Spent())
    return found


def _added(
    one: Mapping[P, Mapping[str, T]], other: Mapping[P, Mapping[str, T]], nothing: T
) -> dict[P, Mapping[str, T]]:
    """Sums by phase and operator."""
    found = {phase: dict(operators) for phase, operators in one.items()}
    for phase, operators in other.items():
        place = found.setdefault(phase, {})
        for name, value in operators.items():
            place[name] = place.get(name, nothing) + value
    return {**found}
