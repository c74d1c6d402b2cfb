"""How well a model in training does on samples: their task's metric, or the mean loss of a user's own samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.training.data.batches import Batch, Batches
from engine.training.data.samples import Samples
from engine.training.metrics import Answers, MeanLoss, Metric, figure_of, metric_for
from engine.training.ranks import Ranks

#: Gives a model's outputs for the inputs of a batch, or its mean loss.
Infers = Callable[[Any], Any]


def figures_of(
    samples: Samples, infer: Infers, loss_of: Infers, rows: int, team: Ranks, wanted: str | None = None
) -> dict[str, float]:
    """The figures over all processes, the one that the samples' task is judged by (or ``wanted``) first.

    ``rows``: of a batch in one process. Samples without a task have one figure, the mean of ``loss_of`` over rows.
    Draws no random number of its own.
    """
    batches = Batches(samples, rows, rank=team.rank, world=team.size, passes=1, shuffle=False)
    if not hasattr(samples, "task"):
        return {"loss": _mean(batches, loss_of, team)}
    first = figure_of(samples.task, wanted)
    metric = metric_for(samples)
    for batch in batches:
        outputs = infer(batch.inputs)  # also where nothing counts: with shared out weights all processes compute
        if batch.real:
            _take(metric, outputs, batch)
    metric.merge(team.every(metric.state))
    found = metric.compute()
    return {first: found[first], **found}


def _mean(batches: Batches, loss_of: Infers, team: Ranks) -> float:
    total, rows = 0.0, 0
    for batch in batches:
        loss = float(loss_of(batch.inputs))
        total, rows = total + (loss * batch.real if batch.real else 0.0), rows + batch.real
    parts = team.every(lambda: (total, rows))
    return sum(part[0] for part in parts) / sum(part[1] for part in parts)


def _take(metric: Metric, outputs: Any, batch: Batch) -> None:
    """A batch's outputs into the metric. Logits of a language model stay where they are: they are large."""
    labels, real = batch.inputs.get("labels"), slice(batch.real)
    if isinstance(metric, Answers):
        spans = _of(outputs, "start_logits"), _of(outputs, "end_logits")
        metric.update([span[real] for span in spans], None, batch.indices[real])
        return
    assert labels is not None, "all other tasks have labels"
    logits = outputs if isinstance(outputs, Tensor) else _of(outputs, "logits")
    where = logits.device if isinstance(metric, MeanLoss) else torch.device("cpu")
    metric.update(logits[real], labels[real].to(where), batch.indices[real])


def _of(outputs: Any, name: str) -> Tensor:
    found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
    if not isinstance(found, Tensor):
        raise EngineError(f"the task's figures need outputs with {name}, this model gives {type(outputs).__name__}")
    return found
