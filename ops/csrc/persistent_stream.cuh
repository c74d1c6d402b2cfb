// What stands before a product: the residual stream normalized, or 16-bit activations, as x in shared memory.
#pragma once

// The stream's row as one thread sees it: four elements at 4 * (at + i * WIDTH).
constexpr int NORM_ROWS = smaller(M, WARPS), WARPS_A_ROW = WARPS / NORM_ROWS, WIDTH = 32 * WARPS_A_ROW;
constexpr int FOURS = HIDDEN / 4, EACH_FOUR = ceil_div(FOURS, WIDTH), HELD = smaller(EACH_FOUR, 16);

// Elements [from, from + HELD) of row m, awaited.
__device__ __forceinline__ void load_row(const u32* row, int at, int from, uint4* held) {
    await_all([&] {
        bool all = true;
#pragma unroll
        for (int i = 0; i < HELD; ++i) held[i] = peek4(row + 4 * min(at + (from + i) * WIDTH, FOURS - 1));
#pragma unroll
        for (int i = 0; i < HELD; ++i) all &= arrived(held[i]);
        return all;
    });
}

// Sums over the threads of a row.
__device__ __forceinline__ float2 row_sums(Block& b, float sum, float square) {
#pragma unroll
    for (int step = 16; step; step >>= 1) {
        if (!RMS_NORM) sum += __shfl_xor_sync(~0u, sum, step);
        square += __shfl_xor_sync(~0u, square, step);
    }
    if (WARPS_A_ROW == 1) return make_float2(sum, square);
    if (b.lane == 0) b.stats()[b.warp] = make_float2(sum, square);
    consumers_sync();
    const float2* parts = b.stats() + b.warp / WARPS_A_ROW * WARPS_A_ROW;
    float2 total = make_float2(0.f, 0.f);
#pragma unroll
    for (int w = 0; w < WARPS_A_ROW; ++w) total.x += parts[w].x, total.y += parts[w].y;
    return total;
}

__device__ __forceinline__ void normalize(const u16* gain, uint4 v, int k, float center, float scale, char* row) {
    const uint2 w = *(const uint2*)(gain + k);
    float out[4] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
    const float gains[4] = {low_of(w.x), high_of(w.x), low_of(w.y), high_of(w.y)};
#pragma unroll
    for (int e = 0; e < 4; ++e) out[e] = (out[e] - center) * scale * gains[e];
    if (!RMS_NORM) {
        const uint2 s = *(const uint2*)(gain + HIDDEN + k);
        out[0] += low_of(s.x), out[1] += high_of(s.x), out[2] += low_of(s.y), out[3] += high_of(s.y);
    }
    const uint2 words = make_uint2(narrow2(out[0], out[1]), narrow2(out[2], out[3]));
    if (M > 8) {
        *(uint2*)(row + 2 * k) = words;
    } else {   // in_order: words 0 and 1, or 2 and 3, of eight columns
        char* at = row + 2 * (k & ~7) + (k & 4);
        *(u32*)at = words.x, *(u32*)(at + 8) = words.y;
    }
}

// The stream's rows, normalized (RMS or layer norm, statistics in fp32) and rounded, into shared memory as x. The sums of
// squares are of differences from what an element of the row was before the last addition, so that a large mean costs no
// digits; nobody else's element, since 132 blocks asking for the same word would stand in line for it.
__device__ __forceinline__ void stage_stream(Block& b, int half) {
    const u32* stream = StreamExchange::incoming(b);
    const u16* gain = b.norms(half);
    const int at = (b.warp % WARPS_A_ROW) * 32 + b.lane;
#pragma unroll 1
    for (int m = b.warp / WARPS_A_ROW; m < M; m += NORM_ROWS) {
        uint4 held[HELD];
        const float origin = RMS_NORM ? 0.f : b.origin(m);
        float sum = 0.f, square = 0.f;
        for (int from = 0; from < EACH_FOUR; from += HELD) {
            load_row(stream + m * HIDDEN, at, from, held);
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                if (at + (from + i) * WIDTH >= FOURS) continue;
                const float x = __uint_as_float(held[i].x) - origin, y = __uint_as_float(held[i].y) - origin;
                const float z = __uint_as_float(held[i].z) - origin, w = __uint_as_float(held[i].w) - origin;
                sum += (x + y) + (z + w), square += (x * x + y * y) + (z * z + w * w);
            }
        }
        const float2 total = row_sums(b, sum, square);
        const float mean = RMS_NORM ? 0.f : total.x * (1.f / HIDDEN);
        const float scale = rsqrtf(fmaxf(total.y * (1.f / HIDDEN) - mean * mean, 0.f) + NORM_EPS);
        if (m < NORM_ROWS) barrier_wait(b.address(READY_AT) + 8 * half, b.halves >> half & 1);
        char* row = b.staged() + m * pitch_of(HIDDEN);
        for (int from = 0; from < EACH_FOUR; from += HELD) {
            if (EACH_FOUR > HELD) load_row(stream + m * HIDDEN, at, from, held);
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                const int four = at + (from + i) * WIDTH;
                if (four < FOURS) normalize(gain, held[i], 4 * four, mean + origin, scale, row);
            }
        }
    }
}

// Columns between k and the next multiple of 32 are multiplied too: zero.
template <int K>
__device__ __forceinline__ void clear_staged_tail(Block& b) {
    constexpr int TAIL = round32(K) - K;
    for (int i = b.thread; i < M * TAIL; i += THREADS) *(u16*)(b.staged() + i / TAIL * pitch_of(K) + 2 * (K + i % TAIL)) = 0;
}

// Rows [M, K] of 16-bit numbers that other blocks send, eight a load, into shared memory as x.
template <int K, class Incoming>
__device__ __forceinline__ void stage_halves(Block& b) {
    constexpr int PIECES = M * K / 8, EACH = ceil_div(PIECES, THREADS), AT_ONCE = smaller(EACH, 8);
    const u32* from = Incoming::incoming(b);
#pragma unroll 1
    for (int base = b.thread; base < PIECES; base += AT_ONCE * THREADS) {
        uint4 found[AT_ONCE];
        await_all([&] {
            bool all = true;
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) found[i] = peek4(from + 4 * min(base + i * THREADS, PIECES - 1));
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) all &= arrived(found[i]);
            return all;
        });
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int element = 8 * (base + i * THREADS);
            if (element < M * K) *(uint4*)(b.staged() + element / K * pitch_of(K) + 2 * (element % K)) = in_order(found[i]);
        }
    }
    if (K % 32) clear_staged_tail<K>(b);
}
