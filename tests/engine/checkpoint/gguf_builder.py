"""GGUF files with llama.cpp's names, written with the package ``gguf``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """Of a small model."""

    vocabulary: int = 96
    hidden: int = 64
    ffn: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2


SMALL = Sizes()


def llama_shapes(sizes: Sizes = SMALL) -> Shapes:
    """The tensors of a Llama with grouped-query attention and a tied head."""
    hidden, ffn, kv = sizes.hidden, sizes.ffn, sizes.hidden // sizes.heads * sizes.kv_heads
    block: Shapes = {
        "attn_norm": (hidden,),
        "attn_q": (hidden, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, hidden),
        "ffn_norm": (hidden,),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    shapes: Shapes = {"token_embd.weight": (sizes.vocabulary, hidden), "output_norm.weight": (hidden,)}
    for layer in range(sizes.layers):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def gpt2_shapes(sizes: Sizes = SMALL) -> Shapes:
    """The tensors of a GPT-2 (llama.cpp transposes its Conv1D weights), with the head stored apart."""
    hidden = sizes.hidden
    linear: Shapes = {
        "attn_qkv": (3 * hidden, hidden),
        "attn_output": (hidden, hidden),
        "ffn_up": (4 * hidden, hidden),
        "ffn_down": (hidden, 4 * hidden),
    }
    shapes: Shapes = {
        "token_embd.weight": (sizes.vocabulary, hidden),
        "position_embd.weight": (1024, hidden),  # transformers reads no other length for GPT-2
        "output_norm.weight": (hidden,),
        "output_norm.bias": (hidden,),
        "output.weight": (sizes.vocabulary, hidden),
    }
    for layer in range(sizes.layers):
        for name in ("attn_norm", "ffn_norm"):
            shapes |= {f"blk.{layer}.{name}.{kind}": (hidden,) for kind in ("weight", "bias")}
        for name, shape in linear.items():
            shapes |= {f"blk.{layer}.{name}.weight": shape, f"blk.{layer}.{name}.bias": shape[:1]}
    return shapes


def write(path: Path, architecture: str, shapes: Mapping[str, tuple[int, ...]], quantization: str = "Q8_0") -> Path:
    """A GGUF file of random weights in the sizes ``SMALL``: matrices quantized, vectors in float32."""
    import gguf

    kind = gguf.GGMLQuantizationType[quantization]
    generator = np.random.default_rng(0)
    writer: Any = _writer(path, architecture, SMALL)
    for name, shape in shapes.items():
        values = generator.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    return _finish(writer, path)


def write_llama(path: Path, sizes: Sizes) -> Path:
    """A Llama of these sizes in Q8_0 (34 bytes hold 32 weights), all of its weights zero, which is quick to write."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0
    writer: Any = _writer(path, "llama", sizes)
    for name, shape in llama_shapes(sizes).items():
        if len(shape) == 1:
            writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
        else:
            writer.add_tensor(name, np.zeros((shape[0], shape[1] // 32 * 34), dtype=np.uint8), raw_dtype=kind)
    return _finish(writer, path)


def _writer(path: Path, architecture: str, sizes: Sizes) -> Any:
    import gguf

    writer: Any = gguf.GGUFWriter(path, architecture)
    writer.add_name("test")
    writer.add_context_length(1024)
    writer.add_embedding_length(sizes.hidden)
    writer.add_feed_forward_length(sizes.ffn)
    writer.add_block_count(sizes.layers)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(sizes.vocabulary)])
    return writer


def _finish(writer: Any, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
