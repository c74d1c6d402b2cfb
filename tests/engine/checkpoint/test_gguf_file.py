"""GGUF files: the same tensors and config as transformers, one tensor at a time."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.checkpoint import check_tensors, open_checkpoint
from ops.weights import WeightSource
from tests.engine.checkpoint.builders import refused

gguf: Any = pytest.importorskip("gguf")
VOCABULARY, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS = 96, 64, 128, 2, 4, 2


def llama_tensors() -> dict[str, tuple[int, ...]]:
    """llama.cpp's names and shapes of a Llama with grouped-query attention."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    kv = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        block = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (kv, HIDDEN),
            "attn_v": (kv, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (FFN, HIDDEN),
            "ffn_up": (FFN, HIDDEN),
            "ffn_down": (HIDDEN, FFN),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def gpt2_tensors() -> dict[str, tuple[int, ...]]:
    """llama.cpp's names and shapes of a GPT-2 (its Conv1D weights transposed), with the head stored apart."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "position_embd.weight": (1024, HIDDEN),  # transformers reads no other length
        "output_norm.weight": (HIDDEN,),
        "output_norm.bias": (HIDDEN,),
        "output.weight": (VOCABULARY, HIDDEN),
    }
    linear = {
        "attn_qkv": (3 * HIDDEN, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_up": (4 * HIDDEN, HIDDEN),
        "ffn_down": (HIDDEN, 4 * HIDDEN),
    }
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            shapes |= {f"blk.{layer}.{name}.{kind}": (HIDDEN,) for kind in ("weight", "bias")}
        for name, shape in linear.items():
            shapes |= {f"blk.{layer}.{name}.weight": shape, f"blk.{layer}.{name}.bias": shape[:1]}
    return shapes


TENSORS = {"llama": llama_tensors, "gpt2": gpt2_tensors}


def write(
    path: Path, architecture: str, quantization: str = "Q8_0", extra: dict[str, tuple[int, ...]] | None = None
) -> Path:
    """A GGUF file with random weights: matrices quantized, vectors in float32; ``extra`` are further float32 tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("test")
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    generator = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, shape in (TENSORS.get(architecture, dict)() | (extra or {})).items():
        values = generator.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
    path = write(tmp_path / "model.gguf", architecture, quantization)
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
    assert checkpoint.config["architectures"] == [type_name(architecture)]
    assert checkpoint.config["tie_word_embeddings"] == config.tie_word_embeddings
    assert checkpoint.config["vocab_size"] == VOCABULARY


def type_name(architecture: str) -> str:
    return {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[architecture]


def test_a_tensor_without_a_name_in_transformers_is_surplus(tmp_path: Path) -> None:
    """Llama 3.1's factors, say: transformers drops them without a word, which would give wrong positions."""
    path = write(tmp_path / "model.gguf", "llama", extra={"rope_freqs.weight": (8,)})
    source = open_checkpoint(str(tmp_path), gguf_file=path.name).source
    assert source.shape("rope_freqs.weight") == (8,)
    assert source.read("rope_freqs.weight").shape == (8,)
    expected = {name: source.shape(name) for name in source.names() if name != "rope_freqs.weight"}
    with pytest.raises(Exception, match=r"model\.gguf: rope_freqs\.weight: surplus"):
        check_tensors(source, expected)


def test_a_shape_that_is_not_the_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = llama_tensors() | {"blk.1.ffn_up.weight": (FFN - 32, HIDDEN)}
    monkeypatch.setitem(TENSORS, "llama", lambda: shapes)
    path = write(tmp_path / "model.gguf", "llama")
    source = open_checkpoint(str(tmp_path), gguf_file=path.name).source
    parts = (str(path), "model.layers.1.mlp.up_proj.weight", "shape [96, 64]", "expects [128, 64]")
    refused(lambda: source.read("model.layers.1.mlp.up_proj.weight"), *parts)


def test_an_architecture_transformers_does_not_know(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "rwkv7")
    refused(lambda: open_checkpoint(str(tmp_path), gguf_file=path.name), str(path), "rwkv7", "transformers cannot read")


def test_damage(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", "llama").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in (4, 20, 200, 2000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(lambda: open_checkpoint(str(tmp_path), gguf_file="cut.gguf"), str(path))
    path.write_bytes(b"<html>gone</html>")
    refused(lambda: open_checkpoint(str(tmp_path), gguf_file="cut.gguf"), str(path), "not a GGUF file", "HTML")


def test_names_that_are_not_there_or_lead_out(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", "llama")
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
