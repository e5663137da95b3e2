// Fused product y[M,N] = x[M,K] * W[N,K]^T from fixed-rate weights: a ladder.
//
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o fixed_product fixed_product.cu -lcublas
//
// dense  the twin: the same loop over the original BF16 elements in fragment order.
// fixed  3-bit codes of the exponent within a window of eight that every row of
//        a chunk chooses for itself, 8 raw bits, escapes inside the chunk, so
//        that one bulk copy brings all there is to know and no load depends on
//        another (but for the few chunks with more than 32 escapes).
//
// A chunk is 16 rows x 128 columns in the A-fragment order of mma.m16n8k16, a
// tile of the output 16 rows. K is cut into one slice a warp; partial sums are
// added in ascending order of the slice. Both are functions of (N, K) only.
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#define CHECK(call)                                                                  \
    do {                                                                             \
        auto status_ = (call);                                                       \
        if (status_ != 0) {                                                          \
            printf("%s:%d: %s failed: %d\n", __FILE__, __LINE__, #call, (int)status_); \
            exit(1);                                                                 \
        }                                                                            \
    } while (0)

constexpr int kRows = 16, kCols = 128, kElems = kRows * kCols;

// Layout of a fixed chunk, in bytes.
constexpr int kRawBytes = 2048;    // [4][lane 32][16]: two k16 steps each, as they join with exponents
constexpr int kCodeBytes = 768;    // [3][lane 32] 8-byte pairs of words, see pack_codes
constexpr int kHeaderBytes = 24;   // windows u8[16], escapes u16, overflow count u16, overflow start u32
constexpr int kInline = 32;        // escapes that fit the chunk, 2 bytes each
constexpr int kPadBytes = 8;
constexpr int kFixedBytes = kRawBytes + kCodeBytes + kHeaderBytes + 2 * kInline + kPadBytes;
constexpr int kDenseBytes = 2 * kElems;
static_assert(kFixedBytes % 16 == 0, "bulk copies move 16 bytes at a time");

// Row and column of register element i of a lane in the A fragment.
static int fragment_row(int lane, int i) { return lane / 4 + (i >> 1 & 1) * 8; }
static int fragment_col(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >> 2 & 1) * 8; }

// ---------------------------------------------------------------------------
// Host: encoding

struct Fixed {
    std::vector<uint8_t> chunks;
    std::vector<uint16_t> overflow;
    uint8_t symbols[32] = {};  // exponents that escapes index
    double bits = 0, escapes = 0;
};

template <class F>
static void parallel(int n, F f) {
    const int threads = 16;
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; t++) pool.emplace_back([&, t] { for (int i = t; i < n; i += threads) f(i); });
    for (auto& thread : pool) thread.join();
}

