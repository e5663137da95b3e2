// y[M,N] = x[M,K] * W[N,K]^T from entropy-coded weights: decode, dequantise and
// multiply in one launch. A warp walks one slice of K of 16 rows.
#pragma once

#include "float16.cuh"
#include "mma.cuh"
#include "rans.cuh"
#include "reduction.cuh"

namespace transom {
namespace rans {

enum Weights : int { kBf16 = 0, kInt8 = 1, kTwinBf16 = 2, kTwinF16 = 3, kF16 = 4 };

/// Whether activations and results are FP16.
__host__ __device__ constexpr bool uses_f16(Weights weights) { return weights != kBf16 && weights != kTwinBf16; }

struct ProductArgs {
    Matrix matrix;
    const uint4* twin;     // [strip][cols / 16][lane], A fragments of two bytes an element; the twins only
    const uint4* x;        // as ProductParams.x in params.h
    const float* scales;   // [rows] or [1], INT8 only
    const uint16_t* bias;  // [rows], or null
    uint16_t* y;           // [tokens][stride], BF16 or F16
    uint32_t tokens, slices;  // slices: of reduction.cuh
    uint32_t scale_step;   // 1: a scale a row, 0: one
    uint32_t stride;
};

#ifdef __CUDACC__

/// Two INT8 weights as FP16. The table has the symbols with their top bit
/// flipped, so symbol + 128 lies in a mantissa of a float in 1 .. 2.
struct Dequantise {
    uint32_t mask;         // 0xFF << p
    float factor, offset;  // 2^(23 - p), -(2^(23 - p) + 128)
    __device__ __forceinline__ uint32_t pair(uint32_t low, uint32_t high, float scale) const {
        float q0 = __fmaf_rn(__uint_as_float((low & mask) | 0x3F800000u), factor, offset);
        float q1 = __fmaf_rn(__uint_as_float((high & mask) | 0x3F800000u), factor, offset);
        uint32_t out;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(__fmul_rn(q1, scale)), "f"(__fmul_rn(q0, scale)));
        return out;
    }
};

/// The units of a warp's slice, strip after strip.
struct SliceUnits {
    uint32_t unit, column, strip;          // of the next
    uint32_t per_slice, n_strips, stride;  // strips from one to the next
    uint32_t next_strip;                   // units from the end of a slice to its begin in the next strip
    __device__ __forceinline__ uint32_t operator()() {
        if (strip >= n_strips) return ~0u;
        const uint32_t now = unit++;
        if (++column == per_slice) column = 0, strip += stride, unit += next_strip;
        return now;
    }
};

/// Rows of words that a warp has room for.
template <Weights kWeights>
constexpr int kProductRows = kWeights == kInt8 ? 60 : 32;

__host__ __device__ constexpr bool is_twin(Weights weights) { return weights == kTwinBf16 || weights == kTwinF16; }

/// Bytes of shared memory of a block.
template <Weights kWeights, class AnyTable, int kWarps, int kBuffers, int kTokens>
__host__ __device__ inline int product_shared(const Matrix& w) {
    const int partial = 2 * kWarps * kTokens * 64;
    return is_twin(kWeights) ? partial : partial + kWarps * kBuffers * kProductRows<kWeights> * (int)kRowBytes + (int)AnyTable::shared_bytes(w);
}

/// kTokens: 8, 16, 32 or 64. A block has kWarps / slices strips at a time.
/// kBuffers: see Feeder.
template <Weights kWeights, class AnyTable, int kWarps, int kBuffers, int kTokens>
__device__ __forceinline__ void product_body(const ProductArgs& args) {
    constexpr bool kTwin = is_twin(kWeights), kHalf = uses_f16(kWeights), kHasRaw = kWeights != kInt8 && AnyTable::kPlanes == 1;
    constexpr int kGroups = kTokens / 8, kRows = kProductRows<kWeights>, kBuffer = kRows * kRowBytes;
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Matrix& w = args.matrix;
    float* partial = (float*)shared;  // [2][kWarps][kGroups][128]
    uint8_t* buffers = shared + 2 * kWarps * kGroups * 512;
    uint8_t* at_table = buffers + kWarps * kBuffers * kBuffer;
    const uint32_t slice = warp % args.slices, sub = warp / args.slices, subs = kWarps / args.slices;
    const uint32_t first = slice_begin(w.rows, w.cols, slice), end = min(w.cols, slice_begin(w.rows, w.cols, slice + 1));
    const uint32_t n_strips = w.rows / 16, units = units_across(w.cols), stride = gridDim.x * subs;
    const bool active = sub < subs && first < end;
    uint32_t strip = active ? blockIdx.x * subs + sub : n_strips;
    const uint32_t per_slice = (end - first + kUnitCols - 1) / kUnitCols;
    const SliceUnits next = {strip * units + first / kUnitCols, 0, kTwin ? n_strips : strip, per_slice, n_strips, stride, stride * units - per_slice};
    if (!kTwin) AnyTable::copy(w, at_table, threadIdx.x, 32 * kWarps);
    const AnyTable table(w, shared_address(at_table), kWeights == kInt8 ? 0x80 : 0, lane);
    Feeder<kRows, kBuffers, SliceUnits> feeder(w, next, shared_address(buffers) + warp * kBuffers * kBuffer, lane);
    if (!kTwin) __syncthreads();
    const Dequantise dequantise = {0xFFu << w.prob_bits, (float)(1u << (23 - w.prob_bits)), -(float)((1u << (23 - w.prob_bits)) + 128)};
    const size_t group_stride = (w.cols + 127) / 128 * 128;  // 4 rows of 32 lanes for 128 columns
    const uint32_t rounds = (n_strips - blockIdx.x * subs + stride - 1) / stride;
    for (uint32_t round = 0; round < rounds; round++, strip += stride) {
        if (strip < n_strips) {
            float acc[kGroups][4] = {};
            const bool is_last = strip % 8 == 7 || strip == n_strips - 1;
            const uint4* raw = w.raw + ((size_t)strip * units * 8 + first / 32) * 32 + lane;
            const uint4* b = args.x + (size_t)(first / 32) * 32 + lane;
            const uint4* twin = args.twin + ((size_t)strip * (w.cols / 16) + first / 16) * 32 + lane;
            float scale0 = 0, scale1 = 0;
            if (kWeights == kInt8) {
                scale0 = args.scales[(strip * 16 + lane / 4) * args.scale_step];
                scale1 = args.scales[(strip * 16 + lane / 4 + 8) * args.scale_step];
            }
#pragma unroll 1
            for (uint32_t col = first; col < end; col += kUnitCols) {
                const uint32_t blocks = min(end - col, (uint32_t)kUnitCols) / 16;
                const bool ends_tile = is_last && (col % kTileCols + 16 * blocks == kTileCols || col + 16 * blocks == w.cols);
                // Block number `at` from its A fragment.
                auto multiply = [&](const uint32_t (&a)[4], const uint2 (&v)[kGroups]) {
#pragma unroll
                    for (int g = 0; g < kGroups; g++) mma<kHalf>(acc[g], a, v[g].x, v[g].y);
                };
                auto activations = [&](uint32_t at, uint4 (&v)[kGroups]) {
#pragma unroll
                    for (int g = 0; g < kGroups; g++) v[g] = g * 8 + lane / 4 < args.tokens ? __ldg(b + at * 16 + g * group_stride) : make_uint4(0, 0, 0, 0);
                };
                auto weights = [&](const uint32_t (&entries)[8], uint2 raw, uint32_t (&a)[4]) {
                    if (kWeights != kInt8) {
                        join_block(table, entries, raw, a);
                    } else {
#pragma unroll
                        for (int j = 0; j < 4; j++) a[j] = dequantise.pair(entries[2 * j], entries[2 * j + 1], j & 1 ? scale1 : scale0);
                    }
                };
                uint32_t at = 0;
                uint4 v[kGroups];
                uint2 half[kGroups];
                uint32_t a[4];
                if (kTwin) {
#pragma unroll 2
                    for (; at < blocks; at++) {
                        if (at % 2 == 0) activations(at, v);
#pragma unroll
                        for (int g = 0; g < kGroups; g++) half[g] = at % 2 ? make_uint2(v[g].z, v[g].w) : make_uint2(v[g].x, v[g].y);
                        const uint4 t = load_once(twin + at * 32);
                        a[0] = t.x, a[1] = t.y, a[2] = t.z, a[3] = t.w;
                        multiply(a, half);
                    }
                    b += blocks * 16, twin += blocks * 32;
                    continue;
                }
                Unit unit = take(feeder);
                uint32_t entries[8];
                if (unit.in_shared) {
                    const uint32_t fast = (blocks - ends_tile) & ~1u;
#pragma unroll 1
                    for (; at < fast; at += 2) {
                        uint4 bits = {};
                        if (kHasRaw) bits = load_once(raw + at * 16);
                        uint2 raw0 = make_uint2(bits.x, bits.y), raw1 = make_uint2(bits.z, bits.w);
                        activations(at, v);
                        block(table, unit.lane, entries, raw0);
                        weights(entries, raw0, a);
#pragma unroll
                        for (int g = 0; g < kGroups; g++) half[g] = make_uint2(v[g].x, v[g].y);
                        multiply(a, half);
                        block(table, unit.lane, entries, raw1);
                        weights(entries, raw1, a);
#pragma unroll
                        for (int g = 0; g < kGroups; g++) half[g] = make_uint2(v[g].z, v[g].w);
                        multiply(a, half);
                    }
                }
#pragma unroll 1
                for (; at < blocks; at++) {
                    uint2 bits = {};
                    if (kHasRaw) bits = ((const uint2*)(raw + at / 2 * 32))[at % 2];
#pragma unroll
                    for (int g = 0; g < kGroups; g++)
                        half[g] = g * 8 + lane / 4 < args.tokens ? ((const uint2*)(b + at / 2 * 32 + g * group_stride))[at % 2] : make_uint2(0, 0);
                    slow_block(table, w.words, unit, at, lane, ends_tile && at + 1 == blocks, entries, bits);
                    weights(entries, bits, a);
                    multiply(a, half);
                }
                b += blocks * 16, raw += blocks * 16;
            }
            float* to = partial + ((round & 1) * kWarps + warp) * kGroups * 128;
#pragma unroll
            for (int g = 0; g < kGroups; g++) ((float4*)to)[g * 32 + lane] = make_float4(acc[g][0], acc[g][1], acc[g][2], acc[g][3]);
        }
        __syncthreads();
        // Slices in ascending order. Element i of group g: lane i / 4, register i % 4.
        for (uint32_t i = threadIdx.x; i < subs * kGroups * 128; i += 32 * kWarps) {
            const uint32_t s = i / (kGroups * 128), e = i % (kGroups * 128), l = e / 4 % 32, r = e % 4;
            const uint32_t row_strip = blockIdx.x * subs + s + round * stride, token = e / 128 * 8 + l % 4 * 2 + (r & 1);
            if (row_strip >= n_strips || token >= args.tokens) continue;
            const float* from = partial + ((round & 1) * kWarps + s * args.slices) * kGroups * 128 + e;
            float sum = from[0];
            for (uint32_t j = 1; j < args.slices; j++) sum += from[j * kGroups * 128];
            const uint32_t row = row_strip * 16 + l / 4 + (r >> 1) * 8;
            if (args.bias) sum += from_16<kHalf>(args.bias[row]);
            args.y[(size_t)token * args.stride + row] = to_16<kHalf>(sum);
        }
    }
    if (!kTwin) wait_copies<0>();
}

#endif  // __CUDACC__

}  // namespace rans
}  // namespace transom
