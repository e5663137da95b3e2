// Product y[M,N] = x[M,K] * W[N,K]^T from fixed-rate weights for many tokens,
// and its dense twin: the same kernel, only decode_half differs.
//
// A block has 8 tiles of 16 rows, a warp each, and 128 or 256 tokens. A warp
// decodes its weights into registers while those before are multiplied (wgmma)
// with activations in shared memory. Three warps more fetch: one activations, by
// a tensor map, and two chunks, of four tiles each. The two blocks of a cluster
// have the same tokens: each fetches half of the activations for both.
//
// A result is one chain of k16 steps in ascending order, from zero. Where the
// last pieces of work would leave clusters without any, their K is shared by
// all: then it is the sum of such chains, from the last one to the first.
#pragma once

#include "mma.cuh"
#include "ring.cuh"

namespace transom {

/// Warps that multiply, a tile each: two warpgroups.
constexpr int kPrefillWarps = 8;
/// Of a block, with the warpgroup that fetches.
constexpr int kPrefillThreads = 32 * (kPrefillWarps + 4);
/// Tiles whose chunks one warp fetches: those of a warpgroup, which needs them at the same time.
constexpr int kPrefillFetched = 4;
/// Blocks of a cluster.
constexpr uint32_t kPrefillCluster = 2;
/// Columns of a stage of activations: a token's are the 128 bytes that are swizzled.
constexpr uint32_t kPrefillCols = 64;
/// Stages of activations: those of as many chunks as a warp has.
constexpr uint32_t kPrefillXStages = kStages * (kChunkCols / kPrefillCols);
/// Pieces of work that are rows of each other: their weights are read for all tokens before the next ones, and stay in L2.
constexpr uint32_t kPrefillBand = 8;
/// Bytes of symbols of escapes; of barriers, full and empty, of activations and of chunks; of a warp's results on their way.
constexpr uint32_t kPrefillSymbols = 128, kPrefillBarriers = 8 * 2 * (kPrefillXStages + kPrefillWarps * kStages), kPrefillStaging = 512;

/// Bytes of a warp's chunks, plane, scales and results.
template <WeightFormat kFormat>
TRANSOM_BOTH constexpr uint32_t prefill_warp_bytes(uint32_t chunk_bytes) {
    return kStages * chunk_bytes + plane_bytes(kFormat) + scale_bytes(kFormat) + kPrefillStaging;
}
/// Shared memory of a block, which begins at the next multiple of 1024: [stage of activations], symbols, barriers, [warp].
template <WeightFormat kFormat, int kTokens8>
constexpr uint32_t prefill_shared_bytes(uint32_t chunk_bytes) {
    return 1024 + kPrefillXStages * kTokens8 * 1024 + kPrefillSymbols + kPrefillBarriers + kPrefillWarps * prefill_warp_bytes<kFormat>(chunk_bytes);
}

/// Floats of workspace for a launch of so many clusters: sums of each warp.
template <int kTokens8>
constexpr size_t prefill_workspace_floats(uint32_t n_clusters) {
    return (size_t)n_clusters * kPrefillCluster * kPrefillWarps * kTokens8 * 128;
}

#if defined(__CUDACC__) && TRANSOM_WGMMA

/// Low word of the descriptor of swizzled activations.
__device__ __forceinline__ uint32_t swizzled_descriptor(uint32_t address) { return address >> 4 | 1u << 16; }
/// The descriptor of those `n_bytes` further on. In the high word are the distance of 8 tokens and the swizzle.
__device__ __forceinline__ uint64_t swizzled_further(uint32_t descriptor, uint32_t n_bytes) {
    uint64_t out;
    asm("mov.b64 %0, {%1, %2};" : "=l"(out) : "r"(descriptor + n_bytes / 16), "n"(1024 >> 4 | 1 << 30));
    return out;
}
/// Into all blocks of the cluster, at the same address and barrier of each.
__device__ __forceinline__ void fetch_activations(uint32_t to, const TensorMap& map, uint32_t col, uint32_t token, uint32_t bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(col), "r"(token), "r"(bar), "h"((uint16_t)((1 << kPrefillCluster) - 1))
        : "memory");
}
/// Arrives at the barrier at that address of another block of the cluster. Without the scope of the cluster, which costs a
/// fence of the whole GPU: what was read are the tensor cores' operands, and those products are done.
__device__ __forceinline__ void barrier_arrive_at(uint32_t bar, uint32_t rank) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(bar), "r"(rank)
                 : "memory");
}
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Part of the work: chunks `begin` to `end` of the K of a piece.
struct PrefillShare {
    uint32_t piece, begin, end;
};