static Fixed encode_fixed(const std::vector<uint16_t>& w, int n, int k) {
    Fixed out;
    std::vector<uint64_t> counts(256);
    for (uint16_t x : w) counts[x >> 7 & 255]++;
    // Any exponent can be an escape; the lab's matrices have at most 32.
    int index[256], n_symbols = 0;
    for (int e = 255; e >= 0; e--) {
        index[e] = -1;
        if (counts[e] == 0) continue;
        if (n_symbols == 32) { printf("more than 32 exponents\n"); exit(1); }
        index[e] = n_symbols;
        out.symbols[n_symbols++] = (uint8_t)e;
    }
    const int across = k / kCols;
    out.chunks.assign((size_t)(n / kRows) * across * kFixedBytes, 0);
    std::vector<std::vector<uint16_t>> overflow(n / kRows);
    std::vector<uint64_t> escapes(n / kRows);
    parallel(n / kRows, [&](int tile) {
        for (int c = 0; c < across; c++) {
            uint16_t element[32][64];
            int histogram[16][264] = {};
            for (int lane = 0; lane < 32; lane++)
                for (int s = 0; s < 8; s++)
                    for (int i = 0; i < 8; i++) {
                        int row = tile * kRows + fragment_row(lane, i), col = c * kCols + s * 16 + fragment_col(lane, i);
                        uint16_t x = w[(size_t)row * k + col];
                        element[lane][s * 8 + i] = x;
                        histogram[fragment_row(lane, i)][x >> 7 & 255]++;
                    }
            uint8_t windows[16];
            for (int row = 0; row < 16; row++) {
                int most = -1;
                for (int base = 0; base <= 248; base++) {
                    int inside = 0;
                    for (int j = 0; j < 8; j++) inside += histogram[row][base + j];
                    if (inside > most) most = inside, windows[row] = (uint8_t)base;
                }
            }
            uint8_t* chunk = &out.chunks[((size_t)tile * across + c) * kFixedBytes];
            std::vector<uint16_t> escaped;
            for (int lane = 0; lane < 32; lane++) {
                uint32_t words[6] = {};
                for (int at = 0; at < 64; at++) {
                    // Four elements of the upper row, then four of the lower.
                    int s = at / 8, i = (at & 1) | (at >> 2 & 1) << 1 | (at >> 1 & 1) << 2;
                    uint16_t x = element[lane][s * 8 + i], partner = element[lane][s * 8 + (i ^ 1)];
                    int code = (x >> 7 & 255) - windows[fragment_row(lane, i)];
                    if (code < 0 || code > 7) {
                        escaped.push_back((uint16_t)(lane << 6 | at | index[x >> 7 & 255] << 11));
                        code = 0;
                    }
                    // Steps 0-2 of four have a word each; step 3 lives in the top bits of their nibbles.
                    uint32_t* group = words + s / 4 * 3;
                    for (int bit = 0; bit < 3; bit++) {
                        int word = s % 4 < 3 ? s % 4 : bit, place = s % 4 < 3 ? bit : 3;
                        group[word] |= (uint32_t)(code >> bit & 1) << (4 * (at % 8) + place);
                    }
                    // Seven bits of mantissa and the sign of the pair's other element.
                    chunk[(s / 2 * 32 + lane) * 16 + s % 2 * 8 + at % 8] = (uint8_t)((x & 127) << 1 | partner >> 15);
                }
                for (int j = 0; j < 3; j++) memcpy(chunk + kRawBytes + (j * 32 + lane) * 8, words + 2 * j, 8);
            }
            size_t n_inline = std::min<size_t>(escaped.size(), kInline);
            uint8_t* header = chunk + kRawBytes + kCodeBytes;
            uint16_t n_in = (uint16_t)n_inline, n_over = (uint16_t)(escaped.size() - n_inline);
            uint32_t start = (uint32_t)overflow[tile].size();  // made absolute below
            memcpy(header, windows, 16);
            memcpy(header + 16, &n_in, 2);
            memcpy(header + 18, &n_over, 2);
            memcpy(header + 20, &start, 4);
            memcpy(header + kHeaderBytes, escaped.data(), 2 * n_inline);
            overflow[tile].insert(overflow[tile].end(), escaped.begin() + n_inline, escaped.end());
            escapes[tile] += escaped.size();
        }
    });
    uint64_t total = 0;
    for (int tile = 0; tile < n / kRows; tile++) {
        for (int c = 0; c < across; c++) {
            uint8_t* at = &out.chunks[((size_t)tile * across + c) * kFixedBytes] + kRawBytes + kCodeBytes + 20;
            uint32_t start;
            memcpy(&start, at, 4);
            start += (uint32_t)out.overflow.size();
            memcpy(at, &start, 4);
        }
        out.overflow.insert(out.overflow.end(), overflow[tile].begin(), overflow[tile].end());
        total += escapes[tile];
    }
    out.bits = (out.chunks.size() + 2 * out.overflow.size()) * 8.0 / w.size();
    out.escapes = (double)total / w.size();
    out.overflow.resize(out.overflow.size() + 64);
    return out;
}

