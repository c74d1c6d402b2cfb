"""The ``generic`` kernel set: matrix products by cuBLAS, everything between them in Triton."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.collective import Collective
from ops.errors import KernelError
from ops.generic import attention
from ops.generic.activation import activate
from ops.generic.decoder import PlanDecoder
from ops.generic.embed import embed
from ops.generic.encoder import STARTS, WalkGraphs
from ops.generic.encoder_graph import graph_head, graph_plan
from ops.generic.norm import norm
from ops.generic.qkv import HeadNorm, Rotary, split_qkv
from ops.generic.residual import add_residual, add_residual_norm
from ops.macro_ops import walk
from ops.plan import Bucket, Decoder, DecodeState, StepInputs, StepPlan, Stream
from ops.quantization.scheme import Scheme
from ops.spec import ALiBiPositions, LearnedPositions, ModelSpec, RotaryPositions
from ops.triton_support import assert_runs
from ops.weights import Embeddings, HeadWeights, LayerWeights, Linear, ModelWeights, Norm, Packer, WeightSource


class GenericKernels:
    """Every macro-op as a product and one launch behind it: eight launches a layer, attention included.

    The launch that adds bias and residual also computes the norm that the next macro-op reads, and leaves it in
    ``Stream.memo``: it stands behind the reduce, and has whole rows at hand. Serves steps of any size; whole sequences
    of up to 8192 tokens in all are one CUDA graph.
    """

    name = "generic"

    def __init__(self) -> None:
        # Never emptied: captured graphs read them at these addresses.
        self._constants: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}

    def assert_supports(
        self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, scheme: Scheme | None = None
    ) -> None:
        """Any model in fp32, bf16 or fp16, on an NVIDIA GPU from Ampere on (or in Triton's interpreter)."""
        assert_runs(self.name, device, dtype)
        assert_plain_weights(self.name, scheme)

    def pack(
        self,
        spec: ModelSpec,
        source: WeightSource,
        device: torch.device,
        dtype: torch.dtype,
        layer_done: Callable[[], object] = lambda: None,
        scheme: Scheme | None = None,
    ) -> ModelWeights:
        """Plain weights in ``dtype`` on ``device``, QKV and gate + up fused."""
        assert_plain_weights(self.name, scheme)
        return Packer(spec, source, device, dtype, layer_done=layer_done).pack()

    def plan(self, spec: ModelSpec, weights: ModelWeights, bucket: Bucket, collective: Collective) -> StepPlan:
        """The macro-ops one by one; whole sequences in one process as a graph of them. Raises :class:`KernelError` if a
        weight is not a plain tensor."""
        _assert_plain(self.name, weights)
        self._upload_constants(spec, weights.embed.table.device)
        walked = StepPlan(bucket, walk(spec, weights, self, collective))
        if bucket.kind != "encode" or collective.size > 1:
            return walked
        launches = [launch for launch in walked.launches if launch.name != "head"]
        graphs = WalkGraphs(spec, weights, launches, graph_head(spec, weights, self))
        return graph_plan(graphs, self, walked)

    def decoder(self, spec: ModelSpec, weights: ModelWeights, state: DecodeState, collective: Collective) -> Decoder:
        """Runs of the decode plan that read nothing from the host."""
        return PlanDecoder(self.plan(spec, weights, Bucket("decode", state.rows, state.rows), collective), state)

    # The macro-ops (ops/macro_ops.py says what each must give)

    def embed(self, spec: ModelSpec, weights: Embeddings, inputs: StepInputs, pending: Norm | None) -> Stream:
        """Macro-op 0."""
        ids: Tensor | None = inputs.token_ids
        table, scale = weights.table, spec.embedding_scale
        if weights.project is not None:
            looked_up, _ = embed(ids, table, scale=scale)
            ids, table, scale = None, _linear(looked_up, weights.project), 1.0
        learned = spec.positions if isinstance(spec.positions, LearnedPositions) else None
        own = weights.norm if weights.norm is not None and weights.norm is not pending else None
        raw, normed = embed(
            ids,
            table,
            scale=scale,
            positions=inputs.positions,
            position_table=weights.position if learned is not None else None,
            offset=learned.offset if learned is not None else 0,
            types=inputs.token_types if weights.token_type is not None else None,
            type_table=weights.token_type,
            weights=own or pending,
            kind=spec.norm,
            eps=spec.norm_eps,
        )
        if own is not None:
            assert normed is not None
            return Stream(normed, pending)
        return Stream(raw, pending, normed)

    def qkv(
        self, spec: ModelSpec, layer: LayerWeights, index: int, stream: Stream, inputs: StepInputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Macro-op 1. With a cache the layer's pools stand for the new keys and values, which lie in them."""
        cache = inputs.cache
        pools = None if cache is None else (cache.keys[index], cache.values[index])
        head_norm = None
        if layer.q_norm is not None and layer.k_norm is not None:
            head_norm = HeadNorm(layer.q_norm.weight, layer.k_norm.weight, spec.norm, spec.norm_eps)
        queries, keys, values = split_qkv(
            _linear(_normed(spec, stream), layer.qkv, bias=False),
            inputs.positions,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            bias=layer.qkv.bias,
            head_norm=head_norm,
            rotary=self._rotary(spec, inputs.positions.device),
            pools=pools,
            slots=None if cache is None else cache.slots,
        )
        if pools is not None:
            return queries, *pools
        assert keys is not None
        assert values is not None
        return queries, keys, values

    def attend(
        self, spec: ModelSpec, index: int, inputs: StepInputs, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Macro-op 2."""
        cache, lengths = inputs.cache, inputs.lengths
        scale, window, softcap = spec.attention_scale, spec.window(index), spec.attention_softcap
        slopes = self._slopes(spec, queries.device)
        if cache is None:
            return attention.sequence_attention(
                queries, keys, values, _starts(inputs), longest=max(lengths, default=0), causal=spec.causal,
                scale=scale, window=window, softcap=softcap, slopes=slopes,
            )  # fmt: skip
        if queries.shape[0] == len(lengths):
            return attention.decode_attention(
                queries, keys, values, cache.block_table, cache.context,
                scale=scale, window=window, softcap=softcap, slopes=slopes, longest=max(cache.lengths, default=0),
            )  # fmt: skip
        return attention.cached_attention(
            queries, keys, values, cache.block_table, cache.context, _starts(inputs), longest_new=max(lengths),
            scale=scale, causal=True, window=window, softcap=softcap, slopes=slopes,
        )  # fmt: skip

    def attention_out(
        self,
        spec: ModelSpec,
        layer: LayerWeights,
        hidden: Tensor,
        stream: Stream,
        pending: Norm | None,
        group: Collective,
    ) -> Stream:
        """Macro-op 3."""
        return _add_partial(spec, layer.out, hidden, stream, pending, group)

    def ffn_up(self, spec: ModelSpec, layer: LayerWeights, stream: Stream) -> Tensor:
        """Macro-op 4."""
        hidden = _linear(_normed(spec, stream), layer.up, bias=False)
        return activate(hidden, layer.up.bias, spec.activation, gated=spec.gated)

    def ffn_down(
        self,
        spec: ModelSpec,
        layer: LayerWeights,
        hidden: Tensor,
        stream: Stream,
        pending: Norm | None,
        group: Collective,
    ) -> Stream:
        """Macro-op 5."""
        return _add_partial(spec, layer.down, hidden, stream, pending, group)

    def final(self, spec: ModelSpec, stream: Stream, inputs: StepInputs) -> Tensor:
        """The last norm, on the rows that are asked for."""
        if inputs.rows is not None:
            memo = None if stream.memo is None else stream.memo.index_select(0, inputs.rows)
            raw = stream.raw.index_select(0, inputs.rows) if memo is None else memo
            stream = Stream(raw, stream.pending, memo)
        return _normed(spec, stream)

    def head(self, spec: ModelSpec, weights: HeadWeights, hidden: Tensor, inputs: StepInputs) -> Tensor:
        """pick -> dense -> activation -> norm -> project -> out."""
        head = spec.head
        assert head is not None
        if head.first_token:
            hidden = hidden.index_select(0, _starts(inputs)[:-1])
        bias = None
        if weights.dense is not None:
            hidden, bias = _linear(hidden, weights.dense, bias=head.activation is None), weights.dense.bias
        if head.activation is not None:
            hidden = activate(hidden, bias, head.activation)
        if weights.norm is not None:
            hidden = norm(hidden, weights.norm.weight, weights.norm.bias, spec.norm, spec.norm_eps)
        for layer in (weights.project, weights.out):
            hidden = hidden if layer is None else _linear(hidden, layer)
        if spec.final_softcap is not None:
            hidden = spec.final_softcap * torch.tanh(hidden / spec.final_softcap)
        return hidden

    # Constants on the device

    def _constant(self, values: tuple[float, ...], device: torch.device) -> Tensor:
        key = (values, device)
        if key not in self._constants:
            self._constants[key] = torch.tensor(values, dtype=torch.float32, device=device)
        return self._constants[key]

    def _rotary(self, spec: ModelSpec, device: torch.device) -> Rotary | None:
        rotary = spec.positions
        if not isinstance(rotary, RotaryPositions):
            return None
        return Rotary(self._constant(rotary.inv_freq, device), rotary.factor, rotary.interleaved)

    def _slopes(self, spec: ModelSpec, device: torch.device) -> Tensor | None:
        return self._constant(spec.positions.slopes, device) if isinstance(spec.positions, ALiBiPositions) else None

    def _upload_constants(self, spec: ModelSpec, device: torch.device) -> None:
        """Before any step: an upload within a captured one would fail."""
        self._rotary(spec, device)
        self._slopes(spec, device)


def _linear(x: Tensor, layer: Linear, *, bias: bool = True) -> Tensor:
    """``x W^T (+ b)`` by cuBLAS."""
    assert isinstance(layer.weight, Tensor), "plan() has refused other weights"
    return F.linear(x, layer.weight, layer.bias if bias else None)


def assert_plain_weights(kernels: str, scheme: Scheme | None) -> None:
    """Raises for weights of 8 and 4 bits."""
    if scheme is not None:
        reason = f'kernels "{kernels}" do not read weights of {scheme.bits} bits yet'
        raise KernelError(f'{reason}: set "kernels" to "eager", or "precision" to "bf16"')


def _assert_plain(kernels: str, weights: ModelWeights) -> None:
    """Raises unless every weight is a plain tensor."""
    named: dict[str, Linear | None] = {"embed.project": weights.embed.project}
    for index, layer in enumerate(weights.layers):
        named |= {f"layers.{index}.{name}": getattr(layer, name) for name in ("qkv", "out", "up", "down")}
    if weights.head is not None:
        named |= {f"head.{name}": getattr(weights.head, name) for name in ("dense", "project", "out")}
    for name, linear in named.items():
        if linear is not None and not isinstance(linear.weight, Tensor):
            found = type(linear.weight).__name__
            raise KernelError(f'kernels "{kernels}" read plain weights, {name} is a {found}: set "kernels" to "eager"')


def _starts(inputs: StepInputs) -> Tensor:
    """[B + 1] int32 on the device, once a step: where each sequence's new tokens begin, and the end of the last."""
    starts: Tensor | None = inputs.memo.get(STARTS)
    if starts is None:
        offsets = torch.tensor([0, *accumulate(inputs.lengths)], dtype=torch.int32)
        starts = inputs.memo[STARTS] = offsets.to(inputs.token_ids.device, non_blocking=True)
    return starts


def _normed(spec: ModelSpec, stream: Stream) -> Tensor:
    """The stream as its consumer reads it."""
    if stream.pending is None:
        return stream.raw
    if stream.memo is None:
        pending = stream.pending
        stream.memo = norm(stream.raw, pending.weight, pending.bias, spec.norm, spec.norm_eps)
    return stream.memo


def _add_partial(
    spec: ModelSpec, layer: Linear, hidden: Tensor, stream: Stream, pending: Norm | None, group: Collective
) -> Stream:
    """Reduces the partial product, then adds bias and residual, each exactly once, and computes the norm behind it."""
    total = group.reduce(_linear(hidden, layer, bias=False))
    residual = stream.raw if spec.placement == "pre" else _normed(spec, stream)
    if pending is None:
        return Stream(add_residual(total, layer.bias, residual), None)
    raw, normed = add_residual_norm(total, layer.bias, residual, pending, spec.norm, spec.norm_eps)
    return Stream(raw, pending, normed)
