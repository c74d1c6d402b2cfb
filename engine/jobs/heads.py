"""The jobs of encoders with a head: labels, token labels, answers and fillings, as tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from config_schema.job import AnswerJob, ClassifyJob, ClassifyTokensJob, FillMaskJob
from engine.jobs.console import Console
from engine.jobs.files import results
from engine.jobs.tables import table

if TYPE_CHECKING:
    from engine.engine import Engine

Item = TypeVar("Item")
Result = TypeVar("Result")


def classify(engine: Engine, job: ClassifyJob, console: Console) -> None:
    """The labels of each text."""
    assert job.texts is not None
    found = _in_batches(engine, job.texts, lambda part: engine.classify(part, top_k=job.top_k), console)
    rows: list[tuple[str, ...]] = []
    with results(job.output) as write:
        for text, labels in zip(job.texts, found, strict=True):
            write({"text": text, "labels": [asdict(label) for label in labels]})
            shown = text if isinstance(text, str) else " | ".join(text)
            for place, label in enumerate(labels):
                rows.append(("" if place else shown, label.label, _score(label.score)))
    console.line(table(("text", "label", "score"), rows, [0, 1]))
    _summary(console, len(job.texts), "text")


def classify_tokens(engine: Engine, job: ClassifyTokensJob, console: Console) -> None:
    """The labels of each text's tokens."""
    assert job.texts is not None
    found = _in_batches(engine, job.texts, engine.classify_tokens, console)
    rows: list[tuple[str, ...]] = []
    with results(job.output) as write:
        for number, (text, labels) in enumerate(zip(job.texts, found, strict=True), start=1):
            write({"text": text, "tokens": [asdict(label) for label in labels]})
            for place, label in enumerate(labels):
                span = f"{label.start}-{label.end}"
                rows.append(("" if place else str(number), span, label.token, label.label, _score(label.score)))
    console.line(table(("text", "characters", "token", "label", "score"), rows, [2, 3]))
    _summary(console, len(job.texts), "text")


def answer(engine: Engine, job: AnswerJob, console: Console) -> None:
    """The answer to each question."""
    rows: list[tuple[str, ...]] = []
    with results(job.output) as write:
        for done, asked in enumerate(job.questions, start=1):
            found = engine.answer(asked.question, asked.context)
            write({"question": asked.question, "answer": asdict(found)})
            rows.append((asked.question, found.text, _score(found.score), f"{found.start}-{found.end}"))
            console.status(f"{done} of {len(job.questions)} questions")
    console.line(table(("question", "answer", "score", "characters"), rows, [0, 1]))
    _summary(console, len(job.questions), "question")


def fill_mask(engine: Engine, job: FillMaskJob, console: Console) -> None:
    """What fits into each mask."""
    assert job.texts is not None
    found = _in_batches(engine, job.texts, lambda part: engine.fill_mask(part, top_k=job.top_k), console)
    rows: list[tuple[str, ...]] = []
    with results(job.output) as write:
        for text, masks in zip(job.texts, found, strict=True):
            write({"text": text, "masks": [[asdict(fill) for fill in fills] for fills in masks]})
            for number, fills in enumerate(masks, start=1):
                for place, fill in enumerate(fills):
                    first = number == 1 and not place
                    rows.append((text if first else "", "" if place else str(number), fill.text, _score(fill.score)))
    console.line(table(("text", "mask", "token", "score"), rows, [0, 2]))
    _summary(console, len(job.texts), "text")


def _in_batches(
    engine: Engine, items: Sequence[Item], call: Callable[[Any], list[Result]], console: Console
) -> list[Result]:
    """``call`` on as many items at a time as run at once, with progress between."""
    begun, size = time.perf_counter(), engine.plan.max_batch
    found: list[Result] = []
    for start in range(0, len(items), size):
        found += call(list(items[start : start + size]))
        console.status(f"{len(found)} of {len(items)} texts, {len(found) / (time.perf_counter() - begun):.0f} texts/s")
    return found


def _summary(console: Console, count: int, what: str) -> None:
    console.note(f"{count} {what}{'' if count == 1 else 's'}")


def _score(value: float) -> str:
    return f"{value:.4f}"
