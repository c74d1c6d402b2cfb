"""The page as a document: what stands in it, that it asks for nothing, that names are only names."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from profiler.counts import Counts, ModuleCounts
from profiler.errors import ProfilerError
from profiler.judge import Judged
from profiler.page import figures, page, rows
from profiler.report import Report, Workload
from profiler.times import Spent
from tests.profiler.reports import LIMITS, branch, elementwise, hand_made, leaf, product, timing_of

SECONDS, FLOPS, BYTES, LIMIT = (rows.CELLS.index(name) for name in ("seconds", "flops", "bytes", "limit"))


class Document(HTMLParser):
    """Tags with their attributes, and what scripts and styles hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.held: dict[str, list[str]] = {"script": [], "style": []}
        self.text: list[str] = []
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag in self.held:
            self.held[tag].append("")

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open in self.held:
            self.held[self._open][-1] += data
        else:
            self.text.append(data)

    @property
    def ids(self) -> set[str | None]:
        return {attributes.get("id") for _, attributes in self.tags}

    @property
    def policy(self) -> str:
        (found,) = (each["content"] for _, each in self.tags if each.get("http-equiv") == "Content-Security-Policy")
        return found or ""

    @property
    def data(self) -> dict:
        (data,) = (text for text in self.held["script"] if text.startswith("{"))
        return json.loads(data)


def on_gpu(**more) -> Report:
    """Timed by kernels, with communication and idle time."""
    report = hand_made()
    communication = {"ncclDevKernel_AllReduce": Spent(0.002, 3)}
    timing = timing_of(report.counts, clock="device", communication=communication, idle_seconds=0.001)
    return replace(report, timing=timing, **more)


REPORTS = {
    "timed": hand_made,
    "gpu": on_gpu,
    "counts": lambda: replace(hand_made(), timing=None, limits=None, energy=None),
    "untimed": lambda: replace(hand_made(), timing=None, energy=None),
    "unjudged": lambda: replace(hand_made(), limits=None),
    "nothing": lambda: Report("none", Workload(), Counts(ModuleCounts("", ""))),
}


@pytest.mark.parametrize("kind", REPORTS)
def test_sections_follow_what_is_known(kind):
    report = REPORTS[kind]()
    document = Document(page(report))
    timed, judged = report.timing is not None, report.limits is not None
    assert ("roofline" in document.ids) == judged
    assert ("limits" in document.ids) == (timed and judged)
    assert ("kernels" in document.ids) == (kind == "gpu")
    assert ("unknown" in document.ids) == bool(report.counts.unknown)
    assert {"modules", "memory", "table", "operators", "notes"} <= document.ids
    text = " ".join(document.text)
    assert all(note in text for note in report.notes)
    assert ("Nothing was timed." in text) == (not timed)


@pytest.mark.parametrize("kind", REPORTS)
def test_nothing_is_asked_for(kind):
    document = Document(page(REPORTS[kind]()))
    for tag, attributes in document.tags:
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")), (tag, name, target)
    assert not re.search(r"@import|url\(", "".join(document.held["style"]))
    assert document.policy.startswith("default-src 'none';")
    assert "http" not in document.policy


def test_the_policy_lets_these_scripts_run_and_no_other():
    document = Document(page(hand_made()))
    scripts = [script for script in document.held["script"] if not script.startswith("{")]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    (allowed,) = re.findall(r"script-src ([^;]*)", document.policy)
    assert allowed.split() == [f"'sha256-{digest}'" for digest in digests]


def test_links_lead_to_sections():
    for make in REPORTS.values():
        document = Document(page(make()))
        links = {attributes["href"][1:] for tag, attributes in document.tags if tag == "a"}
        assert links
        assert links <= document.ids


