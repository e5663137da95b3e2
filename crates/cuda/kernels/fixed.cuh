// Chunks of 16 rows x 128 columns, fixed-rate or dense, to A fragments of
// mma.m16n8k16. docs/kernels.md draws the layout.
#pragma once

#include "float16.cuh"
#include "params.h"
#include "reduction.cuh"

namespace transom {

constexpr uint32_t kChunkRows = 16, kChunkCols = 128, kChunkElems = 2048;
/// After the last escape's place, so that copies are whole 16 bytes.
constexpr uint32_t kHeaderPad = 8;

TRANSOM_BOTH constexpr bool is_dense(WeightFormat f) { return f <= kDenseInt8; }
TRANSOM_BOTH constexpr bool is_int8(WeightFormat f) { return f == kDenseInt8 || f >= kFixedInt8x4; }
/// Operands and results are FP16, otherwise BF16.
TRANSOM_BOTH constexpr bool is_half(WeightFormat f) { return f == kDenseF16 || f == kFixedF16x3 || is_int8(f); }
TRANSOM_BOTH constexpr uint32_t int8_bits(WeightFormat f) { return 4u + (uint32_t)((int)f - (int)kFixedInt8x4); }

/// Bytes of codes and raw bits, where the header begins.
TRANSOM_BOTH constexpr uint32_t header_offset(WeightFormat f) {
    switch (f) {
        case kDenseBf16:
        case kDenseF16: return 4096;
        case kDenseInt8: return 2048;
        case kFixedBf16x3: return 2048 + 768;
        case kFixedBf16x4: return 2048 + 1024;
        case kFixedF16x3: return 2048 + 768 + 768;
        default: return 256 * int8_bits(f);
    }
}
/// A byte for each row, where its window begins; INT8 has none.
TRANSOM_BOTH constexpr uint32_t window_bytes(WeightFormat f) { return is_int8(f) ? 0 : kChunkRows; }
/// Windows, escapes u16, overflow count u16, overflow start u32.
TRANSOM_BOTH constexpr uint32_t header_bytes(WeightFormat f) { return window_bytes(f) + 8; }
/// Bytes of a chunk with room for `places` escapes, a multiple of 8.
TRANSOM_BOTH constexpr uint32_t chunk_bytes(WeightFormat f, uint32_t places) {
    return header_offset(f) + (is_dense(f) ? 0 : header_bytes(f) + 2 * places + kHeaderPad);
}
/// Bytes of a warp's plane of patches: a byte for each element of a chunk, INT8: a half.
TRANSOM_BOTH constexpr uint32_t plane_bytes(WeightFormat f) { return is_dense(f) ? 0 : kChunkElems * (is_int8(f) ? 2 : 1); }
/// Bytes of the scales of a tile's rows that patches are made with.
TRANSOM_BOTH constexpr uint32_t scale_bytes(WeightFormat f) { return is_int8(f) && !is_dense(f) ? kChunkRows * 4 : 0; }

#ifdef __CUDACC__

/// What a lane's two rows are multiplied with, INT8 only: of dense weights `step`, of others FP16 pairs of the same two
/// halves, q * 2^-24 * high + q * 2^-24 * low.
struct Steps {
    float step[2];
    uint32_t high[2], low[2];
};

/// Row and column of the chunk that an escape is at.
struct ChunkPlace {
    uint32_t row, col;
};
template <WeightFormat kFormat>
__device__ __forceinline__ ChunkPlace escape_place(uint32_t escape) {
    // Eight elements of a k16 step in the order of the A fragment's halves; others: four of the upper row, then of the lower.
    constexpr bool kInt8 = is_int8(kFormat);
    const uint32_t at = kInt8 ? (escape >> 8 & 7) * 8 + (escape & 7) : (escape >> 9 & 3) * 16 + (escape & 15), lane = escape >> (kInt8 ? 3 : 4) & 31;
    return {lane / 4 + (at >> (kInt8 ? 1 : 2) & 1) * 8, at / 8 * 16 + lane % 4 * 2 + (at & 1) + (at >> (kInt8 ? 2 : 1) & 1) * 8};
}

/// Puts what escaped elements differ by from the ones that code 0 decodes to into the plane, and takes it out again. The
/// first 32 escapes, most often all, need no loop.
template <WeightFormat kFormat>
struct Patches {
    uint32_t counts, place;

