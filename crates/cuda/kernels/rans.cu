// Entropy-coded weights: loading, decoding, rows, products.
#include <cstddef>

#include "rans_load.cuh"
#include "rans_product.cuh"
#include "rans_rows.cuh"

using namespace transom::rans;

static_assert(sizeof(Matrix) == 64 && offsetof(Matrix, rows) == 40, "mirrored in Rust");
static_assert(sizeof(LoadArgs) == 96 && offsetof(LoadArgs, rows) == 64, "mirrored in Rust");
static_assert(sizeof(DecodeArgs) == 96, "mirrored in Rust");
static_assert(sizeof(BytesArgs) == 96 && offsetof(BytesArgs, flip) == 88, "mirrored in Rust");
static_assert(sizeof(GatherArgs) == 88 && offsetof(GatherArgs, n_ids) == 80, "mirrored in Rust");
static_assert(sizeof(ProductArgs) == 120 && offsetof(ProductArgs, tokens) == 104, "mirrored in Rust");

extern "C" {

__global__ void __launch_bounds__(32 * kLoadWarps) rans_load(const __grid_constant__ LoadArgs args) { load_body<Slots>(args); }
__global__ void __launch_bounds__(32 * kLoadWarps) rans_load_general(const __grid_constant__ LoadArgs args) { load_body<General>(args); }
__global__ void __launch_bounds__(32 * kLoadWarps) rans_load_two_planes(const __grid_constant__ LoadArgs args) { load_body<TwoPlanes>(args); }

__global__ void __launch_bounds__(512, 2) rans_decode(const __grid_constant__ DecodeArgs args) { decode_body<Slots, 16>(args); }
__global__ void __launch_bounds__(512, 2) rans_decode_general(const __grid_constant__ DecodeArgs args) { decode_body<General, 16>(args); }
__global__ void __launch_bounds__(512, 1) rans_decode_two_planes(const __grid_constant__ DecodeArgs args) { decode_body<TwoPlanes, 16>(args); }

__global__ void __launch_bounds__(32 * kRowsWarps) rans_decode_bytes(const __grid_constant__ BytesArgs args) { bytes_body<Slots>(args); }
__global__ void __launch_bounds__(32 * kRowsWarps) rans_decode_bytes_general(const __grid_constant__ BytesArgs args) { bytes_body<General>(args); }

__global__ void __launch_bounds__(32 * kRowsWarps) rans_gather(const __grid_constant__ GatherArgs args) { gather_body<Slots, 2>(args); }
__global__ void __launch_bounds__(32 * kRowsWarps) rans_gather_general(const __grid_constant__ GatherArgs args) { gather_body<General, 2>(args); }
__global__ void __launch_bounds__(32 * kRowsWarps) rans_gather_two_planes(const __grid_constant__ GatherArgs args) { gather_body<TwoPlanes, 2>(args); }
__global__ void __launch_bounds__(32 * kRowsWarps) rans_gather_bytes(const __grid_constant__ GatherArgs args) { gather_body<Slots, 1>(args); }
__global__ void __launch_bounds__(32 * kRowsWarps) rans_gather_bytes_general(const __grid_constant__ GatherArgs args) { gather_body<General, 1>(args); }

// The number is that of tokens at most; more of them leave room for one block an SM.
__global__ void __launch_bounds__(512, 2) rans_product_bf16_8(const __grid_constant__ ProductArgs args) { product_body<kBf16, Slots, 16, 2, 8>(args); }
__global__ void __launch_bounds__(512, 1) rans_product_bf16_32(const __grid_constant__ ProductArgs args) { product_body<kBf16, Slots, 16, 2, 32>(args); }
__global__ void __launch_bounds__(512, 1) rans_product_bf16_64(const __grid_constant__ ProductArgs args) { product_body<kBf16, Slots, 16, 2, 64>(args); }
__global__ void __launch_bounds__(512, 1) rans_product_bf16_64_general(const __grid_constant__ ProductArgs args) { product_body<kBf16, General, 16, 2, 64>(args); }
__global__ void __launch_bounds__(512, 2) rans_product_f16_8(const __grid_constant__ ProductArgs args) { product_body<kF16, Slots, 16, 2, 8>(args); }
__global__ void __launch_bounds__(512, 1) rans_product_f16_32(const __grid_constant__ ProductArgs args) { product_body<kF16, Slots, 16, 2, 32>(args); }
__global__ void __launch_bounds__(512, 1) rans_product_f16_64(const __grid_constant__ ProductArgs args) { product_body<kF16, Slots, 16, 2, 64>(args); }
__global__ void __launch_bounds__(512, 1) rans_product_f16_64_general(const __grid_constant__ ProductArgs args) { product_body<kF16, General, 16, 2, 64>(args); }
__global__ void __launch_bounds__(512, 1) rans_product_f16_64_two_planes(const __grid_constant__ ProductArgs args) { product_body<kF16, TwoPlanes, 16, 1, 64>(args); }
__global__ void __launch_bounds__(512, 2) rans_product_int8_8(const __grid_constant__ ProductArgs args) { product_body<kInt8, Slots, 16, 1, 8>(args); }
__global__ void __launch_bounds__(512, 1) rans_product_int8_32(const __grid_constant__ ProductArgs args) { product_body<kInt8, Slots, 16, 1, 32>(args); }
__global__ void __launch_bounds__(512, 1) rans_product_int8_64(const __grid_constant__ ProductArgs args) { product_body<kInt8, Slots, 16, 1, 64>(args); }
__global__ void __launch_bounds__(512, 1) rans_product_int8_64_general(const __grid_constant__ ProductArgs args) { product_body<kInt8, General, 16, 1, 64>(args); }

}  // extern "C"
