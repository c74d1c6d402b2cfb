"""Tables, files and pictures of rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.bench import chart, report
from engine.bench.job import Case
from engine.bench.pool import Outcome, Result
from engine.errors import EngineError
from tests.engine.bench.samples import job, row, size_of_png

CONTEXT = report.Context("2026-11-25", "a CPU", "Python 3", "slipstream bench")


def test_rows_hold_the_floor_and_its_share() -> None:
    outcome = Outcome(job(1, 4, runner="slipstream", kernels="auto"), "eager", "torch 9")
    outcome.results[0] = Result((2.0, 8.0, 4.0), "a note", gpu_ms=1.5, launches=7)
    outcome.fail("it is broken")
    works = [{"bytes": 100.0, "flops": 10.0}, {"bytes": 100.0, "flops": 9000.0}]
    first, second = report.rows(outcome, works, {"read": 1e5, "flops": 1e6}, CONTEXT)
    assert (first.run, first.ms, first.ms_min, first.ms_max, first.samples) == ("eager", 4.0, 2.0, 8.0, 3)
    assert (first.floor_ms, first.percent) == (pytest.approx(1.0), pytest.approx(25.0))  # bound by bytes
    assert (first.gpu_ms, first.launches, first.note, first.error) == (1.5, 7, "a note", "")
    assert (first.kind, first.batch, first.tokens, first.new, first.versions) == ("decode", 1, 16, 8, "torch 9")
    assert (second.ms, second.percent, second.error) == (None, None, "it is broken")
    assert second.floor_ms == pytest.approx(9.0)  # bound by FLOPs


WIDE = [
    row("specialized", 0.118),
    row("generic", 0.42),
    row("hf", 15.34, ms_max=1234.5),
    row("deepspeed", None, error="RuntimeError: CUDA error: an illegal memory access was encountered somewhere"),
    row("inductor", 0.501, note="forward only, in a CUDA graph"),
    row("inductor", 0.601, batch=16, note="forward only, in a CUDA graph"),
]


@pytest.mark.parametrize("kind", ["decode", "prefill", "encode"])
def test_the_table_fits_80_columns(kind: str) -> None:
    found = [replace(one, kind=kind, tokens=384) for one in WIDE]
    text = report.table(found)
    assert max(map(len, text.splitlines())) <= 80
    for word in ("specialized", "generic", "inductor", "deepspeed", "0.118", "0.106..0.177", "13.8..1234", "50%"):
        assert word in text
    joined = " ".join(text.split())
    assert "deepspeed, batch 1: RuntimeError: CUDA error: an illegal memory access was encountered" in joined
    assert "inductor: forward only, in a CUDA graph" in joined
    assert ("16 x 384" in text) is (kind == "encode")
    assert {"decode": "ms/token", "prefill": "ms/first", "encode": "ms/pass"}[kind] in text


def test_without_a_gpu_there_is_no_column_for_it_and_without_figures_no_table() -> None:
    assert "GPU" not in report.table([row("eager", 1.0, gpu_ms=None)])
    assert report.table([row("deepspeed", None, error="not installed")]) == "deepspeed: not installed"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.05, "0.0500"), (0.118, "0.118"), (3.741, "3.74"), (15.34, "15.3"), (1234.5, "1234"), (0, "0.0000")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert report.number(value) == text


def test_markdown_has_our_sets_in_order_then_the_peers() -> None:
    lines = report.markdown(WIDE, ["specialized", "generic"], ["hf", "deepspeed"]).splitlines()
    assert lines[0] == "| model | batch | floor | generic | specialized | % of floor | hf | deepspeed |"
    assert lines[1] == "|---|--:|--:|--:|--:|--:|--:|--:|"
    assert lines[2] == "| gpt2, fp16 | 1 | 0.0590 | 0.420 | 0.118 | 50 | 15.3 | failed |"
    assert lines[3] == "| gpt2, fp16 | 16 | 0.0590 | - | - | - | - | - |"
    assert lines[5].startswith("- gpt2, fp16; deepspeed, batch 1: RuntimeError: CUDA error")


def test_markdown_says_what_a_first_token_stands_behind() -> None:
    lines = report.markdown([row("eager", 9.0, kind="prefill", tokens=2048, new=1)], ["eager"], []).splitlines()
    assert lines[2].startswith("| gpt2, fp16, first token behind 2048 | 1 | ")


def test_the_json_file_is_a_flat_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("old")
    report.write_json(path, WIDE)
    found = json.loads(path.read_text("utf-8"))
    assert [one["run"] for one in found] == [one.run for one in WIDE]
    assert all(isinstance(value, str | int | float | None) for one in found for value in one.values())
    assert report.read_json(path) == WIDE
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.json"]


def test_the_chart_is_a_png_with_room_for_every_bar(tmp_path: Path) -> None:
    few, many = tmp_path / "few.png", tmp_path / "many.png"
    chart.draw(WIDE[:2], few)
    chart.draw([*WIDE, *(row(one.run, one.ms, batch=8) for one in WIDE[:3])], many)
    assert size_of_png(few)[0] == size_of_png(many)[0] > 900
    assert size_of_png(many)[1] > size_of_png(few)[1] > 200


def test_there_is_nothing_to_draw_without_figures(tmp_path: Path) -> None:
    chart.draw([row("deepspeed", None, error="not installed")], tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"^--chart needs matplotlib: pip install 'slipstream-runtime\[report\]'$"):
        chart.check_installed()


def test_a_case_says_what_it_is() -> None:
    assert (str(Case(4, 128, 64)), str(Case(4, 128))) == ("batch 4", "batch 4 of 128 tokens")
