"""Hugging Face's logits processors with one parameter a row, in the order in which ``generate`` applies them.

All take fp32 logits [B, V]. Nothing here waits for the device.

Probabilities are compared as integers (:func:`masses`): integer sums do not depend on the order of summation, so
which tokens of a row survive, and which is drawn, depends on that row alone, not on the batch, the threads or the
device's scan.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_INF = float("inf")
#: The most probable token's mass. The masses of 2^22 tokens sum to less than 2^63.
_UNIT = 2.0**40
_CHUNK = 256


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divides positive logits of ``seen`` [B, V] by ``penalty`` [B], multiplies negative ones (arXiv 1909.05858)."""
    factor = penalty.unsqueeze(1)
    return torch.where(seen, torch.where(logits < 0, logits * factor, logits / factor), logits)


def suppress_eos(logits: Tensor, generated: Tensor, min_new_tokens: Tensor, eos: Tensor) -> Tensor:
    """Removes the tokens ``eos`` [E] from rows that have ``generated`` [B] fewer tokens than ``min_new_tokens`` [B]."""
    early = (generated < min_new_tokens).unsqueeze(1)
    return logits.index_copy(1, eos, logits.index_select(1, eos).masked_fill(early, -_INF))


def apply_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """Logits / temperature [B]; rows at temperature 0 (greedy) stay as they are."""
    return logits / temperature.masked_fill(temperature == 0, 1.0).unsqueeze(1)


def largest(logits: Tensor, count: int) -> Tensor:
    """The ``count`` largest logits of each row [B, count], descending."""
    if count < logits.shape[1]:
        return logits.topk(count).values
    return logits.sort(descending=True).values


def keep_top_k(logits: Tensor, top_k: Tensor, ordered: Tensor) -> Tensor:
    """Which tokens are among each row's ``top_k`` [B] largest, bool [B, V]; 0 keeps all.

    Ties with the last of them stay too, as with Hugging Face. ``ordered`` is :func:`largest` of at least the largest
    ``top_k``, or of the whole vocabulary.
    """
    place = top_k.clamp(1, ordered.shape[1]).unsqueeze(1) - 1
    return logits >= ordered.gather(1, place).masked_fill((top_k == 0).unsqueeze(1), -_INF)


def keep_top_p(logits: Tensor, mass: Tensor, top_p: Tensor, ordered: Tensor) -> Tensor:
    """Which tokens are needed, the most probable first, to reach ``top_p`` [B], bool [B, V]; 1 or more keeps all.

    At least one token stays. Where the limit falls between equal logits, as many stay as with Hugging Face, those of
    the highest ids (there an unstable sort chooses which). ``mass`` [B, V] is :func:`masses`, 0 for tokens that top-k
    removed. ``ordered`` is :func:`largest` of the whole vocabulary, or of at least ``top_k`` in every row that has a
    ``top_p``: survivors behind its end then tie with its last.
    """
    budget = top_p.unsqueeze(1) * mass.sum(1, keepdim=True)
    ranked = masses(ordered, ordered[:, :1])
    last = (ranked.cumsum(1) - ranked < budget).sum(1, keepdim=True).clamp(min=1) - 1
    cut, cut_mass = ordered.gather(1, last), ranked.gather(1, last)
    above = ranked.masked_fill(ordered <= cut, 0).sum(1, keepdim=True)
    # The i-th of the tokens tied at the cut stays if the mass before it, above + i * cut_mass, is within the budget.
    ties_kept = ((budget - above) / cut_mass).ceil().clamp(min=1).to(torch.int64)
    tied = logits == cut
    counted = tied.to(torch.int64).cumsum(1)
    kept_ties = tied & (counted > counted[:, -1:] - ties_kept)
    return (logits > cut) | kept_ties | (top_p >= 1).unsqueeze(1)


def masses(logits: Tensor, top: Tensor) -> Tensor:
    """Unnormalized probabilities as int64: ``floor(2^40 * exp(logits [B, N] - top [B, 1]))``, top the row's maximum."""
    return (logits - top).exp_().mul_(_UNIT).to(torch.int64)


def first_maximum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's maximum [B] and its first position [B] int64, as ``torch.max``; NaN counts as the maximum.

    In two stages, because PyTorch's vectorized maximum is several times faster on a CPU than its argmax.
    """
    rows, columns = logits.shape
    chunks = F.pad(logits, (0, -columns % _CHUNK), value=-_INF).view(rows, -1, _CHUNK)
    values, chunk = chunks.amax(-1).max(-1)
    inside = chunks.gather(1, chunk.view(rows, 1, 1).expand(rows, 1, _CHUNK)).squeeze(1).argmax(-1)
    return values, chunk * _CHUNK + inside
