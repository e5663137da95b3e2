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

/// Scale of an INT8 row: `scale` times `factor`, a power of two. Weights are FP16 of q * scale. For the codes of a
/// fixed-rate format that is also q * 2^-24 * high + q * 2^-24 * low with one rounding of each sum, where `high` and `low`
/// are the FP16 halves of `multipliers`.
struct RowScale {
    float scale, factor;
    uint32_t multipliers;
};

/// Rows of a weight matrix with their own tables and scales.
struct Segment {
    const uint32_t* overflow;  // escapes that did not fit their chunks
    const uint8_t* symbols;    // [32] what the escapes within chunks index
    const RowScale* scales;    // [rows] or [1]; INT8 only
    uint32_t end_tile;         // end of the segment, in tiles of 16 rows from the first row of the first segment
    uint32_t scale_step;       // 1: a scale a row, 0: one for the segment
};

/// y[tokens, rows] = x[tokens, cols] * W[rows, cols]^T + bias.
struct ProductParams {
    Segment segments[3];
    const uint8_t* chunks;  // of all segments, [row tile][across] of `chunk_bytes`, 16-byte aligned
    // Activations. Up to 16 tokens: rows of `x_stride` elements, [tokens][x_stride], 16-byte aligned.
    // More tokens: core matrices, [ceil(cols / 128)][ceil(tokens / 8)][16 of 8 columns][token 8] of 16 bytes; tokens from
    // `tokens` on may hold anything.
    // Columns from `cols` on are zero.
    const void* x;
    uint16_t* y;           // [tokens][rows], BF16 or F16
    const uint16_t* bias;  // [rows] or null
    float* workspace;      // product_batch: batch_workspace_floats(..), product_prefill: prefill_workspace_floats(..); may hold anything
    uint32_t* meetings;    // product_batch, several parts: two words a group of tiles, zero before and after
    uint32_t rows, cols, tokens;
    uint32_t n_segments, n_tiles;  // n_tiles: of 16 rows, of all segments
    uint32_t chunk_bytes;  // the same for all segments, a multiple of 16
    uint32_t x_stride;     // up to 16 tokens: a multiple of 8
    uint32_t strips;       // product_batch: tiles of a block, at most its warps
    uint32_t parts;        // product_batch: blocks that share the slices of K, 1 to as many as slices
    uint32_t slots;        // product_batch: sum_slots(slices, parts)
    uint32_t part_share;   // 65536 / parts, rounded up
    uint32_t patience;     // how often a block asks for the others before it hands over its share of the sums
};

/// A CUtensorMap of row-major activations: boxes of 64 columns, and of half of the tokens that a block has, swizzled by
/// 128 bytes.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

/// Of a product of more than 64 tokens. Of `product`, x, x_stride and what follows it are not used. Its workspace has
/// prefill_workspace_floats(..), its meetings a word for each warp that multiplies, zero before and after.
struct PrefillParams {
    ProductParams product;
    TensorMap x;
    uint32_t whole;  // pieces that one cluster each multiplies; the chunks of the others are shared by all
    uint32_t unused[15];
};

/// Orders of activations.
enum ActivationOrder : uint32_t {
    // Of the entropy-coded products: [ceil(tokens / 8)][4 * ceil(cols / 128)] units of 8 tokens x 32 columns, each the B
    // fragments of mma.m16n8k16 of two k16 steps, [lane 32] of 16 bytes; lane l holds token l / 4 and columns
    // 2 (l mod 4) + {0, 1, 8, 9, 16, 17, 24, 25}. Zeros where there is nothing.
    kFragments = 0,
    // As ProductParams::x.
    kCoreMatrices = 1,
    kRows = 2,
};

/// Row-major activations x[tokens][cols] into another order.
struct ActivationParams {
    const uint16_t* x;  // 16-byte aligned
    void* out;          // in units of 16 bytes: kRows tokens * ceil(cols / 8), otherwise ceil(tokens / 8) * ceil(cols / 128) * 128
    uint32_t cols, tokens;
    uint32_t order;  // ActivationOrder
};

static_assert(sizeof(Segment) == 32 && offsetof(Segment, end_tile) == 24, "mirrored in Rust");
static_assert(sizeof(ProductParams) == 192 && offsetof(ProductParams, x) == 104 && offsetof(ProductParams, rows) == 144, "mirrored in Rust");
static_assert(sizeof(PrefillParams) == 320 + 64 && offsetof(PrefillParams, x) == 192 && offsetof(PrefillParams, whole) == 320, "mirrored in Rust");
static_assert(sizeof(ActivationParams) == 32, "mirrored in Rust");

}  // namespace transom
