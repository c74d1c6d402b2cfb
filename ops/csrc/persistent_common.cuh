// The shape of one model and batch, what a block of the persistent kernel holds, and how blocks tell each other things. All
// macros come from the host (ops/specialized/persistent.py says what each means).
#pragma once

constexpr int WARPS = 8, THREADS = 32 * WARPS;   // consumers; one more warp feeds the ring
constexpr int GROUP_ROWS = 32;                       // rows whose sums are added up together
constexpr int Q_SIZE = HEADS * HEAD_DIM, KV_SIZE = KV_HEADS * HEAD_DIM, QKV_SIZE = Q_SIZE + 2 * KV_SIZE;
constexpr int SHARING = HEADS / KV_HEADS;            // query heads on one KV head
constexpr bool ROTARY_HALVES = ROTARY_DIM > 0 && !ROTARY_INTERLEAVED;
constexpr int RED_BUFFERS = M <= 4 ? 2 : 1;
constexpr int HELPERS = 32;                          // a warp that fetches norms' weights and biases ahead of time
constexpr int HALF_NORM = (RMS_NORM ? 1 : 2) * HIDDEN;   // 16-bit elements

enum Half { ATTENTION_HALF, FFN_HALF };
enum Kind { QKV, OUT, UP, DOWN, HEAD };   // the products of a step, in order: the first four for each layer

__host__ __device__ constexpr int round32(int k) { return (k + 31) / 32 * 32; }
__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
// Bytes from row to row: odd in units of 64, which keeps two rows out of each other's banks.
__host__ __device__ constexpr int pitch_of(int k) { return 2 * round32(k) + (round32(k) % 64 ? 0 : 64); }

// A product y = x W^T: UNITS of UNIT rows each, of K columns. A block owns consecutive units, takes them in groups of PER (the
// last may be short), and the rows of a group in tiles of TALL, at most 8 and as equal as may be. A stage of the ring holds
// COLUMNS columns of one tile: few equal stages a row, since a bulk copy costs the same whatever its length.
template <int KIND>
struct Product {
    static constexpr int K = KIND == OUT ? Q_SIZE : KIND == DOWN ? FFN : HIDDEN;
    // A rotary pair, or two where their halves lie apart; two outputs of the up projection, each with its gate.
    static constexpr int UNIT = KIND == QKV ? (ROTARY_HALVES ? 4 : 2) : KIND == UP ? (GATED ? 4 : 2) : 1;
    static constexpr int UNITS = KIND == QKV ? QKV_SIZE / UNIT : KIND == UP ? FFN / 2 : KIND == HEAD ? VOCAB : HIDDEN;
    static constexpr bool DIRECT = DOWN_DIRECT && KIND == DOWN;   // x is read from L2
    static constexpr int MOST_UNITS = ceil_div(UNITS, BLOCKS);
    static constexpr int GROUPS = ceil_div(MOST_UNITS * UNIT, GROUP_ROWS), PER = ceil_div(MOST_UNITS, GROUPS);
    static constexpr int ROWS = PER * UNIT, TILES = ceil_div(ROWS, 8), TALL = ceil_div(ROWS, TILES);
    static constexpr int MOST_COLUMNS = smaller((STAGE_BYTES / TALL - 64) / 2 / 32 * 32, DIRECT ? DIRECT_COLUMNS : 1024);
    static constexpr int COLUMNS = round32(ceil_div(K, ceil_div(K, MOST_COLUMNS))), PITCH = pitch_of(COLUMNS);
    static constexpr int BLOCKS_A_WARP = ceil_div(COLUMNS / 32, WARPS);
    static constexpr bool DEFERRED = DEFER && KIND != HEAD;   // the stages are given back by return_stages

    static __device__ __forceinline__ int first(int block) { return (u32)(block * UNITS) / BLOCKS; }

    // Which row of the weight is the i-th of a unit.
    static __device__ __forceinline__ int row(int unit, int i) {
        if (KIND == QKV && ROTARY_HALVES) {   // pairs that rotary embedding turns together; behind them, neighbours
            const int head = unit / (HEAD_DIM / 4), j = unit % (HEAD_DIM / 4);
            return head * HEAD_DIM + (j < ROTARY_DIM / 4 ? 2 * j + i % 2 + i / 2 * (ROTARY_DIM / 2) : 4 * j + i);
        }
        if (KIND == UP && GATED) return i / 2 * FFN + 2 * unit + i % 2;
        return unit * UNIT + i;
    }
};

// Biases that a block needs in each half of a layer: of the first product's rows, then of its rows of the stream.
__host__ __device__ constexpr int first_biases(int half) {
    return half == 0 ? Product<QKV>::MOST_UNITS * Product<QKV>::UNIT : Product<UP>::MOST_UNITS * Product<UP>::UNIT;
}

