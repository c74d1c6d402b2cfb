"""The page's text: what was profiled, the cards of figures, the step's parts, advice, notes. Plain strings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from profiler.advice import HotSpot, hot_spots, remarks
from profiler.ceilings import BANDWIDTH, Source
from profiler.judge import Judged
from profiler.summary import executed_differs
from profiler.units import joules, many, percentage, quantity, seconds

#: Cards in a row, at most.
WIDEST = 6
#: What the colours of the flame graph stand for.
REACHED = ("under 10%", "10 to 30%", "30 to 60%", "over 60% of the roofline")

_MODES = {"training": "training step", "inference": "inference", "call": "one call"}
_PHASES = {"forward": "forward", "recompute": "recompute", "backward": "backward", "step": "optimizer step"}
_SOURCES: dict[Source, str] = {"table": "its datasheet", "nvml": "NVML", "measured": "measured here"}


@dataclass(frozen=True, slots=True)
class Card:
    """One figure: what it is, the number, its unit, and a line below it."""

    label: str
    number: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the step: its key in the style sheet, and its part of all."""

    key: str
    label: str
    time: str
    percent: str
    share: float


def text(judged: Judged) -> dict[str, Any]:
    """What the template is given."""
    report = judged.report
    cards = list(_cards(judged))
    return {
        "title": report.name,
        "facts": list(_facts(judged)),
        "cards": cards,
        # Rows of the same length, as nearly as it goes.
        "columns": math.ceil(len(cards) / math.ceil(len(cards) / WIDEST)),
        "parts": list(_parts(judged)),
        "timed": _timed(judged),
        "reached": REACHED if report.timing is not None and report.limits is not None else (),
        "advice": [_advice(spot) for spot in hot_spots(judged)],
        "remarks": [_sentence(remark.text) for remark in remarks(judged)],
        "roofline": _roofline(judged),
        "unknown": sorted(report.counts.unknown.items(), key=lambda item: -item[1]),
        "notes": list(_notes(judged)),
    }


def _facts(judged: Judged) -> Iterator[str]:
    report, load = judged.report, judged.report.workload
    yield _MODES[load.mode]
    yield load.precision
    if load.samples is not None:
        yield many(load.samples, "sample")
    if load.tokens is not None:
        yield many(load.tokens, "token")
    if load.micro_batches > 1:
        yield f"{load.micro_batches} micro-batches"
    if load.world_size > 1:
        degrees = f"data parallel {load.data_parallel}, tensor parallel {load.tensor_parallel}"
        yield f"rank {load.rank} of {load.world_size} ({degrees})"
    device = report.machine.get("device") or (report.limits.device if report.limits else None)
    if device:
        yield device
    yield from (f"{name} {version}" for name, version in report.machine.items() if name != "device")


def _cards(judged: Judged) -> Iterator[Card]:
    report, load, total = judged.report, judged.report.workload, judged.report.counts.total()
    yield from _speed(judged)
    if report.energy is not None:
        each = [
            f"{joules(taken)} a {what}"
            for what, taken in (("sample", judged.joules_per_sample), ("token", judged.joules_per_token))
            if taken is not None
        ]
        watts = [] if judged.watts is None else [f"{judged.watts:,.0f} W on average"]
        yield Card("Energy a step", *_split(joules(report.energy.joules)), ", ".join(each + watts))
    forward = report.counts.total("forward").flops
    note = f"{percentage(forward / total.flops)} of it forward" if total.flops and forward != total.flops else ""
    if executed_differs(judged):
        executed = f"{quantity(total.executed_flops)} executed"
        note = f"{note}, {executed}" if note else executed
    yield Card("Operations a step", *_split(quantity(total.flops, "FLOP")), note)
    moved = f"{quantity(total.bytes_read, 'B')} read, {quantity(total.bytes_written, 'B')} written"
    yield Card("Memory traffic", *_split(quantity(total.bytes_read + total.bytes_written, "B")), moved)
    root = report.counts.root
    yield Card("Parameters", *_split(quantity(root.total_parameters)), quantity(root.total_parameter_bytes, "B"))
    kept = "kept for the backward pass" if load.mode == "training" else "alive after the forward pass"
    yield Card("Activations", *_split(quantity(root.total_activation_bytes, "B")), kept)


