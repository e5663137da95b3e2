// Products of more than 64 tokens from fixed-rate INT8 weights.
#include "prefill_kernels.cuh"

TRANSOM_PREFILL(int8x4, kFixedInt8x4)
TRANSOM_PREFILL(int8x5, kFixedInt8x5)
TRANSOM_PREFILL(int8x6, kFixedInt8x6)
TRANSOM_PREFILL(int8x7, kFixedInt8x7)
