"""The skinny GEMM on the matrix units, from memory straight into their registers. See :mod:`ops.gemm.kernels`."""
# Triton carries no annotations, and compiles these functions from their source: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ops.gemm.parts import (
    _biases,
    _elements,
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
def _operand(low, high, S: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, PACK: tl.constexpr, WIDE: tl.constexpr):
    """A tile [8, S, BK / 32, R / 8, 32 / PACK] of words' elements as an operand [S, R, BK] of the matrix units, its
    columns permuted.

    The tile's order makes Triton give lane 4 g + t of warp s eight elements in one load: columns 8 t to 8 t + 7 of a
    block of 32, of row g. As an operand the lane must hold columns 4 t to 4 t + 3 and 16 + 4 t to 16 + 4 t + 3. A sum
    does not mind its order: columns are renamed so that what the lane has is what it must hold, alike for the weight
    and x, and no element moves.
    """
    tile = low
    if PACK == 2:
        tile = tl.join(low, high)
    tile = tl.reshape(tile, (8, S, BK // 32, R // 8, 4, 2, 4))
    tile = tl.reshape(tl.permute(tile, (1, 3, 0, 2, 5, 4, 6)), (S, R, BK))
    if WIDE:  # the interpreter would multiply the bits of bf16
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _lanes(k, S: tl.constexpr, BK: tl.constexpr, PACK: tl.constexpr):
    """``k`` [1, S, BK / 32, 1, words] for each of eight rows' lanes: a tile of one row would be dealt to other lanes,
    and would have to be moved."""
    return tl.broadcast_to(k, (8, S, BK // 32, 1, 32 // PACK))


@triton.jit
def _mma_x(
    words, x, inside, m, M, K, mean, scale, gain, shift, eps,
    BM: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, T: tl.constexpr, PACK: tl.constexpr,
    NORM: tl.constexpr, NORM_BIAS: tl.constexpr, ONCE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x's words as an operand [S, BM, BK], normalized and rounded to x's dtype if asked. ONCE is that of ``_fma_x``.

    ``m`` is [8, 1, 1, BM / 8, 1], ``mean`` and ``scale`` likewise; ``inside`` is [1, S, BK / 32, 1, words].
    """
    low, high = _elements(words, T, PACK)
    if NORM != "none":
        low, high = _halves(words, T, PACK)
        if ONCE:
            first = _first_elements(x, m, M, K, NORM)
            total, square = _tile_sums(low, high, inside, first, NORM, PACK)
            mean, scale = _moments(total[:, None, None, :, None], square[:, None, None, :, None], first, K, eps, NORM)
        low, high = _normalize(low, high, mean, scale, gain, shift, T, PACK, NORM_BIAS)
        low = low.to(T)
        high = high.to(T)
    return _operand(low, high, S, BM, BK, PACK, WIDE)


@triton.jit
def _products(
    acc, up, words, up_words, value, S: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    T: tl.constexpr, PACK: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Adds the products of a tile of weight words and x's operand to the slices' sums: [S, BN, BM], or [S, BM, BN] for
    BN = 8."""
    low, high = _elements(words, T, PACK)
    tile = _operand(low, high, S, BN, BK, PACK, WIDE)
    if BN == 8:
        acc = tl.dot(value, tl.permute(tile, (0, 2, 1)), acc)
    else:
        acc = tl.dot(tile, tl.permute(value, (0, 2, 1)), acc)
    if GATED:
        low, high = _elements(up_words, T, PACK)
        tile = _operand(low, high, S, BN, BK, PACK, WIDE)
        if BN == 8:
            up = tl.dot(value, tl.permute(tile, (0, 2, 1)), up)
        else:
            up = tl.dot(tile, tl.permute(value, (0, 2, 1)), up)
    return acc, up


@triton.jit
def _slice_sums(acc, BN: tl.constexpr):
    """The sums [BN, BM] of the slices' sums."""
    total = tl.sum(acc, 0)
    if BN == 8:
        total = tl.trans(total)
    return total


@triton.jit
def _mma_rest(
    acc, up, here, up_here, x_here, gain, shift, x, w, k, own, share, rows, m, mean, scale, norm_weight, norm_bias, eps,
    M, N, K, H,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, GATED: tl.constexpr,
    T: tl.constexpr, PACK: tl.constexpr, NORM: tl.constexpr, NORM_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Every tile of the slices' shares but the last (of an odd number of them; else one more, that is empty): the sums
    so far, and that last tile."""
    STEP: tl.constexpr = BK // PACK
    for k0 in tl.range(0, share - STEP, 2 * STEP, num_stages=1):
        at = k0 + STEP
        inside = (at + own < share) & (at + k < H)
        there, up_there = _weight_tiles(w, rows, at + k, (rows < N) & inside, N, H, GATED)
        x_there = _load_x(_words(x, PACK), m, at + k, (m < M) & inside, H)
        value = _mma_x(
            x_here, x, inside, m, M, K, mean, scale, gain, shift, eps, BM, BK, S, T, PACK, NORM, NORM_BIAS, False, WIDE
        )
        gain, shift = _gains(norm_weight, norm_bias, at + _lanes(k, S, BK, PACK), inside, PACK, NORM, NORM_BIAS)
        acc, up = _products(acc, up, here, up_here, value, S, BN, BK, T, PACK, GATED, WIDE)
        value = _mma_x(
            x_there, x, inside, m, M, K, mean, scale, gain, shift, eps, BM, BK, S, T, PACK, NORM, NORM_BIAS, False, WIDE
        )
        at += STEP
        inside = (at + own < share) & (at + k < H)
        here, up_here = _weight_tiles(w, rows, at + k, (rows < N) & inside, N, H, GATED)
        x_here = _load_x(_words(x, PACK), m, at + k, (m < M) & inside, H)
        gain, shift = _gains(norm_weight, norm_bias, at + _lanes(k, S, BK, PACK), inside, PACK, NORM, NORM_BIAS)
        acc, up = _products(acc, up, there, up_there, value, S, BN, BK, T, PACK, GATED, WIDE)
    return acc, up, here, up_here, x_here, gain, shift


@triton.jit
def _mma_kernel(
    x, weight, y, bias, residual, norm_weight, norm_bias, eps, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, STAGES: tl.constexpr, BS: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr, PACK: tl.constexpr, ALIGNED: tl.constexpr, ONCE: tl.constexpr, PDL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """8 or 16 rows of x on the matrix units; warp s has its share of K, BK columns at a time. STAGES means nothing."""
    T: tl.constexpr = x.dtype.element_ty
    BLOCK: tl.constexpr = 32 // PACK
    n0 = tl.program_id(0) // tl.cdiv(M, BM) * BN
    m0 = tl.program_id(0) % tl.cdiv(M, BM) * BM
    lane = tl.arange(0, 8)[:, None, None, None, None]
    rows = n0 + tl.arange(0, BN // 8)[None, None, None, :, None] * 8 + lane
    x_rows = m0 + tl.arange(0, BM // 8)[None, None, None, :, None] * 8 + lane
    own = tl.arange(0, BK // 32)[:, None, None] * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    own = own[None, None]
    H = _row_words(K, PACK, ALIGNED)
    share = tl.cdiv(tl.cdiv(H, BLOCK), S) * BLOCK
    k = tl.arange(0, S)[None, :, None, None, None] * share + own
    inside = (own < share) & (k < H)
    w = _words(weight, PACK)
    here, up_here = _weight_tiles(w, rows, k, (rows < N) & inside, N, H, GATED)
    n = n0 + tl.arange(0, BN)
    m = m0 + tl.arange(0, BM)
    gain, shift = _gains(norm_weight, norm_bias, _lanes(k, S, BK, PACK), inside, PACK, NORM, NORM_BIAS)
    first_bias, up_bias = _biases(bias, n, N, GATED, BIAS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x_here = _load_x(_words(x, PACK), x_rows, k, (x_rows < M) & inside, H)
    rest = _residual(residual, n, m, M, N, RESIDUAL)
    mean = x_rows * 0.0
    scale = mean
    acc = tl.zeros((S, BM, BN) if BN == 8 else (S, BN, BM), tl.float32)
    up = acc
    if not ONCE:
        if NORM != "none":
            mean, scale = _row_statistics(x, m, M, K, H, eps, BM, BS, T, PACK, NORM)
            mean = tl.trans(tl.reshape(mean, (BM // 8, 8)))[:, None, None, :, None]
            scale = tl.trans(tl.reshape(scale, (BM // 8, 8)))[:, None, None, :, None]
        acc, up, here, up_here, x_here, gain, shift = _mma_rest(
            acc, up, here, up_here, x_here, gain, shift, x, w, k, own, share, rows, x_rows, mean, scale,
            norm_weight, norm_bias, eps, M, N, K, H, BM, BN, BK, S, GATED, T, PACK, NORM, NORM_BIAS, WIDE,
        )  # fmt: skip
    value = _mma_x(
        x_here, x, inside, x_rows, M, K, mean, scale, gain, shift, eps, BM, BK, S, T, PACK, NORM, NORM_BIAS, ONCE, WIDE
    )
    acc, up = _products(acc, up, here, up_here, value, S, BN, BK, T, PACK, GATED, WIDE)
    acc = _slice_sums(acc, BN)
    up = _slice_sums(up, BN) if GATED else acc
    _finish(acc, up, first_bias, up_bias, rest, y, n, m, M, N, ACT, GATED, BIAS, RESIDUAL)
