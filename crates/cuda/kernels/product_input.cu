// Activations into the order that the products read.
#include "params.h"

namespace transom {

/// A thread makes 16 bytes. Waits for the kernel ahead of it.
extern "C" __global__ void __launch_bounds__(256) activation_fragments(const FragmentParams p) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    const uint32_t units = (p.cols + 127) / 128 * 4, groups = (p.tokens + 7) / 8;
    const uint32_t n = groups * units * 32, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const uint32_t lane = i % 32;
    // The order of 512-byte units: all of a token group, or all token groups of four units.
    const uint32_t unit = p.cores ? i / 128 / groups * 4 + i / 32 % 4 : i / 32 % units;
    const uint32_t group = p.cores ? i / 128 % groups : i / 32 / units;
    const uint32_t token = group * 8 + (p.cores ? lane % 8 : lane / 4);
    uint32_t out[4];
    for (uint32_t r = 0; r < 4; r++) {
        const uint32_t col = unit * 32 + (p.cores ? lane / 8 * 8 + r * 2 : r / 2 * 16 + lane % 4 * 2 + r % 2 * 8);
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
