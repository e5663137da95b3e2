// The order in which every product kernel adds (host and device).
//
//   y[m, n] = ((s_0 + s_1) + s_2) + ... + s_{S-1}   (+ bias), in FP32
//
// s_i is what a chain of mma.m16n8k16 instructions with FP32 accumulators,
// started at zero, gives for the k16 steps of slice i in ascending order.
// S and the borders are functions of the true number of columns only (rows are
// a parameter so that a later revision may use them), so that neither layout,
// batch, nor tuning can change a bit.
//
// Sixteen slices: a tile of 16 rows then has work for 16 warps, which fills 132
// SMs from 1024 rows on; a border is a multiple of 256 columns, the distance of
// the entry points of entropy-coded weights. Weights beyond the last column are
// zero and activations read as zero, so that padding changes nothing.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TRANSOM_BOTH __host__ __device__
#else
#define TRANSOM_BOTH
#endif

namespace transom {

constexpr uint32_t kMaxSlices = 16;
/// Slice borders are multiples of this many columns.
constexpr uint32_t kSliceUnit = 256;

/// Number of slices of K, 1 to 16.
TRANSOM_BOTH constexpr uint32_t slices(uint32_t /*rows*/, uint32_t cols) {
    const uint32_t units = (cols + kSliceUnit - 1) / kSliceUnit;
    return units < 1 ? 1 : units < kMaxSlices ? units : kMaxSlices;
}

/// First column of slice `i`; for `i == slices(rows, cols)` the end, a multiple
/// of 256 at or above `cols`. Every slice has at least one column.
TRANSOM_BOTH constexpr uint32_t slice_begin(uint32_t /*rows*/, uint32_t cols, uint32_t i) {
    const uint32_t units = (cols + kSliceUnit - 1) / kSliceUnit;
    // floor(i * units / slices), without a division.
    return (units <= kMaxSlices ? i : i * units / kMaxSlices) * kSliceUnit;
}

/// Sums of a tile to be added when `apart` groups of warps or blocks share its
/// slices: the first group keeps its own total.
TRANSOM_BOTH constexpr uint32_t sum_slots(uint32_t n_slices, uint32_t apart) {
    const uint32_t own = n_slices / apart;
    return n_slices - own + (own > 0 ? 1 : 0);
}

}  // namespace transom
