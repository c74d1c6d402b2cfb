// Attention of one new token a row over the paged cache, split along the keys where that fills more blocks.
//
// A block takes a (row, query heads on one KV head, split). LANES lanes hold one key, eight elements each; every such lane group
// keeps its own running maximum, denominator and sums, and they meet at the end. While there are blocks enough, each query head
// has one of its own; else up to four heads on one KV head share what is read.
#pragma once

constexpr int LANES = HEAD_DIM <= 8 ? 1 : HEAD_DIM <= 16 ? 2 : HEAD_DIM <= 32 ? 4 : HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32;
constexpr int TOGETHER = M * HEADS <= BLOCKS ? 1 : smaller(SHARING, 4), ROUNDS = ceil_div(SHARING, TOGETHER);
constexpr int BATCH_KEYS = TOGETHER <= 2 ? 8 : 4;   // keys of a lane group at a time
constexpr int KEYS_A_WARP = 32 / LANES, KEYS_A_TURN = WARPS * KEYS_A_WARP * BATCH_KEYS;
constexpr int WHOLE = M * KV_HEADS * ROUNDS;        // blocks' worth of work without splits
constexpr int ROOM = WHOLE < BLOCKS ? smaller(BLOCKS / WHOLE, MAX_SPLITS) : 1;
constexpr int LEAST_SPLIT = 2 * KEYS_A_TURN;        // a further turn costs less than handing partial sums on
constexpr float FLOOR = -1e30f, LOG2E = 1.4426950408889634f;
constexpr int ATTENTION_FLOATS = WARPS * TOGETHER * PARTIAL;

__device__ __forceinline__ int window_start(int position, int window) { return window > 0 ? max(0, position + 1 - window) : 0; }

// Into how many splits each row's keys go in this layer: the same in every block.
__device__ __forceinline__ int splits_of(const int* positions, int window) {
    if (ROOM == 1) return 1;
    int longest = 1;
    for (int m = 0; m < M; ++m) longest = max(longest, positions[m] + 1 - window_start(positions[m], window));
    return min(ROOM, ceil_div(longest, LEAST_SPLIT));
}

// Where in the pools a token of row m lies, in tokens.
__device__ __forceinline__ u32 pool_slot(const Block& b, int m, int token) {
    const u32 page = __ldg((const u32*)b.entry(BLOCK_TABLE) + m * (u32)b.entry(PAGES_A_ROW) + (u32)token / PAGE_SIZE);
    return page * PAGE_SIZE + (u32)token % PAGE_SIZE;
}

// One block's piece of work: keys in slots [0, slots) of the split. Where `fresh`, slot 0 is the newest token, whose key and value
// come from the blocks that compute them in this very step; the other slots are older tokens from `begin` on.
struct Piece {
    int m, kv_head, head0, heads, split, begin, slots, fresh;

    __device__ __forceinline__ int token(int slot, int newest) const { return fresh && slot == 0 ? newest : begin + slot - fresh; }
};

__device__ __forceinline__ Piece piece_of(const int* positions, int item, int window, int splits) {
    const int rest = item % WHOLE, round = rest % ROUNDS;
    Piece p;
    p.m = rest / ROUNDS / KV_HEADS, p.kv_head = rest / ROUNDS % KV_HEADS, p.split = item / WHOLE;
    p.head0 = p.kv_head * SHARING + round * TOGETHER, p.heads = min(TOGETHER, SHARING - round * TOGETHER);
    const int low = window_start(positions[p.m], window), context = positions[p.m] + 1;
    // At least the ceiling of the quotient (floats round); what is over at the end is cut off.
    const int per = splits == 1 ? context - low : (int)__fdiv_rn((float)(context - low + splits - 1), (float)splits);
    p.begin = low + p.split * per;
    const int end = min(p.begin + per, context);
    p.slots = max(end - p.begin, 0), p.fresh = p.slots > 0 && end == context;
    return p;
}

struct Keys {
    uint4 k[BATCH_KEYS], v[BATCH_KEYS];
    u32 slot[BATCH_KEYS];   // of the pools
};

// Which slot this lane group's i-th key of a turn is.
__device__ __forceinline__ int slot_of(const Block& b, int turn, int i) {
    return (turn * BATCH_KEYS + i) * (WARPS * KEYS_A_WARP) + b.warp * KEYS_A_WARP + b.lane / LANES;
}

