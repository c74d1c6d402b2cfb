"""What the kernels of the skinny GEMM share: reading weights and x, the norm in front, the activation and the sums
behind.

Tiles of the weight and of x are read as *words* of 32 bits (``PACK`` elements each: two 16-bit ones, or one of fp32).
Held back in a loop, 16-bit elements would be taken apart as soon as they arrive, and the loop would wait for its own
prefetch. Rows that do not allow that (``ALIGNED`` is False: their bytes are no multiple of 16) are read element by
element, ``PACK`` 1.
"""
# Triton carries no annotations, and compiles these functions from their source: they have no Python types.
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _words(pointer, PACK: tl.constexpr):
    """The pointer, to words."""
    if PACK == 2:
        pointer = pointer.to(tl.pointer_type(tl.int32), bitcast=True)
    return pointer


@triton.jit
def _row_words(K, PACK: tl.constexpr, ALIGNED: tl.constexpr):
    """Words of a row of K elements; of aligned rows the compiler learns here that they come four by four."""
    if ALIGNED:
        K = K // (4 * PACK) * 4
    return K


@triton.jit
def _elements(words, T: tl.constexpr, PACK: tl.constexpr):
    """The elements of words: the even ones and the odd ones (with PACK 1 both are all of them)."""
    low = words
    high = words
    if PACK == 2:
        low = words.to(tl.int16).to(T, bitcast=True)
        high = (words >> 16).to(tl.int16).to(T, bitcast=True)
    return low, high


