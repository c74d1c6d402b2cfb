"""The skinny GEMM on the matrix units, through a ring of tiles in shared memory. See :mod:`ops.gemm.kernels`."""
# Triton carries no annotations, and compiles these functions from their source: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ops.gemm.parts import (
    _biases,
    _finish,
    _gains,
    _halves,
    _load_weight,
    _load_x,
    _normalize,
    _residual,
    _row_statistics,
    _row_words,
)


@triton.jit
def _ring_x(
    x, k, m, M, K, mean, scale, norm_weight, norm_bias,
    T: tl.constexpr, NORM: tl.constexpr, NORM_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of x in its dtype, normalized if asked; ``k``, ``m``, ``mean`` and ``scale`` broadcast to it."""
    value = _load_x(x, m, k, (m < M) & (k < K), K)
    if NORM != "none":
        low, high = _halves(value, T, 1)
        gain, shift = _gains(norm_weight, norm_bias, k, k < K, 1, NORM, NORM_BIAS)
        low, high = _normalize(low, high, mean, scale, gain, shift, T, 1, NORM_BIAS)
        value = low.to(T)
    if WIDE:  # the interpreter would multiply the bits of bf16
        value = value.to(tl.float32)
    return value


@triton.jit
def _ring_dot(w, rows, k, value, acc, N, K, WIDE: tl.constexpr):
    """Adds the products of the weight's tile at ``rows`` and ``k`` and of ``value``."""
    tile = _load_weight(w, rows, k, (rows < N) & (k < K), K)
    if WIDE:
        tile = tile.to(tl.float32)
    return tl.dot(tile, value, acc, input_precision="ieee")


@triton.jit
def _ring_sums(
    x, w, norm_weight, norm_bias, mean, scale, n, m, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, T: tl.constexpr, NORM: tl.constexpr, NORM_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums [BN, BM] of the columns ``n`` and, if gated, of their up rows. Triton makes the loops' loads
    asynchronous."""
    up_rows = tl.where(n < N, N + n, 2 * N)
    height = 2 * N if GATED else N
    if S == 1:
        k = tl.arange(0, BK)
        acc = tl.zeros((BN, BM), tl.float32)
        up = acc
        for k0 in tl.range(0, K, BK, num_stages=STAGES):
            value = _ring_x(
                x, (k0 + k)[:, None], m[None, :], M, K, mean[None, :], scale[None, :], norm_weight, norm_bias,
                T, NORM, NORM_BIAS, WIDE,
            )  # fmt: skip
            acc = _ring_dot(w, n[:, None], (k0 + k)[None, :], value, acc, N, K, WIDE)
            if GATED:
                up = _ring_dot(w, up_rows[:, None], (k0 + k)[None, :], value, up, height, K, WIDE)
    else:
        k = (tl.arange(0, S) * BK)[:, None] + tl.arange(0, BK)[None, :]
        sums = tl.zeros((S, BN, BM), tl.float32)
        up_sums = sums
        for k0 in tl.range(0, K, S * BK, num_stages=STAGES):
            value = _ring_x(
                x, (k0 + k)[:, :, None], m[None, None, :], M, K, mean[None, None, :], scale[None, None, :],
                norm_weight, norm_bias, T, NORM, NORM_BIAS, WIDE,
            )  # fmt: skip
            at = (k0 + k)[:, None, :]
            sums = _ring_dot(w, n[None, :, None], at, value, sums, N, K, WIDE)
            if GATED:
                up_sums = _ring_dot(w, up_rows[None, :, None], at, value, up_sums, height, K, WIDE)
        acc = tl.sum(sums, 0)
        up = tl.sum(up_sums, 0) if GATED else acc
    return acc, up


@triton.jit
def _ring_kernel(
    x, weight, y, bias, residual, norm_weight, norm_bias, eps, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, STAGES: tl.constexpr, BS: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr, PACK: tl.constexpr, ALIGNED: tl.constexpr, ONCE: tl.constexpr, PDL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Up to 64 rows of x, S slices of BK columns a step, STAGES steps in the ring. ONCE means nothing."""
    T: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(0) // tl.cdiv(M, BM) * BN + tl.arange(0, BN)
    m = tl.program_id(0) % tl.cdiv(M, BM) * BM + tl.arange(0, BM)
    H = _row_words(K, PACK, ALIGNED)
    first_bias, up_bias = _biases(bias, n, N, GATED, BIAS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    rest = _residual(residual, n, m, M, N, RESIDUAL)
    mean = m * 0.0
    scale = mean
    if NORM != "none":
        mean, scale = _row_statistics(x, m, M, K, H, eps, BM, BS, T, PACK, NORM)
    acc, up = _ring_sums(
        x, weight, norm_weight, norm_bias, mean, scale, n, m, M, N, H * PACK,
        BM, BN, BK, S, STAGES, GATED, T, NORM, NORM_BIAS, WIDE,
    )  # fmt: skip
    _finish(acc, up, first_bias, up_bias, rest, y, n, m, M, N, ACT, GATED, BIAS, RESIDUAL)
