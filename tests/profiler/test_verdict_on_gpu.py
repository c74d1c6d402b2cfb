"""The roofline's verdicts on a GPU, beside times that CUDA events give."""

from __future__ import annotations

import statistics

import pytest
import torch

from profiler import Judged, profile
from profiler.ceilings import ceilings

pytestmark = pytest.mark.gpu


def by_events(step, repeats=21) -> float:
    """Median seconds of a step on the device. One at a time, as a profile runs them: in a row large products heat the
    GPU until it clocks down."""
    for _ in range(5):
        step()
    seconds = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000)  # cycles in which the host gets ahead
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


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
