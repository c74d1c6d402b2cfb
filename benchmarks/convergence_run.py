"""One pre-training run of the convergence benchmark: trains, evaluates, and writes down what it has after each."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.convergence_data import Corpus
from benchmarks.masked_lm import MaskedLM, Norm, Shape, loss, masked_lm
from benchmarks.steps import adamw_loop, device_in_words, wait
from engine.bench.report import write
from engine.errors import EngineError
from engine.training.checkpoint import Checkpoints, Stateful
from engine.training.data.batches import Batches
from engine.training.layer_drop import LayerDrop
from engine.training.loop import Loop
from engine.training.metrics import MeanLoss
from engine.training.precision import Mode
from engine.training.random_state import RandomState

#: Where an arm's norms stand, and whether layers are dropped. ``postln_pld`` is for the ablation.
ARMS: Mapping[str, tuple[Norm, bool]] = {
    "postln": ("postln", False),
    "preln": ("preln", False),
    "preln_pld": ("preln", True),
    "postln_pld": ("postln", True),
}
#: Of the masks of the held-out text, the same in all runs.
HELD_OUT_SEED = 0
#: A step counts for at most so many times the median of its interval: what is longer compiles, or waits for others.
HELD_UP = 3.0


@dataclass(frozen=True)
class Run:
    """What is trained. steps: the whole schedule's; warmup: the share of them in which the rate rises. batch: sequences
    a step. evaluations: how many, evenly spread."""

    arm: str
    lr: float
    seed: int
    steps: int
    batch: int = 256
    shape: Shape = field(default_factory=Shape)
    precision: Mode = "bf16"
    compiled: bool = False
    theta: float = 0.5
    warmup: float = 0.05
    evaluations: int = 40

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.arm}-lr{self.lr:g}-seed{self.seed}-steps{self.steps}"

    @property
    def every(self) -> int:
        """Steps between evaluations."""
        return max(self.steps // self.evaluations, 1)


class Curve:
    """What a run has shown so far.

    points: one an evaluation: ``step``, ``samples`` (with repetitions), ``seconds`` of training up to there, ``loss``
        of the held-out text, ``train_loss`` and ``layers`` (that ran for a batch), means since the point before.
    seconds: of training, without evaluations, each step counted for at most HELD_UP times the median. held_up: what
        that leaves out.
    """

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self.seconds = self.held_up = 0.0
        self._since: list[list[float]] = []

    def add(self, seconds: float, loss: float, layers: float) -> None:
        """A step."""
        self._since.append([seconds, loss, layers])

    def point(self, step: int, samples: int, held_out: float) -> dict[str, float]:
        """An evaluation after ``step``; gives the point."""
        seconds, losses, layers = zip(*self._since, strict=True)
        most = HELD_UP * statistics.median(seconds)
        counted = sum(min(one, most) for one in seconds)
        self.seconds += counted
        self.held_up += sum(seconds) - counted
        means = {"train_loss": statistics.fmean(losses), "layers": statistics.fmean(layers)}
        self.points.append({"step": step, "samples": samples, "seconds": self.seconds, "loss": held_out, **means})
        self._since = []
        return self.points[-1]

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {
            "points": [dict(point) for point in self.points],
            "seconds": self.seconds,
            "held_up": self.held_up,
            "since": [list(step) for step in self._since],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes :meth:`state_dict`'s result back."""
        self.points = [dict(point) for point in state["points"]]
        self.seconds, self.held_up = state["seconds"], state["held_up"]
        self._since = [list(step) for step in state["since"]]


