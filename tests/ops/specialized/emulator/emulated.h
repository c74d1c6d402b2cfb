// A GPU for one launch of a few blocks, on one thread of the CPU: what the kernels' sources need in place of primitives.cuh and
// hopper.cuh. Every thread of a block is a fiber; who waits lets the next one run, so that all that the kernel says about order
// is kept and nothing else is: a wait that never ends is found (nobody moves any more), a missing wait is not always.
//
// Fragments, swizzle and barriers are written from the PTX manual, not from the kernels.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <ucontext.h>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

using std::max;
using std::min;

struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct ushort2 { u16 x, y; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline ushort2 make_ushort2(int x, int y) { return {(u16)x, (u16)y}; }
struct Three { u32 x, y, z; };

namespace emulated {

constexpr int SHARED = 232448;

void moved();

struct Barrier {   // an mbarrier
    u32 expected = 0, arrived = 0, phase = 0;
    long bytes = 0;
    void look() {
        if (arrived == expected && bytes == 0) arrived = 0, ++phase, moved();
    }
};

struct Gate {   // where a number of threads meet, again and again
    u32 arrived = 0, turn = 0;
};

struct Warp {
    u64 words[32][8];
    Gate gate;
};

struct Block {
    std::vector<char> shared = std::vector<char>(SHARED + 1024);
    std::map<u32, Barrier> barriers;
    std::map<int, Gate> gates;
    std::vector<Warp> warps;
    int id, threads;
    char* memory() {
        const uintptr_t at = (uintptr_t)shared.data();
        return shared.data() + ((at + 1023) / 1024 * 1024 - at);
    }
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Block* block;
    Three thread;
    bool done = false;
    const u32* word = nullptr;   // while it holds this value, there is nothing to run
    u32 value = 0;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Fiber* current;
inline ucontext_t home;
inline u64 idle;
inline bool stuck;
inline u32 seed = 1;   // of the order in which threads run
inline std::function<void()> body;

inline void moved() { idle = 0; }

// Nobody has done anything for long: nobody ever will.
inline void look_idle() {
    if (++idle > 3000 * (u64)fibers.size()) stuck = true;
}

// Lets the others run, until a word is no longer what it is.
inline void wait_while(const u32* word, u32 value) {
    current->word = word, current->value = value;
    swapcontext(&current->context, &home);
    current->word = nullptr;
}

// Lets the others run once.
inline void sleep() {
    look_idle();
    swapcontext(&current->context, &home);
}

inline void enter() {
    body();
    current->done = true;
    idle = 0;
    swapcontext(&current->context, &home);
}

// Whether the launch came to its end.
inline bool launch(int blocks, int threads, std::function<void()> kernel) {
    body = kernel;
    idle = 0, stuck = false;
    std::vector<std::unique_ptr<Block>> all;
    fibers.clear();
    for (int b = 0; b < blocks; ++b) {
        all.push_back(std::make_unique<Block>());
        all.back()->id = b, all.back()->threads = threads, all.back()->warps.resize((threads + 31) / 32);
        memset(all.back()->shared.data(), 0x7e, all.back()->shared.size());   // large numbers, where nothing was written
        for (int t = 0; t < threads; ++t) {
            auto fiber = std::make_unique<Fiber>();
            fiber->stack = std::make_unique<char[]>(1 << 17);
            fiber->block = all.back().get(), fiber->thread = {(u32)t, 0, 0};
            getcontext(&fiber->context);
            fiber->context.uc_stack.ss_sp = fiber->stack.get(), fiber->context.uc_stack.ss_size = 1 << 17;
            makecontext(&fiber->context, enter, 0);
            fibers.push_back(std::move(fiber));
        }
    }
    // Blocks take turns in another order each time, warps within them too, and now and then one is held up: what only
    // works while all keep step does not.
    std::minstd_rand chance(seed);
    std::vector<int> order(blocks), held(blocks, 0);
    for (int b = 0; b < blocks; ++b) order[b] = b;
    for (bool left = true; left && !stuck;) {
        left = false;
        std::shuffle(order.begin(), order.end(), chance);
        for (int b : order) {
            if (held[b] == 0 && chance() % 64 == 0) held[b] = chance() % 400;
            const int first = chance() % (threads / 32) * 32;
            for (int t = 0; t < threads; ++t) {
                auto& fiber = fibers[b * threads + (first + t) % threads];
                if (fiber->done) continue;
                left = true;
                if (held[b] || (fiber->word && *fiber->word == fiber->value)) {
                    look_idle();
                    continue;
                }
                current = fiber.get();
                swapcontext(&home, &fiber->context);
            }
            if (held[b]) --held[b];
        }
    }
    fibers.clear();
    return !stuck;
}

inline Block& block() { return *current->block; }
inline Warp& warp() { return block().warps[current->thread.x / 32]; }
inline int lane() { return current->thread.x % 32; }

inline void meet(Gate& gate, u32 count) {
    const u32 turn = gate.turn;
    if (++gate.arrived == count) {
        gate.arrived = 0, ++gate.turn, idle = 0;
        return;
    }
    wait_while(&gate.turn, turn);
}

inline void meet_warp() { meet(warp().gate, 32); }

inline float half_to_float(u16 bits) {
#if BF16
    const u32 wide = (u32)bits << 16;
    float f;
    memcpy(&f, &wide, 4);
    return f;
#else
    _Float16 h;
    memcpy(&h, &bits, 2);
    return (float)h;
#endif
}

inline u16 float_to_half(float f) {
#if BF16
    u32 bits;
    memcpy(&bits, &f, 4);
    if (f != f) return 0x7fff;
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
    _Float16 h = (_Float16)f;
    u16 bits;
    memcpy(&bits, &h, 2);
    return bits;
#endif
}

}   // namespace emulated

#define memory (emulated::block().memory())
#define threadIdx (emulated::current->thread)
struct BlockIndex {
    u32 x;
};
#define blockIdx (BlockIndex{(u32)emulated::block().id})
#define blockDim (BlockIndex{(u32)emulated::block().threads})

// ---- what CUDA has of its own ----

template <class T>
inline T __ldg(const T* p) { return *p; }
inline void __threadfence() {}
inline void __syncthreads() { emulated::meet(emulated::block().gates[0], emulated::block().threads); }
inline void __syncwarp() { emulated::meet_warp(); }
inline void __nanosleep(u32) { emulated::sleep(); }
inline float __uint_as_float(u32 bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline float __int_as_float(u32 bits) { return __uint_as_float(bits); }
inline u32 __float_as_uint(float f) {
    u32 bits;
    memcpy(&bits, &f, 4);
    return bits;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __expf(float a) { return expf(a); }
inline float rsqrtf(float a) { return 1.f / sqrtf(a); }

template <class T>
inline T exchanged(T value, int from) {
    static_assert(sizeof(T) <= 8);
    auto& warp = emulated::warp();
    memcpy(&warp.words[emulated::lane()][0], &value, sizeof(T));
    emulated::meet_warp();
    T found;
    memcpy(&found, &warp.words[from % 32][0], sizeof(T));
    emulated::meet_warp();
    return found;
}
template <class T>
inline T __shfl_xor_sync(u32, T value, int mask) { return exchanged(value, emulated::lane() ^ mask); }
template <class T>
inline T __shfl_sync(u32, T value, int lane) { return exchanged(value, lane); }

// ---- primitives.cuh ----

inline float low_of(u32 pair) { return emulated::half_to_float((u16)pair); }
inline float high_of(u32 pair) { return emulated::half_to_float((u16)(pair >> 16)); }
inline u32 narrow2(float low, float high) { return emulated::float_to_half(low) | (u32)emulated::float_to_half(high) << 16; }

// m16n8k16: of a 16 x 16 A, lane l holds in a0 row l / 4, columns 2 (l % 4) and one more; in a1 row l / 4 + 8; in a2 and a3 the
// same 8 columns on. Of a 16 x 8 B, b0 holds rows 2 (l % 4) and one more of column l / 4, b1 the same 8 rows on.
inline void mma(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    auto& words = emulated::warp().words;
    const int lane = emulated::lane();
    const u32 own[6] = {a0, a1, a2, a3, b0, b1};
    for (int i = 0; i < 6; ++i) words[lane][i] = own[i];
    emulated::meet_warp();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
        for (int k = 0; k < 16; ++k) {
            const u32 a = (u32)words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], b = (u32)words[column * 4 + k % 8 / 2][4 + k / 8];
            d[i] += (k % 2 ? high_of(a) : low_of(a)) * (k % 2 ? high_of(b) : low_of(b));
        }
    }
    emulated::meet_warp();
}

inline u32 shared_address(const void* p) { return (u32)((const char*)p - memory); }
inline uint4 load_l2(const void* p) { return *(const uint4*)p; }
inline u32 load_l2_word(const void* p) { return *(const u32*)p; }
inline uint4 load_shared(u32 at) { return *(const uint4*)(memory + at); }
inline void prefetch_l2(const void*) {}
inline void bulk_prefetch(const void*, u32) {}
inline void put_word(u32* at, u32 word) { *at = word, emulated::moved(); }
inline void put_piece(void* at, uint4 v) { *(uint4*)at = v, emulated::moved(); }
inline uint2 peek2(const u32* at) { return {at[0], at[1]}; }
inline uint4 peek4(const u32* at) { return {at[0], at[1], at[2], at[3]}; }
inline float widen(u16 bits) { return low_of(bits); }
inline u16 narrow(float value) { return (u16)narrow2(value, 0.f); }
inline void widen8(uint4 v, float* out) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 8; ++i) out[i] = i % 2 ? high_of(words[i / 2]) : low_of(words[i / 2]);
}
inline uint4 narrow8(const float* v) {
    return make_uint4(narrow2(v[0], v[1]), narrow2(v[2], v[3]), narrow2(v[4], v[5]), narrow2(v[6], v[7]));
}
template <int ID, int COUNT>
inline void named_sync() { emulated::meet(emulated::block().gates[ID], COUNT); }

