"""The tokenized file of the convergence benchmark beside Hugging Face's tokenizer and the text itself."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import layer_drop_convergence as command
from benchmarks.convergence_data import HELD_OUT, bert_tokenizer, load, prepare
from config_schema import SlipstreamError
from tests.benchmarks.small import SPECIAL, WORDS, call, write_text

TEXTS = [
    "Hello, World! It isn't cheap: 3,50 €.",
    "Événements à Zürich (naïve) 東京 tokenization\tunbelievably",
    "[MASK] of the xyzzyqq-plugh\u00a0word\u200b.",
]


def test_the_tokenizer_is_bert_s(minilm_dir: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(minilm_dir)
    mine = bert_tokenizer((minilm_dir / "vocab.txt").read_text("utf-8").rstrip("\n").split("\n"))
    assert len(mine) == len(theirs)
    for pairs in (None, TEXTS[::-1]):
        found, expected = (tokenizer(TEXTS, pairs) for tokenizer in (mine, theirs))
        assert found["input_ids"] == expected["input_ids"]
        assert found["token_type_ids"] == expected["token_type_ids"]
    for name in ("pad", "unk", "cls", "sep", "mask"):
        assert getattr(mine, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")


def test_capitals_in_the_vocabulary_are_kept() -> None:
    assert bert_tokenizer([*SPECIAL, "word", "Word"])("Word word")["input_ids"] == [2, 6, 5, 3]
    assert bert_tokenizer([*SPECIAL, "word"])("Word word")["input_ids"] == [2, 5, 5, 3]


def test_every_document_is_trained_on_or_held_out(tmp_path: Path) -> None:
    text, vocabulary = write_text(tmp_path)
    documents = text.read_text().strip().split("\n\n")
    target = tmp_path / "corpus.safetensors"
    counts = prepare(text, vocabulary, target)
    ids = {word: at for at, word in enumerate((*SPECIAL, *WORDS))}
    words = [[ids[word] for word in document.lower().split()] for document in documents]
    held = [document for at, document in enumerate(words) if at % HELD_OUT == HELD_OUT // 2]
    kept = [document for at, document in enumerate(words) if at % HELD_OUT != HELD_OUT // 2]
    assert len(held) == 3
    assert counts["documents"] == 150
    for length in (16, 40):
        corpus = load(target, length)
        for part, expected in ((corpus.train, kept), (corpus.held_out, held)):
            stream = [token for document in expected for token in (*document, 3)]
            whole = len(stream) // (length - 2) * (length - 2)
            assert part.stream.tolist() == stream[:whole]
            assert len(part) == whole // (length - 2)
            batch = part.batch(np.array([len(part) - 1]), np.array([0]), 0)
            assert torch.equal(batch["attention_mask"], torch.ones(1, length, dtype=torch.int64)), "no padding"
    assert counts["bytes"] < 2 * (counts["train"] + counts["held_out"]) + 1000
    assert not list(tmp_path.glob(".*"))


def test_a_vocabulary_is_learned_from_the_text(tmp_path: Path) -> None:
    text, _ = write_text(tmp_path)
    target = tmp_path / "corpus.safetensors"
    counts = prepare(text, "40", target)
    corpus = load(target, 16)
    assert len(corpus.tokenizer) == 40
    assert corpus.tokenizer.convert_ids_to_tokens(list(range(5))) == list(SPECIAL)
    document = text.read_text().split("\n\n")[25].strip()
    pieces = corpus.tokenizer.convert_ids_to_tokens(corpus.tokenizer(document)["input_ids"][1:-1])
    assert " ".join(pieces).replace(" ##", "") == document.lower()
    assert counts["train"] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--prepare", "text.txt"], "--prepare needs --vocab"),
        (["--prepare", "text.txt", "--vocab", "none.txt", "--data", "x"], "--vocab none.txt: no such file"),
        (["--prepare", "text.txt", "--vocab", "text.txt", "--data", "x"], r"the vocabulary has no \[PAD\]"),
        (["--prepare", "none.txt", "--vocab", "vocab.txt", "--data", "x"], "none.txt: "),
        (["--prepare", "text.txt", "--vocab", "vocab.txt", "--data", "none/x"], "--data none/x: there is no directory"),
        (["--prepare", "short.txt", "--vocab", "vocab.txt", "--data", "x"], "documents, and 50 are needed"),
        (["--arm", "postln"], "--arm needs --data"),
        (["--arm", "postln", "--data", "none"], "--data none: "),
        (["--arm", "postln", "--data", "text.txt"], "--data text.txt: .*--prepare makes"),
        (["--finetune", "task"], "--finetune needs --run"),
        (["--finetune", "task", "--run", "."], r"--run \.: holds no model"),
        (["--plot", "."], r"--plot \.: holds no run of postln that is done"),
    ],
)
def test_bad_input_is_one_line(
    given: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_text(tmp_path)
    (tmp_path / "short.txt").write_text("ba\n\nde\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        call(command.main, monkeypatch, *given)
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, last), last


def test_a_text_too_short_to_hold_out_a_chunk_is_told(tmp_path: Path) -> None:
    text, vocabulary = write_text(tmp_path, 60)
    prepare(text, vocabulary, tmp_path / "corpus")
    with pytest.raises(SlipstreamError, match="tokens are held out, not a chunk of 512"):
        load(tmp_path / "corpus", 512)