def hostile() -> Report:
    """Every name there is wants to be a script."""
    bad = "</script><script>window.ran=1</script><img src=x onerror='window.ran=1'>&lt;\u2028"
    own = {"forward": {bad: product(64, 64, 64)}}
    module = ModuleCounts(bad, bad, 10, 40, {"forward": 1}, own, 100, (leaf(f"{bad}.{bad}", bad, 10, **own),))
    counts = Counts(ModuleCounts("", "", children=(module,)), {bad: 1})
    return Report(bad, Workload(), counts, timing_of(counts), LIMITS, machine={"device": bad, bad: bad}, notes=(bad,))


def test_names_are_only_names():
    text = page(hostile())
    document = Document(text)
    assert not any(tag == "img" for tag, _ in document.tags)
    assert len(document.held["script"]) == 5  # data, plotly, and ours
    assert "<script>window.ran" not in text.replace(document.held["script"][1], "")
    assert document.data["modules"][1]["name"] == hostile().counts.root.children[0].name


@pytest.mark.parametrize("kind", ["timed", "gpu"])
def test_own_times_of_all_rows_are_the_step(kind):
    report = REPORTS[kind]()
    listed = Document(page(report)).data["modules"]
    total = sum(row["own"]["all"][SECONDS] or 0.0 for row in listed if "all" in row["own"])
    assert total == pytest.approx(report.timing.step_seconds)
    assert listed[0]["total"]["all"][SECONDS] == pytest.approx(report.timing.step_seconds)
    for phase in ("forward", "backward", "step"):
        parts = sum(row["own"][phase][SECONDS] or 0.0 for row in listed if phase in row["own"])
        assert listed[0]["total"][phase][SECONDS] == pytest.approx(parts)


def test_rows_hold_what_was_counted():
    report = hand_made()
    listed = {row["name"]: row for row in Document(page(report)).data["modules"]}
    for module in report.counts.root.walk():
        if module.name:
            row = listed[module.name]
            work = module.total("forward")
            assert row["total"]["forward"][FLOPS] == work.flops
            assert row["total"]["forward"][BYTES] == work.bytes_read + work.bytes_written
            assert row["parameters"] == module.total_parameters
            assert row["activations"] == module.total_activation_bytes
    assert listed["layers.1.linear"]["label"] == "linear"
    assert listed["(optimizer step)"]["own"]["all"][FLOPS] == report.counts.total("step").flops
    assert listed["(between modules)"]["own"]["all"][FLOPS] == 100
    assert "step" not in listed["(between modules)"]["own"]


def test_operators_have_times_on_a_cpu_and_kernels_on_a_gpu():
    cpu, gpu = Document(page(hand_made())).data, Document(page(on_gpu())).data
    assert all(row["cells"]["all"][0] is not None for row in cpu["operators"])
    assert not cpu["kernels"]
    assert all(row["cells"]["all"][0] is None for row in gpu["operators"])
    kernels = {row["name"]: row["cells"] for row in gpu["kernels"]}
    assert kernels["ncclDevKernel_AllReduce"] == {"all": [0.002, 3]}
    assert sum(cells["all"][0] for cells in kernels.values()) == pytest.approx(on_gpu().timing.busy_seconds)
    assert sum(row["cells"]["all"][2] for row in cpu["operators"]) == hand_made().counts.total().flops


def test_one_phase_is_all_there_is_to_choose():
    counts = Counts(ModuleCounts("", "", children=(leaf("Net", "Net", forward={"aten.mm": product(8, 8, 8)}),)))
    report = Report("Net", Workload(), counts, timing_of(counts), LIMITS)
    data = Document(page(report)).data
    assert data["phases"] == ["all"]
    assert [row["name"] for row in data["modules"]] == ["Net", "Net"]  # nothing ran between modules


