"""A report as text: never wider than 100 columns, and its sections as users know them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from profiler import Spent, Work
from profiler.counts import Counts, ModuleCounts
from profiler.grid import display_width, elide, fill, grid
from profiler.report import Report, Workload
from profiler.tables import text
from profiler.units import joules, percentage, quantity, seconds
from tests.profiler.reports import LIMITS, branch, hand_made, leaf, product, random_reports, timing_of

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def section(printed: str, title: str) -> str:
    """A section's lines below its title."""
    (found,) = [part for part in printed.split("\n\n") if part.startswith(title)]
    return "\n".join(found.rstrip().split("\n")[2:])


@settings(max_examples=150, deadline=None, suppress_health_check=SLOW)
@given(random_reports(), st.integers(-1, 5), st.integers(1, 4), st.booleans())
def test_no_line_is_wider_than_100_columns(report, depth, top, detailed):
    printed = text(report, depth, top, detailed)
    assert max(map(display_width, printed.split("\n"))) <= 100


def test_summary_as_it_is_printed():
    assert (
        section(text(hand_made()), "Summary")
        == """\
workload     training, fp32, 4 samples, 2,048 tokens
device       Test device: 1.00 TFLOP/s fp32, 100 GB/s (measured)
software     torch 2.13.0
parameters   4.88 M (19.5 MB)
activations  7.00 KB alive when the forward pass ends
step         32.4 ms
throughput   123 samples/s, 63.2 K tokens/s
utilization  MFU 30% (299 GFLOP/s of products)
roofline     the step as a whole reaches 50% of it
energy       1.50 J a step, 375 mJ a sample, 732 uJ a token; 46.3 W (NVML, counter)"""
    )


def test_phases_as_they_are_printed():
    assert (
        section(text(hand_made()), "By phase")
        == """\
phase     calls    MACs   FLOPs  bytes     time  share  FLOP/s  bytes/s  roof-    bound
                                                                          line
--------  -----  ------  ------  -----  -------  -----  ------  -------  -----  -------
forward      26  1.63 G  3.28 G  221 M  10.3 ms    32%   318 G   21.5 G    50%  compute
backward     42  3.22 G  6.48 G  359 M  18.9 ms    58%   342 G   18.9 G    50%  compute
step          4       -  20.0 M  160 M  3.20 ms   9.9%  6.25 G   50.0 G    50%   memory
all          72  4.85 G  9.78 G  740 M  32.4 ms   100%   302 G   22.8 G    50%  compute"""
    )


def test_where_the_time_goes_as_it_is_printed():
    assert (
        section(text(hand_made()), "Where the time goes")
        == """\
1. layers.*.linear (3)
   9 operators, 50% of the roofline, 9.66 ms lost
   precision: bound by compute in fp32: the peak of bf16 is 4.0 times as high
2. layers.*.act (3)
   57 operators, 50% of the roofline, 4.78 ms lost
   fuse: 57 operators without products pass 478 MB through memory: torch.compile passes it once
3. (optimizer step)
   4 operators, 50% of the roofline, 1.60 ms lost
   fuse: 4 operators without products pass 160 MB through memory: an optimizer with fused=True
   passes each tensor once"""
    )


