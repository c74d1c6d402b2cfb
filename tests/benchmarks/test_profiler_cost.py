"""What the timing pass costs: the command measures every step, writes, and gives its verdicts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import profiler_cost
from benchmarks.profiler_cost import SUBJECTS, Row, text_of
from tests.benchmarks.small import call, read


def test_the_command_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    assert call(profiler_cost.main, monkeypatch, "--toy", "--device", "cpu", "--rounds", "2", "--json", path) == 0
    rows = read(path)["rows"]
    assert [row["subject"] for row in rows] == list(SUBJECTS)
    for row in rows:
        assert row["plain"] > 0
        assert row["accounted"] == pytest.approx(1)
        assert row["kernels"] > 10
        assert row["between"] < row["busy"]
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120


def test_verdicts() -> None:
    good = Row("training", 0.1, 0.12, 0.1, 0.018, 0.01, 100, 0.2)
    text = text_of([good])
    assert "training: 1.200 of the plain step (bar 1.25): ok" in text
    assert "training: busy and idle are 98.3% of the step (bar 5% off): ok" in text
    assert max(map(len, text.splitlines())) <= 80
    text = text_of([Row("training", 0.1, 0.13, 0.1, 0.01, 0.01, 100, 0.2)])
    assert text.count("MISSED") == 2
    assert "plain step" not in text_of([Row("encoder", 0.1, 0.13, 0.1, 0.01, 0.01, 100, 0.2)])
