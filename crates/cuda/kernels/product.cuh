// Fused product y[M,N] = x[M,K] * W[N,K]^T from fixed-rate weights for up to
// 16 tokens, and its dense twin: the same kernel, only decode_half differs.
//
// A block has kTogether tiles of 16 rows times kApart groups of warps, each
// with an equal share of the slices of K. Every warp has a ring of its own for
// chunks of weights; activations come from L1 into registers, a chunk ahead.
// The sums of all slices meet in shared memory and are added in order.
#pragma once

#include "mma.cuh"
#include "ring.cuh"

namespace transom {

#ifdef __CUDACC__

constexpr int kStages = 2;

/// Shared memory of a block.
template <WeightFormat kFormat, int kTokens8, int kTogether, int kApart>
constexpr uint32_t product_shared_bytes(uint32_t chunk_bytes, uint32_t n_slices) {
    constexpr uint32_t warps = kTogether * kApart;
    const uint32_t sums = 2 * kTogether * sum_slots(n_slices, kApart) * 512 * kTokens8;
    return warps * ((kStages * chunk_bytes + 127) / 128 * 128) + (is_dense(kFormat) ? 0 : warps * kChunkElems) + sums + 128 + warps * kStages * 8;
}

/// Leaves `to` as it is where there is nothing to load.
__device__ __forceinline__ void load_if(bool there, uint4& to, const uint4* from) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %4, 0;\n@p ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%5];\n}"
                 : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
                 : "r"((uint32_t)there), "l"(from));
}