/// Work is pieces of 16 tiles and a block's tokens. Pieces go through all tokens of a band of rows before the next. The first
/// ones are done whole; of the chunks of the others, one piece's after the other's, each cluster has as many.
struct PrefillWork {
    uint32_t n_rows, n_tokens, across;  // of pieces
    uint32_t whole;
    uint32_t cluster, n_clusters;
    uint32_t rank;  // of the block in its cluster

    __device__ __forceinline__ PrefillWork(const PrefillParams& params, uint32_t tokens)
        : n_rows((params.product.n_tiles + kPrefillCluster * kPrefillWarps - 1) / (kPrefillCluster * kPrefillWarps)),
          n_tokens((params.product.tokens + tokens - 1) / tokens),
          across((params.product.cols + kChunkCols - 1) / kChunkCols),
          whole(params.whole),
          cluster(blockIdx.x / kPrefillCluster),
          n_clusters(gridDim.x / kPrefillCluster),
          rank(blockIdx.x % kPrefillCluster) {}
    /// The block's first tile of a piece, and which of the tokens' pieces it is.
    __device__ __forceinline__ uint32_t tile(uint32_t piece, uint32_t* token) const {
        const uint32_t per_band = kPrefillBand * n_tokens, band = piece / per_band, left = piece - band * per_band;
        const uint32_t height = min(kPrefillBand, n_rows - band * kPrefillBand);
        *token = left / height;
        return ((band * kPrefillBand + left - *token * height) * kPrefillCluster + rank) * kPrefillWarps;
    }
    /// First of a cluster's chunks of the pieces that are shared.
    __device__ __forceinline__ uint32_t first_shared(uint32_t of_cluster) const { return (n_rows * n_tokens - whole) * across * of_cluster / n_clusters; }
};

/// A cluster's shares. Of a piece that it begins and another one ends it does its share before it ends another piece itself,
/// so that nobody waits for one that waits.
struct PrefillCursor {
    uint32_t piece, first, last;

    __device__ __forceinline__ PrefillCursor(const PrefillWork& work) : piece(work.cluster), first(work.first_shared(work.cluster)), last(work.first_shared(work.cluster + 1)) {}
    /// False behind the last.
    __device__ __forceinline__ bool next(const PrefillWork& work, PrefillShare* share) {
        if (piece < work.whole) {
            *share = {piece, 0, work.across};
            piece += work.n_clusters;
            return true;
        }
        if (first == last) return false;
        const uint32_t shared = (last - 1) / work.across, start = shared * work.across, from = max(first, start);
        *share = {work.whole + shared, from - start, last - start};
        last = from;
        return true;
    }
};

/// Where things are in shared memory.
struct PrefillMemory {
    uint32_t x, barriers;  // shared addresses
    uint8_t* symbols;
    uint8_t* warps;

    __device__ __forceinline__ uint32_t x_full(uint32_t stage) const { return barriers + 8 * stage; }
    __device__ __forceinline__ uint32_t x_empty(uint32_t stage) const { return barriers + 8 * (kPrefillXStages + stage); }
    __device__ __forceinline__ uint32_t full(uint32_t warp, uint32_t stage) const { return barriers + 8 * (2 * kPrefillXStages + warp * kStages + stage); }
    __device__ __forceinline__ uint32_t empty(uint32_t warp, uint32_t stage) const { return full(warp, stage) + 8 * kPrefillWarps * kStages; }
};

