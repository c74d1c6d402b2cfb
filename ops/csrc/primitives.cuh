// What the persistent kernel is built of: 16-bit arithmetic, tensor-core products, bulk copies, and words that blocks exchange.
// No header is included, so that NVRTC needs no toolkit. BF16 chooses the 16-bit type of weights and keys.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

#ifndef BF16
#define BF16 0
#endif

// ---- 16-bit floating point, by its bits ----

__device__ __forceinline__ float low_of(u32 pair) {
#if BF16
    return __uint_as_float(pair << 16);
#else
    float f;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(f) : "r"(pair));
    return f;
#endif
}

__device__ __forceinline__ float high_of(u32 pair) {
#if BF16
    return __uint_as_float(pair & 0xffff0000u);
#else
    float f;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(f) : "r"(pair));
    return f;
#endif
}

__device__ __forceinline__ float widen(u16 bits) { return low_of(bits); }

// Two floats rounded to the nearest 16-bit values, `low` in the low half.
__device__ __forceinline__ u32 narrow2(float low, float high) {
    u32 pair;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}

__device__ __forceinline__ u16 narrow(float value) { return (u16)(narrow2(value, 0.f) & 0xffffu); }

__device__ __forceinline__ void widen8(uint4 v, float* out) {
    out[0] = low_of(v.x), out[1] = high_of(v.x), out[2] = low_of(v.y), out[3] = high_of(v.y);
    out[4] = low_of(v.z), out[5] = high_of(v.z), out[6] = low_of(v.w), out[7] = high_of(v.w);
}

__device__ __forceinline__ uint4 narrow8(const float* v) {
    return make_uint4(narrow2(v[0], v[1]), narrow2(v[2], v[3]), narrow2(v[4], v[5]), narrow2(v[6], v[7]));
}

// The activation that the host chose.
__device__ __forceinline__ float activate(float v) {
#if ACTIVATION == 0
    return 0.5f * v * (1.f + erff(v * 0.7071067811865476f));
#elif ACTIVATION == 1
    return __fdividef(v, 1.f + __expf(-1.5957691216057308f * (v + 0.044715f * v * v * v)));   // x (1 + tanh(u)) / 2 = x sigmoid(2 u)
#elif ACTIVATION == 2
    return __fdividef(v, 1.f + __expf(-1.702f * v));
#elif ACTIVATION == 3
    return v < 0.f ? 0.f : v;
#elif ACTIVATION == 4
    return __fdividef(v, 1.f + __expf(-v));
#else
    return tanhf(v);
#endif
}

// d += a b on the tensor cores: a is 16 x 16 (rows: tokens), b is 16 x 8 (columns: rows of the weight), d is fp32.
__device__ __forceinline__ void mma(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- memory ----

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Through L2, never L1: what another multiprocessor wrote during this launch.
__device__ __forceinline__ uint4 load_l2(const void* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ u32 load_l2_word(const void* p) {
    u32 v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

// Nothing comes back to the multiprocessor, so nothing else that it asks for waits behind it.
__device__ __forceinline__ void bulk_prefetch(const void* from, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ __forceinline__ uint4 load_shared(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}

// Words that other multiprocessors write or read during this launch.
__device__ __forceinline__ void put_word(u32* at, u32 word) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(word) : "memory");
}

__device__ __forceinline__ uint2 peek2(const u32* at) {
    uint2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
    return v;
}

__device__ __forceinline__ uint4 peek4(const u32* at) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
    return v;
}

// COUNT threads of a block meet.
template <int ID, int COUNT>
__device__ __forceinline__ void named_sync() { asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(COUNT) : "memory"); }

// A wait that would never end (a bug, a lost block) ends the launch with an error instead of hanging the machine.
struct Watchdog {
    u32 spins = 0;
    __device__ __forceinline__ void tick() {
        if (++spins > (1u << 24)) __trap();
    }
};

// ---- mbarriers and bulk copies (Hopper) ----

__device__ __forceinline__ void barrier_init(u32 bar, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

// Those that were initialized before, to bulk copies.
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    Watchdog dog;
    u32 done = 0;
    while (true) {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(bar), "r"(parity) : "memory");
        if (done) return;
        dog.tick();
    }
}

__device__ __forceinline__ u64 read_once_policy() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 bar, u64 policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(bar), "l"(policy) : "memory");
}
