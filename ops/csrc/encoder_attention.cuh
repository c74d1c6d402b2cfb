// Attention among the rows of a sequence, 16 queries of a head at a time.
#pragma once

__device__ __forceinline__ ushort2 range(int row) { return ((const ushort2*)(memory + RANGES_AT))[row]; }

// 16 queries of a head; each warp takes 32 keys of every 128, and the four put their results together.
__device__ __forceinline__ void attend(const Block& b, const u16* qkv, u16* attended, int head, int row0) {
    constexpr int BLOCKS32 = HEAD_DIM / 32, WORDS = HEAD_DIM / 8;
    const u16* base = qkv + head * HEAD_DIM;
    const int rows[2] = {row0 + b.quad, row0 + b.quad + 8};
    uint4 q[2 * BLOCKS32];
    auto q_at = [&](int i) {   // rows of none are not written
        return base + (size_t)min(rows[i / BLOCKS32], b.rows - 1) * QKV_SIZE + 32 * (i % BLOCKS32) + 8 * b.place;
    };
    bool asked = true;
#pragma unroll
    for (int i = 0; i < 2 * BLOCKS32; ++i) peek(q[i], q_at(i));
    ushort2 own[2] = {range(rows[0]), range(rows[1])};
    int begin = range(row0).x, end = 0;
#pragma unroll 1
    for (int i = 0; i < 16; ++i) end = max(end, (int)range(row0 + i).y);
    float out[HEAD_DIM / 8][4] = {}, most[2] = {-1e30f, -1e30f}, total[2] = {};
    const u32 v_at = b.address(SCRATCH_AT) + b.warp * LONGEST_PART * V_PITCH;
#pragma unroll 1
    for (int key0 = begin + b.warp * LONGEST_PART; key0 < end; key0 += PARTS) {
        uint4 kv[4 * BLOCKS32 + WORDS];   // keys as products take them; values as they lie
        take<4 * BLOCKS32 + WORDS>(kv, [&](int i) {
            const int piece = b.lane + 32 * (i - 4 * BLOCKS32), key = i < 4 * BLOCKS32 ? 8 * (i / BLOCKS32) + b.quad : piece / WORDS;
            const u16* row = base + (size_t)min(key0 + key, end - 1) * QKV_SIZE;
            return i < 4 * BLOCKS32 ? row + HIDDEN + 32 * (i % BLOCKS32) + 8 * b.place : row + 2 * HIDDEN + 8 * (piece % WORDS);
        });
        if (asked) take_missing<2 * BLOCKS32>(q, q_at);
        asked = false;
        __syncwarp();   // what was there has been read
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            const int piece = b.lane + 32 * i;
            *(uint4*)(memory + SCRATCH_AT + (b.warp * LONGEST_PART + piece / WORDS) * V_PITCH + 16 * (piece % WORDS)) = kv[4 * BLOCKS32 + i];
        }
        float s[4][4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int i = 0; i < BLOCKS32; ++i) {   // words of q and k in the same order: a sum does not mind
                const uint4 a = q[i], c = q[BLOCKS32 + i], k = kv[j * BLOCKS32 + i];
                mma(s[j], a.x, c.x, a.y, c.y, k.x, k.y);
                mma(s[j], a.z, c.z, a.w, c.w, k.z, k.w);
            }
        float newest[2] = {most[0], most[1]};
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = key0 + 8 * j + 2 * b.place + i % 2;
                const bool seen = key >= own[i / 2].x && key < own[i / 2].y;
                s[j][i] = seen ? s[j][i] * (ATTENTION_SCALE * 1.4426950408889634f) : -1e30f;
                newest[i / 2] = fmaxf(newest[i / 2], s[j][i]);
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            newest[half] = fmaxf(newest[half], __shfl_xor_sync(~0u, newest[half], 1));
            newest[half] = fmaxf(newest[half], __shfl_xor_sync(~0u, newest[half], 2));
            const float keep = exp2f(most[half] - newest[half]);
            most[half] = newest[half], total[half] *= keep;
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; ++j) out[j][2 * half] *= keep, out[j][2 * half + 1] *= keep;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[j][i] = s[j][i] > -1e29f ? exp2f(s[j][i] - most[i / 2]) : 0.f;
                total[i / 2] += s[j][i];
            }
        __syncwarp();   // V is there
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {   // 16 keys
            const u32 a0 = narrow2(s[2 * pair][0], s[2 * pair][1]), a1 = narrow2(s[2 * pair][2], s[2 * pair][3]);
            const u32 a2 = narrow2(s[2 * pair + 1][0], s[2 * pair + 1][1]), a3 = narrow2(s[2 * pair + 1][2], s[2 * pair + 1][3]);
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 16; ++j) {
                const uint4 w = load_transposed(v_at + (16 * pair + b.lane % 16) * V_PITCH + 32 * j + b.lane / 16 * 16);
                mma(out[2 * j], a0, a1, a2, a3, w.x, w.y);
                mma(out[2 * j + 1], a0, a1, a2, a3, w.z, w.w);
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        total[half] += __shfl_xor_sync(~0u, total[half], 1);
        total[half] += __shfl_xor_sync(~0u, total[half], 2);
    }
    float2* stats = (float2*)(memory + STATS_AT);
    float* sums = (float*)(memory + SCRATCH_AT);   // [4][16][HEAD_DIM]
    consumers_sync();   // V has been read
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = b.quad + 8 * half;
        if (b.place == 0) stats[16 * b.warp + row] = make_float2(most[half], total[half]);
#pragma unroll
        for (int j = 0; j < HEAD_DIM / 8; ++j)
            *(float2*)(sums + (16 * b.warp + row) * HEAD_DIM + 8 * j + 2 * b.place) = make_float2(out[j][2 * half], out[j][2 * half + 1]);
    }
    consumers_sync();
    const int row = b.thread / 8;   // eight threads a row
    float weights[4], all = 0.f, top = -1e30f;
#pragma unroll
    for (int w = 0; w < 4; ++w) top = fmaxf(top, stats[16 * w + row].x);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        weights[w] = exp2f(stats[16 * w + row].x - top);
        all += weights[w] * stats[16 * w + row].y;
    }
    const float scale = all > 0.f ? 1.f / all : 0.f;
    for (int n = 8 * (b.thread % 8); n < HEAD_DIM; n += 64) {
        float v[8] = {};
#pragma unroll
        for (int w = 0; w < 4; ++w)
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] += weights[w] * sums[(16 * w + row) * HEAD_DIM + n + i];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] *= scale;
        put_piece(attended + (size_t)(row0 + row) * HIDDEN + head * HEAD_DIM + n, narrow8(v));
    }
    consumers_sync();   // the scratch is used again
}

__device__ __forceinline__ void attention(const Block& b, const u16* qkv, u16* attended) {
    consumers_sync();   // the scratch was the product's
    const int units = HEADS * ceil_div(b.rows, 16);
#pragma unroll 1
    for (int unit = b.id; unit < units; unit += BLOCKS) attend(b, qkv, attended, unit % HEADS, unit / HEADS * 16);
}
