"""Language modelling on running text: documents end to end, cut into chunks of one length.

Nothing is padded but the last chunk, so every batch has one shape. A chunk may hold the end of one document and the
beginning of the next with a separator between; attention crosses it, as in BERT's, RoBERTa's and GPT-2's training.

``transformers.DataCollatorForLanguageModeling`` draws from one generator that runs on from batch to batch: what it
masks depends on how many batches went before, on the size of the batch and on who else is in it, so neither a resumed
run nor one on another number of processes would see the same masks. Here they follow from (seed, epoch, sample).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import EngineError
from engine.training.data.encoder import Encoder
from engine.training.data.samples import IGNORED, Ids, RaggedBuilder, attention, crc, pad, tensors
from engine.training.data.source import Source
from engine.training.data.streams import MASKS, draws

#: Of the tokens that BERT is asked for: hidden behind the mask token, replaced by a random one; the rest stay
#: (Devlin et al., arXiv 1810.04805, section 3.1).
HIDDEN, RANDOM = 0.8, 0.1
#: A raw draw of 64 bits is split: the upper ones say what happens to a token, the lower ones which token replaces it.
KIND_BITS, WORD_BITS = 24, 40


class CausalText:
    """Chunks of ``length`` tokens for a causal language model: ``labels`` are the inputs, which the model shifts.

    stream: all documents' ids end to end. What remains behind the last whole chunk is a shorter, padded one.
    """

    task = "causal_lm"
    #: Fewer tokens in the last chunk teach nothing: the first is only ever read.
    least = 2

    def __init__(self, stream: Ids, encoder: Encoder, length: int) -> None:
        self.stream, self.encoder, self.length = stream, encoder, length
        self.room = self._room()
        whole, rest = divmod(len(stream), self.room)
        self._count = whole + (rest >= self.least)
        if not self._count:
            raise EngineError(f"the data are {len(stream)} tokens in all, which is too little to train on")
        self.fingerprint = crc(stream, np.array([length]))

    def _room(self) -> int:
        if self.length < self.least:
            raise EngineError(f"length: got {self.length}, a chunk needs {self.least} tokens or more")
        return self.length

    def __len__(self) -> int:
        return self._count

    def chunk(self, index: int) -> Ids:
        """The ids of one chunk, [length] or fewer."""
        return self.stream[index * self.room : (index + 1) * self.room]

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64], seed: int) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels: [B, length] int64."""
        arrays = self._inputs(indices)
        arrays["labels"] = np.where(arrays["attention_mask"] == 1, arrays["input_ids"], IGNORED)
        return tensors(arrays)

    def _inputs(self, indices: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        rows = [self.chunk(int(index)) for index in indices]
        arrays = {
            "input_ids": pad(rows, self.encoder.pad, self.length),
            "attention_mask": attention([len(row) for row in rows], self.length),
        }
        if self.encoder.types:
            arrays["token_type_ids"] = np.zeros_like(arrays["input_ids"])
        return arrays


class MaskedText(CausalText):
    """Chunks of ``length`` tokens, special tokens included, of which an encoder must guess the share ``probability``.

    Of the ordinary tokens of a chunk, ``probability`` of them rounded, at least one, are asked for, as in BERT's own
    data: a chunk without a label, whose mean loss is no number, cannot come about, and batches ask for about as many.
    They are drawn anew in every epoch. Special tokens are never asked for.
    """

    task = "masked_lm"
    least = 1

    def __init__(self, stream: Ids, encoder: Encoder, length: int, probability: float = 0.15) -> None:
        if not 0 < probability <= 1:
            raise EngineError(f"probability: got {probability}, wanted a share above 0, at most 1, of the tokens")
        if encoder.tokenizer.mask_token_id is None:
            raise EngineError(
                "masked_lm: this tokenizer has no mask token: train a causal_lm, or take another tokenizer"
            )
        super().__init__(stream, encoder, length)
        self.probability = probability
        self._prefix, self._suffix = (np.array(ids, np.int32) for ids in (encoder.prefix, encoder.suffix))
        top = max(encoder.vocabulary, *encoder.special, int(stream.max()) + 1)
        self._special = np.zeros(top + 1, bool)
        self._special[list(encoder.special)] = True

    def _room(self) -> int:
        around = len(self.encoder.prefix) + len(self.encoder.suffix)
        if self.length <= around:
            raise EngineError(f"length: got {self.length}, {around} tokens of which are special: wanted more")
        return self.length - around

    def chunk(self, index: int) -> Ids:
        """The ids of one chunk with the special tokens around it."""
        return np.concatenate([self._prefix, super().chunk(index), self._suffix])

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64], seed: int) -> dict[str, Tensor]:
        """input_ids (masked), attention_mask, labels (IGNORED where nothing is asked), perhaps token_type_ids."""
        arrays = self._inputs(indices)
        ids = arrays["input_ids"]
        raw = np.stack(
            [
                draws(seed, MASKS, int(epoch), int(at), 2 * self.length)
                for at, epoch in zip(indices, epochs, strict=True)
            ]
        )
        eligible = (arrays["attention_mask"] == 1) & ~self._special[ids]
        asked = chosen(raw[:, : self.length], eligible, self.probability)
        arrays["labels"] = np.where(asked, ids, IGNORED)
        arrays["input_ids"] = self._hide(ids, asked, raw[:, self.length :])
        return tensors(arrays)

    def _hide(self, ids: NDArray[np.int64], asked: NDArray[np.bool_], raw: NDArray[np.uint64]) -> NDArray[np.int64]:
        kind = (raw >> np.uint64(WORD_BITS)) / 2.0**KIND_BITS
        words = ((raw & np.uint64(2**WORD_BITS - 1)) % np.uint64(self.encoder.vocabulary)).astype(np.int64)
        hidden = np.where(
            kind < HIDDEN, self.encoder.tokenizer.mask_token_id, np.where(kind < HIDDEN + RANDOM, words, ids)
        )
        return np.where(asked, hidden, ids)


