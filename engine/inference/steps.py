"""Where a wave's next tokens come from: from steps that the host drives one by one, or from a device that runs ahead.

Both give one :class:`Chosen` a step for the rows that are still wanted. The device keeps its own count of tokens,
positions and random numbers, so the host reads tokens some steps late and throws away what comes after a stop.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.inference.decode_step import DecodeStep
from engine.inference.kv_cache import PagedCache
from engine.inference.kv_cache import Sequence as Cached
from engine.inference.runner import Runner
from ops.sampling import SamplingState, TokenLogprobs, sample

#: How long the device may be ahead of what the host has read, in seconds, and in steps.
AHEAD_SECONDS = 1e-3
MOST_AHEAD = 16
FIRST_CHUNK = 2


@dataclass(frozen=True)
class Chosen:
    """One step's tokens of the rows asked for, in their order; ``valid`` and ``logprobs`` as in
    :class:`ops.sampling.SampleOutput`, on the CPU."""

    tokens: list[int]
    valid: list[bool]
    logprobs: TokenLogprobs | None


class Steps(Protocol):
    """A wave's steps after its prefill."""

    def first(self, logits: Tensor) -> Chosen:
        """The tokens after the prompts, whose last logits [B, vocabulary] are given."""
        ...

    def next(self, keep: Sequence[int]) -> Chosen:
        """The next tokens of the rows at places ``keep`` of the step before; the other rows have ended."""
        ...


class HostSteps:
    """One step at a time: the plan reads lengths on the host."""

    def __init__(
        self, runner: Runner, cache: PagedCache, held: Sequence[Cached], state: SamplingState, logprobs: int | None
    ) -> None:
        self.runner, self.cache, self.held, self.state, self.logprobs = runner, cache, list(held), state, logprobs
        self._last: list[int] = []

    def first(self, logits: Tensor) -> Chosen:
        """Samples."""
        return self._sample(logits)

    def next(self, keep: Sequence[int]) -> Chosen:
        """Decodes one token a row, and samples."""
        if len(keep) < len(self.held):
            self.state = self.state.select(keep)
            self.held = [self.held[place] for place in keep]
        with torch.inference_mode():
            logits = self.runner.decode(self.cache, self.held, [self._last[place] for place in keep])
        return self._sample(logits)

    def _sample(self, logits: Tensor) -> Chosen:
        with torch.inference_mode():
            out = sample(logits, self.state, logprobs=self.logprobs)
        self._last = out.tokens.tolist()
        return Chosen(self._last, out.valid.tolist(), _on_host(out.logprobs))


@dataclass
class _Chunk:
    """Steps on their way: what the device will have written once ``done`` has passed."""

    words: Tensor
    logprobs: list[TokenLogprobs]
    done: torch.cuda.Event | None

    def wait(self) -> None:
        if self.done is not None:
            self.done.synchronize()


class DeviceSteps:
    """Chunks of steps, two on their way at any time, each as long as :data:`AHEAD_SECONDS` takes."""

    def __init__(
        self,
        runner: Runner,
        cache: PagedCache,
        held: Sequence[Cached],
        state: SamplingState,
        logprobs: int | None,
        new_tokens: int,
    ) -> None:
        self.runner, self.cache, self.held, self.state, self.logprobs = runner, cache, list(held), state, logprobs
        self.left = new_tokens - 1
        self._size = FIRST_CHUNK
        self._queue: deque[_Chunk] = deque()
        self._ready: deque[Chosen] = deque()
        self._rows = list(range(len(self.held)))  # rows of the batch that the places of the latest step are
        self._read = 0.0

    def first(self, logits: Tensor) -> Chosen:
        """Samples, and sends the device on before the tokens are read."""
        with torch.inference_mode():
            out = sample(logits, self.state, logprobs=self.logprobs)
            if self.left:
                positions = torch.tensor([one.length for one in self.held], device=self.runner.device)
                self._begin(out.tokens, positions, self.state)
                self._send()
        return Chosen(out.tokens.tolist(), out.valid.tolist(), _on_host(out.logprobs))

    def next(self, keep: Sequence[int]) -> Chosen:
        """The next step of the chunk at hand, or of the one that is awaited."""
        self._rows = [self._rows[place] for place in keep]
        if not self._ready:
            with torch.inference_mode():
                self._receive()
        step = self._ready.popleft()
        chances = None if step.logprobs is None else _select(step.logprobs, self._rows)
        return Chosen([step.tokens[row] for row in self._rows], [step.valid[row] for row in self._rows], chances)

    def _begin(self, tokens: Tensor, positions: Tensor, state: SamplingState) -> None:
        """Puts the rows of ``held`` into the smallest batch that holds them."""
        step = self.runner.decode_step(self.cache, len(self.held))
        assert step is not None
        self.step: DecodeStep = step
        step.begin([one.pages for one in self.held], tokens, positions, state, self.logprobs, self.left)

    def _shrink(self) -> None:
        """Goes on with the rows that are left, in a smaller batch. Nothing may be on its way."""
        index = torch.tensor(self._rows, device=self.runner.device)
        old = self.step
        self.held = [self.held[row] for row in self._rows]
        self._begin(old.state.tokens[index], old.state.positions[index], old.sampling(self._rows))
        self._rows = list(range(len(self.held)))

    def _shrinks(self) -> bool:
        return self.runner.batch_bucket(len(self._rows)) < self.step.state.rows

    def _send(self) -> None:
        """Keeps two chunks on their way."""
        while self.left and len(self._queue) < 2:
            count = min(self._size, self.left)
            words, logprobs = self.step.run(count)
            done = None
            if words.is_cuda:
                pinned = torch.empty(words.shape, dtype=words.dtype, pin_memory=True)
                words = pinned.copy_(words, non_blocking=True)
                done = torch.cuda.Event()
                done.record()
            self.left -= count
            self._queue.append(_Chunk(words, logprobs, done))

    def _receive(self) -> None:
        if not self._queue:
            if self._shrinks():
                self._shrink()
            self._send()
        chunk = self._queue.popleft()
        chunk.wait()
        now = time.perf_counter()
        if self._read:
            each = max((now - self._read) / chunk.words.shape[0], 1e-6)
            self._size = max(1, min(MOST_AHEAD, int(AHEAD_SECONDS / each)))
        self._read = now
        for index, words in enumerate(chunk.words.tolist()):
            chances = _on_host(chunk.logprobs[index]) if chunk.logprobs else None
            self._ready.append(Chosen([~w if w < 0 else w for w in words], [w >= 0 for w in words], chances))
        if not self._shrinks():
            self._send()


def _on_host(found: TokenLogprobs | None) -> TokenLogprobs | None:
    if found is None:
        return None
    return TokenLogprobs(found.chosen.cpu(), found.top_tokens.cpu(), found.top_logprobs.cpu())


def _select(found: TokenLogprobs, rows: Sequence[int]) -> TokenLogprobs:
    index = torch.tensor(list(rows))
    return TokenLogprobs(found.chosen[index], found.top_tokens[index], found.top_logprobs[index])