def _speed(judged: Judged) -> Iterator[Card]:
    report, timing, limit = judged.report, judged.report.timing, judged.total("").limit
    best = "" if limit is None or not limit.seconds else f"{seconds(limit.seconds)} by the roofline"
    if timing is None:
        if best:
            yield Card("Least step time", *_split(seconds(limit.seconds if limit else None)), "by the roofline")
        return
    yield Card("Step time", *_split(seconds(judged.seconds)), best and f"at least {best}")
    rates = (("Samples a second", judged.samples_per_second), ("Tokens a second", judged.tokens_per_second))
    for label, rate in rates:
        if rate is not None:
            yield Card(label, *_split(quantity(rate)), "of this process" if report.workload.world_size > 1 else "")
    if judged.mfu is not None:
        hardware = "" if judged.hfu in (None, judged.mfu) else f"{percentage(judged.hfu)} with what is recomputed"
        peak = quantity(report.limits.peak(report.workload.precision) if report.limits else None, "FLOP/s")
        yield Card("Model FLOPs utilization", *_percent(judged.mfu), hardware or f"of {peak}")
    if judged.efficiency is not None:
        yield Card("Of the roofline", *_percent(judged.efficiency), "of what the limits allow")


def _parts(judged: Judged) -> Iterator[Part]:
    timing = judged.report.timing
    if timing is None:
        return
    spent: list[tuple[str, str, float]] = []
    spent += [(phase, _PHASES[phase], judged.total("", phase).seconds or 0.0) for phase in judged.phases]
    spent += [("communication", "communication", judged.communication.seconds), ("idle", "idle", timing.idle_seconds)]
    whole = sum(taken for _, _, taken in spent)
    for key, label, taken in spent:
        if taken:
            yield Part(key, label, seconds(taken), percentage(taken / whole), round(taken / whole, 5))


def _timed(judged: Judged) -> str:
    """What the parts add up to, where that is not the step time as it stands on its card."""
    if judged.detail_seconds is None:
        return ""
    return (
        f"The figures above are of the plain step, {seconds(judged.seconds)}; what phases and modules take is of the "
        f"step while it was timed, {seconds(judged.detail_seconds)}."
    )


def _advice(spot: HotSpot) -> dict[str, str]:
    judgement, alike = spot.judgement, f"{len(spot.modules)} alike" if len(spot.modules) > 1 else ""
    taken = f"{seconds(judgement.seconds)} at {percentage(judgement.efficiency)} of the roofline"
    return {
        "name": spot.name,
        "lost": seconds(judgement.lost),
        "facts": " · ".join(filter(None, (spot.kind, alike, taken))),
        "text": " ".join(_sentence(advice.text) for advice in spot.advice),
    }


def _roofline(judged: Judged) -> str:
    limits, precision = judged.report.limits, judged.report.workload.precision
    if limits is None:
        return ""
    where = "where it ran" if judged.report.timing else "where it could run at best, as nothing was timed"
    return (
        f"Each dot is what a module does itself, {where}. Left of the ridge, at {quantity(limits.ridge(precision))} "
        f"operations a byte for {precision}, memory sets the limit; right of it, arithmetic."
    )


def _notes(judged: Judged) -> Iterator[str]:
    report, timing, limits = judged.report, judged.report.timing, judged.report.limits
    yield from map(_sentence, report.notes)
    if timing is None:
        yield "Nothing was timed."
    else:
        clock = "records of the GPU's kernels" if timing.clock == "device" else "wall clock"
        warm = f" after {timing.warm_up} to warm up" if timing.warm_up else ""
        plain = (
            f", {timing.step_seconds / timing.plain_seconds:.2f} times the plain step" if timing.plain_seconds else ""
        )
        steps = f"the median of {timing.steps} steps" if timing.steps > 1 else "one step"
        yield f"Times: {clock}; {steps}{warm}. While timed, a step took {seconds(timing.step_seconds)}{plain}."
    if limits is not None:
        peak, memory = limits.sources[report.workload.precision], limits.sources[BANDWIDTH]
        clock = f", at the {limits.clock} MHz it is held to" if limits.clock else ""
        document = f" ({limits.document})" if limits.document else ""
        sources = f"peak from {_SOURCES[peak]}{clock}, bandwidth from {_SOURCES[memory]}{document}"
        yield f"Limits of {limits.device}: {sources}."
    cost = f"Profiling took {seconds(report.counting_seconds)} to count"
    yield f"{cost} and {seconds(report.timing_seconds)} to time." if timing else f"{cost}."


def _split(written: str) -> tuple[str, str]:
    number, _, unit = written.partition(" ")
    return number, unit


def _percent(share: float) -> tuple[str, str]:
    return percentage(share).rstrip("%"), "%"


def _sentence(said: str) -> str:
    return said[:1].upper() + said[1:] + ("" if said.endswith(".") else ".") if said else ""