static std::vector<uint16_t> to_fragments(const std::vector<uint16_t>& w, int n, int k) {
    std::vector<uint16_t> out(w.size());
    const int across = k / kCols;
    parallel(n / kRows, [&](int tile) {
        for (int c = 0; c < across; c++)
            for (int s = 0; s < 8; s++)
                for (int lane = 0; lane < 32; lane++)
                    for (int i = 0; i < 8; i++)
                        out[(((size_t)tile * across + c) * 8 + s) * 256 + lane * 8 + i] =
                            w[(size_t)(tile * kRows + fragment_row(lane, i)) * k + c * kCols + s * 16 + fragment_col(lane, i)];
    });
    return out;
}

// ---------------------------------------------------------------------------
// Device

struct Args {
    const uint8_t* chunks;
    const uint16_t* overflow;
    const uint8_t* symbols;
    const uint4* x;  // [M/8][K/32][lane]: B fragments of two k16 steps
    __nv_bfloat16* y;
    int n, k, m;
};

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(uint32_t bar) { asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar)); }
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(bar),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void copy_in(uint32_t to, const void* from, uint32_t n_bytes, uint32_t bar) {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(n_bytes) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "r"(n_bytes), "r"(bar), "l"(policy)
        : "memory");
}
__device__ __forceinline__ void mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Where in the warp's plane an escaped element lies.
__device__ __forceinline__ int escape_address(uint32_t escape) {
    uint32_t at = escape & 63, lane = escape >> 6 & 31;
    return ((at >> 4) * 32 + lane) * 16 + (at & 15);
}

/// What an escaped element's decoded exponent, the first of its row's window,
/// differs from the true one.
__device__ __forceinline__ uint8_t escape_patch(const uint8_t* windows, uint32_t escape, uint32_t exponent) {
    uint32_t row = (escape >> 8 & 7) + (escape >> 2 & 1) * 8;
    return (uint8_t)(windows[row] ^ exponent);
}

/// Decodes the 64 elements of a lane into eight A fragments.
__device__ __forceinline__ void decode_fixed(const uint8_t* chunk, const uint8_t* plane, int lane, uint32_t* a) {
    const uint8_t* windows = chunk + kRawBytes + kCodeBytes;
    const uint32_t upper = windows[lane / 4] * 0x01010101u + 0x03020100u, lower = windows[lane / 4 + 8] * 0x01010101u + 0x03020100u;
    const uint32_t upper_high = upper + 0x04040404u, lower_high = lower + 0x04040404u;
    uint2 p[3];
#pragma unroll
    for (int j = 0; j < 3; j++) p[j] = ((const uint2*)(chunk + kRawBytes))[j * 32 + lane];
    uint32_t words[6] = {p[0].x, p[0].y, p[1].x, p[1].y, p[2].x, p[2].y}, e[16];
#pragma unroll
    for (int s = 0; s < 8; s++) {
        const uint32_t* w = words + s / 4 * 3;
        uint32_t codes = s % 4 < 3 ? w[s % 4] & 0x77777777u
                                   : (w[0] >> 3 & 0x11111111u) | (w[1] >> 2 & 0x22222222u) | (w[2] >> 1 & 0x44444444u);
        e[2 * s] = __byte_perm(upper, upper_high, codes);
        e[2 * s + 1] = __byte_perm(lower, lower_high, codes >> 16);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint4 v = ((const uint4*)plane)[j * 32 + lane];
        e[4 * j] ^= v.x, e[4 * j + 1] ^= v.y, e[4 * j + 2] ^= v.z, e[4 * j + 3] ^= v.w;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint4 v = ((const uint4*)chunk)[j * 32 + lane];
        uint32_t raw[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int q = 0; q < 4; q++) {
            uint32_t first = __byte_perm(raw[q], e[4 * j + q], 0x5140), second = __byte_perm(raw[q], e[4 * j + q], 0x7362);
            // Upper row: registers 0 and 2 of the fragment; lower row: 1 and 3.
            a[8 * j + q / 2 * 4 + q % 2] = __funnelshift_r(first, first, 1);
            a[8 * j + q / 2 * 4 + q % 2 + 2] = __funnelshift_r(second, second, 1);
        }
    }
}

