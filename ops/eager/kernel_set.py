"""The ``eager`` kernel set: plain PyTorch, on any device, in any floating dtype. The reference of the other sets."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.collective import Collective
from ops.eager import attention
from ops.eager.cpu_linear import pack_for_cpu
from ops.eager.cpu_quantized import pack_quantized_for_cpu
from ops.eager.functional import ACTIVATIONS, norm, rotate
from ops.eager.linear import embedded, linear
from ops.errors import KernelError
from ops.macro_ops import walk
from ops.plan import Bucket, DecodeState, StepInputs, StepPlan, Stream
from ops.quantization.scheme import Scheme
from ops.spec import LearnedPositions, ModelSpec, RotaryPositions
from ops.weights import (
    Embeddings,
    HeadWeights,
    LayerWeights,
    Linear,
    ModelWeights,
    Norm,
    Packer,
    WeightSource,
    canonical,
    plain,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class EagerKernels:
    """Every macro-op as a handful of PyTorch calls. Its plan is the trivial one: it serves steps of any size."""

    name = "eager"

    def assert_supports(
        self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, scheme: Scheme | None = None
    ) -> None:
        """Any model on any device, in fp32, bf16 or fp16, quantized or not."""
        if dtype not in DTYPES:
            raise KernelError(
                f'kernels "eager" compute in fp32, bf16 or fp16, not {dtype}: set "precision" to one of these'
            )

    def pack(
        self,
        spec: ModelSpec,
        source: WeightSource,
        device: torch.device,
        dtype: torch.dtype,
        layer_done: Callable[[], object] = lambda: None,
        scheme: Scheme | None = None,
    ) -> ModelWeights:
        """Weights in ``dtype`` (or quantized) on ``device``, QKV and gate + up fused."""
        on_cpu = device.type == "cpu"
        pack_weight, pack_quantized = (pack_for_cpu, pack_quantized_for_cpu) if on_cpu else (plain, canonical)
        return Packer(spec, source, device, dtype, pack_weight, layer_done, scheme, pack_quantized).pack()

    def plan(self, spec: ModelSpec, weights: ModelWeights, bucket: Bucket, collective: Collective) -> StepPlan:
        """The macro-ops one by one."""
        return StepPlan(bucket, walk(spec, weights, self, collective))

    def decoder(self, spec: ModelSpec, weights: ModelWeights, state: DecodeState, collective: Collective) -> None:
        """None: this set reads lengths on the host."""

    # The macro-ops (ops/macro_ops.py says what each must give)

    def embed(self, spec: ModelSpec, weights: Embeddings, inputs: StepInputs, pending: Norm | None) -> Stream:
        """Macro-op 0."""
        hidden = embedded(inputs.token_ids, weights.token, weights.dtype)
        if spec.embedding_scale != 1.0:
            hidden = hidden * spec.embedding_scale
        if weights.project is not None:
            hidden = linear(hidden, weights.project)
        if isinstance(spec.positions, LearnedPositions) and weights.position is not None:
            hidden = hidden + F.embedding(inputs.positions + spec.positions.offset, weights.position)
        if weights.token_type is not None:
            types = inputs.token_types
            hidden = hidden + (weights.token_type[0] if types is None else F.embedding(types, weights.token_type))
        if weights.norm is not None and weights.norm is not pending:
            hidden = norm(hidden, weights.norm, spec)
        return Stream(hidden, pending)

    def qkv(
        self, spec: ModelSpec, layer: LayerWeights, index: int, stream: Stream, inputs: StepInputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Macro-op 1."""
        fused = linear(_normed(spec, stream), layer.qkv)
        heads = fused.view(-1, spec.heads + 2 * spec.kv_heads, spec.head_dim)
        turning, values = heads[:, : spec.heads + spec.kv_heads], heads[:, spec.heads + spec.kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = turning[:, : spec.heads], turning[:, spec.heads :]
            turning = torch.cat((norm(q, layer.q_norm, spec), norm(k, layer.k_norm, spec)), dim=1)
        if isinstance(spec.positions, RotaryPositions):
            turning = rotate(turning, inputs, spec.positions)
        queries, keys = turning[:, : spec.heads], turning[:, spec.heads :]
        if inputs.cache is not None:
            attention.append(inputs.cache, index, keys, values)
        return queries, keys, values

    def attend(
        self, spec: ModelSpec, index: int, inputs: StepInputs, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Macro-op 2."""
        return attention.attend(spec, index, inputs, queries, keys, values)

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
        hidden = linear(_normed(spec, stream), layer.up)
        act = ACTIVATIONS[spec.activation]
        if not spec.gated:
            return act(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return act(gate) * up

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
            stream = Stream(stream.raw[inputs.rows], stream.pending)
        return _normed(spec, stream)

    def head(self, spec: ModelSpec, weights: HeadWeights, hidden: Tensor, inputs: StepInputs) -> Tensor:
        """pick -> dense -> activation -> norm -> project -> out."""
        head = spec.head
        assert head is not None
        if head.first_token:
            firsts = [end - length for end, length in zip(accumulate(inputs.lengths), inputs.lengths, strict=True)]
            hidden = hidden[torch.tensor(firsts, device=hidden.device)]
        if weights.dense is not None:
            hidden = linear(hidden, weights.dense)
        if head.activation is not None:
            hidden = ACTIVATIONS[head.activation](hidden)
        if weights.norm is not None:
            hidden = norm(hidden, weights.norm, spec)
        for layer in (weights.project, weights.out):
            hidden = hidden if layer is None else linear(hidden, layer)
        if spec.final_softcap is not None:
            hidden = spec.final_softcap * torch.tanh(hidden / spec.final_softcap)
        return hidden


def _normed(spec: ModelSpec, stream: Stream) -> Tensor:
    """The stream as its consumer reads it."""
    if stream.pending is None:
        return stream.raw
    if stream.memo is None:
        stream.memo = norm(stream.raw, stream.pending, spec)
    return stream.memo


def _add_partial(
    spec: ModelSpec, layer: Linear, hidden: Tensor, stream: Stream, pending: Norm | None, group: Collective
) -> Stream:
    """Reduces the partial product, then adds bias and residual, each exactly once."""
    total = group.reduce(linear(hidden, layer, bias=False))
    if layer.bias is not None:
        total = total + layer.bias
    residual = stream.raw if spec.placement == "pre" else _normed(spec, stream)
    return Stream(total + residual, pending)
