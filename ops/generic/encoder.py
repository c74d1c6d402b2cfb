# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False
"""Whole sequences by the walk of the ``generic`` set in a CUDA graph: its launches read lengths on the device alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.costs import Cost, priced
from ops.errors import KernelError
from ops.generic.encoder_graph import EncoderGraphs, Head, Limits, Place, StaticForward, StepBuffers
from ops.generic.launch import assert_indices, on, power_of_two
from ops.plan import Launch, StepInputs, StepState, run_launches
from ops.spec import LearnedPositions, ModelSpec
from ops.weights import ModelWeights

#: The most tokens and sequences of a step: 16 of BERT's longest. Beyond, launching one by one keeps the GPU as busy.
TOKENS = 8192
SEQUENCES = 128
#: Elements of one layer's results that graphs may keep room for, enough for TOKENS of BERT-large: larger models get
#: graphs for fewer tokens, which keep the GPU as busy.
ROOM = 160 << 20
#: The key of ``StepInputs.memo`` under which the launches look for the starts on the device.
STARTS = "starts"


@triton.jit
def _locate_kernel(
    ids, types, starts, safe_ids, safe_types, positions, wrong, rows, count, vocabulary, kinds, STARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    at = tl.arange(0, STARTS)
    begin = tl.load(starts + at, mask=at < count, other=0)
    first = tl.max(tl.where(begin[None, :] <= row[:, None], begin[None, :], 0), 1)
    there = mask & (row < tl.max(begin, 0))
    tl.store(positions + row, tl.where(there, row - first, 0).to(tl.int64), mask=mask)
    index = tl.load(ids + row, mask=there, other=0)
    known = (index >= 0) & (index < vocabulary)
    tl.store(safe_ids + row, tl.where(known, index, 0), mask=mask)
    if types is not None:
        kind = tl.load(types + row, mask=there, other=0)
        inside = (kind >= 0) & (kind < kinds)
        tl.store(safe_types + row, tl.where(inside, kind, 0), mask=mask)
        known = known & inside
    tl.store(wrong, 1, mask=tl.min(known.to(tl.int32), 0) == 0)


@priced(lambda result, *_, **__: Cost(0))
def locate(
    ids: Tensor, types: Tensor | None, starts: Tensor, *, vocabulary: int, kinds: int, wrong: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Ids and types (or None) that lie in their tables, and each token's place in its sequence, all [T] int64.

    ids, types: [T] int64. Where one of a sequence lies outside its table of ``vocabulary`` or ``kinds`` rows, 0 stands
                for it and ``wrong`` is set to 1 (it is never set to 0).
    starts:     [S] int32 on the device, where each sequence begins and, last, where the last one ends, which may be
                repeated. Of tokens behind the end id, type and place are 0.
    wrong:      [1] int32, may lie in pinned memory of the host.

    Raises :class:`KernelError` for tensors that do not fit together.
    """
    op, rows = "locate", ids.shape[0]
    assert_indices(op, "ids", ids, ids, torch.int64, rows)
    assert_indices(op, "types", types, ids, torch.int64, rows)
    assert_indices(op, "starts", starts, ids, torch.int32, max(starts.numel(), 1))
    if wrong.dtype != torch.int32 or wrong.numel() != 1 or (wrong.device != ids.device and not wrong.is_pinned()):
        raise KernelError(f"{op}: wrong is {wrong.dtype} on {wrong.device}, wanted one int32 there or in pinned memory")
    safe, positions = torch.empty_like(ids), torch.empty_like(ids)
    safe_types = None if types is None else torch.empty_like(types)
    if rows:
        block = 32
        with on(ids.device):
            _locate_kernel[(triton.cdiv(rows, block),)](
                ids, types, starts, safe, safe_types, positions, wrong, rows, starts.numel(), vocabulary, kinds,
                STARTS=power_of_two(starts.numel()), BLOCK=block,
            )  # fmt: skip
    return safe, safe_types, positions


class WalkGraphs(EncoderGraphs):
    """Graphs of the launches that :func:`ops.macro_ops.walk` lists."""

    def __init__(
        self, spec: ModelSpec, weights: ModelWeights, launches: Sequence[Launch], head: Head | None = None
    ) -> None:
        """``launches`` are the walk's up to the last norm; for ``head`` see :class:`EncoderGraphs`."""
        super().__init__(spec, weights, limits(spec), head)
        self.launches = launches
        self._hidden: Tensor | None = None

    def forward(self, buffers: StepBuffers, place: Place) -> StaticForward:
        """The walk over ``buffers``."""
        if self._hidden is None:
            # One row in excess: there the starts of sequences that are not there may point.
            like = self.weights.embed.table
            self._hidden = like.new_zeros(self.limits.tokens + 1, self.spec.hidden)
        return _Walk(self.launches, self.weights, buffers, self._hidden, place)


def limits(spec: ModelSpec) -> Limits:
    """What graphs serve of a model: fewer tokens where its layers are so large that they would take much room, no
    sequence that has no positions."""
    qkv = spec.q_size + 2 * spec.kv_size
    ffn = spec.ffn * (3 if spec.gated else 2)
    tokens = min(TOKENS, ROOM // (4 * spec.hidden + 2 * qkv + spec.q_size + ffn) // 256 * 256)
    learned = spec.positions if isinstance(spec.positions, LearnedPositions) else None
    longest = tokens if learned is None else min(tokens, learned.count - learned.offset)
    return Limits(tokens, SEQUENCES, longest)


@dataclass(frozen=True)
class _Walk:
    """The launches of one bucket; what they give goes to ``hidden`` [tokens + 1, n], so that no graph keeps its own."""

    launches: Sequence[Launch]
    weights: ModelWeights
    buffers: StepBuffers
    hidden: Tensor
    place: Place

    def __call__(self) -> Tensor:
        buffers, place, embed = self.buffers, self.place, self.weights.embed
        starts = buffers.starts[: place.sequences + 1]
        ids, types, positions = locate(
            buffers.ids[: place.rows],
            buffers.types[: place.rows] if place.typed else None,
            starts,
            vocabulary=embed.table.shape[0],
            kinds=0 if embed.token_type is None else embed.token_type.shape[0],
            wrong=buffers.wrong,
        )
        lengths = (place.longest,) * place.sequences
        state = StepState(StepInputs(ids, positions, lengths, types, memo={STARTS: starts}))
        run_launches(self.launches, state)
        assert state.hidden is not None
        return self.hidden[: place.rows].copy_(state.hidden)

    def first_rows(self) -> Tensor:
        return self.hidden.index_select(0, self.buffers.starts[: self.place.sequences])
