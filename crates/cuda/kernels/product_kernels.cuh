// The product kernels of one format: names and shapes, mirrored in
// src/product.rs.
#pragma once

#include "product.cuh"

#if __CUDA_ARCH__ >= 900
#define TRANSOM_PRODUCT_BODY(...) transom::product<__VA_ARGS__>(p)
#else
// Bulk copies need compute capability 9.0; the host does not launch these.
#define TRANSOM_PRODUCT_BODY(...) __trap()
#endif

#define TRANSOM_PRODUCT(name, format)                                                                                                                                                                        \
    /* Up to 8 tokens: a strip a block; the wide one two. */                                                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 2) product_##name##_m8(const __grid_constant__ transom::ProductParams p) { TRANSOM_PRODUCT_BODY(transom::format, 1, 1, 8, 2, 0, 1, 1); }                \
    extern "C" __global__ void __launch_bounds__(256, 2) product_##name##_m8_wide(const __grid_constant__ transom::ProductParams p) { TRANSOM_PRODUCT_BODY(transom::format, 1, 2, 4, 2, 0, 1, 1); }           \
    extern "C" __global__ void __launch_bounds__(256, 2) product_##name##_m16(const __grid_constant__ transom::ProductParams p) { TRANSOM_PRODUCT_BODY(transom::format, 2, 1, 8, 2, 0, 1, 1); }               \
    extern "C" __global__ void __launch_bounds__(256, 2) product_##name##_m32(const __grid_constant__ transom::ProductParams p) { TRANSOM_PRODUCT_BODY(transom::format, 4, 1, 8, 2, 0, 1, 1); }               \
    /* Up to 64: eight strips a block. */                                                                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256, 2) product_##name##_m64(const __grid_constant__ transom::ProductParams p) { TRANSOM_PRODUCT_BODY(transom::format, 8, 8, 1, 2, 3, 1, 1); }
