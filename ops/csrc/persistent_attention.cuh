// Attention of one new token a row over the paged cache, split along the keys where that fills more blocks.
//
// A block takes a (row, KV head, split); the query heads on that KV head share what is read. LANES lanes hold one key, eight
// elements each; every such lane group keeps its own running maximum, denominator and sums, and they meet at the end.
#pragma once

constexpr int LANES = HEAD_DIM <= 8 ? 1 : HEAD_DIM <= 16 ? 2 : HEAD_DIM <= 32 ? 4 : HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32;
constexpr int KEYS_A_WARP = 32 / LANES, KEYS_A_TURN = WARPS * KEYS_A_WARP, BATCH_KEYS = 4;
constexpr int TOGETHER = SHARING < 4 ? SHARING : 4, ROUNDS = (SHARING + TOGETHER - 1) / TOGETHER;   // query heads at a time
constexpr int LEAST_SPLIT = 4 * KEYS_A_TURN;
constexpr float FLOOR = -1e30f, LOG2E = 1.4426950408889634f;
constexpr int ATTENTION_FLOATS = WARPS * TOGETHER * PARTIAL;

struct Span {
    int begin, end;
};

__device__ __forceinline__ int window_start(const Block& b, int m, int window) {
    const int context = b.positions[m] + 1;
    return window > 0 ? max(0, context - window) : 0;
}

// Into how many splits each row's keys go in this layer: the same in every block.
__device__ __forceinline__ int splits_of(const Block& b, int window) {
    int longest = 1;
    for (int m = 0; m < M; ++m) longest = max(longest, b.positions[m] + 1 - window_start(b, m, window));
    constexpr int ITEMS = M * KV_HEADS * ROUNDS, room = BLOCKS / ITEMS > 0 ? BLOCKS / ITEMS : 1;
    return min(min(room, MAX_SPLITS), (longest + LEAST_SPLIT - 1) / LEAST_SPLIT);
}

__device__ __forceinline__ size_t pool_row(const Block& b, int m, int token) {
    const int page = __ldg((const int*)b.table[BLOCK_TABLE] + (size_t)m * (int)b.table[PAGES_A_ROW] + (u32)token / PAGE_SIZE);
    return ((size_t)page * PAGE_SIZE + (u32)token % PAGE_SIZE) * KV_SIZE;
}

struct Keys {
    uint4 k[BATCH_KEYS], v[BATCH_KEYS];
};

// Which token this lane group's i-th key of a turn is. The turn behind the last one is for the newest token alone, whose key
// is written in this very step: the others are fetched before anybody is waited for.
__device__ __forceinline__ int token_of(const Block& b, Span span, int turn, int turns, int i) {
    const int group = b.warp * KEYS_A_WARP + b.lane / LANES;
    if (turn == turns) return group == 0 && i == 0 ? span.end : span.end + 1;
    return span.begin + (turn * BATCH_KEYS + i) * KEYS_A_TURN + group;
}

__device__ __forceinline__ void fetch(const Block& b, int layer, int m, int kv_head, Span span, int turn, Keys& keys) {
    const int element = kv_head * HEAD_DIM + (b.lane % LANES) * 8;
    const u16* pool_k = b.layer_weight(layer, KEYS) + element;
    const u16* pool_v = b.layer_weight(layer, VALUES) + element;
#pragma unroll
    for (int i = 0; i < BATCH_KEYS; ++i) {
        const int token = token_of(b, span, turn, -1, i);
        keys.k[i] = keys.v[i] = make_uint4(0, 0, 0, 0);
        if (token < span.end && (b.lane % LANES) * 8 < HEAD_DIM) {
            const size_t at = pool_row(b, m, token);
            keys.k[i] = load_l2(pool_k + at);
            keys.v[i] = load_l2(pool_v + at);
        }
    }
}

// Eight floats of a buffer at `at`, awaited.
__device__ __forceinline__ void receive8(const Block& b, Pointer buffer, size_t at, float* out) {
    Words w[4];
    await_all([&] {
        bool all = true;
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = peek2(b, buffer, at + 2 * i);
#pragma unroll
        for (int i = 0; i < 4; ++i) all &= arrived(b, w[i]);
        return all;
    });
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 v = floats_of(w[i]);
        out[2 * i] = v.x, out[2 * i + 1] = v.y;
    }
}

struct Running {
    float top[TOGETHER], total[TOGETHER], sums[TOGETHER][8];
};

__device__ __forceinline__ float scored(const Block& b, float dot, int head, int distance) {
    float s = dot * ATTENTION_SCALE;
    if (ATTENTION_SOFTCAP > 0.f) s = ATTENTION_SOFTCAP * tanhf(s / ATTENTION_SOFTCAP);
    if (ALIBI) s -= __ldg((const float*)b.table[SLOPES] + min(head, HEADS - 1)) * distance;
    return s * LOG2E;
}

