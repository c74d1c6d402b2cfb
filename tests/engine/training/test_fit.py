"""Whole runs: from files to checkpoints, killed and resumed, on several processes, and what goes wrong on the way."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine import Engine
from engine.errors import EngineError
from ops.optimizers.pays import Verdict
from tests.conftest import PYTHONPATH
from tests.engine.tiny_text import bpe_tokenizer
from tests.engine.training.trained import Stack, bert, config, masked, write_labelled

#: Steps of a run: so many that one can be stopped in the midst of it.
TOTAL = 60


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with a tiny classifier's config and tokenizer, data, and a configuration that trains it."""
    tokenizer = bpe_tokenizer()
    tokenizer.pad_token = "<eos>"
    tokenizer.save_pretrained(tmp_path / "model")
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes).save_pretrained(
        tmp_path / "model"
    )
    write_labelled(tmp_path / "train.jsonl", 60, 1)
    write_labelled(tmp_path / "dev.jsonl", 21, 2)
    write(tmp_path)
    return tmp_path


def write(home: Path, **sections: Any) -> Path:
    """The configuration, with ``sections`` replaced or extended."""
    document: dict[str, Any] = {
        "model": {"path": "model", "task": "sequence_classification", "weights": "random"},
        "device": "cpu",
        "precision": "fp32",
        "training": {
            "train_batch_size": 8, "micro_batch_size": 4, "max_steps": TOTAL, "output": "run", "checkpoint_every": 2,
            "clip_norm": 1.0, "seed": 3,
        },
        "optimizer": {"type": "AdamW", "lr": 0.01},
        "schedule": {"type": "cosine", "warmup_steps": 2},
        "progressive_layer_drop": {"theta": 0.5, "gamma": 0.5},
        "data": {"train": "train.jsonl", "eval": "dev.jsonl", "length": 24, "labels": ["animals", "evening"]},
        "job": {"type": "train"},
    }  # fmt: skip
    for name, section in sections.items():
        document[name] = {**document.get(name, {}), **section} if isinstance(section, dict) else section
    (home / "train.json").write_text(json.dumps(document), encoding="utf-8")
    return home / "train.json"


def command(home: Path, *arguments: str) -> subprocess.Popen[str]:
    """``slipstream run`` in the directory."""
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "engine", "run", "train.json", *arguments],
        cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def masked_row(seed: int) -> dict[str, Any]:
    """One sample for the tiny BERT."""
    return {name: value[0] for name, value in masked(1, seed).items()}


