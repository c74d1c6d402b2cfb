# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False
"""The kernel behind :func:`ops.specialized.tile_gemm.tile_gemm`, in pieces.

The weights of a block are on their way to L2 while the launch in front still runs; after the wait (programmatic
dependent launch) come the loads of what that launch wrote.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ops.generic.activation import _activation


@triton.jit
def _prefetch(weight, column, first, N: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, BN: tl.constexpr,
              PIECES: tl.constexpr):  # fmt: skip
    """Asks L2 for ``weight[column : column + BN, first : first + SPAN]``, PIECES requests a row; waits for nothing."""
    SIZE: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    WIDTH: tl.constexpr = tl.cdiv(tl.cdiv(SPAN, PIECES) * SIZE, 128) * 128 // SIZE
    lane = tl.arange(0, BN * PIECES)
    row = tl.minimum(column + lane // PIECES, N - 1)
    at = first + lane % PIECES * WIDTH
    size = (tl.minimum(tl.minimum(at + WIDTH, first + SPAN), K) - at) * SIZE
    pointer = weight + row.to(tl.int64) * K + at
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [pointer.to(tl.int64), size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _load(pointer, mask, MASKED: tl.constexpr):
    """Zero where masked; without a mask where every tile is whole."""
    if MASKED:
        return tl.load(pointer, mask=mask, other=0.0)
    else:
        return tl.load(pointer)


@triton.jit
def _moments(means, squares, N: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_PARTS: tl.constexpr, eps,
             LAYERNORM: tl.constexpr):  # fmt: skip
    """Mean (0 for an RMSNorm) and reciprocal deviation [BM] of rows from the partial ones [BM, BLOCK_PARTS].

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """
    part = tl.arange(0, BLOCK_PARTS)[None, :]
    count = tl.where(part < PARTS, tl.minimum(N - part * WIDTH, WIDTH), 0).to(tl.float32)
    if LAYERNORM:
        mean = tl.sum(means * count, 1) / N
        away = means - mean[:, None]
    else:
        mean = tl.sum(tl.zeros_like(means), 1)
        away = means
    square = tl.sum(tl.where(part < PARTS, squares + count * away * away, 0.0), 1) / N
    return mean, tl.rsqrt(square + eps)


@triton.jit
def _parts(stats, row, m, plane, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """The partial statistics of rows: means and sums of squared deviations, [BM, BLOCK_PARTS] each."""
    part = tl.arange(0, BLOCK_PARTS)
    at = stats + row.to(tl.int64)[:, None] * PARTS + part[None, :]
    known = (row < m)[:, None] & (part < PARTS)[None, :]
    return tl.load(at, mask=known, other=0.0), tl.load(at + plane, mask=known, other=1.0)


@triton.jit
def _tile_of(stream, row, m, column, N: tl.constexpr):
    """The residual's elements of a tile."""
    inside = (row < m)[:, None] & (column < N)[None, :]
    return tl.load(stream + row.to(tl.int64)[:, None] * N + column[None, :], mask=inside, other=0.0)


@triton.jit
def _normed(x, mean, scale, weight, bias):
    """The norm of ``x`` in fp32, rounded to its dtype as a norm of its own would round it."""
    y = (x.to(tl.float32) - mean) * scale * weight.to(tl.float32)
    if bias is not None:
        y += bias.to(tl.float32)
    return y.to(x.dtype)