// Takes a turn's keys into the running sums; keys of tokens at or behind `end` do not count.
__device__ __forceinline__ void take(
    const Block& b, const Keys& keys, const float (*q)[8], int m, int head0, Span span, int turn, int turns, int end, Running& run) {
    float score[BATCH_KEYS][TOGETHER];
#pragma unroll
    for (int i = 0; i < BATCH_KEYS; ++i) {
        const int token = token_of(b, span, turn, turns, i);
        float k[8];
        widen8(keys.k[i], k);
#pragma unroll
        for (int h = 0; h < TOGETHER; ++h) {
            float dot = 0.f;
#pragma unroll
            for (int e = 0; e < 8; ++e) dot += q[h][e] * k[e];
#pragma unroll
            for (int step = LANES / 2; step; step >>= 1) dot += __shfl_xor_sync(~0u, dot, step);
            score[i][h] = token < end ? scored(b, dot, head0 + h, b.positions[m] - token) : __int_as_float(0xff800000);
        }
    }
#pragma unroll
    for (int h = 0; h < TOGETHER; ++h) {
        float top = run.top[h];
#pragma unroll
        for (int i = 0; i < BATCH_KEYS; ++i) top = fmaxf(top, score[i][h]);
        const float keep = exp2f(run.top[h] - top);
        run.top[h] = top, run.total[h] *= keep;
#pragma unroll
        for (int e = 0; e < 8; ++e) run.sums[h][e] *= keep;
    }
#pragma unroll
    for (int i = 0; i < BATCH_KEYS; ++i) {
        float v[8];
        widen8(keys.v[i], v);
#pragma unroll
        for (int h = 0; h < TOGETHER; ++h) {
            const float p = exp2f(score[i][h] - run.top[h]);
            run.total[h] += p;
#pragma unroll
            for (int e = 0; e < 8; ++e) run.sums[h][e] += p * v[e];
        }
    }
}

// Lane groups of a warp meet, then the warps; the result of the split goes to PARTIALS [M][HEADS][MAX_SPLITS][PARTIAL].
__device__ __forceinline__ void meet(Block& b, Running& run, int m, int head0, int heads, int split) {
#pragma unroll
    for (int step = LANES; step < 32; step <<= 1) {
#pragma unroll
        for (int h = 0; h < TOGETHER; ++h) {
            const float other = __shfl_xor_sync(~0u, run.top[h], step), top = fmaxf(run.top[h], other);
            const float mine = exp2f(run.top[h] - top), theirs = exp2f(other - top);
            run.top[h] = top;
            run.total[h] = run.total[h] * mine + __shfl_xor_sync(~0u, run.total[h], step) * theirs;
#pragma unroll
            for (int e = 0; e < 8; ++e)
                run.sums[h][e] = run.sums[h][e] * mine + __shfl_xor_sync(~0u, run.sums[h][e], step) * theirs;
        }
    }
    if (b.lane < LANES && b.lane * 8 < HEAD_DIM) {
#pragma unroll
        for (int h = 0; h < TOGETHER; ++h) {
            float* out = b.attention + (b.warp * TOGETHER + h) * PARTIAL;
#pragma unroll
            for (int e = 0; e < 8; ++e) out[b.lane * 8 + e] = run.sums[h][e];
            if (b.lane == 0) out[HEAD_DIM] = run.top[h], out[HEAD_DIM + 1] = run.total[h];
        }
    }
    consumers_sync();
    for (int i = b.thread; i < heads * PARTIAL; i += THREADS) {
        const int h = i / PARTIAL, e = i % PARTIAL;
        const float* part = b.attention + h * PARTIAL;
        float top = FLOOR, sum = 0.f;
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, part[w * TOGETHER * PARTIAL + HEAD_DIM]);
        for (int w = 0; w < WARPS; ++w) {
            const float* one = part + w * TOGETHER * PARTIAL;
            sum += exp2f(one[HEAD_DIM] - top) * (e == HEAD_DIM ? 0.f : one[e]);
        }
        publish(b, PARTIALS, (((size_t)m * HEADS + head0 + h) * MAX_SPLITS + split) * PARTIAL + e, e == HEAD_DIM ? top : sum);
    }
    consumers_sync();
}

// The key and value of the row's newest token, to the first place.
__device__ __forceinline__ void fetch_newest(const Block& b, int layer, int m, int kv_head, Keys& keys) {
    const int element = kv_head * HEAD_DIM + (b.lane % LANES) * 8;
    if (FLAGGED) {
        float eight[8];
#pragma unroll 1
        for (int value = 0; value < 2; ++value) {
            receive8(b, NEW_KV, (size_t)(2 * m + value) * KV_SIZE + element, eight);
            if (value) keys.v[0] = narrow8(eight);
            else keys.k[0] = narrow8(eight);
        }
    } else {
        const size_t at = (size_t)b.slots[m] * KV_SIZE + element;
        keys.k[0] = load_l2(b.layer_weight(layer, KEYS) + at);
        keys.v[0] = load_l2(b.layer_weight(layer, VALUES) + at);
    }
}