// Where a turn's keys lie. A slot that is not there reads another's.
__device__ __forceinline__ void locate(const Block& b, const Piece& p, int turn, Keys& keys) {
    const int newest = b.positions()[p.m];
#pragma unroll
    for (int i = 0; i < BATCH_KEYS; ++i) {
        const int older = min(slot_of(b, turn, i), p.slots - 1) - p.fresh;
        keys.slot[i] = pool_slot(b, p.m, min(p.begin + max(older, 0), newest));
    }
}

__device__ __forceinline__ void fetch(const Block& b, int layer, LayerPointer pool, const Piece& p, const u32* slot, uint4* to) {
    const u16* from = b.layer_weight(layer, pool) + p.kv_head * HEAD_DIM + min((b.lane % LANES) * 8, HEAD_DIM - 8);
#pragma unroll
    for (int i = 0; i < BATCH_KEYS; ++i) to[i] = load_l2(from + (size_t)slot[i] * KV_SIZE);
}

// The queries, and in the first lane group the newest key and value: awaited together.
__device__ __forceinline__ void receive(const Block& b, const Piece& p, Keys& keys, uint4* queries) {
    const int element = (b.lane % LANES) * 8;
    if (element >= HEAD_DIM) {   // zeros by what may be no number are no zeros
        keys.k[0] = make_uint4(0, 0, 0, 0);
        return;
    }
    const u32* from = FreshExchange::incoming(b) + (p.m * QKV_SIZE + element) / 2;
    const bool newest = p.fresh && b.warp == 0 && b.lane < LANES;
    const u32* fresh = from + (Q_SIZE + p.kv_head * HEAD_DIM) / 2;
    uint4 k, v;
    await_all([&] {
        bool all = true;
#pragma unroll
        for (int h = 0; h < TOGETHER; ++h) queries[h] = peek4(from + (p.head0 + min(h, p.heads - 1)) * (HEAD_DIM / 2));
        if (newest) k = peek4(fresh), v = peek4(fresh + KV_SIZE / 2), all = arrived(k) && arrived(v);
#pragma unroll
        for (int h = 0; h < TOGETHER; ++h) all &= arrived(queries[h]);
        return all;
    });
    if (newest) keys.k[0] = k, keys.v[0] = v;
}

struct Running {
    float top[TOGETHER], total[TOGETHER], sums[TOGETHER][8];
};

__device__ __forceinline__ float scored(const Block& b, float dot, int head, int distance) {
    float s = dot * ATTENTION_SCALE;
    if (ATTENTION_SOFTCAP > 0.f) s = ATTENTION_SOFTCAP * tanhf(s / ATTENTION_SOFTCAP);
    if (ALIBI) s -= __ldg((const float*)b.entry(SLOPES) + min(head, HEADS - 1)) * distance;
    return s * LOG2E;
}

// A turn's scores, in every lane of a group.
__device__ __forceinline__ void score(
    const Block& b, const uint4* keys, const float (*q)[8], const Piece& p, int turn, float (*scores)[TOGETHER]) {
    const int newest = b.positions()[p.m];
#pragma unroll
    for (int i = 0; i < BATCH_KEYS; ++i) {
        float k[8];
        widen8(keys[i], k);
#pragma unroll
        for (int h = 0; h < TOGETHER; ++h) {
            float even = 0.f, odd = 0.f;
#pragma unroll
            for (int e = 0; e < 8; e += 2) even += q[h][e] * k[e], odd += q[h][e + 1] * k[e + 1];
            scores[i][h] = even + odd;
        }
    }
#pragma unroll
    for (int step = LANES / 2; step; step >>= 1)
#pragma unroll
        for (int i = 0; i < BATCH_KEYS; ++i)
#pragma unroll
            for (int h = 0; h < TOGETHER; ++h) scores[i][h] += __shfl_xor_sync(~0u, scores[i][h], step);
#pragma unroll
    for (int i = 0; i < BATCH_KEYS; ++i) {
        const int slot = slot_of(b, turn, i);
#pragma unroll
        for (int h = 0; h < TOGETHER; ++h)
            scores[i][h] = slot < p.slots ? scored(b, scores[i][h], p.head0 + h, newest - p.token(slot, newest)) : __int_as_float(0xff800000);
    }
}