def lines(home: Path, output: str = "run") -> list[dict[str, Any]]:
    """The metrics of the training steps, without what depends on the clock."""
    text = (home / output / "metrics.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k != "samples_per_second"} for line in found if "loss" in line]


def test_a_run_killed_and_resumed_is_the_run_that_was_not(home: Path) -> None:
    """kill -9, then SIGTERM, each resumed: every loss, norm and figure is that of one run in one go."""
    whole = command(home, "--set", "training.output=whole")
    out, err = whole.communicate(timeout=200)
    assert whole.returncode == 0, err
    assert "eval accuracy" in out
    assert "layers run, mean" in out
    for number, at in ((signal.SIGKILL, 3), (signal.SIGTERM, 8)):
        run = command(home)
        metrics = home / "run" / "metrics.jsonl"
        end = time.monotonic() + 100
        while time.monotonic() < end and run.poll() is None:
            if metrics.exists() and metrics.read_text(encoding="utf-8").count('"loss"') >= at:
                break
            time.sleep(0.01)
        run.send_signal(number)
        out, err = run.communicate(timeout=100)
        if number == signal.SIGKILL:
            assert run.returncode == -signal.SIGKILL
        else:
            assert run.returncode == 0, err
            assert "SIGTERM: stopping behind this step, with a checkpoint" in err
            assert "stopped; the same command goes on from here" in err
    last = command(home)
    out, err = last.communicate(timeout=200)
    assert last.returncode == 0, err
    assert " of them earlier)" in out
    assert lines(home) == lines(home, "whole")
    assert [line["step"] for line in lines(home)] == list(range(1, TOTAL + 1))


def test_learns_and_is_served(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From files to a classifier that the engine's own kernels serve, and that Hugging Face opens."""
    monkeypatch.chdir(home)
    path = write(home, training={"max_steps": 60, "checkpoint_every": None}, progressive_layer_drop={"enabled": False})
    engine = Engine(path)
    before = engine.evaluate()["accuracy"]
    summary = engine.fit()
    assert summary.figures["accuracy"] >= 0.95 > before
    assert summary.steps == 60
    texts = ["moon sea night", "dog fox lazy"]
    assert [labels[0].label for labels in engine.classify(texts)] == ["evening", "animals"]
    engine.save_pretrained("saved")
    assert [labels[0].label for labels in Engine.from_pretrained("saved").classify(texts)] == ["evening", "animals"]
    tokenizer = transformers.AutoTokenizer.from_pretrained("saved")
    model = transformers.AutoModelForSequenceClassification.from_pretrained("saved").eval()
    assert model(**tokenizer(texts[0], return_tensors="pt")).logits.argmax().item() == 1


def test_fits_rows_of_ones_own(tmp_path: Path) -> None:
    rows = [masked_row(seed) for seed in range(16)]
    output = tmp_path / "run"
    training = {"output": str(output), "max_steps": None, "epochs": 3.0, "log_every": 4, "evaluate_every": 6}
    engine = Engine(config(training=training), model=bert())
    summary = engine.fit(rows, rows[:5])
    assert summary.steps == 12
    engine.model.eval()
    with torch.no_grad():
        losses = [float(engine.model(**{k: v[None] for k, v in row.items()}).loss) for row in rows[:4]]
    assert engine.evaluate(rows[:4])["loss"] == pytest.approx(sum(losses) / 4, rel=0.05), "batches of two rows"
    assert not engine.model.training, "evaluation leaves the mode as it is"
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 12]
    text = (output / "metrics.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["step"] for line in text.splitlines() if "eval/loss" in line] == [6, 12]
    again = Engine(config(training=training), model=bert())
    assert again.fit(rows).begun == 12, "there was nothing left to do"


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no such file": ({"data": {"train": "no.jsonl"}}, "no.jsonl"),
    "an empty file": ({"data": {"train": "empty.jsonl"}}, "empty.jsonl"),
    "a label out of range": ({"data": {"train": "odd.jsonl"}}, "odd.jsonl: line 1: label 7"),
    "texts longer than the model": ({"data": {"length": 99}}, "$.data.length: 99 tokens, but the model's position"),
    "batches that contradict": ({"training": {"train_batch_size": 7}}, "$.training.train_batch_size: 7 is no multiple"),
    "no tensorboard": ({"training": {"tensorboard": True}}, "TensorBoard is not installed"),
    "an output that is a file": ({"training": {"output": "dev.jsonl"}}, "dev.jsonl"),
    "no stack there": ({"progressive_layer_drop": {"paths": "encoder.blocks"}}, 'no module "encoder.blocks"'),
    "theta of nothing": ({"progressive_layer_drop": {"theta": 0}}, "$.progressive_layer_drop.theta"),
    "no model": ({"model": {"path": "nowhere"}}, "nowhere"),
    "a figure of another task": ({"data": {"metric": "pearson"}}, "$.data.metric: classification has no 'pearson'"),
    "a checkpoint of another model": ({"training": {"output": "other"}}, "other/checkpoints/save-000001"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_is_one_line(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engine.cli import main

    sections, wanted = BROKEN[name]
    if name == "no tensorboard":
        monkeypatch.setattr("engine.training.metrics_log.find_spec", lambda package: None)
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (home / "empty.jsonl").write_text("", encoding="utf-8")
    (home / "odd.jsonl").write_text('{"text": "the moon", "label": 7}\n', encoding="utf-8")
    if name == "a checkpoint of another model":
        output = {"output": "other", "micro_batch_size": 2, "accumulation_steps": 2, "max_steps": 1}
        Engine(config(training=output), model=bert()).fit([masked_row(seed) for seed in range(4)])
    write(home, **sections)
    assert main(["run", "train.json"]) != 0
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert wanted in said[0]


def test_a_loss_that_is_no_number_names_the_last_checkpoint(tmp_path: Path) -> None:
    rows = [{"x": torch.randn(6), "y": torch.tensor(1.0)} for _ in range(40)]
    for row in rows[20:]:
        row["x"] = torch.full((6,), torch.nan)

    class Ordered:
        """The rows in their own order."""

        def __len__(self) -> int:
            return len(rows)

        def batch(self, indices: Any, epochs: Any, seed: int) -> dict[str, torch.Tensor]:
            """The next rows, whatever is asked for."""
            self.at = getattr(self, "at", 0)
            found = rows[self.at : self.at + len(indices)]
            self.at += len(indices)
            return {name: torch.stack([row[name] for row in found]) for name in ("x", "y")}

    training = {"output": str(tmp_path / "run"), "max_steps": 9, "checkpoint_every": 2}

    def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return (outputs[:, 0] - batch["y"]).square().mean()

    engine = Engine(config(training=training), model=Stack(), loss_function=loss)
    with pytest.raises(EngineError, match=r"step 6: .* micro-batch 0 is nan.*; the last good checkpoint is of step 4"):
        engine.fit(Ordered())


def test_a_loss_that_is_no_number_names_its_samples(tmp_path: Path) -> None:
    rows = [{"x": torch.full((6,), torch.nan if at == 5 else 1.0)} for at in range(8)]
    training = {"output": str(tmp_path / "run"), "max_steps": 9}
    engine = Engine(config(training=training), model=Stack(), loss_function=lambda outputs, batch: outputs.mean())
    with pytest.raises(
        EngineError, match=r"; the batch is samples (\d, 5|5, \d) of the data, counted from 0; there is no"
    ):
        engine.fit(rows)


def test_a_full_disk_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit of a file's size stands for the disk's."""
    from engine.cli import main

    monkeypatch.chdir(home)
    write(home, training={"max_steps": 2})
    assert main(["run", "train.json"]) == 0
    write(home, training={"max_steps": 4})
    capsys.readouterr()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        code = main(["run", "train.json"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(said) == 1, said
    assert "the checkpoint of step 4 cannot be written: File too large" in said[0]
    assert "the checkpoint of step 2 is still there" in said[0]


def test_looks_before_it_begins(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--dry-run and explain read neither weights (there are none) nor texts, and write nothing."""
    from engine.cli import main

    monkeypatch.chdir(home)
    write(home, progressive_layer_drop={"gamma": None}, data={"task": "auto"}, optimizer=None)
    there = sorted(home.iterdir())
    assert main(["run", "train.json", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "train.json: ready: train\nBertForSequenceClassification, " in out
    assert "a step is 8 samples: 2 micro-batches of 4 in each of 1 processes" in out
    assert "layers are dropped in bert.encoder.layer (3 BertLayer)" in out
    assert main(["explain", "train.json"]) == 0
    out = capsys.readouterr().out
    document = json.loads(out[: out.index("\n}\n") + 2])
    assert document["schedule"]["total_steps"] == document["progressive_layer_drop"]["total_steps"] == TOTAL
    assert document["data"]["task"] == "classification"
    assert document["optimizer"]["type"] == "AdamW"
    assert '$.optimizer: "auto" is {"type": "AdamW"' in out
    assert '$.training.data_parallel: "auto" is "replicate": there is one process' in out
    assert sorted(home.iterdir()) == there
    for sections, wanted in (
        ({"data": {"train": "no.jsonl"}}, "no.jsonl"),
        ({"data": {"length": 99}}, "$.data.length"),
        ({"model": {"weights": "pretrained"}}, "model: "),
        ({"progressive_layer_drop": {"paths": "encoder.blocks"}}, 'no module "encoder.blocks"'),
    ):
        write(home, **sections)
        assert main(["run", "train.json", "--dry-run"]) == 2
        assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (None, "one process: nothing to compress"),
        (Verdict(0.5, 0.125, 2), "as signs (0.5 s in full, 0.125 s as signs)"),
        (Verdict(0.125, 0.5, 2), "in full (0.125 s in full, 0.5 s as signs)"),
    ],
)
def test_what_compression_measured_is_in_the_table(
    measured: Verdict | None,
    said: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from engine.cli import main

    monkeypatch.chdir(home)
    if measured is not None:
        monkeypatch.setattr("ops.optimizers.pays.measure", lambda optimizer: measured)
    optimizer = {"type": "OneBitAdam", "freeze_step": 1, "compression": "auto"}
    write(home, training={"max_steps": 2}, optimizer=optimizer)
    assert main(["run", "train.json", "-v"]) == 0
    shown = capsys.readouterr()
    assert next(line for line in shown.out.splitlines() if line.startswith("exchange")).split("  ")[-1].strip() == said
    wanted = str(measured or Verdict(0.0, 0.0, 1))
    assert shown.err.count(f"OneBitAdam: {wanted}") == 1


def test_goes_on_from_a_checkpoint_saved_by_hand(tmp_path: Path) -> None:
    """After a run: the place in the data is in it."""
    rows = [{name: value[0] for name, value in masked(1, seed).items()} for seed in range(16)]

    def run(steps: int, output: str) -> Engine:
        engine = Engine(config(training={"output": str(tmp_path / output), "max_steps": steps}), model=bert())
        engine.fit(rows)
        return engine

    run(5, "whole")
    run(3, "parts").save_checkpoint()
    assert run(5, "parts").global_step == 5
    assert lines(tmp_path, "parts") == lines(tmp_path, "whole")
