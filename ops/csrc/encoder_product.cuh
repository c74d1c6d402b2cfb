// Products on the tensor cores, fed by one lane that runs ahead of them.
#pragma once

// ---- the feeding warp: one lane of it ----

// The tiles of all units of a product, weights first: those for which the ring has room before x is there.
template <int KIND>
__device__ __forceinline__ void feed(Block& b, int layer, int x_map) {
    using P = Product<KIND>;
    struct Held { u32 stage; int k, row; } held[STAGES];
    int holding = 0;
    bool ready = false;
    const Map *x = b.maps + x_map, *w = b.weight(layer, KIND);
    auto copy_x = [&](u32 stage, int k, int row) {
        tile_copy(b.address(0) + stage * STAGE_BYTES, x, TILE * k, row, b.address(FULL_AT) + 8 * stage);
    };
    auto release = [&] {
        await_blocks(b, b.reached);
        for (int i = 0; i < holding; ++i) copy_x(held[i].stage, held[i].k, held[i].row);
        ready = true;
    };
#pragma unroll 1
    for (int unit = b.id; unit < P::UNITS; unit += BLOCKS) {
#pragma unroll 1
        for (int k = P::first(unit); k < P::last(unit); ++k) {
            if (!ready && holding == STAGES) release();
            const u32 full = b.address(FULL_AT) + 8 * b.stage;
            barrier_wait(b.address(EMPTY_AT) + 8 * b.stage, b.parity ^ 1);
            barrier_expect(full, X_ROWS * 128 + P::W_BYTES);
            tile_copy(b.address(0) + b.stage * STAGE_BYTES + X_BYTES, w, TILE * k, P::column(unit), full);
            if (ready) copy_x(b.stage, k, P::rows(unit));
            else held[holding++] = {b.stage, k, P::rows(unit)};
            b.next_stage();
        }
    }
    if (!ready && holding) release();
}

__device__ __forceinline__ void feed_all(Block& b) {
    for (int layer = 0; layer < LAYERS; ++layer) {   // the consumers' arrivals, in the same order
        feed<QKV>(b, layer, 0);
        b.reached += BLOCKS;   // attention
        feed<OUT>(b, layer, 1);
        b.reached += BLOCKS;   // norm
        feed<UP>(b, layer, 0);
        b.reached += BLOCKS;   // up
        feed<DOWN>(b, layer, 2);
        b.reached += BLOCKS;   // norm
    }
}

// ---- products ----

// One unit's sums: d[4 j + i] is row quad + i / 2 * 8 of the warp's 16, column 8 j + 2 place + i % 2.
template <int KIND>
__device__ __forceinline__ void multiply(Block& b, int unit, float* d) {
    using P = Product<KIND>;
    u32 before = 0;
#pragma unroll
    for (int i = 0; i < P::WIDE / 2; ++i) d[i] = 0.f;
    const int steps = P::last(unit) - P::first(unit);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        const u32 at = b.address(0) + b.stage * STAGE_BYTES;
        barrier_wait(b.address(FULL_AT) + 8 * b.stage, b.parity);
        const u64 x = descriptor(at), w = descriptor(at + X_BYTES);
        group_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) Group<P::WIDE>::mma(d, x + 2 * k, w + 2 * k);   // 16 columns are 32 bytes
        group_commit();
        group_wait<1>();
        if (step && b.lane == 0) barrier_arrive(b.address(EMPTY_AT) + 8 * before);
        before = b.stage;
        b.next_stage();
    }
    group_wait<0>();
    settle<P::WIDE / 2>(d);
    if (b.lane == 0) barrier_arrive(b.address(EMPTY_AT) + 8 * before);
}

// A block that has nothing of a product to compute must not arrive before all have arrived the last time: it would be counted
// for one that has not. Nor may it put back what others still read.
template <int KIND>
__device__ __forceinline__ void begin_product(Block& b) {
    if (b.id >= Product<KIND>::UNITS) meet_blocks(b);
}

// A unit's results to memory, of rows that there are; `pair(j, half)` gives two neighbours: 16-bit or fp32. By way of shared
// memory, so that what a warp stores at a time lies side by side: as the sums lie, a store would touch eight rows.
template <int KIND, class Pair, class Get>
__device__ __forceinline__ void put_unit(const Block& b, int unit, void* out, Get pair) {
    using P = Product<KIND>;
    constexpr int BYTES = sizeof(Pair) / 2, PITCH = SPAN * BYTES + 16;
    char* mine = memory + SCRATCH_AT + b.warp * 16 * PITCH;
    const int row0 = P::rows(unit) + 16 * b.warp, rows = min(16, b.rows - row0);
    if (rows <= 0) return;
#pragma unroll
    for (int from = 0; from < P::WIDE; from += SPAN) {
        const int wide = from + SPAN < P::WIDE ? SPAN : P::WIDE - from, pieces = wide * BYTES / 16;
        __syncwarp();   // what was there has been read
#pragma unroll
        for (int j = 0; j < SPAN / 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (8 * j < wide)
                    *(Pair*)(mine + (b.quad + 8 * half) * PITCH + (8 * j + 2 * b.place) * BYTES) = pair(from / 8 + j, half);
        __syncwarp();
        for (int i = b.lane; i < rows * pieces; i += 32) {
            const int row = i / pieces, at = 16 * (i % pieces), n = P::column(unit) + from + at / BYTES;
            if (n < P::N)
                put_piece((char*)out + ((size_t)(row0 + row) * P::N + n) * BYTES, *(const uint4*)(mine + row * PITCH + at));
        }
    }
}

// QKV and up: bias, activation, and 16-bit rows.
template <int KIND>
__device__ __forceinline__ void whole_product(Block& b, int layer, u16* out) {
    using P = Product<KIND>;
    const u16* bias = b.constant(layer, KIND == QKV ? QKV_BIAS : UP_BIAS);
    begin_product<KIND>(b);
    for (int unit = b.id; unit < P::UNITS; unit += BLOCKS) {
        float d[P::WIDE / 2];
        u32 biases[P::WIDE / 8];
#pragma unroll
        for (int j = 0; j < P::WIDE / 8; ++j)
            biases[j] = constant_word(bias, min(P::column(unit) + 8 * j, P::N - 8) + 2 * b.place);
        multiply<KIND>(b, unit, d);
        put_unit<KIND, u32>(b, unit, out, [&](int j, int half) {
            const float x = d[4 * j + 2 * half] + low_of(biases[j]), y = d[4 * j + 2 * half + 1] + high_of(biases[j]);
            return KIND == UP ? narrow2(activate(x), activate(y)) : narrow2(x, y);
        });
    }
}

// A sum that is no number, in bits that are not NOTHING's.
__device__ __forceinline__ float with_other_bits(float sum) { return sum == sum ? sum : __uint_as_float(0x7fc00000u); }

// Projection and down: sums of one part of K, for the norm behind them.
template <int KIND>
__device__ __forceinline__ void split_product(Block& b) {
    using P = Product<KIND>;
    begin_product<KIND>(b);
    for (int unit = b.id; unit < P::UNITS; unit += BLOCKS) {
        float d[P::WIDE / 2];
        multiply<KIND>(b, unit, d);
        float* out = b.partials + (size_t)P::part(unit) * (ROW_TILES * TILE * HIDDEN);
        put_unit<KIND, float2>(b, unit, out, [&](int j, int half) {
            return make_float2(with_other_bits(d[4 * j + 2 * half]), with_other_bits(d[4 * j + 2 * half + 1]));
        });
    }
}
