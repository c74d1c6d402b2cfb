"""BERT (MiniLM, and every encoder saved in its format)."""

from __future__ import annotations

from collections.abc import Mapping

from engine.families.base import Family, HFConfig, Source
from ops.spec import HeadSpec, LearnedPositions, ModelSpec, Task

TASKS: tuple[Task, ...] = (
    "embedding",
    "sequence_classification",
    "token_classification",
    "question_answering",
    "masked_lm",
)

#: An encoder layer as BERT and RoBERTa name it.
BODY: Mapping[str, Source] = {
    "embed.token": "embeddings.word_embeddings",
    "embed.position": "embeddings.position_embeddings",
    "embed.token_type": "embeddings.token_type_embeddings",
    "embed.norm": "embeddings.LayerNorm",
    "layers.{}.q": "encoder.layer.{}.attention.self.query",
    "layers.{}.k": "encoder.layer.{}.attention.self.key",
    "layers.{}.v": "encoder.layer.{}.attention.self.value",
    "layers.{}.out": "encoder.layer.{}.attention.output.dense",
    "layers.{}.attn_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layers.{}.up": "encoder.layer.{}.intermediate.dense",
    "layers.{}.down": "encoder.layer.{}.output.dense",
    "layers.{}.ffn_norm": "encoder.layer.{}.output.LayerNorm",
}

TINY = {
    "vocab_size": 160,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "num_labels": 5,
}


def encoder_spec(config: HFConfig, head: HeadSpec, *, family: str, offset: int = 0) -> ModelSpec:
    """The facts of a ``BertConfig`` or one of its kin; ``offset`` shifts the rows of the position table."""
    config.refuse_unless("position_embedding_type", "absolute", "relative positions are not computed")
    config.refuse_unless("is_decoder", False, "encoders are bidirectional")
    hidden, heads = config.get(int, "hidden_size", 768), config.get(int, "num_attention_heads", 12)
    positions = config.get(int, "max_position_embeddings", 512)
    return ModelSpec(
        family=family,
        vocab_size=config.get(int, "vocab_size"),
        hidden=hidden,
        layers=config.get(int, "num_hidden_layers", 12),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=config.get(int, "intermediate_size", 3072),
        activation=config.activation("hidden_act", "gelu"),
        norm="layernorm",
        norm_eps=config.get(float, "layer_norm_eps", 1e-12),
        placement="post",
        positions=LearnedPositions(positions, offset),
        max_positions=positions - offset,
        attention_scale=(hidden // heads) ** -0.5,
        causal=False,
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        token_types=config.get(int, "type_vocab_size", 2),
        embedding_norm=True,
        head=head,
    )


def encoder_head(config: HFConfig, task: Task, activation: str = "hidden_act") -> HeadSpec:
    """Heads as BERT and RoBERTa have them: a tanh pooler on the first token, plain projections, the masked LM's
    transform, whose activation the config names under the key ``activation``."""
    labels = config.labels()
    if task == "embedding":
        return HeadSpec(task=task, outputs=0, first_token=True, dense=True, activation="tanh")
    if task == "sequence_classification":
        return HeadSpec(
            task=task,
            outputs=len(labels),
            first_token=True,
            dense=True,
            activation="tanh",
            bias=True,
            labels=labels,
            scores=config.scores(),
        )
    if task == "masked_lm":
        return HeadSpec(
            task=task,
            outputs=config.get(int, "vocab_size"),
            dense=True,
            activation=config.activation(activation, "gelu"),
            norm=True,
            bias=True,
            tied=config.tied(True),
        )
    return HeadSpec(task=task, outputs=len(labels) if task == "token_classification" else 2, bias=True, labels=labels)


def spec(config: HFConfig, task: Task) -> ModelSpec:
    """The facts of a ``BertConfig``."""
    return encoder_spec(config, encoder_head(config, task), family="bert")


FAMILY = Family(
    name="BERT",
    model_types=("bert",),
    spec=spec,
    tasks=TASKS,
    prefix="bert.",
    body=BODY,
    heads={
        "embedding": {"head.dense": "{base}pooler.dense"},
        "sequence_classification": {"head.dense": "{base}pooler.dense", "head.out": "classifier"},
        "token_classification": {"head.out": "classifier"},
        "question_answering": {"head.out": "qa_outputs"},
        "masked_lm": {
            "head.dense": "cls.predictions.transform.dense",
            "head.norm": "cls.predictions.transform.LayerNorm",
            "head.out.weight": "cls.predictions.decoder.weight",
            "head.out.bias": ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        },
    },
    ignored=(r"embeddings\.position_ids",),
    tiny=TINY,
)