    /// Nothing, if not `there`.
    __device__ __forceinline__ void put(const uint8_t* header, const uint8_t* symbols, const Segment& segment, const float* scales, uint8_t* plane, int lane, bool there = true) {
        const uint32_t escape = ((const uint16_t*)(header + header_bytes(kFormat)))[lane];
        counts = there ? *(const uint32_t*)(header + window_bytes(kFormat)) : 0, place = escape & 2047;
        if (lane < (counts & 0xFFFF)) put_one(header, scales, plane, escape, symbols[escape >> 11]);
        if (is_long()) put_rest(header, symbols, segment, scales, plane, lane);
    }
    __device__ __forceinline__ void clear(uint8_t* plane, int lane) const {
        if (!is_long()) {
            if (lane < counts) {
                if constexpr (is_int8(kFormat)) ((uint16_t*)plane)[place] = 0;
                else plane[place] = 0;
            }
        } else {
            constexpr int kPieces = (is_int8(kFormat) ? 2 : 1) * (int)kChunkElems / 512;
#pragma unroll
            for (int i = 0; i < kPieces; i++) ((uint4*)plane)[i * 32 + lane] = make_uint4(0, 0, 0, 0);
        }
    }
    /// More than 32 in the chunk, or some in the overflow.
    __device__ __forceinline__ bool is_long() const { return counts > 32; }

    /// INT8: code 0 decodes to 0, to which the value is added. Others: their bytes are put together by XOR.
    static __device__ __forceinline__ void put_one(const uint8_t* header, const float* scales, uint8_t* plane, uint32_t escape, uint32_t key) {
        const uint32_t place = escape & 2047;
        if constexpr (is_int8(kFormat)) {
            ((uint16_t*)plane)[place] = to_16<true>((float)(int)(key - 128) * scales[escape_place<kFormat>(escape).row]);
        } else {
            plane[place] = header[escape_place<kFormat>(escape).row] ^ key;
        }
    }
    __device__ __forceinline__ void put_rest(const uint8_t* header, const uint8_t* symbols, const Segment& segment, const float* scales, uint8_t* plane, int lane) const {
        const uint32_t n_inline = counts & 0xFFFF, n_over = counts >> 16, start = *(const uint32_t*)(header + window_bytes(kFormat) + 4);
#pragma unroll 1
        for (uint32_t i = lane + 32; i < n_inline; i += 32) {
            const uint32_t escape = ((const uint16_t*)(header + header_bytes(kFormat)))[i];
            put_one(header, scales, plane, escape, symbols[escape >> 11]);
        }
        // Four at a time: each comes from far away.
#pragma unroll 1
        for (uint32_t i = lane; i < n_over; i += 128) {
            uint32_t escapes[4];
#pragma unroll
            for (int j = 0; j < 4; j++) escapes[j] = i + j * 32 < n_over ? __ldg(segment.overflow + start + i + j * 32) : 0;
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (i + j * 32 < n_over) put_one(header, scales, plane, escapes[j], escapes[j] >> 16);
        }
    }
};

/// Three bits an element of four k16 steps: `words` are steps 0 to 2, and the
/// top bits of their nibbles step 3. Returns selectors of the upper row in the
/// low half, of the lower row in the high half.
__device__ __forceinline__ uint32_t codes3(const uint32_t* words, int step) {
    return step < 3 ? words[step] & 0x77777777u
                    : (words[0] >> 3 & 0x11111111u) | (words[1] >> 2 & 0x22222222u) | (words[2] >> 1 & 0x44444444u);
}

/// Four of the eight bytes of `low` and `high`, by the lower four nibbles of the selector. Their top bits have to be clear:
/// __byte_perm would spend an instruction on that.
__device__ __forceinline__ uint32_t choose_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
    return out;
}

__device__ __forceinline__ void load3(const uint8_t* from, int half, int lane, uint32_t* words) {
    // Words 0 to 2 belong to the first half, 3 to 5 to the second, stored as three pairs.
    if (half == 0) {
        const uint2 p = ((const uint2*)from)[lane];
        words[0] = p.x, words[1] = p.y;
        words[2] = ((const uint32_t*)from)[64 + lane];
    } else {
        const uint2 p = ((const uint2*)(from + 512))[lane];
        words[1] = p.x, words[2] = p.y;
        words[0] = ((const uint32_t*)from)[96 + lane];
    }
}

