// y = x W^T for a few rows of x, the weight streamed through a ring in shared memory by one warp that never waits for
// anything but room: it runs ahead over the phases of a layer, over layers and over tokens, so that memory is never idle.
//
// The stages of a group come columns first, then tiles, so that what a warp has read of x serves all tiles of the group. The
// warps share a stage's columns by blocks of 32, and add up their sums at the end of a group. In a block of 32 columns lane
// (quad, place) reads 16 bytes, words w0 to w3, of row `quad` at column 8 * place. These are not the columns that m16n8k16 means,
// but x is read in the same order, and a sum does not mind.
//
// Up to 8 tokens the four words are operand A as they are: the instruction takes w0 and w2 for row `quad`, w1 and w3 for row
// `quad + 8`. With x0 and x2 as B it gives the first half of the sum in row `quad`, with x1 and x3 the second half in row
// `quad + 8`; what it puts into the other row each time is not looked at. No register is moved. x lies in shared memory in the
// order x0 x2 x1 x3. From 9 tokens on the tokens are A's 16 rows.
#pragma once

template <int KIND>
__device__ __forceinline__ const u16* weight_of(const Block& b, int layer) {
    if (KIND == HEAD) return b.weight(HEAD_WEIGHT);
    return b.layer_weight(layer, KIND == QKV ? QKV_WEIGHT : KIND == OUT ? OUT_WEIGHT : KIND == UP ? UP_WEIGHT : DOWN_WEIGHT);
}

// Before a stage is asked for, all but the last few must have come: more would come no sooner, and whatever blocks send each other
// meanwhile would stand in line behind them.
__device__ __forceinline__ void await_arrivals(const Block& b) {
    if (IN_FLIGHT >= STAGES) return;
    const bool wraps = b.stage < IN_FLIGHT;   // the first round's waits end at once: those barriers' phases before were even
    barrier_wait(b.address(FULL_AT) + 8 * (wraps ? b.stage + STAGES - IN_FLIGHT : b.stage - IN_FLIGHT), b.parity ^ wraps);
}

// Every stage of one product that this block needs, in order: each(from, rows, bytes, pitch), where `from` is the lane's row.
template <int KIND, class Each>
__device__ __forceinline__ void walk(const Block& b, int layer, Each each) {
    using P = Product<KIND>;
    const u16* weight = weight_of<KIND>(b, layer);
    const int first = P::first(b.id), last = P::first(b.id + 1);
#pragma unroll 1
    for (int unit0 = first; unit0 < last; unit0 += P::PER) {
        const int rows = min(P::PER, last - unit0) * P::UNIT;
#pragma unroll 1
        for (int k = 0; k < P::K; k += P::COLUMNS) {
#pragma unroll 1
            for (int row0 = 0; row0 < rows; row0 += P::TALL) {
                const int row = row0 + b.lane;
                each(weight + (size_t)P::row(unit0 + row / P::UNIT, row % P::UNIT) * P::K + k, min(P::TALL, rows - row0),
                     2 * min(P::COLUMNS, P::K - k), P::PITCH);
            }
        }
    }
}

template <class Each>
__device__ __forceinline__ void walk_all(const Block& b, int steps, Each each) {
    for (; steps; --steps) {
#pragma unroll 1
        for (int layer = 0; layer < LAYERS; ++layer) {
            walk<QKV>(b, layer, each);
            walk<OUT>(b, layer, each);
            walk<UP>(b, layer, each);
            walk<DOWN>(b, layer, each);
        }
        walk<HEAD>(b, 0, each);
    }
}

// The feeding warp: from memory, or from L2 where the scout has brought it there, into the ring.
__device__ __forceinline__ void feed_all(Block& b, int steps) {
    const u64 policy = read_once_policy();
    u32 fed = 0;
    walk_all(b, steps, [&](const u16* from, int rows, u32 bytes, int pitch) {
        const u32 full = b.address(FULL_AT) + 8 * b.stage;
        await_arrivals(b);
        barrier_wait(b.address(EMPTY_AT) + 8 * b.stage, b.parity ^ 1);
        if (b.lane == 0) barrier_expect(full, rows * bytes);
        __syncwarp();
        if (b.lane < rows) bulk_copy(b.address(0) + b.stage * STAGE_BYTES + b.lane * pitch, from, bytes, full, policy);
        if (AHEAD && b.lane == 0) b.fed() = ++fed;
        b.next_stage();
    });
}

// The scout: a few stages ahead of the feeding warp, from memory into L2. What it asks for does not come back to the
// multiprocessor, so what blocks send each other meanwhile does not stand in line behind it.
__device__ __forceinline__ void scout_all(const Block& b, int steps) {
    if (!AHEAD) return;
    u32 seen = 0;
    walk_all(b, steps, [&](const u16* from, int rows, u32 bytes, int) {
        ++seen;
        u32 fed;
        while ((int)(seen - (fed = b.fed())) > AHEAD) __nanosleep(100);
        if (b.lane < rows && (int)(seen - fed) > 0) bulk_prefetch(from, bytes);
    });
}

