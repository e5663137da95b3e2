// Fused product y[M,N] = x[M,K] * W[N,K]^T from fixed-rate weights, and its
// dense twin: the same kernel, only decode_half differs.
//
// A block has kTogether tiles of 16 rows (its strips) times kApart groups of
// warps, each with an equal share of the slices of K. Every warp has a ring of
// its own for chunks of weights. Up to 8 tokens come from L1 straight into
// registers; more go through a ring that the warps of a group share.
// The sums of all slices meet in the block and are added in order.
#pragma once

#include "fixed.cuh"

namespace transom {

/// Slots of sums that a tile needs: the first group keeps its own total.
TRANSOM_BOTH constexpr uint32_t sum_slots(uint32_t n_slices, uint32_t apart) {
    const uint32_t own = n_slices / apart;
    return n_slices - own + (own > 0 ? 1 : 0);
}

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(uint32_t bar, uint32_t count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count)); }
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(bar),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
__device__ __forceinline__ void barrier_expect(uint32_t bar, uint32_t n_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(n_bytes) : "memory");
}
__device__ __forceinline__ void copy_weights(uint32_t to, const void* from, uint32_t n_bytes, uint32_t bar) {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "r"(n_bytes), "r"(bar), "l"(policy)
        : "memory");
}
__device__ __forceinline__ void copy_activations(uint32_t to, const void* from, uint32_t n_bytes, uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(n_bytes),
                 "r"(bar)
                 : "memory");
}
template <int kValue>
struct Constant {
    static constexpr int value = kValue;
};

template <bool kHalf>
__device__ __forceinline__ void mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
    if constexpr (kHalf)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TRANSOM_WGMMA 1
#else
#define TRANSOM_WGMMA 0
#endif

#if TRANSOM_WGMMA
/// Activations in shared memory: core matrices of 8 tokens x 16 bytes, 128 bytes apart along K, 2048 along tokens.
__device__ __forceinline__ uint64_t activation_descriptor(uint32_t address) {
    return (uint64_t)(address >> 4 & 0x3FFF) | (uint64_t)(128 >> 4) << 16 | (uint64_t)(2048 >> 4) << 32;
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

#define TRANSOM_WGMMA_16(type)                                                                                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type " {%0,%1,%2,%3,%4,%5,%6,%7},{%8,%9,%10,%11},%12,1,1,1,0;"   \
                 : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3])  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define TRANSOM_ACC(g) "+f"(c[g][0]), "+f"(c[g][1]), "+f"(c[g][2]), "+f"(c[g][3])
#define TRANSOM_WGMMA_32(type)                                                                                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                                                              \
                 " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15},{%16,%17,%18,%19},%20,1,1,1,0;"                                \
                 : TRANSOM_ACC(0), TRANSOM_ACC(1), TRANSOM_ACC(2), TRANSOM_ACC(3)                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define TRANSOM_WGMMA_64(type)                                                                                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                              \
                 " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}," \
                 "{%32,%33,%34,%35},%36,1,1,1,0;"                                                                                         \
                 : TRANSOM_ACC(0), TRANSOM_ACC(1), TRANSOM_ACC(2), TRANSOM_ACC(3), TRANSOM_ACC(4), TRANSOM_ACC(5), TRANSOM_ACC(6),         \
                   TRANSOM_ACC(7)                                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

/// One k16 step of four warps' 16 rows each, all tokens.
template <bool kHalf, int kTokens8>
__device__ __forceinline__ void wgmma(float (*c)[4], const uint32_t* a, uint64_t b) {
    static_assert(kTokens8 == 2 || kTokens8 == 4 || kTokens8 == 8, "");
    if constexpr (kTokens8 == 2) {
        if constexpr (kHalf) TRANSOM_WGMMA_16("f16");
        else TRANSOM_WGMMA_16("bf16");
    } else if constexpr (kTokens8 == 4) {
        if constexpr (kHalf) TRANSOM_WGMMA_32("f16");
        else TRANSOM_WGMMA_32("bf16");
    } else {
        if constexpr (kHalf) TRANSOM_WGMMA_64("f16");
        else TRANSOM_WGMMA_64("bf16");
    }
}
#endif