template <WeightFormat kFormat, int kTokens8, int kTogether, int kApart>
__device__ __forceinline__ void product(const ProductParams& p) {
    constexpr bool kDense = is_dense(kFormat);
    constexpr int kWarps = kTogether * kApart, kTileFloats = kTokens8 * 128;
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = lane_index(), strip = warp % kTogether, group = warp / kTogether;
    const uint32_t bytes = kDense ? chunk_bytes(kFormat, 0) : p.chunk_bytes;
    const uint32_t ring_bytes = (kStages * bytes + 127) / 128 * 128;
    const uint32_t n_slices = slices(p.rows, p.cols), across = (p.cols + kChunkCols - 1) / kChunkCols;
    const uint32_t slots = sum_slots(n_slices, kApart), own = n_slices / kApart;

    uint8_t* at = shared;
    uint8_t* ring_memory = at + warp * ring_bytes;
    at += kWarps * ring_bytes;
    uint8_t* plane = at + warp * kChunkElems;
    at += kDense ? 0 : kWarps * kChunkElems;
    uint8_t* symbols = at;
    at += 128;
    const uint32_t bar = shared_address(at) + warp * kStages * 8;
    at += kWarps * kStages * 8;
    float* sums = (float*)at;  // [2][strip][slot][token group][128]

    if (lane == 0) {
        for (int i = 0; i < kStages; i++) barrier_init(bar + 8 * i, 1);
        asm volatile("fence.mbarrier_init.release.cluster;");
    }
    asm volatile("griddepcontrol.launch_dependents;");
    __syncwarp();

    const uint32_t n_tiles = p.segments[p.n_segments - 1].end_tile, n_groups = (n_tiles + kTogether - 1) / kTogether;
    const uint32_t rounds = (n_groups - blockIdx.x + gridDim.x - 1) / gridDim.x;
    const uint32_t slice_first = n_slices * group / kApart, slice_last = n_slices * (group + 1) / kApart;
    const uint32_t first = min(across, slice_begin(p.rows, p.cols, slice_first) / kChunkCols);
    const uint32_t end = min(across, slice_begin(p.rows, p.cols, slice_last) / kChunkCols);

    ChunkRing<kStages> ring(p, ring_memory, bar, bytes, first, end, blockIdx.x * kTogether + strip, gridDim.x * kTogether);
    for (int i = 0; i < kStages; i++) ring.fill(p, lane, i);
    if (!kDense) {
        for (int i = lane; i < (int)kChunkElems / 16; i += 32) ((uint4*)plane)[i] = make_uint4(0, 0, 0, 0);
        if (warp < (int)p.n_segments) symbols[warp * 32 + lane] = p.segments[warp].symbols[lane];
    }
    __syncthreads();
    // Activations and output belong to the kernel before this one until here.
    asm volatile("griddepcontrol.wait;" ::: "memory");

    // The B fragments of one chunk; tokens that are not there stay zero.
    const uint4* const x_first = (const uint4*)p.x + (size_t)first * 128 + lane;
    const uint32_t x_stride = across * 128;
    uint4 x[kTokens8][4];
    bool there[kTokens8];
#pragma unroll
    for (int g = 0; g < kTokens8; g++) {
        there[g] = g * 8 + lane / 4 < (int)p.tokens && first < end;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x[g][j] = make_uint4(0, 0, 0, 0);
            load_if(there[g], x[g][j], x_first + g * x_stride + j * 32);
        }
    }

    for (uint32_t round = 0; round < rounds; round++) {
        const uint32_t tile = (blockIdx.x + round * gridDim.x) * kTogether + strip;
        if (tile < n_tiles) {
            const uint32_t segment = locate(p, tile).segment;
            float steps[2];
            load_steps<kFormat>(p, tile, lane, steps);
            float* out = sums + ((round % 2 * kTogether + strip) * slots + (group == 0 ? 0 : slice_first - own + (own > 0 ? 1 : 0))) * kTileFloats;
            float acc[kTokens8][4] = {}, total[kTokens8][4];
#pragma unroll
            for (int g = 0; g < kTokens8; g++)
#pragma unroll
                for (int i = 0; i < 4; i++) total[g][i] = -0.0f;  // -0 + s is s for every s
            const uint4* x_next = x_first;
            uint32_t slice = slice_first;
            uint32_t border = min(across, slice_begin(p.rows, p.cols, slice + 1) / kChunkCols);
            for (uint32_t c = first; c < end; c++) {
                x_next = c + 1 < end ? x_next + 128 : x_first;
                const uint8_t* chunk = ring.wait();
                const uint8_t* header = chunk + header_offset(kFormat);
                Patches patches = {};
                if (!kDense) {
                    patches.put(header, symbols + segment * 32, p.segments[segment], plane, lane);
                    __syncwarp();
                }
                auto half = [&](auto which) {
                    constexpr int h = decltype(which)::value;
                    uint32_t a[16];
                    decode_half<kFormat, h>(chunk, plane, lane, steps[0], steps[1], a);
#pragma unroll
                    for (int j = 0; j < 2; j++)
#pragma unroll
                        for (int g = 0; g < kTokens8; g++) {
                            uint4& v = x[g][2 * h + j];
                            mma<is_half(kFormat)>(acc[g], a + 8 * j, v.x, v.y);
                            mma<is_half(kFormat)>(acc[g], a + 8 * j + 4, v.z, v.w);
                            load_if(there[g], v, x_next + g * x_stride + (2 * h + j) * 32);
                        }
                };
                half(Constant<0>());
                half(Constant<1>());
                if (!kDense) {
                    __syncwarp();
                    patches.clear(header, p.segments[segment], plane, lane);
                }
                // Filled again only when every lane's loads have arrived: the products above have read them.
                __syncwarp();
                ring.release(p, lane);
                if (c + 1 == border) {
                    if (group == 0) {
#pragma unroll
                        for (int g = 0; g < kTokens8; g++)
#pragma unroll
                            for (int i = 0; i < 4; i++) total[g][i] += acc[g][i];
                    }
                    if (group > 0 || c + 1 == end) {
#pragma unroll
                        for (int g = 0; g < kTokens8; g++) {
                            float v[4];
#pragma unroll
                            for (int i = 0; i < 4; i++) v[i] = group == 0 ? total[g][i] : acc[g][i];
                            ((float4*)out)[g * 32 + lane] = make_float4(v[0], v[1], v[2], v[3]);
                        }
                    }
#pragma unroll
                    for (int g = 0; g < kTokens8; g++)
#pragma unroll
                        for (int i = 0; i < 4; i++) acc[g][i] = 0;
                    if (group > 0) out += kTileFloats;
                    slice++;
                    border = min(across, slice_begin(p.rows, p.cols, slice + 1) / kChunkCols);
                }
            }
        }
        __syncthreads();
        const float* from = sums + round % 2 * kTogether * slots * kTileFloats;
        for (uint32_t i = threadIdx.x; i < kTogether * kTileFloats; i += 32 * kWarps) {
            // Consecutive threads: rows of a tile, then tokens.
            const uint32_t row = i % 16, token = i / 16 % (kTokens8 * 8), s = i / kTileFloats;
            const uint32_t n = ((blockIdx.x + round * gridDim.x) * kTogether + s) * 16 + row;
            if (n >= p.rows || token >= p.tokens) continue;
            const float* v = from + s * slots * kTileFloats + token / 8 * 128 + (row % 8 * 4 + token % 8 / 2) * 4 + row / 8 * 2 + token % 2;
            float sum = v[0];
#pragma unroll 8
            for (uint32_t j = 1; j < slots; j++) sum += v[j * kTileFloats];
            store_result<kFormat>(p, token, n, sum);
        }
    }
}

#endif  // __CUDACC__

}  // namespace transom
