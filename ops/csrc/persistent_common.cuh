// The shape of one model and batch, and what a block of the persistent kernel holds. All macros come from the host
// (ops/specialized/persistent.py says what each means). There is one copy of each part of the code, in loops over phases: a
// GPT-2 of 189 KB of unrolled code took 336 us a token where 77 KB took 279.
#pragma once

constexpr int WARPS = 8, THREADS = 32 * WARPS;   // consumers; one more warp feeds the ring
constexpr int GROUP_ROWS = 32;                       // rows whose sums are added up together
constexpr int Q_SIZE = HEADS * HEAD_DIM, KV_SIZE = KV_HEADS * HEAD_DIM;
constexpr int SHARING = HEADS / KV_HEADS;            // query heads on one KV head
constexpr int PARTIAL = HEAD_DIM + 2;                // a split's sums, its maximum, its denominator
constexpr int UP_UNIT = GATED ? 4 : 2;               // rows of the up projection that give two outputs
constexpr bool FLAGGED = M <= FLAGGED_BATCH;         // words that blocks exchange carry flags
static_assert(BLOCKS <= THREADS, "each flag has a thread that waits for it");
constexpr bool RAGGED = HIDDEN % 32 || Q_SIZE % 32 || FFN % 32;   // some product has columns that fill no block of 32
constexpr int RED_BUFFERS = M <= 4 ? 2 : 1;
constexpr int HELPERS = 96;                          // threads that fetch norms' weights and biases ahead of time
constexpr int QKV_ROWS = Q_SIZE + 2 * KV_SIZE;
// Biases that a block needs in each half of a layer: of the first product's rows, then of its rows of the stream.
__host__ __device__ constexpr int first_biases(int half) {
    return half == 0 ? (QKV_ROWS / 2 / BLOCKS + 1) * 2 : (FFN / 2 / BLOCKS + 1) * UP_UNIT;
}
constexpr int HALF_NORM = (RMS_NORM ? 1 : 2) * HIDDEN;   // 16-bit elements

enum Half { ATTENTION_HALF, FFN_HALF };
enum Kind { QKV, OUT, UP, DOWN, HEAD };   // the products of a step, in order: the first four for each layer

// A product's sizes: `units` of `unit` rows each, of k columns.
struct Shape {
    int k, unit, units;
};

__device__ __forceinline__ Shape shape_of(int kind) {
    Shape s = {HIDDEN, 1, HIDDEN};
    if (kind == QKV) s.unit = 2, s.units = QKV_ROWS / 2;
    if (kind == UP) s.unit = UP_UNIT, s.units = FFN / 2;
    if (kind == HEAD) s.units = VOCAB;
    if (kind == OUT) s.k = Q_SIZE;
    if (kind == DOWN) s.k = FFN;
    return s;
}

enum Pointer {
    TOKEN_TABLE, POSITION_TABLE, FINAL_WEIGHT, FINAL_BIAS, HEAD_WEIGHT, HEAD_BIAS, BLOCK_TABLE, TOKENS, POSITIONS, INV_FREQ,
    SLOPES, LOGITS, STREAM, HIDDEN_ACT, QUERIES, NEW_KV, PARTIALS, BEST, FLAGS, PAGES_A_ROW, POINTERS
};
enum LayerPointer {
    ATTN_NORM_WEIGHT, ATTN_NORM_BIAS, QKV_WEIGHT, QKV_BIAS, OUT_WEIGHT, OUT_BIAS, FFN_NORM_WEIGHT, FFN_NORM_BIAS, UP_WEIGHT,
    UP_BIAS, DOWN_WEIGHT, DOWN_BIAS, KEYS, VALUES, WINDOW, LAYER_POINTERS
};

__host__ __device__ constexpr int round32(int k) { return (k + 31) / 32 * 32; }
__host__ __device__ constexpr int staged_pitch(int k) { return 2 * round32(k) + (round32(k) % 64 ? 0 : 64); }   // bytes of a row of x

// What a block computes of a product: units [first, first + units) in `groups` groups of `per` units (the last may be short).
struct Slab {
    int first, units, groups, per;
};

// How a tile of so many rows lies in a stage: its columns, and the bytes from row to row.
struct Cut {
    int columns, pitch;
};