// Takes a turn's values into the running sums.
__device__ __forceinline__ void take(const Block& b, const uint4* values, float (*scores)[TOGETHER], const Piece& p, int turn, Running& run) {
#pragma unroll
    for (int h = 0; h < TOGETHER; ++h) {
        float top = run.top[h];
#pragma unroll
        for (int i = 0; i < BATCH_KEYS; ++i) top = fmaxf(top, scores[i][h]);
        const float keep = exp2f(run.top[h] - top);
        run.top[h] = top, run.total[h] *= keep;
#pragma unroll
        for (int e = 0; e < 8; ++e) run.sums[h][e] *= keep;
    }
#pragma unroll
    for (int i = 0; i < BATCH_KEYS; ++i) {
        if (slot_of(b, turn, i) >= p.slots) continue;   // what was read there may be no number
        float v[8];
        widen8(values[i], v);
#pragma unroll
        for (int h = 0; h < TOGETHER; ++h) {
            const float share = exp2f(scores[i][h] - run.top[h]);
            run.total[h] += share;
#pragma unroll
            for (int e = 0; e < 8; ++e) run.sums[h][e] += share * v[e];
        }
    }
}

// The lane groups of a warp meet: the result goes to the warp's part of the scratch memory.
__device__ __forceinline__ void meet_in_warp(Block& b, Running& run) {
#pragma unroll
    for (int h = 0; h < TOGETHER; ++h) {
        float top = run.top[h];
#pragma unroll
        for (int step = LANES; step < 32; step <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
        const float keep = exp2f(run.top[h] - top);
        float values[9];
#pragma unroll
        for (int e = 0; e < 8; ++e) values[e] = run.sums[h][e] * keep;
        values[8] = run.total[h] * keep;
#pragma unroll
        for (int step = LANES; step < 32; step <<= 1)
#pragma unroll
            for (int e = 0; e < 9; ++e) values[e] += __shfl_xor_sync(~0u, values[e], step);
        if (b.lane < LANES && b.lane * 8 < HEAD_DIM) {
            float* out = (float*)b.staged() + (b.warp * TOGETHER + h) * PARTIAL;
            *(float4*)(out + b.lane * 8) = make_float4(values[0], values[1], values[2], values[3]);
            *(float4*)(out + b.lane * 8 + 4) = make_float4(values[4], values[5], values[6], values[7]);
            if (b.lane == 0) *(float2*)(out + HEAD_DIM) = make_float2(top, values[8]);
        }
    }
}

// Two elements of a head's output on the way: not yet divided by `total`.
struct Output {
    float top, total, x, y;

    __device__ __forceinline__ void add(float2 facts, float2 sums) {
        const float high = fmaxf(top, facts.x), mine = exp2f(top - high), theirs = exp2f(facts.x - high);
        top = high, total = total * mine + facts.y * theirs;
        x = x * mine + sums.x * theirs, y = y * mine + sums.y * theirs;
    }
};

__device__ __forceinline__ int partial_at(int m, int head, int split) { return ((m * HEADS + head) * MAX_SPLITS + split) * PARTIAL; }

// The other splits of a head, which other blocks compute.
__device__ __forceinline__ void add_splits(const Block& b, int m, int head, int e, int splits, Output& out) {
    const u32* from = PartialExchange::incoming(b);
    constexpr int AT_ONCE = 4;
    for (int split0 = 1; split0 < splits; split0 += AT_ONCE) {
        uint2 facts[AT_ONCE], sums[AT_ONCE];
        await_all([&] {
            u32 most = 0;
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const u32* part = from + partial_at(m, head, min(split0 + i, splits - 1));
                facts[i] = peek2(part + HEAD_DIM), sums[i] = peek2(part + e);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) most = max(max(most, max(facts[i].x, facts[i].y)), max(sums[i].x, sums[i].y));
            return most != NOTHING;
        });
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (split0 + i < splits)
                out.add(make_float2(__uint_as_float(facts[i].x), __uint_as_float(facts[i].y)),
                        make_float2(__uint_as_float(sums[i].x), __uint_as_float(sums[i].y)));
    }
}