/// INT8 of half a chunk: 16 pairs of halves, each the sign and, as its lowest bits, the magnitude of a value, that is
/// q * 2^-24; pair p is register p % 4 of k16 step p / 4. A word has as many codes, of both halves, as fit, and with the
/// bits that are left over, those of kJoined words, more are put together.
template <int kBits, int kHalf>
__device__ __forceinline__ void int8_half(const uint8_t* chunk, int lane, uint32_t* out) {
    constexpr int kFields = 16 / kBits, kLeft = 16 - kFields * kBits, kTogether = kLeft < kFields ? kLeft : kFields;
    constexpr int kJoined = kLeft == 0 ? 0 : kTogether * kBits / kLeft;
    constexpr uint32_t kMask = (0x8000u | ((1u << (kBits - 1)) - 1)) * 0x10001u;
    const uint8_t* from = chunk + kHalf * 128 * kBits;
    uint32_t words[kBits];
    const uint4 v = ((const uint4*)from)[lane];
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    if constexpr (kBits & 2) {
        const uint2 v = ((const uint2*)(from + 512))[lane];
        words[4] = v.x, words[5] = v.y;
    }
    if constexpr (kBits & 1) words[kBits - 1] = ((const uint32_t*)(from + (kBits & 2 ? 768 : 512)))[lane];
    // A code's sign is the bit below its magnitude, the lowest one's the highest bit of the other half.
#pragma unroll
    for (int w = 0; w < kBits; w++)
#pragma unroll
        for (int i = 0; i < kFields; i++) out[w * kFields + i] = __funnelshift_r(words[w], words[w], i * kBits) & kMask;
#pragma unroll
    for (int g = 0; g < (kLeft == 0 ? 0 : kLeft / kTogether); g++) {
        uint32_t joined = 0;
#pragma unroll
        for (int j = 0; j < kJoined; j++) {
            const uint32_t word = words[g * kJoined + j], bits = __funnelshift_l(word, word, (j + 1) * kLeft);
            // Bits j * kLeft on, of which the first is the highest.
            constexpr uint32_t kPiece = (1u << kLeft) - 1;
            const uint32_t place = (j == 0 ? kPiece >> 1 | 0x8000u : kPiece << (j * kLeft - 1)) * 0x10001u;
            joined = (joined & ~place) | (bits & place);
        }
#pragma unroll
        for (int i = 0; i < kTogether; i++) out[kBits * kFields + g * kTogether + i] = __funnelshift_r(joined, joined, i * kBits) & kMask;
    }
}

/// Two weights of bytes u = q + 128, as FP16 of f32(q) * scale, by one instruction each after their bytes are in place:
/// a float whose bits are u << 16 is u * 2^-133, as denormals and the first binade are on one linear scale. So the sum
/// (u * 2^-133) * step - 128 * scale, where 128 * scale = step * 2^-126 is exact, is rounded once, like q * scale.
__device__ __forceinline__ uint32_t dequantise(uint32_t bytes, uint32_t selector0, uint32_t selector1, float step) {
    const float offset = step * -0x1p-126f;
    const float w0 = __fmaf_rn(__uint_as_float(__byte_perm(bytes, 0, selector0)), step, offset);
    const float w1 = __fmaf_rn(__uint_as_float(__byte_perm(bytes, 0, selector1)), step, offset);
    uint32_t out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(w1), "f"(w0));
    return out;
}

/// Keys of four of the eight k16 steps of a chunk, two words a step: four elements of the upper row, four of the lower
/// (dense INT8: values plus 128). Escaped elements have the window of their row.
template <WeightFormat kFormat, int kHalf>
__device__ __forceinline__ void keys_half(const uint8_t* chunk, int lane, uint32_t* e) {
    if constexpr (kFormat == kDenseInt8) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const uint4 v = ((const uint4*)chunk)[(2 * kHalf + j) * 32 + lane];
            e[4 * j] = v.x ^ 0x80808080u, e[4 * j + 1] = v.y ^ 0x80808080u, e[4 * j + 2] = v.z ^ 0x80808080u, e[4 * j + 3] = v.w ^ 0x80808080u;
        }
    } else {
        const uint8_t* header = chunk + header_offset(kFormat);
        const uint32_t upper = header[lane / 4] * 0x01010101u, lower = header[lane / 4 + 8] * 0x01010101u;
        if constexpr (kFormat == kFixedBf16x3 || kFormat == kFixedF16x3) {
            constexpr uint32_t kUnit = kFormat == kFixedBf16x3 ? 1 : 4;
            uint32_t words[3];
            load3(chunk + 2048, kHalf, lane, words);
#pragma unroll
            for (int s = 0; s < 4; s++) {
                const uint32_t codes = codes3(words, s);
                e[2 * s] = choose_bytes(upper + 0x03020100u * kUnit, upper + 0x07060504u * kUnit, codes);
                e[2 * s + 1] = choose_bytes(lower + 0x03020100u * kUnit, lower + 0x07060504u * kUnit, codes >> 16);
            }
        } else {
            // Nibbles: word s holds step s, the low nibbles of its bytes the upper row.
            const uint4 v = ((const uint4*)(chunk + 2048))[kHalf * 32 + lane];
            const uint32_t nibbles[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int s = 0; s < 4; s++) {
                e[2 * s] = (nibbles[s] & 0x0F0F0F0Fu) + upper;
                e[2 * s + 1] = (nibbles[s] >> 4 & 0x0F0F0F0Fu) + lower;
            }
        }
    }
}

