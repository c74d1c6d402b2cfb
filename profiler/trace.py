"""A timed step as trace events, which Perfetto and chrome://tracing open.

The form is that of "Trace Event Format" (Google, 2016): complete events ("X") with times in microseconds on one track
for the host and one for each stream, and metadata ("M") that names them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from profiler.counts import ModuleCounts
from profiler.errors import ProfilerError
from profiler.report import Report
from profiler.times import Event

#: Decimals of a microsecond: nanoseconds, so that rounding cannot make events overlap that follow each other.
_DECIMALS = 3


def trace(report: Report) -> dict[str, Any]:
    """``{"traceEvents": [...]}`` for ``json.dumps``. Arguments of an event: module, class, phase and, where they were
    counted, the FLOPs of a call (the mean, where a module calls an operator more than once).

    Raises:
        ProfilerError: the events of the step were not kept.
    """
    if report.timing is None or not report.timing.events:
        raise ProfilerError(
            f"the profile of {report.name} has no events for a timeline: profile with events=True. "
            "A profile that was read from JSON has none"
        )
    events = report.timing.events
    modules = {module.name: module for module in report.counts.root.walk()}
    tracks = {track: number for number, track in enumerate(sorted({event.track for event in events}, key=_order))}
    rank = report.workload.rank
    named = [_named("process_name", rank, 0, f"{report.name}, rank {rank} of {report.workload.world_size}")]
    for track, number in tracks.items():
        named.append(_named("thread_name", rank, number, track))
        named.append({**_named("thread_sort_index", rank, number, ""), "args": {"sort_index": number}})
    complete = [
        {
            "name": event.name or "step",
            "cat": event.kind,
            "ph": "X",
            "pid": rank,
            "tid": tracks[event.track],
            **_stretch(event),
            "args": dict(_arguments(event, modules.get(event.module))),
        }
        for event in sorted(events, key=lambda event: (event.start, -event.seconds))
    ]
    return {"traceEvents": [*named, *complete], "displayTimeUnit": "ms", "otherData": dict(report.machine)}


def _order(track: str) -> tuple[bool, int, str]:
    """The host first, then streams by their numbers."""
    number = track.rpartition(" ")[2]
    return track != "host", int(number) if number.isdecimal() else 0, track


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _stretch(event: Event) -> dict[str, float]:
    # The end is rounded, not the length: events that end together still do.
    start = round(event.start * 1e6, _DECIMALS)
    end = round((event.start + event.seconds) * 1e6, _DECIMALS)
    return {"ts": start, "dur": round(end - start, _DECIMALS)}


def _arguments(event: Event, module: ModuleCounts | None) -> Iterator[tuple[str, str | int]]:
    yield "module", event.module or "between modules"
    yield "phase", event.phase
    if module is None:
        return
    yield "class", module.kind
    if event.kind == "module":
        yield "flops", module.total(event.phase).flops // max(module.calls.get(event.phase, 1), 1)
    elif event.name in (operators := module.own.get(event.phase, {})):
        yield "flops", operators[event.name].flops // operators[event.name].operators
