"""The tree of modules as rows to print: its branches drawn, and modules that are alike in one row if that is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from profiler.counts import ModuleCounts


@dataclass(frozen=True, slots=True)
class Row:
    """One module, or several that are alike and are added up."""

    #: ``│  ├─ attention``
    label: str
    kind: str
    depth: int
    modules: tuple[ModuleCounts, ...]


def rows(root: ModuleCounts, folded: bool, depth: int = -1) -> list[Row]:
    """A row for each module below ``root``, children behind their parents.

    Args:
        folded: neighbours with numbers for names that are alike with all below them (classes, parameters, work) become
            one row, of their sums.
        depth: of the deepest modules shown; the tops have depth 0. All if it is negative.
    """
    found: list[Row] = []
    for name, tops in _grouped([root], folded):
        found += _below(Row(name, tops[0].kind, 0, tops), "", folded, depth)
    return found


def _below(row: Row, branch: str, folded: bool, depth: int) -> Iterator[Row]:
    yield row
    if row.depth == depth:
        return
    groups = _grouped(list(row.modules), folded)
    for number, (name, modules) in enumerate(groups, start=1):
        last = number == len(groups)
        child = Row(f"{branch}{'└─' if last else '├─'} {name}", modules[0].kind, row.depth + 1, modules)
        yield from _below(child, f"{branch}{'   ' if last else '│  '}", folded, depth)


def _grouped(parents: list[ModuleCounts], folded: bool) -> list[tuple[str, tuple[ModuleCounts, ...]]]:
    """Children of modules that are alike, place by place; neighbours that are alike together."""
    found: list[tuple[list[str], tuple[ModuleCounts, ...]]] = []
    before = None
    for alike in zip(*(parent.children for parent in parents), strict=True):
        name = alike[0].name.rpartition(".")[2]
        shape = _shape(alike[0]) if folded and name.isdigit() else None
        if found and shape is not None and shape == before:
            found[-1] = ([*found[-1][0], name], found[-1][1] + alike)
        else:
            found.append(([name], alike))
        before = shape
    return [
        (names[0] if len(names) == 1 else f"{names[0]}...{names[-1]} ({len(names)} alike)", modules)
        for names, modules in found
    ]


def _shape(module: ModuleCounts) -> tuple[Any, ...]:
    """What is equal for modules that are alike: they are added up, so that small differences do not matter."""
    below = tuple((child.name.removeprefix(module.name), _shape(child)) for child in module.children)
    return module.kind, module.parameters, module.own_work("forward").macs, below