/// Puts 16 rows of 16 tokens into 512 bytes of the warp, [token][row], and from there into y.
template <WeightFormat kFormat>
__device__ __forceinline__ void store_tokens(const ProductParams& p, uint32_t tile, uint32_t first, const float (*acc)[4], const float* bias, const float* factor, uint8_t* staging, int lane) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        pairs[i] = 0;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float sum = acc[i / 2][i % 2 * 2 + j];
            if constexpr (is_int8(kFormat)) sum *= factor[i % 2];
            if (p.bias) sum += bias[i % 2];
            pairs[i] |= (uint32_t)to_16<is_half(kFormat)>(sum) << (16 * j);
        }
    }
    const uint32_t to = shared_address(staging) + (lane / 16 * 8 + lane % 8) * 32 + lane / 8 % 2 * 16;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
                 : "memory");
    __syncwarp();
    const uint4 v = ((const uint4*)staging)[lane];
    const uint32_t row = tile * kChunkRows + lane % 2 * 8, token = first + lane / 2;
    uint16_t* y = p.y + (size_t)token * p.rows + row;
    if (token < p.tokens && p.rows % 8 == 0) {
        if (row < p.rows) *(uint4*)y = v;
    } else if (token < p.tokens) {
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (row + j < p.rows) y[j] = (uint16_t)(words[j / 2] >> (j % 2 * 16));
    }
    // The next results come to the same place, and products need all lanes together.
    __syncwarp();
}

/// Sums of a warp's share of a piece that another cluster ends, and a word that says that they are there.
template <int kTokens8>
struct PrefillSums {
    float4* sums;  // [token group][lane]
    uint32_t* word;

    __device__ __forceinline__ PrefillSums(const ProductParams& p, const PrefillWork& work, uint32_t cluster, uint32_t warp) {
        const uint32_t at = (cluster * kPrefillCluster + work.rank) * kPrefillWarps + warp;
        sums = (float4*)p.workspace + (size_t)at * (kTokens8 * 32), word = p.meetings + at;
    }
};
template <int kTokens8>
__device__ __forceinline__ void hand_over(const PrefillSums<kTokens8>& to, const float (&acc)[kTokens8][4], int lane) {
#pragma unroll
    for (int g = 0; g < kTokens8; g++) to.sums[g * 32 + lane] = make_float4(acc[g][0], acc[g][1], acc[g][2], acc[g][3]);
    __threadfence();
    __syncwarp();
    if (lane == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(to.word) : "memory");
    __syncwarp();
}
/// Waits for sums of a cluster before this one, which the GPU has started before and which waits for nobody to hand them over.
template <int kTokens8>
__device__ __forceinline__ void take(const PrefillSums<kTokens8>& from, float (&acc)[kTokens8][4], int lane) {
    uint32_t there = 0;
    while (there == 0) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(from.word) : "memory");
    __syncwarp();
#pragma unroll
    for (int g = 0; g < kTokens8; g++) {
        const float4 v = __ldcg(from.sums + g * 32 + lane);
        acc[g][0] += v.x, acc[g][1] += v.y, acc[g][2] += v.z, acc[g][3] += v.w;
    }
    __syncwarp();
    if (lane == 0) *from.word = 0;
    __syncwarp();
}

/// Four k16 steps.
template <WeightFormat kFormat, int kTokens8>
__device__ __forceinline__ void prefill_steps(float (&acc)[kTokens8][4], const uint32_t* a, uint32_t x) {
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 4; s++) wgmma<is_half(kFormat), kTokens8>(acc, a + 4 * s, swizzled_further(x, 32 * s));
    wgmma_commit();
}

/// Fetches the chunks of the tiles from `first` on of the block's, a lane for each.
template <WeightFormat kFormat>
__device__ __forceinline__ void prefill_fetch_chunks(const ProductParams& p, const PrefillWork& work, const PrefillMemory& memory, uint32_t bytes, uint32_t first, int lane) {
    if (lane >= kPrefillFetched) return;
    const uint32_t warp = first + lane, room = shared_address(memory.warps) + warp * prefill_warp_bytes<kFormat>(bytes);
    uint32_t turn = 0;
    PrefillShare share;
    for (PrefillCursor cursor(work); cursor.next(work, &share);) {
        uint32_t token;
        // A tile that is not there has the last one's.
        const uint32_t tile = min(work.tile(share.piece, &token) + warp, p.n_tiles - 1);
        uint64_t source = (uint64_t)p.chunks + ((uint64_t)tile * work.across + share.begin) * bytes;
        for (uint32_t c = share.begin; c < share.end; c++, turn++, source += bytes) {
            const uint32_t stage = turn % kStages, full = memory.full(warp, stage);
            barrier_wait(memory.empty(warp, stage), turn / kStages & 1 ^ 1);
            barrier_expect(full, bytes);
            // As activations are, to stay in L2: blocks with other tokens need them too.
            copy_activations(room + stage * bytes, (const void*)source, bytes, full);
        }
    }
}

