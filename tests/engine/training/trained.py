"""Small models, data and configurations for the tests of an engine that trains."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 60
WORDS = {"1": ("moon", "night", "sea", "quiet"), "0": ("fox", "dog", "quick", "lazy")}


def bert(task: str = "MaskedLM", layers: int = 3, dropout: float = 0.1, **changes: Any) -> Any:
    """A BERT of 16 hidden units, the same weights each time."""
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=24, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **changes,
    )  # fmt: skip
    return getattr(transformers, f"BertFor{task}")(config)


def llama(layers: int = 2) -> Any:
    """A Llama of 16 hidden units."""
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=48, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Stack(nn.Module):
    """A user's own model: residual blocks, and a mean."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.out = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 6] to [B, 1]."""
        for block in self.blocks:
            x = block(x)
        found: torch.Tensor = self.out(x)
        return found


class Block(nn.Module):
    """Pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.inner = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Adds to its input."""
        return x + self.inner(self.norm(x))


def masked(rows: int, seed: int, length: int = 8) -> dict[str, torch.Tensor]:
    """A batch for a masked LM."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = torch.where(torch.rand(rows, length, generator=generator) < 0.4, ids, -100)
    labels[:, 0] = ids[:, 0]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def config(**sections: Any) -> dict[str, Any]:
    """A configuration on the CPU; ``sections`` replace or extend."""
    base: dict[str, Any] = {
        "device": "cpu",
        "training": {"micro_batch_size": 2, "accumulation_steps": 2, "max_steps": 6, "seed": 1},
        "optimizer": {"type": "AdamW", "lr": 1e-2},
    }
    for name, section in sections.items():
        base[name] = {**base[name], **section} if isinstance(section, dict) and name in base else section
    return base


def write_labelled(path: Path, rows: int, seed: int) -> Path:
    """Texts whose words tell their label, as JSON Lines."""
    chance = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            label = chance.choice(sorted(WORDS))
            words = [chance.choice(WORDS[label]) for _ in range(5)]
            file.write(json.dumps({"text": " ".join(words), "label": int(label)}) + "\n")
    return path