template <bool kDense, int kWarps, int kStages>
__global__ void __launch_bounds__(32 * kWarps, 2) product_kernel(const __grid_constant__ Args args) {
    constexpr uint32_t kBytes = kDense ? kDenseBytes : kFixedBytes;
    constexpr uint32_t kPlane = kDense ? 0 : 2 * kElems;  // two planes of one byte an element, used in turn
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint8_t* ring = shared + warp * kStages * kBytes;
    uint8_t* plane = shared + kWarps * kStages * kBytes + warp * kPlane;
    float* partial = (float*)(shared + kWarps * (kStages * kBytes + kPlane));  // [2][kWarps][128]
    uint64_t* bars = (uint64_t*)(partial + 2 * kWarps * 128);
    const uint32_t bar = shared_address(bars + warp * kStages);
    if (lane == 0) {
        for (int i = 0; i < kStages; i++) barrier_init(bar + 8 * i);
        asm volatile("fence.mbarrier_init.release.cluster;");
    }
    asm volatile("griddepcontrol.launch_dependents;");
    __syncwarp();
    const int n_tiles = args.n / kRows, across = args.k / kCols;
    const int first = across * warp / kWarps, end = across * (warp + 1) / kWarps, per = end - first;
    const int tiles = (n_tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x, total = tiles * per;
    // Where the next copy comes from.
    const uint8_t* source = args.chunks + ((size_t)blockIdx.x * across + first) * kBytes;
    const size_t next_tile = ((size_t)(gridDim.x - 1) * across + across - per) * kBytes;
    int issued = 0, column = 0;
    auto issue = [&](int stage) {
        if (lane == 0) copy_in(shared_address(ring + stage * kBytes), source, kBytes, bar + 8 * stage);
        issued++;
        source += kBytes;
        if (++column == per) column = 0, source += next_tile;
    };
    for (int i = 0; i < kStages && issued < total; i++) issue(i);
    if (!kDense)
        for (int i = lane; i < (int)kPlane / 16; i += 32) ((uint4*)plane)[i] = make_uint4(0, 0, 0, 0);
    const uint32_t symbol = kDense ? 0 : args.symbols[lane];
    __syncwarp();
    // Activations and output belong to the kernel before this one until here.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    int stage = 0, turn = 0;
    uint32_t parity = 0;
    for (int t = 0, tile = blockIdx.x; t < tiles; t++, tile += gridDim.x) {
        float acc[4] = {};
        for (int c = first; c < end; c++) {
            uint4 x[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                x[j] = lane / 4 < args.m ? __ldg(args.x + (size_t)(c * 4 + j) * 32 + lane) : make_uint4(0, 0, 0, 0);
            barrier_wait(bar + 8 * stage, parity);
            const uint8_t* chunk = ring + stage * kBytes;
            uint32_t a[32];
            if (kDense) {
#pragma unroll
                for (int s = 0; s < 8; s++) {
                    uint4 v = ((const uint4*)chunk)[s * 32 + lane];
                    a[4 * s] = v.x, a[4 * s + 1] = v.y, a[4 * s + 2] = v.z, a[4 * s + 3] = v.w;
                }
            } else {
                const uint8_t* windows = chunk + kRawBytes + kCodeBytes;
                const uint2 counts = *(const uint2*)(windows + 16);
                const uint32_t n_inline = counts.x & 0xFFFF, n_over = counts.x >> 16;
                uint8_t* patches = plane + turn * kElems;
                const uint32_t escape = ((const uint16_t*)(windows + kHeaderBytes))[lane];
                const uint32_t exponent = __shfl_sync(~0u, symbol, escape >> 11);
                if (lane < n_inline) patches[escape_address(escape)] = escape_patch(windows, escape, exponent);
#pragma unroll 1
                for (uint32_t i = 0; i < n_over; i += 32) {
                    uint32_t more = args.overflow[counts.y + min(i + lane, n_over - 1)];
                    uint32_t exponent = __shfl_sync(~0u, symbol, more >> 11);
                    if (i + lane < n_over) patches[escape_address(more)] = escape_patch(windows, more, exponent);
                }
                __syncwarp();
                decode_fixed(chunk, patches, lane, a);
                __syncwarp();
                // The plane is used again after the next chunk's two barriers.
                if (lane < n_inline) patches[escape_address(escape)] = 0;
#pragma unroll 1
                for (uint32_t i = lane; i < n_over; i += 32) patches[escape_address(args.overflow[counts.y + i])] = 0;
                turn ^= 1;
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                mma(acc, a + 8 * j, x[j].x, x[j].y);
                mma(acc, a + 8 * j + 4, x[j].z, x[j].w);
            }
            // The stage is filled again only when every lane's loads from it
            // have arrived: the products above have read them all.
            __syncwarp();
            if (issued < total) issue(stage);
            if (++stage == kStages) stage = 0, parity ^= 1;
        }
        float* sums = partial + (t & 1) * kWarps * 128;
        ((float4*)sums)[warp * 32 + lane] = make_float4(acc[0], acc[1], acc[2], acc[3]);
        __syncthreads();
        for (int i = threadIdx.x; i < 128; i += 32 * kWarps) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < kWarps; w++) sum += sums[w * 128 + i];
            int row = tile * kRows + i / 16 + (i % 4 >= 2) * 8, m = i / 4 % 4 * 2 + (i & 1);
            if (m < args.m) args.y[(size_t)m * args.n + row] = __float2bfloat16(sum);
        }
    }
}

