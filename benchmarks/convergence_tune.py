"""Fine-tunes the end of a pre-training run on a labelled task, with several seeds."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.steps import adamw_loop, device_in_words
from config_schema import SlipstreamError
from engine.bench.report import write
from engine.training.data.batches import Batches
from engine.training.data.labelled import LabelledTexts, classification, regression
from engine.training.data.source import Source
from engine.training.metrics import metric_for
from engine.training.precision import Mode, Precision

#: More different whole labels than this are values, not classes.
MOST_CLASSES = 20
WARMUP = 0.1


@dataclass(frozen=True)
class Tuning:
    """run: the name of the run whose end is tuned. task: the name of the task's directory. seeds: of the heads and of
    the order of samples."""

    run: str
    task: str
    lr: float
    epochs: float
    batch: int
    seeds: tuple[int, ...]
    precision: Mode

    @property
    def name(self) -> str:
        """Of its file."""
        seeds = "-".join(map(str, self.seeds))
        return f"finetune-{self.run}-{self.task}-lr{self.lr:g}-seed{seeds}"


def part(task: Path, name: str) -> Path:
    """The file of a task's ``train`` or ``dev`` part."""
    for ending in (".jsonl.gz", ".jsonl"):
        if (path := task / f"{name}{ending}").is_file():
            return path
    raise SlipstreamError(f"--finetune {task}: there is no {name}.jsonl.gz or {name}.jsonl in it")


def read(task: Path, tokenizer: Any, length: int) -> tuple[LabelledTexts, LabelledTexts]:
    """The train and dev parts: a classification where all labels are whole numbers and few, else a regression."""
    paths = [part(task, name) for name in ("train", "dev")]
    labels = {float(row.values["label"]) for row in Source(paths[0]).rows(["label"])}
    if all(label.is_integer() for label in labels) and len(labels) <= MOST_CLASSES:
        classes = max(2, int(max(labels)) + 1)
        train, dev = (classification(Source(path), tokenizer, length, classes) for path in paths)
    else:
        train, dev = (regression(Source(path), tokenizer, length) for path in paths)
    return train, dev


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Hugging Face's own."""
    found: Tensor = model(**batch).loss
    return found


def one_seed(
    directory: Path, train: LabelledTexts, dev: LabelledTexts, tuning: Tuning, seed: int, device: torch.device
) -> dict[str, float]:
    """Fine-tunes all weights, the head's drawn from ``seed``; the figures of the dev part at the end."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    labels = train.classes or 1
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=labels).to(device)
    steps = max(int(tuning.epochs * len(train) / tuning.batch), 1)
    loop = adamw_loop(
        model,
        loss,
        precision=tuning.precision,
        device=device,
        lr=tuning.lr,
        steps=steps,
        warmup=int(WARMUP * steps),
    )
    batches = Batches(train, tuning.batch, seed, threads=1)
    try:
        for _ in range(steps):
            loop.train_batch([{name: value.to(device) for name, value in next(batches).inputs.items()}])
    finally:
        batches.close()
    model.eval()
    metric = metric_for(dev)
    with torch.no_grad(), Precision(tuning.precision, device.type).forward():
        for batch in Batches(dev, 64, passes=1, shuffle=False):
            inputs = {name: value.to(device) for name, value in batch.inputs.items() if name != "labels"}
            metric.update(model(**inputs).logits, batch.inputs["labels"], batch.indices)
    return metric.compute()


def quiet() -> None:
    """Keeps Hugging Face from telling for every seed that the head is new, and from bars of its own."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()


def finetune(
    directory: Path, task: Path, tuning: Tuning, out: Path, device: torch.device, say: Callable[[str], object]
) -> list[dict[str, float]]:
    """The figures of each seed, written to ``out/NAME.json`` after each."""
    from transformers import PreTrainedTokenizerFast

    if not (directory / "config.json").is_file():
        raise SlipstreamError(f"--run {directory}: holds no model: a run writes one when it is done")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    length = int(json.loads((directory / "config.json").read_text("utf-8"))["max_position_embeddings"]) - 1
    train, dev = read(task, tokenizer, length)
    quiet()
    found: list[dict[str, float]] = []
    for seed in tuning.seeds:
        found.append(one_seed(directory, train, dev, tuning, seed, device))
        say(f"{tuning.name}, seed {seed}: " + ", ".join(f"{key} {value:.4f}" for key, value in found[-1].items()))
        document = {"tuning": asdict(tuning), "device": device_in_words(device), "seeds": found}
        write(out / f"{tuning.name}.json", json.dumps(document, indent=1).encode() + b"\n")
    return found
