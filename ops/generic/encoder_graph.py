"""Forwards over whole sequences as CUDA graphs, one for each bucket of tokens, of sequences and of the longest one.

Sequences lie end to end in static buffers, so that padding is never computed. Where each begins is read on the device;
what fills a bucket up is computed and never read. A kernel set says what a bucket's launches are
(:meth:`EncoderGraphs.forward`), the rest is here. Without a GPU the same launches run one by one.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from ops.costs import observed, region
from ops.errors import IdError, KernelError
from ops.generic.launch import assert_indices, power_of_two
from ops.macro_ops import MacroOps
from ops.plan import Bucket, Launch, StepInputs, StepPlan, StepResult, StepState, run_launches
from ops.spec import ModelSpec
from ops.triton_support import interpreted
from ops.weights import ModelWeights, model_parameters

#: Graphs that are kept, the latest used ones; they share all their memory but what heads give.
GRAPHS = 64
#: The shortest bucket of a longest sequence: below, attention is too small for its grid to matter.
SHORTEST = 64
#: Outputs up to which a head belongs to the graph, which keeps them: a sequence's, and a token's.
SEQUENCE_OUTPUTS, TOKEN_OUTPUTS = 1024, 64

Head = Callable[[Tensor], Tensor]


def token_bucket(tokens: int) -> int:
    """How many rows a step of so many tokens computes: a multiple of 16, from 128 on of 64, from 1024 on of 256."""
    step = 16 if tokens <= 128 else 64 if tokens <= 1024 else 256
    return -(-tokens // step) * step


@dataclass(frozen=True)
class Limits:
    """What graphs are captured for: up to ``tokens`` tokens, a bucket of them, of up to ``sequences`` sequences, none
    longer than ``longest``; and not fewer than ``fewest`` tokens."""

    tokens: int
    sequences: int
    longest: int
    fewest: int = 1


@dataclass(frozen=True)
class Place:
    """What one captured forward serves: up to ``rows`` tokens of up to ``sequences`` sequences, none longer than
    ``longest``; ``typed`` if token types are given."""

    rows: int
    sequences: int
    longest: int
    typed: bool

    @classmethod
    def of(cls, lengths: Sequence[int], typed: bool) -> Place:
        """The bucket of a step of sequences of these lengths."""
        rows = token_bucket(sum(lengths))
        return cls(rows, power_of_two(len(lengths)), min(max(power_of_two(max(lengths)), SHORTEST), rows), typed)


@dataclass(frozen=True)
class StepBuffers:
    """Where a step's inputs lie, whatever its bucket.

    ids, types: [tokens] int64; behind the step's own, what earlier steps have left.
    starts:     int32, a power of two of them: where each sequence begins, then the number of tokens again and again.
    wrong:      [1] int32 in the host's memory, not zero once a step has met an id or type outside the tables.
    """

    ids: Tensor
    types: Tensor
    starts: Tensor
    wrong: Tensor

    @classmethod
    def of(cls, limits: Limits, device: torch.device) -> StepBuffers:
        """For any step within ``limits``."""
        ids, types = (torch.zeros(limits.tokens, dtype=torch.int64, device=device) for _ in range(2))
        starts = torch.zeros(power_of_two(limits.sequences + 1), dtype=torch.int32, device=device)
        return cls(ids, types, starts, torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda"))


class StaticForward(Protocol):
    """The launches of one bucket over static buffers; enqueues them and reads nothing from the host."""

    def __call__(self) -> Tensor:
        """The hidden states behind the last norm [rows, hidden], in a buffer that the next call overwrites."""
        ...

    def first_rows(self) -> Tensor:
        """The first row of each sequence of them [sequences, hidden]; of sequences that are not there, any rows."""
        ...


class _Run(Protocol):
    """A bucket's forward: hidden [rows, hidden], and the head's outputs or None."""

    def __call__(self) -> tuple[Tensor, Tensor | None]: ...


class EncoderGraphs(ABC):
    """One model's forwards over whole sequences. The buffers are its own: a lock lets one step in at a time, and a step
    on another stream than the one before waits for it on the device.

    A graph holds the addresses of the weights and what torch was set to (TF32) when its bucket was first used.
    """

    def __init__(self, spec: ModelSpec, weights: ModelWeights, limits: Limits, head: Head | None = None) -> None:
        """``head`` gets hidden rows [R, hidden] (the first of each sequence if the spec's head says so) and becomes
        part of the graphs."""
        self.spec, self.weights, self.limits, self.head = spec, weights, limits, head
        self.device = weights.embed.table.device
        #: Held from a step's first launch to the end of :meth:`finish`.
        self.lock = threading.RLock()
        self._buffers: StepBuffers | None = None
        self._runs: OrderedDict[tuple[Place, bool], _Run] = OrderedDict()
        self._covered: tuple[tuple[int, ...], bool] = (), False
        self._lengths: tuple[int, ...] = ()
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._last: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None

    @abstractmethod
    def forward(self, buffers: StepBuffers, place: Place) -> StaticForward:
        """The launches for ``place`` over ``buffers``, which are always the same."""

    def covers(self, lengths: tuple[int, ...]) -> bool:
        """Whether :meth:`run` takes sequences of these lengths, all of them at once."""
        known, covered = self._covered
        if lengths != known:  # asked several times a step
            limits = self.limits
            covered = (
                0 < len(lengths) <= limits.sequences
                and 0 < min(lengths) <= max(lengths) <= limits.longest
                and limits.fewest <= sum(lengths) <= limits.tokens
            )
            self._covered = lengths, covered
        return covered

    def takes(self, inputs: StepInputs) -> bool:
        """Whether :meth:`step` serves these here and now: a graph cannot be replayed where another is captured."""
        captured = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        return inputs.cache is None and self.covers(inputs.lengths) and not captured

    def run(self, token_ids: Tensor, token_types: Tensor | None, lengths: tuple[int, ...]) -> Tensor:
        """The hidden states [T, hidden] behind the last norm, a tensor of the caller's own.

        token_ids, token_types: [T] int64 on the device, the sequences end to end; types may be None.
        lengths: tokens of each sequence, as :meth:`covers` allows.

        Waits for the device, and raises :class:`ops.errors.IdError` if an id or type lies outside its table.
        """
        inputs = StepInputs(token_ids, token_ids, lengths, token_types, checked=False)
        with self.lock:
            hidden, _ = self.step(inputs, head=False)
            self.finish(inputs)
        return hidden

    def step(self, inputs: StepInputs, *, head: bool) -> tuple[Tensor, Tensor | None]:
        """Enqueues a step: its hidden states, and the head's outputs if ``head``. :meth:`finish` must follow, under the
        same hold of :attr:`lock`. Positions are those that the lengths give."""
        ids, types, lengths = inputs.token_ids, inputs.token_types, inputs.lengths
        tokens, sequences = sum(lengths), len(lengths)
        if not self.covers(lengths) or ids.shape != (tokens,):
            limits = self.limits
            raise KernelError(
                f"the encoder path takes {limits.fewest} to {limits.tokens} tokens of up to {limits.sequences} "
                f"sequences, got {lengths}"
            )
        if self.weights.embed.token_type is None:
            types = None
        with self.lock, self._in_turn():
            self._load(ids, types, lengths)
            hidden, outputs = self._run(Place.of(lengths, types is not None), head and self.head is not None)()
            hidden = hidden[:tokens].clone()
            if outputs is not None:
                outputs = outputs[: sequences if self._firsts() else tokens].clone()
        return hidden, outputs

    def finish(self, inputs: StepInputs) -> None:
        """Waits for the step unless its ids are ``checked``; raises :class:`ops.errors.IdError` if one was wrong."""
        if inputs.checked:
            return
        assert self._buffers is not None
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        # The flag lies in the host's memory: reading it costs no copy.
        if int(self._buffers.wrong):
            self._buffers.wrong.zero_()
            raise IdError("a token id or token type lies outside the model's tables")

    def again(self) -> None:
        """The launches of the latest step once more, over what the buffers hold: what measurements time."""
        next(reversed(self._runs.values()))()

    def _firsts(self) -> bool:
        return self.spec.head is not None and self.spec.head.first_token

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Behind the step before, on whichever stream that was."""
        if self.device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(self.device)
        if self._done is None:
            self._done = torch.cuda.Event()
        elif stream != self._last:
            stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)
            self._last = stream

    def _load(self, ids: Tensor, types: Tensor | None, lengths: tuple[int, ...]) -> None:
        """Brings the step's inputs to the static buffers."""
        if self._buffers is None:
            with torch.inference_mode(False), torch.no_grad():  # else no later step could write into them outside of it
                self._buffers = StepBuffers.of(self.limits, self.device)
        buffers, tokens = self._buffers, ids.shape[0]
        for name, given, room in (("ids", ids, buffers.ids), ("types", types, buffers.types)):
            if given is not None:
                assert_indices("embed", name, given, room, torch.int64, tokens)
                room[:tokens].copy_(given)
        if lengths != self._lengths:
            starts = [0, *accumulate(lengths)]
            starts += [tokens] * (buffers.starts.numel() - len(starts))
            # Pinned memory of PyTorch's own is not given away before the copy has been made.
            upload = torch.tensor(starts, dtype=torch.int32, pin_memory=self.device.type == "cuda")
            buffers.starts.copy_(upload, non_blocking=True)
            self._lengths = lengths

    def _run(self, place: Place, head: bool) -> _Run:
        """The forward of that bucket, captured if it has not been yet."""
        if observed():
            return self._uncaptured(place, head)
        key = (place, head)
        if key not in self._runs:
            run = self._uncaptured(place, head)
            self._runs[key] = run if self.device.type != "cuda" or interpreted() else self._captured(run)
            if len(self._runs) > GRAPHS:
                self._runs.popitem(last=False)
        self._runs.move_to_end(key)
        return self._runs[key]

    def _uncaptured(self, place: Place, head: bool) -> _WithHead:
        assert self._buffers is not None
        with torch.inference_mode(False), torch.no_grad():
            forward = self.forward(self._buffers, place)
        return _WithHead(forward, self.head if head else None, self._firsts())

    def _captured(self, run: _Run) -> _Run:
        """``run`` as a graph. Whatever fails there is raised."""
        with torch.cuda.device(self.device):
            if self._stream is None:
                # One for all: libraries keep a workspace for each stream.
                self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            stream = self._stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # compiles, and lets libraries allocate what they keep
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                found = run()
        return _Captured(graph, *found)