template <bool kDense, int kWarps, int kStages>
static void launch(const Args& args, int blocks, bool chained, cudaStream_t stream) {
    constexpr int bytes = kWarps * (kStages * (kDense ? kDenseBytes : kFixedBytes) + (kDense ? 0 : 2 * kElems)) +
                          2 * kWarps * 128 * 4 + kWarps * kStages * 8;
    auto kernel = product_kernel<kDense, kWarps, kStages>;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(std::min(blocks, args.n / kRows));
    config.blockDim = dim3(32 * kWarps);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = chained ? 1 : 0;
    CHECK(cudaLaunchKernelEx(&config, kernel, args));
}

// ---------------------------------------------------------------------------
// Check and time

static uint16_t to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static float from_bf16(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/// Gaussian weights whose standard deviation varies from row to row.
static std::vector<uint16_t> random_weights(int n, int k) {
    std::vector<uint16_t> w((size_t)n * k);
    parallel(n, [&](int row) {
        std::mt19937 rng(n * 7 + k * 3 + row);
        std::normal_distribution<float> normal;
        float sigma = 0.02f * expf(0.25f * normal(rng));
        uint64_t state = 88172645463325252ull + (uint64_t)row * 0x9E3779B97F4A7C15ull;
        auto next = [&] { state ^= state << 13; state ^= state >> 7; return state ^= state << 17; };
        for (int i = 0; i < 8; i++) next();
        for (int col = 0; col < k; col += 2) {
            float u = ((next() >> 40) + 1) / 16777217.f, angle = 6.2831853f * (next() >> 40) / 16777216.f;
            float radius = sigma * sqrtf(-2 * logf(u));
            w[(size_t)row * k + col] = to_bf16(radius * cosf(angle));
            w[(size_t)row * k + col + 1] = to_bf16(radius * sinf(angle));
        }
    });
    return w;
}

/// Median microseconds of a launch in a graph of many, each with other weights.
static double time_graph(cudaStream_t stream, int n, const std::function<void(int)>& run) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < n; i++) run(i);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t start, stop;
    cudaEventCreate(&start);
    cudaEventCreate(&stop);
    std::vector<float> times;
    for (int i = 0; i < 12; i++) {
        cudaEventRecord(start, stream);
        CHECK(cudaGraphLaunch(exec, stream));
        cudaEventRecord(stop, stream);
        CHECK(cudaEventSynchronize(stop));
        float ms;
        cudaEventElapsedTime(&ms, start, stop);
        if (i >= 3) times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    return times[times.size() / 2] * 1e3 / n;
}

