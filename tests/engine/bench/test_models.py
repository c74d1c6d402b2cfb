"""The script that measures a whole table of models."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import models
from engine.bench.command import Model
from engine.bench.job import Job
from engine.bench.report import read_json
from tests.engine.bench.samples import job
from tests.engine.tiny import tiny

GB = 1 << 30


def runs(*wanted: tuple[str, float]) -> list[tuple[Job, Model]]:
    """Jobs of these runners on models whose weights take so many GB."""
    found = []
    for runner, size in wanted:
        one = job(1, runner=runner)
        found.append((one, Model(one.subject, one.cases, (), {}, int(size * GB))))
    return found


def sizes(waves: list[list[tuple[Job, Model]]]) -> list[list[str]]:
    """The runners of each wave."""
    return [[job.runner for job, _ in wave] for wave in waves]


def test_waves_keep_within_the_memory_and_the_number_of_processes() -> None:
    four = runs(("slipstream", 10), ("hf", 10), ("inductor", 10), ("hf", 1))
    ample, tight = 1000 * GB, 40 * GB / models.MEMORY_SHARE
    assert sizes(list(models.waves(four, 8, ample))) == [["slipstream", "hf", "inductor", "hf"]]
    assert sizes(list(models.waves(four, 3, ample))) == [["slipstream", "hf", "inductor"], ["hf"]]
    # 10 GB twice for ours, and 3 GB beside the weights of each.
    assert sizes(list(models.waves(four, 8, tight))) == [["slipstream", "hf"], ["inductor", "hf"]]
    assert sizes(list(models.waves(four, 8, GB))) == [["slipstream"], ["hf"], ["inductor"], ["hf"]]


def test_a_table_of_two_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (kind, task) in {"small": ("gpt2", "causal_lm"), "round": ("bert", "embedding")}.items():
        (tmp_path / name).mkdir()
        shutil.copy(tiny(kind, task).directory / "config.json", tmp_path / name)  # type: ignore[arg-type]
    monkeypatch.setattr(models, "SHAPES", tmp_path)
    monkeypatch.setattr(models, "TABLE", (models.Entry("small", "fp32"), models.Entry("round", "fp32")))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "rows.json"
    options = [
        "--kernels",
        "eager,specialized",
        "--against",
        "hf,deepspeed",
        "--batch",
        "2",
        "--prompt",
        "9",
        "--new",
        "4",
    ]
    options += ["--tokens", "7", "--rounds", "1", "--together", "6", "--limit-seconds", "240", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["models", *options, "--json", str(path)])
    models.main()
    lines = capsys.readouterr().out.splitlines()
    assert "| model | batch | floor | specialized | eager | % of floor | hf | deepspeed |" in lines
    (first,) = [line for line in lines if line.startswith("| small, fp32 | 2 | ")]
    (second,) = [line for line in lines if line.startswith("| round, fp32, 7 tokens | 2 | ")]
    assert first.endswith("| not installed |")
    assert [line.count("failed") for line in (first, second)] == [1, 1]  # a set that refuses fp32 costs its own cell
    refusal = 'specialized: kernels "specialized" do not run this model here: it computes in fp16 or bf16, not'
    assert [refusal in line for line in lines[-4:]].count(True) == 2
    rows = read_json(path)
    assert [(row.model, row.run) for row in rows] == [
        (name, run) for name in ("small", "round") for run in ("eager", "specialized", "hf", "deepspeed")
    ]
    assert all(row.samples for row in rows if row.run in ("eager", "hf"))
    assert rows[0].command.startswith("python -m benchmarks.models --kernels eager")


def test_precisions_of_the_table_are_chosen_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = Namespace(only=("gpt-neo-2.7b", "gpt2"), precisions=("fp32",))
    assert models.entries(chosen) == [models.Entry("gpt-neo-2.7b", "fp32")]
    monkeypatch.setattr("sys.argv", ["models", "--only", "gpt2", "--precisions", "fp32"])
    with pytest.raises(SystemExit, match="2"):
        models.main()
    assert "none of --only has one of --precisions" in capsys.readouterr().err
