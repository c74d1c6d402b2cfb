"""What runs of the convergence benchmarks share: the curve, the held-out text, a limit of seconds, the files."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.convergence_data import Corpus
from benchmarks.masked_lm import MaskedLM, Shape
from benchmarks.steps import device_in_words, wait
from config_schema import SlipstreamError
from engine.bench.report import write
from engine.training.checkpoint import Checkpoints, Stateful
from engine.training.data.batches import Batches
from engine.training.metrics import MeanLoss
from engine.training.precision import Mode, Precision

#: Of the masks of the held-out text, the same in all runs.
HELD_OUT_SEED = 0
#: A step counts for at most so many times the median of its interval: what is longer compiles, or waits for others.
HELD_UP = 3.0


@dataclass(frozen=True)
class Settings:
    """What is trained. steps: the whole schedule's; warmup: the share of them in which the rate rises. batch: sequences
    a step. evaluations: how many, evenly spread."""

    arm: str
    lr: float
    seed: int
    steps: int
    batch: int = 256
    shape: Shape = field(default_factory=Shape)
    precision: Mode = "bf16"
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
        of the held-out text, ``train_loss`` and what else is given of steps, means since the point before.
    seconds: of training, without evaluations, each step counted for at most HELD_UP times the median. held_up: what
        that leaves out.
    """

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self.seconds = self.held_up = 0.0
        self._since: list[dict[str, float]] = []

    def add(self, seconds: float, loss: float, **others: float) -> None:
        """A step."""
        self._since.append({"seconds": seconds, "train_loss": loss, **others})

    def point(self, step: int, samples: int, held_out: float, **others: float) -> dict[str, float]:
        """An evaluation after ``step``; gives the point, which has ``others`` too."""
        means = {key: statistics.fmean(one[key] for one in self._since) for key in self._since[0]}
        seconds = [one["seconds"] for one in self._since]
        most = HELD_UP * statistics.median(seconds)
        counted = sum(min(one, most) for one in seconds)
        self.seconds += counted
        self.held_up += sum(seconds) - counted
        where = {"step": step, "samples": samples, "seconds": self.seconds, "loss": held_out}
        self.points.append({**means, **where, **others})
        self._since = []
        return self.points[-1]

    def medians(self, steps: int) -> dict[str, float]:
        """Of what was added in the last ``steps`` steps since the last point."""
        last = self._since[-steps:]
        return {key: statistics.median(one[key] for one in last) for key in last[0]}

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {
            "points": [dict(point) for point in self.points],
            "seconds": self.seconds,
            "held_up": self.held_up,
            "since": [dict(step) for step in self._since],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes :meth:`state_dict`'s result back."""
        self.points = [dict(point) for point in state["points"]]
        self.seconds, self.held_up = state["seconds"], state["held_up"]
        self._since = [dict(step) for step in state["since"]]


class PreTraining(ABC):
    """A run that is going on. A subclass gives the model, and trains it."""

    def __init__(self, run: Settings, corpus: Corpus, device: torch.device) -> None:
        self.corpus, self.device = corpus, device
        self.precision = Precision(run.precision, device.type)
        self.batches = Batches(corpus.train, run.batch, run.seed, threads=1)
        self.curve = Curve()

    @property
    @abstractmethod
    def model(self) -> MaskedLM:
        """What is evaluated."""

    @property
    @abstractmethod
    def step(self) -> int:
        """Steps done."""

    @property
    def settled(self) -> bool:
        """Whether the model may be evaluated now."""
        return True

    @abstractmethod
    def objects(self) -> dict[str, Stateful]:
        """What a checkpoint holds."""

    @abstractmethod
    def advance(self, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, float]]:
        """One step on ``input_ids`` and ``labels`` [batch, length], which are on the device. The loss, and what else of
        it the curve keeps."""

    def facts(self) -> dict[str, float]:
        """What a point has beside losses and times."""
        return {}

    def about(self) -> dict[str, object]:
        """What the run's file says beside them."""
        return {}

    def export(self, directory: Path) -> None:
        """The model as a Hugging Face directory with its tokenizer."""
        model: Any = self.model.model
        model.save_pretrained(directory)
        self.corpus.tokenizer.save_pretrained(directory)

    def train_step(self) -> float:
        """One step; its seconds, from asking for the batch to reading the loss."""
        start = time.perf_counter()
        given = next(self.batches).inputs
        loss, others = self.advance({name: self._moved(given[name]) for name in ("input_ids", "labels")})
        seconds = time.perf_counter() - start
        self.curve.add(seconds, loss, **others)
        return seconds

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return pinned.to(self.device, non_blocking=True)

    def evaluate(self) -> float:
        """The mean loss of the held-out text's masked tokens, with all layers."""
        self.model.eval()
        metric = MeanLoss(shift=False)
        size = self.batches.batch_size
        with torch.no_grad():
            for batch in Batches(self.corpus.held_out, size, HELD_OUT_SEED, passes=1, shuffle=False):
                ids, labels = batch.inputs["input_ids"], batch.inputs["labels"]
                with self.precision.forward():
                    # Not through __call__, which may be compiled for training alone.
                    mean = self.model.forward(self._moved(ids), self._moved(labels))
                metric.update_loss(float(mean), labels)
        return metric.compute()["loss"]

    def close(self) -> None:
        """Ends the background thread."""
        self.batches.close()