enum Pointer {
    TOKEN_TABLE, POSITION_TABLE, FINAL_WEIGHT, FINAL_BIAS, HEAD_WEIGHT, HEAD_BIAS, BLOCK_TABLE, TOKENS, POSITIONS, INV_FREQ,
    SLOPES, LOGITS, STREAM, HIDDEN_ACT, FRESH, ATTENDED, PARTIALS, BEST, TURNS, PAGES_A_ROW, POINTERS
};
enum LayerPointer {
    ATTN_NORM_WEIGHT, ATTN_NORM_BIAS, QKV_WEIGHT, QKV_BIAS, OUT_WEIGHT, OUT_BIAS, FFN_NORM_WEIGHT, FFN_NORM_BIAS, UP_WEIGHT,
    UP_BIAS, DOWN_WEIGHT, DOWN_BIAS, KEYS, VALUES, WINDOW, LAYER_POINTERS
};

// A block's shared memory: what lies where, in bytes.
constexpr int STAGED_AT = STAGES * STAGE_BYTES;   // behind the ring: x [M, k], 16-bit, rows of pitch_of(k); scratch in attention
constexpr int RED_AT = STAGED_AT + STAGED_BYTES;  // [RED_BUFFERS][WARPS][M][GROUP_ROWS] fp32, the warps' sums
constexpr int NORMS_AT = RED_AT + RED_BUFFERS * WARPS * M * GROUP_ROWS * 4;   // of each half of a layer: gain [HIDDEN], then shift
constexpr int BIASES_AT = NORMS_AT + 2 * HALF_NORM * 2;   // of each half, fp32: first_biases(half), then OWN_ROWS
constexpr int TABLE_AT = BIASES_AT + ceil_div(first_biases(0) + first_biases(1) + 2 * OWN_ROWS, 4) * 16;   // pointers: the model's, the layers'
constexpr int FULL_AT = TABLE_AT + (POINTERS + LAYERS * LAYER_POINTERS) * 8;   // barriers of the stages
constexpr int EMPTY_AT = FULL_AT + 8 * STAGES;
constexpr int READY_AT = EMPTY_AT + 8 * STAGES, USED_AT = READY_AT + 16;   // two each: a half's constants are there, are no longer needed
constexpr int ANGLES_AT = USED_AT + 16;            // [M][ROTARY_DIM / 2] cosine and sine at each row's position
constexpr int STATS_AT = ANGLES_AT + M * ROTARY_DIM / 2 * 8;   // [WARPS] float2
constexpr int OWN_AT = STATS_AT + WARPS * 8;      // [M][OWN_ROWS] fp32, the residual stream of the rows that this block computes
constexpr int TOKENS_AT = OWN_AT + M * OWN_ROWS * 4, POSITIONS_AT = TOKENS_AT + 4 * M;
constexpr int AHEAD_AT = POSITIONS_AT + 4 * M;    // [M] the positions of the step that the helping warp has come to
constexpr int SLOTS_AT = AHEAD_AT + 4 * M;           // [M] where in the pools each row's new key and value go
constexpr int ORIGINS_AT = SLOTS_AT + 4 * M;      // [M] an element of each row of the stream, as it was before the last addition
constexpr int FED_AT = ORIGINS_AT + 4 * M;         // stages that the feeding warp has asked for in this launch
static_assert(FED_AT + 4 <= SHARED_BYTES, "the host has counted less");

extern __shared__ __align__(1024) char memory[];

// What a thread of a block knows. The memory's parts are functions: their addresses are constants, and take no register.
struct Block {
    int id, thread, warp, lane, quad, place;   // quad: lane / 4, place: lane % 4
    u32 stage, parity, red_turn;
    u32 owed;               // stages that have been read and not been given back
    u32 halves;             // parities of ready and used: a bit for each half
    u32 turns;              // which of its two buffers each exchange uses: a bit for each Turn

