// y = x W^T for a few rows of x, the weight streamed through a ring in shared memory by one warp that never waits for
// anything but room: it runs ahead over the phases of a layer, over layers and over tokens, so that memory is never idle.
//
// A block owns consecutive *units* of output rows (one row; a rotary pair; a gate with its up), takes them in groups of up to
// GROUP_ROWS rows, and those in tiles of 8. A stage of the ring holds the same columns of a tile's rows; the warps share a
// stage's columns by blocks of 32, and add up their sums at the end of a group. In a block of 32 columns lane (quad, place)
// reads 16 bytes of row `quad` at column 8 * place: as a fragment of two m16n8k16 products these are not the columns that the
// instruction means, but x is read in the same order, and a sum does not mind.
#pragma once

__device__ __forceinline__ Slab slab_of(const Block& b, int kind) {
    const Shape shape = shape_of(kind);
    Slab s;
    s.first = (u32)(b.id * shape.units) / BLOCKS;
    s.units = (u32)((b.id + 1) * shape.units) / BLOCKS - s.first;
    s.groups = (s.units * shape.unit + GROUP_ROWS - 1) / GROUP_ROWS;
    s.per = s.groups ? (s.units + s.groups - 1) / s.groups : 0;
    return s;
}

// Few equal stages a row, since a bulk copy costs the same whatever its length; a pitch that is odd in units of 64 bytes
// keeps two rows out of each other's banks.
__device__ __forceinline__ Cut cut_of(int kind, int rows) {
    const int k = shape_of(kind).k;
    int most = ((STAGE_BYTES / (u32)rows - 64) / 2) & ~31;
    if (DOWN_DIRECT && kind == DOWN) most = min(most, DIRECT_COLUMNS);
    const u32 stages = (u32)(k + most - 1) / (u32)most;
    const int columns = ((u32)(k + stages - 1) / stages + 31) & ~31;
    return {columns, 2 * columns + (columns % 64 ? 0 : 64)};
}

// Once a launch, into shared memory: a division by what is not constant takes hundreds of cycles, and every tile would need
// three.
__device__ __forceinline__ void tabulate(Block& b) {
    if (b.thread < 5) b.slabs[b.thread] = slab_of(b, b.thread);
    if (b.thread >= 32 && b.thread < 32 + 45) {
        const int i = b.thread - 32;
        b.cuts[i] = i % 9 ? cut_of(i / 9, i % 9) : Cut{0, 0};
    }
}

// Which row of the weight is the i-th of a unit.
__device__ __forceinline__ int row_of(int kind, int unit, int i) {
    if (kind == QKV) {   // pairs that rotary embedding turns together; without it, neighbours
        const int head = unit / (HEAD_DIM / 2), j = unit % (HEAD_DIM / 2);
        const bool halves = ROTARY_DIM > 0 && !ROTARY_INTERLEAVED && j < ROTARY_DIM / 2;
        return head * HEAD_DIM + (halves ? j + i * (ROTARY_DIM / 2) : 2 * j + i);
    }
    if (kind == UP) return GATED ? (i / 2) * FFN + 2 * unit + i % 2 : 2 * unit + i;
    return unit;
}

__device__ __forceinline__ const u16* weight_of(const Block& b, int kind, int layer) {
    if (kind == HEAD) return b.weight(HEAD_WEIGHT);
    return b.layer_weight(layer, kind == QKV ? QKV_WEIGHT : kind == OUT ? OUT_WEIGHT : kind == UP ? UP_WEIGHT : DOWN_WEIGHT);
}

