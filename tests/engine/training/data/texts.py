"""A word tokenizer made in the test, and files of data."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

#: Padding is not 0, with which arrays may be filled by mistake.
SPECIAL = ("[UNK]", "[CLS]", "[PAD]", "[SEP]", "[MASK]")
WORDS = tuple(f"w{number}" for number in range(200))
UNK, CLS, PAD, SEP, MASK = range(len(SPECIAL))


def word_id(word: str) -> int:
    """The id of one of WORDS."""
    return len(SPECIAL) + WORDS.index(word)


def word_tokenizer(types: bool = True) -> Any:
    """One token a word, ``[CLS] a [SEP]`` and ``[CLS] a [SEP] b [SEP]`` around them, as Hugging Face's fast class."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: at for at, token in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=names,
        model_max_length=16,
    )


def write(path: Path, text: str | bytes) -> Path:
    """Writes a file, gzip where its name says so."""
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes rows as JSON Lines."""
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))
