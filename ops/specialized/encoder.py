"""The encoder path of the ``specialized`` set: five launches a layer, the whole forward in one CUDA graph.

A layer is: norm + QKV, attention, projection + residual, norm + up + activation, down + residual. Sequences lie end to
end in static buffers, so that padding is never computed; a graph serves a bucket of tokens, of sequences and of the
longest one, and what fills a bucket up is computed and never read.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from ops.errors import IdError, KernelError
from ops.generic.launch import WIDEST_ROW, power_of_two
from ops.macro_ops import MacroOps
from ops.plan import Bucket, Launch, StepInputs, StepPlan, StepState
from ops.spec import ModelSpec, RotaryPositions
from ops.specialized.encoder_forward import Forward, Norms, Place, Room, TileChoice
from ops.specialized.tile_table import tile_for
from ops.triton_support import interpreted
from ops.weights import ModelWeights

log = logging.getLogger("slipstream.kernels")

#: The longest sequence, in tokens, and the most tokens of a step; beyond, cuBLAS and the walk of ``generic`` serve.
LONGEST = 512
TOKENS = 1024
SEQUENCES = 64
#: Graphs that are kept, the latest used ones; each is of some eighty nodes and shares all its buffers.
GRAPHS = 64
#: Outputs a token up to which a head belongs to the graph; a larger one (a vocabulary) would double its copies.
CAPTURED_OUTPUTS = 1024

Head = Callable[[Tensor], Tensor]


def supports(spec: ModelSpec, dtype: torch.dtype) -> str | None:
    """Why this path does not serve that model, in one line, or None: it serves fp16 and bf16 encoders built as BERT is,
    and models with norms in front (``pre``) where nothing else differs."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in fp16 or bf16, not {dtype}"
    return _structure(spec)


