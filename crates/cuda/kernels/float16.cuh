// 16-bit floats from and to FP32.
#pragma once

#include <cstdint>

namespace transom {

#ifdef __CUDACC__

/// FP16, otherwise BF16.
template <bool kHalf>
__device__ __forceinline__ float from_16(uint16_t bits) {
    if (!kHalf) return __uint_as_float((uint32_t)bits << 16);
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
    return out;
}
/// The nearest, ties to even.
template <bool kHalf>
__device__ __forceinline__ uint16_t to_16(float value) {
    uint16_t out;
    if (kHalf) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
    else asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
}
/// a * b + c of two FP16 numbers each.
__device__ __forceinline__ uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

#endif  // __CUDACC__

}  // namespace transom
