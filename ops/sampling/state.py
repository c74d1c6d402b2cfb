"""What sampling knows of each row: tensors on the device, and the few facts about them that the host needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from config_schema.errors import SlipstreamError

T = TypeVar("T", int, float)
#: Below this the division by the temperature could overflow; 0 says "greedy" outright.
_LEAST_TEMPERATURE = 1e-6
_SEEDS = 2**64


class SamplingError(SlipstreamError, ValueError):
    """A sampling parameter is out of its range, or does not fit the batch."""


@dataclass(frozen=True)
class SamplingPlan:
    """Which steps a batch needs: decided once on the host, so that no step has to ask the device.

    greedy:   every row is greedy; nothing is drawn.
    penalty:  some row has a repetition penalty.
    minimum:  some row has a minimum of new tokens.
    top_k, top_p: some sampled row has one.
    ordered:  how many of the largest logits these two need; the vocabulary's size if a row has a top_p but no top_k.
    """

    greedy: bool
    penalty: bool
    minimum: bool
    top_k: bool
    top_p: bool
    ordered: int


@dataclass(frozen=True, eq=False)
class SamplingState:
    """One row a sequence. The tensors keep their addresses; ``counter`` and ``seen`` are updated in place by each step.

    temperature:        [B] fp32; 0 is greedy.
    top_k:              [B] int64; 0 is off.
    top_p:              [B] fp64 (a limit such as 0.8 means what it says also where probabilities are exact); 1 is off.
    repetition_penalty: [B] fp32; 1 is off.
    min_new_tokens:     [B] int64; until then the tokens ``eos`` [E] int64 are not chosen.
    seed, counter:      [B] int64, the row's random stream and how many tokens the row has been given.
    seen:               [B, V] bool, the tokens that a penalty applies to; None if no row has one.
    """

    plan: SamplingPlan
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    repetition_penalty: Tensor
    min_new_tokens: Tensor
    eos: Tensor
    seed: Tensor
    counter: Tensor
    seen: Tensor | None

    @classmethod
    def create(
        cls,
        batch: int,
        vocab: int,
        device: torch.device | str = "cpu",
        *,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        repetition_penalty: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
        min_new_tokens: int | Sequence[int] = 0,
        eos: Sequence[int] = (),
    ) -> SamplingState:
        """State before the first token; each parameter is one for all rows or a sequence of ``batch``.

        A single ``seed`` gives row i the seed ``seed + i``, so that equal prompts get different continuations; a
        sequence is taken as it is. Raises :class:`SamplingError` for a parameter out of its range.
        """
        temperatures = _rows("temperature", temperature, batch, _is_temperature, "0 (greedy) or at least 1e-6")
        top_ks = _rows("top_k", top_k, batch, lambda k: k >= 0, "0 (off) or more")
        top_ps = _rows("top_p", top_p, batch, lambda p: 0 <= p <= 1, "from 0 to 1 (off)")
        penalties = _rows(
            "repetition_penalty", repetition_penalty, batch, lambda p: p > 0 and math.isfinite(p), "above 0 (1 is off)"
        )
        minima = _rows("min_new_tokens", min_new_tokens, batch, lambda n: n >= 0, "0 (off) or more")
        first = [seed + row for row in range(batch)] if isinstance(seed, int) else seed
        seeds = _rows("seed", first, batch, lambda _: True, "an integer")
        if any(not 0 <= token < vocab for token in eos):
            raise SamplingError(f"eos {list(eos)}: token ids are from 0 to {vocab - 1}")
        plan = _plan(vocab, temperatures, top_ks, top_ps, penalties, minimum=bool(eos) and any(minima))
        return cls(
            plan=plan,
            temperature=torch.tensor(temperatures, dtype=torch.float32, device=device),
            top_k=torch.tensor([min(k, vocab) for k in top_ks], dtype=torch.int64, device=device),
            top_p=torch.tensor(top_ps, dtype=torch.float64, device=device),
            repetition_penalty=torch.tensor(penalties, dtype=torch.float32, device=device),
            min_new_tokens=torch.tensor(minima, dtype=torch.int64, device=device),
            eos=torch.tensor(sorted(set(eos)), dtype=torch.int64, device=device),
            seed=torch.tensor([_signed(value) for value in seeds], dtype=torch.int64, device=device),
            counter=torch.zeros(batch, dtype=torch.int64, device=device),
            seen=torch.zeros(batch, vocab, dtype=torch.bool, device=device) if plan.penalty else None,
        )

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.counter.shape[0]

    def observe(self, tokens: Tensor, mask: Tensor | None = None) -> None:
        """Marks ``tokens`` [B, T] int64 (a prompt) for the penalty, where ``mask`` [B, T] bool (no padding) is True.

        Ids outside the vocabulary are passed over: no logit stands for them.
        """
        if self.seen is None:
            return
        inside = (tokens >= 0) & (tokens < self.seen.shape[1])
        admitted = inside if mask is None else inside & mask
        flags = self.seen.view(torch.uint8)
        flags.scatter_reduce_(1, tokens.masked_fill(~inside, 0), admitted.to(torch.uint8), "amax")

    def select(self, rows: Sequence[int]) -> SamplingState:
        """A copy of the state of ``rows``, for a batch whose other sequences have ended.

        The plan stays: what it covers beyond their needs changes no token.
        """
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.counter.device)
        by_row = ("temperature", "top_k", "top_p", "repetition_penalty", "min_new_tokens", "seed", "counter")
        seen = None if self.seen is None else self.seen[index]
        return replace(self, seen=seen, **{name: getattr(self, name)[index] for name in by_row})

    def advance(self, tokens: Tensor) -> None:
        """Takes note of the step's ``tokens`` [B] int64, in place."""
        self.counter.add_(1)
        if self.seen is not None:
            self.seen.scatter_(1, tokens.unsqueeze(1), True)


def _plan(
    vocab: int,
    temperatures: Sequence[float],
    top_ks: Sequence[int],
    top_ps: Sequence[float],
    penalties: Sequence[float],
    *,
    minimum: bool,
) -> SamplingPlan:
    drawn = [(min(k, vocab), p) for t, k, p in zip(temperatures, top_ks, top_ps, strict=True) if t > 0]
    return SamplingPlan(
        greedy=not drawn,
        penalty=any(penalty != 1 for penalty in penalties),
        minimum=minimum,
        top_k=any(k > 0 for k, _ in drawn),
        top_p=any(p < 1 for _, p in drawn),
        ordered=max((k or (vocab if p < 1 else 0) for k, p in drawn), default=0),
    )


def _rows(name: str, value: T | Sequence[T], batch: int, allowed: Callable[[T], bool], range_text: str) -> list[T]:
    rows = [value] * batch if isinstance(value, int | float) else list(value)
    if len(rows) != batch:
        raise SamplingError(f"{name} has {len(rows)} values for a batch of {batch}")
    for row in rows:
        if not allowed(row):
            raise SamplingError(f"{name} is {row}: use {range_text}")
    return rows


def _is_temperature(value: float) -> bool:
    return value == 0 or _LEAST_TEMPERATURE <= value < math.inf


def _signed(seed: int) -> int:
    """Any integer as the int64 with the same 64 low bits."""
    low = seed % _SEEDS
    return low - _SEEDS if low >= _SEEDS // 2 else low
