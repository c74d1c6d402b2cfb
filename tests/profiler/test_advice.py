"""Where the time goes, and what would help: each rule on the smallest report it speaks of, and on one it must not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from profiler import Spent
from profiler.advice import BETWEEN, STEP, hot_spots, remarks
from profiler.counts import Counts, ModuleCounts
from profiler.judge import Judged
from profiler.report import Report, Workload
from tests.profiler.reports import LIMITS, branch, elementwise, hand_made, leaf, product, timing_of


def spot(module: ModuleCounts, mode: str = "call", precision: str = "bf16", slower: float = 2.0, **more):
    counts = Counts(ModuleCounts("", "", children=(branch("Net", "Net", module),)))
    report = Report("Net", Workload(mode, precision), counts, timing_of(counts, slower, **more), LIMITS)
    return hot_spots(Judged(report))[0]


def helps(module: ModuleCounts, *args, **kwargs) -> list[str]:
    return [advice.help for advice in spot(module, *args, **kwargs).advice]


def test_the_three_that_lose_most_come_first():
    judged = Judged(hand_made())
    found = hot_spots(judged)
    assert [one.name for one in found] == ["layers.*.linear", "layers.*.act", STEP]
    assert found[0].modules == ("layers.0.linear", "layers.1.linear", "layers.2.linear")
    lost = [one.judgement.lost for one in found]
    assert lost == sorted(lost, reverse=True)
    assert lost[0] == pytest.approx(sum(judged.own(name).lost for name in found[0].modules))
    assert [one.name for one in hot_spots(judged, 9)[3:]] == ["head", BETWEEN]


def test_evidence_is_in_numbers():
    found = hot_spots(Judged(hand_made()))[0]
    assert found.evidence == "9 operators, 50% of the roofline, 9.66 ms lost"
    one = spot(leaf("m", "M", forward={"mm": product(1024, 1024, 1024)}), clock="device")
    assert one.evidence.startswith("1 kernel, ")


def test_modules_of_other_classes_or_sizes_are_not_alike():
    chain = {"mul": elementwise(1 << 22)}
    modules = [leaf("0", "A", forward=chain), leaf("1", "B", forward=chain), leaf("2", "A", 9, forward=chain)]
    counts = Counts(ModuleCounts("", "", children=(branch("Net", "Net", *modules),)))
    report = Report("Net", Workload(), counts, timing_of(counts), LIMITS)
    assert {one.name for one in hot_spots(Judged(report))} == {"0", "1", "2"}


def test_fuse_small_operators_without_products():
    chain = leaf("m", "Act", forward={"mul": elementwise(1 << 22, calls=5)})
    assert helps(chain) == ["fuse"]
    assert "5 operators without products pass 168 MB through memory" in spot(chain).advice[0].text
    assert helps(leaf("m", "Act", forward={"mul": elementwise(1 << 22)})) == ["kernels"]


def test_an_optimizer_can_be_fused():
    found = hot_spots(Judged(hand_made()))[2]
    assert "fused=True" in found.advice[0].text


def test_weights_that_serve_few_rows():
    module = leaf("m", "Linear", 4096 * 4096, forward={"mm": product(4, 4096, 4096)})
    found = spot(module, "inference")
    assert [advice.help for advice in found.advice] == ["quantize", "batch"]
    assert found.advice[0].text == "weights are 100% of what the products read"
    # 2 rows operations for 4 bytes against 40 a byte.
    assert found.advice[1].text == "each weight read serves 4 rows; 80 would keep the products busy"
    assert helps(module, "training") == ["batch"]
    without = leaf("m", "Attention", forward={"bmm": product(4, 4096, 4096)})
    assert helps(without, "inference") == ["kernels"]


def test_a_faster_precision_is_named_where_compute_bounds():
    module = leaf("m", "Linear", forward={"mm": product(4096, 4096, 4096)})
    found = spot(module, precision="fp32").advice[0]
    assert found.help == "precision"
    assert found.text == "bound by compute in fp32: the peak of bf16 is 4.0 times as high"
    assert helps(module, precision="bf16", slower=8.0) == ["kernels"]


def test_a_precision_that_is_hardly_faster_is_not_named():
    counts = Counts(ModuleCounts("", "", children=(leaf("m", "Linear", forward={"mm": product(4096, 4096, 4096)}),)))
    near = replace(LIMITS, flops={"fp32": 1e12, "bf16": 1.2e12})
    found = hot_spots(Judged(Report("m", Workload(), counts, timing_of(counts, 8.0), near)))[0]
    assert [advice.help for advice in found.advice] == ["kernels"]


def test_short_kernels_are_overhead():
    tiny = leaf("m", "Act", forward={"mul": elementwise(100, calls=4)})
    found = spot(tiny, clock="device").advice[0]
    assert found.help == "batch"
    assert found.text.startswith("kernels of 1.00 us are mostly overhead")


def test_near_the_limit_nothing_is_advised():
    assert helps(leaf("m", "Act", forward={"mul": elementwise(1 << 22, calls=5)}), slower=1.1) == []


def test_time_without_any_cost_is_said_to_be_so():
    module = leaf("m", "Mystery")
    counts = Counts(ModuleCounts("", "", children=(branch("Net", "Net", module),)))
    timing = replace(timing_of(counts), modules={"m": {"forward": {"k": Spent(1e-3, 1)}}})
    found = hot_spots(Judged(Report("Net", Workload(), counts, timing, LIMITS)))[0]
    assert "nothing that it ran has a cost" in found.advice[0].text


def test_idle_time_and_communication_are_remarked_from_a_tenth_on():
    report = hand_made()
    assert remarks(Judged(report)) == ()
    collectives = {"nccl:all_reduce": Spent(0.02, 2)}
    slow = replace(
        report, timing=timing_of(report.counts, clock="device", idle_seconds=0.03, communication=collectives)
    )
    found = remarks(Judged(slow))
    assert [one.help for one in found] == ["launches", "communication"]
    assert "idle for 36% of the step (30.0 ms, 72 kernels)" in found[0].text
    assert "communication takes 24% of the step (20.0 ms)" in found[1].text


def test_a_step_beyond_measured_limits_is_remarked():
    """A bandwidth of NVML is what it is: caches alone can be faster."""
    report = hand_made()
    fast = replace(report, timing=replace(report.timing, plain_seconds=report.timing.plain_seconds / 3))
    (found,) = remarks(Judged(fast))
    assert found.help == "ceilings"
    assert found.text.startswith("the step is at 150% of the roofline: ")
    known = replace(LIMITS, sources={**LIMITS.sources, "bandwidth": "nvml"})
    assert remarks(Judged(replace(fast, limits=known))) == ()


def test_the_runtime_has_kernel_sets_and_other_models_are_compiled():
    module = leaf("m", "Act", forward={"mul": elementwise(1 << 22, calls=5)})
    for mode, remedy in (("inference", "a kernel set that fuses more"), ("call", "torch.compile")):
        assert spot(module, mode).advice[0].text.endswith(f"through memory: {remedy} passes it once")


def test_without_times_or_limits_nothing_is_lost():
    for missing in ({"timing": None}, {"limits": None}):
        judged = Judged(replace(hand_made(), **missing))
        assert hot_spots(judged) == ()
    assert remarks(Judged(replace(hand_made(), timing=None))) == ()