def test_lines_are_the_ceilings():
    limits = replace(LIMITS, flops={"fp32": 1e12, "tf32": 4e12, "bf16": 4e12, "fp16": 3.9e12, "int8": 0.9e12})
    limits = replace(limits, sources=dict.fromkeys([*limits.flops, "bandwidth"], "measured"))
    report = replace(hand_made(), limits=limits)
    figure = figures.roofline(limits, "bf16", rows.modules(Judged(report)))
    lines = [trace for trace in figure["data"] if trace["mode"] == "lines"]
    *ceilings, ridge = lines
    assert len(ceilings) == 4  # two precisions share a peak
    peaks = [max(line["y"]) for line in ceilings]
    assert peaks == [0.9e12, 1e12, 3.9e12, 4e12]  # that of bf16 is the last, over the others
    for line, peak in zip(ceilings, peaks, strict=True):
        assert line["y"] == pytest.approx([min(peak, x * limits.bandwidth) for x in line["x"]])
    assert ridge["x"] == [limits.ridge("bf16")] * 2
    labels = {label["text"]: label for label in figure["layout"]["annotations"] if "FLOP/s" in label["text"]}
    ours, *others = labels.values()
    assert ours["text"] == "tf32, bf16: 4.00 TFLOP/s"
    assert ours["y"] == pytest.approx(math.log10(4e12))
    assert {label["yanchor"] for label in others} == {"top"}
    bottom, top = figure["layout"]["yaxis"]["range"]
    assert all(bottom < label["y"] < top for label in labels.values())


def test_labels_of_close_ceilings_stand_apart():
    limits = replace(LIMITS, flops={"fp32": 1e12, "fp16": 1.01e12, "bf16": 1.02e12, "tf32": 0.99e12, "int8": 0.98e12})
    limits = replace(limits, sources=dict.fromkeys([*limits.flops, "bandwidth"], "measured"))
    figure = figures.roofline(limits, "fp32", rows.modules(Judged(hand_made())))
    labels = [label for label in figure["layout"]["annotations"] if "FLOP/s" in label["text"]]
    bottom, top = figure["layout"]["yaxis"]["range"]
    height = 12 * 1.3 / 414 * (top - bottom)  # of a line of text, in a plot that is so many pixels high
    spans = [
        (at, at + height) if label["yanchor"] == "bottom" else (at - height, at)
        for label in labels
        if (at := label["y"])
    ]
    spans.sort()
    assert len(spans) == 5
    assert all(one[1] <= other[0] + 1e-9 for one, other in itertools.pairwise(spans))
    assert spans[-1][1] < top


def test_every_dot_has_its_place():
    for make in (REPORTS["timed"], REPORTS["untimed"]):
        report = make()
        listed = rows.modules(Judged(report))
        figure = figures.roofline(report.limits, "fp32", listed)
        (left, right), (bottom, top) = (figure["layout"][axis]["range"] for axis in ("xaxis", "yaxis"))
        for row in listed:
            for cell in row["own"].values():
                seconds, executed, moved = cell[SECONDS] or cell[LIMIT], cell[2], cell[BYTES]
                if executed:
                    assert left < math.log10(executed / moved) < right
                    assert bottom < math.log10(executed / seconds) < top


def test_activations_and_work_between_modules_are_a_row_of_their_own():
    own = {"forward": {"aten.add": elementwise(1000)}}
    counts = Counts(ModuleCounts("", "", own=own, activation_bytes=4000, children=(branch("Net", "Net"),)))
    listed = rows.modules(Judged(Report("Net", Workload(), counts)))
    assert [(row["name"], row["activations"]) for row in listed] == [
        ("Net", 4000),
        ("(between modules)", 4000),
        ("Net", 0),
    ]


def test_units_are_spelled_out():
    report = hand_made()
    timing = timing_of(report.counts, slower=1e-9)  # a microsecond for each call
    text = page(replace(report, timing=timing))
    body = text[text.index("<body>") : text.index('<script type="application/json"')]
    assert " µs" in body
    assert not re.search(r"\d us\b", body)


@pytest.mark.parametrize("missing", ["plotly", "jinja2"])
def test_what_is_missing_is_named_with_the_remedy(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ProfilerError, match=rf"^the HTML page needs {missing}: pip install 'slipstream-runtime\[report\]'$"
    ):
        page(hand_made())