@dataclass(frozen=True)
class _WithHead:
    """A forward and the head behind it."""

    forward: StaticForward
    head: Head | None
    firsts: bool

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        hidden = self.forward()
        if self.head is None:
            return hidden, None
        return hidden, self.head(self.forward.first_rows() if self.firsts else hidden)


@dataclass(frozen=True)
class _Captured:
    """A graph and where its results lie."""

    graph: torch.cuda.CUDAGraph
    hidden: Tensor
    outputs: Tensor | None

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        self.graph.replay()
        return self.hidden, self.outputs


def graph_plan(graphs: EncoderGraphs, ops: MacroOps, fallback: StepPlan) -> StepPlan:
    """A plan for ``Bucket("encode")``: ``graphs`` for the steps that they take, else ``fallback``.

    ``ops`` computes the heads that are not part of the graphs.
    """

    held = model_parameters(graphs.spec, graphs.weights).get("head", ())

    def run(state: StepState) -> None:
        inputs = state.inputs
        if not graphs.takes(inputs):
            run_launches(fallback.launches, state)
            return
        with graphs.lock:
            hidden, state.outputs = graphs.step(inputs, head=inputs.rows is None)
            state.hidden = hidden if inputs.rows is None else hidden.index_select(0, inputs.rows)
            if state.outputs is None and graphs.weights.head is not None:
                with region("head", "head", held):
                    state.outputs = ops.head(graphs.spec, graphs.weights.head, state.hidden, inputs)
            if inputs.meanwhile is not None:
                inputs.meanwhile(StepResult(state.hidden, state.outputs))
            graphs.finish(inputs)

    def guards(inputs: StepInputs) -> bool:
        return graphs.takes(inputs) or fallback.guards(inputs)

    return StepPlan(Bucket("encode"), [Launch("encoder", run)], guards)


def graph_head(spec: ModelSpec, weights: ModelWeights, ops: MacroOps) -> Head | None:
    """The head as part of a graph, which has picked the first tokens already; None for none, or for a large one."""
    head, packed = spec.head, weights.head
    if head is None or packed is None:
        return None
    if head.outputs > (SEQUENCE_OUTPUTS if head.first_token else TOKEN_OUTPUTS):
        return None
    picked, held = replace(spec, head=replace(head, first_token=False)), model_parameters(spec, weights)["head"]

    def run(hidden: Tensor) -> Tensor:
        inputs = StepInputs(hidden.new_empty(0, dtype=torch.int64), hidden.new_empty(0, dtype=torch.int64), ())
        with region("head", "head", held):
            return ops.head(picked, packed, hidden, inputs)

    return run
