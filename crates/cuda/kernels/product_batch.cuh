// Fused product y[M,N] = x[M,K] * W[N,K]^T from fixed-rate weights for 17 to
// 64 tokens, and its dense twin: the same kernel, only decode_half differs.
//
// A block has up to 16 tiles of 16 rows, a warp each (with up to 8, two blocks
// fit an SM), and where rows are few one of several parts of the slices of K. A
// warp decodes its weights into registers, and four warps multiply theirs
// (wgmma) with activations in shared memory, which a ring holds for all warps.
// Where a block has all slices the sums stay in registers. Otherwise they meet
// in the workspace, and each block of the tiles adds a share of them in order.
#pragma once

#include "mma.cuh"
#include "ring.cuh"

namespace transom {

constexpr int kBatchWarps = 16;
/// Stages of activations: one that is read, one that other warps may still read, and one on its way.
constexpr int kBatchXStages = 3;
/// Bytes of what all warps of a block share beside activations: barriers, a word, symbols of escapes.
constexpr uint32_t kBatchCommon = 256;
static_assert(16 * kBatchXStages + 16 + 96 <= kBatchCommon, "");

/// Floats of workspace for a launch.
constexpr size_t batch_workspace_floats(uint32_t groups, uint32_t parts, uint32_t strips, uint32_t n_slices, uint32_t tokens8) {
    return parts == 1 ? 0 : (size_t)groups * strips * sum_slots(n_slices, parts) * tokens8 * 128;
}

/// Shared memory of a block of `warps` warps.
template <WeightFormat kFormat, int kTokens8>
constexpr uint32_t batch_shared_bytes(uint32_t chunk_bytes, uint32_t warps) {
    return warps * ((kStages * chunk_bytes + 127) / 128 * 128) + warps * (plane_bytes(kFormat) + scale_bytes(kFormat)) + kBatchXStages * kTokens8 * 2048 + kBatchCommon +
           warps * kStages * 8;
}

#ifdef __CUDACC__

/// One half of a chunk: four k16 steps. `x` is the stage's shared address.
template <WeightFormat kFormat, int kTokens8, int kHalf>
__device__ __forceinline__ void batch_steps(float (&acc)[kTokens8][4], const uint32_t* a, uint32_t x, int lane) {
#if TRANSOM_WGMMA
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 4; s++) wgmma<is_half(kFormat), kTokens8>(acc, a + 4 * s, further(activation_descriptor(x), (4 * kHalf + s) * 2 * kCoreAlongK));
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

/// Blocks that meet at two words of memory, zero before and after. None waits for long for one that may not be running:
/// it hands its share of what is to be done to the last that comes.
struct Meeting {
    uint32_t* words;  // how many have come, and from bit 16 on whose shares were handed over; how many shares are done
    uint32_t parts, patience;

    /// For one thread, when the block's results are written. Returns the shares that the block is to do, a bit each.
    __device__ uint32_t arrive(uint32_t rank) const {
        const uint32_t before = add(words, 1), own = 1u << rank;
        if ((before & 0xFFFF) + 1 == parts) return own | before >> 16;
        for (uint32_t i = 0; i < patience; i++) {
            uint32_t now;
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(words) : "memory");
            if ((now & 0xFFFF) == parts) return own;
        }
        uint32_t last;
        asm volatile("atom.acq_rel.gpu.global.or.b32 %0, [%1], %2;" : "=r"(last) : "l"(words), "r"(own << 16) : "memory");
        return (last & 0xFFFF) == parts ? own : 0;
    }
    /// For one thread, when the shares are done. The words are zero again after the last.
    __device__ void leave(uint32_t shares) const {
        if (add(words + 1, __popc(shares)) + __popc(shares) == parts) words[0] = words[1] = 0;
    }
    static __device__ uint32_t add(uint32_t* to, uint32_t n) {
        uint32_t before;
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(n) : "memory");
        return before;
    }
};