// The warps meet. The first split adds what the others send it, and tells everybody.
__device__ __forceinline__ void meet(Block& b, const Piece& p, int splits) {
    constexpr int PAIRS = HEAD_DIM / 2;
    for (int i = b.thread; i < p.heads * PAIRS; i += THREADS) {
        const int h = i / PAIRS, e = 2 * (i % PAIRS), head = p.head0 + h;
        const float* part = (float*)b.staged() + h * PARTIAL;
        float2 facts[WARPS];
        Output out = {FLOOR, 0.f, 0.f, 0.f};
#pragma unroll
        for (int w = 0; w < WARPS; ++w) facts[w] = *(const float2*)(part + w * TOGETHER * PARTIAL + HEAD_DIM), out.top = fmaxf(out.top, facts[w].x);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float2 sums = *(const float2*)(part + w * TOGETHER * PARTIAL + e);
            const float keep = exp2f(facts[w].x - out.top);
            out.total += facts[w].y * keep, out.x += sums.x * keep, out.y += sums.y * keep;
        }
        if (p.split > 0) {
            const int at = partial_at(p.m, head, p.split);
            PartialExchange::put(b, at + e, out.x), PartialExchange::put(b, at + e + 1, out.y);
            if (e == 0) PartialExchange::put(b, at + HEAD_DIM, out.top), PartialExchange::put(b, at + HEAD_DIM + 1, out.total);
            continue;
        }
        if (ROOM > 1 && splits > 1) add_splits(b, p.m, head, e, splits, out);
        const float scale = 1.f / out.total;
        AttendedExchange::put(b, (p.m * Q_SIZE + head * HEAD_DIM + e) / 2, narrow2(out.x * scale, out.y * scale));
    }
}

// What a split sent in the layer before is blanked by who sent it, also where this layer has fewer splits.
__device__ __forceinline__ void blank_partials(const Block& b, int window) {
    const Piece p = piece_of(b.positions(), b.id, window, 1);
    u32* last = PartialExchange::buffer(b, (b.turns >> LAYER_TURN) ^ 1, 0);
    for (int i = b.thread; i < p.heads * PARTIAL; i += THREADS)
        put_word(last + partial_at(p.m, p.head0 + i / PARTIAL, p.split) + i % PARTIAL, NOTHING);
}

// The helping warp, a layer ahead: this block's older keys and values from memory to L2, a line of 128 bytes at a time.
__device__ __forceinline__ void prefetch_keys(const Block& b, int layer) {
    constexpr int LINES = ceil_div(HEAD_DIM * 2, 128);
    const int* positions = b.positions_ahead();
    const int window = (int)b.entry(POINTERS + layer * LAYER_POINTERS + WINDOW), splits = splits_of(positions, window);
    for (int item = b.id; item < WHOLE * splits; item += BLOCKS) {
        const Piece p = piece_of(positions, item, window, splits);
        const u16* pool_k = b.layer_weight(layer, KEYS) + p.kv_head * HEAD_DIM;
        const u16* pool_v = b.layer_weight(layer, VALUES) + p.kv_head * HEAD_DIM;
        for (int i = b.lane; i < (p.slots - p.fresh) * LINES; i += 32) {
            const size_t at = (size_t)pool_slot(b, p.m, p.begin + i / LINES) * KV_SIZE + i % LINES * 64;
            prefetch_l2(pool_k + at), prefetch_l2(pool_v + at);
        }
    }
}

// Phase 2. Older keys and values are on their way before the queries are waited for.
__device__ __forceinline__ void attend(Block& b, int layer) {
    const int window = (int)b.entry(POINTERS + layer * LAYER_POINTERS + WINDOW), splits = splits_of(b.positions(), window);
    if (ROOM > 1 && b.id >= WHOLE * splits && b.id < WHOLE * ROOM) blank_partials(b, window);
#pragma unroll 1
    for (int item = b.id; item < WHOLE * splits; item += BLOCKS) {
        const Piece p = piece_of(b.positions(), item, window, splits);
        const int turns = max(ceil_div(p.slots, KEYS_A_TURN), 1);
        Keys keys;
        locate(b, p, 0, keys);
        fetch(b, layer, KEYS, p, keys.slot, keys.k);
        fetch(b, layer, VALUES, p, keys.slot, keys.v);
        uint4 queries[TOGETHER] = {};
        receive(b, p, keys, queries);
        float q[TOGETHER][8];
        Running run = {};
#pragma unroll
        for (int h = 0; h < TOGETHER; ++h) run.top[h] = FLOOR, widen8(queries[h], q[h]);
#pragma unroll 1
        for (int turn = 0; turn < turns; ++turn) {   // the next turn's keys come while this one's values are taken
            float scores[BATCH_KEYS][TOGETHER];
            const bool more = turn + 1 < turns;
            score(b, keys.k, q, p, turn, scores);
            if (more) locate(b, p, turn + 1, keys), fetch(b, layer, KEYS, p, keys.slot, keys.k);
            take(b, keys.v, scores, p, turn, run);
            if (more) fetch(b, layer, VALUES, p, keys.slot, keys.v);
        }
        meet_in_warp(b, run);
        consumers_sync();
        meet(b, p, splits);
        consumers_sync();   // the scratch memory is free
    }
}
