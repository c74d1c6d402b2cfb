// A decoder's whole step in one launch, for up to 16 rows: embedding, five phases a layer, the head and, if asked, the greedy
// choice and further steps. One block a multiprocessor stays resident; weights stream through shared memory without a pause.

// ---- what becomes of a product's sums ----

__device__ __forceinline__ float bias_of(const u16* bias, int row) { return bias ? widen(__ldg(bias + row)) : 0.f; }

__device__ __forceinline__ float activate(float v) {
#if ACTIVATION == 0
    return 0.5f * v * (1.f + erff(v * 0.7071067811865476f));
#elif ACTIVATION == 1
    return v / (1.f + __expf(-1.5957691216057308f * (v + 0.044715f * v * v * v)));   // x (1 + tanh(u)) / 2 = x sigmoid(2 u)
#elif ACTIVATION == 2
    return v / (1.f + __expf(-1.702f * v));
#elif ACTIVATION == 3
    return v < 0.f ? 0.f : v;
#elif ACTIVATION == 4
    return v / (1.f + __expf(-v));
#else
    return tanhf(v);
#endif
}

// A rotary pair of queries, keys or values: turned, and sent to where attention looks for it.
__device__ __forceinline__ void finish_qkv(Block& b, int layer, int m, int unit, float x, float y) {
    const int j = unit % (HEAD_DIM / 2);
    float turned[2] = {x, y};
    if (2 * j < ROTARY_DIM && unit < (HEADS + KV_HEADS) * (HEAD_DIM / 2)) {
        const float2 angle = b.angles[m * (ROTARY_DIM / 2) + j];
        turned[0] = x * angle.x - y * angle.y, turned[1] = y * angle.x + x * angle.y;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = row_of(QKV, unit, i);
        if (row < Q_SIZE) {
            publish(b, QUERIES, (size_t)m * Q_SIZE + row, turned[i]);
            continue;
        }
        const int value = row >= Q_SIZE + KV_SIZE, element = row - Q_SIZE - value * KV_SIZE;
        const u16 rounded = narrow(turned[i]);
        if (FLAGGED) publish(b, NEW_KV, (size_t)m * 2 * KV_SIZE + row - Q_SIZE, widen(rounded));
        u16* pool = (u16*)b.layer_weight(layer, value ? VALUES : KEYS);
        pool[(size_t)b.slots[m] * KV_SIZE + element] = rounded;
    }
}

__device__ __forceinline__ void finish_up(Block& b, int m, int unit, const float* sums) {
    float x = activate(sums[0]), y = activate(sums[1]);
    if (GATED) x *= sums[2], y *= sums[3];
    const size_t at = (size_t)m * (FFN / 2) + unit;
    const u32 pair = narrow2(x, y);
    if (FLAGGED) put_flagged((u64*)b.table[HIDDEN_ACT] + at, pair, b.epoch + 1);
    else ((u32*)b.table[HIDDEN_ACT])[at] = pair;
}

// Bias and residual; the stream's row stays with the block that owns it.
__device__ __forceinline__ void finish_stream(Block& b, int m, int row, int local, float sum) {
    float* own = b.own + m * OWN_ROWS + local;
    *own += sum;
    publish(b, STREAM, (size_t)m * HIDDEN + row, *own);
}

// ---- the head, and the greedy choice ----

struct Best {
    float value;
    int token;
};

// The larger logit, the first of equal ones; NaN counts as the largest, as in torch.max.
__device__ __forceinline__ Best better(Best a, Best c) {
    const bool nan_a = a.value != a.value, nan_c = c.value != c.value;
    if (nan_a != nan_c) return nan_a ? a : c;
    if (a.value == c.value || nan_a) return a.token < c.token ? a : c;
    return a.value > c.value ? a : c;
}

__device__ __forceinline__ Best best_of_warp(Best best) {
#pragma unroll
    for (int step = 16; step; step >>= 1)
        best = better(best, {__shfl_xor_sync(~0u, best.value, step), __shfl_xor_sync(~0u, best.token, step)});
    return best;
}

constexpr int BEST_ITEMS = (M * GROUP_ROWS + THREADS - 1) / THREADS;

