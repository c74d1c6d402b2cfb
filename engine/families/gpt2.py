"""GPT-2."""

from __future__ import annotations

from engine.families.base import Family, HFConfig, Slice
from ops.spec import HeadSpec, LearnedPositions, ModelSpec, Task


def spec(config: HFConfig, task: Task) -> ModelSpec:
    """The facts of a ``GPT2Config``."""
    config.refuse_unless("scale_attn_by_inverse_layer_idx", False, "the attention scale would differ by layer")
    config.refuse_unless("add_cross_attention", False, "only decoders without an encoder are served")
    hidden, heads = config.get(int, "n_embd", 768), config.get(int, "n_head", 12)
    positions, vocab = config.get(int, "n_positions", 1024), config.get(int, "vocab_size", 50257)
    scaled = config.get(bool, "scale_attn_weights", True)
    return ModelSpec(
        family="gpt2",
        vocab_size=vocab,
        hidden=hidden,
        layers=config.get(int, "n_layer", 12),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=config.get(int, "n_inner", 4 * hidden),
        activation=config.activation("activation_function", "gelu_new"),
        norm="layernorm",
        norm_eps=config.get(float, "layer_norm_epsilon", 1e-5),
        placement="pre",
        positions=LearnedPositions(positions),
        max_positions=positions,
        attention_scale=(hidden // heads) ** -0.5 if scaled else 1.0,
        scores_in_fp32=config.get(bool, "reorder_and_upcast_attn", False),
        causal=True,
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        final_norm=True,
        head=HeadSpec(task=task, outputs=vocab, tied=config.tied(True)),
    )


FAMILY = Family(
    name="GPT-2",
    model_types=("gpt2",),
    spec=spec,
    tasks=("causal_lm",),
    prefix="transformer.",
    body={
        "embed.token": "wte",
        "embed.position": "wpe",
        "layers.{}.attn_norm": "h.{}.ln_1",
        "layers.{}.q": Slice("h.{}.attn.c_attn", 0, 3),
        "layers.{}.k": Slice("h.{}.attn.c_attn", 1, 3),
        "layers.{}.v": Slice("h.{}.attn.c_attn", 2, 3),
        "layers.{}.out": "h.{}.attn.c_proj",
        "layers.{}.ffn_norm": "h.{}.ln_2",
        "layers.{}.up": "h.{}.mlp.c_fc",
        "layers.{}.down": "h.{}.mlp.c_proj",
        "final_norm": "ln_f",
    },
    heads={"causal_lm": {"head.out": "lm_head"}},
    transposed=("q", "k", "v", "out", "up", "down"),
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
    tiny={"vocab_size": 160, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 80},
)
