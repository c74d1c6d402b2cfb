"""Labelled texts become what a Hugging Face model takes; wrong labels are told with file and line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import EngineError
from engine.training.data.labelled import LabelledTexts, classification, regression
from engine.training.data.source import Source
from tests.engine.tiny_text import bpe_tokenizer
from tests.engine.training.data.texts import CLS, PAD, SEP, word_id, word_tokenizer, write, write_rows


def rows(tmp_path: Path, *given: dict[str, Any]) -> Source:
    return Source(write_rows(tmp_path / "a.jsonl", given))


def batch(samples: LabelledTexts, *indices: int) -> dict[str, torch.Tensor]:
    return samples.batch(np.array(indices), np.zeros(len(indices), np.int64), 0)


def test_texts_with_classes(tmp_path: Path) -> None:
    source = rows(
        tmp_path,
        {"text": "w1", "label": 2},
        {"text": "w1 w2 w3 w4 w5 w6 w7", "label": "1"},
        {"text": "w9", "label": 0.0},
    )
    samples = classification(source, word_tokenizer(), 16, 3)
    assert (len(samples), samples.task, samples.classes, samples.cut) == (3, "classification", 3, 0)
    out = batch(samples, 2, 0)
    assert out["input_ids"].tolist() == [[CLS, word_id(w), SEP, *[PAD] * 5] for w in ("w9", "w1")], (
        "8 is the least width"
    )
    assert out["attention_mask"].tolist() == [[1, 1, 1, *[0] * 5]] * 2
    assert out["labels"].tolist() == [0, 2]
    assert batch(samples, 0, 1)["input_ids"].shape == (2, 16), "9 tokens are rounded up"
    assert all(value.dtype == torch.int64 for value in out.values())


def test_padding_is_that_of_hugging_face_and_never_beyond_the_length(tmp_path: Path) -> None:
    from transformers import DataCollatorWithPadding

    given = [{"text": f"w{n} " * n, "text_pair": "w1 " * (9 - n), "label": n % 2} for n in range(1, 9)]
    tokenizer = word_tokenizer()
    samples = classification(rows(tmp_path, *given), tokenizer, 100, 2)
    out = batch(samples, *range(8))
    features = [{**tokenizer(row["text"], row["text_pair"], verbose=False), "labels": row["label"]} for row in given]
    theirs = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)(features)
    assert out.keys() == theirs.keys()
    assert all(torch.equal(out[name], theirs[name]) for name in out)
    assert out["token_type_ids"].any()
    tight = classification(rows(tmp_path, *given), tokenizer, 12, 2)
    assert batch(tight, 0)["input_ids"].shape == (1, 12)


def test_texts_that_are_too_long_are_cut_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = rows(
        tmp_path,
        {"text": "w1 w2 w3 w4 w5 w6", "text_pair": "w7 w8", "label": 0},
        {"text": "w1", "text_pair": "w2", "label": 1},
        {"text": "w1", "text_pair": "w2 w3 w4 w5 w6 w7 w8", "label": 1},
    )
    with caplog.at_level(logging.WARNING, "slipstream.training"):
        samples = classification(source, word_tokenizer(), 8, 2)
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 texts (66.7%) have more than 8 tokens and were cut"
    ]
    assert samples.cut == 2
    w = [word_id(f"w{at}") for at in range(9)]
    assert samples.ids[0].tolist() == [CLS, w[1], w[2], w[3], SEP, w[7], w[8], SEP], "the longer text gives way"
    assert samples.ids[2].tolist() == [CLS, w[1], SEP, w[2], w[3], w[4], w[5], SEP]
    assert samples.types is not None
    assert samples.types[0].tolist() == [0] * 5 + [1] * 3
    caplog.clear()
    classification(source, word_tokenizer(), 16, 2)
    assert not caplog.records


def test_labels_by_name(tmp_path: Path) -> None:
    source = rows(tmp_path, {"text": "w1", "label": "no"}, {"text": "w2", "label": "yes"}, {"text": "w3", "label": 1})
    assert classification(source, word_tokenizer(), 8, ["yes", "no"]).labels.tolist() == [1, 0, 1]


def test_regression(tmp_path: Path) -> None:
    source = Source(write(tmp_path / "a.csv", "text,text_pair,label\nw1,w2,4.75\nw3,w4,-1e-3\n"))
    samples = regression(source, word_tokenizer(), 8)
    assert (samples.task, samples.classes) == ("regression", None)
    out = batch(samples, 1, 0)
    assert out["labels"].dtype == torch.float32
    assert out["labels"].tolist() == pytest.approx([-1e-3, 4.75])


def test_tokenizers_without_padding_or_types(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    source = rows(tmp_path, {"text": "the moon", "label": 1}, {"text": "sea", "label": 0})
    out = batch(classification(source, tokenizer, 16, 2), 0, 1)
    assert out.keys() == {"input_ids", "attention_mask", "labels"}
    kept = out["attention_mask"].bool()
    assert out["input_ids"][0][kept[0]].tolist() == tokenizer("the moon")["input_ids"]
    assert (out["input_ids"][~kept] == tokenizer.eos_token_id).all()
    with pytest.raises(EngineError, match=r"line 2: the tokenizer makes no tokens of this text"):
        classification(rows(tmp_path, {"text": "a", "label": 0}, {"text": "", "label": 0}), tokenizer, 8, 2)


def test_a_hugging_face_model_takes_the_batches(tmp_path: Path) -> None:
    import transformers

    source = rows(tmp_path, {"text": "w1 w2", "label": 1}, {"text": "w3", "label": 0})
    for samples, labels in (
        (classification(source, word_tokenizer(), 8, 2), 2),
        (regression(source, word_tokenizer(), 8), 1),
    ):
        config = transformers.AutoConfig.for_model(
            "bert", vocab_size=205, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            num_labels=labels,
        )  # fmt: skip
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        assert torch.isfinite(model(**batch(samples, 0, 1)).loss)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (2, r"line 2: label 2 is out of range: wanted a whole number from 0 to 1"),
        (-1, r"line 2: label -1 is out of range"),
        (0.5, r"line 2: label 0\.5: wanted a whole number"),
        ("x", r"line 2: label 'x': wanted a whole number"),
        (True, r"line 2: label True: wanted"),
        (float("nan"), r"line 2: label nan: wanted"),
        (10**400, r"line 2: label 1000.*: wanted"),
        ([1], r"line 2: label \[1\]: wanted"),
        (None, r"line 2: 'label' is null"),
    ],
)
def test_wrong_classes(tmp_path: Path, label: Any, message: str) -> None:
    source = rows(tmp_path, {"text": "w1", "label": 0}, {"text": "w1", "label": label})
    with pytest.raises(EngineError, match=r"a\.jsonl: " + message) as caught:
        classification(source, word_tokenizer(), 8, 2)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
    if not (isinstance(label, int | float) and abs(label) < 10):
        with pytest.raises(EngineError, match=r"line 2: "):
            regression(source, word_tokenizer(), 8)


def test_other_mistakes(tmp_path: Path) -> None:
    source = rows(tmp_path, {"text": "w1", "label": "maybe"})
    with pytest.raises(EngineError, match=r"label 'maybe': wanted a whole number from 0 to 1, or one of no, yes"):
        classification(source, word_tokenizer(), 8, ["no", "yes"])
    with pytest.raises(EngineError, match="length: got 4, wanted 5 or more: special tokens take 3"):
        classification(source, word_tokenizer(), 4, 2)
    with pytest.raises(EngineError, match="labels: a classification needs two or more, got 1"):
        classification(source, word_tokenizer(), 8, 1)


def test_fingerprints_tell_data_apart(tmp_path: Path) -> None:
    found = {
        classification(rows(tmp_path, {"text": text, "label": label}), word_tokenizer(), 8, 2).fingerprint
        for text, label in (("w1", 0), ("w1", 1), ("w2", 0), ("w1", 0))
    }
    assert len(found) == 3
