"""Labels, answers and fillings against Hugging Face's pipelines over the same checkpoints."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine import Engine
from engine.errors import EngineError
from engine.inference import tasks
from ops.spec import Task
from tests.engine.tiny_text import save_decoder, save_encoder

#: Two layers of products over 48 elements, each sum rounded: a generous bound on the difference of two probabilities.
TOLERANCE = 8 * 2 * 48 * torch.finfo(torch.float32).eps
MODEL_TYPES = ("bert", "roberta", "distilbert")
TEXTS = ["The cat sat on the mat.", "Moonlight over a quiet hill, and no wind.", "Is it?", "unbelievabilities"]

Save = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, minilm_dir: Path) -> Save:
    """Makes a tiny encoder, each kind once."""
    made: dict[str, Path] = {}

    def save(model_type: str, task: Task, **changes: Any) -> Path:
        key = f"{model_type}-{task}-{changes}"
        if key not in made:
            made[key] = save_encoder(tmp_path_factory.mktemp("encoder"), minilm_dir, model_type, task, **changes)
        return made[key]

    return save


def _engine(directory: Path, **sections: Any) -> Engine:
    return Engine.from_pretrained(directory, precision="fp32", device="cpu", **sections)


def _pipeline(name: str, directory: Path) -> Any:
    found = transformers.pipeline(name, model=str(directory), tokenizer=str(directory), device="cpu")
    if found.model.config.model_type == "distilbert":  # as Hugging Face's own DistilBERT tokenizer has it
        found.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return found


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_classify_gives_what_the_pipeline_gives(saved: Save, model_type: str) -> None:
    directory = saved(model_type, "sequence_classification", num_labels=4)
    ours = _engine(directory).classify([*TEXTS, (TEXTS[0], TEXTS[1])], top_k=3)
    pipeline = _pipeline("text-classification", directory)
    theirs = [*pipeline(TEXTS, top_k=3), pipeline({"text": TEXTS[0], "text_pair": TEXTS[1]}, top_k=3)]
    assert [[label.label for label in row] for row in ours] == [[label["label"] for label in row] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert [label.score for label in one] == pytest.approx([label["score"] for label in other], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "scores"),
    [
        ({"num_labels": 1}, "sigmoid"),
        ({"num_labels": 1, "problem_type": "regression"}, "none"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "sigmoid"),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, "softmax"),
        ({"num_labels": 3, "problem_type": "regression"}, "none"),
    ],
)
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_scores_follow_the_problem_type(saved: Save, model_type: str, changes: dict[str, Any], scores: str) -> None:
    directory = saved(model_type, "sequence_classification", **changes)
    engine = _engine(directory)
    assert engine.spec.head is not None
    assert engine.spec.head.scores == scores
    ours = engine.classify(TEXTS[0], top_k=9)
    theirs = _pipeline("text-classification", directory)([TEXTS[0]], top_k=None)
    assert len(ours[0]) == changes["num_labels"]
    assert [label.score for label in ours[0]] == pytest.approx([label["score"] for label in theirs[0]], abs=TOLERANCE)


def test_labels_have_the_checkpoints_names(saved: Save) -> None:
    names = {0: "sad", 1: "so-so", 2: "glad"}
    directory = saved("bert", "sequence_classification", id2label=names, label2id={v: k for k, v in names.items()})
    assert {label.label for label in _engine(directory).classify(TEXTS[0], top_k=3)[0]} == set(names.values())


def test_a_batch_gives_what_each_text_alone_gives(saved: Save) -> None:
    directory = saved("bert", "sequence_classification", num_labels=4)
    engine = _engine(directory, inference={"max_batch": 2})
    together = engine.classify(TEXTS[:3], top_k=4)
    for text, labels in zip(TEXTS, together, strict=False):
        alone = engine.classify(text, top_k=4)[0]
        assert [label.label for label in alone] == [label.label for label in labels]
        assert [x.score for x in alone] == pytest.approx([x.score for x in labels], abs=TOLERANCE)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_classify_tokens_gives_what_the_pipeline_gives(saved: Save, model_type: str) -> None:
    directory = saved(model_type, "token_classification", num_labels=5)
    ours = _engine(directory, inference={"max_batch": 3}).classify_tokens(TEXTS)
    theirs = [_pipeline("token-classification", directory)(text, ignore_labels=[]) for text in TEXTS]
    for text, one, other in zip(TEXTS, ours, theirs, strict=True):
        wanted = [(x["word"], x["entity"], int(x["start"]), int(x["end"])) for x in other]
        assert [(x.token, x.label, x.start, x.end) for x in one] == wanted
        assert [x.score for x in one] == pytest.approx([float(x["score"]) for x in other], abs=TOLERANCE)
        whole = [x for x in one if not x.token.startswith("##")]
        assert all(text[x.start : x.end].lower() == x.token for x in whole)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fill_mask_gives_what_the_pipeline_gives(saved: Save, model_type: str) -> None:
    directory = saved(model_type, "masked_lm")
    texts = ["The [MASK] sat on the mat.", "[MASK] and the [MASK] went out to [MASK]."]
    ours = _engine(directory).fill_mask(texts, top_k=3)
    pipeline = _pipeline("fill-mask", directory)
    theirs = [[pipeline(texts[0], top_k=3)], pipeline(texts[1], top_k=3)]
    assert [len(masks) for masks in ours] == [1, 3]
    for one, other in zip(ours, theirs, strict=True):
        for fills, wanted in zip(one, other, strict=True):
            assert [(x.token, x.text) for x in fills] == [(x["token"], x["token_str"]) for x in wanted]
            assert [x.score for x in fills] == pytest.approx([x["score"] for x in wanted], abs=TOLERANCE)


# ---- answers: a plain search over every span is the oracle, since newer transformers have no such pipeline ----

SENTENCE = (
    "the moon cat river quietly unbelievabilities antidisestablishment stood between two hills of Zyzzyva while rain "
    "fell and nobody, not even Bob, knew why"
)
WORDS = SENTENCE.split()


def _questions() -> list[tuple[str, str]]:
    draw = random.Random(3)
    lengths = (5, 12, 12, 20, 20, 30, 90, 150)
    return [(" ".join(draw.choices(WORDS, k=4)) + "?", " ".join(draw.choices(WORDS, k=n)) + ".") for n in lengths]


def _oracle(tokenizer: Any, model: Any, question: str, context: str, longest: int) -> tuple[float, int, int, int]:
    """(score, start, end, window) by trying every span of at most 15 tokens in windows that are cut by hand."""
    asked = tokenizer(question, add_special_tokens=False)["input_ids"]
    read = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = read["input_ids"], read["offset_mapping"]
    names = tokenizer.convert_ids_to_tokens(ids)
    room = longest - len(asked) - 3
    step = room - min(longest // 2, 128)
    best = (-1.0, 0, 0, 0)
    starts = [0, *(at for at in range(step, len(ids), step) if at + room - step < len(ids))]
    for window, at in enumerate(starts):
        part = ids[at : at + room]
        row = [tokenizer.cls_token_id, *asked, tokenizer.sep_token_id, *part, tokenizer.sep_token_id]
        types = [0] * (len(asked) + 2) + [1] * (len(part) + 1)
        extra = {} if model.config.model_type == "distilbert" else {"token_type_ids": torch.tensor([types])}
        with torch.inference_mode():
            out = model(torch.tensor([row]), **extra)
        first = len(asked) + 2
        keep = [0, *range(first, first + len(part))]
        begins = out.start_logits[0, keep].softmax(0).tolist()[1:]
        ends = out.end_logits[0, keep].softmax(0).tolist()[1:]
        for a in range(len(part)):
            for b in range(a, min(a + 15, len(part))):
                if begins[a] * ends[b] > best[0]:
                    best = (begins[a] * ends[b], at + a, at + b, window)
    score, a, b, window = best
    while names[a].startswith("##"):
        a -= 1
    while b + 1 < len(names) and names[b + 1].startswith("##"):
        b += 1
    return score, spans[a][0], spans[b][1], window


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_answer_is_the_best_span_of_the_context(saved: Save, model_type: str) -> None:
    directory = saved(model_type, "question_answering")
    engine = _engine(directory)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(str(directory)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(directory))
    windows, words = set(), set()
    for question, context in _questions():
        found = engine.answer(question, context)
        score, start, end, window = _oracle(tokenizer, model, question, context, engine.spec.max_positions)
        assert (found.start, found.end) == (start, end), (question, context)
        assert found.score == pytest.approx(score, rel=1e-3)
        assert found.text == context[start:end]
        windows.add(window)
        words.add(len(found.text.split()))
    assert len(words) > 1  # else a wrong bound on the span could hide
    assert windows != {0}  # some answer came from behind the first window


@pytest.mark.skipif(
    not hasattr(transformers, "QuestionAnsweringPipeline"), reason="transformers 5 has no such pipeline"
)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_answer_gives_what_the_pipeline_gives(saved: Save, model_type: str) -> None:
    directory = saved(model_type, "question_answering")
    engine, pipeline = _engine(directory), _pipeline("question-answering", directory)
    longest = engine.spec.max_positions
    for question, context in _questions():
        ours = engine.answer(question, context)
        theirs = pipeline(
            question=question, context=context, max_seq_len=longest, doc_stride=min(longest // 2, 128), top_k=1
        )
        assert (ours.text, ours.start, ours.end) == (theirs["answer"], theirs["start"], theirs["end"])
        assert ours.score == pytest.approx(theirs["score"], rel=1e-3)


class _Cls:
    cls_token_id = 9


def test_a_span_lies_within_the_context_runs_forward_and_is_short() -> None:
    parts = [None, 0, None, *[1] * 30, None]
    logits = torch.zeros(len(parts), 2)
    logits[1] = 50.0  # the question
    logits[2] = 50.0  # a special token
    logits[20, 0], logits[4, 1] = 9.0, 9.0  # would run backwards
    logits[5, 0], logits[32, 1] = 8.0, 8.0  # would be 28 tokens long
    logits[28, 1], logits[14, 0] = 7.0, 7.0  # 15 tokens: the longest allowed
    _, first, last = tasks._best_span(logits, parts, [9, *[1] * (len(parts) - 1)], _Cls())
    assert (first, last) in {(20, 32), (20, 28)}
    assert last - first < tasks.MAX_ANSWER
    logits[20, 0] = 0.0
    _, first, last = tasks._best_span(logits, parts, [9, *[1] * (len(parts) - 1)], _Cls())
    assert (first, last) == (14, 28)


def test_what_the_classifier_token_takes_is_no_answers(saved: Save) -> None:
    parts, ids = [None, 0, None, 1, 1, None], [9, 1, 1, 1, 1, 1]
    with_null = tasks._best_span(torch.zeros(6, 2), parts, ids, _Cls())[0]
    without = tasks._best_span(torch.zeros(6, 2), parts, [1] * 6, _Cls())[0]
    assert (with_null, without) == (pytest.approx(1 / 9), pytest.approx(1 / 4))


def test_wrong_calls_are_refused_with_what_to_do(saved: Save, tmp_path: Path) -> None:
    masked, asking = _engine(saved("bert", "masked_lm")), _engine(saved("bert", "question_answering"))
    decoder = _engine(save_decoder(tmp_path, "gpt2"))
    long = "why " * 200
    cases: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: masked.classify("x"),
            r'classify needs \$.model.task "sequence_classification", but it is "masked_lm": set',
        ),
        (lambda: masked.classify_tokens(["x"]), r'needs \$.model.task "token_classification"'),
        (lambda: masked.answer("x", "y"), r'needs \$.model.task "question_answering"'),
        (lambda: asking.fill_mask(["x"]), r'needs \$.model.task "masked_lm"'),
        (lambda: decoder.fill_mask(["x"]), "a GPT-2 model cannot do it"),
        (lambda: masked.fill_mask(["a [MASK]", "no mask here"]), r"text 1 has no mask: write \[MASK\]"),
        (lambda: masked.fill_mask(["a [MASK]"], top_k=0), "top_k: got 0, wanted 1 or more"),
        (lambda: masked.fill_mask([]), "at least one"),
        (lambda: asking.answer("why?", "  "), "the context is empty"),
        (lambda: asking.answer("", "because"), "the question is empty"),
        (lambda: asking.answer(long, "because"), "the question has 200 tokens, which leaves no room"),
    ]
    for call, message in cases:
        with pytest.raises(EngineError, match=message):
            call()


def test_outputs_that_are_not_finite_are_an_error(saved: Save) -> None:
    directory = saved("bert", "sequence_classification", num_labels=4)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(str(directory))
    model.classifier.weight.data.fill_(float("inf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(directory))
    engine = Engine({"precision": "fp32", "device": "cpu"}, model=model, tokenizer=tokenizer)
    with pytest.raises(EngineError, match="not finite"):
        engine.classify("x")


def test_token_types_outside_the_table_are_an_error(saved: Save) -> None:
    engine = _engine(saved("bert", "masked_lm"))
    with pytest.raises(EngineError, match="token types go from 0 to 1"):
        engine([[1, 2]], token_type_ids=[[0, 2]])
