"""The section "job": what ``slipstream run`` does with the model. One class a kind, told apart by "type".

The tag "type" has no default: where it has one, a JSON Schema accepts an object without its tag, and pydantic does not.
Relative file names are taken from the working directory.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from config_schema.section import Count, FilePath, Section

Texts = Annotated[tuple[str, ...], Field(min_length=1)]
TextOrPair = str | tuple[str, str]


class Message(Section):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    """Who speaks."""

    content: str
    """What is said."""


class Question(Section):
    """A question and the text that holds its answer."""

    question: str
    """The question."""

    context: str
    """The text in which the answer is searched."""


class GenerateJob(Section):
    """Generate text after each prompt, or the answer to a chat."""

    exactly_one_of: ClassVar[tuple[str, ...]] = ("prompts", "messages", "prompts_file")

    type: Literal["generate"]
    """The kind of job."""

    prompts: Texts | None = None
    """The prompts."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None
    """A chat; the tokenizer's own template makes the prompt."""

    prompts_file: FilePath | None = None
    """A text file with one prompt a line."""

    output: FilePath | None = None
    """JSONL file to write the results to."""

    stream: bool = True
    """Print the text while it comes."""


class EncodeJob(Section):
    """Make one vector of each text."""

    exactly_one_of: ClassVar[tuple[str, ...]] = ("texts", "texts_file")

    type: Literal["encode"]
    """The kind of job."""

    texts: Texts | None = None
    """The texts."""

    texts_file: FilePath | None = None
    """A text file with one text a line."""

    similarity: bool = True
    """Print the table of cosine similarities."""

    output: FilePath | None = None
    """JSONL file to write the vectors to."""


class ClassifyJob(Section):
    """Label each text, or each pair of texts."""

    exactly_one_of: ClassVar[tuple[str, ...]] = ("texts", "texts_file")

    type: Literal["classify"]
    """The kind of job."""

    texts: Annotated[tuple[TextOrPair, ...], Field(min_length=1)] | None = None
    """The texts; a pair is an array of two."""

    texts_file: FilePath | None = None
    """A text file with one text a line."""

    top_k: Count = 1
    """Labels to show for each text, likeliest first."""

    output: FilePath | None = None
    """JSONL file to write the labels to."""


class ClassifyTokensJob(Section):
    """Label each token of each text (named entities, parts of speech)."""

    exactly_one_of: ClassVar[tuple[str, ...]] = ("texts", "texts_file")

    type: Literal["classify_tokens"]
    """The kind of job."""

    texts: Texts | None = None
    """The texts."""

    texts_file: FilePath | None = None
    """A text file with one text a line."""

    output: FilePath | None = None
    """JSONL file to write the labels to."""


class AnswerJob(Section):
    """Find the answer to each question in its context."""

    type: Literal["answer"]
    """The kind of job."""

    questions: Annotated[tuple[Question, ...], Field(min_length=1)]
    """The questions, each with its context."""

    output: FilePath | None = None
    """JSONL file to write the answers to."""


class FillMaskJob(Section):
    """Fill the mask tokens of each text."""

    exactly_one_of: ClassVar[tuple[str, ...]] = ("texts", "texts_file")

    type: Literal["fill_mask"]
    """The kind of job."""

    texts: Texts | None = None
    """The texts, each with the tokenizer's mask token in it."""

    texts_file: FilePath | None = None
    """A text file with one text a line."""

    top_k: Count = 5
    """Candidates to show for each mask, likeliest first."""

    output: FilePath | None = None
    """JSONL file to write the candidates to."""


class TrainJob(Section):
    """Train the model as the sections "training", "optimizer" and "data" say."""

    type: Literal["train"]
    """The kind of job."""


Job = GenerateJob | EncodeJob | ClassifyJob | ClassifyTokensJob | AnswerJob | FillMaskJob | TrainJob
