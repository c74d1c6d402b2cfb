"""GGUF files: the same tensors and config as transformers, one tensor at a time."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import open_checkpoint
from ops.weights import WeightSource
from tests.engine.checkpoint.builders import refused
from tests.engine.checkpoint.gguf_builder import SMALL, gpt2_shapes, llama_shapes, write

pytest.importorskip("gguf")
SHAPES = {"llama": llama_shapes, "gpt2": gpt2_shapes}
CLASSES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}


def transformers_state(path: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """What ``from_pretrained(gguf_file=...)`` loads."""
    transformers: Any = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    dtype = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    options = {"gguf_file": path.name, dtype: torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options)
    return model.state_dict(), model.config


@pytest.mark.parametrize(("architecture", "quantization"), [("llama", "Q4_0"), ("llama", "F16"), ("gpt2", "Q8_0")])
def test_the_same_as_transformers(architecture: str, quantization: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", architecture, SHAPES[architecture](), quantization)
    checkpoint = open_checkpoint(str(tmp_path), gguf_file=path.name)
    source = checkpoint.source
    expected, config = transformers_state(path)
    assert isinstance(source, WeightSource)
    stored = {name for name in expected if name != "lm_head.weight" or architecture == "gpt2"}
    assert set(source.names()) == stored
    for name in source.names():
        assert source.shape(name) == tuple(expected[name].shape)
        assert source.dtype(name) == source.read(name).dtype == torch.float32
        assert torch.equal(source.read(name), expected[name]), name
        assert torch.equal(source.read(name, slice(1, 3)), expected[name][1:3])
    assert checkpoint.gguf_file == path.name
    assert checkpoint.config["model_type"] == architecture
    assert checkpoint.config["architectures"] == [CLASSES[architecture]]
    assert checkpoint.config["tie_word_embeddings"] == config.tie_word_embeddings
    assert checkpoint.config["vocab_size"] == SMALL.vocabulary


def test_a_tensor_without_a_name_in_transformers_is_surplus(tmp_path: Path) -> None:
    """Llama 3.1's factors, say: transformers drops them without a word, which would give wrong positions."""
    path = write(tmp_path / "model.gguf", "llama", llama_shapes() | {"rope_freqs.weight": (8,)})
    source = open_checkpoint(str(tmp_path), gguf_file=path.name).source
    assert source.shape("rope_freqs.weight") == (8,)
    assert source.read("rope_freqs.weight").shape == (8,)
    assert "rope_freqs.weight" in source.names(), "offered under its own name, so that the family refuses it"


def test_a_shape_that_is_not_the_architectures(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "llama", llama_shapes() | {"blk.1.ffn_up.weight": (96, 64)})
    source = open_checkpoint(str(tmp_path), gguf_file=path.name).source
    parts = (str(path), "model.layers.1.mlp.up_proj.weight", "shape [96, 64]", "expects [128, 64]")
    refused(lambda: source.read("model.layers.1.mlp.up_proj.weight"), *parts)


def test_an_architecture_transformers_does_not_know(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "rwkv7", {})
    refused(lambda: open_checkpoint(str(tmp_path), gguf_file=path.name), str(path), "rwkv7", "transformers cannot read")


def test_damage(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", "llama", llama_shapes()).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in (4, 20, 200, 2000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(lambda: open_checkpoint(str(tmp_path), gguf_file="cut.gguf"), str(path))
    path.write_bytes(b"<html>gone</html>")
    refused(lambda: open_checkpoint(str(tmp_path), gguf_file="cut.gguf"), str(path), "not a GGUF file", "HTML")


def test_names_that_are_not_there_or_lead_out(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", "llama", llama_shapes())
    refused(lambda: open_checkpoint(str(tmp_path), gguf_file="b.gguf"), "b.gguf: no such file", "there: a.gguf")
    refused(lambda: open_checkpoint(str(tmp_path), gguf_file="../a.gguf"), "gguf_file", "leads out")


def test_the_package_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(20))
    code = f"""
        import sys
        sys.modules["gguf"] = None
        from engine.checkpoint import open_checkpoint
        from engine.errors import CheckpointError
        try:
            open_checkpoint({str(tmp_path)!r}, gguf_file="a.gguf")
        except CheckpointError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    assert (
        done.stdout == f'{tmp_path / "a.gguf"}: GGUF needs optional packages: pip install "slipstream-runtime[gguf]"\n'
    )
