"""What a step cannot do without: the bytes it must read and the sums it must form; and how fast this device does that.

Floor = max(bytes / read bandwidth, FLOPs / matrix rate). Counted are every linear weight once (the head included,
embedding tables not) and the cached keys and values, and two FLOPs for each multiplication of a linear layer and of
attention. The two rates are measured on the device itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from engine.bench.job import Case
from engine.bench.timing import seconds
from ops.spec import ModelSpec

#: Embedding tables are looked up, not read through.
TABLES = ("embed.token.weight", "embed.position.weight", "embed.token_type.weight")
#: What is read to measure bandwidth: well beyond any cache, and at most this share of the free memory.
READ_BYTES = {"cuda": 4 << 30, "cpu": 1 << 30}
READ_SHARE = 0.25
#: Side of the square matrices whose product is timed.
MATRIX = {"cuda": 8192, "cpu": 1024}
REPEATS = 10
#: Repeating ends sooner once it has taken so long: some precisions crawl on a CPU.
SECONDS = 1.0


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
    size = min(READ_BYTES[device.type], int(_free(device) * READ_SHARE)) // 4
    data = torch.ones(size, dtype=torch.int32, device=device)
    reading = _fastest(partial(torch.max, data), device)
    del data
    side = MATRIX[device.type]
    a = torch.randn(side, side, device=device, dtype=dtype)
    product = min(_fastest(lambda: a @ a, device), _fastest(lambda: F.linear(a, a), device))  # CPUs differ widely here
    return Rates(size * 4 / reading, 2 * side**3 / product)


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    best, left = seconds(run, device), SECONDS
    for _ in range(REPEATS):
        taken = seconds(run, device)
        best, left = min(best, taken), left - taken
        if left <= 0:
            break
    return best


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
