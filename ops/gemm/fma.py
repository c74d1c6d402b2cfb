"""The skinny GEMM in plain multiplications and additions, for one to four rows. See :mod:`ops.gemm.kernels`."""
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
    _first_elements,
    _gains,
    _halves,
    _load_x,
    _moments,
    _normalize,
    _residual,
    _row_statistics,
    _row_words,
    _tile_sums,
    _weight_tiles,
    _words,
)


@triton.jit
def _fma_x(
    x, k, m, M, K, H, mean, scale, gain, shift, eps,
    T: tl.constexpr, PACK: tl.constexpr, NORM: tl.constexpr, NORM_BIAS: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """x's elements for the words ``k`` [vectors, 1, 1, 4], as fp32 [vectors, BM, 1, 4], normalized if asked.

    With ONCE the tile holds whole rows, and ``mean`` and ``scale`` are found here instead.
    """
    rows = m[None, :, None, None]
    low, high = _halves(_load_x(_words(x, PACK), rows, k, (rows < M) & (k < H), H), T, PACK)
    if NORM != "none":
        if ONCE:
            first = _first_elements(x, m, M, K, NORM)
            total, square = _tile_sums(low, high, k < H, first[None, :, None, None], NORM, PACK)
            mean, scale = _moments(total, square, first, K, eps, NORM)
        low, high = _normalize(
            low, high, mean[None, :, None, None], scale[None, :, None, None], gain, shift, T, PACK, NORM_BIAS
        )
    return low, high


@triton.jit
def _multiply(acc, up, words, up_words, low, high, T: tl.constexpr, PACK: tl.constexpr, GATED: tl.constexpr):
    """Adds products of weight words [vectors, 1, BN, 4] and x's elements [vectors, BM, 1, 4] to sums [vectors, BM, BN,
    4]."""
    value, value_high = _halves(words, T, PACK)
    acc += low * value
    if PACK == 2:
        acc += high * value_high
    if GATED:
        value, value_high = _halves(up_words, T, PACK)
        up += low * value
        if PACK == 2:
            up += high * value_high
    return acc, up


@triton.jit
def _fma_kernel(
    x, weight, y, bias, residual, norm_weight, norm_bias, eps, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, STAGES: tl.constexpr, BS: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr, PACK: tl.constexpr, ALIGNED: tl.constexpr, ONCE: tl.constexpr, PDL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Products of a [BN, BK] tile with each of BM rows, summed over K once at the end. S, STAGES and WIDE mean nothing.

    Tiles are [vectors of 16 bytes, rows of x, columns of y, words]: Triton then gives a thread vectors of all the rows.
    They are loaded in four dimensions, since a layout passes no new dimension without moving the tile.
    """
    T: tl.constexpr = x.dtype.element_ty
    STEP: tl.constexpr = BK // PACK
    n = tl.program_id(0) // tl.cdiv(M, BM) * BN + tl.arange(0, BN)
    m = tl.program_id(0) % tl.cdiv(M, BM) * BM + tl.arange(0, BM)
    k = tl.arange(0, STEP // 4)[:, None, None, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    H = _row_words(K, PACK, ALIGNED)
    w = _words(weight, PACK)
    rows = n[None, None, :, None]
    here, up_here = _weight_tiles(w, rows, k, (rows < N) & (k < H), N, H, GATED)
    gain, shift = _gains(norm_weight, norm_bias, k, k < H, PACK, NORM, NORM_BIAS)
    first_bias, up_bias = _biases(bias, n, N, GATED, BIAS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    rest = _residual(residual, n, m, M, N, RESIDUAL)
    mean = m * 0.0
    scale = mean
    acc = tl.zeros((STEP // 4, BM, BN, 4), tl.float32)
    up = acc
    last = 0
    if not ONCE:
        if NORM != "none":
            mean, scale = _row_statistics(x, m, M, K, H, eps, BM, BS, T, PACK, NORM)
        for k0 in tl.range(0, H - STEP, 2 * STEP, num_stages=1):
            at = k0 + STEP + k
            there, up_there = _weight_tiles(w, rows, at, (rows < N) & (at < H), N, H, GATED)
            low, high = _fma_x(x, k0 + k, m, M, K, H, mean, scale, gain, shift, eps, T, PACK, NORM, NORM_BIAS, False)
            gain, shift = _gains(norm_weight, norm_bias, at, at < H, PACK, NORM, NORM_BIAS)
            acc, up = _multiply(acc, up, here, up_here, low, high, T, PACK, GATED)
            here, up_here = _weight_tiles(w, rows, at + STEP, (rows < N) & (at + STEP < H), N, H, GATED)
            low, high = _fma_x(x, at, m, M, K, H, mean, scale, gain, shift, eps, T, PACK, NORM, NORM_BIAS, False)
            gain, shift = _gains(norm_weight, norm_bias, at + STEP, at + STEP < H, PACK, NORM, NORM_BIAS)
            acc, up = _multiply(acc, up, there, up_there, low, high, T, PACK, GATED)
        last = tl.cdiv(tl.maximum(H - STEP, 0), 2 * STEP) * (2 * STEP)
    low, high = _fma_x(x, last + k, m, M, K, H, mean, scale, gain, shift, eps, T, PACK, NORM, NORM_BIAS, ONCE)
    acc, up = _multiply(acc, up, here, up_here, low, high, T, PACK, GATED)
    sums = tl.trans(tl.sum(tl.sum(acc, 3), 0))
    up_sums = sums
    if GATED:
        up_sums = tl.trans(tl.sum(tl.sum(up, 3), 0))
    _finish(sums, up_sums, first_bias, up_bias, rest, y, n, m, M, N, ACT, GATED, BIAS, RESIDUAL)