def test_trees_as_they_are_printed():
    printed = text(hand_made(), detailed=False)
    assert (
        section(printed, "Modules: what they do")
        == """\
module                        params     MACs      MACs   FLOPs   bytes  activation
                                      forward  backward                       bytes
----------------------------  ------  -------  --------  ------  ------  ----------
Net: Net                      4.88 M   1.63 G    3.22 G  9.76 G   580 M      7.00 K
├─ layers: ModuleList          788 K   1.61 G    3.22 G  9.72 G   563 M      6.00 K
│  └─ 0...2 (3 alike): Layer   788 K   1.61 G    3.22 G  9.72 G   563 M      6.00 K
│     ├─ linear: Linear        788 K   1.61 G    3.22 G  9.66 G  84.9 M      3.00 K
│     └─ act: NewGELU              -        -         -  59.8 M   478 M      3.00 K
└─ head: Linear               4.10 M   16.4 M         -  32.8 M  16.5 M      1.00 K
(between modules)                  -        -         -     100     800           -
(optimizer step)                   -        -         -  20.0 M   160 M           -"""
    )
    assert (
        section(printed, "Modules: how fast they are")
        == """\
module                 forward  backward     time  share  FLOP/s  bytes/s  roof-    bound
                                                                            line
---------------------  -------  --------  -------  -----  ------  -------  -----  -------
Net                    10.3 ms   18.9 ms  29.2 ms    90%   334 G   19.8 G    50%  compute
├─ layers              9.97 ms   18.9 ms  28.9 ms    89%   337 G   19.5 G    50%  compute
│  └─ 0...2 (3 alike)  9.97 ms   18.9 ms  28.9 ms    89%   337 G   19.5 G    50%  compute
│     ├─ linear        6.44 ms   12.9 ms  19.3 ms    60%   500 G   4.39 G    50%  compute
│     └─ act           3.52 ms   6.04 ms  9.56 ms    29%  6.25 G   50.0 G    50%   memory
└─ head                 330 us         -   330 us   1.0%  99.2 G   50.0 G    50%   memory
(between modules)      1.00 us         -  1.00 us  <0.1%   100 M    800 M   0.8%  latency
(optimizer step)             -         -  3.20 ms   9.9%  6.25 G   50.0 G    50%   memory"""
    )


def test_in_detail_every_module_has_a_row():
    printed = section(text(hand_made()), "Modules: how fast they are")
    assert printed.count("linear") == 3
    assert "│  ├─ 0 " in printed
    assert "│  └─ 2 " in printed