/// Puts the raw bits of BF16 or FP16 to the keys: a[4 * step + register].
template <WeightFormat kFormat, int kHalf>
__device__ __forceinline__ void join_half(const uint8_t* chunk, int lane, uint32_t* e, uint32_t* a) {
    if constexpr (kFormat == kFixedF16x3) {
        // Sign and top two bits of the mantissa.
        uint32_t words[3];
        load3(chunk + 2048 + 768, kHalf, lane, words);
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const uint32_t codes = codes3(words, s);
            e[2 * s] |= choose_bytes(0x03020100u, 0x83828180u, codes);
            e[2 * s + 1] |= choose_bytes(0x03020100u, 0x83828180u, codes >> 16);
        }
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const uint4 v = ((const uint4*)chunk)[(2 * kHalf + j) * 32 + lane];
        const uint32_t raw[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int q = 0; q < 4; q++) {
            const int at = 8 * j + q / 2 * 4 + q % 2;
            if constexpr (kFormat == kFixedF16x3) {
                a[at] = __byte_perm(raw[q], e[4 * j + q], 0x5140);
                a[at + 2] = __byte_perm(raw[q], e[4 * j + q], 0x7362);
            } else {
                // A raw byte has the mantissa and the sign of the pair's other element.
                const uint32_t first = __byte_perm(raw[q], e[4 * j + q], 0x5140), second = __byte_perm(raw[q], e[4 * j + q], 0x7362);
                a[at] = __funnelshift_r(first, first, 1);
                a[at + 2] = __funnelshift_r(second, second, 1);
            }
        }
    }
}

/// Decodes four of the eight k16 steps of a chunk: a[4 * step + register].
template <WeightFormat kFormat, int kHalf>
__device__ __forceinline__ void decode_half(const uint8_t* chunk, const uint8_t* plane, int lane, const Steps& steps, uint32_t* a) {
    if constexpr (kFormat == kDenseBf16 || kFormat == kDenseF16) {
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const uint4 v = ((const uint4*)chunk)[(4 * kHalf + s) * 32 + lane];
            a[4 * s] = v.x, a[4 * s + 1] = v.y, a[4 * s + 2] = v.z, a[4 * s + 3] = v.w;
        }
    } else if constexpr (is_int8(kFormat) && !is_dense(kFormat)) {
        uint32_t q[16];
        int8_half<(int)int8_bits(kFormat), kHalf>(chunk, lane, q);
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const uint4 v = ((const uint4*)plane)[(4 * kHalf + s) * 32 + lane];
            const uint32_t patches[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t pair = q[4 * s + i];
                a[4 * s + i] = fma_half2(pair, steps.high[i % 2], fma_half2(pair, steps.low[i % 2], patches[i]));
            }
        }
    } else if constexpr (is_int8(kFormat)) {
        uint32_t e[8];
        keys_half<kFormat, kHalf>(chunk, lane, e);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            a[j / 2 * 4 + j % 2] = dequantise(e[j], 0x4044, 0x4144, steps.step[j % 2]);
            a[j / 2 * 4 + j % 2 + 2] = dequantise(e[j], 0x4244, 0x4344, steps.step[j % 2]);
        }
    } else {
        uint32_t e[8];
        keys_half<kFormat, kHalf>(chunk, lane, e);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const uint4 v = ((const uint4*)plane)[(2 * kHalf + j) * 32 + lane];
            e[4 * j] ^= v.x, e[4 * j + 1] ^= v.y, e[4 * j + 2] ^= v.z, e[4 * j + 3] ^= v.w;
        }
        join_half<kFormat, kHalf>(chunk, lane, e, a);
    }
}

#endif  // __CUDACC__

}  // namespace transom
