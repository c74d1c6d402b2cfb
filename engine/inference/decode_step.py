"""One batch size's decode step on the device: its static buffers, its decoder, and its CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from engine.inference.kv_cache import PagedCache
from ops.costs import observed
from ops.plan import Decoder, DecodeState
from ops.sampling import SamplingPlan, SamplingState, TokenLogprobs, sample

#: Graphs are captured for contexts up to a power of two from here on.
SHORTEST_BOUND = 512


@dataclass(frozen=True)
class _Key:
    """What a captured step depends on beside its buffers."""

    plan: SamplingPlan
    logprobs: int | None
    stops: int
    bound: int


_Step = Callable[[], TokenLogprobs | None]


@dataclass
class _Sampled:
    """A step that samples: ``launch`` enqueues it launch by launch, ``replay`` as a CUDA graph where there is one; both
    give the log-probabilities that were asked for. The rest are the buffers that it reads and writes."""

    launch: _Step
    sampling: SamplingState
    chosen: Tensor
    replay: _Step | None = None

    def __call__(self) -> TokenLogprobs | None:
        return self.launch() if self.replay is None or observed() else self.replay()


class DecodeStep:
    """Steps of ``rows`` rows; :meth:`begin` loads a wave, :meth:`run` enqueues steps and never waits for the device."""

    def __init__(
        self,
        decoder_of: Callable[[DecodeState], Decoder | None],
        cache: PagedCache,
        rows: int,
        region: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """``region`` is around what the decoder computes."""
        self._region = region
        device = cache.device
        self.cache = cache
        self.state = DecodeState(
            tokens=torch.zeros(rows, dtype=torch.int64, device=device),
            positions=torch.zeros(rows, dtype=torch.int64, device=device),
            block_table=torch.full((rows, cache.widest), cache.scratch, dtype=torch.int32, device=device),
            keys=cache.keys,
            values=cache.values,
        )
        self.decoder = decoder_of(self.state)
        self._steps: dict[_Key, _Sampled] = {}
        self._step: _Sampled | None = None
        self._given: SamplingState | None = None

    def begin(
        self,
        pages: Sequence[Sequence[int]],
        tokens: Tensor,
        positions: Tensor,
        sampling: SamplingState,
        logprobs: int | None,
        steps: int,
    ) -> None:
        """Loads a wave: the cache's ``pages`` of each of its n rows, ``tokens`` and ``positions`` [n] int64 on the
        device, its sampling state, and how many ``steps`` may follow. Rows behind n fill the batch up."""
        rows, count = self.state.rows, len(pages)
        assert self.decoder is not None
        plain = sampling.plan.greedy and not sampling.plan.penalty and not sampling.plan.minimum and logprobs is None
        self._given, self._step = sampling, None
        if not plain or not self.decoder.greedy(self.state.tokens.new_empty(0, rows)):
            padded = sampling.select([*range(count), *[0] * (rows - count)])
            longest = max(len(one) for one in pages) * self.cache.page_size
            self._step = self._sampled(padded, logprobs, min(_bound(longest), self.cache.widest * self.cache.page_size))
            _copy(padded, self._step.sampling)
        self._park()
        table = torch.full((count, self.cache.widest), self.cache.scratch, dtype=torch.int32)
        for row, one in enumerate(pages):
            table[row, : len(one)] = torch.tensor(one, dtype=torch.int32)
        self.state.block_table[:count].copy_(table, non_blocking=True)
        self.state.tokens[:count].copy_(tokens)
        self.state.positions[:count].copy_(positions)

    def run(self, count: int) -> tuple[Tensor, list[TokenLogprobs]]:
        """Enqueues ``count`` steps; gives their tokens [count, rows] int64, or ``~token`` where the logits are not
        finite, and each step's log-probabilities if asked for."""
        words = self.state.tokens.new_empty(count, self.state.rows)
        found = []
        if self._step is None:
            assert self.decoder is not None
            with self._region():
                self.decoder.greedy(words)
            return words, []
        for index in range(count):
            one = self._step()
            words[index].copy_(self._step.chosen)
            if one is not None:
                found.append(TokenLogprobs(one.chosen.clone(), one.top_tokens.clone(), one.top_logprobs.clone()))
        return words, found

    def sampling(self, rows: Sequence[int]) -> SamplingState:
        """A copy of where the sampling of ``rows`` stands."""
        current = self._given if self._step is None else self._step.sampling
        assert current is not None
        return current.select(rows)

    def _park(self) -> None:
        """Every row at the start of the scratch page: whatever runs now touches no sequence."""
        self.state.tokens.zero_()
        self.state.positions.zero_()
        self.state.block_table.fill_(self.cache.scratch)

    def _sampled(self, padded: SamplingState, logprobs: int | None, bound: int) -> _Sampled:
        key = _Key(padded.plan, logprobs, padded.eos.shape[0], bound)
        if key not in self._steps:
            self._steps[key] = self._build(padded.select(range(self.state.rows)), logprobs, bound)
        step = self._steps[key]
        if step.replay is None and self.state.tokens.device.type == "cuda" and not observed():
            step.replay = self._captured(step.launch)
        return step

    def _build(self, sampling: SamplingState, logprobs: int | None, bound: int) -> _Sampled:
        decoder, state = self.decoder, self.state
        assert decoder is not None
        chosen = torch.zeros_like(state.tokens)

        def launch() -> TokenLogprobs | None:
            with self._region():
                logits = decoder.logits(bound)
            out = sample(logits, sampling, logprobs=logprobs)
            state.tokens.copy_(out.tokens)
            state.positions.add_(1)
            torch.where(out.valid, out.tokens, ~out.tokens, out=chosen)
            return out.logprobs

        return _Sampled(launch, sampling, chosen)

    def _captured(self, run: _Step) -> _Step:
        """``run`` as a CUDA graph. It runs before, on the scratch page: compilation and libraries' set-up cannot be
        captured."""
        self._park()
        device = self.state.tokens.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()

        def replay() -> TokenLogprobs | None:
            graph.replay()
            return found

        return replay


def _bound(tokens: int) -> int:
    bound = SHORTEST_BOUND
    while bound < tokens:
        bound *= 2
    return bound


def _copy(source: SamplingState, target: SamplingState) -> None:
    """Copies every tensor of a state into another's, which a graph reads."""
    for field in fields(source):
        value = getattr(source, field.name)
        if isinstance(value, Tensor):
            getattr(target, field.name).copy_(value)
