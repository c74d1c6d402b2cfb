"""Text generation: prompts in, tokens out as they come, rows of one batch independent of each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from engine.errors import EngineError
from engine.inference.kv_cache import PagedCache
from engine.inference.kv_cache import Sequence as Cached
from engine.inference.params import SamplingParams
from engine.inference.runner import Runner
from engine.inference.steps import Chosen, DeviceSteps, HostSteps, Steps
from engine.inference.text import Detokenizer, Text
from ops.sampling import SamplingState

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Logprob:
    """Natural log-probability of a token under the model's own distribution, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one step adds to a row: ``text`` is what can be shown already, perhaps none. Prints as that text."""

    index: int
    token: int
    text: str = ""
    logprob: Logprob | None = None
    finish_reason: FinishReason | None = None

    def __str__(self) -> str:
        return self.text


@dataclass
class Generation:
    """What was generated after one prompt. Prints as its text.

    token_ids:     the new tokens, the end-of-sequence token included where one came.
    finish_reason: ``stop`` (end of sequence or a stop text) or ``length``.
    prompt_tokens: length of the prompt.
    logprobs:      one a token, if asked for.
    """

    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[Logprob] | None = None
    _text: str | None = field(default=None, repr=False)
    _decoder: Text | None = field(default=None, repr=False, compare=False)

    @property
    def text(self) -> str:
        """The new text, without special tokens and without the stop text. Needs the checkpoint's tokenizer."""
        if self._text is None:
            assert self._decoder is not None
            self._text = self._decoder.decode(self.token_ids)
        return self._text

    def attach(self, decoder: Text, text: str | None) -> None:
        """Says how to make the text of the tokens, or what it is where a stop text has cut it."""
        self._decoder, self._text = decoder, text

    def __str__(self) -> str:
        return self.text


class StopText:
    """Turns a row's tokens into text and watches for its stop texts; holds back what may be the beginning of one."""

    def __init__(self, text: Text, stops: Sequence[str]) -> None:
        self._pieces, self._stops, self._held = Detokenizer(text), stops, ""

    def push(self, token: int) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop text has come (it and what follows is dropped)."""
        return self._release(self._pieces.push(token))

    def flush(self) -> tuple[str, bool]:
        """The rest, at the end of the row."""
        shown, stopped = self._release(self._pieces.flush())
        rest, self._held = ("", "") if stopped else (self._held, "")
        return shown + rest, stopped

    def _release(self, new: str) -> tuple[str, bool]:
        self._held += new
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Generator:
    """Generates with one runner over one KV cache, ``max_batch`` rows at a time."""

    def __init__(self, runner: Runner, cache: PagedCache, text: Text, *, max_batch: int, prefill_chunk: int) -> None:
        self.runner, self.cache, self.text = runner, cache, text
        self.max_batch, self.prefill_chunk = max_batch, prefill_chunk

    def stream(self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, texts: bool) -> Iterator[Piece]:
        """Every row's pieces as they come; ``texts`` asks for text also where no stop text needs it."""
        for first in range(0, len(prompts), self.max_batch):
            rows = [list(row) for row in prompts[first : first + self.max_batch]]
            yield from self._wave(first, rows, params, texts or bool(params.stop))

    def _wave(self, first: int, rows: list[list[int]], params: SamplingParams, texts: bool) -> Iterator[Piece]:
        held: list[Cached] = []
        try:
            held += [self.cache.allocate(len(row) + params.max_new_tokens) for row in rows]
            state = _sampling_state(rows, params, self.runner, first)
            watch = [StopText(self.text, params.stop) if texts else None for _ in rows]
            active = list(range(len(rows)))
            keep: list[int] = []
            with torch.inference_mode():
                logits = self.runner.prefill(self.cache, held, rows, self.prefill_chunk)
            steps = self._steps(held, state, params)
            for step in range(1, params.max_new_tokens + 1):
                out = steps.first(logits) if step == 1 else steps.next(keep)
                self._check_finite(out.valid, [first + row for row in active])
                chances = _logprobs(out)
                keep = []
                for place, row in enumerate(active):
                    piece = _piece(first + row, out.tokens[place], chances[place], watch[row], params, step)
                    if piece.finish_reason is None:
                        keep.append(place)
                    yield piece
                if not keep:
                    return
                active = [active[place] for place in keep]
        finally:
            for sequence in held:
                self.cache.release(sequence)

    def _steps(self, held: list[Cached], state: SamplingState, params: SamplingParams) -> Steps:
        """The device's own steps where the kernel set has them."""
        if self.runner.decode_step(self.cache, len(held)) is None:
            return HostSteps(self.runner, self.cache, held, state, params.logprobs)
        return DeviceSteps(self.runner, self.cache, held, state, params.logprobs, params.max_new_tokens)

    def _check_finite(self, valid: Sequence[bool], rows: Sequence[int]) -> None:
        if not all(valid):
            row = rows[valid.index(False)]
            dtype = str(self.runner.weights.embed.dtype).removeprefix("torch.")
            raise EngineError(
                f"prompt {row}: the model's logits are not finite in {dtype}: "
                'set "precision" to "bf16" or "fp32", and check the checkpoint if it is already'
            )


def _sampling_state(rows: list[list[int]], params: SamplingParams, runner: Runner, first: int) -> SamplingState:
    state = SamplingState.create(
        len(rows),
        runner.spec.vocab_size,
        runner.device,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        repetition_penalty=params.repetition_penalty,
        seed=params.seed + first,
        min_new_tokens=params.min_new_tokens,
        eos=sorted(params.stop_ids),
    )
    if state.seen is not None:
        longest = max(len(row) for row in rows)
        padded = torch.tensor([row + [-1] * (longest - len(row)) for row in rows], device=runner.device)
        state.observe(padded)
    return state


def _logprobs(out: Chosen) -> list[Logprob | None]:
    found = out.logprobs
    if found is None:
        return [None] * len(out.tokens)
    chosen, ids, values = found.chosen.tolist(), found.top_tokens.tolist(), found.top_logprobs.tolist()
    tops = [tuple(zip(*row, strict=True)) for row in zip(ids, values, strict=True)]
    return [Logprob(token, chance, top) for token, chance, top in zip(out.tokens, chosen, tops, strict=True)]


def _piece(
    index: int, token: int, chance: Logprob | None, watch: StopText | None, params: SamplingParams, step: int
) -> Piece:
    """What a row's new token means: the text to show, and whether the row ends with it."""
    ended = token in params.stop_ids
    text, stopped = "", False
    if watch is not None and not ended:
        text, stopped = watch.push(token)
    reason: FinishReason | None = "stop" if ended or stopped else "length" if step == params.max_new_tokens else None
    if watch is not None and reason is not None and not stopped:
        rest, late = watch.flush()
        text, reason = text + rest, "stop" if late else reason
    return Piece(index, token, text, chance, reason)