class Training:
    """A run that is going on."""

    def __init__(self, run: Run, corpus: Corpus, device: torch.device) -> None:
        self.run, self.corpus, self.device = run, corpus, device
        norm, drops = ARMS[run.arm]
        self.model: MaskedLM = masked_lm(norm, run.shape, run.seed).to(device)
        if run.compiled:
            self.model.compile()
        self.drop = LayerDrop(run.theta, total_steps=run.steps, seed=run.seed) if drops else None
        self.loop: Loop = adamw_loop(
            self.model,
            loss,
            precision=run.precision,
            device=device,
            lr=run.lr,
            steps=run.steps,
            warmup=int(run.warmup * run.steps),
            features=() if self.drop is None else (self.drop,),
        )
        self.batches = Batches(corpus.train, run.batch, run.seed, threads=1)
        self.curve = Curve()

    @property
    def step(self) -> int:
        """Steps done."""
        return self.loop.progress.step

    def objects(self) -> dict[str, Stateful]:
        """What a checkpoint holds."""
        return {
            "model": self.model,
            "optimizer": self.loop.progress.optimizer,
            "loop": self.loop,
            "batches": self.batches,
            "curve": self.curve,
            "random": RandomState(),
        }

    def train_step(self) -> float:
        """One step; its seconds, from asking for the batch to reading the loss."""
        start = time.perf_counter()
        given = next(self.batches).inputs
        report = self.loop.train_batch([{name: self._moved(given[name]) for name in ("input_ids", "labels")}])
        seconds = time.perf_counter() - start
        layers = report.metrics.get("layer_drop/layers", float(self.run.shape.layers))
        self.curve.add(seconds, report.loss, layers)
        return seconds

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return pinned.to(self.device, non_blocking=True)

    def evaluate(self) -> float:
        """The mean loss of the held-out text's masked tokens, with all layers."""
        self.model.eval()
        metric = MeanLoss(shift=False)
        with torch.no_grad():
            for batch in Batches(self.corpus.held_out, self.run.batch, HELD_OUT_SEED, passes=1, shuffle=False):
                ids, labels = batch.inputs["input_ids"], batch.inputs["labels"]
                with self.loop.precision.forward():
                    # Not through __call__, which may be compiled for training alone.
                    mean = self.model.forward(self._moved(ids), self._moved(labels))
                metric.update_loss(float(mean), labels)
        return metric.compute()["loss"]

    def close(self) -> None:
        """Ends the background thread."""
        self.batches.close()


def train(run: Run, corpus: Corpus, out: Path, device: torch.device, limit: float, say: Callable[[str], object]) -> str:
    """Trains to the end, or for ``limit`` seconds of this process, and writes ``out/NAME.json`` after each evaluation.

    A run that is cut leaves a checkpoint, from which the next call goes on. One that is done leaves ``out/NAME/``, a
    Hugging Face directory with its tokenizer. Gives ``done`` or ``cut``; a loss that is no number is written down as
    ``failed`` and raised.
    """
    result, checkpoints = out / f"{run.name}.json", Checkpoints(out / f"{run.name}.checkpoints", keep=1)
    if result.exists() and json.loads(result.read_text("utf-8"))["status"] == "done":
        say(f"{run.name}: done before")
        return "done"
    began = time.monotonic()
    training = Training(run, corpus, device)
    if checkpoints.latest() is not None:
        say(f"{run.name}: goes on from step {checkpoints.restore(training.objects())}")
    record = partial(_write, result, training)
    try:
        while training.step < run.steps:
            if time.monotonic() - began > limit:
                checkpoints.save(training.step, training.objects())
                record("cut")
                return "cut"
            training.train_step()
            if training.step % run.every == 0 or training.step == run.steps:
                wait(device)
                point = training.curve.point(training.step, training.step * run.batch, training.evaluate())
                record("running")
                say(f"{run.name}: " + ", ".join(f"{key} {value:.6g}" for key, value in point.items()))
    except EngineError as error:
        record("failed", str(error))
        raise
    finally:
        training.close()
    model: Any = training.model.model
    model.save_pretrained(out / run.name)
    corpus.tokenizer.save_pretrained(out / run.name)
    record("done")
    shutil.rmtree(checkpoints.directory, ignore_errors=True)
    return "done"


def probe(run: Run, corpus: Corpus, device: torch.device, steps: int) -> float:
    """Median seconds of a step, after as many to warm up."""
    training = Training(run, corpus, device)
    try:
        seconds = [training.train_step() for _ in range(2 * steps)]
    finally:
        training.close()
    return statistics.median(seconds[steps:])


def _write(path: Path, training: Training, status: str, error: str = "") -> None:
    curve, drop = training.curve, training.drop
    document = {
        "run": asdict(training.run),
        "status": status,
        "error": error,
        "device": device_in_words(training.device),
        "stack": "" if drop is None else drop.describe(),
        "epochs": training.batches.epoch,
        "seconds": curve.seconds,
        "held_up": curve.held_up,
        "points": curve.points,
    }
    write(path, json.dumps(document, indent=1).encode() + b"\n")
