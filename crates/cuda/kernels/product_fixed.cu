// Products from fixed-rate BF16 and FP16 weights.
#include "product_kernels.cuh"

TRANSOM_PRODUCT(bf16x3, kFixedBf16x3, 2)
TRANSOM_PRODUCT(bf16x4, kFixedBf16x4, 2)
TRANSOM_PRODUCT(f16x3, kFixedF16x3, 2)
