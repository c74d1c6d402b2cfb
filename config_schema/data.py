"""The section "data": what is trained on, and how files become samples (docs/training_data.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from config_schema.section import Count, FilePath, NonEmptyText, Section

Files = FilePath | Annotated[tuple[FilePath, ...], Field(min_length=1)]
Name = NonEmptyText | None
Classes = Annotated[int, Field(ge=2, le=2**31 - 1)]
ClassNames = Annotated[tuple[NonEmptyText, ...], Field(min_length=2)]


class Columns(Section):
    """What the files call a column, where it has another name than the task's."""

    text: Name = None
    """The text; the first one of a pair."""

    text_pair: Name = None
    """The second text of a pair."""

    label: Name = None
    """The class, or the value of a regression."""

    question: Name = None
    """The question."""

    context: Name = None
    """The text in which the answer stands."""

    answers: Name = None
    """The answers, as SQuAD has them."""

    id: Name = None
    """A sample's name."""


class Data(Section):
    """Files to train and to evaluate on."""

    task: Literal["auto", "masked_lm", "causal_lm", "classification", "regression", "question_answering"] = "auto"
    """What is learnt; "auto" follows the model's task."""

    train: Files | None = None
    """Files to train on: a path or glob, or several."""

    eval: Files | None = None
    """Files to evaluate on."""

    format: Literal["text", "jsonl", "csv", "tsv", "parquet"] | None = None
    """Of all files; null takes each file's from its name."""

    columns: Columns = Field(default_factory=Columns)
    """Other names of columns."""

    documents: Literal["blank_line", "line"] = "blank_line"
    """In plain text: documents end at a blank line, or each line is one."""

    quoted: bool = False
    """In TSV: quotes enclose fields, as in CSV."""

    length: Count = 512
    """Tokens of a sample at most; texts of language models are cut into pieces of just so many."""

    labels: Classes | ClassNames | None = None
    """Classes: how many, or their names in order; null takes the model's."""

    mask_probability: Annotated[float, Field(gt=0, le=1)] = 0.15
    """Masked LM: share of the tokens that are asked for."""

    separator: NonEmptyText | None = None
    """Language models: the token between documents; null takes the tokenizer's."""

    stride: Count = 128
    """Question answering: tokens that neighbouring windows over a long context share."""

    max_question: Count = 64
    """Question answering: longer questions are cut to so many tokens."""

    metric: NonEmptyText | None = None
    """The figure that a run is judged by; null takes the task's first (accuracy, F1, loss ...)."""
