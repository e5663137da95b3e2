// Chunks of weights and activations in shared memory, filled ahead of their
// use by bulk copies. Compute capability 9.0 on.
#pragma once

#include "fixed.cuh"

namespace transom {

#ifdef __CUDACC__

/// In a register: the compiler would read it again from threadIdx at every use.
__device__ __forceinline__ int lane_index() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}
__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
/// The value as it is. The compiler cannot see where it is from, or it would compute it again at every use in a loop.
__device__ __forceinline__ uint32_t computed_once(uint32_t v) {
    asm volatile("mov.u32 %0, %0;" : "+r"(v));
    return v;
}
__device__ __forceinline__ uint64_t computed_once(uint64_t v) {
    asm volatile("mov.u64 %0, %0;" : "+l"(v));
    return v;
}
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
/// Weights are read once: they are the first to leave the L2.
__device__ __forceinline__ uint64_t weights_policy() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void copy_weights(uint32_t to, uint64_t from, uint32_t n_bytes, uint32_t bar, uint64_t policy) {
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

/// A tile of 16 rows: its segment, and its index there.
struct Tile {
    uint32_t segment, local;
};

__device__ __forceinline__ Tile locate(const ProductParams& p, uint32_t tile) {
    Tile at = {0, tile};
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (i + 1 < (int)p.n_segments && tile >= p.segments[i].end_tile) at = {(uint32_t)i + 1, tile - p.segments[i].end_tile};
    return at;
}

/// Scale of a row of the product, INT8 only.
__device__ __forceinline__ RowScale row_scale(const ProductParams& p, uint32_t row) {
    const Tile at = locate(p, row / kChunkRows);
    const Segment& segment = p.segments[at.segment];
    return segment.scales[(size_t)(at.local * kChunkRows + row % kChunkRows) * segment.scale_step];
}

/// Steps of a lane's upper and lower row of a tile; and all 16 rows' scales, for patches.
template <WeightFormat kFormat>
__device__ __forceinline__ Steps load_steps(const ProductParams& p, uint32_t tile, int lane, float* scales) {
    Steps steps = {};
    if constexpr (is_int8(kFormat)) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t row = lane / 4 + i * 8;
            const RowScale scale = row_scale(p, min(tile * kChunkRows + row, p.rows - 1));
            steps.step[i] = scale.scale * 0x1p100f * 0x1p33f;
            steps.high[i] = computed_once(__byte_perm(scale.multipliers, 0, 0x1010)), steps.low[i] = computed_once(__byte_perm(scale.multipliers, 0, 0x3232));
            if (!is_dense(kFormat) && lane % 4 == 0) scales[row] = scale.scale;
        }
        if (!is_dense(kFormat)) __syncwarp();
    }
    return steps;
}

/// Stages of a warp's ring of weights.
constexpr int kStages = 2;

/// A warp's chunks: columns `first` to `end` (in chunks) of `kTiles` tiles, of each column one tile's after the other's,
/// then of those `step` tiles further on, up to the last of the product.
template <int kTiles>
struct ChunkRing {
    uint8_t* memory;   // [kStages] chunks
    uint32_t barrier;  // [kStages]
    uint32_t bytes, columns;
    uint32_t turn = 0;  // chunks that were read
    // What is copied next: how many chunks there are yet, and of the tiles; bytes from a chunk to the one below it, and,
    // in units of 16, from the tiles' last column to the first of the next ones.
    uint32_t left, left_of_tiles, below, skip;
    uint64_t source, policy;
    bool is_below = false;

    __device__ __forceinline__ ChunkRing(const ProductParams& p, uint8_t* memory, uint32_t barrier, uint32_t bytes, uint32_t first, uint32_t end, uint32_t tile, uint32_t step)
        : memory(memory), barrier(barrier), bytes(computed_once(bytes)), columns(end - first), left_of_tiles(kTiles * (end - first)) {
        const uint32_t across = (p.cols + kChunkCols - 1) / kChunkCols;
        left = computed_once(tile < p.n_tiles ? (p.n_tiles - tile + step - 1) / step * kTiles * columns : 0);
        source = computed_once((uint64_t)p.chunks + ((uint64_t)tile * across + first) * bytes);
        below = computed_once(across * bytes);
        skip = computed_once((step * across - columns) * (bytes / 16));
        policy = computed_once(weights_policy());
    }

    /// Fills stage `at` with the next chunk, if there is one.
    __device__ __forceinline__ void fill(int lane, uint32_t at) {
        if (left == 0) return;
        if (lane == 0) {
            barrier_expect(barrier + 8 * at, bytes);
            copy_weights(shared_address(memory) + at * bytes, source, bytes, barrier + 8 * at, policy);
        }
        if constexpr (kTiles == 2) {
            source = is_below ? source + bytes - below : source + below;
            is_below = !is_below;
        } else {
            source += bytes;
        }
        left--;
        if (--left_of_tiles == 0) left_of_tiles = kTiles * columns, source += (uint64_t)skip * 16;
    }
    // Of `turn`, which is one register instead of two: they are scarce.
    static_assert(kStages == 2, "");
    __device__ __forceinline__ uint32_t stage() const { return turn & 1; }
    __device__ __forceinline__ uint32_t parity() const { return turn >> 1 & 1; }
    /// The chunk that is read now, when it has arrived.
    __device__ __forceinline__ const uint8_t* wait() const {
        barrier_wait(barrier + 8 * stage(), parity());
        return memory + stage() * bytes;
    }
    /// The same, if there is one.
    __device__ __forceinline__ const uint8_t* wait_if(bool there) const {
        asm volatile(
            "{\n.reg .pred there, done;\nsetp.ne.u32 there, %2, 0;\n@!there bra DONE;\nAGAIN:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\nDONE:\n}" ::"r"(barrier + 8 * stage()),
            "r"(parity()), "r"((uint32_t)there)
            : "memory");
        return memory + stage() * bytes;
    }
    /// To be called by all lanes, after a __syncwarp() behind the last read of the chunk.
    __device__ __forceinline__ void release(int lane) {
        fill(lane, stage());
        turn++;
    }
};

/// Adds the bias, rounds, and stores y[token][n].
template <WeightFormat kFormat>
__device__ __forceinline__ void store_result(const ProductParams& p, uint32_t token, uint32_t n, float sum) {
    constexpr bool kHalf = is_half(kFormat);
    if constexpr (is_int8(kFormat)) sum *= row_scale(p, n).factor;
    if (p.bias) sum += from_16<kHalf>(p.bias[n]);
    p.y[(size_t)token * p.rows + n] = to_16<kHalf>(sum);
}

#endif  // __CUDACC__

}  // namespace transom
