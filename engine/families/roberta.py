"""RoBERTa: BERT's layers, positions counted from behind the padding row, its own heads."""

from __future__ import annotations

from dataclasses import replace

from engine.families.base import Family, HFConfig
from engine.families.bert import BODY, TASKS, TINY, encoder_head, encoder_spec
from ops.spec import ModelSpec, Task


def spec(config: HFConfig, task: Task) -> ModelSpec:
    """The facts of a ``RobertaConfig``. Position 0 is row ``pad_token_id + 1``; its masked LM uses exact GELU
    always."""
    head = encoder_head(config, task)
    if task == "masked_lm":
        head = replace(head, activation="gelu")
    return encoder_spec(config, head, family="roberta", offset=config.get(int, "pad_token_id", 1) + 1)


FAMILY = Family(
    name="RoBERTa",
    model_types=("roberta", "xlm-roberta", "camembert"),
    spec=spec,
    tasks=TASKS,
    prefix="roberta.",
    body=BODY,
    heads={
        "embedding": {"head.dense": "{base}pooler.dense"},
        "sequence_classification": {"head.dense": "classifier.dense", "head.out": "classifier.out_proj"},
        "token_classification": {"head.out": "classifier"},
        "question_answering": {"head.out": "qa_outputs"},
        "masked_lm": {
            "head.dense": "lm_head.dense",
            "head.norm": "lm_head.layer_norm",
            "head.out.weight": "lm_head.decoder.weight",
            "head.out.bias": ("lm_head.decoder.bias", "lm_head.bias"),
        },
    },
    ignored=(r"embeddings\.position_ids",),
    tiny=TINY | {"pad_token_id": 1, "type_vocab_size": 1},
)
