// Matrix in device memory, or a part of it -> row-major BF16 or FP16. A warp decodes
// unit after unit.
#pragma once

#include "rans.cuh"

namespace transom {
namespace rans {

/// A part of a matrix.
struct Range {
    uint32_t row, col;    // multiples of 16 and of kUnitCols
    uint32_t rows, cols;  // multiples of 16, not 0
};

struct DecodeArgs {
    Matrix matrix;
    uint16_t* out;    // row-major, the range alone
    uint64_t stride;  // elements from a row of `out` to the next; a multiple of 8
    Range range;
};

#ifdef __CUDACC__

constexpr int kDecodeRows = 32;
constexpr int kDecodeStage = 16 * 128;  // 16 rows x 64 columns of BF16
constexpr int kDecodeWarpBytes = 2 * kDecodeRows * kRowBytes + kDecodeStage;

/// Every n-th unit of a range.
struct EveryUnit {
    uint32_t index, step, n;          // counted within the range
    uint32_t first, across, units;    // unit of its corner; units across range and matrix
    __device__ __forceinline__ EveryUnit(const Matrix& w, const Range& range, uint32_t index_, uint32_t step_)
        : index(index_),
          step(step_),
          n(range.rows / 16 * units_across(range.cols)),
          first(range.row / 16 * units_across(w.cols) + range.col / kUnitCols),
          across(units_across(range.cols)),
          units(units_across(w.cols)) {}
    __device__ __forceinline__ uint32_t operator()() {
        const uint32_t now = index;
        index += step;
        return now < n ? first + now / across * units + now % across : ~0u;
    }
};

/// Where a unit lies.
struct Place {
    uint32_t strip, col, blocks;
    bool ends_tile;
    __device__ __forceinline__ Place(const Matrix& w, uint32_t unit) {
        const uint32_t units = units_across(w.cols);
        strip = unit / units, col = unit % units * kUnitCols, blocks = min((uint32_t)kUnitCols, w.cols - col) / 16;
        ends_tile = (strip % 8 == 7 || strip == w.rows / 16 - 1) && (col % kTileCols + 16 * blocks == kTileCols || col + 16 * blocks == w.cols);
    }
    /// Blocks of it that belong to a range.
    __device__ __forceinline__ uint32_t blocks_in(const Range& range) const { return min(blocks, (range.col + range.cols - col) / 16); }
};

template <class AnyTable, int kWarps>
__device__ __forceinline__ void decode_body(const DecodeArgs& args) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Matrix& w = args.matrix;
    uint8_t* at_table = shared + kWarps * kDecodeWarpBytes;
    AnyTable::copy(w, at_table, threadIdx.x, 32 * kWarps);
    const AnyTable table(w, shared_address(at_table), 0, lane);
    const uint32_t buffer = shared_address(shared) + warp * kDecodeWarpBytes, stage = buffer + 2 * kDecodeRows * kRowBytes;
    // Consecutive units to different blocks, so that all have the same to do.
    const EveryUnit next(w, args.range, warp * gridDim.x + blockIdx.x, gridDim.x * kWarps);
    Feeder<kDecodeRows, 2, EveryUnit> feeder(w, next, buffer, lane);
    __syncthreads();
    // Row and 16-byte part of the stage that this lane stores a quarter of a
    // block to, and that it reads; parts are swapped about to spare the banks.
    [[maybe_unused]] const uint32_t in_row = lane % 16, in_part = lane / 16;
    const uint32_t out_row = lane / 8, out_part = lane % 8;
    for (Unit unit = take(feeder); unit.index != ~0u; unit = take(feeder)) {
        const Place place(w, unit.index);
        const uint32_t blocks = place.blocks_in(args.range);
        const bool ends_tile = place.ends_tile && blocks == place.blocks;
        const uint4* raw = w.raw + (size_t)unit.index * 8 * 32 + lane;
        uint16_t* out = args.out + (size_t)(place.strip * 16 - args.range.row + out_row) * args.stride + place.col - args.range.col + out_part * 8;
        auto put = [&](uint32_t b, const uint32_t (&entries)[8], uint2 raw) {
            uint32_t a[4];
            join_block(table, entries, raw, a);
#if __CUDA_ARCH__ >= 900
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                             stage + in_row * 128 + ((2 * (b % 4) + in_part) ^ (in_row & 7)) * 16),
                         "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
                         : "memory");
#else
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t row = lane / 4 + i % 2 * 8;
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(stage + row * 128 + ((2 * (b % 4) + i / 2) ^ (row & 7)) * 16 + lane % 4 * 4), "r"(a[i]) : "memory");
            }
#endif
        };
        auto flush = [&](uint32_t at) {
            __syncwarp();
            const bool inside = at + out_part * 8 < blocks * 16;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t row = out_row + 4 * i;
                uint4 v;
                asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(stage + row * 128 + (out_part ^ (row & 7)) * 16) : "memory");
                if (inside) __stcs((uint4*)(out + (size_t)(4 * i) * args.stride + at), v);
            }
            __syncwarp();
        };
        uint32_t b = 0;
        if (unit.in_shared) {
            const uint32_t fast = (blocks - ends_tile) & ~3u;
#pragma unroll 1
            for (; b < fast; b += 2) {
                uint4 bits = {};
                if (AnyTable::kPlanes == 1) bits = load_once(raw + b * 16);
                uint2 raw0 = make_uint2(bits.x, bits.y), raw1 = make_uint2(bits.z, bits.w);
                uint32_t entries[8];
                block(table, unit.lane, entries, raw0);
                put(b, entries, raw0);
                block(table, unit.lane, entries, raw1);
                put(b + 1, entries, raw1);
                if (b % 4 == 2) flush((b - 2) * 16);
            }
        }
#pragma unroll 1
        for (; b < blocks; b++) {
            uint2 bits = {};
            if (AnyTable::kPlanes == 1) bits = ((const uint2*)(raw + b / 2 * 32))[b % 2];
            uint32_t entries[8];
            slow_block(table, w.words, unit, b, lane, ends_tile && b + 1 == blocks, entries, bits);
            put(b, entries, bits);
            if (b % 4 == 3 || b + 1 == blocks) flush(b / 4 * 64);
        }
    }
    wait_copies<0>();
}

#endif  // __CUDACC__

}  // namespace rans
}  // namespace transom
