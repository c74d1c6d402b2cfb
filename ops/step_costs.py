"""What whole steps of a model cost, from its spec: for kernels that compute all layers in one launch.

The sums are those of the macro-ops one by one (``ops/generic``): an implementation that fuses them all does the same
work. Softmax is in neither column, as in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ops.closed_forms import ACTIVATION_FLOPS, attention_flops, norm_flops, pairs, rotary_flops
from ops.costs import Cost
from ops.spec import LearnedPositions, ModelSpec, RotaryPositions

#: Pairs of query and key of a step, given a layer's window.
Pairs = Callable[[int | None], int]


@dataclass(frozen=True)
class Work:
    """Operations: ``products`` by the dense convention, what stands ``beside`` them, and ``left_out``: biases of fused
    products, which count as executed alone; ``executed`` are the products as they are computed."""

    products: int
    executed: int
    beside: int
    left_out: int

    def cost(self, read: int, written: int) -> Cost:
        """With so many bytes."""
        return Cost(
            self.products + self.beside,
            macs=self.products // 2,
            executed_flops=self.executed + self.beside + self.left_out,
            bytes_read=read,
            bytes_written=written,
        )


def layers_work(spec: ModelSpec, tokens: int, dense: Pairs, executed: Pairs) -> Work:
    """All layers of a step of ``tokens`` tokens, both norms of each included."""
    qkv, up = spec.q_size + 2 * spec.kv_size, spec.ffn * (2 if spec.gated else 1)
    weights = (qkv + spec.q_size) * spec.hidden + (up + spec.ffn) * spec.hidden
    beside = 2 * norm_flops(tokens, spec.hidden, spec.norm, spec.norm == "layernorm")
    beside += tokens * spec.ffn * (ACTIVATION_FLOPS[spec.activation] + spec.gated)
    beside += tokens * spec.hidden * (2 + spec.out_bias + spec.ffn_bias)
    turned = spec.heads + spec.kv_heads
    if spec.qk_norm:
        beside += norm_flops(tokens * turned, spec.head_dim, spec.norm, False)
    if isinstance(spec.positions, RotaryPositions):
        beside += rotary_flops(tokens, turned, spec.positions.dim)
    windows = [spec.window(layer) for layer in range(spec.layers)]
    attention = [
        sum(attention_flops(spec.heads, spec.head_dim, of(one)) for one in windows) for of in (dense, executed)
    ]
    products = spec.layers * 2 * tokens * weights
    left_out = tokens * (qkv * spec.qkv_bias + up * spec.ffn_bias)
    return Work(products + attention[0], products + attention[1], spec.layers * beside, spec.layers * left_out)


def encoder_layers_cost(spec: ModelSpec, rows: int, lengths: Sequence[int], weight_bytes: int, itemsize: int) -> Cost:
    """All layers over whole sequences of these ``lengths`` in ``rows`` rows, those that fill them up included; weights
    are read once, rows come and go once."""

    def dense(window: int | None) -> int:
        return sum(length * length for length in lengths)

    def seen(window: int | None) -> int:
        return sum(pairs(length, length, causal=spec.causal, window=window) for length in lengths)

    moved = rows * spec.hidden * itemsize
    return layers_work(spec, rows, dense, seen).cost(weight_bytes + moved, moved)


def decode_cost(
    spec: ModelSpec, contexts: Sequence[Sequence[int]], weight_bytes: int, itemsize: int, logits: bool
) -> Cost:
    """Whole decode steps of a causal LM, embedding to logits.

    Args:
        spec: the model.
        contexts: for each step, tokens that each row has in its cache, the new one included.
        weight_bytes: of all that a step reads whole: layers, last norm, output projection.
        itemsize: of the compute dtype.
        logits: whether fp32 logits are written; else the first largest is chosen, a comparison each.
    """
    flat = [context for step in contexts for context in step]
    tokens = len(flat)

    def seen(window: int | None) -> int:
        return sum(pairs(1, context, causal=True, window=window) for context in flat)

    work = layers_work(spec, tokens, seen, seen)
    head = 2 * tokens * spec.hidden * spec.vocab_size
    learned = isinstance(spec.positions, LearnedPositions)
    beside = tokens * spec.hidden * ((spec.embedding_scale != 1.0) + learned)
    beside += norm_flops(tokens, spec.hidden, spec.norm, spec.norm == "layernorm")
    beside += tokens * spec.vocab_size * (3 * (spec.final_softcap is not None) + (not logits))
    bias = tokens * spec.vocab_size * (spec.head is not None and spec.head.bias)
    whole = Work(work.products + head, work.executed + head, work.beside + beside, work.left_out + bias)
    cached = 2 * spec.kv_size * itemsize
    read = len(contexts) * weight_bytes + (1 + learned) * tokens * spec.hidden * itemsize
    read += cached * sum(seen(spec.window(layer)) for layer in range(spec.layers))
    written = cached * spec.layers * tokens + (4 * tokens * spec.vocab_size if logits else 8 * tokens)
    return whole.cost(read, written)
