"""Runs of the convergence benchmark from end to end at a tiny size, and its figures from curves that are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import convergence_loop, convergence_plot
from benchmarks import layer_drop_convergence as command
from benchmarks.convergence_data import load, prepare
from benchmarks.convergence_loop import Curve
from benchmarks.convergence_plot import best, crossing, groups, read
from benchmarks.convergence_run import ARMS
from engine.training.layer_drop import Schedule, draw_gates
from tests.benchmarks import small
from tests.benchmarks.small import call, ticking, write_text

SIZES = ("--layers", "3", "--hidden", "16", "--heads", "2", "--length", "16", "--batch", "8", "--dropout", "0.1")
STEPS = 24
QUICK = (*SIZES, "--steps", str(STEPS), "--evaluations", "4", "--lr", "3e-3", "--device", "cpu", "--precision", "fp32")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared text."""
    directory = tmp_path_factory.mktemp("corpus")
    prepare(*write_text(directory), directory / "corpus.safetensors")
    return directory / "corpus.safetensors"


@pytest.fixture
def run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Trains one arm, and gives what its file holds."""

    def train(arm: str, *arguments: str) -> dict[str, Any]:
        given = ["--arm", arm, "--data", corpus, "--out", tmp_path / "runs", *QUICK, *arguments]
        assert call(command.main, monkeypatch, *given) == 0
        (path,) = (tmp_path / "runs").glob(f"{arm}-*.json")
        found: dict[str, Any] = small.read(path)
        return found

    return train


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_from_end_to_end(arm: str, run: Callable[..., Any], corpus: Path, tmp_path: Path) -> None:
    """The loss that is written down is that of the exported model in Hugging Face's own hands."""
    from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

    found = run(arm)
    points = found["points"]
    assert found["status"] == "done"
    assert [point["step"] for point in points] == [6, 12, 18, 24]
    assert [point["samples"] for point in points] == [48, 96, 144, 192]
    assert len({point["loss"] for point in points}) == 4
    seconds = [point["seconds"] for point in points]
    assert seconds == sorted(seconds)
    assert seconds[-1] == found["seconds"] > 0
    name = tmp_path / "runs" / f"{arm}-lr0.003-seed1-steps24"
    model = AutoModelForMaskedLM.from_pretrained(name).eval()
    assert ("prelayernorm" in type(model).__name__.lower()) is arm.startswith("preln")
    assert PreTrainedTokenizerFast.from_pretrained(name).mask_token_id == 4
    held_out = load(corpus, 16).held_out
    batch = held_out.batch(np.arange(len(held_out)), np.zeros(len(held_out), np.int64), convergence_loop.HELD_OUT_SEED)
    with torch.no_grad():
        expected = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    assert points[-1]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_layers_are_those_of_the_schedule(run: Callable[..., Any]) -> None:
    """gamma is 100 / steps, and each step's gates are drawn with its own probabilities."""
    schedule = Schedule(0.5, total_steps=STEPS)
    drawn = [sum(draw_gates(schedule.keep_probabilities(step, 3), 1, step, 0)) for step in range(STEPS)]
    found = run("preln_pld")
    for at, point in enumerate(found["points"]):
        assert point["layers"] == pytest.approx(sum(drawn[6 * at : 6 * at + 6]) / 6)
    assert "scaled: branches attention.output.dense, output.dense" in found["stack"]
    assert {point["layers"] for point in run("preln")["points"]} == {3.0}


