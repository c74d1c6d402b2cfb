"""What a model family is: how its Hugging Face config becomes a :class:`ModelSpec`, and what its checkpoint calls each
weight.

Adding a family is one file in this package that defines ``FAMILY``; ``docs/adding_a_family.md`` walks through one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from engine.errors import CheckpointError
from ops.spec import Activation, ModelSpec, Scores, Task

T = TypeVar("T", bool, int, float, str)

#: Hugging Face's names of activations. ``gelu_new``, ``gelu_fast`` and ``gelu_pytorch_tanh`` are one formula.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}

#: The end of a Hugging Face class name says what its outputs are; the first that matches counts.
TASKS_BY_ARCHITECTURE: tuple[tuple[str, Task], ...] = (
    ("ForCausalLM", "causal_lm"),
    ("LMHeadModel", "causal_lm"),
    ("ForSequenceClassification", "sequence_classification"),
    ("ForTokenClassification", "token_classification"),
    ("ForQuestionAnswering", "question_answering"),
    ("ForMaskedLM", "masked_lm"),
    ("ForPreTraining", "masked_lm"),
    ("Model", "embedding"),
)


class HFConfig:
    """A checkpoint's ``config.json``, read with types. ``where`` names the file in messages."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, kind: type[T], key: str, default: T | None = None) -> T:
        """The value of ``key`` as ``kind`` (an int is a float); without a default the key must be there and not
        null."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.where}: {key}: missing, this model family needs it")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind:
            raise CheckpointError(f"{self.where}: {key}: got {value!r}, wanted {kind.__name__}")
        return value

    def optional(self, kind: type[T], key: str) -> T | None:
        """The value of ``key`` as ``kind``, or None where it is missing or null."""
        return None if self.values.get(key) is None else self.get(kind, key)

    def activation(self, key: str, default: str | None = None) -> Activation:
        """The activation that ``key`` names."""
        name = self.get(str, key, default)
        if name not in ACTIVATIONS:
            raise CheckpointError(f"{self.where}: {key}: unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def refuse_unless(self, key: str, allowed: object, why: str) -> None:
        """Raises if ``key`` is set to something other than ``allowed``: a fact that no kernel here honours."""
        value = self.values.get(key)
        if value is not None and value != allowed:
            raise CheckpointError(f"{self.where}: {key}: {value!r} is not supported: {why}")

    def tied(self, default: bool) -> bool:
        """Whether the output projection is the token embedding."""
        return self.get(bool, "tie_word_embeddings", default)

    def labels(self) -> tuple[str, ...]:
        """Names of the labels in order (Hugging Face's default is two)."""
        names = self.values.get("id2label")
        if isinstance(names, Mapping):
            return tuple(str(names[key]) for key in sorted(names, key=int))
        return tuple(f"LABEL_{i}" for i in range(self.get(int, "num_labels", 2)))

    def scores(self) -> Scores:
        """What makes scores of a sequence classifier's outputs: ``problem_type``, else the number of labels, as in
        Hugging Face."""
        kind = self.optional(str, "problem_type")
        if kind == "regression":
            return "none"
        return "sigmoid" if kind == "multi_label_classification" or len(self.labels()) == 1 else "softmax"

    def task(self) -> Task | None:
        """What the checkpoint's own class computes, or None where the config names no class."""
        for architecture in self.values.get("architectures") or ():
            for suffix, task in TASKS_BY_ARCHITECTURE:
                if str(architecture).endswith(suffix):
                    return task
        return None


@dataclass(frozen=True)
class Slice:
    """A weight inside a larger tensor: part ``index`` of ``of`` equal parts along its output axis."""

    name: str
    index: int
    of: int


#: What a checkpoint calls a weight: a name, a slice of one, or several names of which the first that is there counts.
Source = str | Slice | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    name:        what messages call it.
    model_types: the ``model_type`` values of config.json that it reads.
    spec:        turns the config into a ModelSpec for a task.
    tasks:       the tasks it serves, the default first.
    body:        canonical module or tensor name (``{}`` is the layer) to its name within the base model.
    heads:       the same for each task's head; ``{base}`` stands for the base model's prefix.
    prefix:      what precedes base names in checkpoints that carry a head; checkpoints of the bare model have none.
    transposed:  weights are stored [in, out] (GPT-2's Conv1D).
    ignored:     regular expressions of tensors that carry no weight (buffers of old versions).
    tiny:        config values of a tiny model of this family; the test suite compares it with Hugging Face.
    """

    name: str
    model_types: tuple[str, ...]
    spec: Callable[[HFConfig, Task], ModelSpec]
    tasks: tuple[Task, ...]
    body: Mapping[str, Source]
    heads: Mapping[Task, Mapping[str, Source]]
    prefix: str
    tiny: Mapping[str, Any]
    transposed: tuple[str, ...] = ()
    ignored: tuple[str, ...] = field(default=())