// Logits to LOGITS if there is such a buffer.
__device__ __forceinline__ Best finish_head(const Block& b, int m, int row, float v, Best best) {
    v += bias_of(b.weight(HEAD_BIAS), row);
    if (FINAL_SOFTCAP > 0.f) v = FINAL_SOFTCAP * tanhf(v / max(FINAL_SOFTCAP, 1e-30f));
    float* logits = (float*)b.table[LOGITS];
    if (logits) logits[(size_t)m * VOCAB + row] = v;
    return better(best, {v, row});
}

// The block's best of each row to BEST [M][BLOCKS][2].
__device__ __forceinline__ void publish_best(Block& b, const Best* best) {
#pragma unroll
    for (int i = 0; i < BEST_ITEMS; ++i) {
        const Best one = best_of_warp(best[i]);
        const int m = b.warp + i * WARPS;   // GROUP_ROWS is a warp: a warp holds one row's columns
        if (b.lane == 0 && m < M) {
            publish(b, BEST, ((size_t)m * BLOCKS + b.id) * 2, one.value);
            publish(b, BEST, ((size_t)m * BLOCKS + b.id) * 2 + 1, __int_as_float(one.token));
        }
    }
}

// Every block finds the next token of every row by itself.
__device__ __forceinline__ void choose(Block& b, u64* out) {
    constexpr int EACH = (BLOCKS + 31) / 32;
    for (int m = b.warp; m < M; m += WARPS) {
        Words words[EACH];
        await_all([&] {
            bool all = true;
#pragma unroll
            for (int i = 0; i < EACH; ++i) words[i] = peek2(b, BEST, ((size_t)m * BLOCKS + min(b.lane + 32 * i, BLOCKS - 1)) * 2);
#pragma unroll
            for (int i = 0; i < EACH; ++i) all &= arrived(b, words[i]);
            return all;
        });
        Best best = {__int_as_float(0xff800000), VOCAB};
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const float2 one = floats_of(words[i]);
            best = better(best, {one.x, __float_as_int(one.y)});
        }
        best = best_of_warp(best);
        if (b.lane == 0) {
            const bool finite = fabsf(best.value) < __int_as_float(0x7f800000);
            b.tokens[m] = min(best.token, VOCAB - 1);
            b.positions[m] += 1;
            if (b.id == 0) out[m] = finite ? (u64)b.tokens[m] : ~(u64)b.tokens[m];
        }
    }
    consumers_sync();
}

// ---- the three sides of the kernel ----

// The helpers: constants of each half of a layer into shared memory, while the half before is computed.
__device__ __forceinline__ void prepare_all(Block& b, int steps) {
    const int thread = b.thread - THREADS - 32;
    const Slab own = b.slabs[OUT];
    for (int half = 0, left = steps; left; half = half == 2 * LAYERS ? left -= 1, 0 : half + 1) {
        const int side = half % 2, layer = half / 2, kind = side ? UP : QKV;
        const bool last = half == 2 * LAYERS;
        const u16* gain = last ? b.weight(FINAL_WEIGHT) : b.layer_weight(layer, side ? FFN_NORM_WEIGHT : ATTN_NORM_WEIGHT);
        const u16* shift = last ? b.weight(FINAL_BIAS) : b.layer_weight(layer, side ? FFN_NORM_BIAS : ATTN_NORM_BIAS);
        const Shape shape = shape_of(kind);
        const Slab s = b.slabs[kind];
        barrier_wait(b.used + 8 * side, (b.turn >> side & 1) ^ 1);
        uint4* norms = (uint4*)b.norms(side);
        for (int i = thread; i < HIDDEN / 8; i += HELPERS) {
            norms[i] = __ldg((const uint4*)gain + i);
            if (!RMS_NORM) norms[HIDDEN / 8 + i] = __ldg((const uint4*)shift + i);
        }
        const u16* first = b.layer_weight(min(layer, LAYERS - 1), side ? UP_BIAS : QKV_BIAS);
        const u16* second = b.layer_weight(min(layer, LAYERS - 1), side ? DOWN_BIAS : OUT_BIAS);
        for (int i = thread; i < s.units * shape.unit; i += HELPERS)
            b.biases(side)[i] = bias_of(first, row_of(kind, s.first + i / shape.unit, i % shape.unit));
        for (int i = thread; i < own.units; i += HELPERS)
            b.biases(side)[first_biases(side) + i] = bias_of(second, own.first + i);
        barrier_arrive(b.ready + 8 * side);
        b.turn ^= 1 << side;
    }
}

