"""What the page's script draws and lists, as plain lists and dictionaries for JSON: modules, operators, kernels.

Times are seconds, work is in operations, traffic in bytes. Names are as they are: whoever shows one escapes it.
"""

from __future__ import annotations

from typing import Any

from profiler.advice import BETWEEN, STEP
from profiler.counts import ModuleCounts, Phase, Work
from profiler.judge import Judged, Judgement
from profiler.times import Spent

#: Columns of a row's "own" and "total", in this order; None where something is not known.
CELLS = ("seconds", "flops", "executed", "bytes", "limit", "bound", "calls")
#: The key of all phases together.
ALL = "all"


def phases_of(judged: Judged) -> list[str]:
    """``all``, and the phases in which anything happened; ``all`` alone where there is one phase."""
    return [ALL, *judged.phases] if len(judged.phases) > 1 else [ALL]


def modules(judged: Judged) -> list[dict[str, Any]]:
    """A row a module, each after the one above it (``parent``, an index; -1 for the first, which is the whole step).

    What ran between modules, the optimizer's step, communication, and time in which the device did nothing are rows
    below the first.
    """
    rows: list[dict[str, Any]] = []
    phases = phases_of(judged)

    def visit(module: ModuleCounts, parent: int, above: str) -> None:
        index = len(rows)
        whole = not module.name
        own, total = judged.own, judged.total
        row = _row(judged.report.name if whole else module.name, module.kind, parent)
        row |= {
            "label": judged.report.name if whole else _label(module.name, above),
            "parameters": module.total_parameters,
            "parameterBytes": module.total_parameter_bytes,
            "activations": module.total_activation_bytes,
            "calls": sum(module.calls.values()),
            "total": {phase: _cells(total(module.name, _phase(phase))) for phase in phases},
        }
        if whole:
            row["kind"] = "whole step"
        rows.append(row)
        if whole:
            rows.extend(_outside(judged, module, index))
        else:
            row["own"] = {phase: _cells(own(module.name, _phase(phase))) for phase in phases}
        for child in module.children:
            visit(child, index, module.name)

    visit(judged.report.counts.root, -1, "")
    rows.extend(_waits(judged, rows[0]))
    return rows


def operators(judged: Judged) -> list[dict[str, Any]]:
    """A row an operator, by phase: its work, and its time where the host's clock timed operators."""
    timing = judged.report.timing
    timed = _kernels(judged) if timing is not None and timing.clock == "host" else {}
    found = {phase: judged.report.counts.root.operators(_phase(phase)) for phase in phases_of(judged)}
    names = dict.fromkeys([*found[ALL], *timed.get(ALL, {})])
    return [
        {
            "name": name,
            "unknown": name in judged.report.counts.unknown,
            "cells": {
                phase: _operator(found[phase].get(name), timed.get(phase, {}).get(name))
                for phase in found
                if name in found[phase] or name in timed.get(phase, {})
            },
        }
        for name in names
    ]


def kernels(judged: Judged) -> list[dict[str, Any]]:
    """A row a kernel of a GPU, by phase: [seconds, launches]. Empty where no GPU was timed."""
    timing = judged.report.timing
    if timing is None or timing.clock != "device":
        return []
    found = _kernels(judged)
    return [
        {
            "name": name,
            "cells": {phase: [each[name].seconds, each[name].calls] for phase, each in found.items() if name in each},
        }
        for name in found[ALL]
    ]


def _row(name: str, kind: str, parent: int) -> dict[str, Any]:
    empty: dict[str, Any] = {"parameters": 0, "parameterBytes": 0, "activations": 0, "calls": 0}
    return {"name": name, "label": name, "kind": kind, "parent": parent, "own": {}, "total": {}, **empty}


def _outside(judged: Judged, root: ModuleCounts, parent: int) -> list[dict[str, Any]]:
    """Rows of what is no module's: the optimizer's step, and the rest."""
    found = []
    phases = [phase for phase in judged.phases if phase != "step"]
    for name, chosen in ((BETWEEN, phases), (STEP, [phase for phase in judged.phases if phase == "step"])):
        cells = {phase: judged.own("", phase) for phase in chosen}
        if any(cell != Judgement() for cell in cells.values()):
            shown: dict[str, Any] = {phase: _cells(cell) for phase, cell in cells.items() if phase in phases_of(judged)}
            shown[ALL] = _cells(sum(cells.values(), Judgement()))
            found.append(_row(name, "", parent) | {"own": shown, "total": shown})
    if found and found[0]["name"] == BETWEEN:
        found[0]["activations"] = root.activation_bytes
    return found


def _waits(judged: Judged, whole: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of communication and idle time; the step's total takes them in."""
    timing = judged.report.timing
    if timing is None:
        return []
    found = []
    for name, spent in (("communication", judged.communication), ("idle device", Spent(timing.idle_seconds))):
        if spent.seconds:
            cells = [spent.seconds, 0, 0, 0, None, None, spent.calls]
            found.append(_row(name, "", 0) | {"own": {ALL: cells}, "total": {ALL: cells}})
            whole["total"][ALL][0] = (whole["total"][ALL][0] or 0.0) + spent.seconds
    return found


def _label(name: str, above: str) -> str:
    return name.removeprefix(f"{above}.") if above else name


def _phase(key: str) -> Phase | None:
    return None if key == ALL else key  # type: ignore[return-value]


def _cells(judgement: Judgement) -> list[Any]:
    work = judgement.work
    limit = None if judgement.limit is None else judgement.limit.seconds
    calls = judgement.spent.calls if judgement.spent else work.operators
    return [judgement.seconds, work.flops, work.executed_flops, judgement.bytes, limit, judgement.bound, calls]


def _operator(work: Work | None, spent: Spent | None) -> list[Any]:
    """[seconds, calls, flops, executed, macs, bytes]."""
    work = work or Work()
    calls = work.operators or (spent.calls if spent else 0)
    moved = work.bytes_read + work.bytes_written
    return [spent.seconds if spent else None, calls, work.flops, work.executed_flops, work.macs, moved]


def _kernels(judged: Judged) -> dict[str, dict[str, Spent]]:
    """Time by phase and kernel over all modules, and of communication in ``all``."""
    timing = judged.report.timing
    assert timing is not None
    return {phase: timing.kernels(_phase(phase)) for phase in phases_of(judged)}