struct Block {
    const u64* table;       // pointers of the model, then of each layer; in shared memory
    u32 ring, full, empty;  // shared addresses: stages, and their barriers
    u32 staged;             // shared address of x [M, k], 16-bit, rows of staged_pitch(k)
    char* staged_ptr;
    u32 zeros;              // shared address of 16 bytes of zeros
    u16* norm_constants;    // of each half of a layer: gain [HIDDEN], then shift
    float* bias_constants;  // of each half: first_biases(half), then OWN_ROWS
    u32 ready, used;        // shared addresses of two barriers each: a half's constants are there, are no longer needed
    float* red;             // [RED_BUFFERS][WARPS][M][GROUP_ROWS]
    float* own;             // [M][OWN_ROWS] the residual stream of the rows that this block computes
    float* stats;           // [WARPS][2]
    float* attention;       // scratch, shares the memory of x
    int* tokens;            // [M]
    int* positions;         // [M]
    int* slots;             // [M] where in the pools each row's new key and value go
    int id, thread, warp, lane, quad, place;   // quad: lane / 4, place: lane % 4
    u32 stage, parity, red_turn, epoch;
    u32 turn;               // parities of ready and used: a bit for each half
    float* origins;         // [M] an element of each row of the stream, as it was before the last addition
    Slab* slabs;            // [5] by kind
    Cut* cuts;              // [5][9] by kind and rows of the tile
    float2* angles;         // [M][ROTARY_DIM / 2] cosine and sine at each row's position

    __device__ __forceinline__ u16* norms(int half) const { return norm_constants + half * HALF_NORM; }
    __device__ __forceinline__ float* biases(int half) const { return bias_constants + half * (first_biases(0) + OWN_ROWS); }
    __device__ __forceinline__ const u16* weight(int which) const { return (const u16*)table[which]; }
    __device__ __forceinline__ const u16* layer_weight(int layer, int which) const {
        return (const u16*)table[POINTERS + layer * LAYER_POINTERS + which];
    }
    __device__ __forceinline__ void next_stage() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// ---- what blocks tell each other: floats [.., n], with a flag each or plain and followed by a grid barrier ----
// A phase reads what was written in `epoch` and writes in `epoch + 1`; the grid barrier between phases counts it up.

__device__ __forceinline__ void publish(const Block& b, Pointer buffer, size_t at, float value) {
    if (FLAGGED) {
        put_flagged((u64*)b.table[buffer] + at, __float_as_uint(value), b.epoch + 1);
    } else {
        ((float*)b.table[buffer])[at] = value;
    }
}

struct Words {
    u64 a, b;   // two floats as they were found
};

__device__ __forceinline__ Words peek2(const Block& b, Pointer buffer, size_t at) {
    Words w;
    if (FLAGGED) {
        asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(w.a), "=l"(w.b) : "l"((u64*)b.table[buffer] + at) : "memory");
    } else {
        asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(w.a) : "l"((float*)b.table[buffer] + at) : "memory");
        w.b = 0;
    }
    return w;
}

__device__ __forceinline__ bool arrived(const Block& b, Words w) {
    return !FLAGGED || ((u32)(w.a >> 32) == b.epoch && (u32)(w.b >> 32) == b.epoch);
}

__device__ __forceinline__ float2 floats_of(Words w) {
    return make_float2(__uint_as_float((u32)w.a), __uint_as_float((u32)(FLAGGED ? w.b : w.a >> 32)));
}

// Calls `look` (which loads everything that is awaited and says whether all of it is there) until it says yes: each look is
// one trip to L2, however many words it takes.
template <class Look>
__device__ __forceinline__ void await_all(Look look) {
    Watchdog dog;
    while (!look()) dog.tick();
}

// Between phases every block waits for all others. Flags count up for ever, one a block. Where the data carry flags of their
// own there is nothing to do: whoever needs a word waits for that word. (Waiting for a barrier first, so that nobody asks in
// vain, was tried: a line that 132 blocks write and all of them read is slower than the asking.)
__device__ __forceinline__ void grid_arrive(Block& b) {
    ++b.epoch;
    if (FLAGGED) return;
    consumers_sync();
    if (b.thread == 0) {
        __threadfence();
        asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"((u32*)b.table[FLAGS] + b.id), "r"(b.epoch) : "memory");
    }
}

__device__ __forceinline__ void grid_wait(const Block& b) {
    if (FLAGGED) return;
    if (b.thread < BLOCKS) {
        const u32* flag = (u32*)b.table[FLAGS] + b.thread;
        Watchdog dog;
        u32 seen;
        do {
            dog.tick();
            asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
        } while ((int)(seen - b.epoch) < 0);
    }
    consumers_sync();   // what follows reads through L2 and depends on the flags: no L1, no speculation
}

__device__ __forceinline__ void grid_barrier(Block& b) {
    grid_arrive(b);
    grid_wait(b);
}
