"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and sliding windows in the upper layers."""

from __future__ import annotations

from dataclasses import replace

from engine.errors import CheckpointError
from engine.families.base import Family, HFConfig
from engine.families.llama import FAMILY as LLAMA
from engine.families.llama import spec as llama_spec
from ops.spec import ModelSpec, Task


def spec(config: HFConfig, task: Task) -> ModelSpec:
    """The facts of a ``Qwen2Config``: Llama's, but for the biases and the windows."""
    llama = llama_spec(config, task)
    windows = _windows(config, llama.layers)
    return replace(llama, family="qwen2", windows=windows, qkv_bias=True, out_bias=False, ffn_bias=False)


def _windows(config: HFConfig, layers: int) -> tuple[int | None, ...]:
    """Per layer the window of its attention: as ``layer_types`` says, in older files from ``max_window_layers`` on."""
    # A null window is none, a missing one is Hugging Face's default.
    window = config.optional(int, "sliding_window") if "sliding_window" in config.values else 4096
    if not config.get(bool, "use_sliding_window", False):
        window = None
    first = config.get(int, "max_window_layers", 28)
    by_rule = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)]
    kinds = config.values.get("layer_types") or by_rule
    if len(kinds) != layers or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise CheckpointError(
            f'{config.where}: layer_types: gives {kinds} for {layers} layers of "full_attention" or "sliding_attention"'
        )
    if "sliding_attention" not in kinds:
        return ()
    if window is None:
        raise CheckpointError(
            f'{config.where}: layer_types: "sliding_attention" needs use_sliding_window and sliding_window'
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


FAMILY = Family(
    name="Qwen2",
    model_types=("qwen2",),
    spec=spec,
    tasks=("causal_lm",),
    prefix="model.",
    body=LLAMA.body,
    heads=LLAMA.heads,
    ignored=LLAMA.ignored,
    tiny={
        "vocab_size": 160,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "use_sliding_window": True,
        "sliding_window": 7,
        # In every layer: transformers before 4.53 computes it so on a CPU, whatever this key says.
        "max_window_layers": 0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
)