/// Fetches the block's half of all activations, for one thread.
template <int kTokens8>
__device__ __forceinline__ void prefill_fetch(const PrefillParams& params, const PrefillWork& work, const PrefillMemory& memory) {
    constexpr uint32_t kXBytes = kTokens8 * 1024, kBoxes = kChunkCols / kPrefillCols;
    uint32_t stage = 0, parity = 0;
    PrefillShare share;
    for (PrefillCursor cursor(work); cursor.next(work, &share);) {
        uint32_t token;
        work.tile(share.piece, &token);
        token = (token * kPrefillCluster + work.rank) * (kTokens8 * 8 / kPrefillCluster);
        for (uint32_t c = share.begin * kBoxes; c < share.end * kBoxes; c++) {
            barrier_wait(memory.x_empty(stage), parity ^ 1);
            barrier_expect(memory.x_full(stage), kXBytes);
            fetch_activations(memory.x + stage * kXBytes + work.rank * (kXBytes / kPrefillCluster), params.x, c * kPrefillCols, token, memory.x_full(stage));
            if (++stage == kPrefillXStages) stage = 0, parity ^= 1;
        }
    }
}

/// Decodes and multiplies a warp's tiles.
template <WeightFormat kFormat, int kTokens8>
__device__ __forceinline__ void prefill_multiply(const ProductParams& p, const PrefillWork& work, const PrefillMemory& memory, uint32_t n_bytes, uint32_t warp, int lane) {
    constexpr bool kDense = is_dense(kFormat);
    constexpr uint32_t kXBytes = kTokens8 * 1024;
    const uint32_t bytes = computed_once(n_bytes);
    uint8_t* chunks = memory.warps + computed_once(warp * prefill_warp_bytes<kFormat>(n_bytes));
    uint8_t* plane = chunks + kStages * bytes;
    float* scales = (float*)(plane + plane_bytes(kFormat));
    uint8_t* staging = plane + plane_bytes(kFormat) + scale_bytes(kFormat);
    if (!kDense) {
        for (int i = lane; i < (int)plane_bytes(kFormat) / 16; i += 32) ((uint4*)plane)[i] = make_uint4(0, 0, 0, 0);
    }
    __syncwarp();
    const uint32_t full = computed_once(memory.full(warp, 0)), empty = computed_once(memory.empty(warp, 0));
    asm volatile("griddepcontrol.wait;" ::: "memory");
    auto give_back = [&](uint32_t x_stage) {
        if (lane < (int)kPrefillCluster) barrier_arrive_at(memory.x_empty(x_stage), lane);
    };
    uint32_t turn = 0;  // chunks that were read
    PrefillShare share;
    for (PrefillCursor cursor(work); cursor.next(work, &share);) {
        uint32_t token;
        const uint32_t tile = work.tile(share.piece, &token) + warp, known_tile = min(tile, p.n_tiles - 1);
        const Steps steps = load_steps<kFormat>(p, known_tile, lane, scales);
        const uint32_t segment = kDense ? 0 : locate(p, known_tile).segment;
        float acc[kTokens8][4] = {};
        // Two: products of a half go on while the next is decoded. The compiler knows that registers of products that go on are
        // in use as long as no wait depends on a condition.
        uint32_t a0[16], a1[16];
        for (uint32_t c = share.begin; c < share.end; c++, turn++) {
            const uint32_t stage = turn % kStages, parity = turn / kStages & 1, x_full = memory.x_full(2 * stage);
            const uint32_t x = swizzled_descriptor(memory.x) + stage * (2 * kXBytes / 16);
            const uint8_t* chunk = chunks + stage * bytes;
            barrier_wait(full + 8 * stage, parity);
            Patches<kFormat> patches = {};
            if (!kDense) {
                patches.put(chunk + header_offset(kFormat), memory.symbols + segment * 32, p.segments[segment], scales, plane, lane);
                __syncwarp();
            }
            decode_half<kFormat, 0>(chunk, plane, lane, steps, a0);
            barrier_wait(x_full, parity);
            prefill_steps<kFormat, kTokens8>(acc, a0, x);
            wgmma_wait_but<1>();
            if (c > share.begin) give_back(2 * (stage ^ 1) + 1);
            decode_half<kFormat, 1>(chunk, plane, lane, steps, a1);
            __syncwarp();
            if (!kDense && lane == 0) barrier_arrive(empty + 8 * stage);
            barrier_wait(x_full + 8, parity);
            prefill_steps<kFormat, kTokens8>(acc, a1, x + kXBytes / 16);
            if (kDense) {
                // They go from the chunk to the product without an instruction between.
                wgmma_wait();
                if (lane == 0) barrier_arrive(empty + 8 * stage);
            } else {
                patches.clear(plane, lane);
                __syncwarp();
            }
            wgmma_wait_but<1>();
            give_back(2 * stage);
        }
        wgmma_wait();
        give_back(2 * ((turn - 1) % kStages) + 1);
        if (tile >= p.n_tiles) continue;
        if (share.end < work.across) {
            hand_over(PrefillSums<kTokens8>(p, work, work.cluster, warp), acc, lane);
            continue;
        }
        // The clusters before this one, down to the one that has the piece's first chunk; some may have none.
        for (uint32_t of = work.cluster, at = work.first_shared(of), start = (share.piece - work.whole) * work.across; share.begin > 0 && at > start;) {
            const uint32_t end = at;
            at = work.first_shared(--of);
            if (at < end) take(PrefillSums<kTokens8>(p, work, of, warp), acc, lane);
        }
        float bias[2] = {}, factor[2] = {1, 1};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t n = min(tile * kChunkRows + lane / 4 + i * 8, p.rows - 1);
            if (p.bias) bias[i] = from_16<is_half(kFormat)>(p.bias[n]);
            if constexpr (is_int8(kFormat)) factor[i] = row_scale(p, n).factor;
        }
#pragma unroll
        for (int g = 0; g < kTokens8; g += 2) store_tokens<kFormat>(p, tile, (token * kTokens8 + g) * 8, acc + g, bias, factor, staging, lane);
    }
}