// Positions of the step: where new keys go, the angles, and the embedding of the stream's own rows.
__device__ __forceinline__ void begin_step(Block& b) {
    const Slab own = b.slabs[OUT];
    for (int m = b.thread; m < M; m += THREADS) b.slots[m] = pool_row(b, m, b.positions[m]) / KV_SIZE, b.origins[m] = 0.f;
    for (int i = b.thread; i < M * (ROTARY_DIM / 2); i += THREADS) {
        const int m = i / max(ROTARY_DIM / 2, 1), j = i % max(ROTARY_DIM / 2, 1);
        float2 angle;
        sincosf(b.positions[m] * __ldg((const float*)b.table[INV_FREQ] + j), &angle.y, &angle.x);
        b.angles[i] = make_float2(angle.x * ROTARY_FACTOR, angle.y * ROTARY_FACTOR);
    }
    for (int i = b.thread; i < M * own.units; i += THREADS) {
        const int m = i / own.units, row = own.first + i % own.units;
        const Pair pair = embedded(b, m, row & ~1);
        b.own[m * OWN_ROWS + row - own.first] = row & 1 ? pair.y : pair.x;
    }
}

// What stands before a product: x into shared memory.
__device__ __forceinline__ void stage(Block& b, int kind, int layer) {
    if (kind == OUT) {
        attend(b, layer);
        grid_barrier(b);
        stage_attention(b, layer);
    } else if (kind == DOWN) {
        if (!DOWN_DIRECT) stage_activations(b);
    } else {
        stage_stream(b, kind == QKV && layer == 0, kind == UP ? FFN_HALF : ATTENTION_HALF);
    }
    if (RAGGED)
        if (!(DOWN_DIRECT && kind == DOWN)) clear_staged_tail(b, shape_of(kind).k);
    consumers_sync();
    if ((kind == OUT || kind == DOWN) && b.thread < M) b.origins[b.thread] = b.own[b.thread * OWN_ROWS];
}

__device__ __forceinline__ void compute_step(Block& b, Best* best) {
    begin_step(b);
    consumers_sync();
    for (int product = 0; product <= 4 * LAYERS; ++product) {
        const int kind = product == 4 * LAYERS ? HEAD : product % 4, layer = product / 4;
        stage(b, kind, layer);
        if (kind == HEAD) __threadfence();   // what was appended to the cache is seen by whoever sees this step's choice
        const Half half = kind == UP || kind == DOWN ? FFN_HALF : ATTENTION_HALF;
        const bool starts = kind == QKV || kind == UP;
        const Shape shape = shape_of(kind);
        const int first = b.slabs[kind].first;
        const float* bias = b.biases(half) + (starts ? 0 : first_biases(half));
        multiply(b, kind, [&](int item, int m, int unit, float* sums) {
            if (kind == HEAD) {
#pragma unroll
                for (int i = 0; i < BEST_ITEMS; ++i)
                    if (i == item) best[i] = finish_head(b, m, unit, sums[0], best[i]);
                return;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (i < shape.unit) sums[i] += bias[(unit - first) * shape.unit + i];
            if (kind == QKV) finish_qkv(b, layer, m, unit, sums[0], sums[1]);
            else if (kind == UP) finish_up(b, m, unit, sums);
            else finish_stream(b, m, unit, unit - first, sums[0]);
        });
        if (!starts) {   // this half's constants may be overwritten by the next layer's
            __syncwarp();
            if (b.lane == 0) barrier_arrive(b.used + 8 * half);
            b.turn ^= 1 << half;
        }
        if (kind == QKV) grid_arrive(b);   // attention fetches older keys before it waits
        else if (kind != HEAD) grid_barrier(b);
    }
}

__device__ __forceinline__ void consume_all(Block& b, u64* out, int steps, bool greedy) {
    u64* tokens = (u64*)b.table[TOKENS];
    u64* positions = (u64*)b.table[POSITIONS];
    u32* epoch = (u32*)b.table[FLAGS] + b.id;   // where the last launch ended, the same for all
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(b.epoch) : "l"(epoch) : "memory");
    for (int m = b.thread; m < M; m += THREADS) b.tokens[m] = (int)tokens[m], b.positions[m] = (int)positions[m];
    consumers_sync();
    for (int step = 0; step < steps; ++step) {
        Best best[BEST_ITEMS];
#pragma unroll
        for (int i = 0; i < BEST_ITEMS; ++i) best[i] = {__int_as_float(0xff800000), VOCAB};
        compute_step(b, best);
        if (greedy) publish_best(b, best);
        grid_barrier(b);
        if (greedy) choose(b, out + (size_t)step * M);
    }
    if (FLAGGED && b.thread == 0) *epoch = b.epoch;
    // Every block has begun (this one has what all others wrote), so all have read what is overwritten here.
    if (b.id == 0 && greedy)
        for (int m = b.thread; m < M; m += THREADS) tokens[m] = b.tokens[m], positions[m] = b.positions[m];
}

