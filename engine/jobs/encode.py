"""The job "encode": vectors of texts, and how alike the texts are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from config_schema.job import EncodeJob
from engine.jobs.console import Console
from engine.jobs.files import results
from engine.jobs.tables import table

if TYPE_CHECKING:
    from engine.engine import Engine

#: Texts whose similarities fit as a matrix into 80 columns, and texts that are compared at all (their pairs are many).
MATRIX = 11
COMPARED = 5000
SHOWN = 4


def run(engine: Engine, job: EncodeJob, console: Console) -> None:
    """Encodes every text in batches; shows the texts with their similarities, or how their vectors begin."""
    assert job.texts is not None
    texts = list(job.texts)
    rows = engine.embedding_rows(texts)
    tokens = sum(len(row) for row in rows.ids)
    begun, done, vectors = time.perf_counter(), 0, []
    with results(job.output) as write:
        for batch in engine.encode_stream(rows):
            for text, vector in zip(texts[done:], batch.tolist(), strict=False):
                write({"text": text, "vector": vector})
            done += len(batch)
            vectors.append(batch)
            console.status(f"{done} of {len(texts)} texts, {done / (time.perf_counter() - begun):.0f} texts/s")
    seconds = time.perf_counter() - begun
    console.line(_shown(texts, torch.cat(vectors), job.similarity))
    if job.similarity and len(texts) > COMPARED:
        console.note(f"no similarities: {len(texts)} texts are more than {COMPARED}")
    what = "text" if len(texts) == 1 else "texts"
    console.note(f"{len(texts)} {what}, {tokens} tokens, {seconds:.2f} s, {len(texts) / seconds:.0f} texts/s")


def _shown(texts: Sequence[str], vectors: Tensor, similarity: bool) -> str:
    numbers = [str(n + 1) for n in range(len(texts))]
    if not similarity or not 1 < len(texts) <= COMPARED:
        starts = [" ".join(f"{x:+.3f}" for x in vector[:SHOWN].tolist()) + " ..." for vector in vectors]
        headers = ("", f"vector of {vectors.shape[1]}", "text")
        return table(headers, list(zip(numbers, starts, texts, strict=True)), [2])
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    alike = unit @ unit.T
    if len(texts) <= MATRIX:
        matrix = [[number, *map(_cosine, row)] for number, row in zip(numbers, alike.tolist(), strict=True)]
        listed = table(("", "text"), list(zip(numbers, texts, strict=True)), [1])
        return f"{listed}\n\nCosine similarity\n{table(('', *numbers), matrix, [])}"
    best = alike.fill_diagonal_(-2.0).max(dim=-1)
    nearest = [numbers[at] for at in best.indices.tolist()]
    cosines = [_cosine(value) for value in best.values.tolist()]
    return table(("", "nearest", "cosine", "text"), list(zip(numbers, nearest, cosines, texts, strict=True)), [3])


def _cosine(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"
