// Matrix in device memory -> row-major BF16. One warp decodes 16 rows of a tile.
#pragma once

#include "rans.cuh"

namespace transom {
namespace rans {

struct DecodeArgs {
    Matrix matrix;
    uint16_t* out;       // row-major
    uint64_t stride;     // elements from a row of `out` to the next
};

#ifdef __CUDACC__

constexpr int kDecodeStage = 16 * 128;  // 16 rows x 64 columns of BF16

template <int kWarps, int kBlocks>
__global__ void __launch_bounds__(32 * kWarps, kBlocks) decode_kernel(const __grid_constant__ DecodeArgs args) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Matrix& w = args.matrix;
    uint32_t* table = (uint32_t*)(shared + kWarps * (kRingBytes + kDecodeStage));
    for (uint32_t i = threadIdx.x; i < (1u << w.prob_bits) / 4; i += 32 * kWarps) ((uint4*)table)[i] = ((const uint4*)w.table)[i];
    __syncthreads();
    const Params params = make_params(shared_address(table), w.prob_bits, lane);
    const uint32_t ring = shared_address(shared) + warp * (kRingBytes + kDecodeStage), stage = ring + kRingBytes;
    const uint32_t align = 1u << (15 - w.prob_bits), units = units_across(w.cols);
    const uint32_t across = (w.cols + kTileCols - 1) / kTileCols, n_tasks = w.rows / 16 * across;
    // Row and 16-byte part of the stage that this lane stores a quarter of a
    // block to, and that it reads; parts are swapped about to spare the banks.
    const uint32_t in_row = lane % 16, in_part = lane / 16, out_row = lane / 8, out_part = lane % 8;
    for (uint32_t task = blockIdx.x * kWarps + warp; task < n_tasks; task += gridDim.x * kWarps) {
        const uint32_t strip = task / across, col = task % across * kTileCols;
        const uint32_t blocks = min((uint32_t)kTileCols, w.cols - col) / 16;
        const bool is_last = strip % 8 == 7 || strip == w.rows / 16 - 1;
        const size_t unit = (size_t)strip * units + col / kUnitCols;
        uint32_t x = w.states[unit * 32 + lane];
        Words words;
        words.begin(w.words, w.positions[unit], ring, lane);
        const uint4* raw = w.raw + unit * 8 * 32 + lane;
        uint16_t* out = args.out + (size_t)(strip * 16 + out_row) * args.stride + col + out_part * 8;
        words.arrive();
        for (uint32_t b = 0; b < blocks; b += 4) {
#pragma unroll 1
            for (uint32_t i = 0; i < 4 && b + i < blocks; i += 2) {
                const uint4 bits = load_once(raw);
                raw += 32;
#pragma unroll
                for (uint32_t j = 0; j < 2; j++) {
                    if (j == 1 && b + i + 1 >= blocks) break;
                    uint32_t entries[8], a[4];
                    block(params, x, words, lane, is_last && b + i + j + 1 == blocks, entries);
                    join_block(entries, j ? bits.z : bits.x, j ? bits.w : bits.y, align, a);
                    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                                     stage + in_row * 128 + ((2 * (i + j) + in_part) ^ (in_row & 7)) * 16),
                                 "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
                                 : "memory");
                }
            }
            __syncwarp();
            const bool inside = b * 16 + out_part * 8 < blocks * 16;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t row = out_row + 4 * i;
                uint4 v;
                asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(stage + row * 128 + (out_part ^ (row & 7)) * 16) : "memory");
                if (inside) __stcs((uint4*)(out + (size_t)(4 * i) * args.stride + b * 16), v);
            }
            __syncwarp();
        }
        wait_copies<0>();
    }
}

#endif  // __CUDACC__

}  // namespace rans
}  // namespace transom
