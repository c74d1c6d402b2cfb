"""Rotary frequencies against Hugging Face's own functions for each scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.errors import CheckpointError
from engine.families.base import HFConfig
from engine.families.rope import rotary_from_hf

HEAD_DIM = 64
SCALINGS: list[dict[str, Any] | None] = [
    None,
    {"rope_type": "linear", "factor": 8.0},
    {"type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
    },
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_frequencies_are_hugging_faces(scaling: dict[str, Any] | None, theta: float) -> None:
    config = LlamaConfig(
        hidden_size=HEAD_DIM * 4,
        num_attention_heads=4,
        max_position_embeddings=8192,
        rope_theta=theta,
        rope_scaling=None if scaling is None else dict(scaling),
    )
    theirs = LlamaRotaryEmbedding(config)
    ours = rotary_from_hf(HFConfig(config.to_dict(), "config.json"), HEAD_DIM, 8192)
    assert torch.allclose(torch.tensor(ours.inv_freq), theirs.inv_freq, rtol=2e-6)
    assert ours.factor == pytest.approx(theirs.attention_scaling, rel=1e-6)


def test_both_spellings_of_transformers_4_and_5() -> None:
    old = {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}}
    assert rotary_from_hf(HFConfig(old, "c"), 32, 64) == rotary_from_hf(HFConfig(new, "c"), 32, 64)


def test_an_unknown_scaling_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: rope_scaling: rope_type 'longrope' is not supported"):
        rotary_from_hf(HFConfig({"rope_scaling": {"rope_type": "longrope"}}, "config.json"), 32, 64)
