// Products from fixed-rate INT8 weights.
#include "product_kernels.cuh"

TRANSOM_PRODUCT(int8x4, kFixedInt8x4, 2)
TRANSOM_PRODUCT(int8x5, kFixedInt8x5, 2)
TRANSOM_PRODUCT(int8x6, kFixedInt8x6, 2)
TRANSOM_PRODUCT(int8x7, kFixedInt8x7, 2)
