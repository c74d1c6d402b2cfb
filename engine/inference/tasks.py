"""From an encoder's outputs to answers: labels, spans and fillings, as Hugging Face's pipelines give them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.inference.inputs import Rows, rows_from
from ops.spec import HeadSpec, Scores, Task

if TYPE_CHECKING:
    from engine.engine import Engine

#: As in Hugging Face's question-answering pipeline: tokens of the longest answer and of a window over a long context,
#: tokens that neighbouring windows share.
MAX_ANSWER = 15
WINDOW = 384
OVERLAP = 128

TO_SCORES: Mapping[Scores, Callable[[Tensor], Tensor]] = {
    "softmax": lambda outputs: outputs.softmax(-1),
    "sigmoid": lambda outputs: outputs.sigmoid(),
    "none": lambda outputs: outputs,
}


@dataclass(frozen=True)
class Label:
    """A label with its probability (in a regression, with the model's plain output)."""

    label: str
    score: float


@dataclass(frozen=True)
class TokenLabel:
    """The likeliest label of one token. ``start`` and ``end`` are its characters in the text, ``end`` exclusive."""

    token: str
    label: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Answer:
    """A stretch of the context: ``context[start:end] == text``. ``score`` is the probability of its start and end."""

    text: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Fill:
    """A token for a mask: its id, its text and its probability."""

    token: int
    text: str
    score: float


def classify(engine: Engine, texts: Any, top_k: int) -> list[list[Label]]:
    """The ``top_k`` best labels of each text, (text, text) pair or list of token ids, best first.

    Scores follow the checkpoint as in Hugging Face: softmax over the labels; sigmoid where the problem is multi-label
    or there is but one label; the plain output in a regression.
    """
    head = _head(engine, "classify", "sequence_classification")
    top = min(_positive("top_k", top_k), head.outputs)
    found: list[list[Label]] = []
    for rows in _batches(engine, _rows(engine, texts)):
        best = TO_SCORES[head.scores](_outputs(engine, rows)).topk(top, dim=-1)
        for scores, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            found.append([Label(head.labels[at], score) for at, score in zip(places, scores, strict=True)])
    return found


def classify_tokens(engine: Engine, texts: Sequence[str]) -> list[list[TokenLabel]]:
    """The likeliest label of each token of each text, special tokens left out."""
    head = _head(engine, "classify_tokens", "token_classification")
    tokenizer = _fast_tokenizer(engine, "classify_tokens")
    wanted = _texts(texts)
    encoded = [tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True) for text in wanted]
    types = [list(one["token_type_ids"]) for one in encoded if "token_type_ids" in one]
    rows = Rows([list(one["input_ids"]) for one in encoded], types if len(types) == len(encoded) else None)
    best = [row for batch in _batches(engine, rows) for row in _per_row(batch, _outputs(engine, batch).softmax(-1))]
    found = []
    for one, scores in zip(encoded, best, strict=True):
        values, places = scores.max(-1)
        tokens = tokenizer.convert_ids_to_tokens(one["input_ids"])
        columns = zip(
            tokens, places.tolist(), values.tolist(), one["offset_mapping"], one["special_tokens_mask"], strict=True
        )
        found.append(
            [TokenLabel(token, head.labels[at], p, *span) for token, at, p, span, special in columns if not special]
        )
    return found


def answer(engine: Engine, question: str, context: str) -> Answer:
    """The stretch of ``context``, at most MAX_ANSWER tokens widened to whole words, that answers ``question`` best.

    A long context is read in overlapping windows. The score is the product of the probabilities of start and end among
    the window's context tokens and its ``[CLS]``, which stands for "no answer" (Devlin et al., arXiv 1810.04805).
    """
    _head(engine, "answer", "question_answering")
    tokenizer = _fast_tokenizer(engine, "answer")
    for name, text in (("question", question), ("context", context)):
        if not isinstance(text, str) or not text.strip():
            raise EngineError(f"answer: the {name} is {'empty' if isinstance(text, str) else 'not a text'}: give one")
    windows = _windows(engine, tokenizer, question, context)
    types = [list(row) for row in windows["token_type_ids"]] if "token_type_ids" in windows else None
    rows = Rows([list(row) for row in windows["input_ids"]], types)
    logits = [row for batch in _batches(engine, rows) for row in _per_row(batch, _outputs(engine, batch))]
    spans = [_best_span(row, windows.sequence_ids(i), rows.ids[i], tokenizer) for i, row in enumerate(logits)]
    at = max(range(len(spans)), key=lambda i: spans[i][0])
    score, first, last = spans[at]
    start, end = _word(windows, at, first)[0], _word(windows, at, last)[1]
    return Answer(context[start:end], score, start, end)


