// Products from dense weights in the order of chunks: the twins.
#include "product_kernels.cuh"

TRANSOM_PRODUCT(dense_bf16, kDenseBf16, 2)
TRANSOM_PRODUCT(dense_f16, kDenseF16, 2)
TRANSOM_PRODUCT(dense_int8, kDenseInt8, 3)
