"""GPT-Neo: GPT-2's layout with plain linear layers, unscaled attention, and local attention in some layers."""

from __future__ import annotations

from engine.errors import CheckpointError
from engine.families.base import Family, HFConfig
from ops.spec import HeadSpec, LearnedPositions, ModelSpec, Task


def spec(config: HFConfig, task: Task) -> ModelSpec:
    """The facts of a ``GPTNeoConfig``."""
    hidden, heads = config.get(int, "hidden_size", 2048), config.get(int, "num_heads", 16)
    positions, vocab = config.get(int, "max_position_embeddings", 2048), config.get(int, "vocab_size", 50257)
    layers = config.get(int, "num_layers", 24)
    return ModelSpec(
        family="gpt_neo",
        vocab_size=vocab,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=config.get(int, "intermediate_size", 4 * hidden),
        activation=config.activation("activation_function", "gelu_new"),
        norm="layernorm",
        norm_eps=config.get(float, "layer_norm_epsilon", 1e-5),
        placement="pre",
        positions=LearnedPositions(positions),
        max_positions=positions,
        attention_scale=1.0,
        scores_in_fp32=True,
        windows=_windows(config, layers),
        causal=True,
        out_bias=True,
        ffn_bias=True,
        final_norm=True,
        head=HeadSpec(task=task, outputs=vocab, tied=config.tied(True)),
    )


def _windows(config: HFConfig, layers: int) -> tuple[int | None, ...]:
    """Per layer the window of its attention: ``[[["global", "local"], 12]]`` alternates the two twelve times."""
    window = config.get(int, "window_size", 256)
    pattern = config.values.get("attention_types") or [[["global", "local"], layers // 2]]
    kinds = config.values.get("attention_layers") or [kind for group, times in pattern for kind in list(group) * times]
    if len(kinds) != layers or any(kind not in ("global", "local") for kind in kinds):
        raise CheckpointError(
            f'{config.where}: attention_types: gives {kinds} for {layers} layers of "global" or "local"'
        )
    return tuple(window if kind == "local" else None for kind in kinds)


FAMILY = Family(
    name="GPT-Neo",
    model_types=("gpt_neo",),
    spec=spec,
    tasks=("causal_lm",),
    prefix="transformer.",
    body={
        "embed.token": "wte",
        "embed.position": "wpe",
        "layers.{}.attn_norm": "h.{}.ln_1",
        "layers.{}.q": "h.{}.attn.attention.q_proj",
        "layers.{}.k": "h.{}.attn.attention.k_proj",
        "layers.{}.v": "h.{}.attn.attention.v_proj",
        "layers.{}.out": "h.{}.attn.attention.out_proj",
        "layers.{}.ffn_norm": "h.{}.ln_2",
        "layers.{}.up": "h.{}.mlp.c_fc",
        "layers.{}.down": "h.{}.mlp.c_proj",
        "final_norm": "ln_f",
    },
    heads={"causal_lm": {"head.out": "lm_head"}},
    ignored=(r"h\.\d+\.attn\.attention\.(bias|masked_bias)",),
    tiny={
        "vocab_size": 160,
        "hidden_size": 48,
        "num_layers": 4,
        "num_heads": 4,
        "max_position_embeddings": 128,
        "intermediate_size": 80,
        "window_size": 7,
        "attention_types": [[["global", "local"], 2]],
    },
)
