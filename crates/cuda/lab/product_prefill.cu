// Check and timing of kernels/product_prefill.cuh: products of more than 64
// tokens from fixed-rate weights against their dense twins (bit for bit) and
// cuBLAS (time).
//
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -DFORMATS=0 -o product_prefill product_prefill.cu -lcublas -lcublasLt
//   product_prefill check | time [tokens,...] [shape index,...]
//
// FORMATS: 0 BF16 (3 bits), otherwise all others. With SPLIT=0 in the environment no piece of work is shared, with FAST cuBLAS is
// cublasGemmEx alone.
#include <cuda.h>

#include "../kernels/product_prefill.cuh"
#include "fixed_host.cuh"

template <WeightFormat kFormat, int kTokens8>
__global__ void __launch_bounds__(kPrefillThreads, 1) __cluster_dims__(kPrefillCluster, 1, 1) prefill_kernel(const __grid_constant__ PrefillParams p) {
#if TRANSOM_WGMMA
    product_prefill<kFormat, kTokens8>(p);
#endif
}
struct Variant {
    std::string name;
    WeightFormat format;
    int tokens8;
    void (*kernel)(PrefillParams);
    uint32_t (*shared)(uint32_t);
};
#define V(f, t) {#f " " #t, f, t, prefill_kernel<f, t>, prefill_shared_bytes<f, t>}
#define VS(f) V(f, 32), V(f, 16)
static std::vector<Variant> variants = {
#if FORMATS == 0
    VS(kDenseBf16), VS(kFixedBf16x3),
#else
    VS(kDenseInt8), VS(kFixedInt8x5), VS(kFixedInt8x6), VS(kFixedInt8x7), VS(kDenseF16), VS(kFixedF16x3), VS(kDenseBf16), VS(kFixedBf16x4),
#endif
};
static int n_sms;
static float* workspace;
static uint32_t* words;

