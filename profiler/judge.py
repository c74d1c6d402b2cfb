"""How far from the limit: counts, times and ceilings of one report put together, module by module.

A module's limit is the sum of its operators' rooflines (``ceilings.roofline``): each takes at least the larger of its
executed FLOPs at the peak of the workload's precision and its bytes at the memory's bandwidth. Operators without
multiply-accumulates are held against the bandwidth alone: the peak is that of units they do not use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from profiler.ceilings import Ceilings, intensity, roofline
from profiler.counts import PHASES, ModuleCounts, Phase, Work
from profiler.times import Spent, Timing

if TYPE_CHECKING:
    from profiler.report import Report

Verdict = Literal["memory", "compute", "latency"]
"""What bounds: ``memory`` or ``compute`` by the roofline, or ``latency`` where neither is in sight."""

#: Below this share of the roofline neither memory nor compute is what is waited for: launches, dependencies, the host.
LATENCY = 0.05
#: A timed step that takes another time than the plain one, by so large a part of it, is said to.
NOTICED = 0.02
#: Phases whose products count as the model's; recomputing them, and the optimizer, do not (Chowdhery et al. 2022,
#: "PaLM", appendix B).
MODEL_PHASES: tuple[Phase, ...] = ("forward", "backward")


@dataclass(frozen=True, slots=True)
class Limit:
    """Least seconds of some operators, by what bounds each; they add up."""

    memory: float = 0.0
    compute: float = 0.0
    #: Of these, operators with multiply-accumulates.
    products: float = 0.0
    #: Calls of operators without them that move anything.
    moves: int = 0

    @property
    def seconds(self) -> float:
        """All of them, one after the other."""
        return self.memory + self.compute

    def __add__(self, other: Limit) -> Limit:
        return Limit(
            self.memory + other.memory,
            self.compute + other.compute,
            self.products + other.products,
            self.moves + other.moves,
        )


@dataclass(frozen=True, slots=True)
class Judgement:
    """Work, the time it took, and the time it takes at least; they add up. What is not known is None."""

    work: Work = field(default_factory=Work)
    spent: Spent | None = None
    limit: Limit | None = None

    def __add__(self, other: Judgement) -> Judgement:
        spent = self.spent if other.spent is None else other.spent if self.spent is None else self.spent + other.spent
        limit = self.limit if other.limit is None else other.limit if self.limit is None else self.limit + other.limit
        return Judgement(self.work + other.work, spent, limit)

    @property
    def seconds(self) -> float | None:
        """What it took."""
        return None if self.spent is None else self.spent.seconds

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.work.bytes_read + self.work.bytes_written

    @property
    def flops_rate(self) -> float | None:
        """Executed operations a second; None without a time."""
        return self.work.executed_flops / self.seconds if self.seconds else None

    @property
    def bytes_rate(self) -> float | None:
        """Bytes a second; None without a time."""
        return self.bytes / self.seconds if self.seconds else None

    @property
    def intensity(self) -> float:
        """Executed operations a byte; infinite where nothing is moved."""
        return intensity(self.work.executed_flops, self.bytes)

    @property
    def efficiency(self) -> float | None:
        """Part of the roofline that is reached; above 1 where caches served what is counted as the memory's traffic.
        None without a time or a limit."""
        return self.limit.seconds / self.seconds if self.limit is not None and self.seconds else None

    @property
    def lost(self) -> float | None:
        """Seconds beyond the limit, never less than 0; None without a time or a limit."""
        if self.limit is None or self.seconds is None:
            return None
        return max(0.0, self.seconds - self.limit.seconds)

    @property
    def bound(self) -> Verdict | None:
        """What bounds most of it; None without a limit, or where nothing is done."""
        if self.limit is None or not self.limit.seconds:
            return None
        if self.efficiency is not None and self.efficiency < LATENCY:
            return "latency"
        return "compute" if self.limit.compute > self.limit.memory else "memory"

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings, for ``json.dumps``; what is not known or not finite is None."""
        names = ("seconds", "flops_rate", "bytes_rate", "intensity", "efficiency", "lost", "bound")
        found = {name: getattr(self, name) for name in names}
        finite = {name: None if value == math.inf else value for name, value in found.items()}
        return {**finite, "roofline_seconds": None if self.limit is None else self.limit.seconds}


_ByPhase = dict[str, Judgement]


