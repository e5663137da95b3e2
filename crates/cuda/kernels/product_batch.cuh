// Fused product y[M,N] = x[M,K] * W[N,K]^T from fixed-rate weights for 17 to
// 64 tokens, and its dense twin: the same kernel, only decode_half differs.
//
// A cluster of blocks has up to 16 tiles of 16 rows, a warp of each block one (with up to 8, two blocks fit an SM);
// its blocks have each an equal share of the slices of K. A warp decodes its
// weights into registers, and four warps multiply theirs (wgmma) with
// activations in shared memory, which a ring holds for all warps of the block.
// With one block a cluster the sums stay in registers; with more they meet in
// the workspace. They are added in order.
#pragma once

#include "mma.cuh"
#include "ring.cuh"

namespace transom {

constexpr int kBatchWarps = 16, kBatchStages = 2;
/// Stages of activations: one that is read, one that other warps may still read, and one on its way.
constexpr int kBatchXStages = 3;

/// Floats of workspace for a launch of that many clusters.
constexpr size_t batch_workspace_floats(uint32_t clusters, uint32_t log_parts, uint32_t strips, uint32_t n_slices, uint32_t tokens8) {
    return log_parts == 0 ? 0 : (size_t)clusters * 2 * strips * sum_slots(n_slices, 1u << log_parts) * tokens8 * 128;
}

/// Shared memory of a block of `warps` warps.
template <WeightFormat kFormat, int kTokens8>
constexpr uint32_t batch_shared_bytes(uint32_t chunk_bytes, uint32_t warps) {
    return warps * ((kBatchStages * chunk_bytes + 127) / 128 * 128) + (is_dense(kFormat) ? 0 : warps * kChunkElems) + kBatchXStages * kTokens8 * 2048 + 128 +
           warps * kBatchStages * 8 + kBatchXStages * 16;
}

#ifdef __CUDACC__

/// One half of a chunk: four k16 steps. `x` is the stage's shared address.
template <WeightFormat kFormat, int kTokens8, int kHalf>
__device__ __forceinline__ void batch_steps(float (&acc)[kTokens8][4], const uint32_t* a, uint32_t x, int lane) {
#if TRANSOM_WGMMA
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 4; s++) wgmma<is_half(kFormat), kTokens8>(acc, a + 4 * s, activation_descriptor(x) + (4 * kHalf + s) * 2 * kCoreAlongK / 16);
    wgmma_commit();
#else
#pragma unroll
    for (int s = 0; s < 4; s++)
#pragma unroll
        for (int g = 0; g < kTokens8; g++) {
            const uint32_t at = x + g * kCoreAlongTokens + (4 * kHalf + s) * 2 * kCoreAlongK + lane * 4;
            uint32_t b0, b1;
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(b0) : "r"(at));
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(b1) : "r"(at + kCoreAlongK));
            mma<is_half(kFormat)>(acc[g], a + 4 * s, b0, b1);
        }
#endif
}
__device__ __forceinline__ void batch_wait() {
#if TRANSOM_WGMMA
    wgmma_wait();
#endif
}

