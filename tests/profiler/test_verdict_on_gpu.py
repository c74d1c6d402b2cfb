"""The roofline's verdicts on a GPU, beside times that CUDA events give."""

from __future__ import annotations

import statistics

import pytest
import torch

from profiler import Judged, profile
from profiler.ceilings import ceilings

pytestmark = pytest.mark.gpu


def by_events(step, repeats=21) -> float:
    """Median seconds of a step on the device, launches in a row so that the host is ahead."""
    for _ in range(5):
        step()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    for mark in marks[:-1]:
        mark.record()
        step()
    marks[-1].record()
    torch.cuda.synchronize()
    return statistics.median(one.elapsed_time(other) for one, other in zip(marks, marks[1:], strict=False)) / 1e3


@pytest.mark.parametrize(("rows", "bound"), [(16, "memory"), (8192, "compute")])
def test_products_are_judged_as_they_are_measured(rows, bound):
    # The weights are larger than any cache.
    inner, columns = 8192, 16384
    x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(inner, columns, device="cuda", dtype=torch.bfloat16)
    limits = ceilings("cuda")

    def step():
        return x @ weight

    report = profile(step, device="cuda", precision="bf16", limits=limits, warm_up=5, repeats=9, energy=False)
    found = Judged(report).own("", "forward")
    moved = 2 * (rows * inner + inner * columns + rows * columns)
    least = max(2 * rows * inner * columns / limits.peak("bf16"), moved / limits.bandwidth)
    assert found.bound == bound
    assert found.limit.seconds == pytest.approx(least)
    assert found.efficiency == pytest.approx(least / by_events(step), abs=0.05)
