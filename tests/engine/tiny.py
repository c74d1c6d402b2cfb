"""Tiny checkpoints of every family, made with Hugging Face from random weights, and Hugging Face's outputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch
import transformers
from torch import Tensor

from engine.families import Family, families
from engine.families.source import CanonicalSource
from engine.verify import AUTO_CLASSES
from ops.spec import ModelSpec, Task

#: Holds every checkpoint of the test run; goes with the process.
SCRATCH = TemporaryDirectory(prefix="slipstream-tests-")

#: Lengths of the rows of a batch: unequal, with a prompt of one token.
LENGTHS = (9, 1, 14)
SPECIAL = 3  # ids below this may be special tokens of a family's config


@dataclass(frozen=True)
class Tiny:
    """A checkpoint directory with the live Hugging Face model (fp32, eval) that it was saved from."""

    directory: Path
    model: Any
    vocab_size: int
    pad: int


def family_of(model_type: str) -> Family:
    """The family that reads ``model_type``."""
    return next(family for family in families() if model_type in family.model_types)


@cache
def tiny(model_type: str, task: Task, **changes: Any) -> Tiny:
    """A checkpoint of ``model_type`` with every weight, bias and norm random and outputs of a standard deviation near
    2."""
    family = family_of(model_type)
    values = dict(family.tiny) | changes
    if task == "question_answering":
        values["num_labels"] = 2
    config = transformers.AutoConfig.for_model(model_type, **values)
    torch.manual_seed(11)
    model = getattr(transformers, AUTO_CLASSES[task]).from_config(config, attn_implementation="eager").float().eval()
    embeddings = tuple(f"{family.prefix}{family.body.get(name)}." for name in ("embed.token", "embed.position"))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
            continue
        parameter.data.normal_(0, 0.25)
        if task == "causal_lm" and name.startswith(embeddings):
            parameter.data.mul_(0.02)  # a small stream in the first layers, so that a wrong eps of a norm shows
    pad = int(values.get("pad_token_id") or 0)
    _scale_outputs(model, family, task)
    directory = Path(mkdtemp(prefix=f"{model_type}-", dir=SCRATCH.name))
    model.save_pretrained(directory)
    return Tiny(directory, model, model.config.vocab_size, pad)


def _scale_outputs(model: Any, family: Family, task: Task) -> None:
    """Scales what stands last (a norm, or the output projection) so that the outputs have a standard deviation of 2."""
    if task == "embedding":
        return
    last = family.heads[task]["head.norm" if task == "masked_lm" else "head.out"] if task != "causal_lm" else None
    name = last or f"{family.prefix}{family.body['final_norm']}"
    factor = 2 / float(reference(model, token_rows(model.config.vocab_size), task).std())
    for leaf, parameter in model.named_parameters():
        if leaf.startswith(f"{name}."):
            parameter.data.mul_(factor)


def token_rows(vocab_size: int, lengths: tuple[int, ...] = LENGTHS, seed: int = 5) -> list[list[int]]:
    """Random token ids, one list a row."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(SPECIAL, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def reference(model: Any, rows: list[list[int]], task: Task) -> Tensor:
    """Hugging Face's outputs, each row computed alone: [T, outputs] end to end, or [B, outputs] for whole sequences."""
    outs = []
    for row in rows:
        with torch.inference_mode():
            out = model(torch.tensor([row], device=model.device))
        if task == "question_answering":
            outs.append(torch.stack((out.start_logits, out.end_logits), dim=-1)[0])
        elif task == "sequence_classification":
            outs.append(out.logits)
        else:
            outs.append(out.last_hidden_state[0] if task == "embedding" else out.logits[0])
    return torch.cat(outs)


def flat(outputs: Any, rows: list[list[int]], task: Task, side: str) -> Tensor:
    """The engine's padded outputs without their padding, laid out as :func:`reference` gives them."""
    if task == "sequence_classification":
        return outputs.logits
    if task == "question_answering":
        padded = torch.stack((outputs.start_logits, outputs.end_logits), dim=-1)
    else:
        padded = outputs.last_hidden_state if task == "embedding" else outputs.logits
    pieces = [
        out[: len(row)] if side == "right" else out[len(out) - len(row) :]
        for out, row in zip(padded, rows, strict=True)
    ]
    return torch.cat(pieces)


def padded(rows: list[list[int]], side: str, pad: int) -> dict[str, Tensor]:
    """``rows`` as a padded batch with its mask, the padding on ``side``."""
    longest = max(len(row) for row in rows)
    fill = [[pad] * (longest - len(row)) for row in rows]
    both = list(zip(rows, fill, strict=True))
    ids = [row + gap if side == "right" else gap + row for row, gap in both]
    mask = [
        [1] * len(row) + [0] * len(gap) if side == "right" else [0] * len(gap) + [1] * len(row) for row, gap in both
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def cases() -> list[tuple[str, Task]]:
    """Every model type of every family with every task it serves."""
    return [(name, task) for family in families() for name in family.model_types for task in family.tasks]


def canonical(model: Any, model_type: str, spec: ModelSpec) -> CanonicalSource:
    """The live model's weights under canonical names."""
    from engine.checkpoint import StateDictSource

    return CanonicalSource(StateDictSource(model), family_of(model_type), spec)
