"""Whole-sequence inference: an encoder's outputs with Hugging Face's names, and sentence embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import CheckpointError, EngineError
from engine.inference.inputs import Flat, Rows
from engine.inference.runner import Runner
from ops.plan import StepResult
from ops.spec import Task

Pooling = Literal["mean", "cls"]


def forward(runner: Runner, rows: Rows | Flat) -> Any:
    """The model's outputs for whole sequences, as the Hugging Face class of the task gives them.

    Tensors [B, S, ...] follow the caller's padding; what stands at a padded place is zero.
    """
    if rows.types is not None and not runner.spec.token_types:
        rows = replace(rows, types=None)
    task: Task = runner.spec.head.task if runner.spec.head is not None else "embedding"
    outputs = _OUTPUTS[task]
    if isinstance(rows, Flat):
        return runner.flat(rows, lambda result: outputs(rows, result))
    return outputs(rows, runner.whole(rows.ids, rows.types))


def _embedding(rows: Rows | Flat, result: StepResult) -> Any:
    from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

    hidden = rows.pad(result.hidden)
    if result.outputs is None:
        return BaseModelOutput(last_hidden_state=hidden)
    return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=result.outputs)


def _sequence_classification(rows: Rows | Flat, result: StepResult) -> Any:
    from transformers.modeling_outputs import SequenceClassifierOutput

    return SequenceClassifierOutput(logits=result.outputs)


def _token_classification(rows: Rows | Flat, result: StepResult) -> Any:
    from transformers.modeling_outputs import TokenClassifierOutput

    assert result.outputs is not None
    return TokenClassifierOutput(logits=rows.pad(result.outputs))


def _question_answering(rows: Rows | Flat, result: StepResult) -> Any:
    from transformers.modeling_outputs import QuestionAnsweringModelOutput

    assert result.outputs is not None
    start, end = rows.pad(result.outputs).unbind(-1)
    return QuestionAnsweringModelOutput(start_logits=start, end_logits=end)


def _masked_lm(rows: Rows | Flat, result: StepResult) -> Any:
    from transformers.modeling_outputs import MaskedLMOutput

    assert result.outputs is not None
    return MaskedLMOutput(logits=rows.pad(result.outputs))


def _causal_lm(rows: Rows | Flat, result: StepResult) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    assert result.outputs is not None
    return CausalLMOutputWithPast(logits=rows.pad(result.outputs))


_OUTPUTS: dict[Task, Callable[[Rows | Flat, StepResult], Any]] = {
    "embedding": _embedding,
    "sequence_classification": _sequence_classification,
    "token_classification": _token_classification,
    "question_answering": _question_answering,
    "masked_lm": _masked_lm,
    "causal_lm": _causal_lm,
}


def pool(hidden: Tensor, lengths: Sequence[int], pooling: Pooling, normalize: bool) -> Tensor:
    """One fp32 vector [B, hidden] for each sequence of the flat ``hidden`` [T, hidden]: its mean or its first
    token's."""
    if pooling == "cls":
        firsts = torch.tensor([end - length for end, length in zip(accumulate(lengths), lengths, strict=True)])
        vectors = hidden[firsts.to(hidden.device)].float()
    else:
        counts = torch.tensor(lengths, device=hidden.device)
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), counts)
        vectors = torch.zeros(len(lengths), hidden.shape[1], device=hidden.device)
        vectors = vectors.index_add_(0, owner, hidden.float()) / counts[:, None]
    return F.normalize(vectors, dim=-1) if normalize else vectors


def embed(runner: Runner, rows: Rows, pooling: Pooling, normalize: bool, batch_size: int) -> Iterator[Tensor]:
    """Sentence embeddings [batch, hidden] in fp32 on the CPU, in the order given, ``batch_size`` sequences at a
    time."""
    for start in range(0, len(rows.ids), batch_size):
        ids = rows.ids[start : start + batch_size]
        types = rows.types[start : start + batch_size] if rows.types is not None and runner.spec.token_types else None
        yield pool(runner.whole(ids, types).hidden, [len(row) for row in ids], pooling, normalize).cpu()


def pooling_of(directory: Path | None) -> tuple[Pooling, bool, str]:
    """How a sentence-transformers checkpoint pools: (pooling, normalize, reason); mean and normalized where it does not
    say."""
    path = directory / "1_Pooling" / "config.json" if directory is not None else None
    if path is None or not path.is_file():
        return "mean", True, "the checkpoint does not say: mean of the tokens, normalized"
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    modes = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    known: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise EngineError(
            f'{path}: pooling {", ".join(modes)} is not built here: set embedding.pooling to "mean" or "cls"'
        )
    modules = path.parent.parent / "modules.json"
    normalize = "Normalize" in modules.read_text("utf-8") if modules.is_file() else True
    return known[modes[0]], normalize, f"{path.parent.name}/{path.name} of the checkpoint says so"
