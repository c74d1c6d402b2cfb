// Products on the tensor cores, fed by one lane that runs ahead of them.
#pragma once

// ---- the feeding warp: one lane of it ----

// The tiles of all units of a product, as far ahead as the ring has room.
template <int KIND>
__device__ __forceinline__ void feed(Block& b, int layer) {
    using P = Product<KIND>;
    const Map* w = b.weight(layer, KIND);
#pragma unroll 1
    for (int unit = b.id; unit < P::UNITS; unit += BLOCKS) {
#pragma unroll 1
        for (int k = P::first(unit); k < P::last(unit); ++k) {
            const u32 full = b.address(FULL_AT) + 8 * b.stage;
            barrier_wait(b.address(EMPTY_AT) + 8 * b.stage, b.parity ^ 1);
            barrier_expect(full, P::W_BYTES);
            tile_copy(b.address(RING_AT) + b.stage * STAGE_BYTES, w, TILE * k, P::column(unit), full);
            b.next_stage();
        }
    }
}

__device__ __forceinline__ void feed_all(Block& b) {
    for (int layer = 0; layer < LAYERS; ++layer) {
        feed<QKV>(b, layer);
        feed<OUT>(b, layer);
        feed<UP>(b, layer);
        feed<DOWN>(b, layer);
    }
}

// ---- products ----

// A unit's part of x [.., K] to shared memory, swizzled, once it is there (`wait`: it may not be). By registers: of what another
// block writes meanwhile, relaxed loads alone have a promise; asynchronous copies are weak.
template <int KIND>
__device__ __forceinline__ void fetch_x(const Block& b, const u16* x, int unit, bool wait) {
    using P = Product<KIND>;
    // Of each 16 rows and 64 columns a thread has the same piece. Neither rows nor the last part's steps are always as many.
    constexpr int EACH = X_ROWS / 16 * P::STEPS, AT_ONCE = EACH < 24 ? EACH : 24;
    const int steps = P::last(unit) - P::first(unit), row_groups = min(X_ROWS, b.rows - P::rows(unit)) / 16;
    const int row = b.thread / 8, piece = b.thread % 8;
    const u16* begin = x + (size_t)(P::rows(unit) + row) * P::K + TILE * P::first(unit) + 8 * piece;
    char* to = memory + row * 128 + ((piece ^ row) & 7) * 16;
    auto exists = [&](int j) { return j < EACH && j / P::STEPS < row_groups && j % P::STEPS < steps; };
    auto ask = [&](uint4& v, int j) { peek(v, begin + j / P::STEPS * 16 * P::K + j % P::STEPS * TILE); };
    uint4 v[AT_ONCE];
    Watchdog dog;
    if (wait)   // one of them first, as take does
        for (ask(v[0], 0); !there(v[0]); ask(v[0], 0)) dog.tick();
    consumers_sync();   // what was there has been multiplied
#pragma unroll
    for (int j0 = 0; j0 < EACH; j0 += AT_ONCE) {
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
            if (exists(j0 + j)) ask(v[j], j0 + j);
        for (bool all = !wait; !all; dog.tick()) {
            all = true;
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j)
                if (exists(j0 + j) && !there(v[j])) ask(v[j], j0 + j), all = false;
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
            if (exists(j0 + j)) *(uint4*)(to + (j0 + j) / P::STEPS * 2048 + (j0 + j) % P::STEPS * X_TILE) = v[j];
    }
    proxy_fence();
    consumers_sync();
}

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
        barrier_wait(b.address(FULL_AT) + 8 * b.stage, b.parity);
        const u64 x = descriptor(b.address(step * X_TILE)), w = descriptor(b.address(RING_AT) + b.stage * STAGE_BYTES);
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

// A block's units of a product, each with its x; `put(unit, d)` takes its sums.
template <int KIND, class Put>
__device__ __forceinline__ void each_unit(Block& b, const u16* x, bool wait, Put put) {
    using P = Product<KIND>;
    int rows = -1, part = -1;
    for (int unit = b.id; unit < P::UNITS; unit += BLOCKS) {
        float d[P::WIDE / 2];
        if (P::rows(unit) != rows || P::part(unit) != part) fetch_x<KIND>(b, x, unit, wait);
        rows = P::rows(unit), part = P::part(unit);
        multiply<KIND>(b, unit, d);
        put(unit, d);
    }
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
__device__ __forceinline__ void whole_product(Block& b, int layer, const u16* x, bool wait, u16* out) {
    using P = Product<KIND>;
    const u16* bias = b.constant(layer, KIND == QKV ? QKV_BIAS : UP_BIAS);
    u32 biases[P::WIDE / 8];
    auto ask = [&](int unit) {   // before they are used
#pragma unroll
        for (int j = 0; j < P::WIDE / 8; ++j)
            biases[j] = constant_word(bias, min(P::column(unit) + 8 * j, P::N - 8) + 2 * b.place);
    };
    ask(b.id);
    each_unit<KIND>(b, x, wait, [&](int unit, const float* d) {
        put_unit<KIND, u32>(b, unit, out, [&](int j, int half) {
            const float x = d[4 * j + 2 * half] + low_of(biases[j]), y = d[4 * j + 2 * half + 1] + high_of(biases[j]);
            return KIND == UP ? narrow2(activate(x), activate(y)) : narrow2(x, y);
        });
        ask(unit + BLOCKS);
    });
}

// A sum that is no number, in bits that are not NOTHING's.
__device__ __forceinline__ float with_other_bits(float sum) { return sum == sum ? sum : __uint_as_float(0x7fc00000u); }

// Projection and down: sums of one part of K, for the norm behind them.
template <int KIND>
__device__ __forceinline__ void split_product(Block& b, const u16* x) {
    using P = Product<KIND>;
    each_unit<KIND>(b, x, true, [&](int unit, const float* d) {
        float* out = b.sums_of(KIND, P::part(unit));
        put_unit<KIND, float2>(b, unit, out, [&](int j, int half) {
            return make_float2(with_other_bits(d[4 * j + 2 * half]), with_other_bits(d[4 * j + 2 * half + 1]));
        });
    });
}
