"""Quantizing while loading: the model is never in memory in floats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from engine import Engine
from tests.engine.checkpoint.memory import PeakMemory

LAYERS, HIDDEN, FFN = 4, 1024, 3072
#: Elements of the layers, which are all but nothing of the model.
ELEMENTS = LAYERS * HIDDEN * (4 * HIDDEN + 3 * FFN)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of 213 MB in fp32."""
    directory = tmp_path_factory.mktemp("llama")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": torch.rand(64, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    square, wide, tall = torch.rand(HIDDEN, HIDDEN), torch.rand(FFN, HIDDEN), torch.rand(HIDDEN, FFN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        tensors |= {f"{at}.self_attn.{name}_proj.weight": square.clone() for name in "qkvo"}
        tensors |= {f"{at}.mlp.{name}_proj.weight": wide.clone() for name in ("gate", "up")}
        tensors |= {f"{at}.mlp.down_proj.weight": tall.clone()}
        tensors |= {f"{at}.{name}_layernorm.weight": torch.ones(HIDDEN) for name in ("input", "post_attention")}
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    yield directory
    (directory / "model.safetensors").unlink()


@pytest.mark.parametrize(("precision", "share"), [("fp32", 1.0), ("int8", 0.25), ("int4", 0.1328)])
def test_the_peak_of_loading(llama: Path, precision: str, share: float) -> None:
    with PeakMemory() as memory:
        engine = Engine.from_pretrained(llama, precision=precision, device="cpu")
    whole = 4 * ELEMENTS
    weights = engine._runner().weights
    kept = sum(
        linear.weight.nbytes for layer in weights.layers for linear in (layer.qkv, layer.out, layer.up, layer.down)
    )
    if precision == "fp32":
        assert memory.rise > 0.5 * whole, "the measurement notices a whole model"
        return
    assert share * whole <= kept <= (share + 0.005) * whole
    # A CPU keeps 4 bits twice; beside them, a chunk of a weight in a few copies.
    assert memory.rise < 0.6 * whole