template <WeightFormat kFormat, int kTokens8>
__device__ __forceinline__ void product_prefill(const PrefillParams& params) {
    const ProductParams& p = params.product;
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = lane_index();
    uint8_t* shared = shared_memory + (1024 - shared_address(shared_memory) % 1024) % 1024;
    uint8_t* symbols = shared + kPrefillXStages * kTokens8 * 1024;
    const PrefillMemory memory = {shared_address(shared), shared_address(symbols + kPrefillSymbols), symbols, symbols + kPrefillSymbols + kPrefillBarriers};
    const PrefillWork work(params, kTokens8 * 8);
    const uint32_t bytes = is_dense(kFormat) ? chunk_bytes(kFormat, 0) : p.chunk_bytes;
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < kPrefillXStages; i++) barrier_init(memory.x_full(i), 1), barrier_init(memory.x_empty(i), kPrefillCluster * kPrefillWarps);
        for (uint32_t i = 0; i < kPrefillWarps * kStages; i++) barrier_init(memory.full(0, i), 1), barrier_init(memory.empty(0, i), 1);
        asm volatile("fence.mbarrier_init.release.cluster;");
    }
    if (!is_dense(kFormat) && warp < (int)p.n_segments) symbols[warp * 32 + lane] = p.segments[warp].symbols[lane];
    asm volatile("griddepcontrol.launch_dependents;");
    __syncthreads();
    cluster_barrier();
    // Sums take most registers: the warps that multiply have what the others do not need.
    if (warp >= kPrefillWarps) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 32 * kPrefillWarps) {
            asm volatile("griddepcontrol.wait;" ::: "memory");
            prefill_fetch<kTokens8>(params, work, memory);
        } else if (warp > kPrefillWarps && warp <= kPrefillWarps + kPrefillWarps / kPrefillFetched) {
            prefill_fetch_chunks<kFormat>(p, work, memory, bytes, (warp - kPrefillWarps - 1) * kPrefillFetched, lane);
        }
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        prefill_multiply<kFormat, kTokens8>(p, work, memory, bytes, warp, lane);
    }
    // Nobody leaves while another of the cluster may write to its memory.
    cluster_barrier();
}

#endif

}  // namespace transom
