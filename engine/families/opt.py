"""OPT, with the post-norm and the narrower embedding of opt-350m."""

from __future__ import annotations

from engine.families.base import Family, HFConfig
from ops.spec import HeadSpec, LearnedPositions, ModelSpec, Task

OFFSET = 2  # fixed in Hugging Face's OPTLearnedPositionalEmbedding: the table has as many rows more


def spec(config: HFConfig, task: Task) -> ModelSpec:
    """The facts of an ``OPTConfig``. Its norms have PyTorch's eps of 1e-5."""
    config.refuse_unless("layer_norm_elementwise_affine", True, "norms without weights are not computed")
    hidden, heads = config.get(int, "hidden_size", 768), config.get(int, "num_attention_heads", 12)
    positions, vocab = config.get(int, "max_position_embeddings", 2048), config.get(int, "vocab_size", 50272)
    embedding = config.get(int, "word_embed_proj_dim", hidden)
    before = config.get(bool, "do_layer_norm_before", True)
    bias = config.get(bool, "enable_bias", True)
    return ModelSpec(
        family="opt",
        vocab_size=vocab,
        hidden=hidden,
        layers=config.get(int, "num_hidden_layers", 12),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=config.get(int, "ffn_dim", 3072),
        activation=config.activation("activation_function", "relu"),
        norm="layernorm",
        norm_eps=1e-5,
        placement="pre" if before else "post",
        positions=LearnedPositions(positions + OFFSET, OFFSET),
        max_positions=positions,
        attention_scale=(hidden // heads) ** -0.5,
        causal=True,
        qkv_bias=bias,
        out_bias=bias,
        ffn_bias=bias,
        embedding_size=None if embedding == hidden else embedding,
        final_norm=before and not config.get(bool, "_remove_final_layer_norm", False),
        head=HeadSpec(task=task, outputs=vocab, tied=config.tied(True)),
    )


FAMILY = Family(
    name="OPT",
    model_types=("opt",),
    spec=spec,
    tasks=("causal_lm",),
    prefix="model.",
    body={
        "embed.token": "decoder.embed_tokens",
        "embed.position": "decoder.embed_positions",
        "embed.project": "decoder.project_in",
        "layers.{}.attn_norm": "decoder.layers.{}.self_attn_layer_norm",
        "layers.{}.q": "decoder.layers.{}.self_attn.q_proj",
        "layers.{}.k": "decoder.layers.{}.self_attn.k_proj",
        "layers.{}.v": "decoder.layers.{}.self_attn.v_proj",
        "layers.{}.out": "decoder.layers.{}.self_attn.out_proj",
        "layers.{}.ffn_norm": "decoder.layers.{}.final_layer_norm",
        "layers.{}.up": "decoder.layers.{}.fc1",
        "layers.{}.down": "decoder.layers.{}.fc2",
        "final_norm": "decoder.final_layer_norm",
    },
    heads={"causal_lm": {"head.project": "{base}decoder.project_out", "head.out": "lm_head"}},
    tiny={
        "vocab_size": 160,
        "hidden_size": 48,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 80,
        "max_position_embeddings": 128,
    },
)
