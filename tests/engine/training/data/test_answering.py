"""Windows over contexts hold the answers where the data say, and logits find the way back to the text."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import EngineError
from engine.training.data import source as source_module
from engine.training.data.answering import SpanTexts, question_answering
from engine.training.data.source import Source
from engine.training.metrics import Answers
from tests.engine.tiny_text import bpe_tokenizer
from tests.engine.training.data.texts import word_tokenizer, write, write_rows

CONTEXT = "w0 w1 w2 w3 w4 w5, w6 w7 w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19"


def answers(*texts: str, context: str = CONTEXT) -> dict[str, list[Any]]:
    return {"text": list(texts), "answer_start": [context.index(text) for text in texts]}


def row(*texts: str, question: str = "w100 w101", context: str = CONTEXT) -> dict[str, Any]:
    return {"question": question, "context": context, "answers": answers(*texts, context=context)}


def read(tmp_path: Path, *rows: dict[str, Any], length: int = 16, stride: int = 3, questions: int = 4) -> SpanTexts:
    source = Source(write_rows(tmp_path / "a.jsonl", rows))
    return question_answering(source, word_tokenizer(), length, stride=stride, max_question=questions)


def batch(samples: SpanTexts, *indices: int) -> dict[str, torch.Tensor]:
    return samples.batch(np.array(indices), np.zeros(len(indices), np.int64), 0)


def text_at(samples: SpanTexts, window: int, first: int, last: int) -> str:
    at = int(samples.ids.starts[window])
    context = samples.questions[int(samples.question[window])].context
    return context[samples.spans[at + first, 0] : samples.spans[at + last, 1]]


def logits(samples: SpanTexts, window: int, first: int, last: int, height: float) -> tuple[torch.Tensor, torch.Tensor]:
    size = len(samples.ids[window]) + 3  # padding, which must not be read
    start, end = torch.zeros(size), torch.zeros(size)
    start[-3:] = end[-3:] = 99.0
    start[first] = end[last] = height
    return start, end


def test_windows_share_the_stride_and_hold_the_whole_context(tmp_path: Path) -> None:
    samples = read(tmp_path, row("w7 w8"), row("w1", context="w1 w2"))
    assert samples.question.tolist() == [0, 0, 0, 1]
    covered = []
    for window in range(3):
        inside = [
            span
            for span in samples.spans[samples.ids.starts[window] : samples.ids.starts[window + 1]].tolist()
            if span[0] >= 0
        ]
        covered.append([CONTEXT[start:end] for start, end in inside])
    assert covered[0][-3:] == covered[1][:3]
    assert covered[0] + covered[1][3:] + covered[2][3:] == CONTEXT.replace(",", " ,").split()
    assert max(len(samples.ids[at]) for at in range(len(samples))) == 16


def test_labels_point_at_the_answer_or_at_cls(tmp_path: Path) -> None:
    samples = read(tmp_path, row("w7 w8"), row("w4 w5, w6", "w1"), row(), row("w9 w10 w11"))
    held = {at: (int(first), int(last)) for at, (first, last) in enumerate(samples.labels) if first}
    assert {(int(samples.question[at]), text_at(samples, at, *span)) for at, span in held.items()} == {
        (0, "w7 w8"),
        (1, "w4 w5, w6"),
        (3, "w9 w10 w11"),
    }, "the first answer is the one that is trained on"
    for at in range(len(samples)):
        start, end = samples.ids.starts[at : at + 2]
        spans = samples.spans[start:end]
        text = samples.questions[int(samples.question[at])].answers
        whole = bool(text) and (spans[:, 0] == text[0][1]).any() and (spans[:, 1] == text[0][1] + len(text[0][0])).any()
        assert (at in held) == whole
        assert samples.null[at] == 0
    assert samples.labels[samples.question == 3].tolist()[0] == [0, 0], "the first window ends within the answer"
    assert samples.unanswerable
    assert not read(tmp_path, row("w7")).unanswerable
    out = batch(samples, 0, len(samples) - 1)
    assert out["start_positions"].tolist() == samples.labels[[0, -1], 0].tolist()
    assert out["end_positions"].tolist() == samples.labels[[0, -1], 1].tolist()
    assert out["input_ids"].shape == out["attention_mask"].shape == out["token_type_ids"].shape == (2, 16)


def test_perfect_logits_give_the_answers_back(tmp_path: Path) -> None:
    samples = read(tmp_path, row("w7 w8"), row("w4 w5, w6"), row("w1", context="w1 w2"))
    metric = Answers(samples)
    for at, (first, last) in enumerate(samples.labels.tolist()):
        start, end = logits(samples, at, first, last, 9.0 if first else 0.5)
        metric.update((start[None], end[None]), None, [at])
    assert metric.predictions() == {0: "w7 w8", 1: "w4 w5, w6", 2: "w1"}
    assert metric.compute() == {"exact_match": 1.0, "f1": 1.0}


def test_the_best_span_is_the_best_of_all(tmp_path: Path) -> None:
    samples = read(tmp_path, row("w7 w8"), length=20)
    rng = np.random.default_rng(0)
    size = len(samples.ids[0])
    spans = samples.spans[: samples.ids.starts[1]]
    for longest in (1, 3, 30):
        start, end = rng.normal(size=(2, size))
        tried = {
            start[a] + end[b]: (int(spans[a, 0]), int(spans[b, 1]))
            for a in range(size)
            for b in range(a, min(a + longest, size))
            if spans[a, 0] >= 0 and spans[b, 0] >= 0
        }
        best = max(tried)
        assert samples.best(0, start, end, longest) == (
            pytest.approx(best),
            *tried[best],
            pytest.approx(start[0] + end[0]),
        )


def test_no_answer_is_given_only_where_the_data_have_such_questions(tmp_path: Path) -> None:
    for rows, wanted in (((row("w1", context="w1 w2"),), "w1"), ((row("w1", context="w1 w2"), row()), "")):
        samples = read(tmp_path, *rows)
        metric = Answers(samples)
        start, end = logits(samples, 0, *samples.labels[0].tolist(), 2.0)
        start[0], end[0] = 5.0, 5.0
        metric.update((start[None], end[None]), None, [0])
        assert metric.predictions() == {0: wanted}
    # A window that finds an answer is enough: the least score of "no answer" counts.
    samples = read(tmp_path, row("w7 w8"), row())
    metric = Answers(samples)
    for at in np.flatnonzero(samples.question == 0).tolist():
        first, last = samples.labels[at].tolist()
        start, end = logits(samples, at, first, last, 3.0)
        start[0] = end[0] = 0.0 if first else 50.0
        metric.update((start[None], end[None]), None, [at])
    assert metric.predictions() == {0: "w7 w8"}


def test_the_best_window_answers_whichever_comes_first(tmp_path: Path) -> None:
    samples = read(tmp_path, row("w7 w8"))
    spans = [(at, at + 1) for at in range(5, 5 + len(samples))]
    for heights, wanted in (((1.0, 3.0, 2.0), 1), ((3.0, 1.0, 2.0), 0), ((2.0, 2.0, 2.0), 0)):
        for order in ((0, 1, 2), (2, 1, 0)):
            metric = Answers(samples)
            for at in order:
                start, end = logits(samples, at, *spans[at], heights[at])
                metric.update((start[None], end[None]), None, [at])
            assert metric.predictions() == {0: text_at(samples, wanted, *spans[wanted])}, "the earlier one of equals"


def test_questions_are_numbered_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "BLOCK_ROWS", 2)
    samples = read(tmp_path, *(row(f"w{at}", context=f"w{at}") for at in range(5)))
    assert samples.question.tolist() == list(range(5))
    assert [text_at(samples, at, *span) for at, span in enumerate(samples.labels.tolist())] == [
        f"w{n}" for n in range(5)
    ]


def test_metrics_of_ranks_are_those_of_one(tmp_path: Path) -> None:
    samples = read(tmp_path, row("w7 w8"), row("w4 w5, w6", "w1"), row())
    whole, parts = Answers(samples), [Answers(samples), Answers(samples)]
    rng = np.random.default_rng(1)
    for at in range(len(samples)):
        outputs = rng.normal(size=(2, 1, len(samples.ids[at])))
        whole.update(outputs, None, [at])
        parts[at % 2].update(outputs, None, [at])
    both = Answers(samples)
    both.merge([part.state() for part in parts])
    assert both.predictions() == whole.predictions()
    assert both.compute() == whole.compute()


def test_byte_level_tokenizers(tmp_path: Path) -> None:
    context = "The moon is a quiet place. Über the sea, a boat."
    source = Source(write_rows(tmp_path / "a.jsonl", [row("quiet place", question="moon", context=context)]))
    samples = question_answering(source, bpe_tokenizer(), 40, stride=4, max_question=8)
    held = [(at, *span) for at, span in enumerate(samples.labels.tolist()) if span[1]]
    assert held
    assert {text_at(samples, *one).strip() for one in held} == {"quiet place"}


def test_long_questions_are_cut_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "slipstream.training"):
        samples = read(tmp_path, row("w7", question="  w100 w101 w102 w103 w104 w105"), row("w7"))
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 2 questions (50%) have more than 4 tokens and were cut"
    ]
    decoded = word_tokenizer().decode(samples.ids[0].tolist())
    assert decoded.startswith("[CLS] w100 w101 w102 w103 [SEP] w0")


def test_layouts_of_answers(tmp_path: Path) -> None:
    one = {"text": "w7", "answer_start": CONTEXT.index("w7")}
    for given in (answers("w7"), [one], one, json.dumps(answers("w7"))):
        samples = read(tmp_path, {"id": 5, "question": "w1", "context": CONTEXT, "answers": given})
        assert samples.questions[0].answers == (("w7", CONTEXT.index("w7")),)
        assert samples.questions[0].id == "5"
    quoted = json.dumps(answers("w1", context="w1")).replace('"', '""')
    path = write(tmp_path / "a.csv", f'question,context,answers\nw2,w1,"{quoted}"\n')
    assert question_answering(Source(path), word_tokenizer(), 16, stride=3, max_question=4).labels.tolist() == [[3, 3]]


def test_a_hugging_face_model_takes_the_batches(tmp_path: Path) -> None:
    import transformers

    samples = read(tmp_path, row("w7 w8"), row())
    config = transformers.AutoConfig.for_model(
        "bert", vocab_size=205, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.AutoModelForQuestionAnswering.from_config(config)
    out = model(**batch(samples, 0, 3))
    assert torch.isfinite(out.loss)
    metric = Answers(samples)
    metric.update((out.start_logits, out.end_logits), None, np.array([0, 3]))
    assert set(metric.predictions()) == {0, 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": ["w7"], "answer_start": [0]}, r"line 1: answer 'w7' does not stand at character 0, where 'w0' is"),
        ({"text": ["w7"], "answer_start": [-1]}, r"does not stand at character -1"),
        ({"text": [" "], "answer_start": [2]}, r"answer ' ' does not stand"),
        ({"text": ["w7"], "answer_start": []}, r'line 1: answers: wanted \{"text"'),
        ({"text": "w7"}, r"answers: wanted"),
        ([5], r"answers: wanted"),
        ("{", r"line 1: answers: broken JSON"),
        (None, r"line 1: 'answers' is null"),
    ],
)
def test_wrong_answers(tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        read(tmp_path, {"question": "w1", "context": CONTEXT, "answers": given})


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="line 1: the tokenizer makes no tokens of the context"):
        read(tmp_path, row(context=" "))
    with pytest.raises(
        EngineError, match="length 10 leaves 3 tokens for a context beside a question of 4: wanted more than the 3"
    ):
        read(tmp_path, row("w7"), length=10)