/// All blocks of a cluster wait for each other; what they wrote before is seen after.
template <int kCluster>
__device__ __forceinline__ void cluster_sync() {
    if constexpr (kCluster == 1) {
        __syncthreads();
    } else {
        asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
}

/// Shared memory of a block.
template <WeightFormat kFormat, int kTokens8, int kTogether, int kApart, int kStages, int kXStages, int kStrips>
constexpr uint32_t product_shared_bytes(uint32_t chunk_bytes, uint32_t n_slices) {
    constexpr uint32_t warps = kTogether * kApart;
    const uint32_t sums = kXStages == 0 && kTokens8 <= 4 ? (kTokens8 <= 2 ? 2 : 1) * kTogether * kStrips * sum_slots(n_slices, kApart) * 512 * kTokens8 : 0;
    const uint32_t x = kXStages == 0 ? 0 : kApart * kXStages * kTokens8 * 2048;
    return warps * ((kStages * chunk_bytes + 127) / 128 * 128) + (is_dense(kFormat) ? 0 : warps * kChunkElems) + x + sums + 128 +
           warps * kStages * 8 + kApart * kXStages * 16;
}

/// kCluster blocks share their strips and cut K further.
template <WeightFormat kFormat, int kTokens8, int kTogether, int kApart, int kStages, int kXStages, int kCluster, int kStrips>
__device__ __forceinline__ void product(const ProductParams& p) {
    constexpr bool kDense = is_dense(kFormat), kStagedX = kXStages > 0;
    constexpr bool kSharedSums = !kStagedX && kTokens8 <= 4;
    constexpr int kBuffers = kSharedSums && kTokens8 > 2 ? 1 : 2;  // of sums
    constexpr int kTiles = kTogether * kStrips, kWarps = kTogether * kApart, kXBytes = kTokens8 * 2048, kTileFloats = kTokens8 * 128;
    extern __shared__ __align__(128) uint8_t shared[];
    static_assert(kStrips == 1 || (kStrips == 2 && !kStagedX), "");
    static_assert(kStagedX || kCluster == 1, "sums of a cluster meet in the workspace");
    constexpr int kGroups = kApart * kCluster;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, strip = warp % kTogether, here_group = warp / kTogether;
    const uint32_t rank = kCluster == 1 ? 0 : blockIdx.x % kCluster, first_block = blockIdx.x / kCluster, n_blocks = gridDim.x / kCluster;
    const int group = rank * kApart + here_group;
    const uint32_t bytes = kDense ? chunk_bytes(kFormat, 0) : p.chunk_bytes;
    const uint32_t ring_bytes = (kStages * bytes + 127) / 128 * 128;
    const uint32_t n_slices = slices(p.rows, p.cols), across = (p.cols + kChunkCols - 1) / kChunkCols;
    const uint32_t slots = sum_slots(n_slices, kGroups), own = n_slices / kGroups;

    uint8_t* at = shared;
    uint8_t* ring = at + warp * ring_bytes;
    at += kWarps * ring_bytes;
    uint8_t* plane = at + warp * kChunkElems;
    at += kDense ? 0 : kWarps * kChunkElems;
    const uint8_t* x_ring = at + here_group * kXStages * kXBytes;
    at += kStagedX ? kApart * kXStages * kXBytes : 0;
    uint8_t* symbols = at;
    at += 128;
    const uint32_t bar = shared_address(at) + warp * kStages * 8;
    const uint32_t x_bar = shared_address(at) + kWarps * kStages * 8 + here_group * kXStages * 16;  // full, then empty
    at += kWarps * kStages * 8 + kApart * kXStages * 16;
    // [2][strip][slot][token group][128]
    float* sums = kSharedSums ? (float*)at : p.workspace + (size_t)first_block * 2 * kTiles * slots * kTileFloats;

    if (lane == 0) {
        for (int i = 0; i < kStages; i++) barrier_init(bar + 8 * i, 1);
        if (kStagedX && strip == 0) {
            for (int i = 0; i < kXStages; i++) barrier_init(x_bar + 8 * i, 1), barrier_init(x_bar + 8 * (kXStages + i), kTogether);
        }
        asm volatile("fence.mbarrier_init.release.cluster;");
    }
    asm volatile("griddepcontrol.launch_dependents;");
    __syncwarp();

    const uint32_t n_tiles = p.segments[p.n_segments - 1].end_tile, n_groups = (n_tiles + kTiles - 1) / kTiles;
    const uint32_t rounds = (n_groups - first_block + n_blocks - 1) / n_blocks;
    const uint32_t slice_first = n_slices * group / kGroups, slice_last = n_slices * (group + 1) / kGroups;
    const uint32_t first = min(across, slice_begin(p.rows, p.cols, slice_first) / kChunkCols);
    const uint32_t end = min(across, slice_begin(p.rows, p.cols, slice_last) / kChunkCols);

    // What is copied next.
    uint32_t next_tile = (first_block * kTogether + strip) * kStrips, next_column = first, next_t = 0;
    const uint8_t* source[kStrips];
    auto seek = [&] {
#pragma unroll
        for (int t = 0; t < kStrips; t++) {
            source[t] = nullptr;
            const uint32_t tile = next_tile + t;
            if (tile >= n_tiles || first == end) continue;
            uint32_t local = tile;
            const uint8_t* chunks = p.segments[0].chunks;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (i + 1 < (int)p.n_segments && tile >= p.segments[i].end_tile)
                    local = tile - p.segments[i].end_tile, chunks = p.segments[i + 1].chunks;
            }
            source[t] = chunks + ((size_t)local * across + first) * bytes;
        }
    };
    auto issue = [&](int stage) {
        if (source[0] == nullptr) return;
        const uint8_t* from = source[0];
#pragma unroll
        for (int t = 1; t < kStrips; t++)
            if ((int)next_t == t) from = source[t];
        if (lane == 0) {
            barrier_expect(bar + 8 * stage, bytes);
            copy_weights(shared_address(ring) + stage * bytes, from, bytes, bar + 8 * stage);
        }
        if (kStrips > 1 && ++next_t < kStrips && source[next_t < kStrips ? kStrips - 1 : 0] != nullptr) return;
        next_t = 0;
#pragma unroll
        for (int t = 0; t < kStrips; t++)
            if (source[t] != nullptr) source[t] += bytes;
        if (++next_column == end) {
            next_column = first, next_tile += n_blocks * kTiles;
            seek();
        }
    };
    seek();
    for (int i = 0; i < kStages; i++) issue(i);
    if (!kDense) {
        for (int i = lane; i < (int)kChunkElems / 16; i += 32) ((uint4*)plane)[i] = make_uint4(0, 0, 0, 0);
        if (warp < (int)p.n_segments) symbols[warp * 32 + lane] = p.segments[warp].symbols[lane];
    }
    __syncthreads();
    // Activations, output and workspace belong to the kernel before this one until here.
    asm volatile("griddepcontrol.wait;" ::: "memory");

    // Activations of the group, again and again for each round.
    const uint8_t* x = (const uint8_t*)p.x;
    const size_t x_group = (size_t)across * 2048;
    const int n_x = kStagedX ? (int)((p.tokens + 7) / 8) : 1;
    uint32_t x_column = first, x_issued = 0, x_total = rounds * (end - first);
    auto issue_x = [&](int stage) {
        barrier_expect(x_bar + 8 * stage, n_x * 2048);
        for (int i = 0; i < n_x; i++)
            copy_activations(shared_address(x_ring) + stage * kXBytes + i * 2048, x + i * x_group + (size_t)x_column * 2048, 2048, x_bar + 8 * stage);
        x_issued++;
        if (++x_column == end) x_column = first;
    };
    const bool feeds_x = kStagedX && strip == 0 && lane == 0;
    if (feeds_x)
        for (int i = 0; i < kXStages && x_issued < x_total; i++) issue_x(i);

    int stage = 0;
    uint32_t parity = 0, x_stage = 0, x_parity = 0;
    bool x_wrapped = false;
    for (uint32_t round = 0; round < rounds; round++) {
        const uint32_t tile0 = ((first_block + round * n_blocks) * kTogether + strip) * kStrips;
        uint32_t segments[kStrips];
        float scales[kStrips][2] = {};
#pragma unroll
        for (int t = 0; t < kStrips; t++) {
            uint32_t local = tile0 + t;
            segments[t] = 0;
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (i + 1 < (int)p.n_segments && tile0 + t >= p.segments[i].end_tile) segments[t] = i + 1, local = tile0 + t - p.segments[i].end_tile;
            if (is_int8(kFormat) && tile0 + t < n_tiles) {
                const uint32_t left = p.rows - (tile0 + t) * 16, row = lane / 4, step = p.segments[segments[t]].scale_step;
                const float* from = p.segments[segments[t]].scales;
                scales[t][0] = __ldg(from + (size_t)(local * 16 + min(row, left - 1)) * step);
                scales[t][1] = __ldg(from + (size_t)(local * 16 + min(row + 8, left - 1)) * step);
            }
        }
        float* out = sums + ((round % kBuffers * kTiles + strip * kStrips) * slots + (group == 0 ? 0 : slice_first - own + (own > 0 ? 1 : 0))) * kTileFloats;
        float accs[kStrips][kTokens8][4] = {}, totals[kStrips][kTokens8][4];
        const uint4* x_lane = (const uint4*)p.x + (size_t)first * 128 + lane;
        const uint32_t x_stride = across * 128;
        auto has_token = [&](int g) { return g * 8 + lane / 4 < (int)p.tokens; };
        uint32_t slice = slice_first;
        uint32_t border = min(across, slice_begin(p.rows, p.cols, slice + 1) / kChunkCols);
        for (uint32_t c = first; c < end; c++) {
            constexpr int kHeld = kTokens8 <= 2 && !kStagedX ? kTokens8 : 1;
            uint4 xr[kHeld][4];
            if (!kStagedX && kTokens8 <= 2) {
#pragma unroll
                for (int g = 0; g < kHeld; g++)
#pragma unroll
                    for (int j = 0; j < 4; j++) xr[g][j] = has_token(g) ? __ldg(x_lane + g * x_stride + j * 32) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
          for (int t = 0; t < kStrips; t++) {
            const bool here = tile0 + t < n_tiles;
            const uint32_t segment = segments[t];
            const uint32_t* overflow = p.segments[segment].overflow;
            const float scale0 = scales[t][0], scale1 = scales[t][1];
            float(&acc)[kTokens8][4] = accs[t];
            const uint8_t* chunk = ring + stage * bytes;
            const uint8_t* header = chunk + header_offset(kFormat);
            Patches patches = {};
            if (here) {
                barrier_wait(bar + 8 * stage, parity);
                if (!kDense) {
                    patches.put(header, symbols + segment * 32, overflow, plane, lane);
                    __syncwarp();
                }
            }
            if (kStagedX) barrier_wait(x_bar + 8 * x_stage, x_parity);
#if TRANSOM_WGMMA
            if constexpr (kStagedX) {
                // All four warps of a warpgroup take part, also those beyond the last tile.
                const uint32_t from = shared_address(x_ring) + x_stage * kXBytes;
                auto half = [&](auto which) {
                    constexpr int h = decltype(which)::value;
                    uint32_t a[16] = {};
                    if (here) decode_half<kFormat, h>(chunk, plane, lane, scale0, scale1, a);
                    wgmma_fence();
#pragma unroll
                    for (int s = 0; s < 4; s++) wgmma<is_half(kFormat), kTokens8>(acc, a + 4 * s, activation_descriptor(from + (4 * h + s) * 256));
                    wgmma_commit();
                };
                half(Constant<0>());
                half(Constant<1>());
                if (here && !kDense) {
                    __syncwarp();
                    patches.clear(header, symbols, overflow, plane, lane);
                }
                __syncwarp();
                // The chunk has been read: its bytes are in registers that the products have taken.
                if (kDense) wgmma_wait();
                if (here) {
                    issue(stage);
                    if (++stage == kStages) stage = 0, parity ^= 1;
                }
                if (!kDense) wgmma_wait();
            } else
#endif
            if (here) {
                const uint8_t* xs = x_ring + x_stage * kXBytes + lane * 4;
                auto half = [&](auto which) {
                    constexpr int h = decltype(which)::value;
                    uint32_t a[16];
                    decode_half<kFormat, h>(chunk, plane, lane, scale0, scale1, a);
#pragma unroll
                    for (int j = 0; j < 2; j++)
#pragma unroll
                        for (int g = 0; g < kTokens8; g++) {
                            uint4 v;
                            if (!kStagedX && kTokens8 <= 2) {
                                v = xr[g < kHeld ? g : 0][2 * h + j];
                            } else if (!kStagedX) {
                                v = has_token(g) ? __ldg(x_lane + g * x_stride + (2 * h + j) * 32) : make_uint4(0, 0, 0, 0);
                            } else {
                                const uint32_t* w = (const uint32_t*)(xs + g * 2048 + (2 * h + j) * 512);
                                v = make_uint4(w[0], w[32], w[64], w[96]);
                            }
                            mma<is_half(kFormat)>(acc[g], a + 8 * j, v.x, v.y);
                            mma<is_half(kFormat)>(acc[g], a + 8 * j + 4, v.z, v.w);
                        }
                };
                half(Constant<0>());
                half(Constant<1>());
                if (!kDense) {
                    __syncwarp();
                    patches.clear(header, symbols, overflow, plane, lane);
                }
                // Filled again only when every lane's loads have arrived: the products above have read them.
                __syncwarp();
                issue(stage);
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
            if (kStagedX) {
                __syncwarp();
                if (lane == 0) barrier_arrive(x_bar + 8 * (kXStages + x_stage));
                // Filled again a step later, when the other warps have most likely arrived too.
                if (feeds_x && (x_stage > 0 || x_wrapped) && x_issued < x_total) {
                    const uint32_t last = x_stage == 0 ? (uint32_t)(kXStages > 0 ? kXStages - 1 : 0) : x_stage - 1;
                    barrier_wait(x_bar + 8 * (kXStages + last), x_stage == 0 ? x_parity ^ 1 : x_parity);
                    issue_x(last);
                }
                __syncwarp();
                if (++x_stage == kXStages) x_stage = 0, x_parity ^= 1, x_wrapped = true;
            }
          }
            if (!kStagedX) x_lane += 128;
            if (c + 1 == border) {
#pragma unroll
              for (int t = 0; t < kStrips; t++) {
                float(&acc)[kTokens8][4] = accs[t];
                float(&total)[kTokens8][4] = totals[t];
                if (group == 0) {
#pragma unroll
                    for (int g = 0; g < kTokens8; g++)
#pragma unroll
                        for (int i = 0; i < 4; i++) total[g][i] = slice == 0 ? acc[g][i] : total[g][i] + acc[g][i];
                }
                if (group > 0 || c + 1 == end) {
#pragma unroll
                    for (int g = 0; g < kTokens8; g++) {
                        float v[4];
#pragma unroll
                        for (int i = 0; i < 4; i++) v[i] = group == 0 ? total[g][i] : acc[g][i];
                        ((float4*)(out + t * slots * kTileFloats))[g * 32 + lane] = make_float4(v[0], v[1], v[2], v[3]);
                    }
                }
#pragma unroll
                for (int g = 0; g < kTokens8; g++)
#pragma unroll
                    for (int i = 0; i < 4; i++) acc[g][i] = 0;
              }
                if (group > 0) out += kTileFloats;
                slice++;
                border = min(across, slice_begin(p.rows, p.cols, slice + 1) / kChunkCols);
            }
        }
        cluster_sync<kCluster>();
        const float* from = sums + round % kBuffers * kTiles * slots * kTileFloats;
        for (uint32_t i = rank * 32 * kWarps + threadIdx.x; i < kTiles * kTileFloats; i += 32 * kWarps * kCluster) {
            // Consecutive threads: rows of a tile, then tokens.
            const uint32_t row = i % 16, token = i / 16 % (kTokens8 * 8), s = i / kTileFloats;
            const uint32_t n = ((first_block + round * n_blocks) * kTiles + s) * 16 + row;
            if (n >= p.rows || token >= p.tokens) continue;
            const float* v = from + s * slots * kTileFloats + token / 8 * 128 + (row % 8 * 4 + token % 8 / 2) * 4 + row / 8 * 2 + token % 2;
            float sum = v[0];
#pragma unroll 8
            for (uint32_t j = 1; j < slots; j++) sum += v[j * kTileFloats];
            uint16_t y;
            if constexpr (is_half(kFormat)) {
                if (p.bias) {
                    float b;
                    asm("cvt.f32.f16 %0, %1;" : "=f"(b) : "h"(p.bias[n]));
                    sum += b;
                }
                asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(sum));
            } else {
                if (p.bias) sum += __uint_as_float((uint32_t)p.bias[n] << 16);
                asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(sum));
            }
            p.y[(size_t)token * p.rows + n] = y;
        }
        if (kBuffers == 1) __syncthreads();
    }
}

#endif  // __CUDACC__

}  // namespace transom
