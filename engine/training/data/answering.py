"""Span question answering in SQuAD's manner: long contexts in overlapping windows, and from logits back to the text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import EngineError
from engine.training.data.encoder import Encoder
from engine.training.data.labelled import padded, tell_cut
from engine.training.data.readers import Row
from engine.training.data.samples import Ragged, RaggedBuilder, crc, tensors
from engine.training.data.source import Source

Floats = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """A row: its ``id`` (None where the data have none), and its ``answers``, each a text with its first character in
    ``context``. No answers: the question cannot be answered from its context."""

    id: str | None
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class SpanTexts:
    """Windows of a question with a part of its context; each is a sample.

    ids, types: tokens and token types. spans: for each token the characters of the context that it is, as [T, 2] beside
    ``ids.flat``; (-1, -1) for what belongs to no context. labels: [N, 2], the answer's first and last token;
    the ``[CLS]`` where the window does not hold it whole. question: [N], the number in ``questions``.
    """

    ids: Ragged
    types: Ragged | None
    spans: NDArray[np.int32]
    labels: NDArray[np.int64]
    null: NDArray[np.int64]
    question: NDArray[np.int64]
    questions: tuple[Question, ...]
    encoder: Encoder
    length: int
    task: str = "question_answering"

    @cached_property
    def fingerprint(self) -> int:
        """A checksum of tokens and labels."""
        return crc(self.ids.flat, self.ids.starts, self.labels)

    @property
    def unanswerable(self) -> bool:
        """Whether some question has no answer, as in SQuAD 2.0: only then may a prediction be empty."""
        return any(not question.answers for question in self.questions)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64], seed: int) -> dict[str, Tensor]:
        """input_ids, attention_mask, perhaps token_type_ids [B, S]; start_positions, end_positions [B]; all int64."""
        arrays = padded(self.ids, self.types, self.encoder, indices, self.length)
        arrays["start_positions"], arrays["end_positions"] = self.labels[indices, 0], self.labels[indices, 1]
        return tensors(arrays)

    def best(self, index: int, start: Floats, end: Floats, longest: int = 30) -> tuple[float, int, int, float]:
        """From the logits [S] of the window ``index`` to (score, first character, end, score of no answer).

        The score of a span is the sum of the logits of its first and last token (Devlin et al., section 4.2), the best
        over all spans of at most ``longest`` tokens within the context. Padding in the logits is not read.
        """
        first = int(self.ids.starts[index])
        spans = self.spans[first : int(self.ids.starts[index + 1])]
        inside = np.flatnonzero(spans[:, 1] > spans[:, 0])
        null = int(self.null[index])
        nothing = float(start[null]) + float(end[null])
        begin, stop = np.full(len(spans), -np.inf), np.full(len(spans), -np.inf)
        begin[inside], stop[inside] = start[inside], end[inside]
        best, at, to = -np.inf, int(inside[0]), int(inside[0])
        for more in range(min(longest, len(spans))):
            sums = begin[: len(spans) - more] + stop[more:]
            place = int(sums.argmax())
            if sums[place] > best:
                best, at, to = float(sums[place]), place, place + more
        return best, int(spans[at, 0]), int(spans[to, 1]), nothing


def question_answering(
    source: Source, tokenizer: Any, length: int = 384, *, stride: int = 128, max_question: int = 64
) -> SpanTexts:
    """Reads ``question``, ``context``, ``answers`` and perhaps ``id``.

    ``answers`` is ``{"text": [...], "answer_start": [...]}`` or a list of ``{"text", "answer_start"}``; in CSV the JSON
    of it. A context that does not fit into ``length`` tokens with its question gives several windows, of which
    neighbours share ``stride`` tokens (what transformers calls so). Questions are cut to ``max_question`` tokens. The
    first answer is trained on. Raises :class:`EngineError` with file and line for an answer that does not stand in
    the context where it says.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise EngineError(
            "question_answering needs a tokenizer that knows characters (tokenizer.json), this one does not"
        )
    room = length - max_question - tokenizer.num_special_tokens_to_add(pair=True)
    if not 0 <= stride < room:
        raise EngineError(
            f"length {length} leaves {room} tokens for a context beside a question of {max_question}: wanted more than "
            f"the {stride} that windows share (raise length, or lower stride or max_question)"
        )
    windows = _Windows(Encoder(tokenizer), length, stride, max_question)
    for block in source.blocks(["question", "context", "answers"], ["id"]):
        windows.add(block)
    tell_cut(windows.cut, len(windows.questions), "questions", f"{max_question} tokens")
    return windows.finish()


