// Entropy-coded weights: loading, decoding, rows, products.
#include <cstddef>

#include "rans_load.cuh"
#include "rans_product.cuh"
#include "rans_rows.cuh"

using namespace transom::rans;

static_assert(sizeof(Matrix) == 72 && offsetof(Matrix, rows) == 48, "mirrored in Rust");
static_assert(sizeof(LoadArgs) == 104 && offsetof(LoadArgs, rows) == 80, "mirrored in Rust");
static_assert(sizeof(DecodeArgs) == 88, "mirrored in Rust");
static_assert(sizeof(BytesArgs) == 88 && offsetof(BytesArgs, flip) == 80, "mirrored in Rust");
static_assert(sizeof(GatherArgs) == 96 && offsetof(GatherArgs, n_ids) == 88, "mirrored in Rust");
static_assert(sizeof(ProductArgs) == 128 && offsetof(ProductArgs, tokens) == 112, "mirrored in Rust");

extern "C" {

__global__ void __launch_bounds__(32 * kLoadWarps) rans_load(const __grid_constant__ LoadArgs args) { load_body<false>(args); }
__global__ void __launch_bounds__(32 * kLoadWarps) rans_load_general(const __grid_constant__ LoadArgs args) { load_body<true>(args); }

__global__ void __launch_bounds__(512, 2) rans_decode_bf16(const __grid_constant__ DecodeArgs args) { decode_body<false, 16>(args); }
__global__ void __launch_bounds__(512, 2) rans_decode_bf16_general(const __grid_constant__ DecodeArgs args) { decode_body<true, 16>(args); }

__global__ void __launch_bounds__(32 * kRowsWarps) rans_decode_bytes(const __grid_constant__ BytesArgs args) { bytes_body<false>(args); }
__global__ void __launch_bounds__(32 * kRowsWarps) rans_decode_bytes_general(const __grid_constant__ BytesArgs args) { bytes_body<true>(args); }

__global__ void __launch_bounds__(32 * kRowsWarps) rans_gather_bf16(const __grid_constant__ GatherArgs args) { gather_body<false>(args); }
__global__ void __launch_bounds__(32 * kRowsWarps) rans_gather_bf16_general(const __grid_constant__ GatherArgs args) { gather_body<true>(args); }

// The number is that of tokens at most; more of them leave room for one block an SM.
__global__ void __launch_bounds__(512, 2) rans_product_bf16_8(const __grid_constant__ ProductArgs args) { product_body<kBf16, false, 16, 8>(args); }
__global__ void __launch_bounds__(512, 1) rans_product_bf16_32(const __grid_constant__ ProductArgs args) { product_body<kBf16, false, 16, 32>(args); }
__global__ void __launch_bounds__(512, 1) rans_product_bf16_64(const __grid_constant__ ProductArgs args) { product_body<kBf16, false, 16, 64>(args); }
__global__ void __launch_bounds__(512, 1) rans_product_bf16_64_general(const __grid_constant__ ProductArgs args) { product_body<kBf16, true, 16, 64>(args); }
__global__ void __launch_bounds__(512, 2) rans_product_int8_8(const __grid_constant__ ProductArgs args) { product_body<kInt8, false, 16, 8>(args); }
__global__ void __launch_bounds__(512, 1) rans_product_int8_32(const __grid_constant__ ProductArgs args) { product_body<kInt8, false, 16, 32>(args); }
__global__ void __launch_bounds__(512, 1) rans_product_int8_64(const __grid_constant__ ProductArgs args) { product_body<kInt8, false, 16, 64>(args); }
__global__ void __launch_bounds__(512, 1) rans_product_int8_64_general(const __grid_constant__ ProductArgs args) { product_body<kInt8, true, 16, 64>(args); }

}  // extern "C"
