"""Two reports side by side: what changed, as a table of 100 columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from profiler.advice import BETWEEN
from profiler.counts import ModuleCounts
from profiler.grid import fill, grid
from profiler.judge import Judged, Judgement
from profiler.report import Report
from profiler.units import NOTHING, joules, percentage, quantity, seconds

#: Modules that are listed: those whose time (without times, whose FLOPs) changed most.
MODULES = 20


@dataclass(frozen=True, slots=True)
class Change:
    """One number of both; None on the side that does not have it."""

    name: str
    before: float | None
    after: float | None
    write: Callable[[float | None], str]

    @property
    def changed(self) -> bool:
        """Whether it did, beyond the rounding of floating point numbers."""
        if self.before is None or self.after is None:
            return self.before is not self.after
        return not math.isclose(self.before, self.after, rel_tol=1e-9)

    @property
    def row(self) -> list[str]:
        """Name, before, after, by how much."""
        ratio = NOTHING
        if self.before and self.after is not None:
            ratio = f"{100 * (self.after / self.before - 1):+.1f}%"
        return [self.name, self.write(self.before), self.write(self.after), ratio]


def differences(before: Report, after: Report) -> dict[str, tuple[str, str]]:
    """What was profiled, in what way, on what: every fact that is not the same, in words."""
    one, other = _facts(before), _facts(after)
    found = {name: (one.get(name, NOTHING), other.get(name, NOTHING)) for name in {**one, **other}}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def _facts(report: Report) -> dict[str, str]:
    limits: Mapping[str, Any] = {}
    if report.limits is not None:
        limits = {"device's bandwidth": quantity(report.limits.bandwidth, "B/s")}
        limits |= {f"device's peak in {name}": quantity(rate, "FLOP/s") for name, rate in report.limits.flops.items()}
    workload = {name.replace("_", " "): str(value) for name, value in asdict(report.workload).items()}
    unknown = {f"calls of {name}, without a formula": str(calls) for name, calls in report.counts.unknown.items()}
    return {"name": report.name, **workload, **report.machine, **limits, **unknown}


def totals(before: Report, after: Report) -> list[Change]:
    """The numbers of the whole step that either has and that changed."""
    one, other = Judged(before), Judged(after)
    numbers: list[tuple[str, Callable[[Judged], float | None], Callable[[float | None], str]]] = [
        ("step", lambda judged: judged.seconds, seconds),
        *(
            (f"step: {phase}", lambda judged, phase=phase: judged.total("", phase).seconds, seconds)
            for phase in dict.fromkeys([*one.phases, *other.phases])
        ),
        ("step: idle", lambda judged: judged.report.timing.idle_seconds if judged.report.timing else None, seconds),
        ("step: communication", lambda judged: judged.communication.seconds, seconds),
        ("samples/s", lambda judged: judged.samples_per_second, quantity),
        ("tokens/s", lambda judged: judged.tokens_per_second, quantity),
        ("MFU", lambda judged: judged.mfu, percentage),
        ("part of the roofline", lambda judged: judged.efficiency, percentage),
        ("energy", lambda judged: judged.report.energy.joules if judged.report.energy else None, joules),
        ("parameters", lambda judged: judged.report.counts.root.total_parameters, quantity),
        ("activation bytes", lambda judged: judged.report.counts.root.total_activation_bytes, quantity),
        ("MACs", lambda judged: judged.total("").work.macs, quantity),
        ("FLOPs", lambda judged: judged.total("").work.flops, quantity),
        ("FLOPs executed", lambda judged: judged.total("").work.executed_flops, quantity),
        ("bytes", lambda judged: judged.total("").bytes, quantity),
        ("operators", lambda judged: judged.total("").work.operators, quantity),
    ]
    changes = [Change(name, value(one), value(other), write) for name, value, write in numbers]
    return [change for change in changes if change.changed]


@dataclass(frozen=True, slots=True)
class ModuleChange:
    """One module's own work and time in both, without those below it; None on the side that does not have it."""

    name: str
    before: Judgement | None
    after: Judgement | None

    @property
    def seconds(self) -> float:
        """By how much its time changed."""
        return ((self.after and self.after.seconds) or 0.0) - ((self.before and self.before.seconds) or 0.0)

    @property
    def flops(self) -> int:
        """By how much its FLOPs changed."""
        return (self.after.work.flops if self.after else 0) - (self.before.work.flops if self.before else 0)

    @property
    def bytes(self) -> int:
        """By how much its traffic changed."""
        return (self.after.bytes if self.after else 0) - (self.before.bytes if self.before else 0)

    @property
    def changed(self) -> bool:
        """Whether anything of it did."""
        alone = self.before is None or self.after is None
        return alone or bool(self.seconds or self.flops or self.bytes)

    @property
    def row(self) -> list[str]:
        """For the table."""
        state = "new" if self.before is None else "gone" if self.after is None else ""
        times = [seconds(side.seconds if side else None) for side in (self.before, self.after)]
        changes = [_signed(self.seconds, seconds), _signed(self.flops, quantity), _signed(self.bytes, quantity)]
        return [self.name or BETWEEN, state, *times, *changes]


def modules(before: Report, after: Report) -> list[ModuleChange]:
    """The modules whose own time, FLOPs or bytes changed, or that only one has; largest change of time first."""
    one, other = Judged(before), Judged(after)
    trees: list[dict[str, ModuleCounts]] = [
        {module.name: module for module in report.counts.root.walk()} for report in (before, after)
    ]
    changes = [
        ModuleChange(name, one.own(name) if name in trees[0] else None, other.own(name) if name in trees[1] else None)
        for name in {**trees[0], **trees[1]}
    ]
    changed = [change for change in changes if change.changed]
    return sorted(changed, key=lambda change: (abs(change.seconds), abs(change.flops), abs(change.bytes)), reverse=True)


def _signed(number: float, write: Callable[[float | None], str]) -> str:
    return ("+" if number > 0 else "") + write(number) if number else NOTHING


def compare(before: Report, after: Report) -> str:
    """What changed from one report to the other, at most 100 columns wide."""
    facts, whole, single = differences(before, after), totals(before, after), modules(before, after)
    if not (facts or whole or single):
        return "Nothing changed.\n"
    parts = []
    if facts:
        lines = [fill(f"{name}: {old} -> {new}") for name, (old, new) in facts.items()]
        parts.append("What was profiled\n-----------------\n" + "\n".join(lines))
    if whole:
        table = grid(["", "before", "after", "change"], [change.row for change in whole])
        parts.append("Whole step\n----------\n" + table)
    if single:
        headers = ["module", "", "before", "after", "time", "FLOPs", "bytes"]
        table = grid(headers, [change.row for change in single[:MODULES]])
        more = f"\nand {len(single) - MODULES} more" if len(single) > MODULES else ""
        parts.append("Modules, without those below them\n---------------------------------\n" + table + more)
    return "\n\n".join(parts) + "\n"