@dataclass
class _Windows:
    """Collects the windows of :class:`SpanTexts`."""

    encoder: Encoder
    length: int
    stride: int
    max_question: int
    ids: RaggedBuilder = field(default_factory=RaggedBuilder)
    types: RaggedBuilder = field(default_factory=RaggedBuilder)
    spans: list[NDArray[np.int32]] = field(default_factory=list)
    labels: list[tuple[int, int]] = field(default_factory=list)
    null: list[int] = field(default_factory=list)
    question: list[int] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    cut: int = 0

    def add(self, block: list[Row]) -> None:
        rows = [_question(row) for row in block]
        encoded = self.encoder.whole(
            self._short([row.question for row in rows]),
            [row.context for row in rows],
            truncation="only_second",
            max_length=self.length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        self.ids.add(encoded["input_ids"])
        if self.encoder.types:
            self.types.add(encoded["token_type_ids"])
        cls = self.encoder.tokenizer.cls_token_id
        for at, number in enumerate(encoded["overflow_to_sample_mapping"]):
            ids = encoded["input_ids"][at]
            context = np.array([part == 1 for part in encoded.sequence_ids(at)])
            spans = np.where(context[:, None], np.array(encoded["offset_mapping"][at], np.int32), np.int32(-1))
            if not (spans[:, 1] > spans[:, 0]).any():
                raise block[number].error("the tokenizer makes no tokens of the context")
            null = ids.index(cls) if cls in ids else 0
            self.spans.append(spans)
            self.null.append(null)
            self.labels.append(_tokens(spans, rows[number].answers) or (null, null))
            self.question.append(len(self.questions) + number)
        self.questions += rows

    def _short(self, questions: list[str]) -> list[str]:
        """The questions cut to ``max_question`` tokens; some have spaces in front that fill a window."""
        questions = [question.strip() for question in questions]
        call = self.encoder.tokenizer
        offsets = call(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        for at, spans in enumerate(offsets):
            if len(spans) > self.max_question:
                questions[at] = questions[at][: spans[self.max_question - 1][1]]
                self.cut += 1
        return questions

    def finish(self) -> SpanTexts:
        return SpanTexts(
            self.ids.finish(),
            self.types.finish() if self.encoder.types else None,
            np.concatenate(self.spans),
            np.array(self.labels, np.int64),
            np.array(self.null, np.int64),
            np.array(self.question, np.int64),
            tuple(self.questions),
            self.encoder,
            self.length,
        )


def _tokens(spans: NDArray[np.int32], answers: tuple[tuple[str, int], ...]) -> tuple[int, int] | None:
    """First and last token of the first answer, None where the window does not hold it whole."""
    if not answers:
        return None
    text, at = answers[0]
    start, end = at + len(text) - len(text.lstrip()), at + len(text.rstrip())
    inside = np.flatnonzero(spans[:, 1] > spans[:, 0])
    if start < spans[inside[0], 0] or end > spans[inside[-1], 1]:
        return None
    first = int(np.searchsorted(spans[inside, 0], start, side="right")) - 1
    last = int(np.searchsorted(spans[inside, 1], end, side="left"))
    return int(inside[first]), int(inside[last])


def _question(row: Row) -> Question:
    question, context = row.values["question"], row.values["context"]
    answers = _answers(row)
    for text, start in answers:
        if not text.strip() or start < 0 or context[start : start + len(text)] != text:
            found = context[max(start, 0) : max(start, 0) + len(text)]
            raise row.error(f"answer {text!r:.40} does not stand at character {start}, where {found!r:.40} is")
    number = row.values.get("id")
    return Question(None if number is None else str(number), question, context, answers)


def _answers(row: Row) -> tuple[tuple[str, int], ...]:
    given = row.values["answers"]
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise row.error(f"answers: broken JSON: {error}") from error
    if isinstance(given, Mapping):
        texts, starts = given.get("text"), given.get("answer_start")
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            given = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    found = []
    for one in given if isinstance(given, list) else [given]:
        text, start = (one.get("text"), one.get("answer_start")) if isinstance(one, Mapping) else (None, None)
        if not isinstance(text, str) or isinstance(start, bool) or not isinstance(start, int):
            raise row.error('answers: wanted {"text": [...], "answer_start": [...]}, as many of one as of the other')
        found.append((text, start))
    return tuple(found)
