// What stands before a product: the residual stream normalized, or the activations, as x in shared memory.
#pragma once

struct Pair {
    float x, y;
};

__device__ __forceinline__ Pair embedded(const Block& b, int m, int k) {
    const u32 token = __ldg((const u32*)(b.weight(TOKEN_TABLE) + (size_t)b.tokens[m] * HIDDEN + k));
    Pair v = {low_of(token) * EMBEDDING_SCALE, high_of(token) * EMBEDDING_SCALE};
    if (LEARNED_POSITIONS) {
        const size_t row = b.positions[m] + POSITION_OFFSET;
        const u32 position = __ldg((const u32*)(b.weight(POSITION_TABLE) + row * HIDDEN + k));
        v.x += low_of(position), v.y += high_of(position);
    }
    return v;
}

// A row's elements as one thread sees them: pairs at 2 * (at + i * WIDTH).
constexpr int NORM_ROWS = M < WARPS ? M : WARPS, WARPS_A_ROW = WARPS / NORM_ROWS, WIDTH = 32 * WARPS_A_ROW;
constexpr int PAIRS = (HIDDEN / 2 + WIDTH - 1) / WIDTH, MOST_HELD = FLAGGED ? 8 : 32, HELD = PAIRS < MOST_HELD ? PAIRS : MOST_HELD;

// Pairs [from, from + HELD) of row m.
__device__ __forceinline__ void load_pairs(const Block& b, bool embed, int m, int at, int from, Pair* held) {
    if (embed) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int k = 2 * (at + (from + i) * WIDTH);
            held[i] = {0.f, 0.f};
            if (k < HIDDEN) held[i] = embedded(b, m, k);
        }
        return;
    }
    Words words[HELD];
    await_all([&] {
        bool all = true;
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int k = min(2 * (at + (from + i) * WIDTH), HIDDEN - 2);
            words[i] = peek2(b, STREAM, (size_t)m * HIDDEN + k);
        }
#pragma unroll
        for (int i = 0; i < HELD; ++i) all &= arrived(b, words[i]);
        return all;
    });
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const float2 v = floats_of(words[i]);
        held[i] = {v.x, v.y};
    }
}

// Sums over the threads of a row.
__device__ __forceinline__ void row_sums(Block& b, float& sum, float& square) {
#pragma unroll
    for (int step = 16; step; step >>= 1) {
        sum += __shfl_xor_sync(~0u, sum, step);
        square += __shfl_xor_sync(~0u, square, step);
    }
    if (WARPS_A_ROW == 1) return;
    if (b.lane == 0) b.stats[2 * b.warp] = sum, b.stats[2 * b.warp + 1] = square;
    consumers_sync();
    sum = square = 0.f;
    const int first = b.warp / WARPS_A_ROW * WARPS_A_ROW;
    for (int w = first; w < first + WARPS_A_ROW; ++w) sum += b.stats[2 * w], square += b.stats[2 * w + 1];
}

// The stream's rows, normalized (RMS or layer norm, statistics in fp32) and rounded, into shared memory as x. The sums of
// squares are of differences from what an element of the row was before the last addition, so that a large mean costs no
// digits; nobody else's element, since 132 blocks asking for the same word would stand in line for it.
__device__ __forceinline__ void stage_stream(Block& b, bool embed, Half half) {
    const u16 *gain = b.norms(half), *shift = gain + HIDDEN;
    const int at = (b.warp % WARPS_A_ROW) * 32 + b.lane;
    for (int m = b.warp / WARPS_A_ROW; m < M; m += NORM_ROWS) {
        Pair held[HELD];
        const float origin = RMS_NORM ? 0.f : b.origins[m];
        float sum = 0.f, square = 0.f;
        for (int from = 0; from < PAIRS; from += HELD) {
            load_pairs(b, embed, m, at, from, held);
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                if (2 * (at + (from + i) * WIDTH) >= HIDDEN) continue;
                const float x = held[i].x - origin, y = held[i].y - origin;
                sum += x + y, square += x * x + y * y;
            }
        }
        row_sums(b, sum, square);
        const float mean = RMS_NORM ? 0.f : sum / HIDDEN;
        const float scale = rsqrtf(fmaxf(square / HIDDEN - mean * mean, 0.f) + NORM_EPS);
        const float center = RMS_NORM ? 0.f : mean + origin;
        if (m < NORM_ROWS) barrier_wait(b.ready + 8 * half, b.turn >> half & 1);
        char* row = b.staged_ptr + m * staged_pitch(HIDDEN);
        for (int from = 0; from < PAIRS; from += HELD) {
            if (PAIRS > HELD) load_pairs(b, embed, m, at, from, held);
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                const int k = 2 * (at + (from + i) * WIDTH);
                if (k >= HIDDEN) continue;
                const u32 w = *(const u32*)(gain + k);
                float x = (held[i].x - center) * scale * low_of(w), y = (held[i].y - center) * scale * high_of(w);
                if (!RMS_NORM) {
                    const u32 s = *(const u32*)(shift + k);
                    x += low_of(s), y += high_of(s);
                }
                *(u32*)(row + 2 * k) = narrow2(x, y);
            }
        }
    }
}

// Phase 5's x where it fits: the activations [M, FFN], two a word, into shared memory; four at a time, or eight plain ones.
__device__ __forceinline__ void stage_activations(Block& b) {
    constexpr int TOGETHER_ELEMENTS = FLAGGED ? 4 : 8, PIECES = M * FFN / TOGETHER_ELEMENTS;
    constexpr int EACH = (PIECES + THREADS - 1) / THREADS, AT_ONCE = EACH < 8 ? EACH : 8;
    const u64* buffer = (u64*)b.table[HIDDEN_ACT];
    for (int base = b.thread; base < PIECES; base += AT_ONCE * THREADS) {
        uint4 found[AT_ONCE];
        await_all([&] {
            bool all = true;
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int piece = min(base + i * THREADS, PIECES - 1);
                if (FLAGGED) {
                    u64 a, c;
                    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(c) : "l"(buffer + 2 * piece) : "memory");
                    found[i] = make_uint4((u32)a, (u32)(a >> 32), (u32)c, (u32)(c >> 32));
                } else {
                    found[i] = load_l2(buffer + 2 * piece);
                }
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                if (FLAGGED) all &= found[i].y == b.epoch && found[i].w == b.epoch;
            return all;
        });
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int element = (base + i * THREADS) * TOGETHER_ELEMENTS;
            if (element >= M * FFN) continue;
            char* to = b.staged_ptr + element / FFN * staged_pitch(FFN) + 2 * (element % FFN);
            if (FLAGGED) *(uint2*)to = make_uint2(found[i].x, found[i].z);
            else *(uint4*)to = found[i];
        }
    }
}

// Columns between k and the next multiple of 32 are multiplied too: zero.
__device__ __forceinline__ void clear_staged_tail(Block& b, int k) {
    const int tail = round32(k) - k;
    for (int i = b.thread; i < M * tail; i += THREADS) *(u16*)(b.staged_ptr + i / tail * staged_pitch(k) + 2 * (k + i % tail)) = 0;
}
