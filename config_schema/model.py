"""The section "model": which checkpoint, and what it is used for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from config_schema.section import FilePath, NonEmptyText, Section

Task = Literal[
    "auto",
    "causal_lm",
    "embedding",
    "sequence_classification",
    "token_classification",
    "question_answering",
    "masked_lm",
]

FileName = Annotated[
    str,
    Field(
        pattern=r"^(?!\.\.?$)[^/\\\x00]+$",
        json_schema_extra={"errorMessage": "the name of a file in the model's directory, without a path"},
    ),
]


class Model(Section):
    """The checkpoint to run."""

    path: FilePath
    """A local checkpoint directory, or a name on the Hugging Face Hub such as "org/name"."""

    revision: NonEmptyText | None = None
    """Branch, tag or commit on the Hub; null takes the default branch. Local directories have none."""

    gguf_file: FileName | None = None
    """Name of a GGUF file in the directory, to be read instead of safetensors."""

    task: Task = "auto"
    """What the model does; "auto" reads it from the checkpoint's architecture."""

    weights: Literal["pretrained", "random"] = "pretrained"
    """Where training begins: the checkpoint's weights, or new ones of the shapes that its config.json gives."""
