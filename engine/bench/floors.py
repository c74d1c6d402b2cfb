"""What a step cannot do without: the bytes it must read and the sums it must form; and how fast this device does that.

Floor = max(bytes / read bandwidth, FLOPs / matrix rate). Counted are every linear weight once (the head included,
embedding tables not) and the cached keys and values, and two FLOPs for each multiplication of a linear layer and of
attention. The two rates are measured on the device itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.bench.job import Case
from ops.spec import ModelSpec
from profiler import rates as measured

#: Embedding tables are looked up, not read through.
TABLES = ("embed.token.weight", "embed.position.weight", "embed.token_type.weight")


@dataclass(frozen=True)
class Work:
    """Bytes that one token step or one pass reads, and FLOPs that it computes, for all sequences of the batch."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Rates:
    """Bytes a second that the device reads; FLOPs a second of a large matrix product in the precision asked for."""

    read: float
    flops: float


def linear_weights(spec: ModelSpec) -> tuple[int, int]:
    """Elements of all linear weights: (those that every token passes, the head's)."""
    shapes = {name: shape for name, shape in spec.weight_shapes().items() if len(shape) == 2 and name not in TABLES}
    head = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("head."))
    body = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("head."))
    if spec.head is not None and spec.head.tied:
        head += spec.head.outputs * spec.embedding_width
    return body, head


def work(spec: ModelSpec, case: Case, element: int) -> Work:
    """The work of ``case``; ``element`` is the size in bytes of a weight and of a cached value.

    A generated token attends to the prompt, the tokens before it and itself: over ``new`` tokens ``tokens + (new + 1) /
    2`` in the mean, a layer's window at most. Ahead of the first token every token of the prompt passes the layers, but
    only the last one the head, and none attends to those behind it.
    """
    body, head = linear_weights(spec)
    if case.kind == "prefill":
        attended = sum(_contexts(1, case.tokens, spec.window(layer)) for layer in range(spec.layers))
        each = 2 * (body * case.tokens + head) + 4 * spec.q_size * attended
        return Work((body + head) * element, each * case.batch)
    if case.kind == "decode":
        seen = sum(_mean_context(case, spec.window(layer)) for layer in range(spec.layers))
        cached = 2 * spec.kv_size * seen * case.batch
        flops = 2 * (body + head) * case.batch + 4 * spec.q_size * seen * case.batch
        return Work((body + head + cached) * element, flops)
    tokens = case.batch * case.tokens
    outputs = case.batch if spec.head is not None and spec.head.first_token else tokens
    pairs = case.batch * case.tokens**2 * spec.layers
    return Work((body + head) * element, 2 * (body * tokens + head * outputs) + 4 * spec.q_size * pairs)


def _mean_context(case: Case, window: int | None) -> float:
    return _contexts(case.tokens + 1, case.tokens + case.new, window) / case.new


def _contexts(first: int, last: int, window: int | None) -> int:
    """Tokens that those at places ``first`` to ``last``, counted from 1, attend to, all together."""
    return sum(min(context, window or context) for context in range(first, last + 1))


def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measured: the fastest of several reads of a large tensor, and of several large matrix products."""
    name = next(name for name, known in measured.DTYPES.items() if known == dtype)
    return Rates(measured.read_rate(device), measured.product_rate(device, name))
