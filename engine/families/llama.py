"""Llama 1 to 3 (and models saved in its format: SmolLM2, TinyLlama, Vicuna ...)."""

from __future__ import annotations

from engine.families.base import Family, HFConfig
from engine.families.rope import rotary_from_hf
from ops.spec import HeadSpec, ModelSpec, Task


def spec(config: HFConfig, task: Task) -> ModelSpec:
    """The facts of a ``LlamaConfig``."""
    hidden, heads = config.get(int, "hidden_size"), config.get(int, "num_attention_heads")
    head_dim = config.get(int, "head_dim", hidden // heads)
    max_positions = config.get(int, "max_position_embeddings", 2048)
    bias = config.get(bool, "attention_bias", False)
    vocab = config.get(int, "vocab_size")
    return ModelSpec(
        family="llama",
        vocab_size=vocab,
        hidden=hidden,
        layers=config.get(int, "num_hidden_layers"),
        heads=heads,
        kv_heads=config.get(int, "num_key_value_heads", heads),
        head_dim=head_dim,
        ffn=config.get(int, "intermediate_size"),
        activation=config.activation("hidden_act", "silu"),
        gated=True,
        norm="rmsnorm",
        norm_eps=config.get(float, "rms_norm_eps", 1e-6),
        placement="pre",
        positions=rotary_from_hf(config, head_dim, max_positions),
        max_positions=max_positions,
        attention_scale=head_dim**-0.5,
        causal=True,
        qkv_bias=bias,
        out_bias=bias,
        ffn_bias=config.get(bool, "mlp_bias", False),
        final_norm=True,
        head=HeadSpec(task=task, outputs=vocab, tied=config.tied(False)),
    )


FAMILY = Family(
    name="Llama",
    model_types=("llama",),
    spec=spec,
    tasks=("causal_lm",),
    prefix="model.",
    body={
        "embed.token": "embed_tokens",
        "layers.{}.attn_norm": "layers.{}.input_layernorm",
        "layers.{}.q": "layers.{}.self_attn.q_proj",
        "layers.{}.k": "layers.{}.self_attn.k_proj",
        "layers.{}.v": "layers.{}.self_attn.v_proj",
        "layers.{}.out": "layers.{}.self_attn.o_proj",
        "layers.{}.ffn_norm": "layers.{}.post_attention_layernorm",
        "layers.{}.gate": "layers.{}.mlp.gate_proj",
        "layers.{}.up": "layers.{}.mlp.up_proj",
        "layers.{}.down": "layers.{}.mlp.down_proj",
        "final_norm": "norm",
    },
    heads={"causal_lm": {"head.out": "lm_head"}},
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    tiny={
        "vocab_size": 160,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
)
