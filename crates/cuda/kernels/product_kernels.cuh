// The product kernels of one format: names and shapes, mirrored in
// src/product.rs.
#pragma once

#include "product.cuh"
#include "product_batch.cuh"

#if __CUDA_ARCH__ >= 900
#define TRANSOM_BODY(...) transom::__VA_ARGS__(p)
#else
// Bulk copies need compute capability 9.0; the host does not launch these.
#define TRANSOM_BODY(...) __trap()
#endif

// `blocks`: an SM's, for up to 8 tokens. Then: pairs of tiles that share activations; 16 parts of K instead of 8, a block an SM.
#define TRANSOM_PRODUCT(name, format, blocks)                                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256, blocks) product_##name##_m8(const __grid_constant__ transom::ProductParams p) { TRANSOM_BODY(product<transom::format, 1, 1, 8>); }      \
    extern "C" __global__ void __launch_bounds__(256, 2) product_##name##_m8_pair(const __grid_constant__ transom::ProductParams p) { TRANSOM_BODY(product<transom::format, 1, 2, 8>); }      \
    extern "C" __global__ void __launch_bounds__(512, 1) product_##name##_m8_deep(const __grid_constant__ transom::ProductParams p) { TRANSOM_BODY(product<transom::format, 1, 1, 16>); }     \
    extern "C" __global__ void __launch_bounds__(256, 2) product_##name##_m16(const __grid_constant__ transom::ProductParams p) { TRANSOM_BODY(product<transom::format, 2, 1, 8>); }         \
    extern "C" __global__ void __launch_bounds__(512, 1) product_##name##_m32(const __grid_constant__ transom::ProductParams p) { TRANSOM_BODY(product_batch<transom::format, 4>); }         \
    extern "C" __global__ void __launch_bounds__(512, 1) product_##name##_m64(const __grid_constant__ transom::ProductParams p) { TRANSOM_BODY(product_batch<transom::format, 8>); }
