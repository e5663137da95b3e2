// The kernels for more than 64 tokens of one format: names and shapes, mirrored
// in src/product/prefill.rs.
#pragma once

#include "product_prefill.cuh"

#if TRANSOM_WGMMA
#define TRANSOM_PREFILL_BODY(format, tokens8) transom::product_prefill<transom::format, tokens8>(p)
#else
// Only compute capability 9.0 has wgmma; the host does not launch these elsewhere.
#define TRANSOM_PREFILL_BODY(format, tokens8) __trap()
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define TRANSOM_CLUSTER __cluster_dims__(transom::kPrefillCluster, 1, 1)
#else
#define TRANSOM_CLUSTER
#endif

// 128 or 256 tokens a block.
#define TRANSOM_PREFILL_OF(name, format, tokens, tokens8)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(transom::kPrefillThreads, 1) TRANSOM_CLUSTER prefill_##name##_##tokens(const __grid_constant__ transom::PrefillParams p) { \
        TRANSOM_PREFILL_BODY(format, tokens8);                                                                                                                       \
    }
#define TRANSOM_PREFILL(name, format)          \
    TRANSOM_PREFILL_OF(name, format, 128, 16) \
    TRANSOM_PREFILL_OF(name, format, 256, 32)