class Judged:
    """A report, judged. Names of modules are those of ``Counts``; "" stands for the whole, and its own for what lies
    between modules.

    Work is judged where its time went: that of a module without a time of its own in a phase (one inside a compiled
    one, say) belongs to the nearest module above that has one.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        root = report.counts.root
        self._own = _own(root, report.timing, report.limits, report.workload.precision)
        self._totals = _totals(root, self._own)

    def own(self, name: str, phase: Phase | None = None) -> Judgement:
        """A module without those below it, in a phase or in all."""
        return _of(self._own[name], phase)

    def total(self, name: str, phase: Phase | None = None) -> Judgement:
        """A module and all below it, in a phase or in all. Communication is in none."""
        return _of(self._totals[name], phase)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those in which anything was counted or timed."""
        return tuple(phase for phase in PHASES if phase in self._totals[""])

    @property
    def seconds(self) -> float | None:
        """One step without the profiler where that was measured, else with it; None if nothing was timed."""
        timing = self.report.timing
        return None if timing is None else (timing.plain_seconds or timing.step_seconds)

    @property
    def model_flops(self) -> int:
        """Of the products, attention and convolutions of forward and backward pass, by the dense convention."""
        return 2 * sum(self.report.counts.total(phase).macs for phase in MODEL_PHASES)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization: ``model_flops`` a second over the peak (Chowdhery et al. 2022, appendix B)."""
        return self._utilization(self.model_flops)

    @property
    def hfu(self) -> float | None:
        """Hardware FLOPs utilization: the same with what activation checkpointing computes again."""
        return self._utilization(self.model_flops + 2 * self.report.counts.total("recompute").macs)

    def _utilization(self, flops: int) -> float | None:
        limits = self.report.limits
        if limits is None or not self.seconds:
            return None
        return flops / self.seconds / limits.peak(self.report.workload.precision)

    @property
    def detail_seconds(self) -> float | None:
        """What the times of modules and phases add up to: one step while it was timed, in so far as that took another
        time than ``seconds``; None where both are the same within ``NOTICED``."""
        timing = self.report.timing
        if timing is None or not self.seconds or abs(timing.step_seconds / self.seconds - 1) < NOTICED:
            return None
        return timing.step_seconds

    @property
    def efficiency(self) -> float | None:
        """Part of the roofline that the step as a whole reaches in ``seconds``, idle time and communication with it."""
        limit = self.total("").limit
        return limit.seconds / self.seconds if limit and self.seconds else None

    @property
    def samples_per_second(self) -> float | None:
        """Of this process."""
        return _ratio(self.report.workload.samples, self.seconds)

    @property
    def tokens_per_second(self) -> float | None:
        """Of this process."""
        return _ratio(self.report.workload.tokens, self.seconds)

    @property
    def joules_per_sample(self) -> float | None:
        """Of this process's device."""
        return _ratio(self._joules, self.report.workload.samples)

    @property
    def joules_per_token(self) -> float | None:
        """Of this process's device."""
        return _ratio(self._joules, self.report.workload.tokens)

    @property
    def watts(self) -> float | None:
        """Mean power of this process's device."""
        return _ratio(self._joules, self.seconds)

    @property
    def _joules(self) -> float | None:
        return None if self.report.energy is None else self.report.energy.joules

    @property
    def communication(self) -> Spent:
        """Collectives of the timed step; nothing if it was not timed."""
        timing = self.report.timing
        return Spent() if timing is None else sum(timing.communication.values(), Spent())

    def to_dict(self) -> dict[str, Any]:
        """The whole step's numbers and every module's, for ``json.dumps``."""
        names = ("seconds", "model_flops", "mfu", "hfu", "efficiency", "samples_per_second", "tokens_per_second")
        energy = ("watts", "joules_per_sample", "joules_per_token")
        modules = {
            name: {"own": self.own(name).to_dict(), "total": self.total(name).to_dict()} for name in self._totals
        }
        return {**{name: getattr(self, name) for name in (*names, *energy)}, "modules": modules}


def _ratio(number: float | None, of: float | None) -> float | None:
    return number / of if number is not None and of else None


def _of(phases: _ByPhase, phase: Phase | None) -> Judgement:
    if phase is not None:
        return phases.get(phase, Judgement())
    return sum(phases.values(), Judgement())


def _own(root: ModuleCounts, timing: Timing | None, limits: Ceilings | None, precision: str) -> dict[str, _ByPhase]:
    """Own work, time and limit of every module by phase, work where its time went."""
    found: dict[str, _ByPhase] = {module.name: {} for module in root.walk()}
    timed, nothing = _timed(timing, found), None if limits is None else Limit()

    def visit(module: ModuleCounts, above: Mapping[str, str]) -> None:
        takes = {**above, **dict.fromkeys(timed.get(module.name, {}), module.name)}
        for phase, operators in module.own.items():
            place = found[takes.get(phase, module.name)]
            counted = Judgement(sum(operators.values(), Work()), None, _limit(operators.values(), limits, precision))
            place[phase] = place.get(phase, Judgement()) + counted
        for child in module.children:
            visit(child, takes)

    visit(root, {})
    for name, phases in timed.items():
        for phase, spent in phases.items():
            # What nothing was counted for takes at least no time.
            found[name][phase] = found[name].get(phase, Judgement(Work(), None, nothing)) + Judgement(Work(), spent)
    return found


def _timed(timing: Timing | None, known: Iterable[str]) -> dict[str, dict[str, Spent]]:
    """Time by module and phase; of a module that was not counted, between modules."""
    found: dict[str, dict[str, Spent]] = {}
    if timing is not None:
        names = set(known)
        for name, phases in timing.modules.items():
            place = found.setdefault(name if name in names else "", {})
            for phase, kernels in phases.items():
                spent = sum(kernels.values(), Spent())
                place[phase] = place.get(phase, Spent()) + spent
    return found


def _limit(operators: Iterable[Work], limits: Ceilings | None, precision: str) -> Limit | None:
    if limits is None:
        return None
    found = Limit()
    for work in operators:
        flops = work.executed_flops if work.macs else 0
        seconds, bound = roofline(limits, flops, work.bytes_read + work.bytes_written, precision)
        found += Limit(
            memory=seconds if bound == "memory" else 0.0,
            compute=seconds if bound == "compute" else 0.0,
            products=seconds if work.macs else 0.0,
            moves=work.operators if seconds and not work.macs else 0,
        )
    return found


def _totals(root: ModuleCounts, own: dict[str, _ByPhase]) -> dict[str, _ByPhase]:
    """Every module's sum over itself and all below it, by phase."""
    found: dict[str, _ByPhase] = {}

    def visit(module: ModuleCounts) -> None:
        totals = dict(own[module.name])
        for child in module.children:
            visit(child)
            for phase, judgement in found[child.name].items():
                totals[phase] = totals.get(phase, Judgement()) + judgement
        found[module.name] = totals

    visit(root)
    return found