// The feeding warp.
__device__ __forceinline__ void feed_all(Block& b, int steps) {
    const u64 policy = read_once_policy();
    for (int product = 0, left = steps; left; product = product == 4 * LAYERS ? left -= 1, 0 : product + 1) {
        const int kind = product == 4 * LAYERS ? HEAD : product % 4;
        const Shape shape = shape_of(kind);
        const Slab s = b.slabs[kind];
        const int unit_shift = shape.unit == 4 ? 2 : shape.unit - 1;
        const u16* weight = weight_of(b, kind, product / 4);
        for (int group = 0; group < s.groups; ++group) {
            const int unit = s.first + group * s.per, rows = min(s.per, s.first + s.units - unit) * shape.unit;
            for (int row0 = 0; row0 < rows; row0 += 8) {
                const int now = min(8, rows - row0), row = row0 + b.lane;
                const Cut cut = b.cuts[kind * 9 + now];
                const u16* from = weight;
                if (b.lane < now) from += (size_t)row_of(kind, unit + (row >> unit_shift), row & (shape.unit - 1)) * shape.k;
                for (int k = 0; k < shape.k; k += cut.columns) {
                    const u32 bytes = 2 * min(cut.columns, shape.k - k), full = b.full + 8 * b.stage;
                    barrier_wait(b.empty + 8 * b.stage, b.parity ^ 1);
                    if (b.lane == 0) barrier_expect(full, now * bytes);
                    __syncwarp();
                    if (b.lane < now) bulk_copy(b.ring + b.stage * STAGE_BYTES + b.lane * cut.pitch, from + k, bytes, full, policy);
                    b.next_stage();
                }
            }
        }
    }
}

struct Fragment {
    uint4 low, high;   // 8 columns of token `quad`, and of token `quad + 8`
};

__device__ __forceinline__ Fragment direct_fragment(const Block& b, int k) {
    const u16* x = (const u16*)b.table[HIDDEN_ACT];
    Fragment f = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
    const int at = k + 8 * b.place;
    if (at >= FFN) return f;
    if (b.quad < M) f.low = load_l2(x + (size_t)b.quad * FFN + at);
    if (M > 8) f.high = load_l2(x + (size_t)(b.quad + 8) * FFN + at);
    return f;
}

// 32 columns of a tile. Even and odd products go to sums of their own: shorter chains.
__device__ __forceinline__ void products(const Fragment& x, uint4 w, float* even, float* odd) {
    mma(even, x.low.x, x.high.x, x.low.y, x.high.y, w.x, w.y);
    mma(odd, x.low.z, x.high.z, x.low.w, x.high.w, w.z, w.w);
}

// This warp's share of one stage, x from shared memory at `x` (rows of `pitch` bytes; lanes without a token read zeros at one
// place, `moves` being 0 for them), the weight at `w`.
__device__ __forceinline__ void stage_products(
    const Block& b, int k, int k0, int columns, u32 x, u32 pitch, u32 moves, u32 w, float* even, float* odd) {
    const int blocks = (min(columns, k - k0) + 31) / 32;
#pragma unroll 2
    for (int block = (b.warp - k0 / 32) & (WARPS - 1); block < blocks; block += WARPS) {
        const u32 at = x + ((2 * (k0 + 32 * block)) & moves);
        Fragment f = {load_shared(at), make_uint4(0, 0, 0, 0)};
        if (M > 8) f.high = load_shared(at + 8 * pitch);
        uint4 weight = load_shared(w + 64 * block);
        if (RAGGED && k0 + 32 * block + 8 * b.place >= k) weight = make_uint4(0, 0, 0, 0);
        products(f, weight, even, odd);
    }
}

