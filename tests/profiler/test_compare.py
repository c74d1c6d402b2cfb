"""What changed between two reports."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from profiler import Spent
from profiler.compare import MODULES, compare, differences, modules, totals
from profiler.grid import display_width
from tests.profiler.reports import LIMITS, hand_made, random_reports

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=50, deadline=None, suppress_health_check=SLOW)
@given(random_reports())
def test_a_report_and_itself(report):
    assert compare(report, report) == "Nothing changed.\n"


@settings(max_examples=100, deadline=None, suppress_health_check=SLOW)
@given(random_reports(), random_reports())
def test_no_line_is_wider_than_100_columns(before, after):
    assert max(map(display_width, compare(before, after).split("\n"))) <= 100


def slower(report, module="head", seconds=1e-3):
    times = {**report.timing.modules}
    times[module] = {"forward": {"aten.mm": Spent(times[module]["forward"]["aten.mm"].seconds + seconds, 1)}}
    whole = {
        "step_seconds": report.timing.step_seconds + seconds,
        "plain_seconds": report.timing.plain_seconds + seconds,
    }
    return replace(report, timing=replace(report.timing, modules=times, **whole))


def test_one_module_takes_longer():
    before = hand_made()
    after = slower(before)
    assert differences(before, after) == {}
    changes = {change.name: change for change in totals(before, after)}
    assert "FLOPs" not in changes
    assert changes["step"].after - changes["step"].before == pytest.approx(1e-3)
    assert [change.name for change in modules(before, after)] == ["head"]
    printed = compare(before, after)
    assert "What was profiled" not in printed
    line = next(line for line in printed.split("\n") if line.startswith("head"))
    assert line.split() == ["head", "330", "us", "1.33", "ms", "+1.00", "ms", "-", "-"]
    back = next(line for line in compare(after, before).split("\n") if line.startswith("head"))
    assert back.split()[-4:] == ["-1.00", "ms", "-", "-"]


def test_modules_that_are_new_or_gone():
    two, three = hand_made(2), hand_made(3)
    added = {change.name: change.row for change in modules(two, three)}
    assert set(added) == {"layers.2", "layers.2.linear", "layers.2.act"}
    assert added["layers.2.linear"] == ["layers.2.linear", "new", "-", "6.44 ms", "+6.44 ms", "+3.22 G", "+28.3 M"]
    gone = {change.name: change.row for change in modules(three, two)}
    assert gone["layers.2.linear"] == ["layers.2.linear", "gone", "6.44 ms", "-", "-6.44 ms", "-3.22 G", "-28.3 M"]
    assert [change.name for change in totals(two, three)][:2] == ["step", "step: forward"]


def test_the_largest_change_comes_first_and_the_rest_is_summed_up():
    changes = modules(hand_made(1), hand_made(12))
    sizes = [abs(change.seconds) for change in changes]
    assert sizes == sorted(sizes, reverse=True)
    assert len(changes) == 33
    assert compare(hand_made(1), hand_made(12)).endswith(f"and {33 - MODULES} more\n")


def test_another_workload_machine_and_device():
    before = hand_made()
    after = replace(
        before,
        workload=replace(before.workload, precision="bf16", samples=8),
        machine={**before.machine, "torch": "2.12.0"},
        limits=replace(LIMITS, bandwidth=200e9),
        counts=replace(before.counts, unknown={}),
    )
    assert differences(before, after) == {
        "precision": ("fp32", "bf16"),
        "samples": ("4", "8"),
        "torch": ("2.13.0", "2.12.0"),
        "device's bandwidth": ("100 GB/s", "200 GB/s"),
        "calls of mylib.mystery, without a formula": ("3", "-"),
    }
    assert "torch: 2.13.0 -> 2.12.0" in compare(before, after)
    # Another limit changes no module's time.
    assert modules(before, after) == []


def test_one_that_was_not_timed():
    before = hand_made()
    after = replace(before, timing=None, energy=None)
    changes = {change.name: change.row for change in totals(before, after)}
    assert changes["step"] == ["step", "32.4 ms", "-", "-"]
    assert changes["energy"] == ["energy", "1.50 J", "-", "-"]