extern "C" __global__ void __launch_bounds__(THREADS + 32 + HELPERS, 1)
persistent_decode(const u64* table, u64* out, int steps, int greedy) {
    extern __shared__ __align__(1024) char memory[];
    Block b;
    b.id = blockIdx.x, b.thread = threadIdx.x, b.warp = threadIdx.x / 32, b.lane = threadIdx.x % 32;
    b.quad = b.lane / 4, b.place = b.lane % 4, b.stage = b.parity = b.red_turn = b.turn = 0;
    char* at = memory + STAGES * STAGE_BYTES;
    *(uint4*)at = make_uint4(0, 0, 0, 0);
    b.zeros = shared_address(at), at += 16;
    b.ring = shared_address(memory);
    b.staged = shared_address(at), b.staged_ptr = at, b.attention = (float*)at, at += STAGED_BYTES;
    b.red = (float*)at, at += RED_BUFFERS * WARPS * M * GROUP_ROWS * 4;
    b.norm_constants = (u16*)at, at += 2 * HALF_NORM * 2;
    b.bias_constants = (float*)at, at += (first_biases(0) + first_biases(1) + 2 * OWN_ROWS + 3) / 4 * 16;
    u64* local = (u64*)at;
    b.table = local, at += (POINTERS + LAYERS * LAYER_POINTERS) * 8;
    b.full = shared_address(at), at += 8 * STAGES;
    b.empty = shared_address(at), at += 8 * STAGES;
    b.ready = shared_address(at), at += 16;
    b.used = shared_address(at), at += 16;
    b.slabs = (Slab*)at, at += 5 * sizeof(Slab);
    b.cuts = (Cut*)at, at += 45 * sizeof(Cut);
    b.angles = (float2*)at, at += M * ROTARY_DIM / 2 * 8;
    b.own = (float*)at, at += M * OWN_ROWS * 4;
    b.stats = (float*)at, at += WARPS * 2 * 4;
    b.tokens = (int*)at, at += M * 4;
    b.positions = (int*)at, at += M * 4;
    b.slots = (int*)at, at += M * 4;
    b.origins = (float*)at;
    for (int i = b.thread; i < POINTERS + LAYERS * LAYER_POINTERS; i += blockDim.x) local[i] = table[i];
    tabulate(b);
    if (b.thread == 0) {
        for (int i = 0; i < STAGES; ++i) barrier_init(b.full + 8 * i, 1), barrier_init(b.empty + 8 * i, WARPS);
        for (int i = 0; i < 2; ++i) barrier_init(b.ready + 8 * i, HELPERS), barrier_init(b.used + 8 * i, WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (b.warp == WARPS) feed_all(b, steps);
    else if (b.warp > WARPS) prepare_all(b, steps);
    else consume_all(b, out, steps, greedy);
}