def test_arms_see_the_same_data(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    moved = convergence_loop.PreTraining._moved
    monkeypatch.setattr(
        convergence_loop.PreTraining, "_moved", lambda self, tensor: seen.append(tensor) or moved(self, tensor)
    )
    run("postln")
    count = len(seen)
    run("preln_pld")
    assert len(seen) == 2 * count
    assert all(torch.equal(a, b) for a, b in zip(seen[:count], seen[count:], strict=True))
    run("preln", "--seed", "2")
    assert not torch.equal(seen[0], seen[2 * count])


def test_a_run_that_is_cut_goes_on_as_if_it_was_not(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("preln_pld")["points"]
    for path in (tmp_path / "runs").glob("*.json"):
        path.unlink()
    statuses = []
    while not statuses or statuses[-1] != "done":
        monkeypatch.setattr(convergence_loop, "time", ticking())
        found = run("preln_pld", "--seconds", "9")  # of a clock that counts steps
        statuses.append(found["status"])
        assert len(list((tmp_path / "runs").glob("*.checkpoints"))) == (statuses[-1] == "cut")
    assert statuses == ["cut", "cut", "done"]
    figures = ("step", "samples", "loss", "train_loss", "layers")
    assert [[p[key] for key in figures] for p in found["points"]] == [[p[key] for key in figures] for p in whole]
    monkeypatch.setattr(command, "Training", None)
    assert run("preln_pld")["status"] == "done", "not trained again"


def test_a_loss_that_is_no_number_is_written_down(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--arm", "postln", "--data", corpus, "--out", tmp_path, *QUICK, "--lr", "1e38", "--warmup", "0"]
    with pytest.raises(SystemExit, match="2"):
        call(command.main, monkeypatch, *given)
    (path,) = tmp_path.glob("*.json")
    found = small.read(path)
    assert found["status"] == "failed"
    assert found["error"] in capsys.readouterr().err


def test_a_probe_writes_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    given = ["--arm", "preln_pld", "--data", corpus, "--out", out, *QUICK, "--probe", "3", "--seconds", "100"]
    assert call(command.main, monkeypatch, *given) == 0
    assert "ms a step: 100 seconds hold " in capsys.readouterr().out
    assert not out.exists()


def test_a_curve_counts_what_held_it_up_apart() -> None:
    curve = Curve()
    for seconds in (9.0, 1.0, 1.0, 2.0):
        curve.add(seconds, 5.0, layers=2.0)
    point = curve.point(4, 40, 3.0)
    assert point == {"step": 4, "samples": 40, "seconds": 8.5, "loss": 3.0, "train_loss": 5.0, "layers": 2.0}
    assert curve.held_up == 4.5


def write_run(
    directory: Path, arm: str, lr: float, seed: int, losses: list[float], status: str = "done", steps: int = 400
) -> None:
    """A run of four evaluations; a step has 10 samples and takes 0.1 s, with layer drop 0.075."""
    pace = 0.075 if arm.endswith("pld") else 0.1
    places = [steps * at // 4 for at in range(1, 5)]
    points = [
        {"step": at, "samples": 10 * at, "seconds": pace * at, "loss": loss, "train_loss": loss, "layers": 12.0}
        for at, loss in zip(places, losses, strict=False)
    ]
    run = {"arm": arm, "lr": lr, "seed": seed, "steps": steps}
    document = {"run": run, "status": status, "device": "GPU; CPU", "points": points}
    (directory / f"{arm}-{lr}-{seed}-{steps}.json").write_text(json.dumps(document))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A sweep: postln ends at 3.0 in the mean at its best rate, preln_pld comes below that early."""
    write_run(tmp_path, "postln", 1e-4, 1, [6.0, 5.0, 4.0, 2.9])
    write_run(tmp_path, "postln", 1e-4, 2, [6.0, 5.0, 4.0, 3.1])
    write_run(tmp_path, "postln", 4e-4, 1, [6.0, 6.0], "failed")
    write_run(tmp_path, "preln_pld", 1e-3, 1, [5.0, 3.0, 2.6, 2.5])
    write_run(tmp_path, "preln_pld", 1e-3, 2, [5.0, 3.5, 2.5, 2.4])
    write_run(tmp_path, "preln_pld", 1e-4, 1, [6.0, 5.0, 4.0, 3.2])
    write_run(tmp_path, "preln", 1e-3, 1, [5.0, 4.0, 3.5, 3.2])
    return tmp_path


def test_the_first_crossing_counts() -> None:
    points = [{"loss": loss, "samples": 100.0 * at} for at, loss in enumerate((5.0, 3.0, 4.0, 1.0), 1)]
    assert crossing(points, 3.5, "samples") == pytest.approx(175)
    assert crossing(points, 3.0, "samples") == 200
    assert crossing(points, 6.0, "samples") == 100
    assert crossing(points, 0.5, "samples") is None


def test_samples_and_seconds_to_the_baseline_s_loss(runs: Path) -> None:
    text = convergence_plot.summary(runs)
    assert max(map(len, text.splitlines())) <= 80
    rows = {tuple(line.split()[:3]): line.split()[3:] for line in text.splitlines()}
    assert "postln's final loss, 3.0000" in text
    assert rows["postln", "400", "0.0001"] == ["4000", "1", "40", "1"]
    # 2000 samples for one seed, 2000 + 1000 * 0.5 / 1.0 for the other.
    assert rows["preln_pld", "400", "0.001"] == ["2250", "1.78", "16.88", "2.37"]
    assert rows["preln", "400", "0.001"] == ["0", "of", "1", "-", "0", "of", "1", "-"]
    assert "postln, 400 steps, lr 0.0004, seed 1: failed" in text


def test_a_rate_has_no_advantage_of_more_seeds(tmp_path: Path) -> None:
    write_run(tmp_path, "postln", 1e-4, 1, [3.0])
    write_run(tmp_path, "postln", 2e-4, 1, [2.9])
    write_run(tmp_path, "postln", 2e-4, 2, [3.5])
    records = read(tmp_path)[0]
    assert len(groups(records)) == 2
    assert {record.lr for record in best(records)["postln", 400]} == {2e-4}


def test_shorter_schedules_stand_apart(runs: Path) -> None:
    write_run(runs, "preln_pld", 1e-3, 1, [4.0, 3.5, 3.2, 2.8], steps=200)
    found = convergence_plot.target_table(read(runs)[0]).splitlines()
    # 1500 samples, and half of the last 500.
    assert any(line.split()[:5] == ["preln_pld", "200", "0.001", "1750", "2.29"] for line in found)


def test_a_picture(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    assert call(command.main, monkeypatch, "--plot", runs, "--png", runs / "curves.png") == 0
    assert (runs / "curves.png").read_bytes()[:4] == b"\x89PNG"


def task(directory: Path, name: str, label: Callable[[str], Any]) -> Path:
    """A task over texts of two words, whose label follows from the first."""
    folder = directory / name
    folder.mkdir()
    rows = [f"{first} {second}" for first in small.WORDS[::4] for second in small.WORDS[::6]]
    for part, chosen in (("train", rows), ("dev", rows[::7])):
        lines = [json.dumps({"text": text, "label": label(text)}) for text in chosen]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_end_of_a_run_is_tuned(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("postln")
    run("preln_pld")
    tasks = [
        task(tmp_path, "cola", lambda text: int(text > "k")),
        task(tmp_path, "values", lambda text: 0.5 + small.WORDS.index(text.split()[0]) / 60),
    ]
    out = tmp_path / "runs"
    options = ["--epochs", "12", "--tune-lr", "5e-3", "--device", "cpu", "--precision", "fp32"]
    for arm in ("postln", "preln_pld"):
        directory = out / f"{arm}-lr0.003-seed1-steps24"
        for seed in (1, 2):  # as two processes would
            given = ["--out", out, "--tune-seeds", seed, *options]
            call(command.main, monkeypatch, "--finetune", *tasks, "--run", directory, *given)
    found = {path.name: small.read(path) for path in out.glob("finetune-*.json")}
    assert len(found) == 8
    for name, one in found.items():
        figure, least = ("matthews", 0.9) if "-cola-" in name else ("pearson", 0.5)
        assert len(one["seeds"]) == 1
        assert all(seed[figure] > least for seed in one["seeds"]), (name, one["seeds"])
    text = convergence_plot.summary(out)
    rows = [line.split() for line in text.splitlines()[-4:]]
    assert [row[:5] for row in rows] == [
        ["cola,", "matthews", "postln", "0.005", "2"],
        ["cola,", "matthews", "preln_pld", "0.005", "2"],
        ["values,", "pearson", "postln", "0.005", "2"],
        ["values,", "pearson", "preln_pld", "0.005", "2"],
    ]


def test_losses_of_failed_runs_are_never_the_best(runs: Path) -> None:
    assert math.isinf(next(record for record in read(runs)[0] if record.status == "failed").final)
    assert {record.lr for record in best(read(runs)[0])["postln", 400]} == {1e-4}
