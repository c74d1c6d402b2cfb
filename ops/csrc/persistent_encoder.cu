// All layers of a post-norm encoder in one launch, for a few hundred tokens. One block a multiprocessor stays resident and takes
// its part of each phase: QKV, attention, projection, norm, up, down, norm. Products are 64 rows high; weights come as tiles of 64
// columns through a ring in shared memory, by one warp that runs ahead of the phases. A long K is cut in parts, whose sums the
// norm behind them adds up. All that passes from block to block is looked out for where it is needed: no block waits for all.

// ---- norms ----

__device__ __forceinline__ float sum_of_consumers(const Block& b, float value, int turn) {
    float* sums = (float*)(memory + STATS_AT) + 4 * turn;
#pragma unroll
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
    if (b.lane == 0) sums[b.warp] = value;
    consumers_sync();
    return sums[0] + sums[1] + sums[2] + sums[3];
}

// out = norm(residual + the parts' sum + bias), a row at a time. `behind(row)` puts back what this row no longer needs of other
// phases; the residual and the sums go here, each by the thread that read it.
template <int KIND, class Behind>
__device__ __forceinline__ void add_and_norm(const Block& b, u16* residual, u16* out, const u16* bias, const u16* gain,
                                             const u16* shift, Behind behind) {
    constexpr int EACH = ceil_div(HIDDEN / 2, CONSUMERS), SPLIT = Product<KIND>::SPLIT;
    u32 biases[EACH], gains[EACH], shifts[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int n = 2 * min(b.thread + i * CONSUMERS, HIDDEN / 2 - 1);
        biases[i] = constant_word(bias, n), gains[i] = constant_word(gain, n), shifts[i] = constant_word(shift, n);
    }
    __threadfence();   // what the norm before put back, before anybody sees what this one writes
#pragma unroll 1
    for (int row = b.id; row < b.rows; row += BLOCKS) {
        float2 v[EACH];
        uint2 sums[EACH * SPLIT];
        const size_t from = (size_t)row * HIDDEN;
        auto at = [&](int i) {
            const int n = 2 * min(b.thread + i / SPLIT * CONSUMERS, HIDDEN / 2 - 1);
            return b.sums_of(KIND, i % SPLIT) + from + n;
        };
        take<EACH * SPLIT>(sums, at);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const u32 old = load_l2_word(residual + from + 2 * min(b.thread + i * CONSUMERS, HIDDEN / 2 - 1));
            v[i] = make_float2(low_of(old) + low_of(biases[i]), high_of(old) + high_of(biases[i]));
#pragma unroll
            for (int part = 0; part < SPLIT; ++part) {
                const uint2 sum = sums[i * SPLIT + part];
                v[i].x += __uint_as_float(sum.x), v[i].y += __uint_as_float(sum.y);
            }
        }
        float sum = 0.f, squares = 0.f;
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (b.thread + i * CONSUMERS < HIDDEN / 2) sum += v[i].x + v[i].y;
        const float mean = RMS_NORM ? 0.f : sum_of_consumers(b, sum, 0) * (1.f / HIDDEN);
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (b.thread + i * CONSUMERS < HIDDEN / 2) {
                const float x = v[i].x - mean, y = v[i].y - mean;
                squares += x * x + y * y;
            }
        const float scale = rsqrtf(sum_of_consumers(b, squares, 1) * (1.f / HIDDEN) + NORM_EPS);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int n = 2 * (b.thread + i * CONSUMERS);
            if (n >= HIDDEN) break;
            put_word((u32*)(out + from + n), narrow2((v[i].x - mean) * scale * low_of(gains[i]) + low_of(shifts[i]),
                                                     (v[i].y - mean) * scale * high_of(gains[i]) + high_of(shifts[i])));
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int n = 2 * (b.thread + i * CONSUMERS);
            if (n >= HIDDEN) break;
            put_word((u32*)(residual + from + n), NOTHING);
#pragma unroll
            for (int part = 0; part < SPLIT; ++part) *(uint2*)at(i * SPLIT + part) = make_uint2(NOTHING, NOTHING);
        }
        behind(row);
        consumers_sync();   // the sums are used again
    }
}

