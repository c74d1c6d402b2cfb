"""The model that is trained: a Hugging Face one, by what the configuration says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from config_schema import Config
from engine.checkpoint.directory import model_directory
from engine.checkpoint.pretrained import of_transformers, pretrained
from engine.errors import EngineError
from engine.verify import AUTO_CLASSES
from ops.spec import Task

#: What a class of transformers ends with, by task.
ENDINGS: Mapping[str, Task] = {
    "ForMaskedLM": "masked_lm",
    "ForPreTraining": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
}
#: The model's task by that of the data.
MODEL_TASKS: Mapping[str, Task] = {
    "masked_lm": "masked_lm",
    "causal_lm": "causal_lm",
    "classification": "sequence_classification",
    "regression": "sequence_classification",
    "question_answering": "question_answering",
}
#: Models whose positions count from behind the padding token's id, so that a text has so many less.
PADDED = frozenset(
    ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "xmod", "data2vec-text")
)


def model_task(config: Config, architectures: Sequence[str] | None, where: str) -> Task:
    """What the model is trained for: ``model.task``, else what ``data.task`` needs, else what the checkpoint is."""
    if config.model.task != "auto":
        return config.model.task
    if config.data is not None and config.data.task != "auto":
        return MODEL_TASKS[config.data.task]
    for name in architectures or ():
        for ending, task in ENDINGS.items():
            if name.endswith(ending):
                return task
    named = ", ".join(architectures or ()) or "no architecture"
    raise EngineError(f"$.model.task: {where} names {named}, which says nothing of a task: set model.task")


def load_model(config: Config, tokenizer: Any, *, blank: bool = False) -> nn.Module:
    """The Hugging Face model of ``config.model`` in fp32, on the CPU: its weights, or new ones.

    ``tokenizer`` gives the padding token where the model needs one and has none (GPT-2's classifier); ``blank`` gives
    shapes alone (the meta device). Raises :class:`CheckpointError` or :class:`EngineError` in one line.
    """
    import transformers

    if config.model.gguf_file is not None:
        raise EngineError("$.model.gguf_file: training begins from safetensors: convert the file, or leave it out")
    directory = model_directory(config.model.path, config.model.revision)
    facts = of_transformers(
        directory, lambda: transformers.AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    )
    task = model_task(config, getattr(facts, "architectures", None), str(directory / "config.json"))
    _set_head(config, facts, task)
    if getattr(facts, "pad_token_id", None) is None and task == "sequence_classification" and tokenizer is not None:
        facts.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    kind = getattr(transformers, AUTO_CLASSES[task])
    if blank:
        with torch.device("meta"):
            return cast(nn.Module, of_transformers(directory, lambda: kind.from_config(facts)))
    if config.model.weights == "random":
        model = of_transformers(directory, lambda: kind.from_config(facts, trust_remote_code=False))
    else:
        model = pretrained(kind, directory, config=facts)
    found: nn.Module = model.to(torch.float32)
    return found


def outputs_of(model: nn.Module) -> int | None:
    """Outputs of a Hugging Face model for a text, or None where a model does not say."""
    found: int | None = getattr(getattr(model, "config", None), "num_labels", None)
    return found


def positions(facts: Any) -> int:
    """Tokens of the longest text that a model of Hugging Face's config ``facts`` reads; of another, any number."""
    found = getattr(facts, "max_position_embeddings", None) or getattr(facts, "n_positions", None)
    if not isinstance(found, int) or found < 1:
        return 2**31 - 1
    return found - facts.pad_token_id - 1 if facts.model_type in PADDED else found


def _set_head(config: Config, facts: Any, task: Task) -> None:
    """The number of outputs, and the classes' names, as the data have them."""
    data = config.data
    if task != "sequence_classification" or data is None:
        return
    if data.task == "regression":
        facts.num_labels, facts.problem_type = 1, "regression"
    elif isinstance(data.labels, int):
        facts.num_labels = data.labels
    elif data.labels is not None:
        facts.id2label = dict(enumerate(data.labels))
        facts.label2id = {name: at for at, name in facts.id2label.items()}