@triton.jit
def _product(x, weight, norm_weight, norm_bias, mean, scale, row, m, column, first, N: tl.constexpr, K: tl.constexpr,
             STEPS: tl.constexpr, NORMED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
             EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """``x[row] weight[column]^T`` over ``STEPS * BK`` elements from ``first`` on: [BM, BN] fp32."""
    lane = tl.arange(0, BK)
    x += row.to(tl.int64)[:, None] * K + lane[None, :] + first
    weight += column.to(tl.int64)[None, :] * K + lane[:, None] + first
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(STEPS):
        k = first + step * BK + lane
        inside = k < K
        a = _load(x + step * BK, (row < m)[:, None] & inside[None, :], not (EVEN_M and EVEN_K))
        b = _load(weight + step * BK, (column < N)[None, :] & inside[:, None], not (EVEN_N and EVEN_K))
        if NORMED:
            shift = None
            if norm_bias is not None:
                shift = tl.load(norm_bias + k, mask=inside, other=0.0)[None, :]
            gain = tl.load(norm_weight + k, mask=inside, other=0.0)[None, :]
            a = _normed(a, mean[:, None], scale[:, None], gain, shift)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def _sliced_product(x, weight, norm_weight, norm_bias, mean, scale, row, m, column, first, N: tl.constexpr,
                    K: tl.constexpr, STEPS: tl.constexpr, NORMED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                    BK: tl.constexpr, SLICES: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
                    EVEN_K: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """As :func:`_product`, each warp with BK elements of ``SLICES * BK`` a step: a small tile for all warps at once."""
    lane = tl.arange(0, SLICES)[:, None] * BK + tl.arange(0, BK)[None, :]
    x += row.to(tl.int64)[None, :, None] * K + lane[:, None, :] + first
    weight += column.to(tl.int64)[None, None, :] * K + lane[:, :, None] + first
    acc = tl.zeros((SLICES, BM, BN), tl.float32)
    for step in range(STEPS):
        k = first + step * (SLICES * BK) + lane
        inside = k < K
        at = step * (SLICES * BK)
        a = _load(x + at, (row < m)[None, :, None] & inside[:, None, :], not (EVEN_M and EVEN_K))
        b = _load(weight + at, (column < N)[None, None, :] & inside[:, :, None], not (EVEN_N and EVEN_K))
        if NORMED:
            shift = None
            if norm_bias is not None:
                shift = tl.load(norm_bias + k, mask=inside, other=0.0)[:, None, :]
            gain = tl.load(norm_weight + k, mask=inside, other=0.0)[:, None, :]
            a = _normed(a, mean[None, :, None], scale[None, :, None], gain, shift)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return tl.sum(acc, 0)


@triton.jit
def _share(acc, partials, counters, tile, split, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr):
    """Leaves this block's share of a tile where the last of its SPLIT blocks finds it; whether this is the last."""
    at = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    tl.store(partials + (tile.to(tl.int64) * SPLIT + split) * (BM * BN) + at, acc)
    tl.debug_barrier()
    return tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLIT - 1


@triton.jit
def _gather(partials, counters, tile, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr):
    """The sum of all shares of a tile, in one order whichever came last; the counter is ready for the next launch."""
    at = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    share = partials + tile.to(tl.int64) * (SPLIT * BM * BN) + at
    acc = tl.load(share, cache_modifier=".cg")
    for other in tl.static_range(1, SPLIT):
        acc += tl.load(share + other * (BM * BN), cache_modifier=".cg")
    tl.store(counters + tile, 0)
    return acc


@triton.jit
def _finish(acc, bias, residual, out, out_stats, out_plane, row, m, column, tile_n, N: tl.constexpr,
            OUT_PARTS: tl.constexpr, ACT: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Bias, activation and residual, one rounding, and the partial statistics of what was stored."""
    if bias is not None:
        acc += bias.to(tl.float32)[None, :]
    if ACT is not None:
        acc = _activation(acc, ACT)
    if residual is not None:
        acc += residual.to(tl.float32)
    y = acc.to(out.dtype.element_ty)
    inside = (row < m)[:, None] & (column < N)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * N + column[None, :], y, mask=inside)
    if out_stats is not None:
        value = tl.where((column < N)[None, :], y.to(tl.float32), 0.0)
        mean = tl.sum(value, 1) / tl.minimum(N - tile_n * BN, BN)
        away = tl.where((column < N)[None, :], value - mean[:, None], 0.0)
        at = out_stats + row.to(tl.int64) * OUT_PARTS + tile_n
        tl.store(at, mean, mask=row < m)
        tl.store(at + out_plane, tl.sum(away * away, 1), mask=row < m)


@triton.jit
def _epilogue(acc, bias, residual, gain, shift, out, means, squares, out_stats, out_plane, eps, row, m, column, tile_n,
              N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, LAYERNORM: tl.constexpr, PARTS: tl.constexpr,
              WIDTH: tl.constexpr, BLOCK_PARTS: tl.constexpr, OUT_PARTS: tl.constexpr, ACT: tl.constexpr,
              BN: tl.constexpr):  # fmt: skip
    """What is left of a folded norm, or the norm of the residual, then :func:`_finish`."""
    if NORM == "folded":
        mean, scale = _moments(means, squares, K, PARTS, WIDTH, BLOCK_PARTS, eps, LAYERNORM)
        acc = (acc - mean[:, None] * gain[None, :]) * scale[:, None]
    if NORM == "stream":
        mean, scale = _moments(means, squares, N, PARTS, WIDTH, BLOCK_PARTS, eps, LAYERNORM)
        if shift is None:
            residual = _normed(residual, mean[:, None], scale[:, None], gain[None, :], None)
        else:
            residual = _normed(residual, mean[:, None], scale[:, None], gain[None, :], shift[None, :])
    _finish(acc, bias, residual, out, out_stats, out_plane, row, m, column, tile_n, N, OUT_PARTS, ACT, BN)


@triton.jit
def _finish_shared(partials, counters, tile, bias, stream, gain, shift, out, stats, plane, out_stats, out_plane, eps,
                   row, m, column, tile_n, N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
                   LAYERNORM: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_PARTS: tl.constexpr,
                   OUT_PARTS: tl.constexpr, ACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   SPLIT: tl.constexpr):  # fmt: skip
    """What the last block of a tile does: the others need neither the residual nor statistics."""
    residual, means, squares = None, None, None
    if NORM == "folded" or NORM == "stream":
        means, squares = _parts(stats, row, m, plane, PARTS, BLOCK_PARTS)
    if stream is not None:
        residual = _tile_of(stream, row, m, column, N)
    acc = _gather(partials, counters, tile, BM, BN, SPLIT)
    _epilogue(acc, bias, residual, gain, shift, out, means, squares, out_stats, out_plane, eps, row, m, column, tile_n,
              N, K, NORM, LAYERNORM, PARTS, WIDTH, BLOCK_PARTS, OUT_PARTS, ACT, BN)  # fmt: skip


@triton.jit
def _tile_gemm_kernel(
    x, weight, bias, out, stream, norm_weight, norm_bias, stats, out_stats, partials, counters, m, plane, out_plane,
    eps, N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, LAYERNORM: tl.constexpr, PARTS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_PARTS: tl.constexpr, OUT_PARTS: tl.constexpr, ACT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, WIDEN: tl.constexpr, PIECES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """NORM is None, "input" (of x as it is read), "folded" (into the weight) or "stream" (of the residual)."""
    tile, split, tiles_m = tl.program_id(0), tl.program_id(1), tl.cdiv(m, BM)
    tile_m, tile_n = tile % tiles_m, tile // tiles_m
    row, column = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    SPAN: tl.constexpr = STEPS * SLICES * BK
    first = split * SPAN
    # Weights may be read before the launch in front is done; what it wrote, only behind the wait.
    if PDL and PIECES > 0 and tile_m == 0:
        _prefetch(weight, tile_n * BN, first, N, K, SPAN, BN, PIECES)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    b, gain, shift, means, squares, mean, scale, residual = None, None, None, None, None, None, None, None
    if bias is not None:
        b = tl.load(bias + column, mask=column < N, other=0.0)
    if NORM == "folded" or NORM == "stream":
        gain = tl.load(norm_weight + column, mask=column < N, other=0.0)
        if norm_bias is not None:
            shift = tl.load(norm_bias + column, mask=column < N, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    # Loaded before the product and used behind it, so that they are on their way meanwhile.
    if NORM is not None and (SPLIT == 1 or NORM == "input"):
        means, squares = _parts(stats, row, m, plane, PARTS, BLOCK_PARTS)
    if NORM == "input":
        mean, scale = _moments(means, squares, K, PARTS, WIDTH, BLOCK_PARTS, eps, LAYERNORM)
    if stream is not None and SPLIT == 1:
        residual = _tile_of(stream, row, m, column, N)
    if SLICES == 1:
        acc = _product(x, weight, norm_weight, norm_bias, mean, scale, row, m, column, first, N, K, STEPS,
                       NORM == "input", BM, BN, BK, EVEN_M, EVEN_N, EVEN_K, WIDEN)  # fmt: skip
    else:
        acc = _sliced_product(x, weight, norm_weight, norm_bias, mean, scale, row, m, column, first, N, K, STEPS,
                              NORM == "input", BM, BN, BK, SLICES, EVEN_M, EVEN_N, EVEN_K, WIDEN)  # fmt: skip
    if SPLIT == 1:
        _epilogue(acc, b, residual, gain, shift, out, means, squares, out_stats, out_plane, eps, row, m, column, tile_n,
                  N, K, NORM, LAYERNORM, PARTS, WIDTH, BLOCK_PARTS, OUT_PARTS, ACT, BN)  # fmt: skip
    elif _share(acc, partials, counters, tile, split, BM, BN, SPLIT):
        _finish_shared(partials, counters, tile, b, stream, gain, shift, out, stats, plane, out_stats, out_plane, eps,
                       row, m, column, tile_n, N, K, NORM, LAYERNORM, PARTS, WIDTH, BLOCK_PARTS, OUT_PARTS, ACT, BM,
                       BN, SPLIT)  # fmt: skip