@triton.jit
def _halves(words, T: tl.constexpr, PACK: tl.constexpr):
    """``_elements`` in fp32."""
    low, high = _elements(words, T, PACK)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _load_weight(weight, rows, at, inside, H):
    """Words of the weight [rows, H words]: the one place that knows how a weight lies in memory.

    A quantized weight is another function in this place, and another ``_elements``.
    """
    return tl.load(weight + rows.to(tl.int64) * H + at, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def _weight_tiles(weight, rows, k, inside, N, H, GATED: tl.constexpr):
    """The weight's words at ``k`` of the rows for y's columns; if gated, also of the up rows below the gate's."""
    words = _load_weight(weight, rows, k, inside, H)
    up = words
    if GATED:
        up = _load_weight(weight, N + rows, k, inside, H)
    return words, up


@triton.jit
def _load_x(x, rows, at, inside, H):
    """Words of x [rows, H words]."""
    return tl.load(x + rows.to(tl.int64) * H + at, mask=inside, other=0)


@triton.jit
def _row_sums(total, square):
    """Sums of two tiles of rows' values: [rows] of [vectors, rows, 1, 4], [8, rows / 8] of [8, slices, blocks, rows /
    8, words].

    Together, so that warps exchange them once.
    """
    if len(total.shape) == 4:
        both = tl.sum(tl.join(tl.sum(tl.sum(total, 3), 2), tl.sum(tl.sum(square, 3), 2)), 0)
    else:
        both = tl.sum(tl.join(tl.sum(tl.sum(total, 2), 3), tl.sum(tl.sum(square, 2), 3)), 1)
    return tl.split(both)


@triton.jit
def _moments(total, square, first, K, eps, NORM: tl.constexpr):
    """Mean and 1 / standard deviation, from the sums of ``x - first`` and of its square.

    LayerNorm's sums are of ``x`` less the row's first element: an element is at most sqrt(K) deviations from the mean,
    so that the difference of the sums loses at most K times fp32's epsilon; plain sums lose everything when the mean is
    large. RMSNorm's mean is 0.
    """
    mean = total / K
    variance = square / K
    if NORM == "layernorm":
        variance = tl.maximum(variance - mean * mean, 0.0)
        mean += first
    else:
        mean = mean * 0.0
    return mean, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def _tile_sums(low, high, inside, first, NORM: tl.constexpr, PACK: tl.constexpr):
    """The sums for ``_moments`` of rows that lie whole in a tile; ``first`` broadcasts to it."""
    if NORM == "layernorm":
        low = tl.where(inside, low - first, 0.0)
        high = tl.where(inside, high - first, 0.0)
    total = low
    square = low * low
    if PACK == 2:
        total += high
        square += high * high
    return _row_sums(total, square)


@triton.jit
def _first_elements(x, m, M, K, NORM: tl.constexpr):
    """The first element of the rows ``m``, which LayerNorm's sums are less of."""
    first = m * 0.0
    if NORM == "layernorm":
        first += tl.load(x + m.to(tl.int64) * K, mask=m < M, other=0.0).to(tl.float32)
    return first


@triton.jit
def _row_statistics(
    x, m, M, K, H, eps, BM: tl.constexpr, BS: tl.constexpr, T: tl.constexpr, PACK: tl.constexpr, NORM: tl.constexpr
):
    """Mean and 1 / standard deviation of rows ``m`` [BM] of x, in a pass of its own, BS elements at a time."""
    STEP: tl.constexpr = BS // PACK
    k = tl.arange(0, STEP // 4)[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    rows = m[None, :, None]
    first = _first_elements(x, m, M, K, NORM)
    total = tl.zeros((STEP // 4, BM), tl.float32)
    square = tl.zeros((STEP // 4, BM), tl.float32)
    for k0 in range(0, H, STEP):
        inside = (rows < M) & (k0 + k < H)
        low, high = _halves(_load_x(_words(x, PACK), rows, k0 + k, inside, H), T, PACK)
        low = tl.where(inside, low - first[None, :, None], 0.0)
        total += tl.sum(low, 2)
        square += tl.sum(low * low, 2)
        if PACK == 2:
            high = tl.where(inside, high - first[None, :, None], 0.0)
            total += tl.sum(high, 2)
            square += tl.sum(high * high, 2)
    row_total, row_square = tl.split(tl.sum(tl.join(total, square), 0))
    return _moments(row_total, row_square, first, K, eps, NORM)


@triton.jit
def _gains(norm_weight, norm_bias, at, inside, PACK: tl.constexpr, NORM: tl.constexpr, NORM_BIAS: tl.constexpr):
    """Words of the norm's weight and bias, which are constants."""
    gain = at
    shift = at
    if NORM != "none":
        gain = tl.load(_words(norm_weight, PACK) + at, mask=inside, other=0)
        if NORM_BIAS:
            shift = tl.load(_words(norm_bias, PACK) + at, mask=inside, other=0)
    return gain, shift


@triton.jit
def _normalize(low, high, mean, scale, gain, shift, T: tl.constexpr, PACK: tl.constexpr, NORM_BIAS: tl.constexpr):
    """``(x - mean) * scale * weight + bias`` of elements in fp32; ``gain`` and ``shift`` are words of weight and
    bias."""
    weight, weight_high = _halves(gain, T, PACK)
    low = (low - mean) * scale * weight
    if PACK == 2:
        high = (high - mean) * scale * weight_high
    if NORM_BIAS:
        bias, bias_high = _halves(shift, T, PACK)
        low += bias
        if PACK == 2:
            high += bias_high
    return low, high


@triton.jit
def _activate(v, ACT: tl.constexpr):
    """The activations of ``ops.spec.Activation``, of fp32 values (tanh by sigmoid: the interpreter has no tanh)."""
    if ACT == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    if ACT == "gelu_tanh":
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    if ACT == "quick_gelu":
        v = v * tl.sigmoid(1.702 * v)
    if ACT == "silu":
        v = v * tl.sigmoid(v)
    if ACT == "relu":
        v = tl.where(v < 0.0, 0.0, v)  # not a maximum, which would hide NaN
    if ACT == "tanh":
        v = 2.0 * tl.sigmoid(2.0 * v) - 1.0
    return v


@triton.jit
def _biases(bias, n, N, GATED: tl.constexpr, BIAS: tl.constexpr):
    """fp32 biases of the columns ``n`` and, if gated, of their up rows. Constants: read before the wait."""
    first = n * 0.0
    up = first
    if BIAS:
        first = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            up = tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)
    return first, up


@triton.jit
def _residual(residual, n, m, M, N, RESIDUAL: tl.constexpr):
    """The residual's [n, m] tile, read as early as it may be."""
    tile = (n * 0.0)[:, None]
    if RESIDUAL:
        inside = (n < N)[:, None] & (m < M)[None, :]
        tile = tl.load(residual + m.to(tl.int64)[None, :] * N + n[:, None], mask=inside, other=0.0).to(tl.float32)
    return tile


@triton.jit
def _finish(
    acc, up, first_bias, up_bias, rest, y, n, m, M, N,
    ACT: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Epilogue of an [n, m] tile of sums: bias, activation, gate, residual; then the one rounding, and the store."""
    if BIAS:
        acc += first_bias[:, None]
    acc = _activate(acc, ACT)
    if GATED:
        if BIAS:
            up += up_bias[:, None]
        acc = acc * up
    if RESIDUAL:
        acc += rest
    inside = (n < N)[:, None] & (m < M)[None, :]
    tl.store(y + m.to(tl.int64)[None, :] * N + n[:, None], acc.to(y.dtype.element_ty), mask=inside)