static CUresult (*encode_map)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static TensorMap map_of(const Variant& v, const void* x, int m, int k, int stride) {
    TensorMap out;
    CUtensorMap map;
    const cuuint64_t dims[2] = {(cuuint64_t)k, (cuuint64_t)m}, strides[1] = {(cuuint64_t)stride * 2};
    const cuuint32_t box[2] = {kPrefillCols, (cuuint32_t)v.tokens8 * 8 / kPrefillCluster}, steps[2] = {1, 1};
    CHECK(encode_map(&map, is_half(v.format) ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void*)x, dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
    memcpy(&out, &map, sizeof out);
    return out;
}
static void launch(const Variant& v, ProductParams p, const TensorMap& map, cudaStream_t stream) {
    p.n_tiles = p.segments[p.n_segments - 1].end_tile;
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[1];
    const uint32_t pieces = ((p.n_tiles + 15) / 16) * ((p.tokens + v.tokens8 * 8 - 1) / (v.tokens8 * 8)), C = n_sms / kPrefillCluster;
    uint32_t whole = pieces, n = std::min(C, pieces);
    p.workspace = workspace, p.meetings = words;
    if (pieces % C != 0 && !(getenv("SPLIT") && atoi(getenv("SPLIT")) == 0)) {
        if (pieces > C) whole = (pieces / C - 1) * C, n = C;
        else whole = 0, n = pieces * 2 > C ? C : C / pieces * pieces;
    }
    config.gridDim = dim3(n * kPrefillCluster);
    config.blockDim = dim3(kPrefillThreads);
    config.dynamicSmemBytes = v.shared(p.chunk_bytes);
    CHECK(cudaFuncSetAttribute((const void*)v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.dynamicSmemBytes));
    config.stream = stream;
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attributes, config.numAttrs = 1;
    CHECK(cudaLaunchKernelEx(&config, v.kernel, PrefillParams{p, map, whole}));
}
static int check() {
    int failures = 0, checks = 0;
    std::mt19937 rng(std::random_device{}());
    std::normal_distribution<float> normal;
    const int shapes[][3] = {{16, 128, 65}, {128, 64, 100}, {272, 2000, 300}, {129, 136, 513}, {15, 17, 70}, {4104, 1024, 700}, {640, 4096, 256}, {5000, 264, 1000}};
    for (auto& shape : shapes)
        for (int kind = 0; kind < 4; kind++) {
            const int n = shape[0], k = shape[1], m = shape[2], stride = (k + 7) / 8 * 8;
            std::vector<WeightFormat> formats;
            for (auto& v : variants) if (!is_dense(v.format) && std::find(formats.begin(), formats.end(), v.format) == formats.end()) formats.push_back(v.format);
            for (WeightFormat f : formats) {
                const bool half = is_half(f);
                auto w = make_weights(f, kind, n, k, rng);
                std::vector<float> scale(n);
                for (auto& s : scale) s = ldexpf(1 + rng() % (1 << 23) / (float)(1 << 23), -14 + (int)(rng() % 4));
                std::vector<uint16_t> x((size_t)m * stride, 0x7FFF), bias(n);
                for (int i = 0; i < m; i++) for (int c = 0; c < k; c++) { const float r = normal(rng); x[(size_t)i * stride + c] = half ? as_half(r) : to_bf16(r); }
                for (auto& b : bias) { const float r = normal(rng); b = half ? as_half(r) : to_bf16(r); }
                uint16_t* dx = upload(x), *db = upload(bias), *y;
                CHECK(cudaMalloc(&y, ((size_t)m * n + 32) * 2));
                std::map<int, std::vector<uint16_t>> references;
                for (int twin = 1; twin >= 0; twin--) {
                    Matrix q = encode(twin ? twin_of(f) : f, kind == 1 ? 40 : kind == 2 ? 0 : 32, w, n, k, scale);
                    ProductParams p = {};
                    p.segments[0] = {q.overflow.empty() ? nullptr : upload(q.overflow), upload(std::vector<uint8_t>(q.symbols, q.symbols + 32)), q.scales.empty() ? nullptr : upload(q.scales), (uint32_t)(n + 15) / 16, 1};
                    p.chunks = upload(q.chunks);
                    p.y = y, p.bias = db, p.rows = n, p.cols = k, p.tokens = m, p.n_segments = 1, p.chunk_bytes = q.bytes;
                    for (auto& v : variants) {
                        if (v.format != q.format) continue;
                        for (int again = 0; again < (n == 640 ? 20 : 2); again++) {
                            CHECK(cudaMemset(y, 0xFF, ((size_t)m * n + 32) * 2));
                            launch(v, p, map_of(v, dx, m, k, stride), 0);
                            CHECK(cudaDeviceSynchronize());
                            std::vector<uint16_t> got((size_t)m * n + 32);
                            CHECK(cudaMemcpy(got.data(), y, got.size() * 2, cudaMemcpyDeviceToHost));
                            auto& reference = references[v.tokens8];
                            if (reference.empty()) {
                                reference = got;
                                if (kind == 0 && !is_int8(f)) {
                                    double error = 0, norm = 0;
                                    for (int i = 0; i < 300; i++) {
                                        const int row = rng() % n, token = rng() % m;
                                        double sum = widen(half, bias[row]);
                                        for (int c = 0; c < k; c++) sum += (double)widen(half, w[(size_t)row * k + c]) * widen(half, x[(size_t)token * stride + c]);
                                        const double d = widen(half, got[(size_t)token * n + row]) - sum;
                                        error += d * d, norm += sum * sum;
                                    }
                                    if (!(sqrt(error / norm) < 4e-3)) failures++, printf("twin is wrong: %dx%d error %g\n", n, k, sqrt(error / norm));
                                }
                            }
                            checks++;
                            for (int i = 0; i < 32; i++) if (got[(size_t)m * n + i] != 0xFFFF) { printf("beyond the end\n"), failures++; break; }
                            if (memcmp(got.data(), reference.data(), got.size() * 2) != 0) {
                                size_t i = 0;
                                while (got[i] == reference[i]) i++;
                                if (failures++ < 20) printf("DIFFER %s %dx%d m %d kind %d: token %zu row %zu: %04x, twin %04x\n", v.name.c_str(), n, k, m, kind, i / n, i % n, got[i], reference[i]);
                            }
                        }
                    }
                    cudaFree((void*)p.chunks);
                }
                cudaFree(dx), cudaFree(db), cudaFree(y);
            }
        }
    printf("%d checks, %d failures\n", checks, failures);
    return failures;
}

static void time_all(const std::vector<int>& batches, const std::vector<int>& which) {
    const Gemm gemm;
    const cudaStream_t stream = gemm.stream;
    for (int index : which) {
        const int n = layer_shapes[index][0], k = layer_shapes[index][1], n0 = std::min(n, 512);
        const bool half = is_half(variants[0].format);
        const int m_max = *std::max_element(batches.begin(), batches.end());
        const size_t elems = (size_t)n * k;
        const int copies = (int)std::max<size_t>(1, (210u << 20) / elems + (elems < (210u << 20)));
        std::mt19937 rng(n + k);
        auto wd = make_weights(half ? kDenseF16 : kDenseBf16, 0, n0, k, rng);
        std::vector<uint16_t*> row_major(copies);
        std::vector<uint8_t> wbytes((uint8_t*)wd.data(), (uint8_t*)(wd.data() + wd.size()));
        for (auto& p : row_major) p = (uint16_t*)replicate(wbytes, 2 * elems);
        std::normal_distribution<float> normal;
        std::vector<uint16_t> x((size_t)m_max * k);
        parallel(m_max, [&](int i) { std::mt19937 r(i); std::normal_distribution<float> g; for (int c = 0; c < k; c++) { const float f = g(r); x[(size_t)i * k + c] = half ? as_half(f) : to_bf16(f); } });
        uint16_t* dx = upload(x), *y;
        CHECK(cudaMalloc(&y, (size_t)m_max * n * 2));
        const cudaDataType_t type = half ? CUDA_R_16F : CUDA_R_16BF;
        std::vector<Matrix> ms;
        std::vector<std::vector<uint8_t*>> all;
        for (auto& v : variants) {
            std::vector<float> scales(n0, 0.001f);
            ms.push_back(encode(v.format, 40, is_int8(v.format) ? make_weights(v.format, 0, n0, k, rng) : wd, n0, k, scales));
            while (!ms.back().scales.empty() && ms.back().scales.size() < (size_t)n) ms.back().scales.push_back(ms.back().scales[0]);
            all.emplace_back(copies);
            for (auto& p : all.back()) p = replicate(ms.back().chunks, (size_t)(n / 16) * (k / 128) * ms.back().bytes);
        }
        for (int m : batches) {
            const double flop = 2.0 * m * n * k;
            const int reps = std::max(4, std::min(2 * copies, (int)(30e-3 * 700e12 / flop)));
            const double first = gemm.time(m, n, k, type, row_major, dx, y, reps);
            const double best = getenv("FAST") ? first : std::min(first, gemm.time_lt(m, n, k, type, row_major, dx, y, reps));
            printf("%6dx%5d M %4d cublas %8.2f us (gemmex %8.2f) %5.0f TFLOPS |", n, k, m, best, first, flop / best / 1e6);
            for (size_t i = 0; i < variants.size(); i++) {
                auto& v = variants[i];
                ProductParams p = {};
                p.segments[0] = {ms[i].overflow.empty() ? nullptr : upload(ms[i].overflow), upload(std::vector<uint8_t>(ms[i].symbols, ms[i].symbols + 32)), ms[i].scales.empty() ? nullptr : upload(ms[i].scales), (uint32_t)n / 16, 1};
                p.y = y, p.rows = n, p.cols = k, p.n_segments = 1, p.chunk_bytes = ms[i].bytes, p.tokens = m;
                const TensorMap map = map_of(v, dx, m, k, k);
                const double us = time_graph(stream, reps, [&](int c) {
                    ProductParams q = p;
                    q.chunks = all[i][c % copies];
                    launch(v, q, map, stream);
                });
                printf(" %s %8.2f %.3f |", v.name.c_str() + 1, us, best / us);
            }
            // Again, to see the drift.
            printf(" gemmex again %.2f\n", gemm.time(m, n, k, type, row_major, dx, y, reps));
            fflush(stdout);
        }
        for (auto p : row_major) cudaFree(p);
        for (auto& a : all) for (auto p : a) cudaFree(p);
        cudaFree(dx), cudaFree(y);
    }
}
int main(int argc, char** argv) {
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    n_sms = device.multiProcessorCount;
    cudaDriverEntryPointQueryResult q;
    CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void**)&encode_map, 12000, cudaEnableDefault, &q));
    CHECK(cudaMalloc(&workspace, 32 << 20)); CHECK(cudaMalloc(&words, 8192)); CHECK(cudaMemset(words, 0, 8192)); CHECK(cudaDeviceSynchronize());
    printf("%s, %d SMs\n", device.name, n_sms);
    if (argc > 1 && !strcmp(argv[1], "time")) {
        time_all(numbers(argc > 2 ? argv[2] : "512,2048,8192"), numbers(argc > 3 ? argv[3] : "0,1,2,3,4,5,6,7,8"));
        return 0;
    }
    return check() != 0;
}