// ---- the two sides ----

// Where each row's sequence begins and ends; a row of none is one by itself.
__device__ __forceinline__ void find_sequences(const Block& b, const int* starts, int sequences) {
    for (int row = b.thread; row < ROW_TILES * TILE; row += CONSUMERS) {
        ushort2 found = make_ushort2(row, row + 1);
        for (int i = 0; i < sequences; ++i) {
            const int begin = starts[i], end = starts[i + 1];
            if (begin <= row && row < end) found = make_ushort2(begin, end);
        }
        ((ushort2*)(memory + RANGES_AT))[row] = found;
    }
    consumers_sync();
}

__device__ __forceinline__ void consume_all(Block& b, u32* arrivals, u32 reached) {
    for (int layer = 0; layer < LAYERS; ++layer) {
        u16 *normed = b.normed_of(layer), *middle = b.middle_of(layer), *qkv = b.qkv_of(layer), *attended = b.attended_of(layer);
        u16* activations = b.activations_of(layer);
        whole_product<QKV>(b, layer, normed, layer > 0, qkv);
        attention(b, qkv, attended);
        if (layer == LAYERS - 1 && b.thread == 0) add_one(arrivals);
        split_product<OUT>(b, attended);
        add_and_norm<OUT>(b, normed, middle, b.constant(layer, OUT_BIAS), b.constant(layer, NORM1_WEIGHT),
                          b.constant(layer, NORM1_BIAS), [&](int row) {
            forget(b, attended + (size_t)row * HIDDEN, HIDDEN / 8);
            if (layer) forget(b, b.qkv_of(layer - 1) + (size_t)row * QKV_SIZE, QKV_SIZE / 8);
        });
        whole_product<UP>(b, layer, middle, true, activations);
        split_product<DOWN>(b, activations);
        add_and_norm<DOWN>(b, middle, b.normed_of(layer + 1), b.constant(layer, DOWN_BIAS), b.constant(layer, NORM2_WEIGHT),
                           b.constant(layer, NORM2_BIAS), [&](int row) {
            forget(b, activations + (size_t)row * FFN, FFN / 8);
        });
    }
    // The last layer's keys and values: all blocks have read them.
    if (b.thread == 0) {
        Watchdog dog;
        while ((int)(read_count(arrivals) - reached) < 0) dog.tick();
    }
    consumers_sync();
    for (int row = b.id; row < b.rows; row += BLOCKS) forget(b, b.qkv_of(LAYERS - 1) + (size_t)row * QKV_SIZE, QKV_SIZE / 8);
}

// `turns` is where the last launch left the counter of arrivals, for each block: the same for all.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
persistent_encoder(const Map* maps, const u64* pointers, u16* normed, u16* middle, u16* qkv, u16* attended, u16* activations,
                   float* partials, u16* result, u32* arrivals, u32* turns, const int* starts, int sequences, int rows) {
    Block b;
    b.id = blockIdx.x, b.thread = threadIdx.x, b.warp = __shfl_sync(~0u, threadIdx.x / 32, 0), b.lane = threadIdx.x % 32;
    b.quad = b.lane / 4, b.place = b.lane % 4, b.stage = b.parity = 0;
    b.maps = maps, b.pointers = pointers, b.normed = normed, b.middle = middle, b.three_qkv = qkv, b.attended = attended;
    b.activations = activations, b.partials = partials, b.result = result, b.rows = rows;
    if (b.thread == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(b.address(FULL_AT) + 8 * i, 1);
            barrier_init(b.address(EMPTY_AT) + 8 * i, 4);
        }
        show_barriers();
    }
    __syncthreads();
    if (b.warp == CONSUMERS / 32) {
        if (b.lane == 0) feed_all(b);
    } else {
        const u32 reached = turns[b.id] + BLOCKS;
        find_sequences(b, starts, sequences);
        consume_all(b, arrivals, reached);
        if (b.thread == 0) turns[b.id] = reached;
    }
}
