// What a block of the persistent encoder holds, how products are cut, and how blocks wait for each other. All macros come from
// the host (ops/specialized/persistent_encoder.py says what each means).
#pragma once

constexpr int CONSUMERS = 128, THREADS = CONSUMERS + 32;   // a warp group that multiplies, and the warp that feeds it
constexpr int TILE = 64, X_TILE = X_ROWS * 128;            // rows a product takes, and columns a step; bytes of X_ROWS by TILE
constexpr int QKV_SIZE = 3 * HIDDEN;
constexpr int LONGEST_PART = 32;                           // keys a warp takes at a time
constexpr int PARTS = 4 * LONGEST_PART;

enum Kind { QKV, OUT, UP, DOWN };
enum LayerPointer { QKV_BIAS, OUT_BIAS, NORM1_WEIGHT, NORM1_BIAS, UP_BIAS, DOWN_BIAS, NORM2_WEIGHT, NORM2_BIAS, LAYER_POINTERS };

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// y = x W^T in units of 64 rows by WIDE columns by K / SPLIT.
template <int KIND>
struct Product {
    static constexpr int N = KIND == QKV ? QKV_SIZE : KIND == UP ? FFN : HIDDEN;
    static constexpr int K = KIND == DOWN ? FFN : HIDDEN;
    static constexpr int WIDE = KIND == QKV ? QKV_WIDE : KIND == OUT ? OUT_WIDE : KIND == UP ? UP_WIDE : DOWN_WIDE;
    static constexpr int SPLIT = KIND == OUT ? OUT_SPLIT : KIND == DOWN ? DOWN_SPLIT : 1;
    static constexpr int STRIPES = ceil_div(N, WIDE), UNITS = ROW_TILES * STRIPES * SPLIT;
    static constexpr int STEPS = ceil_div(ceil_div(K, TILE), SPLIT);   // tiles of a unit, the last part's may be fewer
    static constexpr int W_BYTES = WIDE * 128;
    static_assert(W_BYTES <= STAGE_BYTES, "the host has counted less");
    static __device__ __forceinline__ int rows(int unit) { return unit % ROW_TILES * TILE; }
    static __device__ __forceinline__ int column(int unit) { return unit / ROW_TILES % STRIPES * WIDE; }
    static __device__ __forceinline__ int part(int unit) { return unit / (ROW_TILES * STRIPES); }
    static __device__ __forceinline__ int first(int unit) { return part(unit) * STEPS; }
    static __device__ __forceinline__ int last(int unit) { return min(first(unit) + STEPS, ceil_div(K, TILE)); }
};

// Shared memory, in bytes. Tiles begin at multiples of 1024, as their swizzle wants it. In front a unit's x, its tiles one behind
// the other: a product takes 64 rows of each, and behind those that are there finds some of the next tile, or of the ring.
__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }
constexpr int X_STEPS = most(most(Product<QKV>::STEPS, Product<OUT>::STEPS), most(Product<UP>::STEPS, Product<DOWN>::STEPS));
constexpr int RING_AT = X_STEPS * X_TILE, SCRATCH_AT = RING_AT + STAGES * STAGE_BYTES;
static_assert(STAGES * STAGE_BYTES >= TILE * 128, "a product would read behind the ring");
constexpr int V_PITCH = 2 * HEAD_DIM + 16, V_BYTES = 4 * LONGEST_PART * V_PITCH, SUM_BYTES = 4 * 16 * HEAD_DIM * 4;
constexpr int SPAN = 64, STAGED_PITCH = 4 * SPAN + 16, STAGED_BYTES = 4 * 16 * STAGED_PITCH;   // results on their way out
constexpr int SCRATCH = most(most(V_BYTES, SUM_BYTES), STAGED_BYTES);
constexpr int STATS_AT = SCRATCH_AT + SCRATCH;      // [4][16] float2: each warp's maximum and sum of 16 queries; norms' sums
constexpr int RANGES_AT = STATS_AT + 4 * 16 * 8;    // [ROW_TILES * TILE] ushort2: the sequence of each row, begin and end
constexpr int FULL_AT = RANGES_AT + ROW_TILES * TILE * 4, EMPTY_AT = FULL_AT + 8 * STAGES;
static_assert(EMPTY_AT + 8 * STAGES <= SHARED_BYTES, "the host has counted less");

extern __shared__ __align__(1024) char memory[];

