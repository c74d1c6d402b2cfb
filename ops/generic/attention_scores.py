# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False
"""What the attention kernels share: scores made of products, the final division, and the checks of arguments.

Softmax is taken to the base 2: scores carry a factor log2(e), so that ``exp2`` of them is ``exp`` of the plain ones.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.errors import KernelError
from ops.generic.activation import _tanh
from ops.generic.launch import assert_indices, assert_runs_here, assert_shape

LOG2E = math.log2(math.e)
#: The largest head that a program holds in registers and shared memory.
WIDEST_HEAD = 256


@triton.jit
def _scores(products, factor, cap, CAPPED: tl.constexpr):
    """Scores to the base 2 of the products ``q . k``; see :meth:`Scoring.of`."""
    if CAPPED:
        return _tanh(products * factor) * cap
    else:
        return products * factor


@triton.jit
def _slopes(slopes, head, valid):
    """The ALiBi slopes of the heads, to the base 2."""
    return tl.load(slopes + head, mask=valid, other=0.0) * 1.4426950408889634


@triton.jit
def _absorbed(scores, top, weight, acc, AXIS: tl.constexpr):
    """Online softmax (Milakov and Gimelshein, arXiv 1805.02867): the new maximum and denominator of each row once
    ``scores``, whose keys lie along AXIS (the last), count as well; ``acc`` scaled to them; and the keys' weights."""
    highest = tl.maximum(top, tl.max(scores, AXIS))
    shrink = tl.exp2(top - highest)
    p = tl.exp2(scores - tl.expand_dims(highest, AXIS))
    return highest, weight * shrink + tl.sum(p, AXIS), acc * tl.expand_dims(shrink, AXIS), p


@triton.jit
def _divided(sums, weight):
    """``sums / weight``; zero for a query that saw no key. NaN goes through."""
    return sums / tl.where(weight == 0.0, 1.0, weight)


class Scoring(NamedTuple):
    """The scalars of :func:`_scores`, ready for a kernel: ``cap * tanh(factor * x)``, or ``factor * x``."""

    factor: float
    cap: float
    capped: bool

    @staticmethod
    def of(scale: float, softcap: float | None) -> Scoring:
        """From the factor on the products and the soft cap of :func:`ops.reference.attention`."""
        if softcap is None:
            return Scoring(scale * LOG2E, 0.0, False)
        return Scoring(scale / softcap, softcap * LOG2E, True)


@cache
def count_multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the GPU has; in the interpreter an H100's, so that the same launches are tested."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def assert_queries(op: str, queries: Tensor, slopes: Tensor | None, window: int | None) -> None:
    """Refuses queries that are not [T, heads, d] with d up to 256, slopes that are not [heads] fp32, and a window below
    one."""
    assert_runs_here(op, queries)
    if queries.dim() != 3 or 0 in queries.shape[1:]:
        raise KernelError(f"{op}: queries have shape {list(queries.shape)}, wanted [T, heads, d]")
    if queries.shape[2] > WIDEST_HEAD:
        wide = f"heads of {queries.shape[2]} elements are wider than {WIDEST_HEAD}"
        raise KernelError(f'{op}: {wide}: set "kernels" to "eager"')
    assert_indices(op, "slopes", slopes, queries, torch.float32, queries.shape[1])
    if window is not None and window < 1:
        raise KernelError(f"{op}: a window of {window} keys: it counts the query's own, so the least is 1")


def assert_keys(op: str, name: str, keys: Tensor, queries: Tensor) -> None:
    """Refuses keys or values [..., kv_heads, d] that do not fit the queries."""
    if keys.device != queries.device or keys.dtype != queries.dtype:
        found, wanted = f"{keys.dtype} on {keys.device}", f"{queries.dtype} on {queries.device}"
        raise KernelError(f"{op}: {name} are {found}, the queries {wanted}")
    heads, size = queries.shape[1:]
    if keys.shape[-1] != size or keys.shape[-2] == 0 or heads % keys.shape[-2]:
        raise KernelError(f"{op}: {name} have shape {list(keys.shape)}, the queries {list(queries.shape)}")


def assert_pools(op: str, keys: Tensor, values: Tensor, queries: Tensor) -> None:
    """Refuses pools that are not contiguous [pages, page, kv_heads, d], both of one shape."""
    for name, pool in (("key_pool", keys), ("value_pool", values)):
        if pool.dim() != 4:
            raise KernelError(f"{op}: {name} has shape {list(pool.shape)}, wanted [pages, page, kv_heads, d]")
        if not pool.is_contiguous():
            raise KernelError(f"{op}: {name} has strides {pool.stride()}: call .contiguous() on it")
        assert_keys(op, name, pool, queries)
    assert_shape(op, "value_pool", values, *keys.shape)


def assert_table(op: str, block_table: Tensor, context: Tensor, queries: Tensor, sequences: int) -> None:
    """Refuses a block table that is not [sequences, pages] int32, and contexts that are not [sequences] int32."""
    if block_table.dim() != 2:
        raise KernelError(f"{op}: block_table has shape {list(block_table.shape)}, wanted [B, pages a sequence]")
    assert_indices(op, "block_table", block_table, queries, torch.int32, max(sequences, 0), block_table.shape[1])
    assert_indices(op, "context", context, queries, torch.int32, max(sequences, 0))


def assert_dense(op: str, name: str, x: Tensor) -> None:
    """Refuses ``x`` [T, heads, d] unless the heads of each token lie end to end; tokens may lie apart."""
    heads, size = x.shape[1:]
    if (size > 1 and x.stride(2) != 1) or (heads > 1 and x.stride(1) != size):
        raise KernelError(f"{op}: {name} has strides {x.stride()}: the heads of each token must lie end to end")
