// y[M,N] = x[M,K] * W[N,K]^T from entropy-coded weights: decode, dequantise and
// multiply in one launch. A warp walks one slice of K of 16 rows.
#pragma once

#include "rans.cuh"

namespace transom {
namespace rans {

enum Weights : int { kBf16 = 0, kInt8 = 1, kTwinBf16 = 2, kTwinF16 = 3 };

struct ProductArgs {
    Matrix matrix;
    const uint4* twin;     // [strip][cols / 16][lane], A fragments of two bytes an element; the twins only
    const uint4* x;        // [token / 8][cols / 32][lane 32]: B fragments of two blocks
    const float* scales;   // [rows] or [1], INT8 only
    uint16_t* y;           // [tokens][rows], BF16 or F16
    uint32_t tokens, slices, scale_step, unused;
};

/// First column of a slice.
__host__ __device__ inline uint32_t slice_start(uint32_t cols, uint32_t slices, uint32_t slice) {
    return min(cols, (uint32_t)((uint64_t)units_across(cols) * slice / slices) * kUnitCols);
}

#ifdef __CUDACC__

template <bool kF16>
__device__ __forceinline__ void mma(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kF16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

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

/// kTokens: 8, 16, 32 or 64. A block has kWarps / slices strips at a time.
template <Weights kWeights, int kWarps, int kBlocks, int kTokens>
__global__ void __launch_bounds__(32 * kWarps, kBlocks) product_kernel(const __grid_constant__ ProductArgs args) {
    constexpr bool kTwin = kWeights == kTwinBf16 || kWeights == kTwinF16, kF16 = kWeights == kInt8 || kWeights == kTwinF16;
    constexpr int kGroups = kTokens / 8;
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Matrix& w = args.matrix;
    float* partial = (float*)shared;  // [2][kWarps][kGroups][128]
    uint8_t* rings = shared + 2 * kWarps * kGroups * 512;
    uint32_t* table = (uint32_t*)(rings + (kTwin ? 0 : kWarps * kRingBytes));
    const uint32_t slice = warp % args.slices, sub = warp / args.slices, subs = kWarps / args.slices;
    const uint32_t first = slice_start(w.cols, args.slices, slice), end = slice_start(w.cols, args.slices, slice + 1);
    const uint32_t n_strips = w.rows / 16, units = units_across(w.cols), stride = gridDim.x * subs;
    const uint32_t ring = shared_address(rings) + warp * kRingBytes;
    uint32_t strip = blockIdx.x * subs + sub, x_next = 0, position = 0;
    const bool active = sub < subs && first < end;
    auto fetch = [&](uint32_t s, uint32_t col) {
        const size_t unit = (size_t)s * units + col / kUnitCols;
        x_next = w.states[unit * 32 + lane];
        position = w.positions[unit];
    };
    Words words;
    if (!kTwin) {
        if (active && strip < n_strips) {
            fetch(strip, first);
            words.begin(w.words, position, ring, lane);
        }
        for (uint32_t i = threadIdx.x; i < (1u << w.prob_bits) / 4; i += 32 * kWarps) ((uint4*)table)[i] = ((const uint4*)w.table)[i];
        __syncthreads();
    }
    const Params params = make_params(shared_address(table), kTwin ? 12 : w.prob_bits, lane, kWeights == kInt8 ? 0x80 : 0);
    const uint32_t align = kTwin ? 0 : 1u << (15 - w.prob_bits);
    const Dequantise dequantise = {0xFFu << w.prob_bits, (float)(1u << (23 - w.prob_bits)), -(float)((1u << (23 - w.prob_bits)) + 128)};
    const size_t group_stride = (w.cols + 31) / 32 * 32;
    const uint32_t rounds = (n_strips + stride - 1 - blockIdx.x * subs) / stride;
    for (uint32_t round = 0; round < rounds; round++, strip += stride) {
        float acc[kGroups][4] = {};
        const bool here = active && strip < n_strips;
        if (here) {
            const bool is_last = strip % 8 == 7 || strip == n_strips - 1;
            const uint4* raw = w.raw + ((size_t)strip * units * 8 + first / 32) * 32 + lane;
            const uint4* b = args.x + (size_t)(first / 32) * 32 + lane;
            const uint4* twin = args.twin + ((size_t)strip * (w.cols / 16) + first / 16) * 32 + lane;
            float scale0 = 0, scale1 = 0;
            if (kWeights == kInt8) {
                scale0 = args.scales[(strip * 16 + lane / 4) * args.scale_step];
                scale1 = args.scales[(strip * 16 + lane / 4 + 8) * args.scale_step];
            }
            uint4 bits = kWeights == kBf16 ? load_once(raw) : make_uint4(0, 0, 0, 0);
            uint32_t col = first;
#pragma unroll 1
            while (col < end) {
                // To the end of the tile, whose words are one stream.
                const uint32_t stop = min(end, (col / kTileCols + 1) * kTileCols), tile_stop = min(w.cols, (col / kTileCols + 1) * kTileCols);
                uint32_t x = x_next;
                if (!kTwin) {
                    words.arrive();
                    if (stop < end) fetch(strip, stop);
                    else if (strip + stride < n_strips) fetch(strip + stride, first);
                }
#pragma unroll 1
                for (; col < stop; col += 32) {
                    uint4 v[kGroups];
#pragma unroll
                    for (int g = 0; g < kGroups; g++) {
                        v[g] = g * 8 + lane / 4 < args.tokens ? __ldg(b + g * group_stride) : make_uint4(0, 0, 0, 0);
                    }
                    b += 32;
                    const uint4 now = bits;
                    if (kWeights == kBf16 && col + 32 < end) bits = load_once(raw += 32);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        if (i == 1 && col + 16 >= stop) break;
                        uint32_t a[4];
                        if (kTwin) {
                            const uint4 t = load_once(twin);
                            twin += 32;
                            a[0] = t.x, a[1] = t.y, a[2] = t.z, a[3] = t.w;
                        } else {
                            uint32_t entries[8];
                            block(params, x, words, lane, is_last && col + 16 * i + 16 == tile_stop, entries);
                            if (kWeights == kBf16) {
                                join_block(entries, i ? now.z : now.x, i ? now.w : now.y, align, a);
                            } else {
#pragma unroll
                                for (int j = 0; j < 4; j++) a[j] = dequantise.pair(entries[2 * j], entries[2 * j + 1], j & 1 ? scale1 : scale0);
                            }
                        }
#pragma unroll
                        for (int g = 0; g < kGroups; g++) mma<kF16>(acc[g], a, i ? v[g].z : v[g].x, i ? v[g].w : v[g].y);
                    }
                }
                if (!kTwin && (stop < end || strip + stride < n_strips)) {
                    wait_copies<0>();
                    words.begin(w.words, position, ring, lane);
                }
                col = stop;
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
            uint16_t out;
            if (kF16) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(sum));
            else asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(sum));
            args.y[(size_t)token * w.rows + row_strip * 16 + l / 4 + (r >> 1) * 8] = out;
        }
    }
    if (!kTwin) wait_copies<0>();
}

#endif  // __CUDACC__

}  // namespace rans
}  // namespace transom