def train(
    run: Settings, begin: Callable[[], PreTraining], out: Path, limit: float, say: Callable[[str], object]
) -> str:
    """Trains to the end, or for ``limit`` seconds of this process, and writes ``out/NAME.json`` after each evaluation.

    A run that is cut leaves a checkpoint, from which the next call goes on. One that is done leaves ``out/NAME/``, a
    Hugging Face directory with its tokenizer. Gives ``done`` or ``cut``; what stops it otherwise (a loss that is no
    number) is written down as ``failed`` and raised.
    """
    result, checkpoints = out / f"{run.name}.json", Checkpoints(out / f"{run.name}.checkpoints", keep=1)
    if result.exists() and json.loads(result.read_text("utf-8"))["status"] == "done":
        say(f"{run.name}: done before")
        return "done"
    began = time.monotonic()
    training = begin()

    def record(status: str, error: str = "") -> None:
        write(result, json.dumps(_document(run, training, status, error), indent=1).encode() + b"\n")

    if checkpoints.latest() is not None:
        say(f"{run.name}: goes on from step {checkpoints.restore(training.objects())}")
    try:
        while training.step < run.steps:
            if time.monotonic() - began > limit:
                checkpoints.save(training.step, training.objects())
                record("cut")
                return "cut"
            training.train_step()
            due = training.step // run.every > len(training.curve.points)
            if (due and training.settled) or training.step == run.steps:
                wait(training.device)
                samples, held_out = training.step * run.batch, training.evaluate()
                point = training.curve.point(training.step, samples, held_out, **training.facts())
                record("running")
                say(f"{run.name}: " + ", ".join(f"{key} {value:.6g}" for key, value in point.items()))
    except SlipstreamError as error:
        record("failed", str(error))
        raise
    finally:
        training.close()
    training.export(out / run.name)
    record("done")
    shutil.rmtree(checkpoints.directory, ignore_errors=True)
    return "done"


def probe(training: PreTraining, steps: int) -> dict[str, float]:
    """Medians of what the curve has of ``steps`` steps (``seconds``, and others), after as many to warm up. Closes the
    run."""
    try:
        for _ in range(2 * steps):
            training.train_step()
    finally:
        training.close()
    return training.curve.medians(steps)


def _document(run: Settings, training: PreTraining, status: str, error: str) -> dict[str, object]:
    curve = training.curve
    return {
        "run": asdict(run),
        "status": status,
        "error": error,
        "device": device_in_words(training.device),
        **training.about(),
        "epochs": training.batches.epoch,
        "seconds": curve.seconds,
        "held_up": curve.held_up,
        "points": curve.points,
    }