// Phase 2. The grid barrier behind the queries has been arrived at, and is waited for in here.
__device__ __forceinline__ void attend(Block& b, int layer) {
    const int window = (int)b.table[POINTERS + layer * LAYER_POINTERS + WINDOW], splits = splits_of(b, window);
    bool waiting = true;
    for (int item = b.id; item < M * KV_HEADS * ROUNDS * splits; item += BLOCKS) {
        constexpr u32 WHOLE = M * KV_HEADS * ROUNDS;
        const u32 split = item / WHOLE, rest = item % WHOLE;
        const int round = rest % ROUNDS, kv_head = rest / ROUNDS % KV_HEADS, m = rest / ROUNDS / KV_HEADS;
        const int low = window_start(b, m, window), context = b.positions[m] + 1;
        // At least the ceiling of the quotient (floats round); what is over at the end is cut off.
        const int per = (int)__fdiv_rn((float)(context - low + splits - 1), (float)splits);
        const int end = min(low + (int)(split + 1) * per, context), fresh = end == context && low + (int)split * per < end;
        const Span span = {low + (int)split * per, end - fresh};
        const int head0 = kv_head * SHARING + round * TOGETHER, heads = min(TOGETHER, SHARING - round * TOGETHER);
        const int turns = (max(span.end - span.begin, 0) + BATCH_KEYS * KEYS_A_TURN - 1) / (BATCH_KEYS * KEYS_A_TURN);
        const int element = (b.lane % LANES) * 8;
        float q[TOGETHER][8] = {};
        Running run = {};
#pragma unroll
        for (int h = 0; h < TOGETHER; ++h) run.top[h] = FLOOR;
        for (int turn = 0; turn < turns + fresh; ++turn) {
            Keys keys;
            fetch(b, layer, m, kv_head, span, turn, keys);   // older keys do not wait for the queries
            if (waiting) grid_wait(b), waiting = false;
            if (turn == 0) {
#pragma unroll
                for (int h = 0; h < TOGETHER; ++h)
                    if (h < heads && element < HEAD_DIM)
                        receive8(b, QUERIES, (size_t)m * Q_SIZE + (head0 + h) * HEAD_DIM + element, q[h]);
            }
            if (turn == turns && b.warp == 0 && b.lane / LANES == 0 && element < HEAD_DIM) fetch_newest(b, layer, m, kv_head, keys);
            take(b, keys, q, m, head0, span, turn, turns, turn == turns ? span.end + 1 : span.end, run);
        }
        meet(b, run, m, head0, heads, split);
    }
    if (waiting) grid_wait(b);
}

// Phase 3's x: the splits of every head put together, 16-bit, in shared memory.
__device__ __forceinline__ void stage_attention(Block& b, int layer) {
    constexpr int VECTOR = M * Q_SIZE / 2, AT_ONCE = FLAGGED ? 2 : 8, FOUR = FLAGGED ? 2 : 1;
    const int splits = splits_of(b, (int)b.table[POINTERS + layer * LAYER_POINTERS + WINDOW]);
    for (int base = 0; base < VECTOR; base += AT_ONCE * THREADS) {
        float top[AT_ONCE], total[AT_ONCE], x[AT_ONCE], y[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) top[i] = FLOOR, total[i] = x[i] = y[i] = 0.f;
        for (int split0 = 0; split0 < splits; split0 += FOUR) {
            Words sums[AT_ONCE][FOUR], facts[AT_ONCE][FOUR];
            await_all([&] {
                bool all = true;
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) {
                    const int pair = min(base + i * THREADS + b.thread, VECTOR - 1), row = 2 * pair / HEAD_DIM;
                    const size_t at = ((size_t)row * MAX_SPLITS + split0) * PARTIAL;
#pragma unroll
                    for (int s = 0; s < FOUR; ++s) {
                        if (split0 + s >= splits) continue;
                        sums[i][s] = peek2(b, PARTIALS, at + s * PARTIAL + 2 * pair % HEAD_DIM);
                        facts[i][s] = peek2(b, PARTIALS, at + s * PARTIAL + HEAD_DIM);
                    }
                }
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
                    for (int s = 0; s < FOUR; ++s)
                        if (split0 + s < splits) all &= arrived(b, sums[i][s]) && arrived(b, facts[i][s]);
                return all;
            });
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
#pragma unroll
                for (int s = 0; s < FOUR; ++s) {
                    if (split0 + s >= splits) continue;
                    const float2 v = floats_of(sums[i][s]), f = floats_of(facts[i][s]);
                    const float high = fmaxf(top[i], f.x), mine = exp2f(top[i] - high), theirs = exp2f(f.x - high);
                    top[i] = high, total[i] = total[i] * mine + f.y * theirs;
                    x[i] = x[i] * mine + v.x * theirs, y[i] = y[i] * mine + v.y * theirs;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int pair = base + i * THREADS + b.thread;
            if (pair >= VECTOR) continue;
            const int m = 2 * pair / Q_SIZE, k = 2 * pair % Q_SIZE;
            const float scale = 1.f / total[i];
            *(u32*)(b.staged_ptr + m * staged_pitch(Q_SIZE) + 2 * k) = narrow2(x[i] * scale, y[i] * scale);
        }
    }
}