struct Watchdog {
    void tick() { emulated::sleep(); }
};

inline void show_barriers() {}
inline void barrier_init(u32 bar, u32 arrivals) { emulated::block().barriers[bar].expected = arrivals; }
inline void barrier_arrive(u32 bar) {
    auto& barrier = emulated::block().barriers.at(bar);
    ++barrier.arrived;
    barrier.look();
}
inline void barrier_expect(u32 bar, u32 bytes) {
    auto& barrier = emulated::block().barriers.at(bar);
    barrier.bytes += bytes, ++barrier.arrived;
    barrier.look();
}
inline void barrier_wait(u32 bar, u32 parity) {
    auto& barrier = emulated::block().barriers.at(bar);
    if (barrier.phase % 2 == parity) emulated::wait_while(&barrier.phase, barrier.phase);
}

inline u64 read_once_policy() { return 0; }
inline void bulk_copy(u32 to, const void* from, u32 bytes, u32 bar, u64) {
    memcpy(memory + to, from, bytes);
    auto& barrier = emulated::block().barriers.at(bar);
    barrier.bytes -= bytes;
    barrier.look();
}

// The activation that the host chose.
inline float activate(float v) {
#if ACTIVATION == 0
    return 0.5f * v * (1.f + erff(v * 0.7071067811865476f));
#elif ACTIVATION == 1
    return 0.5f * v * (1.f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
#elif ACTIVATION == 2
    return v / (1.f + expf(-1.702f * v));
#elif ACTIVATION == 3
    return v < 0.f ? 0.f : v;
#elif ACTIVATION == 4
    return v / (1.f + expf(-v));
#else
    return tanhf(v);
#endif
}

// ---- hopper.cuh ----

struct Map {
    const u16* base;
    u64 rows, columns, box_rows;
    u64 rest[12];
};

inline void proxy_fence() {}
inline void add_one(u32* count) { ++*count, emulated::moved(); }
inline u32 read_count(const u32* count) { return *(const volatile u32*)count; }
inline float2 load_float2(const float* p) { return *(const float2*)p; }

// 128-byte swizzle: the 16-byte piece within each 128 bytes, bits 4 to 6, is exchanged by bits 7 to 9 of the address.
inline u32 swizzled(u32 at) { return at ^ (at >> 7 & 7) << 4; }

inline void tile_copy(u32 to, const Map* map, int column, int row, u32 bar) {
    for (u32 r = 0; r < map->box_rows; ++r)
        for (u32 c = 0; c < 64; ++c) {
            const bool inside = row + r < map->rows && column + c < map->columns;
            const u16 value = inside ? map->base[(u64)(row + r) * map->columns + column + c] : 0;
            memcpy(memory + swizzled(to + r * 128 + c * 2), &value, 2);
        }
    auto& barrier = emulated::block().barriers.at(bar);
    barrier.bytes -= map->box_rows * 128;
    barrier.look();
}
inline u32 constant_word(const u16* vector, int at) { return vector ? *(const u32*)(vector + at) : 0; }

// A matrix descriptor's start address, in units of 16 bytes; rows are 128 bytes, eight of them 1024 (what else it may say is
// not emulated).
inline u64 descriptor(u32 at) { return at >> 4; }
inline void group_fence() {}
inline void group_commit() {}
template <int COUNT>
inline void settle(float*) {}
template <int LEFT>
inline void group_wait() {}

// m64nNk16 with both operands in shared memory, K along the rows. Of the 64 x N sums, lane l of the group's warp w holds in
// d[4 j + i] row 16 w + l / 4 + 8 (i / 2), column 8 j + 2 (l % 4) + i % 2.
template <int WIDE>
struct Group {
    static void mma(float* d, u64 x, u64 w) {
        const int lane = emulated::lane(), warp = emulated::current->thread.x / 32 % 4;
        auto at = [](u64 start, int row, int k) {
            u16 bits;
            memcpy(&bits, memory + swizzled((u32)(start << 4) + row / 8 * 1024 + row % 8 * 128 + 2 * k), 2);
            return emulated::half_to_float(bits);
        };
        for (int j = 0; j < WIDE / 8; ++j)
            for (int i = 0; i < 4; ++i) {
                const int row = 16 * warp + lane / 4 + i / 2 * 8, column = 8 * j + 2 * (lane % 4) + i % 2;
                for (int k = 0; k < 16; ++k) d[4 * j + i] += at(x, row, k) * at(w, column, k);
            }
    }
};

// Matrix i of four: its row r begins where lane 8 i + r says; lane l gets column l / 4 of rows 2 (l % 4) and one more.
inline uint4 load_transposed(u32 at) {
    auto& words = emulated::warp().words;
    const int lane = emulated::lane();
    words[lane][0] = at;
    emulated::meet_warp();
    u32 found[4];
    for (int i = 0; i < 4; ++i) {
        u16 half[2];
        for (int h = 0; h < 2; ++h) memcpy(&half[h], memory + words[8 * i + 2 * (lane % 4) + h][0] + lane / 4 * 2, 2);
        found[i] = half[0] | (u32)half[1] << 16;
    }
    emulated::meet_warp();
    return {found[0], found[1], found[2], found[3]};
}
