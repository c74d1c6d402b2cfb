"""The encoder path of the ``specialized`` set: the whole forward in one CUDA graph, of fused tiles or, for few tokens,
of the persistent kernel (:mod:`ops.specialized.persistent_encoder`).

Tiles take five to seven launches a layer: norm + QKV, attention, projection + residual, norm + up + activation, down +
residual; norms may have launches of their own. Buckets, buffers and graphs are those of
:mod:`ops.generic.encoder_graph`. Each way is taken where it was measured ahead of the others.
"""

from __future__ import annotations

import logging

import torch

from ops.errors import KernelError
from ops.generic.encoder_graph import (
    EncoderGraphs,
    Head,
    Limits,
    Place,
    StaticForward,
    StepBuffers,
    graph_head,
    graph_plan,
)
from ops.generic.launch import WIDEST_ROW
from ops.macro_ops import MacroOps
from ops.plan import StepPlan
from ops.spec import ModelSpec, RotaryPositions
from ops.specialized.addresses import not_plain
from ops.specialized.encoder_forward import Forward, Norms, Room, TileChoice
from ops.specialized.persistent_encoder import PersistentEncoder, unsupported
from ops.specialized.tile_table import AHEAD, AHEAD_PERSISTENT, tile_for
from ops.weights import ModelWeights

log = logging.getLogger("slipstream.kernels")

#: The longest sequence, in tokens, and the most tokens and sequences of a step; beyond, ``generic`` serves.
LONGEST = 512
TOKENS = 1024
SEQUENCES = 64


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


class EncoderPlan(EncoderGraphs):
    """One model's forward over whole sequences by fused tiles."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        *,
        norms: Norms = "separate",
        tiles: TileChoice = tile_for,
        head: Head | None = None,
        tokens: int = TOKENS,
        fewest: int = 1,
    ) -> None:
        """``norms`` says where norms are computed (see :data:`Norms`), ``tiles`` how products are cut, ``tokens`` and
        ``fewest`` the largest and smallest step.

        ``head`` gets hidden rows [R, hidden] (the first of each sequence if the spec's head says so) and becomes part
        of the graph. Raises :class:`KernelError` for a model that this path cannot run. fp32 weights are taken too.
        """
        reason = _structure(spec) or not_plain(weights)
        if reason is not None:
            raise KernelError(
                f'the encoder path cannot run this {spec.family} model: {reason}; set "kernels" to "generic"'
            )
        super().__init__(spec, weights, Limits(tokens, SEQUENCES, LONGEST, fewest), head)
        self.norms, self.tiles = norms, tiles
        self._room: Room | None = None

    def forward(self, buffers: StepBuffers, place: Place) -> StaticForward:
        """The launches for ``place``; all buckets share the rest of the buffers too."""
        if self._room is None:
            self._room = Room.of(self.spec, self.weights, self.limits.tokens, self.norms, self.tiles)
        return Forward(self.spec, self.weights, buffers, self._room, place, self.norms, self.tiles)


def encoder_step_plan(
    spec: ModelSpec, weights: ModelWeights, ops: MacroOps, fallback: StepPlan, *, tokens: int | None = None
) -> StepPlan:
    """A plan for ``Bucket("encode")``: the persistent kernel for few tokens, tiles for more, each where it serves, else
    ``fallback``.

    ops:      whose ``head`` computes the heads.
    fallback: serves long sequences, large batches, and models that this path does not take.
    tokens:   the largest step of tiles, which then serve all smaller ones; None for what was measured to pay.
    """
    size = spec.hidden, spec.ffn
    few = AHEAD_PERSISTENT.get(size, 0) if tokens is None else 0
    fewest, tokens = AHEAD.get(size, (1, 0)) if tokens is None else (1, tokens)
    head = graph_head(spec, weights, ops)
    ways = (_tiles(spec, weights, head, fewest, tokens), _persistent(spec, weights, head, few))
    plan = fallback
    for graphs in ways:
        if graphs is not None:
            plan = graph_plan(graphs, ops, plan)
    return plan


def _tiles(spec: ModelSpec, weights: ModelWeights, head: Head | None, fewest: int, tokens: int) -> EncoderGraphs | None:
    """For steps of ``fewest`` to ``tokens`` tokens, or None where tiles do not serve this model."""
    if not tokens:
        return None
    reason = supports(spec, weights.embed.table.dtype) or not_plain(weights)
    if reason is not None:
        log.info("no encoder path for this %s model: %s", spec.family, reason)
        return None
    return EncoderPlan(spec, weights, head=head, tokens=tokens, fewest=fewest)


def _persistent(spec: ModelSpec, weights: ModelWeights, head: Head | None, tokens: int) -> EncoderGraphs | None:
    """For steps of up to ``tokens`` tokens, its kernels compiled; or None where it does not serve this model here."""
    if not tokens:
        return None
    like = weights.embed.table
    reason = unsupported(spec, weights, like.dtype, like.device)
    if reason is not None:
        log.info("no persistent kernel for short steps of this %s model: %s", spec.family, reason)
        return None
    graphs = PersistentEncoder(spec, weights, head=head, tokens=tokens)
    try:
        graphs.compile()
    except KernelError as error:  # "auto" takes this set for encoders where CuPy is missing, and where it is broken
        log.warning("steps of up to %d tokens run as without the persistent kernel: %s", tokens, error)
        return None
    log.info("steps of up to %d tokens run in the persistent kernel", tokens)
    return graphs
