"""Where the time goes: the modules that lose most to their limit, and what would help, by a few rules over numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from profiler.ceilings import BANDWIDTH
from profiler.counts import ModuleCounts, Phase
from profiler.judge import Judged, Judgement, Limit
from profiler.units import many, percentage, quantity, seconds

Help = Literal["batch", "ceilings", "communication", "fuse", "kernels", "launches", "precision", "quantize"]

BETWEEN, STEP = "(between modules)", "(optimizer step)"

#: Kernels, or operators on a CPU, below this are mostly launch and ramp: seconds.
SHORT = 10e-6
#: Above this part of the roofline there is little left to win.
NEAR = 0.8
#: Idle time and communication are named from this part of the step on.
NOTABLE = 0.1
#: A precision is named if its peak is so many times the present one's.
FASTER = 1.5


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing that would help, and the numbers that say so."""

    help: Help
    text: str


@dataclass(frozen=True, slots=True)
class HotSpot:
    """Modules that are alike (same class, same sizes, names that differ in their numbers), without those below them."""

    #: ``encoder.layer.*.output.dense``; "(between modules)" and "(optimizer step)" are no modules.
    name: str
    kind: str
    #: Names as in ``Counts``.
    modules: tuple[str, ...]
    judgement: Judgement
    #: Of the operators of a CPU, or the kernels of a GPU.
    evidence: str
    advice: tuple[Advice, ...]

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings, for ``json.dumps``."""
        advice = [asdict(one) for one in self.advice]
        plain = {"name": self.name, "kind": self.kind, "modules": list(self.modules), "evidence": self.evidence}
        return {**plain, **self.judgement.to_dict(), "advice": advice}


def hot_spots(judged: Judged, top: int = 3) -> tuple[HotSpot, ...]:
    """The ``top`` groups of modules with most seconds beyond their limit; none without times or limits."""
    groups = [group for group in _groups(judged) if group.judgement.lost]
    groups.sort(key=lambda group: group.judgement.lost or 0.0, reverse=True)
    return tuple(_spot(group) for group in groups[:top])


def remarks(judged: Judged) -> tuple[Advice, ...]:
    """What would help the step as a whole: time in which the device waits, and communication."""
    timing, found = judged.report.timing, []
    if timing is None or not timing.step_seconds:
        return ()
    idle = timing.idle_seconds / timing.step_seconds
    if idle >= NOTABLE:
        calls = sum(timing.own(name).calls for name in timing.modules)
        text = (
            f"the device is idle for {percentage(idle)} of the step ({seconds(timing.idle_seconds)}, "
            f"{many(calls, 'kernel')}): a CUDA graph, {_fused(judged)}, or larger batches"
        )
        found.append(Advice("launches", text))
    share = judged.communication.seconds / timing.step_seconds
    if share >= NOTABLE:
        text = (
            f"communication takes {percentage(share)} of the step ({seconds(judged.communication.seconds)}): "
            "overlap it, compress it, or accumulate more micro-batches"
        )
        found.append(Advice("communication", text))
    limits, reached = judged.report.limits, judged.efficiency
    if limits is not None and limits.sources[BANDWIDTH] == "measured" and reached is not None and reached > 1:
        text = (
            f"the step is at {percentage(reached)} of the roofline: caches serve it, or the limits were measured on a "
            "busy machine. Measure them again on an idle one: profiler.ceilings.ceilings(device, measure=True)"
        )
        found.append(Advice("ceilings", text))
    return tuple(found)


def _fused(judged: Judged) -> str:
    """Where the same work takes fewer launches and passes: slipstream's runtime chooses among sets of kernels, other
    models can be compiled."""
    return "a kernel set that fuses more" if judged.report.workload.mode == "inference" else "torch.compile"


@dataclass(frozen=True, slots=True)
class _Group:
    name: str
    modules: tuple[ModuleCounts, ...]
    judgement: Judgement
    judged: Judged

    @property
    def limit(self) -> Limit:
        return self.judgement.limit or Limit()

    @property
    def efficiency(self) -> float:
        return self.judgement.efficiency or 0.0

    @property
    def calls(self) -> int:
        return self.judgement.spent.calls if self.judgement.spent else 0

    @property
    def what(self) -> str:
        timing = self.judged.report.timing
        return "operator" if timing is not None and timing.clock == "host" else "kernel"


def _groups(judged: Judged) -> list[_Group]:
    alike: dict[tuple[str, str, int], list[ModuleCounts]] = defaultdict(list)
    root, *modules = judged.report.counts.root.walk()
    for module in modules:
        pattern = ".".join("*" if part.isdigit() else part for part in module.name.split("."))
        alike[pattern, module.kind, module.parameters].append(module)
    found = [
        _Group(pattern if len(several) > 1 else several[0].name, tuple(several), _sum(judged, several), judged)
        for (pattern, _, _), several in alike.items()
    ]
    between: list[Phase] = [phase for phase in judged.phases if phase != "step"]
    outside = sum((judged.own("", phase) for phase in between), Judgement())
    found.append(_Group(BETWEEN, (root,), outside, judged))
    found.append(_Group(STEP, (root,), judged.own("", "step"), judged))
    return found


def _sum(judged: Judged, modules: list[ModuleCounts]) -> Judgement:
    return sum((judged.own(module.name) for module in modules), Judgement())


def _spot(group: _Group) -> HotSpot:
    evidence = (
        f"{many(group.calls, group.what)}, "
        f"{percentage(group.efficiency)} of the roofline, {seconds(group.judgement.lost)} lost"
    )
    kind, names = group.modules[0].kind, tuple(module.name for module in group.modules)
    return HotSpot(group.name, kind, names, group.judgement, evidence, _advice(group))


# ---- the rules: the first that has something to say is heard ----


def _advice(group: _Group) -> tuple[Advice, ...]:
    if group.efficiency >= NEAR:
        return ()
    return next(found for found in (rule(group) for rule in RULES) if found)


def _uncounted(group: _Group) -> tuple[Advice, ...]:
    """Time, and nothing counted for it."""
    if group.limit.seconds:
        return ()
    return (Advice("kernels", "nothing that it ran has a cost: see the operators without a formula"),)


def _short(group: _Group) -> tuple[Advice, ...]:
    """Far below the roofline, in calls too short to fill anything."""
    spent = group.judgement.spent
    if group.judgement.bound != "latency" or spent is None or not spent.calls or spent.seconds / spent.calls > SHORT:
        return ()
    each = f"{group.what}s of {seconds(spent.seconds / spent.calls)} are mostly overhead"
    return (Advice("batch", f"{each}: larger batches give each more to do, {_fused(group.judged)} makes them fewer"),)


def _elementwise(group: _Group) -> tuple[Advice, ...]:
    """Most of its limit is memory traffic between three or more operators without products."""
    moving = group.limit.seconds - group.limit.products
    if group.limit.moves < 3 * len(group.modules) or moving < group.limit.seconds / 2:
        return ()
    moved = f"{group.limit.moves} operators without products pass {quantity(group.judgement.bytes, 'B')} through memory"
    if group.name == STEP:
        return (Advice("fuse", f"{moved}: an optimizer with fused=True passes each tensor once"),)
    return (Advice("fuse", f"{moved}: {_fused(group.judged)} passes it once"),)


def _lower_precision(group: _Group) -> tuple[Advice, ...]:
    """Bound by compute in a precision that the device has a faster one for."""
    limits, present = group.judged.report.limits, group.judged.report.workload.precision
    if limits is None or present not in ("fp32", "tf32") or group.limit.compute < group.limit.seconds / 2:
        return ()
    faster = [name for name in ("tf32", "bf16", "fp16") if name in limits.flops]
    best = max(faster, key=limits.peak, default=present)
    times = limits.peak(best) / limits.peak(present)
    if times < FASTER:
        return ()
    return (Advice("precision", f"bound by compute in {present}: the peak of {best} is {times:.1f} times as high"),)


def _weights(group: _Group) -> tuple[Advice, ...]:
    """Products that memory bounds, and that read weights more than anything else."""
    report, products = group.judged.report, group.limit.products
    forward = [module.own.get("forward", {}) for module in group.modules]
    counted = [work for operators in forward for work in operators.values() if work.macs]
    calls = [module.calls.get("forward", 1) for module in group.modules]
    weights = sum(module.parameter_bytes * n for module, n in zip(group.modules, calls, strict=True))
    elements = sum(module.parameters * n for module, n in zip(group.modules, calls, strict=True))
    read = sum(work.bytes_read for work in counted)
    by_memory = products - group.limit.compute >= group.limit.seconds / 2
    if report.limits is None or not by_memory or not elements or not read or weights < read / 2:
        return ()
    rows = sum(work.macs for work in counted) / elements
    # 2 rows operations for each element that is read: from here on they take longer than reading it.
    enough = report.limits.ridge(report.workload.precision) * weights / elements / 2
    found = [Advice("batch", f"each weight read serves {rows:.0f} rows; {enough:.0f} would keep the products busy")]
    if report.workload.mode != "training":
        share = min(1.0, weights / read)
        found.insert(0, Advice("quantize", f"weights are {percentage(share)} of what the products read"))
    return tuple(found)


def _kernels(group: _Group) -> tuple[Advice, ...]:
    """Nothing else explains it."""
    ceiling = "the peak" if group.judgement.bound == "compute" else "the bandwidth"
    other = "another kernel set" if group.judged.report.workload.mode == "inference" else "torch.compile"
    text = f"{group.what}s that reach {percentage(group.efficiency)} of {ceiling}: {other}, or larger batches"
    return (Advice("kernels", text),)


RULES: tuple[Callable[[_Group], tuple[Advice, ...]], ...] = (
    _uncounted,
    _short,
    _elementwise,
    _lower_precision,
    _weights,
    _kernels,
)
