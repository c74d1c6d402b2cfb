"""The vocabulary between a model and a kernel set: five macro-ops a layer, and the one walk over a :class:`ModelSpec`.

1. ``qkv``:            pending norm + QKV projection + bias + q/k norm + rotary + append to the KV cache
2. ``attend``:         attention over the cache (or, without one, within each sequence)
3. ``attention_out``:  output projection, reduce, + bias + residual
4. ``ffn_up``:         pending norm + up projection (and gate) + bias + activation
5. ``ffn_down``:       down projection, reduce, + bias + residual

A set that computes macro-op by macro-op implements :class:`MacroOps` and lets :func:`walk` list its launches; a set
that fuses wider returns a plan of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ops.collective import Collective
from ops.plan import Launch, StepInputs, StepState, Stream
from ops.spec import ModelSpec
from ops.weights import Embeddings, HeadWeights, LayerWeights, ModelWeights, Norm, model_parameters


class MacroOps(Protocol):
    """The macro-ops; T tokens, flat (see :mod:`ops.plan`)."""

    def embed(self, spec: ModelSpec, weights: Embeddings, inputs: StepInputs, pending: Norm | None) -> Stream:
        """Token, position and type embeddings [T, hidden], scaled, projected, normed where nothing is pending."""
        ...

    def qkv(
        self, spec: ModelSpec, layer: LayerWeights, index: int, stream: Stream, inputs: StepInputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, heads, head_dim], new keys and values [T, kv_heads, head_dim]; appended to the cache if there is
        one."""
        ...

    def attend(
        self, spec: ModelSpec, index: int, inputs: StepInputs, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Attention of each sequence over its own keys: [T, heads * head_dim]."""
        ...

    def attention_out(
        self,
        spec: ModelSpec,
        layer: LayerWeights,
        hidden: Tensor,
        stream: Stream,
        pending: Norm | None,
        group: Collective,
    ) -> Stream:
        """The residual plus the projected attention; bias and residual are added once, after the reduce."""
        ...

    def ffn_up(self, spec: ModelSpec, layer: LayerWeights, stream: Stream) -> Tensor:
        """[T, ffn] after the activation."""
        ...

    def ffn_down(
        self,
        spec: ModelSpec,
        layer: LayerWeights,
        hidden: Tensor,
        stream: Stream,
        pending: Norm | None,
        group: Collective,
    ) -> Stream:
        """The residual plus the projected feed-forward; bias and residual are added once, after the reduce."""
        ...

    def final(self, spec: ModelSpec, stream: Stream, inputs: StepInputs) -> Tensor:
        """The last pending norm, on the rows that are asked for: [R, hidden]."""
        ...

    def head(self, spec: ModelSpec, weights: HeadWeights, hidden: Tensor, inputs: StepInputs) -> Tensor:
        """The head's outputs for ``hidden``: [R, outputs], or [B, outputs] for heads on the first token."""
        ...


def walk(spec: ModelSpec, weights: ModelWeights, ops: MacroOps, group: Collective) -> list[Launch]:
    """The launches of one step, macro-op by macro-op. This is the one implementation of every model family."""
    pre = spec.placement == "pre"
    # Pre-norm: a layer's norms stand before its halves, so each producer leaves the *next* norm pending.
    # Post-norm: they stand behind them, so each producer leaves its own.
    first = weights.layers[0].attn_norm if pre and weights.layers else weights.embed.norm
    runs = {"embed": _embed(spec, weights.embed, ops, first)}
    for index, layer in enumerate(weights.layers):
        last = index + 1 == len(weights.layers)
        following = weights.final_norm if last else weights.layers[index + 1].attn_norm
        after_attention = layer.ffn_norm if pre else layer.attn_norm
        after_ffn = following if pre else layer.ffn_norm
        runs |= {
            f"layers.{index}.qkv": _qkv(spec, layer, index, ops),
            f"layers.{index}.attend": _attend(spec, index, ops),
            f"layers.{index}.attention_out": _attention_out(spec, layer, ops, after_attention, group),
            f"layers.{index}.ffn_up": _ffn_up(spec, layer, ops),
            f"layers.{index}.ffn_down": _ffn_down(spec, layer, ops, after_ffn, group),
        }
    runs["final"] = _final(spec, ops)
    if weights.head is not None:
        runs["head"] = _head(spec, weights.head, ops)
    held = model_parameters(spec, weights)
    return [Launch(name, run, held[name]) for name, run in runs.items()]


Run = Callable[[StepState], None]


def _embed(spec: ModelSpec, weights: Embeddings, ops: MacroOps, pending: Norm | None) -> Run:
    def run(state: StepState) -> None:
        state.stream = ops.embed(spec, weights, state.inputs, pending)

    return run


def _qkv(spec: ModelSpec, layer: LayerWeights, index: int, ops: MacroOps) -> Run:
    def run(state: StepState) -> None:
        assert state.stream is not None
        state.queries, state.keys, state.values = ops.qkv(spec, layer, index, state.stream, state.inputs)

    return run


def _attend(spec: ModelSpec, index: int, ops: MacroOps) -> Run:
    def run(state: StepState) -> None:
        assert state.queries is not None
        assert state.keys is not None
        assert state.values is not None
        state.hidden = ops.attend(spec, index, state.inputs, state.queries, state.keys, state.values)

    return run


def _attention_out(spec: ModelSpec, layer: LayerWeights, ops: MacroOps, pending: Norm | None, group: Collective) -> Run:
    def run(state: StepState) -> None:
        assert state.stream is not None
        assert state.hidden is not None
        state.stream = ops.attention_out(spec, layer, state.hidden, state.stream, pending, group)

    return run


def _ffn_up(spec: ModelSpec, layer: LayerWeights, ops: MacroOps) -> Run:
    def run(state: StepState) -> None:
        assert state.stream is not None
        state.hidden = ops.ffn_up(spec, layer, state.stream)

    return run


def _ffn_down(spec: ModelSpec, layer: LayerWeights, ops: MacroOps, pending: Norm | None, group: Collective) -> Run:
    def run(state: StepState) -> None:
        assert state.stream is not None
        assert state.hidden is not None
        state.stream = ops.ffn_down(spec, layer, state.hidden, state.stream, pending, group)

    return run


def _final(spec: ModelSpec, ops: MacroOps) -> Run:
    def run(state: StepState) -> None:
        assert state.stream is not None
        state.hidden = ops.final(spec, state.stream, state.inputs)

    return run


def _head(spec: ModelSpec, weights: HeadWeights, ops: MacroOps) -> Run:
    def run(state: StepState) -> None:
        assert state.hidden is not None
        state.outputs = ops.head(spec, weights, state.hidden, state.inputs)

    return run
