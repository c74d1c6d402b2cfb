"""The text of the convergence benchmark: tokenized once into one small file that needs nothing beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from config_schema import SlipstreamError
from engine.training.data.encoder import Encoder
from engine.training.data.packed import MaskedText, masked_lm
from engine.training.data.source import Source

#: Every so many documents one is held out.
HELD_OUT = 50
#: Any length: preparing makes one stream of tokens, training cuts it.
_LENGTH = 128
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@dataclass(frozen=True)
class Corpus:
    """What is trained on and what is held out, in whole chunks, and the tokenizer."""

    train: MaskedText
    held_out: MaskedText
    tokenizer: Any


def bert_tokenizer(words: Sequence[str]) -> Any:
    """BERT's WordPiece tokenizer over a vocabulary, uncased unless the vocabulary has capitals.

    Made of the ``tokenizers`` library's own parts: the arguments of Hugging Face's ``BertTokenizer`` differ between
    versions 4 and 5 of transformers.
    """
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from transformers import PreTrainedTokenizerFast

    ids = {word: at for at, word in enumerate(words)}
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["mask_token"] = "[MASK]"
    missing = [word for word in special.values() if word not in ids]
    if missing:
        raise SlipstreamError(f"the vocabulary has no {', '.join(missing)}: wanted BERT's vocab.txt, a word a line")
    tokenizer = Tokenizer(WordPiece(ids, unk_token="[UNK]"))
    lowercase = not any(word != word.lower() for word in words if not word.startswith("["))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **special)


def learned_words(text: Path, count: int) -> list[str]:
    """A WordPiece vocabulary of ``count`` words, lowercase, learned from ``text``. Of words that would serve as well as
    each other, tokenizers takes now one, now another: give all runs of a comparison one file."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=count, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator((row.values["text"] for row in Source(text).rows(["text"])), trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def words_of(text: Path, vocabulary: str | Path) -> list[str]:
    """Those of the file ``vocabulary``, or as many as it says, learned from ``text``."""
    if str(vocabulary).isdecimal():
        words = learned_words(text, int(str(vocabulary)))
    elif not Path(vocabulary).is_file():
        raise SlipstreamError(f"--vocab {vocabulary}: no such file: give BERT's vocab.txt, or a number of words")
    else:
        words = Path(vocabulary).read_text("utf-8").rstrip("\n").split("\n")
    if len(words) > 2**16:
        raise SlipstreamError(f"--vocab {vocabulary}: has {len(words)} words, and ids of 16 bits hold 65536")
    return words


def prepare(text: Path, vocabulary: str | Path, target: Path) -> dict[str, int]:
    """Tokenizes ``text`` (documents between blank lines) into ``target``: 16-bit ids, two bytes a token. ``vocabulary``
    is BERT's file, or how many words to learn. Gives the numbers of documents and tokens."""
    tokenizer = bert_tokenizer(words := words_of(text, vocabulary))
    stream = masked_lm(Source(text), tokenizer, _LENGTH).stream.astype(np.uint16)
    documents = np.split(stream, np.flatnonzero(stream == tokenizer.sep_token_id)[:-1] + 1)
    held = documents[HELD_OUT // 2 :: HELD_OUT]
    kept = [document for at, document in enumerate(documents) if at % HELD_OUT != HELD_OUT // 2]
    if not held:
        raise SlipstreamError(f"{text}: {len(documents)} documents, and {HELD_OUT} are needed to hold one out")
    arrays: dict[str, NDArray[Any]] = {
        "train": np.concatenate(kept),
        "held_out": np.concatenate(held),
        "vocabulary": np.frombuffer("\n".join(words).encode(), np.uint8),
    }
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(arrays, aside)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    counts = {name: len(arrays[name]) for name in ("train", "held_out")}
    return {"documents": len(documents), **counts, "bytes": target.stat().st_size}


def load(path: Path, length: int) -> Corpus:
    """What :func:`prepare` wrote, in chunks of ``length`` tokens."""
    try:
        with safe_open(path, "np") as file:
            arrays: dict[str, NDArray[Any]] = {key: file.get_tensor(key) for key in ("train", "held_out", "vocabulary")}
    except (OSError, SafetensorError) as error:
        raise SlipstreamError(f"--data {path}: {error}: give the file that --prepare makes") from None
    tokenizer = bert_tokenizer(arrays["vocabulary"].tobytes().decode().split("\n"))
    encoder = Encoder(tokenizer)
    room = length - len(encoder.prefix) - len(encoder.suffix)
    if room < 1 or len(arrays["held_out"]) < room:
        raise SlipstreamError(f"{path}: {len(arrays['held_out'])} tokens are held out, not a chunk of {length} tokens")

    def whole(stream: NDArray[Any]) -> MaskedText:
        return MaskedText(stream[: len(stream) // room * room].astype(np.int32), encoder, length)

    return Corpus(whole(arrays["train"]), whole(arrays["held_out"]), tokenizer)