template <class T>
static T* upload(const std::vector<T>& v) {
    T* p;
    CHECK(cudaMalloc(&p, v.size() * sizeof(T)));
    CHECK(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

int main() {
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    const int sms = device.multiProcessorCount, m = 8;
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    cublasHandle_t blas;
    CHECK(cublasCreate(&blas));
    CHECK(cublasSetStream(blas, stream));
    void* workspace;
    CHECK(cudaMalloc(&workspace, 64 << 20));
    CHECK(cublasSetWorkspace(blas, workspace, 64 << 20));
    printf("%s, %d SMs; microseconds, chained = programmatic dependent launch\n", device.name, sms);
    printf("%12s %6s %6s %8s | %8s %8s | %8s %8s | %8s %8s %8s | speed-up over cublas: dense, fixed, both chained\n", "shape", "bits",
           "esc %", "cublas", "dense", "chained", "w8s3", "chained", "w8s2", "w4s3", "same?");
    const int shapes[][2] = {{4096, 4096}, {6144, 4096}, {4096, 14336}, {28672, 4096}, {8192, 8192}, {8192, 28672}};
    for (auto& shape : shapes) {
        const int n = shape[0], k = shape[1];
        const size_t elems = (size_t)n * k;
        const int copies = std::min(24, std::max(2, (int)((400u << 20) / elems)));
        auto w = random_weights(n, k);
        Fixed fixed = encode_fixed(w, n, k);
        auto fragments = to_fragments(w, n, k);
        std::vector<uint16_t*> dense(copies), row_major(copies);
        std::vector<uint8_t*> chunks(copies);
        for (int i = 0; i < copies; i++) dense[i] = upload(fragments), row_major[i] = upload(w), chunks[i] = upload(fixed.chunks);
        std::vector<uint8_t> symbols(fixed.symbols, fixed.symbols + 32);
        std::mt19937 rng(5);
        std::normal_distribution<float> normal;
        std::vector<uint16_t> x((size_t)m * k);
        for (auto& v : x) v = to_bf16(normal(rng));
        std::vector<uint32_t> b((size_t)k / 32 * 128);
        for (int i = 0; i < k / 32; i++)
            for (int lane = 0; lane < 32; lane++)
                for (int s = 0; s < 2; s++)
                    for (int q = 0; q < 2; q++) {
                        int col = i * 32 + s * 16 + lane % 4 * 2 + q * 8;
                        const uint16_t* at = &x[(size_t)(lane / 4) * k + col];
                        b[((size_t)i * 32 + lane) * 4 + s * 2 + q] = at[0] | (uint32_t)at[1] << 16;
                    }
        __nv_bfloat16 *y, *reference;
        CHECK(cudaMalloc(&y, (size_t)m * n * 2));
        CHECK(cudaMalloc(&reference, (size_t)m * n * 2));
        uint16_t* dx = upload(x);
        Args args = {nullptr, upload(fixed.overflow), upload(symbols), (const uint4*)upload(b), y, n, k, m};
        auto with = [&](const void* weights, __nv_bfloat16* out) {
            Args a = args;
            a.chunks = (const uint8_t*)weights;
            a.y = out;
            return a;
        };
        const float one = 1, zero = 0;
        double cublas = time_graph(stream, 2 * copies, [&](int i) {
            CHECK(cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, n, 1, k, &one, row_major[i % copies], CUDA_R_16BF, k, dx, CUDA_R_16BF, k,
                               &zero, y, CUDA_R_16BF, n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
        });
        // The twin against double precision, the fused kernels against the twin, bit for bit.
        std::vector<uint16_t> expected((size_t)m * n), got((size_t)m * n);
        CHECK(cudaMemset(reference, 0xFF, expected.size() * 2));
        launch<true, 8, 3>(with(dense[0], reference), 2 * sms, false, stream);
        CHECK(cudaStreamSynchronize(stream));
        CHECK(cudaMemcpy(expected.data(), reference, expected.size() * 2, cudaMemcpyDeviceToHost));
        double error = 0, norm = 0;
        for (int i = 0; i < 256; i++) {
            int row = (int)((uint64_t)i * 2654435761u % n), token = i % m;
            double sum = 0;
            for (int c = 0; c < k; c++) sum += (double)from_bf16(w[(size_t)row * k + c]) * from_bf16(x[(size_t)token * k + c]);
            double d = from_bf16(expected[(size_t)token * n + row]) - sum;
            error += d * d, norm += sum * sum;
        }
        bool same = sqrt(error / norm) < 4e-3;
        printf("relative error of the twin %g\n", sqrt(error / norm));
        auto check = [&](const std::function<void(const Args&)>& run) {
            CHECK(cudaMemset(y, 0xFF, got.size() * 2));
            run(with(chunks[copies - 1], y));
            CHECK(cudaStreamSynchronize(stream));
            CHECK(cudaMemcpy(got.data(), y, got.size() * 2, cudaMemcpyDeviceToHost));
            same = same && memcmp(got.data(), expected.data(), got.size() * 2) == 0;
        };
        check([&](const Args& a) { launch<false, 8, 3>(a, 2 * sms, false, stream); });
        check([&](const Args& a) { launch<false, 8, 2>(a, 2 * sms, false, stream); });
        int tokens = 1;
        auto timed = [&](bool is_dense, bool chained, int variant) {
            return time_graph(stream, 2 * copies, [&](int i) {
                Args a = with(is_dense ? (void*)dense[i % copies] : (void*)chunks[i % copies], y);
                a.m = tokens;
                if (is_dense) launch<true, 8, 3>(a, 2 * sms, chained, stream);
                else if (variant == 0) launch<false, 8, 3>(a, 2 * sms, chained, stream);
                else if (variant == 1) launch<false, 8, 2>(a, 2 * sms, chained, stream);
                else launch<false, 4, 3>(a, 4 * sms, chained, stream);
            });
        };
        for (int many : {1, 8}) {
            tokens = many;
        double d0 = timed(true, false, 0), d1 = timed(true, true, 0), f0 = timed(false, false, 0), f1 = timed(false, true, 0);
        double f2 = timed(false, true, 1), f3 = timed(false, true, 2);
        printf("%6dx%5d %6.3f %6.2f %8.2f | %8.2f %8.2f | %8.2f %8.2f | %8.2f %8.2f %8s | %.2f %.2f, %.2f %.2f  (%.2f TB/s)\n", n, k,
               fixed.bits, 100 * fixed.escapes, cublas, d0, d1, f0, f1, f2, f3, same ? "same" : "DIFFER", cublas / d0, cublas / f0,
               cublas / d1, cublas / f1, fixed.chunks.size() / f1 / 1e6);
        }
        for (int i = 0; i < copies; i++) cudaFree(dense[i]), cudaFree(row_major[i]), cudaFree(chunks[i]);
        cudaFree(y), cudaFree(reference), cudaFree(dx), cudaFree((void*)args.overflow), cudaFree((void*)args.symbols), cudaFree((void*)args.x);
    }
    return 0;
}