struct Fragment {
    uint4 low, high;   // 8 columns of token `quad`, and of token `quad + 8`
};

// Eight columns of x in the order in which products() takes them.
__device__ __forceinline__ uint4 in_order(uint4 v) { return M > 8 ? v : make_uint4(v.x, v.z, v.y, v.w); }

// x from where it is staged. Lanes of tokens that are not there read some that are: their products are never looked at.
template <int KIND>
__device__ __forceinline__ Fragment staged_fragment(const Block& b, int k) {
    constexpr int PITCH = pitch_of(Product<KIND>::K);
    const u32 at = b.address(STAGED_AT) + b.quad % M * PITCH + 16 * b.place + 2 * k;
    return {load_shared(at), M > 8 ? load_shared(at + 8 * PITCH) : make_uint4(0, 0, 0, 0)};
}

// x from L2, as it is found there: not all of it may have arrived.
__device__ __forceinline__ Fragment direct_fragment(const Block& b, int k) {
    const u32* x = ActivationExchange::incoming(b) + b.quad % M * (FFN / 2) + k / 2 + 4 * b.place;
    if (k + 8 * b.place >= FFN) return {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
    return {peek4(x), M > 8 ? peek4(x + 8 * (FFN / 2)) : make_uint4(0, 0, 0, 0)};
}

// The i-th block of 32 columns that this warp takes of the COLUMNS at k0; they go round, so that every warp gets its share of a
// long row. Where there is none it is another one, and x counts as zero: a product costs less than a branch around it.
struct Pick {
    int block;
    bool counts;
};

template <int KIND>
__device__ __forceinline__ Pick pick(const Block& b, int k0, int i) {
    using P = Product<KIND>;
    constexpr int REST = P::K % P::COLUMNS, LEAST = ceil_div(REST ? REST : P::COLUMNS, 32);
    const int block = ((b.warp - k0 / 32) & (WARPS - 1)) + i * WARPS;
    if (i * WARPS + WARPS <= LEAST) return {block, true};
    const int end = REST ? ceil_div(min(P::COLUMNS, P::K - k0), 32) : P::COLUMNS / 32;
    return {min(block, end - 1), block < end};
}

template <int KIND>
__device__ __forceinline__ void load_x(const Block& b, int k0, Fragment* x) {
    using P = Product<KIND>;
#pragma unroll
    for (int i = 0; i < P::BLOCKS_A_WARP; ++i) {
        const Pick p = pick<KIND>(b, k0, i);
        x[i] = P::DIRECT ? direct_fragment(b, k0 + 32 * p.block) : staged_fragment<KIND>(b, k0 + 32 * p.block);
        if (!p.counts) x[i].low = x[i].high = make_uint4(0, 0, 0, 0);
    }
}

// Asks again for what had not arrived, all of it at a time, and brings the columns in order.
template <int KIND>
__device__ __forceinline__ void await_x(const Block& b, int k0, Fragment* x) {
    using P = Product<KIND>;
    Watchdog dog;
    while (true) {
        bool all = true;
#pragma unroll
        for (int i = 0; i < P::BLOCKS_A_WARP; ++i) all &= arrived(x[i].low) && arrived(x[i].high);
        if (all) break;
        dog.tick();
        load_x<KIND>(b, k0, x);
    }
#pragma unroll
    for (int i = 0; i < P::BLOCKS_A_WARP; ++i) x[i].low = in_order(x[i].low);
}

// ---- the ring, as the consuming warps see it: several stages at a time, each lane waits for one or gives one back ----

__device__ __forceinline__ u32 stage_behind(const Block& b, int n) { return b.stage + n >= STAGES ? b.stage + n - STAGES : b.stage + n; }

__device__ __forceinline__ void await_stages(const Block& b, int count) {
    const int n = min(b.lane, count - 1);
    barrier_wait(b.address(FULL_AT) + 8 * stage_behind(b, n), b.parity ^ (b.stage + n >= STAGES));
    __syncwarp();
}

__device__ __forceinline__ void give_back(const Block& b, u32 first, int count) {
    const u32 n = first + b.lane;
    if (b.lane < count) barrier_arrive(b.address(EMPTY_AT) + 8 * (n >= STAGES ? n - STAGES : n));
}

// Gives back what was read of the products before. Where a layer fits in the ring there is no hurry, and the refill is kept out
// of the way of what blocks send each other, which would stand in line behind it: so this is called when x has come.
__device__ __forceinline__ void return_stages(Block& b) {
    if (!DEFER) return;
    give_back(b, stage_behind(b, STAGES - b.owed), b.owed);
    b.owed = 0;
}

template <int KIND>
__device__ __forceinline__ void end_stages(Block& b, int count) {
    __syncwarp();
    if (Product<KIND>::DEFERRED) b.owed += count;
    else give_back(b, b.stage, count);
    b.stage += count;
    if (b.stage >= STAGES) b.stage -= STAGES, b.parity ^= 1;
}

// One product of 32 columns: its halves go to sums of their own, for shorter chains.
__device__ __forceinline__ void products(const Fragment& x, uint4 w, float (*sums)[4]) {
    if (M > 8) {
        mma(sums[0], x.low.x, x.high.x, x.low.y, x.high.y, w.x, w.y);
        mma(sums[1], x.low.z, x.high.z, x.low.w, x.high.w, w.z, w.w);
    } else {
        mma(sums[0], w.x, w.y, w.z, w.w, x.low.x, x.low.y);
        mma(sums[1], w.x, w.y, w.z, w.w, x.low.z, x.low.w);
    }
}

// All tiles of a group by the columns at k0. A short group's missing tiles are multiplied too, whatever lies in their place.
template <int KIND>
__device__ __forceinline__ void multiply_columns(Block& b, int k0, int tiles, const Fragment* x, float (*sums)[2][4]) {
    using P = Product<KIND>;
    const u32 lane_at = b.address(0) + min(b.quad, P::TALL - 1) * P::PITCH + 16 * b.place;
    uint4 w[P::TILES][P::BLOCKS_A_WARP];
    await_stages(b, tiles);
#pragma unroll
    for (int tile = 0; tile < P::TILES; ++tile) {
        const u32 at = lane_at + stage_behind(b, tile) * STAGE_BYTES;
#pragma unroll
        for (int i = 0; i < P::BLOCKS_A_WARP; ++i) {
            const int block = pick<KIND>(b, k0, i).block;
            w[tile][i] = load_shared(at + 64 * block);
            if (P::K % 32 && k0 + 32 * block + 8 * b.place >= P::K) w[tile][i] = make_uint4(0, 0, 0, 0);
        }
    }
    end_stages<KIND>(b, tiles);
#pragma unroll
    for (int i = 0; i < P::BLOCKS_A_WARP; ++i)
#pragma unroll
        for (int tile = 0; tile < P::TILES; ++tile) products(x[i], w[tile][i], sums[tile]);
}

// A warp's sums to [M][GROUP_ROWS], row after row without a gap between tiles.
template <int KIND>
__device__ __forceinline__ void store_sums(const Block& b, const float (*sums)[2][4], float* to) {
    using P = Product<KIND>;
#pragma unroll
    for (int tile = 0; tile < P::TILES; ++tile)
#pragma unroll
        for (int i = 0; i < (M > 8 ? 4 : 2); ++i) {
            const int row = M > 8 ? 2 * b.place + i % 2 : b.quad, token = M > 8 ? b.quad + i / 2 * 8 : 2 * b.place + i;
            const float sum = sums[tile][0][i] + sums[tile][1][M > 8 ? i : i + 2];
            if (row < P::TALL && token < M) to[token * GROUP_ROWS + P::TALL * tile + row] = sum;
        }
}

// A product, group by group; `finish(item, m, unit, sums)` gets the sums of one unit's rows (up to 4) for token m.
template <int KIND, class Finish>
__device__ __forceinline__ void multiply(Block& b, Finish finish) {
    using P = Product<KIND>;
    constexpr int SLOTS = GROUP_ROWS / P::UNIT, ITEMS = ceil_div(M * SLOTS, THREADS);
    const int last = P::first(b.id + 1);
#pragma unroll 1
    for (int unit0 = P::first(b.id); unit0 < last; unit0 += P::PER) {
        const int units = min(P::PER, last - unit0), tiles = ceil_div(units * P::UNIT, P::TALL);
        float* red = b.red() + b.red_turn * (WARPS * M * GROUP_ROWS);
        if (RED_BUFFERS == 2) b.red_turn ^= 1;
        else consumers_sync();   // the sums of the group before have been read
        float sums[P::TILES][2][4] = {};
        Fragment x[P::BLOCKS_A_WARP], next[P::DIRECT ? P::BLOCKS_A_WARP : 1];
        if (P::DIRECT) load_x<KIND>(b, 0, x);
#pragma unroll 1
        for (int k0 = 0; k0 < P::K; k0 += P::COLUMNS) {
            if (!P::DIRECT) load_x<KIND>(b, k0, x);
            else {
                await_x<KIND>(b, k0, x);
                if (k0 + P::COLUMNS < P::K) load_x<KIND>(b, k0 + P::COLUMNS, next);
            }
            multiply_columns<KIND>(b, k0, tiles, x, sums);
            if (P::DIRECT)
#pragma unroll
                for (int i = 0; i < P::BLOCKS_A_WARP; ++i) x[i] = next[i];
        }
        store_sums<KIND>(b, sums, red + b.warp * M * GROUP_ROWS);
        consumers_sync();
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int item = b.thread + i * THREADS, m = item / SLOTS, unit = item % SLOTS;
            if (m >= M || unit >= units) continue;
            float total[4] = {};
            const float* from = red + m * GROUP_ROWS + unit * P::UNIT;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp)
#pragma unroll
                for (int row = 0; row < P::UNIT; ++row) total[row] += from[warp * M * GROUP_ROWS + row];
            finish(i, m, unit0 + unit, total);
        }
    }
}
