// Launch parameters, one struct a kernel, passed by value. Mirrored in Rust;
// sizes and offsets are checked on both sides.
#pragma once

#include <cstddef>
#include <cstdint>

namespace transom {

/// How the weights of a fixed-rate or dense product lie in memory.
enum WeightFormat : int {
    kDenseBf16 = 0,
    kDenseF16 = 1,
    kDenseInt8 = 2,
    kFixedBf16x3 = 3,  // 3-bit codes of the exponent, 8 raw bits
    kFixedBf16x4 = 4,
    kFixedF16x3 = 5,   // 3-bit codes of the exponent, 11 raw bits
    kFixedInt8x4 = 6,  // codes of 4 to 7 bits
    kFixedInt8x5 = 7,
    kFixedInt8x6 = 8,
    kFixedInt8x7 = 9,
};

/// Rows of a weight matrix with their own tables and scales.
struct Segment {
    const uint8_t* chunks;     // [row tile][across] of `chunk_bytes`, 16-byte aligned
    const uint32_t* overflow;  // escapes that did not fit their chunks
    const uint8_t* symbols;    // [32] what the escapes within chunks index
    const float* scales;       // [rows] or [1]; INT8 only
    uint32_t end_tile;         // end of the segment, in tiles of 16 rows from the first row of the first segment
    uint32_t scale_step;       // 1: a scale a row, 0: one for the segment
};

/// y[tokens, rows] = x[tokens, cols] * W[rows, cols]^T + bias.
struct ProductParams {
    Segment segments[3];
    // Activations, [ceil(tokens / 8)][4 * ceil(cols / 128)] units of 8 tokens x 32 columns, 512 bytes each.
    // Up to 32 tokens: B fragments of mma.m16n8k16 of two k16 steps, [lane 32] of 16 bytes; lane l holds token
    // l / 4 and columns 2 (l mod 4) + {0, 1, 8, 9, 16, 17, 24, 25}.
    // More tokens: core matrices, [8 columns 4][token 8] of 16 bytes.
    // Columns from `cols` on are zero; tokens from `tokens` on may hold anything.
    const void* x;
    uint16_t* y;           // [tokens][rows], BF16 or F16
    const uint16_t* bias;  // [rows] or null
    float* workspace;      // product_workspace_floats(..); may hold anything
    uint32_t rows, cols, tokens;
    uint32_t n_segments;
    uint32_t chunk_bytes;  // the same for all segments, a multiple of 16
    uint32_t unused;
};

/// Row-major activations x[tokens][cols] into one of the orders above.
struct FragmentParams {
    const uint16_t* x;
    void* out;  // 16-byte units: ceil(tokens / 8) * 4 * ceil(cols / 128) * 32
    uint32_t cols, tokens;
    uint32_t cores;  // 0: B fragments, 1: core matrices
    uint32_t unused;
};

static_assert(sizeof(Segment) == 40 && offsetof(Segment, end_tile) == 32, "mirrored in Rust");
static_assert(sizeof(ProductParams) == 176 && offsetof(ProductParams, x) == 120 && offsetof(ProductParams, rows) == 152, "mirrored in Rust");
static_assert(sizeof(FragmentParams) == 32, "mirrored in Rust");

}  // namespace transom
