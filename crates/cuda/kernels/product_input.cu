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
    uint32_t out[4];
    for (uint32_t r = 0; r < 4; r++) {
        const uint32_t of_unit = cores ? lane / 8 * 8 + r * 2 : r / 2 * 16 + lane % 4 * 2 + r % 2 * 8;
        const uint32_t col = p.order == kRows ? i % across * 8 + r * 2 : unit * 32 + of_unit;
        uint32_t low = 0, high = 0;
        if (token < p.tokens) {
            const uint16_t* row = p.x + (size_t)token * p.cols;
            if (col < p.cols) low = row[col];
            if (col + 1 < p.cols) high = row[col + 1];
        }
        out[r] = low | high << 16;
    }
    ((uint4*)p.out)[i] = make_uint4(out[0], out[1], out[2], out[3]);
}

}  // namespace transom
