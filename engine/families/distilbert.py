"""DistilBERT: BERT without token types and pooler, with names of its own."""

from __future__ import annotations

from dataclasses import replace

from engine.families.base import Family, HFConfig
from engine.families.bert import TASKS, encoder_head
from ops.spec import HeadSpec, LearnedPositions, ModelSpec, Task


def _head(config: HFConfig, task: Task) -> HeadSpec | None:
    """BERT's heads, but for the pooler, which is missing, and the classifier's ReLU."""
    if task == "embedding":
        return None
    head = encoder_head(config, task, activation="activation")
    return replace(head, activation="relu") if task == "sequence_classification" else head


def spec(config: HFConfig, task: Task) -> ModelSpec:
    """The facts of a ``DistilBertConfig``. Its norms have a fixed eps of 1e-12."""
    hidden, heads = config.get(int, "dim", 768), config.get(int, "n_heads", 12)
    positions = config.get(int, "max_position_embeddings", 512)
    return ModelSpec(
        family="distilbert",
        vocab_size=config.get(int, "vocab_size", 30522),
        hidden=hidden,
        layers=config.get(int, "n_layers", 6),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=config.get(int, "hidden_dim", 4 * hidden),
        activation=config.activation("activation", "gelu"),
        norm="layernorm",
        norm_eps=1e-12,
        placement="post",
        positions=LearnedPositions(positions),
        max_positions=positions,
        attention_scale=(hidden // heads) ** -0.5,
        causal=False,
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        embedding_norm=True,
        head=_head(config, task),
    )


FAMILY = Family(
    name="DistilBERT",
    model_types=("distilbert",),
    spec=spec,
    tasks=TASKS,
    prefix="distilbert.",
    body={
        "embed.token": "embeddings.word_embeddings",
        "embed.position": "embeddings.position_embeddings",
        "embed.norm": "embeddings.LayerNorm",
        "layers.{}.q": "transformer.layer.{}.attention.q_lin",
        "layers.{}.k": "transformer.layer.{}.attention.k_lin",
        "layers.{}.v": "transformer.layer.{}.attention.v_lin",
        "layers.{}.out": "transformer.layer.{}.attention.out_lin",
        "layers.{}.attn_norm": "transformer.layer.{}.sa_layer_norm",
        "layers.{}.up": "transformer.layer.{}.ffn.lin1",
        "layers.{}.down": "transformer.layer.{}.ffn.lin2",
        "layers.{}.ffn_norm": "transformer.layer.{}.output_layer_norm",
    },
    heads={
        "embedding": {},
        "sequence_classification": {"head.dense": "pre_classifier", "head.out": "classifier"},
        "token_classification": {"head.out": "classifier"},
        "question_answering": {"head.out": "qa_outputs"},
        "masked_lm": {
            "head.dense": "vocab_transform",
            "head.norm": "vocab_layer_norm",
            "head.out": "vocab_projector",
        },
    },
    tiny={
        "vocab_size": 160,
        "dim": 48,
        "n_layers": 3,
        "n_heads": 4,
        "hidden_dim": 80,
        "max_position_embeddings": 128,
        "num_labels": 5,
    },
)
