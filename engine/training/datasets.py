"""From the section "data" to samples, and from whatever a user gives ``fit`` to samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from config_schema.data import Data
from engine.errors import EngineError
from engine.training.data.answering import question_answering
from engine.training.data.labelled import classification, regression
from engine.training.data.packed import causal_lm, masked_lm
from engine.training.data.readers import Layout
from engine.training.data.samples import Samples
from engine.training.data.source import Source
from engine.training.metrics import FIGURES

#: The data's task by the model's, where it is not said.
TASKS: Mapping[str, str] = {
    "masked_lm": "masked_lm",
    "causal_lm": "causal_lm",
    "sequence_classification": "classification",
    "question_answering": "question_answering",
}


def data_task(data: Data, task: str, outputs: int | None) -> str:
    """What is learnt of the data: as said, or what a model of ``task`` with ``outputs`` outputs learns."""
    if data.task != "auto":
        return data.task
    if task not in TASKS:
        raise EngineError(f'$.data.task: a model for "{task}" has no data of its own here: set data.task')
    return "regression" if task == "sequence_classification" and outputs == 1 else TASKS[task]


def assert_fits(data: Data, task: str, outputs: int | None, limit: int) -> None:
    """Raises :class:`EngineError` where the section "data" asks for what the model is too small for, or for a figure
    that ``task`` has not. ``outputs``: of the model for a text, None where it does not say. ``limit``: its positions.
    """
    if data.metric is not None and data.metric not in FIGURES[task]:
        raise EngineError(f"$.data.metric: {task} has no {data.metric!r}: there are {', '.join(FIGURES[task])}")
    if data.length > limit:
        raise EngineError(f"$.data.length: {data.length} tokens, but the model's positions end at {limit}: lower it")
    if task == "regression" and outputs not in (1, None):
        raise EngineError(f"$.data.task: a regression needs a model with 1 output, this one has {outputs}")
    if task == "classification":
        _classes(data, outputs)


def samples_of(
    data: Data, part: Literal["train", "eval"], tokenizer: Any, task: str, outputs: int | None, limit: int
) -> Samples:
    """The samples of ``data.train`` or ``data.eval``, tokenized. ``outputs`` and ``limit``: see :func:`assert_fits`.

    Raises :class:`EngineError` with file and line for whatever is wrong in the files.
    """
    assert_fits(data, task, outputs, limit)
    files = getattr(data, part)
    if files is None:
        raise EngineError(f"$.data.{part}: missing: name the files")
    columns = data.columns.model_dump(exclude_none=True)
    layout = Layout(documents=data.documents, quoted=data.quoted or None)
    source = Source(list(files) if isinstance(files, tuple) else files, columns, data.format, layout)
    if task == "masked_lm":
        return masked_lm(source, tokenizer, data.length, probability=data.mask_probability, separator=data.separator)
    if task == "causal_lm":
        return causal_lm(source, tokenizer, data.length, separator=data.separator)
    if task == "classification":
        return classification(source, tokenizer, data.length, _classes(data, outputs))
    if task == "regression":
        return regression(source, tokenizer, data.length)
    return question_answering(source, tokenizer, data.length, stride=data.stride, max_question=data.max_question)


def _classes(data: Data, outputs: int | None) -> int | Sequence[str]:
    """How many there are, or their names. More than the model has outputs would end in an index out of range."""
    found = data.labels or outputs
    if found is None:
        raise EngineError("$.data.labels: missing: the model does not say how many classes it tells apart")
    count = found if isinstance(found, int) else len(found)
    if outputs is not None and count > outputs:
        raise EngineError(f"$.data.labels: {count} classes, but the model has {outputs} outputs: give as many, or less")
    return found


class Rows:
    """Rows of tensors or numbers by name, of equal shapes, as samples: a list of mappings, or a torch ``Dataset``."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64], seed: int) -> dict[str, Tensor]:
        """The rows' values stacked, [B, ...] each."""
        rows = [self.rows[int(index)] for index in indices]
        for index, row in zip(indices, rows, strict=True):
            if not isinstance(row, Mapping) or row.keys() != rows[0].keys():
                raise EngineError(f"sample {index}: wanted a mapping with the names of the others, got {row!r:.60}")
        try:
            return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
        except (RuntimeError, TypeError, ValueError) as error:
            said = str(error).splitlines()[0]
            raise EngineError(f"samples {indices.tolist()!r:.60} cannot be put into a batch: {said}") from error


def as_samples(given: Any) -> Samples:
    """What ``fit`` was given, as samples."""
    if hasattr(given, "__len__") and hasattr(given, "batch"):
        return cast(Samples, given)
    if hasattr(given, "__len__") and hasattr(given, "__getitem__"):
        return Rows(given)
    raise EngineError(f"dataset: wanted a list of mappings, a torch Dataset or Samples, got {type(given).__name__}")