    static __device__ __forceinline__ u32 address(int at) { return shared_address(memory) + at; }
    static __device__ __forceinline__ char* staged() { return memory + STAGED_AT; }
    static __device__ __forceinline__ float* red() { return (float*)(memory + RED_AT); }
    static __device__ __forceinline__ u16* norms(int half) { return (u16*)(memory + NORMS_AT) + half * HALF_NORM; }
    static __device__ __forceinline__ float* biases(int half) {
        return (float*)(memory + BIASES_AT) + half * (first_biases(0) + OWN_ROWS);
    }
    static __device__ __forceinline__ float2* angles(int m) { return (float2*)(memory + ANGLES_AT) + m * (ROTARY_DIM / 2); }
    static __device__ __forceinline__ float2* stats() { return (float2*)(memory + STATS_AT); }
    static __device__ __forceinline__ float* own(int m) { return (float*)(memory + OWN_AT) + m * OWN_ROWS; }
    static __device__ __forceinline__ int& token(int m) { return ((int*)(memory + TOKENS_AT))[m]; }
    static __device__ __forceinline__ int* positions() { return (int*)(memory + POSITIONS_AT); }
    static __device__ __forceinline__ int* positions_ahead() { return (int*)(memory + AHEAD_AT); }
    static __device__ __forceinline__ int& slot(int m) { return ((int*)(memory + SLOTS_AT))[m]; }
    static __device__ __forceinline__ float& origin(int m) { return ((float*)(memory + ORIGINS_AT))[m]; }
    static __device__ __forceinline__ volatile u32& fed() { return *(volatile u32*)(memory + FED_AT); }
    static __device__ __forceinline__ u64 entry(int which) { return ((const u64*)(memory + TABLE_AT))[which]; }
    static __device__ __forceinline__ const u16* weight(int which) { return (const u16*)entry(which); }
    static __device__ __forceinline__ const u16* layer_weight(int layer, int which) {
        return weight(POINTERS + layer * LAYER_POINTERS + which);
    }
    __device__ __forceinline__ void next_stage() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

__device__ __forceinline__ void consumers_sync() { named_sync<1, THREADS>(); }

// ---- what blocks tell each other ----
// A word of 32 bits (a float, or two 16-bit numbers) that is all ones has not arrived: no arithmetic ends in that NaN. A
// reader that finds anything else has the data: no flag, no fence, no barrier, one trip to L2. Every exchange has two buffers
// and alternates between them; whoever writes a word of one blanks the same word of the other, which by then everybody has
// read, since nobody can be in this exchange who has not finished the one before. What all blocks read has COPIES, each read by
// some of them: 132 readers of one line stand in line for it. On an H100 an exchange of 768 floats takes 1,750 cycles like
// this, 2,250 with 64-bit words that carry a flag and no copies, and 4,400 with a barrier of all blocks.

constexpr u32 NOTHING = 0xffffffffu;

enum Turn { LAYER_TURN, STREAM_TURN, BEST_TURN };

// One exchange: [2][LIKES][WORDS], LIKES being COPIES of what all blocks read, else 1.
template <Pointer BUFFER, Turn TURN, int WORDS, bool BY_ALL>
struct Exchange {
    static constexpr int LIKES = BY_ALL ? COPIES : 1;

    static __device__ __forceinline__ u32* buffer(const Block& b, u32 turn, int like) {
        return (u32*)b.entry(BUFFER) + ((turn & 1) * LIKES + like) * WORDS;
    }
    static __device__ __forceinline__ void put(const Block& b, int at, u32 word) {
        const u32 turn = b.turns >> TURN;
#pragma unroll
        for (int like = 0; like < LIKES; ++like) {
            put_word(buffer(b, turn, like) + at, word);
            put_word(buffer(b, turn ^ 1, like) + at, NOTHING);
        }
    }
    static __device__ __forceinline__ void put(const Block& b, int at, float value) {
        put(b, at, min(__float_as_uint(value), NOTHING - 1));
    }
    static __device__ __forceinline__ const u32* incoming(const Block& b) {
        return buffer(b, b.turns >> TURN, b.id % LIKES);
    }
};

constexpr int PARTIAL = HEAD_DIM + 4;   // a split's sums, its maximum, its denominator, and two words that keep 16-byte order
using StreamExchange = Exchange<STREAM, STREAM_TURN, M * HIDDEN, true>;
using ActivationExchange = Exchange<HIDDEN_ACT, LAYER_TURN, M * FFN / 2, true>;
using FreshExchange = Exchange<FRESH, LAYER_TURN, M * QKV_SIZE / 2, false>;   // queries, new keys and values
using AttendedExchange = Exchange<ATTENDED, LAYER_TURN, M * Q_SIZE / 2, true>;
using PartialExchange = Exchange<PARTIALS, LAYER_TURN, M * HEADS * MAX_SPLITS * PARTIAL, false>;
using BestExchange = Exchange<BEST, BEST_TURN, 2 * M * BLOCKS, false>;

__device__ __forceinline__ bool arrived(uint4 v) { return max(max(v.x, v.y), max(v.z, v.w)) != NOTHING; }

// Calls `look` (which loads everything that is awaited and says whether all of it is there) until it says yes: each look is
// one trip to L2, however many words it takes.
template <class Look>
__device__ __forceinline__ void await_all(Look look) {
    Watchdog dog;
    while (!look()) dog.tick();
}
