// Products of more than 64 tokens from fixed-rate BF16 and FP16 weights.
#include "prefill_kernels.cuh"

TRANSOM_PREFILL(bf16x3, kFixedBf16x3)
TRANSOM_PREFILL(bf16x4, kFixedBf16x4)
TRANSOM_PREFILL(f16x3, kFixedF16x3)
