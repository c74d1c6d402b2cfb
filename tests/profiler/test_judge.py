"""How far from the limit: each number against its closed form."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from profiler import ProfilerError, Spent, Work
from profiler.counts import Counts, ModuleCounts
from profiler.judge import Judged, Judgement
from profiler.report import Energy, Report, Workload
from profiler.times import Timing
from tests.profiler.reports import LIMITS, branch, elementwise, hand_made, leaf, product, timing_of


def report_of(*modules: ModuleCounts, times=None, workload=None, **more) -> Report:
    counts = Counts(ModuleCounts("", "", children=(branch("Net", "Net", *modules),)))
    timing = timing_of(counts) if times is None else Timing(clock="device", modules=times, step_seconds=1.0)
    return Report("Net", workload or Workload(), counts, timing, LIMITS, **more)


def test_a_large_product_is_bound_by_compute():
    work = product(4096, 4096, 4096)
    found = Judged(report_of(leaf("big", "Linear", forward={"aten.mm": work}))).own("big")
    assert found.bound == "compute"
    assert found.limit.seconds == 2 * 4096**3 / LIMITS.flops["fp32"]
    assert found.efficiency == pytest.approx(0.5)
    assert found.flops_rate == pytest.approx(0.5e12)
    assert found.lost == pytest.approx(found.limit.seconds)


def test_a_product_with_few_rows_and_an_elementwise_chain_are_bound_by_memory():
    skinny, chain = product(1, 4096, 4096), elementwise(1 << 20, calls=8)
    judged = Judged(report_of(leaf("s", "Linear", forward={"mm": skinny}), leaf("c", "Act", forward={"mul": chain})))
    for name, work in (("s", skinny), ("c", chain)):
        found = judged.own(name)
        moved = work.bytes_read + work.bytes_written
        assert found.bound == "memory"
        assert found.limit.seconds == moved / LIMITS.bandwidth
        assert found.bytes_rate == pytest.approx(LIMITS.bandwidth / 2)
        assert found.intensity == work.flops / moved


def test_operators_without_products_are_not_held_against_the_peak():
    busy = Work(1, flops=10**12, executed_flops=10**12, bytes_read=4, bytes_written=4)
    assert Judged(report_of(leaf("m", "Act", forward={"x": busy}))).own("m").limit.seconds == 8 / LIMITS.bandwidth


def test_masked_work_is_judged_by_what_is_executed():
    half = replace(product(512, 512, 512), executed_flops=512**3)
    judged = Judged(report_of(leaf("a", "Attention", forward={"sdpa": half})))
    assert judged.own("a").limit.seconds == max(512**3 / 1e12, 3 * 512 * 512 * 4 / 100e9)


def test_the_limit_is_the_sum_of_the_operators_limits():
    big, chain = product(2048, 2048, 2048), elementwise(1 << 22)
    found = Judged(report_of(leaf("m", "M", forward={"mm": big, "mul": chain}))).own("m")
    assert found.limit.compute == big.flops / 1e12
    assert found.limit.memory == pytest.approx(2 * 4 * (1 << 22) / 100e9)
    assert found.limit.products == found.limit.compute
    assert found.bound == "compute"


def test_far_below_both_limits_it_is_latency():
    module = leaf("m", "M", forward={"mm": product(8, 8, 8)})
    for seconds, bound in ((1e-3, "latency"), (1e-8, "memory")):
        times = {"m": {"forward": {"mm": Spent(seconds, 1)}}}
        assert Judged(report_of(module, times=times)).own("m").bound == bound


def test_own_and_totals_add_up():
    judged = Judged(hand_made())
    modules = [module.name for module in judged.report.counts.root.walk()]
    own = sum((judged.own(name) for name in modules), Judgement())
    whole = judged.total("")
    assert own.work == whole.work == judged.report.counts.total()
    assert own.seconds == pytest.approx(whole.seconds)
    assert whole.seconds == pytest.approx(judged.report.timing.busy_seconds)
    assert own.limit.seconds == pytest.approx(whole.limit.seconds)
    assert sum(judged.total("", phase).seconds for phase in judged.phases) == pytest.approx(whole.seconds)
    assert judged.phases == ("forward", "backward", "step")


def test_work_is_judged_where_its_time_went():
    work = product(512, 512, 512)
    inner = branch("block", "Block", leaf("block.linear", "Linear", forward={"mm": work}, backward={"mm": work + work}))
    times = {"block": {"forward": {"fused": Spent(1e-3, 1)}}, "block.linear": {"backward": {"mm": Spent(2e-3, 2)}}}
    judged = Judged(report_of(inner, times=times))
    assert judged.own("block", "forward").work == work
    assert judged.own("block.linear", "forward") == Judgement()
    assert judged.own("block.linear", "backward").work == work + work
    assert judged.total("").work == work + work + work


def test_time_of_modules_that_were_not_counted_lies_between_modules():
    judged = Judged(report_of(leaf("m", "M"), times={"other": {"forward": {"k": Spent(0.5, 1)}}}))
    assert judged.own("").seconds == judged.total("").seconds == 0.5


def test_utilization_leaves_out_what_is_computed_again():
    work = product(512, 512, 512)
    module = leaf("m", "M", forward={"mm": work}, recompute={"mm": work}, backward={"mm": work + work})
    report = report_of(module)
    judged = Judged(replace(report, timing=replace(report.timing, plain_seconds=0.01, step_seconds=0.02)))
    assert judged.model_flops == 6 * 512**3
    assert judged.mfu == pytest.approx(6 * 512**3 / 0.01 / 1e12)
    assert judged.hfu == pytest.approx(8 * 512**3 / 0.01 / 1e12)


def test_utilization_is_of_the_peak_in_the_workloads_precision():
    report = hand_made()
    low = replace(report, workload=replace(report.workload, precision="bf16"))
    assert Judged(low).mfu == pytest.approx(Judged(report).mfu / 4)
    with pytest.raises(ProfilerError, match="Test device has no ceiling for fp8; there are fp32, bf16"):
        replace(report, workload=replace(report.workload, precision="fp8"))


def test_throughput_and_energy():
    report = report_of(leaf("m", "M"), workload=Workload(samples=4, tokens=100), energy=Energy(2.0, "counter"))
    judged = Judged(replace(report, timing=replace(report.timing, plain_seconds=0.5)))
    assert (judged.samples_per_second, judged.tokens_per_second) == (8, 200)
    assert (judged.joules_per_sample, judged.joules_per_token, judged.watts) == (0.5, 0.02, 4.0)


def test_what_is_not_known_is_none():
    report = replace(hand_made(), timing=None, limits=None, energy=None)
    judged = Judged(report)
    found = judged.total("")
    for value in (judged.seconds, judged.mfu, judged.efficiency, judged.watts, judged.samples_per_second):
        assert value is None
    assert (found.seconds, found.flops_rate, found.efficiency, found.lost, found.bound) == (None,) * 5
    assert Judged(replace(report, limits=LIMITS)).total("").bound == "compute"
    assert Judgement(Work(flops=1, executed_flops=1)).intensity == math.inf
    assert Judgement(Work(flops=1, executed_flops=1)).to_dict()["intensity"] is None


def test_the_whole_step_is_that_without_the_profiler():
    """Rates, utilization and the roofline of the whole by the plain step; those of its parts by the timed one."""
    report = report_of(leaf("big", "Linear", forward={"aten.mm": product(4096, 4096, 4096)}))
    slow = replace(report, timing=replace(report.timing, plain_seconds=report.timing.step_seconds / 1.25))
    found = Judged(slow)
    assert found.seconds == slow.timing.plain_seconds
    assert found.efficiency == pytest.approx(0.5 * 1.25)
    assert found.mfu == pytest.approx(found.efficiency)
    assert found.own("big").efficiency == pytest.approx(0.5)
    assert found.detail_seconds == slow.timing.step_seconds
    assert "while it was timed, of which are the times of its parts" in str(slow)


@pytest.mark.parametrize(("times", "said"), [(1.0, False), (1.015, False), (0.985, False), (1.03, True), (0.97, True)])
def test_a_timed_step_that_is_not_as_long_is_noticed(times, said):
    report = report_of(leaf("big", "Linear", forward={"aten.mm": product(64, 64, 64)}))
    timing = replace(report.timing, plain_seconds=1.0, step_seconds=times)
    assert (Judged(replace(report, timing=timing)).detail_seconds is not None) == said