def test_only_modules_that_are_alike_share_a_row():
    modules = [leaf(f"m.{n}", "Linear", 9, forward={"mm": product(2, 2, n // 2 + 2)}) for n in range(4)]
    counts = Counts(ModuleCounts("", "", children=(branch("Net", "Net", branch("m", "ModuleList", *modules)),)))
    printed = text(Report("Net", Workload(), counts), detailed=False)
    assert "├─ 0...1 (2 alike): Linear" in printed
    assert "└─ 2...3 (2 alike): Linear" in printed


def test_by_depth_has_the_deepest_modules():
    found = section(text(hand_made(), top_modules=2), "By depth").split("\n")
    assert found[0].split() == ["depth", "parameters", "MACs,", "forward", "time"]
    assert [line.split()[0] for line in found[2:] if line[4] != " "] == ["0", "1", "2", "3"]
    assert found[-2].split() == ["3", "788", "K", "Linear", "1.61", "G", "Linear", "19.3", "ms", "Linear"]
    assert found[-1].split() == ["9.56", "ms", "NewGELU"]


def test_depth_can_be_limited():
    printed = text(hand_made(), module_depth=1)
    assert "head: Linear" in printed
    assert "0: Layer" not in printed
    assert [line[4] for line in section(printed, "By depth").split("\n")[2:]] == ["0", "1"]


def test_executed_flops_have_a_column_where_they_differ():
    half = replace(product(512, 512, 512), executed_flops=512**3)
    counts = Counts(ModuleCounts("", "", children=(leaf("Net", "Net", forward={"sdpa": half}),)))
    assert "exec." in section(text(Report("Net", Workload(), counts)), "Modules: what they do")
    assert "exec." not in text(hand_made())


def test_communication_and_idle_time_have_rows():
    report = hand_made()
    collectives = {"nccl:all_reduce": Spent(0.02, 2)}
    timing = timing_of(report.counts, clock="device", idle_seconds=0.03, communication=collectives)
    workload = replace(report.workload, world_size=4, rank=1, data_parallel=2, tensor_parallel=2)
    printed = text(replace(report, timing=timing, workload=workload))
    rows = {line.split()[0]: line for line in section(printed, "By phase").split("\n")}
    assert "20.0 ms    24%" in rows["collectives"]
    assert "30.0 ms    36%" in rows["idle"]
    assert "(communication)" in section(printed, "Modules: how fast they are")
    assert "nccl:all_reduce" in section(printed, "Longest kernels")
    assert "rank 1 of 4: data parallel 2, tensor parallel 2" in printed
    assert "4.88 M (19.5 MB); of the model 9.77 M" in printed
    assert "of all processes" in printed


def test_what_is_missing_has_no_section():
    bare = replace(hand_made(), timing=None, limits=None, energy=None, notes=())
    printed = text(replace(bare, counts=replace(bare.counts, unknown={})))
    for title in ("Where the time", "Modules: how fast", "Longest", "Operators without", "Notes"):
        assert title not in printed
    assert "counting 250 ms" in printed
    assert "step  " not in section(printed, "Summary")


def test_unknown_operators_notes_and_the_cost_are_told():
    printed = text(hand_made())
    assert section(printed, "Operators without a formula").split("\n")[-1].split() == ["mylib.mystery", "3"]
    assert section(printed, "Notes") == "- One thing that a reader must know."
    assert "timing 1.50 s (3 steps after 1 of warm-up)" in printed
    assert "1.00 times" in printed


@pytest.mark.parametrize(
    ("number", "written"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.4, "999"),
        (999.6, "1.00 K"),
        (1234, "1.23 K"),
        (99_949, "99.9 K"),
        (99_951, "100 K"),
        (2.5e13, "25.0 T"),
        (1e21, "1000 E"),
        (-1234, "-1.23 K"),
        (None, "-"),
        (float("inf"), "inf"),
    ],
)
def test_quantities(number, written):
    assert quantity(number) == written


def test_other_units():
    assert [seconds(one) for one in (0, 1.234, 0.01234, 9.999e-4, 1.5e-9, 1e-12)] == [
        "0",
        "1.23 s",
        "12.3 ms",
        "1.00 ms",
        "1.50 ns",
        "0.00 ns",
    ]
    assert [joules(one) for one in (None, 0.5, 1500)] == ["-", "500 mJ", "1.50 KJ"]
    assert [percentage(one) for one in (None, 0, 1e-5, 0.024, 0.31, 2.5, 99)] == [
        *("-", "0%", "<0.1%", "2.4%", "31%", "250%", ">999%")
    ]


@given(st.text(max_size=80), st.integers(0, 100))
def test_elided_text_fits(line, width):
    assert display_width(elide(line, width)) <= width


def test_names_give_way_in_their_middle_and_keep_their_branches():
    assert elide("│  ├─ a_very_long_name_of_a_module", 24) == "│  ├─ a_very_...a_module"
    assert elide("short", 24) == "short"
    table = grid(["module", "time"], [["│  └─ " + "x" * 200, "1 s"]])
    assert table.split("\n")[-1].startswith("│  └─ xxx")
    assert len(table.split("\n")[-1]) == 100
    table = grid(["one", "other", "n"], [["x" * 200, "y" * 200, "1"], ["x", "y", "2"]], texts=(0, 1))
    assert [len(line) for line in table.split("\n")] == [100] * 4


def test_sentences_are_filled():
    assert fill("a " * 60, "1. ", "   ").split("\n")[1].startswith("   a")
    assert display_width(fill("\u6f22" * 300)) <= 100


def test_work_of_a_module_that_nothing_ran_in_is_blank():
    counts = Counts(ModuleCounts("", "", children=(branch("Net", "Net", leaf("idle", "Idle")),)))
    report = Report("Net", Workload(), counts, timing_of(counts), LIMITS)
    assert Work() == report.counts.total()
    assert section(text(report), "Modules: how fast").split("\n")[-1].split()[0] == "└─"