template <WeightFormat kFormat, int kTokens8>
__device__ __forceinline__ void product_batch(const ProductParams& p) {
    constexpr bool kDense = is_dense(kFormat);
    constexpr int kTileFloats = kTokens8 * 128;
    constexpr uint32_t kXBytes = kTokens8 * 2048;
    extern __shared__ __align__(128) uint8_t shared[];
    const int n_warps = blockDim.x / 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = lane_index();
    // A grid of [groups of tiles][parts]. No division by what is not known when compiling: it is done a lane at a time,
    // and the compiler would no longer know that the loops below are the same for all lanes.
    const uint32_t parts = p.parts, rank = blockIdx.x, n_groups = gridDim.y;
    auto share = [&](uint32_t n, uint32_t i) { return n * i * p.part_share >> 16; };  // n * i / parts, for up to 16 parts of 256
    const uint32_t bytes = kDense ? chunk_bytes(kFormat, 0) : p.chunk_bytes;
    const uint32_t ring_bytes = (kStages * bytes + 127) / 128 * 128;
    const uint32_t n_slices = slices(p.rows, p.cols), across = (p.cols + kChunkCols - 1) / kChunkCols;

    // What all warps share comes first: its addresses are known when compiling.
    const uint32_t x_ring = shared_address(shared);
    uint8_t* symbols = shared + kBatchXStages * kXBytes;
    const uint32_t x_full = shared_address(symbols + 128), x_empty = x_full + 8 * kBatchXStages;
    uint32_t* shares = (uint32_t*)(symbols + 128 + 16 * kBatchXStages);
    uint8_t* at = shared + kBatchXStages * kXBytes + kBatchCommon;
    uint8_t* ring_memory = at + warp * ring_bytes;
    at += n_warps * ring_bytes;
    uint8_t* plane = at + warp * plane_bytes(kFormat);
    at += n_warps * plane_bytes(kFormat);
    float* scales = (float*)(at + warp * scale_bytes(kFormat));
    at += n_warps * scale_bytes(kFormat);
    const uint32_t bar = computed_once(shared_address(at) + warp * kStages * 8);

    if (threadIdx.x == 0) {
        for (int i = 0; i < kBatchXStages; i++) barrier_init(x_full + 8 * i, 1), barrier_init(x_empty + 8 * i, n_warps);
    }
    if (lane == 0) {
        for (int i = 0; i < kStages; i++) barrier_init(bar + 8 * i, 1);
        asm volatile("fence.mbarrier_init.release.cluster;");
    }
    asm volatile("griddepcontrol.launch_dependents;");
    __syncwarp();

    const uint32_t slice_first = share(n_slices, rank), slice_last = share(n_slices, rank + 1);
    const uint32_t first = computed_once(min(across, slice_begin(p.rows, p.cols, slice_first) / kChunkCols));
    const uint32_t end = computed_once(min(across, slice_begin(p.rows, p.cols, slice_last) / kChunkCols));

    // Beyond the strips of the block: no tile.
    const uint32_t first_tile = warp < (int)p.strips ? blockIdx.y * p.strips + warp : p.n_tiles;
    ChunkRing<1> ring(p, ring_memory, bar, bytes, first, end, first_tile, n_groups * p.strips);
    for (int i = 0; i < kStages; i++) ring.fill(lane, i);
    if (!kDense) {
        for (int i = lane; i < (int)plane_bytes(kFormat) / 16; i += 32) ((uint4*)plane)[i] = make_uint4(0, 0, 0, 0);
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
    const uint32_t first_tile0 = blockIdx.y * p.strips, tile_step = n_groups * p.strips;
    // The stage's columns, `ahead` of column c of the tiles at `tile`; none behind the last tiles.
    auto columns_ahead = [&](uint32_t c, uint32_t tile, uint32_t ahead, uint32_t* column) {
        for (*column = c + ahead; *column >= end; *column -= end - first) tile += tile_step;
        return tile < p.n_tiles;
    };
    if (first < end) {
        for (uint32_t i = 0; i + 1 < kBatchXStages; i++) {
            uint32_t column;
            if (columns_ahead(first, first_tile0, i, &column) && threadIdx.x == 0) fill_x(i, column);
        }
    }
    __syncwarp();

    uint32_t x_stage = 0, x_parity = 0;
    // [group][strip][slot][token group][128]; parts have one group each.
    auto sums = [&](uint32_t strip, uint32_t slot) { return (float4*)p.workspace + (size_t)((blockIdx.y * p.strips + strip) * p.slots + slot) * (kTileFloats / 4); };
    auto write = [&](float4* to, const float (&v)[kTokens8][4]) {
#pragma unroll
        for (int g = 0; g < kTokens8; g++) to[g * 32 + lane] = make_float4(v[g][0], v[g][1], v[g][2], v[g][3]);
    };
    for (uint32_t tile0 = first_tile0; tile0 < p.n_tiles; tile0 += tile_step) {
        const uint32_t tile = tile0 + warp;
        const bool here = warp < (int)p.strips && tile < p.n_tiles;
        // A tile that is not there has the last row's.
        const Steps steps = load_steps<kFormat>(p, min(tile, p.n_tiles - 1), lane, scales);
        float acc[kTokens8][4] = {}, total[kTokens8][4];
#pragma unroll
        for (int g = 0; g < kTokens8; g++)
#pragma unroll
            for (int i = 0; i < 4; i++) total[g][i] = -0.0f;  // -0 + s is s for every s
        uint32_t slice = slice_first;
        for (uint32_t c = first; c < end; c++) {
            // A warp without a tile decodes what lies in its memory, which no result depends on: without a branch the
            // compiler knows that the loop is the same for all lanes.
            const uint8_t* chunk = ring.wait_if(here);
            const uint8_t* header = chunk + header_offset(kFormat);
            Patches<kFormat> patches = {};
            const uint32_t segment = kDense || !here ? 0 : locate(p, tile).segment;
            if (!kDense) {
                patches.put(header, symbols + segment * 32, p.segments[segment], scales, plane, lane, here);
                __syncwarp();
            }
            barrier_wait(x_full + 8 * x_stage, x_parity);
            const uint32_t x = x_ring + x_stage * kXBytes;
            // Two: products of the first half go on while the second is decoded.
            uint32_t a0[16], a1[16];
            decode_half<kFormat, 0>(chunk, plane, lane, steps, a0);
            batch_steps<kFormat, kTokens8, 0>(acc, a0, x, lane);
            decode_half<kFormat, 1>(chunk, plane, lane, steps, a1);
            batch_steps<kFormat, kTokens8, 1>(acc, a1, x, lane);
            if (!kDense) {
                __syncwarp();
                patches.clear(plane, lane);
            }
            // Dense weights go from the chunk to the product without an instruction between.
            if (kDense) batch_wait();
            __syncwarp();
            ring.release(lane);
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
            if (c + 1 == min(across, slice_begin(p.rows, p.cols, slice + 1) / kChunkCols)) {
                // The first part adds its slices, the others hand over each.
                if (rank > 0 && here) write(sums(warp, slice + p.slots - n_slices), acc);
#pragma unroll
                for (int g = 0; g < kTokens8; g++)
#pragma unroll
                    for (int i = 0; i < 4; i++) total[g][i] += acc[g][i], acc[g][i] = 0;
                slice++;
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
        if (rank == 0 && here) write(sums(warp, 0), total);
        const Meeting meeting = {p.meetings + 2 * blockIdx.y, parts, p.patience};
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) *shares = meeting.arrive(rank);
        __syncthreads();
        const uint32_t n_items = p.strips * kTokens8 * 32;
        for (uint32_t part = 0; part < parts; part++) {
            if ((*shares >> part & 1) == 0) continue;
            const uint32_t items_end = part + 1 == parts ? n_items : n_items / parts * (part + 1);
            for (uint32_t i = n_items / parts * part + threadIdx.x; i < items_end; i += blockDim.x) {
                const uint32_t strip = i / (kTokens8 * 32), of_strip = i % (kTokens8 * 32);
                if (tile0 + strip >= p.n_tiles) continue;
                const float4* from = sums(strip, 0) + of_strip;
                float4 sum = __ldcg(from);
#pragma unroll 5
                for (uint32_t j = 1; j < p.slots; j++) {
                    const float4 v = __ldcg(from + j * (kTileFloats / 4));
                    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
                }
                const float v[4] = {sum.x, sum.y, sum.z, sum.w};
                store(tile0 + strip, of_strip / 32, of_strip % 32, v);
            }
        }
        if (threadIdx.x == 0 && *shares != 0) meeting.leave(*shares);
    }
}

#endif  // __CUDACC__

}  // namespace transom
