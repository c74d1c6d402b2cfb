"""A report as text of 100 columns: summary, where the time goes, aggregated by depth, the annotated tree of modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from profiler import module_tables
from profiler.advice import Advice, hot_spots, remarks
from profiler.grid import WIDTH, elide, fill, grid
from profiler.judge import Judged
from profiler.summary import cost, phases, summary
from profiler.units import percentage, seconds

if TYPE_CHECKING:
    from profiler.report import Report

#: Kernels, or operators on a CPU, that are listed: those that take longest.
KERNELS = 10


def text(report: Report, module_depth: int = -1, top_modules: int = 1, detailed: bool = True) -> str:
    """The report as tables, at most 100 columns wide.

    Args:
        module_depth: of the deepest modules shown, 0 for the model itself; -1 for all.
        top_modules: classes of modules shown for each depth.
        detailed: show every module by itself, and the kernels; else modules that are alike are one row, of their sums.
    """
    judged, folded = Judged(report), not detailed
    on_host = report.timing is not None and report.timing.clock == "host"
    sections = {
        "Summary": summary(judged),
        "By phase": phases(judged),
        "Where the time goes": _where(judged),
        "By depth": module_tables.by_depth(judged, module_depth, top_modules),
        "Modules: what they do": module_tables.work(judged, folded, module_depth),
        "Modules: how fast they are": module_tables.times(judged, folded, module_depth),
        f"Longest {'operators' if on_host else 'kernels'}": _kernels(report) if detailed else "",
        "Operators without a formula: their FLOPs are not counted": _unknown(report),
        "Notes": "\n".join(fill(note, "- ", "  ") for note in report.notes),
        "What profiling cost": cost(report),
    }
    title = elide(f"Profile of {report.name}", WIDTH)
    parts = [f"{title}\n{'=' * len(title)}"]
    parts += [f"{name}\n{'-' * len(name)}\n{content}" for name, content in sections.items() if content]
    return "\n\n".join(parts) + "\n"


def _where(judged: Judged) -> str:
    lines = []
    for number, spot in enumerate(hot_spots(judged), start=1):
        several = f" ({len(spot.modules)})" if len(spot.modules) > 1 else ""
        lines += [fill(spot.name + several, f"{number}. ", "   "), fill(spot.evidence, "   ", "   ")]
        lines += [_advice(one, "   ") for one in spot.advice]
    return "\n".join([*lines, *(_advice(one, "*  ") for one in remarks(judged))])


def _advice(advice: Advice, first: str) -> str:
    return fill(f"{advice.help}: {advice.text}", first, "   ")


def _kernels(report: Report) -> str:
    """By name, over all modules."""
    timing = report.timing
    if timing is None:
        return ""
    longest = sorted(timing.kernels().items(), key=lambda item: item[1].seconds, reverse=True)[:KERNELS]
    whole = timing.step_seconds
    table = [
        [name, f"{spent.calls:,}", seconds(spent.seconds), percentage(spent.seconds / whole if whole else None)]
        for name, spent in longest
    ]
    return grid(["kernel" if timing.clock == "device" else "operator", "calls", "time", "share"], table)


def _unknown(report: Report) -> str:
    unknown = sorted(report.counts.unknown.items(), key=lambda item: item[1], reverse=True)
    return grid(["operator", "calls"], [[name, f"{calls:,}"] for name, calls in unknown]) if unknown else ""
