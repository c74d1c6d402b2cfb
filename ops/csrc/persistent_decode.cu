// A decoder's whole step in one launch, for up to 16 rows: embedding, five phases a layer, the head and, if asked, the greedy
// choice and further steps. One block a multiprocessor stays resident; weights stream through shared memory without a pause.

// ---- what becomes of a product's sums ----

__device__ __forceinline__ float bias_of(const u16* bias, int row) { return bias ? widen(__ldg(bias + row)) : 0.f; }

// Two neighbours of a row's queries, keys or values: to where attention looks for them, and into the cache.
__device__ __forceinline__ void send_fresh(const Block& b, int layer, int m, int row, float x, float y) {
    const u32 pair = narrow2(x, y);
    FreshExchange::put(b, (m * QKV_SIZE + row) / 2, pair);
    if (row < Q_SIZE) return;
    const int value = row >= Q_SIZE + KV_SIZE, element = row - Q_SIZE - value * KV_SIZE;
    u16* pool = (u16*)b.layer_weight(layer, value ? VALUES : KEYS);
    *(u32*)(pool + (size_t)b.slot(m) * KV_SIZE + element) = pair;
}

__device__ __forceinline__ void turn_pair(float2 angle, float& x, float& y) {
    const float turned = x * angle.x - y * angle.y;
    y = y * angle.x + x * angle.y, x = turned;
}

__device__ __forceinline__ void finish_qkv(const Block& b, int layer, int m, int unit, float* sums) {
    using P = Product<QKV>;
    constexpr int UNITS_A_HEAD = HEAD_DIM / P::UNIT;
    const int j = unit % UNITS_A_HEAD;
    const bool turned = ROTARY_DIM > 0 && j < ROTARY_DIM / P::UNIT && unit < (HEADS + KV_HEADS) * UNITS_A_HEAD;
    if (turned) {
        const float2* angle = b.angles(m) + j * (P::UNIT / 2);
        if (ROTARY_HALVES) turn_pair(angle[0], sums[0], sums[2]), turn_pair(angle[1], sums[1], sums[3]);
        else turn_pair(angle[0], sums[0], sums[1]);
    }
#pragma unroll
    for (int i = 0; i < P::UNIT; i += 2) send_fresh(b, layer, m, P::row(unit, i), sums[i], sums[i + 1]);
}

__device__ __forceinline__ void finish_up(const Block& b, int m, int unit, const float* sums) {
    float x = activate(sums[0]), y = activate(sums[1]);
    if (GATED) x *= sums[2], y *= sums[3];
    ActivationExchange::put(b, m * (FFN / 2) + unit, narrow2(x, y));
}

// Bias and residual; the stream's row stays with the block that owns it.
__device__ __forceinline__ void finish_stream(const Block& b, int m, int row, int local, float sum) {
    float* own = b.own(m) + local;
    *own += sum;
    StreamExchange::put(b, m * HIDDEN + row, *own);
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
    float* logits = (float*)b.entry(LOGITS);
    if (logits) logits[(size_t)m * VOCAB + row] = v;
    return better(best, {v, row});
}

// The block's best of each row, to all.
__device__ __forceinline__ void publish_best(const Block& b, const Best* best) {
#pragma unroll
    for (int i = 0; i < BEST_ITEMS; ++i) {
        const Best one = best_of_warp(best[i]);
        const int m = b.warp + i * WARPS;   // GROUP_ROWS is a warp: a warp holds one row's columns
        if (b.lane == 0 && m < M) {
            BestExchange::put(b, (m * BLOCKS + b.id) * 2, one.value);
            BestExchange::put(b, (m * BLOCKS + b.id) * 2 + 1, (u32)one.token);
        }
    }
}

// Every block finds the next token of every row by itself.
__device__ __forceinline__ void choose(const Block& b, u64* out) {
    constexpr int EACH = ceil_div(BLOCKS, 32);
    const u32* from = BestExchange::incoming(b);
    for (int m = b.warp; m < M; m += WARPS) {
        uint2 words[EACH];
        await_all([&] {
            u32 most = 0;
#pragma unroll
            for (int i = 0; i < EACH; ++i) words[i] = peek2(from + (m * BLOCKS + min(b.lane + 32 * i, BLOCKS - 1)) * 2);
#pragma unroll
            for (int i = 0; i < EACH; ++i) most = max(most, max(words[i].x, words[i].y));
            return most != NOTHING;
        });
        Best best = {__int_as_float(0xff800000), VOCAB};
#pragma unroll
        for (int i = 0; i < EACH; ++i) best = better(best, {__uint_as_float(words[i].x), (int)words[i].y});
        best = best_of_warp(best);
        if (b.lane == 0) {
            const bool finite = fabsf(best.value) < __int_as_float(0x7f800000);
            b.token(m) = min(best.token, VOCAB - 1);
            b.positions()[m] += 1;
            if (b.id == 0) out[m] = finite ? (u64)b.token(m) : ~(u64)b.token(m);
        }
    }
    consumers_sync();
}