def _structure(spec: ModelSpec) -> str | None:
    reasons = {
        "it has no layers": spec.layers == 0,
        "rotary positions are not built into it": isinstance(spec.positions, RotaryPositions),
        "norms of queries and keys are not built into it": spec.qk_norm,
        "gated feed-forwards are not built into it": spec.gated,
        "projected embeddings are not built into it": spec.embedding_size is not None,
        "a norm behind the embeddings needs norms behind the halves": spec.embedding_norm and spec.placement == "pre",
        f"rows of {spec.hidden} elements are too wide for a block": spec.hidden > WIDEST_ROW,
        f"heads of {spec.head_dim} elements are too wide for a block": spec.head_dim > 256,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _not_plain(weights: ModelWeights) -> str | None:
    linears = [linear for layer in weights.layers for linear in (layer.qkv, layer.out, layer.up, layer.down)]
    found = next((linear.weight for linear in linears if not isinstance(linear.weight, Tensor)), None)
    return None if found is None else f"it reads plain weights, not {type(found).__name__}"


def token_bucket(tokens: int) -> int:
    """How many rows a step of so many tokens computes: a multiple of 16, from 128 on of 64."""
    step = 16 if tokens <= 128 else 64
    return -(-tokens // step) * step


class _Run(Protocol):
    """The forward of one bucket over the static buffers: hidden [rows, hidden], and the head's outputs or None."""

    def __call__(self) -> tuple[Tensor, Tensor | None]: ...


class EncoderPlan:
    """One model's forward over whole sequences. Not for several streams at once: the buffers are its own, and a lock
    lets one call in at a time."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        *,
        norms: Norms = "fused",
        tiles: TileChoice = tile_for,
        head: Head | None = None,
    ) -> None:
        """``norms`` says where norms are computed (see :data:`Norms`), ``tiles`` how products are cut.

        ``head`` gets hidden rows [R, hidden] (the first of each sequence if the spec's head says so) and becomes part
        of the graph. Raises :class:`KernelError` for a model that this path cannot run. fp32 weights are taken too.
        """
        reason = _structure(spec) or _not_plain(weights)
        if reason is not None:
            raise KernelError(
                f'the encoder path cannot run this {spec.family} model: {reason}; set "kernels" to "generic"'
            )
        self.spec, self.weights, self.norms, self.tiles, self.head = spec, weights, norms, tiles, head
        self.device = weights.embed.token.device
        self._room: Room | None = None
        self._runs: OrderedDict[tuple[Place, bool], _Run] = OrderedDict()
        self._lengths: tuple[int, ...] = ()
        self._pool: Any = None
        self._lock = threading.Lock()

    def covers(self, lengths: Sequence[int]) -> bool:
        """Whether :meth:`run` takes sequences of these lengths, all of them at once."""
        return 0 < len(lengths) <= SEQUENCES and 0 < min(lengths) <= max(lengths) <= LONGEST and sum(lengths) <= TOKENS

    def run(self, token_ids: Tensor, token_types: Tensor | None, lengths: tuple[int, ...]) -> Tensor:
        """The hidden states [T, hidden] behind the last norm, a tensor of the caller's own.

        token_ids, token_types: [T] int64 on the device, the sequences end to end; types may be None.
        lengths: tokens of each sequence, as :meth:`covers` allows.

        Waits for the device, and raises :class:`ops.errors.IdError` if an id or type lies outside its table.
        """
        return self.step(StepInputs(token_ids, token_ids, lengths, token_types, checked=False), head=False)[0]

    def step(self, inputs: StepInputs, *, head: bool) -> tuple[Tensor, Tensor | None]:
        """As :meth:`run`, with the outputs of the head if ``head``; does not wait where the ids are ``checked``."""
        ids, types, lengths = inputs.token_ids, inputs.token_types, inputs.lengths
        if not self.covers(lengths) or ids.shape != (sum(lengths),):
            raise KernelError(f"the encoder path takes up to {TOKENS} tokens of {SEQUENCES} sequences, got {lengths}")
        tokens, sequences = ids.shape[0], len(lengths)
        rows = token_bucket(tokens)
        place = Place(rows, power_of_two(sequences), min(power_of_two(max(lengths)), rows), types is not None)
        with self._lock:
            self._load(ids, types, lengths)
            hidden, outputs = self._run(place, head and self.head is not None)()
            hidden = hidden[:tokens].clone()
            if outputs is not None:
                outputs = outputs[: sequences if self._firsts() else tokens].clone()
            if not inputs.checked:
                self._assert_known_ids()
        return hidden, outputs

    def again(self) -> None:
        """The launches of the latest step once more, over what the buffers hold: what measurements time."""
        next(reversed(self._runs.values()))()

    def _firsts(self) -> bool:
        return self.spec.head is not None and self.spec.head.first_token

    def _load(self, ids: Tensor, types: Tensor | None, lengths: tuple[int, ...]) -> None:
        """Brings the step's inputs to the static buffers."""
        if self._room is None:
            with torch.inference_mode(False), torch.no_grad():  # else no later step could write into them outside of it
                self._room = Room.of(self.spec, self.weights, TOKENS, SEQUENCES, self.norms, self.tiles)
        room, tokens = self._room, ids.shape[0]
        room.ids[:tokens].copy_(ids)
        if types is not None:
            room.types[:tokens].copy_(types)
        if lengths != self._lengths:
            starts = [0, *accumulate(lengths)]
            starts += [tokens] * (room.starts.numel() - len(starts))
            # Pinned memory of PyTorch's own is not given away before the copy has been made.
            upload = torch.tensor(starts, dtype=torch.int32, pin_memory=self.device.type == "cuda")
            room.starts.copy_(upload, non_blocking=True)
            self._lengths = lengths

    def _run(self, place: Place, head: bool) -> _Run:
        """The forward of that bucket, captured if it has not been yet."""
        key = (place, head)
        if key not in self._runs:
            assert self._room is not None
            forward = Forward(self.spec, self.weights, self._room, place, self.norms, self.tiles)
            run = _WithHead(forward, self.head if head else None, self._firsts())
            self._runs[key] = run if self.device.type != "cuda" or interpreted() else self._captured(run)
            if len(self._runs) > GRAPHS:
                self._runs.popitem(last=False)
        self._runs.move_to_end(key)
        return self._runs[key]

    def _captured(self, run: _Run) -> _Run:
        with torch.cuda.device(self.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                run()  # compiles, and lets libraries allocate what they keep
            torch.cuda.current_stream().wait_stream(aside)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                found = run()
        return _Captured(graph, *found)

    def _assert_known_ids(self) -> None:
        """Waits for the step. The flag lies in the host's memory: reading it costs no copy."""
        assert self._room is not None
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        if int(self._room.wrong):
            self._room.wrong.zero_()
            raise IdError("a token id or token type lies outside the model's tables")


@dataclass(frozen=True)
class _WithHead:
    """A forward and the head behind it."""

    forward: Forward
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


def encoder_step_plan(
    spec: ModelSpec,
    weights: ModelWeights,
    fallback: MacroOps,
    fallback_launches: Sequence[Launch],
    *,
    norms: Norms = "fused",
) -> StepPlan:
    """A plan for ``Bucket("encode")``: the encoder path where it serves, else ``fallback_launches``.

    fallback:          whose ``head`` computes the heads.
    fallback_launches: the walk that serves long sequences, large batches, and models that this path does not take.
    """
    bucket = Bucket("encode")
    reason = supports(spec, weights.embed.token.dtype) or _not_plain(weights)
    if reason is not None:
        log.info("no encoder path for this %s model: %s", spec.family, reason)
        return StepPlan(bucket, fallback_launches)
    plan = EncoderPlan(spec, weights, norms=norms, head=_captured_head(spec, weights, fallback))

    def run(state: StepState) -> None:
        inputs = state.inputs
        if not plan.covers(inputs.lengths):
            for launch in fallback_launches:
                launch.run(state)
            return
        hidden, state.outputs = plan.step(inputs, head=inputs.rows is None)
        state.hidden = hidden if inputs.rows is None else hidden.index_select(0, inputs.rows)
        if state.outputs is None and weights.head is not None:
            state.outputs = fallback.head(spec, weights.head, state.hidden, inputs)

    return StepPlan(bucket, [Launch("encoder", run)], guards=lambda inputs: plan.covers(inputs.lengths))


def _captured_head(spec: ModelSpec, weights: ModelWeights, fallback: MacroOps) -> Head | None:
    """The head as part of the graph, which has picked the first tokens already; None for none, or for a large one."""
    head, packed = spec.head, weights.head
    if head is None or packed is None or head.outputs > CAPTURED_OUTPUTS:
        return None
    picked = replace(spec, head=replace(head, first_token=False))

    def run(hidden: Tensor) -> Tensor:
        inputs = StepInputs(hidden.new_empty(0, dtype=torch.int64), hidden.new_empty(0, dtype=torch.int64), ())
        return fallback.head(picked, packed, hidden, inputs)

    return run