struct Block {
    int id, thread, warp, lane, quad, place;
    u32 stage, parity;
    const Map* maps;        // of each layer's four weights
    const u64* pointers;    // LAYER_POINTERS a layer
    u16 *normed, *middle, *attended, *activations;   // x of QKV, up, projection and down: of even and odd layers
    u16* three_qkv;         // of three layers in turn
    u16* result;
    float* partials;        // [OUT_SPLIT + DOWN_SPLIT][rows][HIDDEN]
    int rows;
    static __device__ __forceinline__ u32 address(int at) { return shared_address(memory) + at; }
    __device__ __forceinline__ void next_stage() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    __device__ __forceinline__ const u16* constant(int layer, int which) const {
        return (const u16*)__ldg(pointers + layer * LAYER_POINTERS + which);
    }
    __device__ __forceinline__ const Map* weight(int layer, int kind) const { return maps + 4 * layer + kind; }
    __device__ __forceinline__ float* sums_of(int kind, int part) const {
        return partials + (size_t)((kind == DOWN ? OUT_SPLIT : 0) + part) * (ROW_TILES * TILE * HIDDEN);
    }
    static __device__ __forceinline__ size_t turn(int layer, int columns) { return (size_t)(layer & 1) * (ROW_TILES * TILE) * columns; }
    __device__ __forceinline__ u16* normed_of(int layer) const { return layer < LAYERS ? normed + turn(layer, HIDDEN) : result; }
    __device__ __forceinline__ u16* middle_of(int layer) const { return middle + turn(layer, HIDDEN); }
    __device__ __forceinline__ u16* attended_of(int layer) const { return attended + turn(layer, HIDDEN); }
    __device__ __forceinline__ u16* activations_of(int layer) const { return activations + turn(layer, FFN); }
    __device__ __forceinline__ u16* qkv_of(int layer) const {
        return three_qkv + (size_t)(layer % 3) * (ROW_TILES * TILE * QKV_SIZE);
    }
};

__device__ __forceinline__ void consumers_sync() { named_sync<1, CONSUMERS>(); }

// ---- how blocks wait for each other ----
// What one writes, others look at until it is there: all ones, which no result is (a NaN has other bits), mean that it is not. No
// phase waits for all blocks. A row's norm puts back what the phases before it have read of that row:
//   - its sums depend on all of attention's results of the 64 rows that are multiplied together, those on QKV's results of all
//     rows of their sequences (a row of none is a sequence by itself), and those on the rows that QKV read. So once they are
//     there, QKV has read its x, and the projection what attention gave. In the same way up and down;
//   - keys and values others of the sequence may be about to read still, but no longer those of the layer before.
// Who reads must not take what lies there of a layer before, which may not have been put back: a block that has a part of one
// product only has seen nothing since. So a layer uses other room than the one before. The norm behind the one that puts back
// tells of it: it fences, and who comes to a layer has read rows that depend on its rows. That is a layer later, and for keys and
// values two.

constexpr u32 NOTHING = ~0u;

__device__ __forceinline__ bool there(uint2 v) { return v.x != NOTHING && v.y != NOTHING; }
__device__ __forceinline__ bool there(uint4 v) { return v.x != NOTHING && v.y != NOTHING && v.z != NOTHING && v.w != NOTHING; }
__device__ __forceinline__ void peek(uint2& v, const void* p) { v = peek2((const u32*)p); }
__device__ __forceinline__ void peek(uint4& v, const void* p) { v = peek4((const u32*)p); }

// COUNT pieces; `at(i)` is where piece i lies. The last one is looked at alone until it is there: to look at all of them takes
// several times as long, and holds up those who write. Then the others are, as a rule.
template <int COUNT, class Piece, class At>
__device__ __forceinline__ void take(Piece* v, At at) {
    Watchdog dog;
    for (peek(v[COUNT - 1], at(COUNT - 1)); !there(v[COUNT - 1]); peek(v[COUNT - 1], at(COUNT - 1))) dog.tick();
    while (true) {
        bool all = true;
#pragma unroll
        for (int i = 0; i < COUNT - 1; ++i) peek(v[i], at(i));
#pragma unroll
        for (int i = 0; i < COUNT - 1; ++i) all = all && there(v[i]);
        if (all) return;
        dog.tick();
    }
}

// The same for pieces that were asked for before.
template <int COUNT, class Piece, class At>
__device__ __forceinline__ void take_missing(Piece* v, At at) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) all = all && there(v[i]);
    if (!all) take<COUNT>(v, at);
}

// Puts back `count` pieces of a row, by all consumers.
__device__ __forceinline__ void forget(const Block& b, u16* row, int count) {
    for (int i = b.thread; i < count; i += CONSUMERS) put_piece(row + 8 * i, make_uint4(NOTHING, NOTHING, NOTHING, NOTHING));
}