// ---- the three sides of the kernel ----

// Biases of this block's rows of a product.
template <int KIND>
__device__ __forceinline__ void fetch_biases(const Block& b, const u16* bias, int thread, float* to) {
    using P = Product<KIND>;
    const int first = P::first(b.id), rows = (P::first(b.id + 1) - first) * P::UNIT;
    for (int i = thread; i < rows; i += HELPERS) to[i] = bias_of(bias, P::row(first + i / P::UNIT, i % P::UNIT));
}

// The helping warp: constants of each half of a layer into shared memory, while the half before is computed.
__device__ __forceinline__ void prepare_all(Block& b, int steps) {
    const int thread = b.thread - THREADS - 32;
    for (int half = 0, left = steps; left; half = half == 2 * LAYERS ? left -= 1, 0 : half + 1) {
        const int side = half % 2, layer = half / 2;
        const bool last = half == 2 * LAYERS;
        if (half == 0) {
            if (thread < M) b.positions_ahead()[thread] = (int)((const u64*)b.entry(POSITIONS))[thread] + steps - left;
            __syncwarp();
        }
        if (!side && !last) prefetch_keys(b, layer);
        const u16* gain = last ? b.weight(FINAL_WEIGHT) : b.layer_weight(layer, side ? FFN_NORM_WEIGHT : ATTN_NORM_WEIGHT);
        const u16* shift = last ? b.weight(FINAL_BIAS) : b.layer_weight(layer, side ? FFN_NORM_BIAS : ATTN_NORM_BIAS);
        barrier_wait(b.address(USED_AT) + 8 * side, (b.halves >> side & 1) ^ 1);
        uint4* norms = (uint4*)b.norms(side);
        for (int i = thread; i < HIDDEN / 8; i += HELPERS) {
            norms[i] = __ldg((const uint4*)gain + i);
            if (!RMS_NORM) norms[HIDDEN / 8 + i] = __ldg((const uint4*)shift + i);
        }
        if (!last) {
            float *first = b.biases(side), *second = first + first_biases(side);
            if (side) fetch_biases<UP>(b, b.layer_weight(layer, UP_BIAS), thread, first);
            else fetch_biases<QKV>(b, b.layer_weight(layer, QKV_BIAS), thread, first);
            fetch_biases<OUT>(b, b.layer_weight(layer, side ? DOWN_BIAS : OUT_BIAS), thread, second);
        }
        barrier_arrive(b.address(READY_AT) + 8 * side);
        b.halves ^= 1 << side;
    }
}

__device__ __forceinline__ float embedded(const Block& b, int m, int k) {
    float v = widen(__ldg(b.weight(TOKEN_TABLE) + (size_t)b.token(m) * HIDDEN + k)) * EMBEDDING_SCALE;
    if (LEARNED_POSITIONS) v += widen(__ldg(b.weight(POSITION_TABLE) + (size_t)(b.positions()[m] + POSITION_OFFSET) * HIDDEN + k));
    return v;
}

// Positions of the step: where new keys go, the angles; and the embedding of the stream's own rows, sent to all.
__device__ __forceinline__ void begin_step(const Block& b) {
    const int first = Product<OUT>::first(b.id), rows = Product<OUT>::first(b.id + 1) - first;
    for (int i = b.thread; i < M * rows; i += THREADS) {
        const int m = i / rows, row = i % rows;
        const float v = embedded(b, m, first + row);
        b.own(m)[row] = v;
        StreamExchange::put(b, m * HIDDEN + first + row, v);
    }
    for (int m = b.thread; m < M; m += THREADS) b.slot(m) = (int)pool_slot(b, m, b.positions()[m]), b.origin(m) = 0.f;
    for (int i = b.thread; i < M * (ROTARY_DIM / 2); i += THREADS) {
        const int m = i / max(ROTARY_DIM / 2, 1), j = i % max(ROTARY_DIM / 2, 1);
        float2 angle;
        sincosf(b.positions()[m] * __ldg((const float*)b.entry(INV_FREQ) + j), &angle.y, &angle.x);
        b.angles(m)[j] = make_float2(angle.x * ROTARY_FACTOR, angle.y * ROTARY_FACTOR);
    }
    consumers_sync();
}

// This half's constants may be overwritten by the next layer's.
__device__ __forceinline__ void release_constants(Block& b, int half) {
    __syncwarp();
    if (b.lane == 0) barrier_arrive(b.address(USED_AT) + 8 * half);
    b.halves ^= 1 << half;
}

__device__ __forceinline__ void add_bias(float* sums, const float* bias, int rows) {
    for (int i = 0; i < rows; ++i) sums[i] += bias[i];
}

