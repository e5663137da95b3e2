// Matrix in device memory -> row-major elements, the parts that need no speed:
// elements of one byte, and single rows (embeddings).
#pragma once

#include "rans_decode.cuh"

namespace transom {
namespace rans {

struct BytesArgs {
    Matrix matrix;
    uint8_t* out;     // [rows][cols]
    uint32_t flip;    // what the table's symbols are flipped by
    uint32_t unused;
};

struct GatherArgs {
    Matrix matrix;
    const uint32_t* ids;  // [n_ids], rows of the matrix
    uint16_t* out;        // [n_ids][cols], BF16; a row whose id is not below `rows` is left alone
    uint32_t n_ids;
    uint32_t unused;
};

#ifdef __CUDACC__

constexpr int kRowsWarps = 8;
constexpr int kRowsWarpBytes = 2 * kDecodeRows * kRowBytes;

template <class AnyTable>
__device__ __forceinline__ void any_block(const AnyTable& t, const Matrix& w, Unit& unit, uint32_t at, int lane, bool is_tail, uint32_t (&entries)[8]) {
    if (is_tail && unit.in_shared) unit.leave_shared();
    if (unit.in_shared) block(t, unit.lane, entries);
    else slow_block(t, w.words, unit, at, lane, is_tail, entries);
}

/// Where a unit lies.
struct Place {
    uint32_t strip, col, blocks;
    bool ends_tile;
    __device__ __forceinline__ Place(const Matrix& w, uint32_t unit) {
        const uint32_t units = units_across(w.cols);
        strip = unit / units, col = unit % units * kUnitCols, blocks = min((uint32_t)kUnitCols, w.cols - col) / 16;
        ends_tile = (strip % 8 == 7 || strip == w.rows / 16 - 1) && (col % kTileCols + 16 * blocks == kTileCols || col + 16 * blocks == w.cols);
    }
};

template <class AnyTable>
__device__ __forceinline__ void bytes_body(const BytesArgs& args) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Matrix& w = args.matrix;
    uint8_t* at_table = shared + kRowsWarps * kRowsWarpBytes;
    AnyTable::copy(w, at_table, threadIdx.x, 32 * kRowsWarps);
    const AnyTable table(w, shared_address(at_table), args.flip, lane);
    const EveryUnit next = {warp * gridDim.x + blockIdx.x, gridDim.x * kRowsWarps, w.rows / 16 * units_across(w.cols)};
    Feeder<kDecodeRows, 2, EveryUnit> feeder(w, next, shared_address(shared) + warp * kRowsWarpBytes, lane);
    __syncthreads();
    for (Unit unit = take(feeder); unit.index != ~0u; unit = take(feeder)) {
        const Place place(w, unit.index);
#pragma unroll 1
        for (uint32_t b = 0; b < place.blocks; b++) {
            uint32_t e[8];
            any_block(table, w, unit, b, lane, place.ends_tile && b + 1 == place.blocks, e);
            uint8_t* to = args.out + (size_t)(place.strip * 16 + lane / 4) * w.cols + place.col + 16 * b + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                const uint32_t low = (e[j] >> table.p & 0xFF) ^ args.flip, high = (e[j + 1] >> table.p & 0xFF) ^ args.flip;
                *(uint16_t*)(to + (size_t)((j >> 1 & 1) * 8) * w.cols + (j >> 2) * 8) = (uint16_t)(low | high << 8);
            }
        }
    }
    wait_copies<0>();
}

/// The units of the rows asked for.
struct RowUnits {
    const uint32_t* ids;
    uint32_t task, step, n, units, rows;
    __device__ __forceinline__ uint32_t operator()() {
        for (; task < n; task += step) {
            const uint32_t id = ids[task / units];
            if (id >= rows) continue;
            const uint32_t unit = id / 16 * units + task % units;
            task += step;
            return unit;
        }
        return ~0u;
    }
};

template <class AnyTable>
__device__ __forceinline__ void gather_body(const GatherArgs& args) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Matrix& w = args.matrix;
    uint8_t* at_table = shared + kRowsWarps * kRowsWarpBytes;
    AnyTable::copy(w, at_table, threadIdx.x, 32 * kRowsWarps);
    const AnyTable table(w, shared_address(at_table), 0, lane);
    const uint32_t units = units_across(w.cols), n = args.n_ids * units, step = gridDim.x * kRowsWarps;
    const RowUnits next = {args.ids, warp * gridDim.x + blockIdx.x, step, n, units, w.rows};
    RowUnits tasks = next;
    Feeder<kDecodeRows, 2, RowUnits> feeder(w, next, shared_address(shared) + warp * kRowsWarpBytes, lane);
    __syncthreads();
    for (Unit unit = take(feeder); unit.index != ~0u; unit = take(feeder)) {
        tasks();  // the same unit; its task is the one before tasks.task
        const uint32_t index = (tasks.task - step) / units, row = args.ids[index] % 16;
        const Place place(w, unit.index);
        const uint4* raw = w.raw + (size_t)unit.index * 8 * 32 + lane;
#pragma unroll 1
        for (uint32_t b = 0; b < place.blocks; b++) {
            uint32_t e[8], a[4];
            any_block(table, w, unit, b, lane, place.ends_tile && b + 1 == place.blocks, e);
            const uint2 bits = ((const uint2*)(raw + b / 2 * 32))[b % 2];
            join_block(e, bits.x, bits.y, table.align, a);
            if (lane / 4 == (int)(row % 8)) {
                uint32_t* to = (uint32_t*)(args.out + (size_t)index * w.cols + place.col + 16 * b) + lane % 4;
                to[0] = row < 8 ? a[0] : a[1];
                to[4] = row < 8 ? a[2] : a[3];
            }
        }
    }
    wait_copies<0>();
}

#endif  // __CUDACC__

}  // namespace rans
}  // namespace transom
