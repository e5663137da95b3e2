// Products from fixed-rate INT8 weights.
#include "product_kernels.cuh"

TRANSOM_PRODUCT(int8x4, kFixedInt8x4, 3)
TRANSOM_PRODUCT(int8x5, kFixedInt8x5, 3)
TRANSOM_PRODUCT(int8x6, kFixedInt8x6, 3)
TRANSOM_PRODUCT(int8x7, kFixedInt8x7, 3)