__device__ __forceinline__ void attention_half(Block& b, int layer) {
    const float* bias = b.biases(ATTENTION_HALF);
    multiply<QKV>(b, [&](int, int m, int unit, float* sums) {
        using P = Product<QKV>;
        add_bias(sums, bias + (unit - P::first(b.id)) * P::UNIT, P::UNIT);
        finish_qkv(b, layer, m, unit, sums);
    });
    attend(b, layer);
    stage_halves<Q_SIZE, AttendedExchange>(b);
    consumers_sync();
    return_stages(b);
    if (b.thread < M) b.origin(b.thread) = b.own(b.thread)[0];
    multiply<OUT>(b, [&](int, int m, int row, float* sums) {
        const int local = row - Product<OUT>::first(b.id);
        finish_stream(b, m, row, local, sums[0] + bias[first_biases(ATTENTION_HALF) + local]);
    });
}

__device__ __forceinline__ void ffn_half(Block& b) {
    const float* bias = b.biases(FFN_HALF);
    multiply<UP>(b, [&](int, int m, int unit, float* sums) {
        using P = Product<UP>;
        add_bias(sums, bias + (unit - P::first(b.id)) * P::UNIT, P::UNIT);
        finish_up(b, m, unit, sums);
    });
    if (!DOWN_DIRECT) {
        stage_halves<FFN, ActivationExchange>(b);
        consumers_sync();
    }
    return_stages(b);
    if (b.thread < M) b.origin(b.thread) = b.own(b.thread)[0];
    multiply<DOWN>(b, [&](int, int m, int row, float* sums) {
        const int local = row - Product<DOWN>::first(b.id);
        finish_stream(b, m, row, local, sums[0] + bias[first_biases(FFN_HALF) + local]);
    });
    b.turns ^= 1 << LAYER_TURN;
}

__device__ __forceinline__ void compute_step(Block& b, Best* best) {
    begin_step(b);
#pragma unroll 1
    for (int half = 0; half <= 2 * LAYERS; ++half) {
        const int side = half & 1;
        stage_stream(b, side);
        if (HIDDEN % 32) clear_staged_tail<HIDDEN>(b);
        consumers_sync();
        return_stages(b);
        b.turns ^= 1 << STREAM_TURN;
        if (half == 2 * LAYERS) break;
        if (side) ffn_half(b);
        else attention_half(b, half / 2);
        release_constants(b, side);
    }
    __threadfence();   // what was appended to the cache is seen by whoever sees this step's choice
    multiply<HEAD>(b, [&](int item, int m, int unit, float* sums) {
#pragma unroll
        for (int i = 0; i < BEST_ITEMS; ++i)
            if (i == item) best[i] = finish_head(b, m, unit, sums[0], best[i]);
    });
    release_constants(b, ATTENTION_HALF);
}

__device__ __forceinline__ void consume_all(Block& b, u64* out, int steps, bool greedy) {
    u64* tokens = (u64*)b.entry(TOKENS);
    u64* positions = (u64*)b.entry(POSITIONS);
    u32* turns = (u32*)b.entry(TURNS) + b.id;   // where the last launch ended, the same for all
    b.turns = load_l2_word(turns);
    for (int m = b.thread; m < M; m += THREADS) b.token(m) = (int)tokens[m], b.positions()[m] = (int)positions[m];
    consumers_sync();
    for (int step = 0; step < steps; ++step) {
        Best best[BEST_ITEMS];
#pragma unroll
        for (int i = 0; i < BEST_ITEMS; ++i) best[i] = {__int_as_float(0xff800000), VOCAB};
        compute_step(b, best);
        if (!greedy) continue;
        publish_best(b, best);
        choose(b, out + (size_t)step * M);
        b.turns ^= 1 << BEST_TURN;
    }
    if (b.thread == 0) *turns = b.turns;
    // Every block has begun (this one has what all others wrote), so all have read what is overwritten here.
    if (b.id == 0 && greedy)
        for (int m = b.thread; m < M; m += THREADS) tokens[m] = b.token(m), positions[m] = b.positions()[m];
}

extern "C" __global__ void __launch_bounds__(THREADS + 32 + HELPERS + 32, 1)
persistent_decode(const u64* table, u64* out, int steps, int greedy) {
    Block b;
    b.id = blockIdx.x, b.thread = threadIdx.x, b.warp = __shfl_sync(~0u, threadIdx.x / 32, 0), b.lane = threadIdx.x % 32;
    b.quad = b.lane / 4, b.place = b.lane % 4, b.stage = b.parity = b.red_turn = b.halves = b.turns = b.owed = 0;
    for (int i = b.thread; i < POINTERS + LAYERS * LAYER_POINTERS; i += blockDim.x) ((u64*)(memory + TABLE_AT))[i] = table[i];
    if (b.thread == 0) {
        b.fed() = 0;
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(b.address(FULL_AT) + 8 * i, 1);
            barrier_init(b.address(EMPTY_AT) + 8 * i, WARPS);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(b.address(READY_AT) + 8 * i, HELPERS);
            barrier_init(b.address(USED_AT) + 8 * i, WARPS);
        }
        show_barriers();
    }
    __syncthreads();
    if (b.warp == WARPS) feed_all(b, steps);
    else if (b.warp == WARPS + 1) prepare_all(b, steps);
    else if (b.warp == WARPS + 2) scout_all(b, steps);
    else consume_all(b, out, steps, greedy);
}
