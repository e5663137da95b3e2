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

/// Shared memory of a block.
template <WeightFormat kFormat, int kTokens8, int kTogether, int kApart, int kStages>
constexpr uint32_t product_shared_bytes(uint32_t chunk_bytes, uint32_t n_slices) {
    constexpr uint32_t warps = kTogether * kApart;
    const uint32_t sums = kTokens8 == 1 ? 2 * kTogether * sum_slots(n_slices, kApart) * 512 : 0;
    const uint32_t x = kTokens8 == 1 ? 0 : kApart * 2 * kTokens8 * 2048;
    return warps * ((kStages * chunk_bytes + 127) / 128 * 128) + (is_dense(kFormat) ? 0 : warps * kChunkElems) + x + sums + 128 +
           warps * kStages * 8 + kApart * 4 * 8;
}

template <WeightFormat kFormat, int kTokens8, int kTogether, int kApart, int kStages>
__device__ __forceinline__ void product(const ProductParams& p) {
    constexpr bool kDense = is_dense(kFormat), kStagedX = kTokens8 > 1;
    constexpr int kWarps = kTogether * kApart, kXBytes = kTokens8 * 2048, kTileFloats = kTokens8 * 128;
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, strip = warp % kTogether, group = warp / kTogether;
    const uint32_t bytes = kDense ? chunk_bytes(kFormat, 0) : p.chunk_bytes;
    const uint32_t ring_bytes = (kStages * bytes + 127) / 128 * 128;
    const uint32_t n_slices = slices(p.rows, p.cols), across = (p.cols + kChunkCols - 1) / kChunkCols;
    const uint32_t slots = sum_slots(n_slices, kApart), own = n_slices / kApart;

    uint8_t* at = shared;
    uint8_t* ring = at + warp * ring_bytes;
    at += kWarps * ring_bytes;
    uint8_t* plane = at + warp * kChunkElems;
    at += kDense ? 0 : kWarps * kChunkElems;
    const uint8_t* x_ring = at + group * 2 * kXBytes;
    at += kStagedX ? kApart * 2 * kXBytes : 0;
    uint8_t* symbols = at;
    at += 128;
    const uint32_t bar = shared_address(at) + warp * kStages * 8;
    const uint32_t x_bar = shared_address(at) + kWarps * kStages * 8 + group * 32;  // full, full, empty, empty
    at += kWarps * kStages * 8 + kApart * 32;
    // [2][strip][slot][token group][128]
    float* sums = kStagedX ? p.workspace + (size_t)blockIdx.x * 2 * kTogether * slots * kTileFloats : (float*)at;

    if (lane == 0) {
        for (int i = 0; i < kStages; i++) barrier_init(bar + 8 * i, 1);
        if (kStagedX && strip == 0) {
            for (int i = 0; i < 2; i++) barrier_init(x_bar + 8 * i, 1), barrier_init(x_bar + 16 + 8 * i, kTogether);
        }
        asm volatile("fence.mbarrier_init.release.cluster;");
    }
    asm volatile("griddepcontrol.launch_dependents;");
    __syncwarp();

    const uint32_t n_tiles = p.segments[p.n_segments - 1].end_tile, n_groups = (n_tiles + kTogether - 1) / kTogether;
    const uint32_t rounds = (n_groups - blockIdx.x + gridDim.x - 1) / gridDim.x;
    const uint32_t slice_first = n_slices * group / kApart, slice_last = n_slices * (group + 1) / kApart;
    const uint32_t first = min(across, slice_begin(p.rows, p.cols, slice_first) / kChunkCols);
    const uint32_t end = min(across, slice_begin(p.rows, p.cols, slice_last) / kChunkCols);

    // What is copied next.
    uint32_t next_tile = blockIdx.x * kTogether + strip, next_column = first;
    const uint8_t* source = nullptr;
    auto seek = [&] {
        if (next_tile >= n_tiles || first == end) {
            source = nullptr;
            return;
        }
        uint32_t tile = next_tile;
        const uint8_t* chunks = p.segments[0].chunks;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (i + 1 < (int)p.n_segments && next_tile >= p.segments[i].end_tile)
                tile = next_tile - p.segments[i].end_tile, chunks = p.segments[i + 1].chunks;
        }
        source = chunks + ((size_t)tile * across + first) * bytes;
    };
    auto issue = [&](int stage) {
        if (source == nullptr) return;
        if (lane == 0) {
            barrier_expect(bar + 8 * stage, bytes);
            copy_weights(shared_address(ring) + stage * bytes, source, bytes, bar + 8 * stage);
        }
        source += bytes;
        if (++next_column == end) {
            next_column = first, next_tile += gridDim.x * kTogether;
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
        for (int i = 0; i < 2 && x_issued < x_total; i++) issue_x(i);

    int stage = 0;
    uint32_t parity = 0, x_turn = 0;
    for (uint32_t round = 0; round < rounds; round++) {
        const uint32_t tile = (blockIdx.x + round * gridDim.x) * kTogether + strip;
        const bool here = tile < n_tiles;
        uint32_t segment = 0, local = tile;
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (i + 1 < (int)p.n_segments && tile >= p.segments[i].end_tile) segment = i + 1, local = tile - p.segments[i].end_tile;
        const uint32_t* overflow = p.segments[segment].overflow;
        float scale0 = 0, scale1 = 0;
        if (is_int8(kFormat) && here) {
            const uint32_t left = p.rows - tile * 16, row = lane / 4, step = p.segments[segment].scale_step;
            const float* scales = p.segments[segment].scales;
            scale0 = __ldg(scales + (size_t)(local * 16 + min(row, left - 1)) * step);
            scale1 = __ldg(scales + (size_t)(local * 16 + min(row + 8, left - 1)) * step);
        }
        float* out = sums + (((round & 1) * kTogether + strip) * slots + (group == 0 ? 0 : slice_first - own + (own > 0 ? 1 : 0))) * kTileFloats;
        float acc[kTokens8][4] = {}, total[kTokens8][4];
        uint32_t slice = slice_first;
        uint32_t border = min(across, slice_begin(p.rows, p.cols, slice + 1) / kChunkCols);
        for (uint32_t c = first; c < end; c++) {
            uint4 xr[4];
            if (!kStagedX) {
#pragma unroll
                for (int j = 0; j < 4; j++)
                    xr[j] = lane / 4 < p.tokens ? __ldg((const uint4*)p.x + (size_t)(c * 4 + j) * 32 + lane) : make_uint4(0, 0, 0, 0);
            }
            const uint8_t* chunk = ring + stage * bytes;
            const uint8_t* header = chunk + header_offset(kFormat);
            if (here) {
                barrier_wait(bar + 8 * stage, parity);
                if (!kDense) {
                    patch_escapes<false>(header, symbols + segment * 32, overflow, plane, lane);
                    __syncwarp();
                }
            }
            if (kStagedX) barrier_wait(x_bar + 8 * (x_turn & 1), x_turn >> 1 & 1);
            if (here) {
                const uint4* xs = (const uint4*)(x_ring + (x_turn & 1) * kXBytes) + lane;
                auto half = [&](auto which) {
                    constexpr int h = decltype(which)::value;
                    uint32_t a[16];
                    decode_half<kFormat, h>(chunk, plane, lane, scale0, scale1, a);
#pragma unroll
                    for (int j = 0; j < 2; j++)
#pragma unroll
                        for (int g = 0; g < kTokens8; g++) {
                            const uint4 v = kStagedX ? xs[g * 128 + (2 * h + j) * 32] : xr[2 * h + j];
                            mma<is_half(kFormat)>(acc[g], a + 8 * j, v.x, v.y);
                            mma<is_half(kFormat)>(acc[g], a + 8 * j + 4, v.z, v.w);
                        }
                };
                half(Constant<0>());
                half(Constant<1>());
                if (!kDense) {
                    __syncwarp();
                    patch_escapes<true>(header, symbols, overflow, plane, lane);
                }
                // Filled again only when every lane's loads have arrived: the products above have read them.
                __syncwarp();
                issue(stage);
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
            if (kStagedX) {
                __syncwarp();
                const uint32_t at = x_turn & 1;
                if (lane == 0) barrier_arrive(x_bar + 16 + 8 * at);
                if (feeds_x && x_issued < x_total) {
                    barrier_wait(x_bar + 16 + 8 * at, x_turn >> 1 & 1);
                    issue_x(at);
                }
                __syncwarp();
                x_turn++;
            }
            if (c + 1 == border) {
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
                        ((float4*)out)[g * 32 + lane] = make_float4(v[0], v[1], v[2], v[3]);
                    }
                    out += kTileFloats;
                }
#pragma unroll
                for (int g = 0; g < kTokens8; g++)
#pragma unroll
                    for (int i = 0; i < 4; i++) acc[g][i] = 0;
                slice++;
                border = min(across, slice_begin(p.rows, p.cols, slice + 1) / kChunkCols);
            }
        }
        __syncthreads();
        const float* from = sums + (round & 1) * kTogether * slots * kTileFloats;
        for (uint32_t i = threadIdx.x; i < kTogether * kTileFloats; i += 32 * kWarps) {
            // Consecutive threads: rows of a tile, then tokens.
            const uint32_t row = i % 16, token = i / 16 % (kTokens8 * 8), s = i / kTileFloats;
            const uint32_t n = ((blockIdx.x + round * gridDim.x) * kTogether + s) * 16 + row;
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
    }
}

#endif  // __CUDACC__

}  // namespace transom
