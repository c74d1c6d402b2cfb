"""BERT for pre-training, post-norm and pre-norm, whose head sees the masked positions only, as in BERT's own code.

Most of a masked language model's logits are never asked for. Hugging Face's models compute all of them;
:class:`MaskedLM` puts their parts together so that the head runs on the positions that have a label. All arms of a
comparison use it, so that what the head costs is the same in each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.training.data.samples import IGNORED

Norm = Literal["postln", "preln"]
#: Share of the tokens that are asked for, as in ``engine.training.data.packed``.
PROBABILITY = 0.15


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; those that are given here are BERT-base's. length: tokens of a sequence. The FFN is four times
    as wide as the model. init: deviation of the weights at the start."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    length: int = 128
    vocabulary: int = 30522
    dropout: float = 0.1
    init: float = 0.02

    @property
    def asked(self) -> int:
        """The most labels that a sequence has."""
        return max(int(self.length * PROBABILITY + 0.5), 1)


class MaskedLM(nn.Module):
    """The mean loss of a Hugging Face masked language model over the tokens that are asked for.

    model: a ``BertForMaskedLM`` or ``RobertaPreLayerNormForMaskedLM``. asked: the most labels a sequence may have;
    a fixed number, so that no shape depends on the data and nothing waits for the device.
    """

    def __init__(self, model: nn.Module, asked: int) -> None:
        super().__init__()
        self.model = model
        self.asked = asked
        # RoBERTa counts positions from the one behind its padding token's.
        config: Any = model.config
        self.first = 0 if hasattr(model, "cls") else int(config.pad_token_id) + 1

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """``input_ids``, ``labels``: [B, S] int64, the labels IGNORED where nothing is asked. No padding."""
        model: Any = self.model
        positions = torch.arange(self.first, self.first + input_ids.shape[1], device=input_ids.device)[None]
        hidden = model.base_model(input_ids, position_ids=positions).last_hidden_state
        picked = (labels != IGNORED).float().topk(self.asked, dim=1, sorted=False).indices
        head = model.cls if hasattr(model, "cls") else model.lm_head
        logits = head(torch.take_along_dim(hidden, picked[..., None], 1))
        wanted = torch.take_along_dim(labels, picked, 1)
        return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)


def masked_lm(norm: Norm, shape: Shape, seed: int = 0) -> MaskedLM:
    """A model with random weights: Hugging Face's BERT (``postln``), or the same with its norms in front of attention
    and FFN and one behind the last layer (``preln``, Hugging Face's RoBERTa-PreLayerNorm)."""
    from transformers import BertConfig, BertForMaskedLM, RobertaPreLayerNormConfig, RobertaPreLayerNormForMaskedLM

    config, kind = {
        "postln": (BertConfig, BertForMaskedLM),
        "preln": (RobertaPreLayerNormConfig, RobertaPreLayerNormForMaskedLM),
    }[norm]
    torch.manual_seed(seed)
    model = kind(
        config(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.hidden,
            max_position_embeddings=shape.length + 1,
            type_vocab_size=2,
            layer_norm_eps=1e-12,
            initializer_range=shape.init,
            hidden_dropout_prob=shape.dropout,
            attention_probs_dropout_prob=shape.dropout,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    return MaskedLM(model, shape.asked)


def loss(model: nn.Module, batch: Any) -> Tensor:
    """The loop's loss function; ``batch`` is a mapping with ``input_ids`` and ``labels``."""
    found: Tensor = model(batch["input_ids"], batch["labels"])
    return found


def random_batch(shape: Shape, batch: int, device: torch.device | str, seed: int = 0) -> dict[str, Tensor]:
    """``input_ids`` and ``labels`` [batch, length] of random ids; as many are asked for as the shape allows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, shape.vocabulary, (batch, shape.length), generator=generator)
    picked = torch.rand(batch, shape.length, generator=generator).argsort(1)[:, : shape.asked]
    labels = torch.full_like(ids, IGNORED).scatter(1, picked, ids.gather(1, picked))
    return {"input_ids": ids.to(device), "labels": labels.to(device)}
