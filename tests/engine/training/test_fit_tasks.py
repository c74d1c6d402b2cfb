"""Every task of the section "data" from files, with models whose inputs and tokenizers differ."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine import Engine
from engine.errors import EngineError
from engine.training.model import positions
from tests.engine.tiny_text import CORPUS, DECODER_SIZES, ENCODER_SIZES, TOKENIZER_FILES, bpe_tokenizer
from tests.engine.training.trained import WORDS, config

LENGTH = {"max_position_embeddings": 40}


def checkpoint(directory: Path, model_type: str, **changes: Any) -> Path:
    """A directory with a tiny config and a byte-level tokenizer, and no weights."""
    tokenizer = bpe_tokenizer()
    if model_type in ENCODER_SIZES:
        tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    sizes = {**ENCODER_SIZES, **DECODER_SIZES}[model_type]
    eos = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    facts = {"vocab_size": len(tokenizer), **sizes, **eos, "pad_token_id": tokenizer.pad_token_id, **changes}
    transformers.AutoConfig.for_model(model_type, **facts).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_rows(path: Path, row: Callable[[random.Random], dict[str, Any]], count: int, seed: int) -> None:
    chance = random.Random(seed)
    path.write_text("".join(json.dumps(row(chance)) + "\n" for _ in range(count)), encoding="utf-8")


def labelled(chance: random.Random) -> dict[str, Any]:
    label = chance.choice(sorted(WORDS))
    return {"text": " ".join(chance.choice(WORDS[label]) for _ in range(4)), "label": int(label)}


def pair(chance: random.Random) -> dict[str, Any]:
    return {**labelled(chance), "text_pair": chance.choice(CORPUS)}


def valued(chance: random.Random) -> dict[str, Any]:
    return {"text": " ".join(chance.choice(WORDS["1"]) for _ in range(4)), "label": chance.random()}


def asked(chance: random.Random) -> dict[str, Any]:
    context = chance.choice(CORPUS[:3])
    words = [word for word in context.rstrip(".").split() if len(word) > 3]
    answer = chance.choice(words)
    answers = {"text": [answer], "answer_start": [context.index(answer)]}
    return {"question": f"What of {answer[:2]}?", "context": context, "answers": answers}


TASKS: dict[str, tuple[str, str, Any, dict[str, Any], tuple[str, ...]]] = {
    "masked LM, BERT": ("bert", "masked_lm", None, {}, ("loss", "perplexity")),
    "masked LM, RoBERTa": ("roberta", "masked_lm", None, {"metric": "perplexity"}, ("perplexity", "loss")),
    "causal LM, GPT-2": ("gpt2", "causal_lm", None, {}, ("loss", "perplexity")),
    "causal LM, Llama": ("llama", "causal_lm", None, {}, ("loss", "perplexity")),
    "classes, GPT-2": ("gpt2", "sequence_classification", labelled, {}, ("accuracy", "f1")),
    "classes of pairs, RoBERTa": ("roberta", "sequence_classification", pair, {"labels": 3, "metric": "matthews"},
                                  ("matthews", "accuracy")),
    "classes, DistilBERT": ("distilbert", "sequence_classification", labelled, {}, ("accuracy", "f1")),
    "values, BERT": ("bert", "sequence_classification", valued, {"task": "regression"}, ("pearson", "spearman")),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_trains_and_evaluates(name: str, tmp_path: Path) -> None:
    model_type, task, row, data, figures = TASKS[name]
    directory = checkpoint(tmp_path / "model", model_type, **({"type_vocab_size": 1} if "RoBERTa" in name else {}))
    for at, part in enumerate(("train", "eval")):
        path = tmp_path / f"{part}.{'txt' if row is None else 'jsonl'}"
        if row is None:
            path.write_text("\n\n".join(CORPUS * 4), encoding="utf-8")
        else:
            write_rows(path, row, 20, at)
        data = {**data, part: str(path)}
    document = {
        **config(training={"max_steps": 3, "output": str(tmp_path / "run")}),
        "model": {"path": str(directory), "task": task, "weights": "random"},
        "data": {"length": 24, **data},
    }
    engine = Engine(document)
    summary = engine.fit()
    assert tuple(summary.figures)[:2] == figures
    assert summary.steps == 3
    if task == "causal_lm":
        assert summary.figures["loss"] == pytest.approx(_loss_by_hand(engine), rel=1e-4)
    engine.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))["model_type"] == model_type


def _loss_by_hand(engine: Engine) -> float:
    """The mean over all tokens, each chunk through the model alone."""
    samples = engine._trainer.samples("eval")
    total, count = 0.0, 0
    engine.model.eval()
    for at in range(len(samples)):
        ids = torch.tensor(samples.chunk(at).tolist())[None]  # type: ignore[attr-defined]
        with torch.no_grad():
            logits = engine.model(input_ids=ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total / count


def test_answers_questions(tmp_path: Path, minilm_dir: Path) -> None:
    sizes = {"vocab_size": 30522, "max_position_embeddings": 130, **ENCODER_SIZES["bert"]}
    transformers.BertConfig(**sizes).save_pretrained(tmp_path / "model")
    for name in TOKENIZER_FILES:
        if (minilm_dir / name).is_file():
            (tmp_path / "model" / name).write_bytes((minilm_dir / name).read_bytes())
    write_rows(tmp_path / "train.jsonl", asked, 24, 1)
    document = {
        **config(training={"max_steps": 60, "output": str(tmp_path / "run"), "micro_batch_size": 12, "seed": 2}),
        "model": {"path": str(tmp_path / "model"), "task": "question_answering", "weights": "random"},
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "train.jsonl"), "length": 48,
                 "stride": 8, "max_question": 12},
    }  # fmt: skip
    engine = Engine(document)
    before = engine.evaluate()["f1"]
    summary = engine.fit()
    assert tuple(summary.figures) == ("f1", "exact_match")
    assert summary.figures["f1"] > max(before, 0.5)
    row = asked(random.Random(1))
    assert engine.answer(row["question"], row["context"]).text


def test_token_types_go_to_models_that_have_them(tmp_path: Path) -> None:
    """GPT-2 would add the embedding of the word 0 to every word, and infer without it."""
    directory = checkpoint(tmp_path / "model", "gpt2")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
    engine = Engine(config(), model=model)
    ids = torch.arange(3, 11)[None]
    with_types = {"input_ids": ids, "labels": ids, "token_type_ids": torch.zeros_like(ids)}
    engine.eval()
    with torch.no_grad():
        wanted = float(model(input_ids=ids, labels=ids).loss)
    assert float(engine(with_types).loss) == pytest.approx(wanted)


def test_positions_are_what_a_model_can_read(tmp_path: Path) -> None:
    """RoBERTa counts from behind its padding token: the longest text has that many positions less."""
    for kind, changes in (("bert", LENGTH), ("roberta", {**LENGTH, "pad_token_id": 1}), ("gpt2", {})):
        facts = transformers.AutoConfig.for_model(kind, **{**ENCODER_SIZES, **DECODER_SIZES}[kind] | changes)
        model = transformers.AutoModel.from_config(facts).eval()
        most = positions(facts)
        assert most == {"bert": 40, "roberta": 38, "gpt2": 96}[kind]
        model(input_ids=torch.full((1, most), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 7))


BROKEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "more classes than outputs": ({"labels": 3}, "Sequence", r"\$\.data\.labels: 3 classes, but the model has 2 out"),
    "a value of two outputs": ({"task": "regression"}, "Sequence", r"\$\.data\.task: a regression needs a model with"),
    "no files": ({"labels": 2}, "Sequence", r"\$\.data\.train: missing: name the files"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_refuses_data_for_a_model_given(name: str, tmp_path: Path) -> None:
    data, kind, message = BROKEN[name]
    directory = checkpoint(tmp_path / "model", "bert")
    facts = transformers.AutoConfig.from_pretrained(directory)
    model = getattr(transformers, f"AutoModelFor{kind}Classification").from_config(facts)
    write_rows(tmp_path / "train.jsonl", labelled, 4, 0)
    if name != "no files":
        data = {**data, "train": str(tmp_path / "train.jsonl")}
    document = config(training={"output": str(tmp_path / "run")}, data={"length": 24, **data})
    engine = Engine(document, model=model, tokenizer=transformers.AutoTokenizer.from_pretrained(directory))
    with pytest.raises(EngineError, match=message):
        engine.fit()
