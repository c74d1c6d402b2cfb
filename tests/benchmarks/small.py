"""What the tests of the training benchmarks share: a loop, a small text with its vocabulary, the commands run."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.masked_lm import loss
from benchmarks.steps import adamw_loop
from engine.training.feature import Feature
from engine.training.loop import Loop

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = tuple(f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "e", "i", "o", "u"))


def loop_of(model: nn.Module, *features: Feature) -> Loop:
    """A loop in fp32 on the CPU."""
    given: dict[str, Any] = {"precision": "fp32", "device": torch.device("cpu")}
    return adamw_loop(model, loss, **given, lr=1e-3, steps=100, warmup=2, features=features)


def write_text(directory: Path, documents: int = 150) -> tuple[Path, Path]:
    """A text of as many documents, each of words that follow from the one before, and the vocabulary."""
    random = Random(0)
    parts = []
    for _ in range(documents):
        at = random.randrange(len(WORDS))
        words = []
        for _ in range(random.randrange(20, 60)):
            words.append(WORDS[at])
            at = (at * 7 + random.randrange(2)) % len(WORDS)
        parts.append(" ".join(words).capitalize())
    text, vocabulary = directory / "text.txt", directory / "vocab.txt"
    text.write_text("\n\n".join(parts) + "\n")
    vocabulary.write_text("\n".join((*SPECIAL, *WORDS)) + "\n")
    return text, vocabulary


def call(main: Callable[[], int], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Runs a command's ``main``."""
    monkeypatch.setattr("sys.argv", ["benchmark", *map(str, arguments)])
    return main()


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text("utf-8"))


def ticking() -> SimpleNamespace:
    """A ``time`` whose monotonic clock counts how often it is asked."""
    clock: Iterator[int] = itertools.count()
    return SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
