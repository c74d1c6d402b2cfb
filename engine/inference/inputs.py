"""What a user may hand over as a batch, brought to rows of token ids without padding, and outputs brought back to its
shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.inference.text import Text


@dataclass(frozen=True)
class Rows:
    """A batch without its padding.

    ids:    token ids of each row.
    types:  token types of each row, or None.
    places: [B, S] bool, True where the caller's padded batch holds a token; None where rows came one by one.
    single: the caller gave one sequence, not a list of them.
    """

    ids: list[list[int]]
    types: list[list[int]] | None = None
    places: Tensor | None = None
    single: bool = False

    def pad(self, flat: Tensor) -> Tensor:
        """[T, ...] laid out as the caller's batch [B, S, ...]; zeros where there is padding, on the right by
        default."""
        places = self.places
        if places is None:
            longest = max(len(row) for row in self.ids)
            lengths = torch.tensor([len(row) for row in self.ids])
            places = torch.arange(longest) < lengths[:, None]
        out = flat.new_zeros((*places.shape, *flat.shape[1:]))
        out[places.to(flat.device)] = flat
        return out


@dataclass(frozen=True)
class Flat:
    """A padded batch of ids that lie on the model's device and never leave it.

    ids:     [T] int64, the sequences end to end without padding; not yet checked.
    types:   [T] int64, or None.
    lengths: of each sequence.
    shape:   [B, S] of the caller's batch.
    order:   [B, S] int64, the token at each place, T where there is padding; None where there is none.
    """

    ids: Tensor
    types: Tensor | None
    lengths: tuple[int, ...]
    shape: tuple[int, int]
    order: Tensor | None = None

    def pad(self, flat: Tensor) -> Tensor:
        """[T, ...] laid out as the caller's batch [B, S, ...]; zeros where there is padding."""
        if self.order is None:
            return flat.view(*self.shape, *flat.shape[1:])
        return torch.cat((flat, flat.new_zeros(1, *flat.shape[1:])))[self.order]

    def rows(self) -> Rows:
        """The same on the host; waits for the device."""
        ids = [row.tolist() for row in self.ids.cpu().split(self.lengths)]
        return Rows(ids, None if self.types is None else [row.tolist() for row in self.types.cpu().split(self.lengths)])


def flat_from(
    batch: Any, device: torch.device, *, attention_mask: Any = None, token_type_ids: Any = None
) -> Flat | None:
    """A tensor of ids on ``device``, or a batch that holds one, as :class:`Flat`; None for whatever else.

    Waits for the device only to learn the lengths from a mask that lies there.
    """
    if isinstance(batch, Mapping):
        attention_mask = batch.get("attention_mask", attention_mask)
        token_type_ids = batch.get("token_type_ids", token_type_ids)
        batch = batch.get("input_ids")
    if not isinstance(batch, Tensor) or batch.device != device or not batch.numel():
        return None
    _assert_ids(batch)
    ids = batch if batch.dim() == 2 else batch[None]
    types = None if token_type_ids is None else _like(ids, token_type_ids, "token_type_ids").to(device, torch.int64)
    shape, lengths = (ids.shape[0], ids.shape[1]), (ids.shape[1],) * ids.shape[0]
    order = None
    if attention_mask is not None:
        mask = _like(ids, attention_mask, "attention_mask").bool()
        lengths = tuple(mask.sum(1).tolist())
        if sum(lengths) < ids.numel():
            order = _order(mask.to(device), sum(lengths))
    total = sum(lengths)
    flat_types = None if types is None else _without_padding(types, order, total)
    return Flat(_without_padding(ids.to(torch.int64), order, total), flat_types, lengths, shape, order)


def _order(mask: Tensor, total: int) -> Tensor:
    """For each place of a batch its token among the ``total`` that the mask keeps, or ``total``."""
    return torch.where(mask, (mask.flatten().cumsum(0) - 1).view_as(mask), total)


