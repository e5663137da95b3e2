// Activations into the order that the products read.
#include "params.h"

namespace transom {

/// A thread makes 16 bytes. Waits for the kernel ahead of it; the one behind may load weights meanwhile.
extern "C" __global__ void __launch_bounds__(256) order_activations(const ActivationParams p) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, lane = i % 32;
    const uint32_t across = (p.cols + 7) / 8, units = (p.cols + 127) / 128 * 4, groups = (p.tokens + 7) / 8;
    if (i >= (p.order == kRows ? p.tokens * across : groups * units * 32)) return;
    // The order of 512-byte units: all of a token group, or all token groups of four units.
    const bool cores = p.order == kCoreMatrices;
    const uint32_t unit = cores ? i / 128 / groups * 4 + i / 32 % 4 : i / 32 % units;
    const uint32_t group = cores ? i / 128 % groups : i / 32 / units;
    const uint32_t token = p.order == kRows ? i / across : group * 8 + (cores ? lane % 8 : lane / 4);
    if (cores && p.cols % 8 == 0) {
        // Eight columns that lie together.
        const uint32_t col = unit * 32 + lane / 8 * 8;
        const bool there = token < p.tokens && col < p.cols;
        ((uint4*)p.out)[i] = there ? *(const uint4*)(p.x + (size_t)token * p.cols + col) : make_uint4(0, 0, 0, 0);
        return;
    }
    uint32_t out[4];
    for (uint32_t r = 0; r < 4; r++) {
        const uint32_t of_unit = cores ? lane / 8 * 8 + r * 2 : r / 2 * 16 + lane % 4 * 2 + r % 2 * 8;
        const uint32_t col = p.order == kRows ? i % across * 8 + r * 2 : unit * 32 + of_unit;
        const uint16_t* at = p.x + (size_t)token * p.cols + col;
        out[r] = 0;
        if (token >= p.tokens || col >= p.cols) continue;
        if (p.cols % 2 == 0) out[r] = *(const uint32_t*)at;
        else out[r] = at[0] | (col + 1 < p.cols ? (uint32_t)at[1] << 16 : 0);
    }
    ((uint4*)p.out)[i] = make_uint4(out[0], out[1], out[2], out[3]);
}

}  // namespace transom