// Sums of this warp's columns for one tile of `rows` rows.
__device__ __forceinline__ void tile_sums(
    Block& b, const Shape& shape, const Cut& cut, int rows, bool direct, float* even, float* odd) {
    const u32 offset = min(b.quad, rows - 1) * cut.pitch + 16 * b.place, pitch = staged_pitch(shape.k);
    const u32 x = b.quad < M ? b.staged + b.quad * pitch + 16 * b.place : b.zeros, moves = b.quad < M ? ~0u : 0u;
#if DOWN_DIRECT
    constexpr int MOST = DIRECT_COLUMNS / 32 / WARPS;
    Fragment next[MOST];
#pragma unroll
    for (int i = 0; i < MOST; ++i)
        if (direct) next[i] = direct_fragment(b, 32 * (b.warp + i * WARPS));
#endif
    for (int k0 = 0; k0 < shape.k; k0 += cut.columns) {
        const u32 at = b.ring + b.stage * STAGE_BYTES + offset;
#if DOWN_DIRECT
        if (direct) {
            const int first = (b.warp - k0 / 32) & (WARPS - 1), blocks = (min(cut.columns, shape.k - k0) + 31) / 32;
            const int k1 = k0 + cut.columns, first1 = (b.warp - k1 / 32) & (WARPS - 1);
            Fragment now[MOST];
#pragma unroll
            for (int i = 0; i < MOST; ++i) now[i] = next[i], next[i] = direct_fragment(b, k1 + 32 * (first1 + i * WARPS));
            barrier_wait(b.full + 8 * b.stage, b.parity);
#pragma unroll
            for (int i = 0; i < MOST; ++i) {
                const int block = first + i * WARPS;
                if (block >= blocks) continue;
                uint4 w = load_shared(at + 64 * block);
                if (RAGGED && k0 + 32 * block + 8 * b.place >= shape.k) w = make_uint4(0, 0, 0, 0);
                products(now[i], w, even, odd);
            }
        } else
#endif
        {
            barrier_wait(b.full + 8 * b.stage, b.parity);
            stage_products(b, shape.k, k0, cut.columns, x, pitch, moves, at, even, odd);
        }
        __syncwarp();
        if (b.lane == 0) barrier_arrive(b.empty + 8 * b.stage);
        b.next_stage();
    }
}

// A product, group by group; `finish(item, m, unit, sums)` gets the sums of one unit's rows (up to 4) for token m.
template <class Finish>
__device__ __forceinline__ void multiply(Block& b, int kind, Finish finish) {
    constexpr int ITEMS = (M * GROUP_ROWS + THREADS - 1) / THREADS;
    const Shape shape = shape_of(kind);
    const Slab s = b.slabs[kind];
    const int shift = shape.unit == 4 ? 3 : shape.unit == 2 ? 4 : 5;   // log2 of the units of a full group
    for (int group = 0; group < s.groups; ++group) {
        const int unit0 = s.first + group * s.per, units = min(s.per, s.first + s.units - unit0), rows = units * shape.unit;
        float* red = b.red + b.red_turn * (WARPS * M * GROUP_ROWS);
        if (RED_BUFFERS == 2) b.red_turn ^= 1;
        else consumers_sync();   // the sums of the group before have been read
        float* mine = red + (b.warp * M + b.quad) * GROUP_ROWS + 2 * b.place;
        for (int row0 = 0; row0 < rows; row0 += 8) {
            float even[4] = {}, odd[4] = {};
            const int now = min(8, rows - row0);
            tile_sums(b, shape, b.cuts[kind * 9 + now], now, DOWN_DIRECT && kind == DOWN, even, odd);
            if (b.quad < M) *(float2*)(mine + row0) = make_float2(even[0] + odd[0], even[1] + odd[1]);
            if (M > 8) *(float2*)(mine + 8 * GROUP_ROWS + row0) = make_float2(even[2] + odd[2], even[3] + odd[3]);
        }
        consumers_sync();
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int item = b.thread + i * THREADS, m = item >> shift, unit = item & ((1 << shift) - 1);
            if (m >= M || unit >= units) continue;
            float sums[4] = {};
            const float* from = red + m * GROUP_ROWS + unit * shape.unit;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp)
#pragma unroll
                for (int row = 0; row < 4; ++row)
                    if (row < shape.unit) sums[row] += from[warp * M * GROUP_ROWS + row];
            finish(i, m, unit0 + unit, sums);
        }
    }
}
