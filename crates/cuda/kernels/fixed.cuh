// Chunks of 16 rows x 128 columns, fixed-rate or dense, to A fragments of
// mma.m16n8k16. docs/kernels.md draws the layout.
#pragma once

#include "params.h"
#include "reduction.cuh"

namespace transom {

constexpr uint32_t kChunkRows = 16, kChunkCols = 128, kChunkElems = 2048;
/// Windows u8[16], escapes u16, overflow count u16, overflow start u32.
constexpr uint32_t kHeaderBytes = 24;
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
/// Bytes of a chunk with room for `places` escapes, a multiple of 8.
TRANSOM_BOTH constexpr uint32_t chunk_bytes(WeightFormat f, uint32_t places) {
    return header_offset(f) + (is_dense(f) ? 0 : kHeaderBytes + 2 * places + kHeaderPad);
}

#ifdef __CUDACC__

/// Where in the plane of patches the element of an escape lies, like its raw byte.
__device__ __forceinline__ uint32_t escape_address(uint32_t escape) { return escape & 2047; }
/// Row of the chunk that an escape is in.
__device__ __forceinline__ uint32_t escape_row(uint32_t escape) { return (escape >> 6 & 7) + (escape >> 2 & 1) * 8; }

/// Puts the difference between each escaped element's byte and the one that
/// code 0 decodes to into the plane, and takes it out again. The first 32
/// escapes, most often all, need no loop.
struct Patches {
    uint32_t counts, address;

    /// Nothing, if not `there`.
    __device__ __forceinline__ void put(const uint8_t* header, const uint8_t* symbols, const Segment& segment, uint8_t* plane, int lane, bool there = true) {
        const uint32_t escape = ((const uint16_t*)(header + kHeaderBytes))[lane];
        counts = there ? *(const uint32_t*)(header + 16) : 0, address = escape_address(escape);
        if (lane < (counts & 0xFFFF)) plane[address] = header[escape_row(escape)] ^ symbols[escape >> 11];
        if (is_long()) put_rest(header, symbols, segment, plane, lane);
    }
    __device__ __forceinline__ void clear(uint8_t* plane, int lane) const {
        if (!is_long()) {
            if (lane < counts) plane[address] = 0;
        } else {
#pragma unroll
            for (int i = 0; i < (int)kChunkElems / 512; i++) ((uint4*)plane)[i * 32 + lane] = make_uint4(0, 0, 0, 0);
        }
    }
    /// More than 32 in the chunk, or some in the overflow.
    __device__ __forceinline__ bool is_long() const { return counts > 32; }

    __device__ __forceinline__ void put_rest(const uint8_t* header, const uint8_t* symbols, const Segment& segment, uint8_t* plane, int lane) const {
        const uint32_t n_inline = counts & 0xFFFF, n_over = counts >> 16, start = *(const uint32_t*)(header + 20);
#pragma unroll 1
        for (uint32_t i = lane + 32; i < n_inline; i += 32) {
            const uint32_t escape = ((const uint16_t*)(header + kHeaderBytes))[i];
            plane[escape_address(escape)] = header[escape_row(escape)] ^ symbols[escape >> 11];
        }
        // Four at a time: each comes from far away.
#pragma unroll 1
        for (uint32_t i = lane; i < n_over; i += 128) {
            uint32_t escapes[4];
#pragma unroll
            for (int j = 0; j < 4; j++) escapes[j] = i + j * 32 < n_over ? __ldg(segment.overflow + start + i + j * 32) : 0;
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (i + j * 32 < n_over) plane[escape_address(escapes[j])] = header[escape_row(escapes[j])] ^ escapes[j] >> 16;
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
/// (INT8: values plus 128). Escaped elements have the window of their row.
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
                e[2 * s] = __byte_perm(upper + 0x03020100u * kUnit, upper + 0x07060504u * kUnit, codes);
                e[2 * s + 1] = __byte_perm(lower + 0x03020100u * kUnit, lower + 0x07060504u * kUnit, codes >> 16);
            }
        } else {
            // Nibbles: word s holds step s, the low nibbles of its bytes the upper row.
            constexpr uint32_t kAt = kFormat == kFixedBf16x4 ? 2048 : 0;
            const uint4 v = ((const uint4*)(chunk + kAt))[kHalf * 32 + lane];
            const uint32_t nibbles[4] = {v.x, v.y, v.z, v.w};
            constexpr int kHigh = kFormat == kFixedBf16x4 ? 0 : (int)int8_bits(kFormat) - 4;
            const uint32_t* more = (const uint32_t*)(chunk + 1024);
#pragma unroll
            for (int s = 0; s < 4; s++) {
                e[2 * s] = nibbles[s] & 0x0F0F0F0Fu;
                e[2 * s + 1] = nibbles[s] >> 4 & 0x0F0F0F0Fu;
            }
            if constexpr (kHigh == 1 || kHigh == 3) {
                // Bit j of each byte belongs to word j of the half.
                const uint32_t bits = more[(kHigh == 3 ? 128 : 0) + kHalf * 32 + lane];
                constexpr int kPlace = kHigh == 3 ? 6 : 4;
#pragma unroll
                for (int j = 0; j < 8; j++) e[j] |= (j < kPlace ? bits << (kPlace - j) : bits >> (j - kPlace)) & 0x01010101u << kPlace;
            }
            if constexpr (kHigh == 2 || kHigh == 3) {
                const uint2 v = ((const uint2*)more)[kHalf * 32 + lane];
                const uint32_t pairs[2] = {v.x, v.y};
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const uint32_t p = pairs[j / 4];
                    e[j] |= (j % 4 < 2 ? p << (4 - 2 * (j % 4)) : p >> (2 * (j % 4) - 4)) & 0x30303030u;
                }
            }
#pragma unroll
            for (int j = 0; j < 4; j++) e[2 * j] += upper, e[2 * j + 1] += lower;
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
            e[2 * s] |= __byte_perm(0x03020100u, 0x83828180u, codes);
            e[2 * s + 1] |= __byte_perm(0x03020100u, 0x83828180u, codes >> 16);
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
__device__ __forceinline__ void decode_half(const uint8_t* chunk, const uint8_t* plane, int lane, float step0, float step1, uint32_t* a) {
    if constexpr (kFormat == kDenseBf16 || kFormat == kDenseF16) {
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const uint4 v = ((const uint4*)chunk)[(4 * kHalf + s) * 32 + lane];
            a[4 * s] = v.x, a[4 * s + 1] = v.y, a[4 * s + 2] = v.z, a[4 * s + 3] = v.w;
        }
        return;
    }
    uint32_t e[8];
    keys_half<kFormat, kHalf>(chunk, lane, e);
    if constexpr (!is_dense(kFormat)) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const uint4 v = ((const uint4*)plane)[(2 * kHalf + j) * 32 + lane];
            e[4 * j] ^= v.x, e[4 * j + 1] ^= v.y, e[4 * j + 2] ^= v.z, e[4 * j + 3] ^= v.w;
        }
    }
    if constexpr (is_int8(kFormat)) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float step = j % 2 ? step1 : step0;
            a[j / 2 * 4 + j % 2] = dequantise(e[j], 0x4044, 0x4144, step);
            a[j / 2 * 4 + j % 2 + 2] = dequantise(e[j], 0x4244, 0x4344, step);
        }
    } else {
        join_half<kFormat, kHalf>(chunk, lane, e, a);
    }
}

#endif  // __CUDACC__

}  // namespace transom