/// All blocks of a cluster wait for each other; what they wrote before is seen after.
__device__ __forceinline__ void cluster_sync() { asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory"); }

template <WeightFormat kFormat, int kTokens8>
__device__ __forceinline__ void product_batch(const ProductParams& p) {
    constexpr bool kDense = is_dense(kFormat);
    constexpr int kTileFloats = kTokens8 * 128;
    constexpr uint32_t kXBytes = kTokens8 * 2048;
    extern __shared__ __align__(128) uint8_t shared[];
    const int n_warps = blockDim.x / 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = lane_index();
    // A grid of [clusters][parts]. No division by what is not known when compiling: it is done a lane at a time, and
    // the compiler would no longer know that the loops below are the same for all lanes.
    const uint32_t parts = 1u << p.log_parts, rank = blockIdx.y, n_clusters = gridDim.x;
    const uint32_t bytes = kDense ? chunk_bytes(kFormat, 0) : p.chunk_bytes;
    const uint32_t ring_bytes = (kBatchStages * bytes + 127) / 128 * 128;
    const uint32_t n_slices = slices(p.rows, p.cols), across = (p.cols + kChunkCols - 1) / kChunkCols;

    // Activations first: their addresses are the same for all warps.
    const uint32_t x_ring = shared_address(shared);
    uint8_t* at = shared + kBatchXStages * kXBytes;
    uint8_t* ring_memory = at + warp * ring_bytes;
    at += n_warps * ring_bytes;
    uint8_t* plane = at + warp * kChunkElems;
    at += kDense ? 0 : n_warps * kChunkElems;
    uint8_t* symbols = at;
    at += 128;
    const uint32_t x_full = shared_address(at), x_empty = x_full + 8 * kBatchXStages, bar = x_empty + 8 * kBatchXStages + warp * kBatchStages * 8;

    if (threadIdx.x == 0) {
        for (int i = 0; i < kBatchXStages; i++) barrier_init(x_full + 8 * i, 1), barrier_init(x_empty + 8 * i, n_warps);
    }
    if (lane == 0) {
        for (int i = 0; i < kBatchStages; i++) barrier_init(bar + 8 * i, 1);
        asm volatile("fence.mbarrier_init.release.cluster;");
    }
    asm volatile("griddepcontrol.launch_dependents;");
    __syncwarp();

    const uint32_t n_tiles = p.segments[p.n_segments - 1].end_tile;
    const uint32_t slice_first = n_slices * rank >> p.log_parts, slice_last = n_slices * (rank + 1) >> p.log_parts;
    const uint32_t first = min(across, slice_begin(p.rows, p.cols, slice_first) / kChunkCols);
    const uint32_t end = min(across, slice_begin(p.rows, p.cols, slice_last) / kChunkCols);

    // Beyond the strips of the cluster: no tile.
    const uint32_t first_tile = warp < (int)p.strips ? blockIdx.x * p.strips + warp : n_tiles;
    ChunkRing<kBatchStages> ring(p, ring_memory, bar, bytes, first, end, first_tile, n_clusters * p.strips);
    for (int i = 0; i < kBatchStages; i++) ring.fill(p, lane, i);
    if (!kDense) {
        for (int i = lane; i < (int)kChunkElems / 16; i += 32) ((uint4*)plane)[i] = make_uint4(0, 0, 0, 0);
        if (warp < (int)p.n_segments) symbols[warp * 32 + lane] = p.segments[warp].symbols[lane];
    }
    __syncthreads();
    // Activations, output and workspace belong to the kernel before this one until here.
    asm volatile("griddepcontrol.wait;" ::: "memory");

    // Activations of the columns, again and again for each round; one thread fills the stages.
    const uint32_t x_bytes = (p.tokens + 7) / 8 * 2048;
    auto fill_x = [&](uint32_t stage, uint32_t column) {
        barrier_expect(x_full + 8 * stage, x_bytes);
        copy_activations(x_ring + stage * kXBytes, (const uint8_t*)p.x + (size_t)column * x_bytes, x_bytes, x_full + 8 * stage);
    };
    const uint32_t first_tile0 = blockIdx.x * p.strips, tile_step = n_clusters * p.strips;
    // The stage's columns, `ahead` of column c of the tiles at `tile`; none behind the last tiles.
    auto columns_ahead = [&](uint32_t c, uint32_t tile, uint32_t ahead, uint32_t* column) {
        for (*column = c + ahead; *column >= end; *column -= end - first) tile += tile_step;
        return tile < n_tiles;
    };
    if (first < end) {
        for (uint32_t i = 0; i + 1 < kBatchXStages; i++) {
            uint32_t column;
            if (columns_ahead(first, first_tile0, i, &column) && threadIdx.x == 0) fill_x(i, column);
        }
    }
    __syncwarp();

    uint32_t x_stage = 0, x_parity = 0;
    const uint32_t own = n_slices >> p.log_parts, slots = n_slices - own + (own > 0 ? 1 : 0);  // sum_slots
    // [cluster][buffer 2][strip][slot][token group][128]
    uint32_t buffer = 0;
    auto sums = [&](uint32_t strip, uint32_t slot) { return (float4*)p.workspace + (size_t)(((blockIdx.x * 2 + buffer) * p.strips + strip) * slots + slot) * (kTileFloats / 4); };
    for (uint32_t tile0 = first_tile0; tile0 < n_tiles; tile0 += tile_step) {
        const uint32_t tile = tile0 + warp;
        const bool here = warp < (int)p.strips && tile < n_tiles;
        const uint32_t segment = here ? locate(p, tile).segment : 0;
        float steps[2] = {};
        if (here) load_steps<kFormat>(p, tile, lane, steps);
        float acc[kTokens8][4] = {}, total[kTokens8][4];
#pragma unroll
        for (int g = 0; g < kTokens8; g++)
#pragma unroll
            for (int i = 0; i < 4; i++) total[g][i] = -0.0f;  // -0 + s is s for every s
        uint32_t slice = slice_first;
        uint32_t border = min(across, slice_begin(p.rows, p.cols, slice + 1) / kChunkCols);
        for (uint32_t c = first; c < end; c++) {
            // A warp without a tile decodes what lies in its memory, which no result depends on: without a branch the
            // compiler knows that the loop is the same for all lanes.
            const uint8_t* chunk = ring.wait_if(here);
            const uint8_t* header = chunk + header_offset(kFormat);
            Patches patches = {};
            if (!kDense) {
                patches.put(header, symbols + segment * 32, p.segments[segment], plane, lane, here);
                __syncwarp();
            }
            barrier_wait(x_full + 8 * x_stage, x_parity);
            const uint32_t x = x_ring + x_stage * kXBytes;
            // Two: products of the first half go on while the second is decoded.
            uint32_t a0[16], a1[16];
            decode_half<kFormat, 0>(chunk, plane, lane, steps[0], steps[1], a0);
            batch_steps<kFormat, kTokens8, 0>(acc, a0, x, lane);
            decode_half<kFormat, 1>(chunk, plane, lane, steps[0], steps[1], a1);
            batch_steps<kFormat, kTokens8, 1>(acc, a1, x, lane);
            if (!kDense) {
                __syncwarp();
                patches.clear(header, p.segments[segment], plane, lane);
            }
            // Dense weights go from the chunk to the product without an instruction between.
            if (kDense) batch_wait();
            __syncwarp();
            ring.release(p, lane);
            batch_wait();
            if (lane == 0) barrier_arrive(x_empty + 8 * x_stage);
            if (++x_stage == kBatchXStages) x_stage = 0, x_parity ^= 1;
            // The stage read before this one: by now the other warps have most likely read it too. The first time it is empty.
            uint32_t column;
            if (columns_ahead(c, tile0, kBatchXStages - 1, &column) && threadIdx.x == 0) {
                const bool is_last = x_stage + 1 == kBatchXStages;
                const uint32_t stage = is_last ? 0 : x_stage + 1;
                barrier_wait(x_empty + 8 * stage, is_last ? x_parity : x_parity ^ 1);
                fill_x(stage, column);
            }
            __syncwarp();
            if (c + 1 == border) {
                if (rank == 0) {
#pragma unroll
                    for (int g = 0; g < kTokens8; g++)
#pragma unroll
                        for (int i = 0; i < 4; i++) total[g][i] += acc[g][i];
                }
                if (here && parts > 1 && (rank > 0 || c + 1 == end)) {
                    float4* out = sums(warp, rank == 0 ? 0 : slice - own + (own > 0 ? 1 : 0));
#pragma unroll
                    for (int g = 0; g < kTokens8; g++) {
                        float v[4];
#pragma unroll
                        for (int i = 0; i < 4; i++) v[i] = rank == 0 ? total[g][i] : acc[g][i];
                        out[g * 32 + lane] = make_float4(v[0], v[1], v[2], v[3]);
                    }
                }
#pragma unroll
                for (int g = 0; g < kTokens8; g++)
#pragma unroll
                    for (int i = 0; i < 4; i++) acc[g][i] = 0;
                slice++;
                border = min(across, slice_begin(p.rows, p.cols, slice + 1) / kChunkCols);
            }
        }
        // Four results of lane `l`: rows l / 4 and l / 4 + 8, two tokens.
        auto store = [&](uint32_t tile, uint32_t g, uint32_t l, const float* v) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t n = tile * 16 + l / 4 + i / 2 * 8, token = g * 8 + l % 4 * 2 + i % 2;
                if (n < p.rows && token < p.tokens) store_result<kFormat>(p, token, n, v[i]);
            }
        };
        if (parts == 1) {
            if (here) {
#pragma unroll
                for (int g = 0; g < kTokens8; g++) store(tile, g, lane, total[g]);
            }
            continue;
        }
        cluster_sync();
        const uint32_t n_items = p.strips * kTokens8 * 32, threads = parts * blockDim.x;
        for (uint32_t i = rank * blockDim.x + threadIdx.x; i < n_items; i += threads) {
            const uint32_t strip = i / (kTokens8 * 32), of_strip = i % (kTokens8 * 32);
            if (tile0 + strip >= n_tiles) continue;
            const float4* from = sums(strip, 0) + of_strip;
            float4 sum = __ldcg(from);
#pragma unroll 5
            for (uint32_t j = 1; j < slots; j++) {
                const float4 v = __ldcg(from + j * (kTileFloats / 4));
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
            const float v[4] = {sum.x, sum.y, sum.z, sum.w};
            store(tile0 + strip, of_strip / 32, of_strip % 32, v);
        }
        // The other buffer, which every block has read when it comes here again.
        buffer ^= 1;
    }
}

#endif  // __CUDACC__

}  // namespace transom
