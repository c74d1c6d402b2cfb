"""The modules of a report as tables: leading classes of each depth, the tree with its work, the tree with its times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from profiler.advice import BETWEEN, STEP
from profiler.counts import ModuleCounts, Phase, Work
from profiler.grid import grid
from profiler.judge import Judged, Judgement
from profiler.rows import Row, rows
from profiler.summary import executed_differs
from profiler.units import NOTHING, percentage, quantity, seconds

_Column = tuple[str, Callable[[ModuleCounts], float], Callable[[float], str]]


def by_depth(judged: Judged, depth: int, top: int) -> str:
    """For each depth down to ``depth`` (all if it is negative), the deepest among them, the ``top`` classes of modules
    with most parameters, multiply-accumulates of the forward pass, and time."""
    columns: list[_Column] = [
        ("parameters", lambda module: module.total_parameters, quantity),
        ("MACs, forward", lambda module: module.total("forward").macs, quantity),
    ]
    if judged.seconds is not None:
        columns.append(("time", lambda module: judged.total(module.name).seconds or 0.0, seconds))
    table: list[list[str]] = []
    for number, level in enumerate(_levels(judged.report.counts.root, depth)):
        cells = [_leading(level, value, write, top) for _, value, write in columns]
        for line in range(max(map(len, cells))):
            first = str(number) if line == 0 else ""
            table.append([first, *(cell[line] if line < len(cell) else "" for cell in cells)])
    return grid(["depth", *(name for name, _, _ in columns)], table, texts=range(1, len(columns) + 1))


def _levels(root: ModuleCounts, depth: int) -> list[list[ModuleCounts]]:
    levels: list[list[ModuleCounts]] = []
    level = list(root.children)
    while level and (depth < 0 or len(levels) <= depth):
        levels.append(level)
        level = [child for module in level for child in module.children]
    return levels


def _leading(
    level: Sequence[ModuleCounts], value: Callable[[ModuleCounts], float], write: Callable[[float], str], top: int
) -> list[str]:
    sums: dict[str, float] = {}
    for module in level:
        sums[module.kind] = sums.get(module.kind, 0) + value(module)
    leading = sorted(sums.items(), key=lambda item: item[1], reverse=True)[:top]
    return [f"{write(number):>7} {kind}" for kind, number in leading if number]


class _Line(NamedTuple):
    """A line of a tree: a row, or what lies outside of modules."""

    label: str
    kind: str
    of: Callable[[Phase | None], Judgement]
    modules: tuple[ModuleCounts, ...] = ()

    def work(self, *phases: Phase) -> Work:
        """As counted, wherever the time went."""
        found = [module.total(phase) for module in self.modules for phase in phases]
        return sum(found, Work()) if self.modules else sum((self.of(phase).work for phase in phases), Work())


def _lines(judged: Judged, folded: bool, depth: int) -> list[_Line]:
    def line(row: Row) -> _Line:
        def of(phase: Phase | None) -> Judgement:
            return sum((judged.total(module.name, phase) for module in row.modules), Judgement())

        return _Line(row.label, row.kind, of, row.modules)

    lines = [line(row) for row in rows(judged.report.counts.root, folded, depth)]
    # Outside of modules: the root's own work.
    outside = [phase for phase in judged.phases if phase != "step"]

    def between(phase: Phase | None) -> Judgement:
        chosen = outside if phase is None else [one for one in outside if one == phase]
        return sum((judged.own("", one) for one in chosen), Judgement())

    def step(phase: Phase | None) -> Judgement:
        return judged.own("", "step") if phase in (None, "step") else Judgement()

    extra = [_Line(BETWEEN, "", between), _Line(STEP, "", step)]
    return lines + [line for line in extra if line.of(None) != Judgement()]


def work(judged: Judged, folded: bool, depth: int) -> str:
    """The tree with what its modules did: each with all below it."""
    lines = [
        line._replace(label=f"{line.label}: {line.kind}") if line.modules else line
        for line in _lines(judged, folded, depth)
    ]
    backward = "backward" in judged.phases
    columns: list[tuple[str, Callable[[_Line], str]]] = [
        ("params", lambda line: _sum(line, lambda module: module.total_parameters)),
        ("MACs\nforward" if backward else "MACs", lambda line: _number(line.work("forward").macs)),
    ]
    if backward:
        columns.append(("MACs\nbackward", lambda line: _number(line.work("backward").macs)))
    columns.append(("FLOPs", lambda line: _number(line.work(*judged.phases).flops)))
    if executed_differs(judged):
        columns.append(("FLOPs\nexec.", lambda line: _number(line.work(*judged.phases).executed_flops)))
    columns.append(("bytes", lambda line: _number(_moved(line.work(*judged.phases)))))
    columns.append(("activation\nbytes", lambda line: _sum(line, lambda module: module.total_activation_bytes)))
    return _table(lines, columns)


def _moved(work: Work) -> int:
    return work.bytes_read + work.bytes_written


def _number(number: int) -> str:
    return quantity(number) if number else NOTHING


def _sum(line: _Line, value: Callable[[ModuleCounts], int]) -> str:
    return _number(sum(map(value, line.modules)))


def times(judged: Judged, folded: bool, depth: int) -> str:
    """The tree with its times and how near they are to the limit; nothing if it was not timed."""
    timing = judged.report.timing
    if timing is None:
        return ""
    lines = _lines(judged, folded, depth)
    if judged.communication.calls:
        communication = Judgement(Work(), judged.communication)
        lines.append(_Line("(communication)", "", lambda phase: communication if phase is None else Judgement()))
    whole = timing.step_seconds
    shown = [phase for phase in judged.phases if phase != "step"]
    columns: list[tuple[str, Callable[[_Line], str]]] = []
    if len(shown) > 1:
        columns += [(phase, lambda line, phase=phase: seconds(line.of(phase).seconds)) for phase in shown]  # type: ignore[misc]
    columns += [
        ("time", lambda line: seconds(line.of(None).seconds)),
        ("share", lambda line: percentage((line.of(None).seconds or 0.0) / whole if whole else None)),
        ("FLOP/s", lambda line: quantity(line.of(None).flops_rate or None)),
        ("bytes/s", lambda line: quantity(line.of(None).bytes_rate or None)),
    ]
    if judged.report.limits is not None:
        columns += [
            ("roof-\nline", lambda line: percentage(line.of(None).efficiency or None)),
            ("bound", lambda line: line.of(None).bound or NOTHING),
        ]
    return _table(lines, columns)


def _table(lines: Sequence[_Line], columns: Sequence[tuple[str, Callable[[_Line], str]]]) -> str:
    table = [[line.label, *(write(line) for _, write in columns)] for line in lines]
    # Outside of modules there is a line only where there is something.
    table = [row for row, line in zip(table, lines, strict=True) if line.modules or set(row[1:]) != {NOTHING}]
    return grid(["module", *(name for name, _ in columns)], table)