def fill_mask(engine: Engine, texts: Sequence[str], top_k: int) -> list[list[list[Fill]]]:
    """The ``top_k`` likeliest tokens, best first, of each mask token of each text."""
    head = _head(engine, "fill_mask", "masked_lm")
    top = min(_positive("top_k", top_k), head.outputs)
    tokenizer = engine.text.tokenizer
    if tokenizer.mask_token_id is None:
        raise EngineError("fill_mask: this checkpoint's tokenizer has no mask token")
    rows = _rows(engine, _texts(texts))
    for index, row in enumerate(rows.ids):
        if tokenizer.mask_token_id not in row:
            raise EngineError(
                f"fill_mask: text {index} has no mask: write {tokenizer.mask_token} where a token is missing"
            )
    found: list[list[list[Fill]]] = []
    for batch in _batches(engine, rows):
        flat = [token for row in batch.ids for token in row]
        masks = [at for at, token in enumerate(flat) if token == tokenizer.mask_token_id]
        best = _outputs(engine, batch, masks).softmax(-1).topk(top, dim=-1)
        fills = iter(
            [Fill(token, tokenizer.decode([token]), p) for token, p in zip(tokens, scores, strict=True)]
            for tokens, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
        found += [[next(fills) for token in row if token == tokenizer.mask_token_id] for row in batch.ids]
    return found


def _head(engine: Engine, call: str, task: Task) -> HeadSpec:
    """The head of the loaded model; raises where it is another task's."""
    head, family = engine.spec.head, engine.plan.family
    own = head.task if head is not None else "embedding"
    if head is None or own != task:
        remedy = f'set it to "{task}"' if task in family.tasks else f"a {family.name} model cannot do it"
        raise EngineError(f'{call} needs $.model.task "{task}", but it is "{own}": {remedy}')
    return head


def _fast_tokenizer(engine: Engine, call: str) -> Any:
    tokenizer = engine.text.tokenizer
    if not tokenizer.is_fast:
        raise EngineError(f"{call} needs a tokenizer that knows characters (tokenizer.json), this checkpoint has none")
    return tokenizer


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise EngineError(f"{name}: got {value!r}, wanted 1 or more")
    return value


def _texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list; one text alone is a list of one."""
    given = [texts] if isinstance(texts, str) else list(texts)
    if not given or not all(isinstance(text, str) for text in given):
        raise EngineError("wanted a text or a list of texts, at least one")
    return given


def _rows(engine: Engine, texts: Any) -> Rows:
    """Rows of texts, of pairs, of token ids or of a mixture of them."""
    given = [texts] if isinstance(texts, str) else list(texts)
    if not given:
        raise EngineError("the batch is empty: give at least one text")
    each = [rows_from([item], engine.text) for item in given]
    types = [one.types[0] for one in each if one.types is not None]
    return Rows([one.ids[0] for one in each], types if len(types) == len(each) else None)


def _batches(engine: Engine, rows: Rows) -> Iterator[Rows]:
    """``rows`` as many at a time as ``inference.max_batch`` allows."""
    size = engine.plan.max_batch
    for start in range(0, len(rows.ids), size):
        types = None if rows.types is None else rows.types[start : start + size]
        yield Rows(rows.ids[start : start + size], types)


def _outputs(engine: Engine, rows: Rows, wanted: Sequence[int] | None = None) -> Tensor:
    """The head's outputs in fp32 on the CPU: [T or B, outputs], or of the ``wanted`` tokens alone."""
    types = rows.types if engine.spec.token_types else None
    with torch.inference_mode():
        outputs = engine._runner().whole(rows.ids, types, wanted).outputs
    assert outputs is not None
    if not bool(torch.isfinite(outputs).all()):
        raise EngineError(f'the outputs are not finite in {engine.plan.dtype}: set "precision" to "bf16" or "fp32"')
    return outputs.float().cpu()


def _per_row(rows: Rows, flat: Tensor) -> Sequence[Tensor]:
    """[T, outputs] cut into the rows' own [S, outputs]."""
    ends = list(accumulate(len(row) for row in rows.ids))
    return [flat[end - len(row) : end] for end, row in zip(ends, rows.ids, strict=True)]


def _windows(engine: Engine, tokenizer: Any, question: str, context: str) -> Any:
    """The question with each of the overlapping windows over the context, as a BatchEncoding with offsets."""
    longest = min(WINDOW, tokenizer.model_max_length, engine.spec.max_positions, engine.plan.max_tokens)
    asked = len(tokenizer(question, add_special_tokens=False)["input_ids"])
    room = longest - asked - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 1:
        raise EngineError(
            f"answer: the question has {asked} tokens, which leaves no room for the context in {longest}: shorten it"
        )
    overlap = min(longest // 2, OVERLAP)
    return tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=longest,
        stride=overlap if overlap < room else room // 2,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def _best_span(
    logits: Tensor, parts: Sequence[int | None], ids: Sequence[int], tokenizer: Any
) -> tuple[float, int, int]:
    """The likeliest span of one window, logits [S, 2]: (score, first token, last token), within the context alone."""
    context = torch.tensor([part == 1 for part in parts])
    if not bool(context.any()):
        raise EngineError("answer: the tokenizer makes no tokens of the context: give another text")
    null = torch.tensor([token == tokenizer.cls_token_id for token in ids])
    chances = logits.masked_fill(~(context | null)[:, None], -torch.inf).softmax(0)
    both = chances[:, 0, None] * chances[None, :, 1]
    size = len(ids)
    lengths = torch.arange(size)[None, :] - torch.arange(size)[:, None] + 1
    allowed = context[:, None] & context[None, :] & (lengths >= 1) & (lengths <= MAX_ANSWER)
    best = int(both.masked_fill(~allowed, -1.0).argmax())
    return float(both.flatten()[best]), best // size, best % size


def _word(windows: Any, window: int, token: int) -> tuple[int, int]:
    """The characters of the word that ``token`` belongs to; its own where the tokenizer knows no words."""
    word = windows.token_to_word(window, token)
    span = None if word is None else windows.word_to_chars(window, word, sequence_index=1)
    return tuple(span if span is not None else windows["offset_mapping"][window][token])
