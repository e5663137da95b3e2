// Matrix in device memory -> row-major elements, the parts that need no speed:
// elements of one byte, and single rows (embeddings).
#pragma once

#include "rans_decode.cuh"

namespace transom {
namespace rans {

struct BytesArgs {
    Matrix matrix;
    uint8_t* out;     // the range alone
    Range range;
    uint32_t flip;    // what the table's symbols are flipped by
    uint32_t unused;
};

struct GatherArgs {
    Matrix matrix;
    const uint32_t* ids;  // [n_ids], rows of the matrix
    void* out;            // [n_ids][cols]; a row whose id is not below `rows` is left alone
    uint32_t n_ids;
    uint32_t flip;        // what the table's symbols are flipped by
};

#ifdef __CUDACC__

constexpr int kRowsWarps = 8;
constexpr int kRowsWarpBytes = 2 * kDecodeRows * kRowBytes;

template <class AnyTable>
__device__ __forceinline__ void any_block(const AnyTable& t, const Matrix& w, Unit& unit, uint32_t at, int lane, bool is_tail, uint32_t (&entries)[8], uint2& raw) {
    if (unit.in_shared && !is_tail) block(t, unit.lane, entries, raw);
    else slow_block(t, w.words, unit, at, lane, is_tail, entries, raw);
}

/// The bytes of elements j and j + 1 of a lane.
template <class AnyTable>
__device__ __forceinline__ uint16_t two_bytes(const AnyTable& t, const uint32_t (&e)[8], int j) {
    const uint32_t low = (e[j] >> t.p & 0xFF) ^ t.flip, high = (e[j + 1] >> t.p & 0xFF) ^ t.flip;
    return (uint16_t)(low | high << 8);
}

template <class AnyTable>
__device__ __forceinline__ void bytes_body(const BytesArgs& args) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Matrix& w = args.matrix;
    uint8_t* at_table = shared + kRowsWarps * kRowsWarpBytes;
    AnyTable::copy(w, at_table, threadIdx.x, 32 * kRowsWarps);
    const AnyTable table(w, shared_address(at_table), args.flip, lane);
    const EveryUnit next(w, args.range, warp * gridDim.x + blockIdx.x, gridDim.x * kRowsWarps);
    Feeder<kDecodeRows, 2, EveryUnit> feeder(w, next, shared_address(shared) + warp * kRowsWarpBytes, lane);
    __syncthreads();
    for (Unit unit = take(feeder); unit.index != ~0u; unit = take(feeder)) {
        const Place place(w, unit.index);
        const uint32_t blocks = place.blocks_in(args.range);
        uint8_t* out = args.out + (size_t)(place.strip * 16 - args.range.row + lane / 4) * args.range.cols + place.col - args.range.col + lane % 4 * 2;
#pragma unroll 1
        for (uint32_t b = 0; b < blocks; b++) {
            uint32_t e[8];
            uint2 none = {};
            any_block(table, w, unit, b, lane, place.ends_tile && b + 1 == place.blocks, e, none);
#pragma unroll
            for (int j = 0; j < 8; j += 2) *(uint16_t*)(out + (size_t)((j >> 1 & 1) * 8) * args.range.cols + 16 * b + (j >> 2) * 8) = two_bytes(table, e, j);
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

/// kElementBytes: 1 or 2.
template <class AnyTable, int kElementBytes>
__device__ __forceinline__ void gather_body(const GatherArgs& args) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Matrix& w = args.matrix;
    uint8_t* at_table = shared + kRowsWarps * kRowsWarpBytes;
    AnyTable::copy(w, at_table, threadIdx.x, 32 * kRowsWarps);
    const AnyTable table(w, shared_address(at_table), args.flip, lane);
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
            uint32_t e[8];
            uint2 bits = {};
            if (kElementBytes == 2 && AnyTable::kPlanes == 1) bits = ((const uint2*)(raw + b / 2 * 32))[b % 2];
            any_block(table, w, unit, b, lane, place.ends_tile && b + 1 == place.blocks, e, bits);
            const bool mine = lane / 4 == (int)(row % 8);
            uint8_t* to = (uint8_t*)args.out + ((size_t)index * w.cols + place.col + 16 * b + lane % 4 * 2) * kElementBytes;
            if (kElementBytes == 1) {
                const uint16_t left = row < 8 ? two_bytes(table, e, 0) : two_bytes(table, e, 2), right = row < 8 ? two_bytes(table, e, 4) : two_bytes(table, e, 6);
                if (mine) ((uint16_t*)to)[0] = left, ((uint16_t*)to)[4] = right;
            } else {
                uint32_t a[4];
                join_block(table, e, bits, a);
                if (mine) ((uint32_t*)to)[0] = row < 8 ? a[0] : a[1], ((uint32_t*)to)[4] = row < 8 ? a[2] : a[3];
            }
        }
    }
    wait_copies<0>();
}

#endif  // __CUDACC__

}  // namespace rans
}  // namespace transom