def _without_padding(padded: Tensor, order: Tensor | None, total: int) -> Tensor:
    """[T] of [B, S]. A scatter, since to gather by a mask would wait for the device."""
    if order is None:
        return padded.flatten()
    return padded.new_empty(total + 1).scatter_(0, order.flatten(), padded.flatten())[:total]


def rows_from(
    batch: Any, text: Text, *, attention_mask: Any = None, token_type_ids: Any = None, limit: int | None = None
) -> Rows:
    """Rows from a text, a list of texts, (text, text) pairs, token ids, a padded tensor with its mask, or a
    BatchEncoding. ``limit`` cuts texts at so many tokens, special tokens kept; ids are taken as they are."""
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise EngineError(f"a batch needs input_ids, got {', '.join(map(str, batch))}")
        mask, types = batch.get("attention_mask", attention_mask), batch.get("token_type_ids", token_type_ids)
        return rows_from(batch["input_ids"], text, attention_mask=mask, token_type_ids=types)
    if isinstance(batch, str):
        return replace(_from_texts([batch], text, limit), single=True)
    if isinstance(batch, Tensor):
        return _from_tensor(batch, attention_mask, token_type_ids)
    if not isinstance(batch, Sequence):
        raise EngineError(f"wanted a text, texts, token ids or a batch with input_ids, got {type(batch).__name__}")
    if not batch:
        raise EngineError("the batch is empty: give at least one sequence")
    if all(isinstance(item, str) for item in batch):
        return _from_texts(list(batch), text, limit)
    if all(isinstance(item, tuple) and len(item) == 2 and all(isinstance(t, str) for t in item) for item in batch):
        return _from_texts(list(batch), text, limit)
    if attention_mask is not None or token_type_ids is not None:
        return _from_tensor(torch.as_tensor(batch), attention_mask, token_type_ids)
    if all(_is_id(item) for item in batch):
        return Rows([list(batch)], single=True)
    if all(isinstance(item, Sequence) and not isinstance(item, str) and all(map(_is_id, item)) for item in batch):
        return Rows([list(row) for row in batch])
    raise EngineError("a list must hold texts, (text, text) pairs, token ids, or lists of token ids, all of one kind")


def _is_id(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _from_texts(items: list[Any], text: Text, limit: int | None) -> Rows:
    cut = {} if limit is None else {"truncation": True, "max_length": limit}
    encoded = text.tokenizer(items, **cut)
    types = encoded.get("token_type_ids")
    return Rows([list(row) for row in encoded["input_ids"]], None if types is None else [list(row) for row in types])


def _from_tensor(ids: Tensor, attention_mask: Any, token_type_ids: Any) -> Rows:
    _assert_ids(ids)
    single = ids.dim() == 1
    ids = torch.atleast_2d(ids.detach().cpu())
    places = _beside(ids, attention_mask, "attention_mask", 1).bool()
    types = None
    if token_type_ids is not None:
        given = _beside(ids, token_type_ids, "token_type_ids", 0)
        types = [row[keep].tolist() for row, keep in zip(given, places, strict=True)]
    rows = [row[keep].tolist() for row, keep in zip(ids, places, strict=True)]
    return Rows(rows, types, places, single)


def _assert_ids(ids: Tensor) -> None:
    if ids.dim() not in (1, 2) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise EngineError(f"input_ids: wanted integers [sequences, tokens], got {ids.dtype} {list(ids.shape)}")


def _beside(ids: Tensor, given: Any, name: str, otherwise: int) -> Tensor:
    """``given`` as a tensor of ``ids``' shape [B, S] on the host; ``otherwise`` everywhere if it is None."""
    return torch.full_like(ids, otherwise) if given is None else _like(ids, given, name).cpu()


def _like(ids: Tensor, given: Any, name: str) -> Tensor:
    """``given`` as a tensor of ``ids``' shape [B, S], wherever it lies."""
    found: Tensor = torch.atleast_2d(torch.as_tensor(given))
    if found.shape != ids.shape:
        raise EngineError(f"{name}: shape {list(found.shape)} does not fit input_ids {list(ids.shape)}")
    return found