def chosen(raw: NDArray[np.uint64], eligible: NDArray[np.bool_], probability: float) -> NDArray[np.bool_]:
    """Which tokens are asked for, [B, S]: in each row those ``eligible`` ones with the smallest draws, as many as
    ``probability`` of them rounded, but at least one where there is one."""
    there = eligible.sum(1)
    count = np.minimum(np.maximum(np.floor(there * probability + 0.5), 1), there)
    order = np.argsort(np.where(eligible, raw, np.iinfo(np.uint64).max), axis=1, kind="stable")
    found = np.zeros_like(eligible)
    np.put_along_axis(found, order, np.arange(raw.shape[1]) < count[:, None], axis=1)
    return found


def masked_lm(
    source: Source, tokenizer: Any, length: int, *, probability: float = 0.15, separator: str | None = None
) -> MaskedText:
    """Reads the column ``text`` for a masked language model. ``separator``: the token between documents, by default
    the tokenizer's separator (else its end-of-text) token."""
    encoder = Encoder(tokenizer)
    between = encoder.separator(separator, tokenizer.sep_token_id, tokenizer.eos_token_id)
    stream = _stream(source, encoder, lambda ids: [*ids, between])
    return MaskedText(stream, encoder, length, probability)


def causal_lm(source: Source, tokenizer: Any, length: int, *, separator: str | None = None) -> CausalText:
    """Reads the column ``text`` for a causal language model. ``separator``: the token behind each document, by default
    the tokenizer's end-of-text (else its separator) token. Special tokens that it puts around a text itself stay."""
    encoder = Encoder(tokenizer)
    last = encoder.separator(separator, tokenizer.eos_token_id, tokenizer.sep_token_id)
    before, behind = encoder.prefix, encoder.suffix
    end = behind if behind and behind[-1] == last else [*behind, last]
    return CausalText(_stream(source, encoder, lambda ids: [*before, *ids, *end]), encoder, length)


def _stream(source: Source, encoder: Encoder, dress: Callable[[list[int]], list[int]]) -> Ids:
    built = RaggedBuilder()
    for block in source.blocks(["text"]):
        built.add([dress(ids) for ids in encoder.bare([row.values["text"] for row in block]) if ids])
    return built.finish().flat
