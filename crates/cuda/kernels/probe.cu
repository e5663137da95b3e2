// Kernels that show whether a GPU works, and how fast it reads.

#include <cstdint>

namespace transom {

struct ProbeParams {
    const uint4* from;
    uint4* to;
    uint64_t n;    // of 16 bytes
    uint32_t key;
    uint32_t unused;
};

static_assert(sizeof(ProbeParams) == 32, "mirrored in Rust");

/// to[i] = from[i] ^ key, word by word. Waits for the kernel ahead of it.
extern "C" __global__ void __launch_bounds__(256) probe_xor(const ProbeParams p) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    const uint64_t stride = uint64_t(gridDim.x) * blockDim.x;
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.n; i += stride) {
        uint4 v = p.from[i];
        v.x ^= p.key, v.y ^= p.key, v.z ^= p.key, v.w ^= p.key;
        p.to[i] = v;
    }
}

/// Reverses each block's 256 pieces of 16 bytes through dynamic shared memory
/// beyond its first 64 KiB. `n` is a multiple of 256.
extern "C" __global__ void __launch_bounds__(256) probe_shared(const ProbeParams p) {
    extern __shared__ uint4 shared[];
    uint4* pieces = shared + 4096;
    const uint64_t i = uint64_t(blockIdx.x) * 256 + threadIdx.x;
    if (i < p.n) pieces[threadIdx.x] = p.from[i];
    __syncthreads();
    if (i < p.n) p.to[i] = pieces[255 - threadIdx.x];
}

/// Reads everything and writes one piece a thread: the XOR of what it has read.
extern "C" __global__ void __launch_bounds__(256) probe_read(const ProbeParams p) {
    const uint64_t stride = uint64_t(gridDim.x) * blockDim.x;
    const uint64_t thread = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    uint4 sum = make_uint4(p.key, p.key, p.key, p.key);
    uint64_t i = thread;
    for (; i + 7 * stride < p.n; i += 8 * stride) {
        uint4 v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = __ldcs(p.from + i + j * stride);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum.x ^= v[j].x, sum.y ^= v[j].y, sum.z ^= v[j].z, sum.w ^= v[j].w;
    }
    for (; i < p.n; i += stride) {
        const uint4 v = __ldcs(p.from + i);
        sum.x ^= v.x, sum.y ^= v.y, sum.z ^= v.z, sum.w ^= v.w;
    }
    p.to[thread] = sum;
}

}  // namespace transom
