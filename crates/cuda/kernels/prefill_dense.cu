// Products of more than 64 tokens from dense weights in the order of chunks: the twins.
#include "prefill_kernels.cuh"

TRANSOM_PREFILL(dense_bf16, kDenseBf16)
TRANSOM_PREFILL(dense_f16, kDenseF16)
TRANSOM_PREFILL(dense_int8, kDenseInt8)
