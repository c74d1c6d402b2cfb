"""Plan, then run: a kernel set turns (spec, weights, bucket) into a step plan, an ordered list of launches.

Tokens travel flat: one step computes ``T`` tokens of ``B`` sequences laid end to end, so no padding is ever computed. A
decode step has one token a sequence, a prefill or an encoder step has many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ops.collective import Collective
from ops.costs import Parameters, observed, region
from ops.quantization.scheme import Scheme
from ops.spec import ModelSpec
from ops.weights import ModelWeights, Norm, WeightSource


@dataclass(frozen=True)
class Bucket:
    """Which steps a plan serves; None leaves a size open (only sets without static buffers can).

    kind:      ``encode`` sees whole sequences at once and keeps no cache; ``decode`` and ``prefill`` append to the KV
               cache.
    sequences: at most so many sequences a step.
    tokens:    at most so many tokens a step, all sequences together.
    """

    kind: Literal["encode", "prefill", "decode"]
    sequences: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class CacheView:
    """One step's view of the paged KV cache; the pools' addresses never change.

    keys, values: per layer [pages, page_size, kv_heads, head_dim].
    block_table:  [B, pages a sequence] int32 on the device: the pages of each sequence, in order.
    slots:        [T] int64: the flat slot (page * page_size + offset) of each new token.
    context:      [B] int32 on the device: per sequence, tokens in the cache once this step's are appended.
    lengths:      the same on the host; in a captured step, where it changes from replay to replay, an upper bound.
    starts:       per sequence, the flat slot of its first token where its pages are consecutive, else None.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    block_table: Tensor
    slots: Tensor
    context: Tensor
    lengths: tuple[int, ...]
    starts: tuple[int | None, ...]


@dataclass(frozen=True)
class StepInputs:
    """What one step computes.

    token_ids:   [T] int64, the sequences' new tokens end to end.
    positions:   [T] int64, each token's place in its sequence, from 0.
    lengths:     new tokens of each of the B sequences; they sum to T.
    token_types: [T] int64 or None.
    cache:       where keys and values are kept, or None for an encoder.
    rows:        [R] int64: the tokens whose hidden states reach the head, or None for all.
    checked:     whether ids and types are known to lie inside their tables; if not, the plan guards them.
    meanwhile:   called with the result by a plan that waits for the device, before it waits; others leave it alone.
    memo:        what launches derive from the inputs once a step and share (rotary angles, masks).
    """

    token_ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    token_types: Tensor | None = None
    cache: CacheView | None = None
    rows: Tensor | None = None
    checked: bool = True
    meanwhile: Callable[[StepResult], object] | None = field(default=None, compare=False, repr=False)
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass
class Stream:
    """The residual stream: a raw sum and the norm that its consumer applies as it reads (norms belong to the consumer).

    A producer's GEMM never normalizes: that would need whole rows at its end, and be wrong before a tensor-parallel
    reduce. ``memo`` keeps the normed value where it is needed twice, or where a launch behind the reduce computed it.
    """

    raw: Tensor
    pending: Norm | None
    memo: Tensor | None = None


@dataclass
class StepState:
    """What flows between the launches of one run."""

    inputs: StepInputs
    stream: Stream | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    hidden: Tensor | None = None
    outputs: Tensor | None = None


@dataclass(frozen=True)
class Launch:
    """One entry of a plan: ``name`` is the module it belongs to (``layers.3.qkv``), ``run`` advances the state.

    ``parameters`` are those that it reads; None for a launch of a whole step, whose parts say themselves which they
    are.
    """

    name: str
    run: Callable[[StepState], None]
    parameters: Parameters | None = None


def run_launches(launches: Sequence[Launch], state: StepState) -> None:
    """Runs every launch in order, each in a region of its name where somebody counts or times."""
    if not observed():
        for launch in launches:
            launch.run(state)
        return
    for launch in launches:
        with _region_of(launch):
            launch.run(state)


