"""Texts, or pairs of texts, with one label each: classification and regression."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import EngineError
from engine.training.data.encoder import Encoder
from engine.training.data.readers import Row
from engine.training.data.samples import Ragged, RaggedBuilder, attention, crc, pad, tensors, width
from engine.training.data.source import Source

log = logging.getLogger("slipstream.training")


@dataclass(frozen=True)
class LabelledTexts:
    """Tokenized texts with labels.

    ids:    the texts' tokens, special ones included. types: their token types, where the tokenizer has them.
    labels: [N], int64 classes below ``classes``, or float32 values in a regression (``classes`` is None).
    length: tokens of the longest text that is not cut. cut: how many were.
    """

    ids: Ragged
    types: Ragged | None
    labels: NDArray[Any]
    encoder: Encoder
    length: int
    classes: int | None
    cut: int

    @property
    def task(self) -> str:
        """The task by name."""
        return "regression" if self.classes is None else "classification"

    @cached_property
    def fingerprint(self) -> int:
        """A checksum of texts and labels."""
        return crc(self.ids.flat, self.ids.starts, self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64], seed: int) -> dict[str, Tensor]:
        """input_ids, attention_mask, perhaps token_type_ids [B, S] int64; labels [B] int64 or float32.

        What ``transformers.DataCollatorWithPadding`` would make, but always padded on the right, where positions count
        from 0, never beyond ``length``, and without a detour through lists.
        """
        return tensors(
            {**padded(self.ids, self.types, self.encoder, indices, self.length), "labels": self.labels[indices]}
        )


def padded(
    ids: Ragged, types: Ragged | None, encoder: Encoder, indices: NDArray[np.int64], limit: int
) -> dict[str, NDArray[np.int64]]:
    """input_ids, attention_mask and, with ``types``, token_type_ids, [B, S]: S is the longest row's length rounded up
    to a multiple of 8, but at most ``limit``."""
    rows = [ids[int(index)] for index in indices]
    lengths = [len(row) for row in rows]
    to = width(lengths, limit)
    arrays = {"input_ids": pad(rows, encoder.pad, to), "attention_mask": attention(lengths, to)}
    if types is not None:
        arrays["token_type_ids"] = pad([types[int(index)] for index in indices], encoder.pad_type, to)
    return arrays


def classification(source: Source, tokenizer: Any, length: int, labels: int | Sequence[str]) -> LabelledTexts:
    """Reads ``text``, perhaps ``text_pair``, and ``label``: a number below ``labels``, or one of the names ``labels``.

    Texts of more than ``length`` tokens are cut, of a pair the longer one first; how many is said once. Raises
    :class:`EngineError` with file and line for a label that is neither.
    """
    names = None if isinstance(labels, int) else {name: at for at, name in enumerate(labels)}
    classes = labels if isinstance(labels, int) else len(labels)
    if classes < 2:
        raise EngineError(f"labels: a classification needs two or more, got {classes}: for one value, take regression")
    return _read(source, tokenizer, length, lambda row: _class(row, classes, names), classes)


def regression(source: Source, tokenizer: Any, length: int) -> LabelledTexts:
    """Reads ``text``, perhaps ``text_pair``, and ``label``, a finite number; else as :func:`classification`."""
    return _read(source, tokenizer, length, _number, None)


def _class(row: Row, classes: int, names: dict[str, int] | None) -> int:
    label = row.values["label"]
    if names is not None and isinstance(label, str) and label in names:
        return names[label]
    wanted = f"wanted a whole number from 0 to {classes - 1}"
    if names is not None:
        wanted += f", or one of {', '.join(names)}"
    value = _float(label)
    if value is None or not value.is_integer():
        raise row.error(f"label {label!r:.40}: {wanted}")
    if not 0 <= value < classes:
        raise row.error(f"label {label!r:.40} is out of range: {wanted}")
    return int(value)


def _number(row: Row) -> float:
    value = _float(row.values["label"])
    if value is None:
        raise row.error(f"label {row.values['label']!r:.40}: wanted a finite number")
    return value


def _float(label: Any) -> float | None:
    """The label as a finite number, None where it is none."""
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        return None
    try:
        value = float(label)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _read(
    source: Source, tokenizer: Any, length: int, label: Callable[[Row], float], classes: int | None
) -> LabelledTexts:
    encoder = Encoder(tokenizer)
    least = tokenizer.num_special_tokens_to_add(pair=True) + 2
    if length < least:
        raise EngineError(f"length: got {length}, wanted {least} or more: special tokens take {least - 2}")
    ids, types, labels, cut = RaggedBuilder(), RaggedBuilder(), [], 0
    for block in source.blocks(["text", "label"], ["text_pair"]):
        labels += [label(row) for row in block]
        texts = [row.values["text"] for row in block]
        pairs = [row.values["text_pair"] for row in block] if "text_pair" in block[0].values else None
        encoded, more = _cut(encoder, texts, pairs, length)
        for row, tokens in zip(block, encoded["input_ids"], strict=True):
            if not tokens:
                raise row.error("the tokenizer makes no tokens of this text")
        ids.add(encoded["input_ids"])
        if encoder.types:
            types.add(encoded["token_type_ids"])
        cut += more
    tell_cut(cut, len(labels), "texts", f"{length} tokens")
    kind: type[Any] = np.float32 if classes is None else np.int64
    found = types.finish() if encoder.types else None
    return LabelledTexts(ids.finish(), found, np.array(labels, kind), encoder, length, classes, cut)


def _cut(encoder: Encoder, texts: list[str], pairs: list[str] | None, length: int) -> tuple[dict[str, Any], int]:
    """The encoded texts, cut to ``length``, and how many were: only those are encoded again."""
    encoded = dict(encoder.whole(texts, pairs))
    long = [at for at, tokens in enumerate(encoded["input_ids"]) if len(tokens) > length]
    if long:
        second = None if pairs is None else [pairs[at] for at in long]
        again = encoder.whole([texts[at] for at in long], second, truncation=True, max_length=length)
        for key in encoded:
            for at, row in zip(long, again[key], strict=True):
                encoded[key][at] = row
    return encoded, len(long)


def tell_cut(cut: int, count: int, what: str, limit: str) -> None:
    """Warns once of a data set that ``cut`` of its ``count`` texts are longer than ``limit`` and were cut."""
    if cut:
        log.warning("%d of %d %s (%.3g%%) have more than %s and were cut", cut, count, what, 100 * cut / count, limit)
