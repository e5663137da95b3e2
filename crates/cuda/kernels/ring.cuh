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

/// Steps of a lane's upper and lower row of a tile.
template <WeightFormat kFormat>
__device__ __forceinline__ void load_steps(const ProductParams& p, uint32_t tile, int lane, float* steps) {
    if constexpr (is_int8(kFormat)) {
        const uint32_t row = tile * kChunkRows + lane / 4;
        steps[0] = row_scale(p, min(row, p.rows - 1)).step;
        steps[1] = row_scale(p, min(row + 8, p.rows - 1)).step;
    } else {
        steps[0] = steps[1] = 0;
    }
}

/// A warp's chunks: columns `first` to `end` (in chunks) of a tile, then of the
/// tile `step` further on, up to the last of the product.
template <int kStages>
struct ChunkRing {
    uint8_t* memory;   // [kStages] chunks
    uint32_t barrier;  // [kStages]
    uint32_t bytes, first, end, step;
    uint32_t stage = 0, parity = 0;
    // What is copied next, and where it lies, in units of 16 bytes: registers are scarce.
    uint32_t tile, column, source;

    __device__ __forceinline__ ChunkRing(const ProductParams& p, uint8_t* memory, uint32_t barrier, uint32_t bytes, uint32_t first, uint32_t end, uint32_t tile, uint32_t step)
        : memory(memory), barrier(barrier), bytes(bytes), first(first), end(end), step(step), tile(first < end ? tile : p.n_tiles), column(first) {
        source = (tile * across(p) + first) * (bytes / 16);
    }
    static __device__ __forceinline__ uint32_t across(const ProductParams& p) { return (p.cols + kChunkCols - 1) / kChunkCols; }

    /// Fills stage `at` with the next chunk, if there is one.
    __device__ __forceinline__ void fill(const ProductParams& p, int lane, uint32_t at) {
        if (tile >= p.n_tiles) return;
        if (lane == 0) {
            barrier_expect(barrier + 8 * at, bytes);
            copy_weights(shared_address(memory) + at * bytes, p.chunks + (size_t)source * 16, bytes, barrier + 8 * at);
        }
        source += bytes / 16;
        if (++column == end) {
            column = first, tile += step;
            source += (step * across(p) - (end - first)) * (bytes / 16);
        }
    }
    /// The chunk that is read now, when it has arrived.
    __device__ __forceinline__ const uint8_t* wait() const {
        barrier_wait(barrier + 8 * stage, parity);
        return memory + stage * bytes;
    }
    /// The same, if there is one.
    __device__ __forceinline__ const uint8_t* wait_if(bool there) const {
        asm volatile(
            "{\n.reg .pred there, done;\nsetp.ne.u32 there, %2, 0;\n@!there bra DONE;\nAGAIN:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\nDONE:\n}" ::"r"(barrier + 8 * stage),
            "r"(parity), "r"((uint32_t)there)
            : "memory");
        return memory + stage * bytes;
    }
    /// To be called by all lanes, after a __syncwarp() behind the last read of the chunk.
    __device__ __forceinline__ void release(const ProductParams& p, int lane) {
        fill(p, lane, stage);
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

/// Adds the bias, rounds, and stores y[token][n].
template <WeightFormat kFormat>
__device__ __forceinline__ void store_result(const ProductParams& p, uint32_t token, uint32_t n, float sum) {
    uint16_t y;
    if constexpr (is_int8(kFormat)) sum *= row_scale(p, n).factor;
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

#endif  // __CUDACC__

}  // namespace transom