def _region_of(launch: Launch) -> AbstractContextManager[None]:
    if launch.parameters is None:
        return nullcontext()
    return region(launch.name, launch.name.rpartition(".")[2], launch.parameters)


@dataclass(frozen=True)
class StepResult:
    """hidden: [T, hidden] after the last norm (``rows`` of it if asked); outputs: what the head gives for it, or
    None."""

    hidden: Tensor
    outputs: Tensor | None


@dataclass(frozen=True)
class StepPlan:
    """An ordered list of launches for the steps of one bucket.

    ``guards`` says of which steps it takes ids that are not ``checked``: it reads nothing outside the tables, waits for
    the device and raises :class:`ops.errors.IdError`.
    """

    bucket: Bucket
    launches: Sequence[Launch] = field(repr=False)
    guards: Callable[[StepInputs], bool] = field(default=lambda inputs: False, repr=False)

    def run(self, inputs: StepInputs) -> StepResult:
        """Runs every launch in order."""
        state = StepState(inputs)
        run_launches(self.launches, state)
        assert state.hidden is not None
        return StepResult(state.hidden, state.outputs)


@dataclass(frozen=True)
class DecodeState:
    """Where a batch of sequences stands, in static device buffers: what a captured or resident decode step reads.

    tokens:      [R] int64, each row's newest token, not yet in the cache.
    positions:   [R] int64, its place in the sequence (the number of tokens in the cache).
    block_table: [R, pages a sequence] int32. Rows that only fill up the batch point at the cache's scratch page.
    keys, values: the cache's pools, as in :class:`CacheView`.
    """

    tokens: Tensor
    positions: Tensor
    block_table: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def rows(self) -> int:
        """Rows of the batch, those that only fill it up included."""
        return self.tokens.shape[0]


class Decoder(Protocol):
    """Decode steps for the rows of one :class:`DecodeState`; enqueues work and never waits for the device."""

    def logits(self, longest: int) -> Tensor:
        """One step: appends ``tokens`` to the cache and gives the logits [R, vocabulary] behind them.

        The result is overwritten by the next step. Changes neither ``tokens`` nor ``positions``: choosing is the
        sampler's part. ``longest`` bounds the rows' tokens, the new one included. Can be captured in a CUDA graph,
        which then serves while that bound holds.
        """
        ...

    def greedy(self, out: Tensor) -> bool:
        """As many steps as ``out`` [steps, R] int64 has rows, each taking the first largest logit.

        ``out`` gets the tokens, or ``~token`` where the largest logit is not finite; ``tokens`` and ``positions`` move
        along. Returns False, having done nothing, if this decoder leaves the choice to the sampler.
        """
        ...


class KernelSet(Protocol):
    """A way to compute a model. The three sets have the same methods."""

    name: str

    def assert_supports(
        self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, scheme: Scheme | None = None
    ) -> None:
        """Raises :class:`ops.errors.KernelError` with what to set instead, if this set cannot run that model there,
        its weights quantized by ``scheme``."""
        ...

    def pack(
        self,
        spec: ModelSpec,
        source: WeightSource,
        device: torch.device,
        dtype: torch.dtype,
        layer_done: Callable[[], object] = lambda: None,
        scheme: Scheme | None = None,
    ) -> ModelWeights:
        """Weights as this set reads them, quantized by ``scheme``; ``layer_done`` is called after each layer."""
        ...

    def plan(self, spec: ModelSpec, weights: ModelWeights, bucket: Bucket, collective: Collective) -> StepPlan:
        """The launches of one step. ``collective`` reduces the partial sums of macro-ops 3 and 5."""
        ...

    def decoder(
        self, spec: ModelSpec, weights: ModelWeights, state: DecodeState, collective: Collective
    ) -> Decoder | None:
        """Steps that need nothing from the host, or None if this set can only run plans."""
        ...
