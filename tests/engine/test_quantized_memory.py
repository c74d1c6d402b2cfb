"""Quantizing while loading: the model is never in memory in floats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ops.quantization.scheme import CHUNK

LAYERS, HIDDEN, FFN = 4, 1024, 3072
#: Elements of the layers, which are all but nothing of the model.
ELEMENTS = LAYERS * HIDDEN * (4 * HIDDEN + 3 * FFN)


def save_llama(directory: Path, layers: int, hidden: int, ffn: int) -> Path:
    """A checkpoint in fp32 of random weights, each stored by itself."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": torch.rand(64, hidden), "model.norm.weight": torch.ones(hidden)}
    square, wide, tall = torch.rand(hidden, hidden), torch.rand(ffn, hidden), torch.rand(hidden, ffn)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors |= {f"{at}.self_attn.{name}_proj.weight": square.clone() for name in "qkvo"}
        tensors |= {f"{at}.mlp.{name}_proj.weight": wide.clone() for name in ("gate", "up")}
        tensors |= {f"{at}.mlp.down_proj.weight": tall.clone()}
        tensors |= {f"{at}.{name}_layernorm.weight": torch.ones(hidden) for name in ("input", "post_attention")}
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """A small one, and one of 213 MB."""
    home = tmp_path_factory.mktemp("llama")
    found = [save_llama(home / "small", 1, 256, 512), save_llama(home / "large", LAYERS, HIDDEN, FFN)]
    yield found
    for directory in found:
        (directory / "model.safetensors").unlink()


#: Room for single weights on their way: so many chunks of fp32.
COPIES = 9
#: In a process of its own, since one that has run other tests has memory left over to put a model in, and one whose
#: allocator gives back at once what is freed; behind a small model, which brings in what any model does.
RETURN_ALL = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
LOAD = """
import json, sys
from engine import Engine
from tests.engine.checkpoint.memory import PeakMemory

small, large, precision = sys.argv[1:]
Engine.from_pretrained(small, precision=precision, device="cpu")
with PeakMemory() as memory:
    engine = Engine.from_pretrained(large, precision=precision, device="cpu")
linears = [one for layer in engine._runner().weights.layers for one in (layer.qkv, layer.out, layer.up, layer.down)]
print(json.dumps({"rise": memory.rise, "kept": sum(linear.weight.nbytes for linear in linears)}))
"""


@pytest.mark.parametrize(("precision", "share", "held"), [("fp32", 1.0, 1), ("int8", 0.25, 1), ("int4", 0.1328, 2)])
def test_the_peak_of_loading(checkpoints: list[Path], precision: str, share: float, held: int) -> None:
    """``held``: a CPU keeps 4 bits in two layouts."""
    command = [sys.executable, "-c", LOAD, *map(str, checkpoints), precision]
    root, environment = Path(__file__).parents[2], {**os.environ, **RETURN_ALL}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, whole = json.loads(done.stdout), 4 * ELEMENTS
    assert share * whole <= found["kept"] <= (share + 0.005) * whole
    if precision == "fp32":
        assert found["rise"] > 0.9 * whole, "the measurement notices a whole model"
    else:
        assert found["rise"] < held * found["kept"] + COPIES * 4 * CHUNK, found["rise"] / whole
