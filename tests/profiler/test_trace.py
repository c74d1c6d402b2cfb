"""A timed step as trace events: as the format wants them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from profiler import ProfilerError, profile
from profiler.times import Event
from profiler.trace import trace
from tests.profiler.reports import hand_made

US = 1e-6


def with_events(*events: Event):
    report = hand_made()
    return replace(report, timing=replace(report.timing, events=events))


def overlaps(found) -> list[str]:
    """Complete events of one track must lie within each other or apart."""
    wrong, tracks = [], {}
    for event in found["traceEvents"]:
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["tid"]), []).append(event)
    for events in tracks.values():
        stack = []
        for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
            while stack and stack[-1] <= event["ts"] + 1e-9:
                stack.pop()
            end = event["ts"] + event["dur"]
            if stack and end > stack[-1] + 1e-9:
                wrong.append(event["name"])
            stack.append(end)
    return wrong


def test_events_have_what_the_format_asks_for():
    found = trace(
        with_events(
            Event("layers.0", "module", "host", 1 * US, 10 * US, "layers.0", "forward"),
            Event("aten.addmm", "operator", "host", 2 * US, 3 * US, "layers.0.linear", "forward"),
            Event("gemm", "kernel", "stream 7", 4 * US, 5 * US, "layers.0.linear", "forward"),
            Event("fill", "kernel", "stream 10", 4 * US, 1 * US, "", "step"),
        )
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    named = {event["tid"]: event["args"]["name"] for event in found["traceEvents"] if event["name"] == "thread_name"}
    assert named == {0: "host", 1: "stream 7", 2: "stream 10"}
    layer = 2 * 2048 * 512**2 + 7 * 2048 * 512
    module, operator, kernel, fill = [event for event in found["traceEvents"] if event["ph"] == "X"]
    assert module == {
        "name": "layers.0",
        "cat": "module",
        "ph": "X",
        "pid": 0,
        "tid": 0,
        "ts": 1.0,
        "dur": 10.0,
        "args": {
            "module": "layers.0",
            "phase": "forward",
            "class": "Layer",
            "flops": layer,
        },
    }
    assert operator["args"]["flops"] == 2 * 2048 * 512**2
    assert kernel["args"] == {"module": "layers.0.linear", "phase": "forward", "class": "Linear"}
    assert (fill["tid"], fill["args"]["module"], fill["args"]["phase"]) == (2, "between modules", "step")


def test_rounding_makes_no_events_overlap():
    # A child that ends with its parent, and a neighbour that begins there, at times that microseconds cannot hold.
    start, length, child = 0.1234567891e-3, 0.0777777777e-3, 0.1555555555e-3
    found = trace(
        with_events(
            Event("parent", "module", "host", start, length, "layers", "forward"),
            Event("child", "module", "host", child, start + length - child, "layers.0", "forward"),
            Event("next", "module", "host", start + length, length, "layers", "forward"),
        )
    )
    assert overlaps(found) == []


def test_overlaps_are_seen():
    found = trace(
        with_events(
            Event("one", "module", "host", 0.0, 2 * US, "layers", "forward"),
            Event("two", "module", "host", 1 * US, 2 * US, "layers", "forward"),
        )
    )
    assert overlaps(found) == ["two"]


def test_a_real_step():
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        model(torch.randn(8, 32)).sum().backward()
        optimizer.step()

    report = profile(step, model, repeats=1, limits=None, events=True)
    found = trace(report)
    assert overlaps(found) == []
    complete = [event for event in found["traceEvents"] if event["ph"] == "X"]
    assert {"Sequential", "0", "1", "2"} <= {event["args"]["module"] for event in complete}
    assert {"forward", "backward", "step"} <= {event["args"]["phase"] for event in complete}
    product = next(event for event in complete if event["name"] == "aten.addmm" and event["args"]["module"] == "0")
    assert product["args"]["flops"] == 2 * 8 * 32 * 32
    last = max(event["ts"] + event["dur"] for event in complete)
    assert last <= report.timing.step_seconds * 1e6 * 1.01


def test_without_events_there_is_no_trace():
    for report in (hand_made(), replace(hand_made(), timing=None)):
        with pytest.raises(ProfilerError, match="the profile of Net has no events for a timeline"):
            trace(report)
