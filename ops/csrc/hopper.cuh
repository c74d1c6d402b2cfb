// Instructions of Hopper that the persistent encoder uses: copies of whole tiles, products of warp groups, waits.
#pragma once

struct Map { u64 words[16]; };   // CUtensorMap

// ---- among the threads of a block, and among blocks ----

// What threads wrote, products of warp groups will read.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ __forceinline__ void add_one(u32* count) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory"); }

__device__ __forceinline__ u32 read_count(const u32* count) {
    u32 found;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(count) : "memory");
    return found;
}

// 16 bytes that other multiprocessors look out for.
__device__ __forceinline__ void put_piece(void* at, uint4 v) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// A pair of a vector that no launch writes, or zeros; asked for here, not where it is used.
__device__ __forceinline__ u32 constant_word(const u16* vector, int at) {
    u32 pair = 0;
    if (vector) asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(pair) : "l"(vector + at));
    return pair;
}

// ---- tiles ----

__device__ __forceinline__ void tile_copy(u32 to, const Map* map, int column, int row, u32 bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(bar) : "memory");
}

// ---- instructions of a warp group ----

// A tile of 64 columns of 16 bits, rows of 128 bytes, swizzled by 128 bytes: K runs along the rows.
__device__ __forceinline__ u64 descriptor(u32 at) {
    return (u64)((at & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

__device__ __forceinline__ void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// The sums are there: nothing that reads them may be moved before this.
template <int COUNT>
__device__ __forceinline__ void settle(float* d) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int LEFT>
__device__ __forceinline__ void group_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

// 16 rows by 16 columns of 16 bits, transposed: two operands B. Each lane gives the address of half a row.
__device__ __forceinline__ uint4 load_transposed(u32 at) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}
