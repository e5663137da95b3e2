// Fused product from entropy-coded weights: rANS decode, dequantise, multiply and
// accumulate in one launch, against the dense twin (same reduction) and cuBLAS.
//
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o rans_product rans_product.cu -lcublas
//   ./rans_product [--small | --profile] [dump of a packed tensor ...]
#include <cublas_v2.h>
#include <cuda_fp16.h>

#include "../kernels/rans_product.cuh"
#include "rans_host.cuh"

using namespace lab;

template <Weights kWeights, class AnyTable, int kWarps, int kBuffers, int kBlocks, int kTokens>
__global__ void __launch_bounds__(32 * kWarps, kBlocks) product_kernel(const __grid_constant__ ProductArgs args) {
    product_body<kWeights, AnyTable, kWarps, kBuffers, kTokens>(args);
}

template <Weights kWeights, class AnyTable, int kBuffers, int kBlocks, int kTokens>
static void launch(const ProductArgs& args, int sms, cudaStream_t stream) {
    constexpr int kWarps = 16;
    const int shared = product_shared<kWeights, AnyTable, kWarps, kBuffers, kTokens>(args.matrix);
    auto kernel = product_kernel<kWeights, AnyTable, kWarps, kBuffers, kBlocks, kTokens>;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    const int strips = args.matrix.rows / 16, per = kWarps / args.slices;
    kernel<<<std::min(sms * kBlocks, (strips + per - 1) / per), 32 * kWarps, shared, stream>>>(args);
    CHECK(cudaGetLastError());
}

/// What a table is made of.
template <class AnyTable>
constexpr Lookup kLookup = kSlots;
template <>
constexpr Lookup kLookup<Buckets> = kBucketed;
template <>
constexpr Lookup kLookup<Mixed> = kMixed;

static uint16_t to_f16(float f) { return __half_as_ushort(__float2half_rn(f)); }
static float from_f16(uint16_t h) { return __half2float(__ushort_as_half(h)); }

struct Bench {
    int sms;
    bool profile;
    cudaStream_t stream;
    cublasHandle_t blas;

    void run(const char* name, const Tensor& t, const Packed& p) {
        const bool int8 = t.elem_bytes == 1;
        const int n = t.rows, k = t.cols, tokens = 64;
        const size_t elems = t.elems.size();
        std::random_device entropy;
        std::mt19937 rng(entropy());
        std::normal_distribution<float> normal;
        // Original weights as the twin has them.
        std::vector<float> scales(n);
        for (auto& s : scales) s = 0.003f * expf(0.3f * normal(rng));
        std::vector<uint16_t> w(elems);
        parallel(n, [&](int row) {
            for (int c = 0; c < k; c++) {
                const uint16_t e = t.elems[(size_t)row * k + c];
                w[(size_t)row * k + c] = int8 ? to_f16((float)(int8_t)e * scales[row]) : e;
            }
        });
        std::vector<uint16_t> fragments(elems);
        parallel(n / 16, [&](int strip) {
            for (int c = 0; c < k / 16; c++)
                for (int lane = 0; lane < 32; lane++)
                    for (int j = 0; j < 8; j++)
                        fragments[(((size_t)strip * (k / 16) + c) * 32 + lane) * 8 + j] =
                            w[(size_t)(strip * 16 + fragment_row(lane, j)) * k + c * 16 + fragment_col(lane, j)];
        });
        std::vector<uint16_t> x((size_t)tokens * k);
        for (auto& v : x) v = int8 ? to_f16(normal(rng)) : to_bf16(normal(rng));
        const int pairs = (k + 127) / 128 * 4;
        std::vector<uint32_t> b((size_t)pairs * 128 * (tokens / 8));
        for (int i = 0; i < pairs * (tokens / 8); i++)
            for (int lane = 0; lane < 32; lane++)
                for (int s = 0; s < 2; s++)
                    for (int q = 0; q < 2; q++) {
                        const int col = i % pairs * 32 + s * 16 + lane % 4 * 2 + q * 8;
                        if (col >= k) continue;
                        const uint16_t* at = &x[(size_t)(i / pairs * 8 + lane / 4) * k + col];
                        b[((size_t)i * 32 + lane) * 4 + s * 2 + q] = at[0] | (uint32_t)at[1] << 16;
                    }
        const int copies = (int)std::max<size_t>(2, std::min<size_t>(24, (300u << 20) / elems));
        std::vector<Loaded> slots, buckets, mixed;
        std::vector<uint16_t*> dense, rows;
        for (int i = 0; i < copies; i++) slots.push_back(load(p, kSlots)), buckets.push_back(load(p, kBucketed)), mixed.push_back(load(p, kMixed)), dense.push_back(upload(fragments)), rows.push_back(upload(w));
        uint32_t* d_b = upload(b);
        uint16_t* d_x = upload(x);
        float* d_scales = upload(scales);
        uint16_t* y = poisoned<uint16_t>((size_t)tokens * n);
        const uint32_t slices = transom::slices(n, k);
        auto of = [&](Lookup lookup) -> std::vector<Loaded>& { return lookup == kBucketed ? buckets : lookup == kMixed ? mixed : slots; };
        auto args = [&](int i, int m, Lookup lookup = kSlots) {
            return ProductArgs{of(lookup)[i].matrix, (const uint4*)dense[i], (const uint4*)d_b, d_scales, nullptr, y, (uint32_t)m, slices, 1, (uint32_t)n};
        };
        printf("%-12s %6dx%6d %6.3f, %.1f rows, most %u, %u bytes of buckets, load %.0f us", name, n, k, slots[0].bits, slots[0].rows, slots[0].most_rows, buckets[0].matrix.table_bytes, slots[0].load_us);
        for (auto* l : {&slots[0], &buckets[0], &mixed[0]}) if (l->first_bad != ~0ull) printf(" BAD TILE %llx", (unsigned long long)l->first_bad);
        std::vector<uint16_t> expected((size_t)tokens * n), got((size_t)tokens * n);
        auto result = [&](std::vector<uint16_t>& to, const std::function<void()>& go) {
            CHECK(cudaMemset(y, 0xFF, to.size() * 2));
            go();
            CHECK(cudaDeviceSynchronize());
            CHECK(cudaMemcpy(to.data(), y, to.size() * 2, cudaMemcpyDeviceToHost));
        };
        auto twin = [&](const ProductArgs& a) { int8 ? launch<kTwinF16, Slots, 1, 2, 8>(a, sms, stream) : launch<kTwinBf16, Slots, 1, 2, 8>(a, sms, stream); };
        auto twin64 = [&](const ProductArgs& a) { int8 ? launch<kTwinF16, Slots, 1, 1, 64>(a, sms, stream) : launch<kTwinBf16, Slots, 1, 1, 64>(a, sms, stream); };
        result(expected, [&] { twin64(args(0, tokens)); });
        // The first eight tokens alone give the same.
        result(got, [&] { twin(args(0, 8)); });
        if (memcmp(got.data(), expected.data(), (size_t)8 * n * 2)) printf(" BATCHES DIFFER");
        double error = 0, norm = 0;
        for (int i = 0; i < 256; i++) {
            const int row = (int)((uint64_t)i * 2654435761u % n), token = i % tokens;
            double sum = 0;
            for (int c = 0; c < k; c++)
                sum += int8 ? (double)from_f16(w[(size_t)row * k + c]) * from_f16(x[(size_t)token * k + c]) : (double)from_bf16(w[(size_t)row * k + c]) * from_bf16(x[(size_t)token * k + c]);
            const uint16_t o = expected[(size_t)token * n + row];
            const double d = (int8 ? from_f16(o) : from_bf16(o)) - sum;
            error += d * d, norm += sum * sum;
        }
        printf(" err %.1e", sqrt(error / norm));
        const float one = 1, zero = 0;
        const auto type = int8 ? CUDA_R_16F : CUDA_R_16BF;
        const double cublas = profile ? 0 : time_graph(stream, 2 * copies, [&](int i) {
            CHECK(cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, n, 1, k, &one, rows[i % copies], type, k, d_x, type, k, &zero, y, type, n,
                               CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
        });
        const double twin_us = profile ? 0 : time_graph(stream, 2 * copies, [&](int i) { twin(args(i % copies, 1)); });
        printf(" cublas %6.2f twin %6.2f |", cublas, twin_us);
        auto variant = [&](const char* label, int most, Lookup lookup, auto go) {
            if (of(lookup)[0].lookup == kGeneral) return;
            result(got, [&] { go(args(copies - 1, most, lookup)); });
            bool same = memcmp(got.data(), expected.data(), (size_t)most * n * 2) == 0;
            if (profile) {
                printf(" %s %s |", label, same ? "same" : "DIFFER");
                return;
            }
            for (size_t i = (size_t)most * n; i < got.size(); i++) same = same && got[i] == 0xFFFF;
            result(got, [&] { go(args(copies - 1, most - 3, lookup)); });
            same = same && memcmp(got.data(), expected.data(), (size_t)(most - 3) * n * 2) == 0 && got[(size_t)(most - 3) * n] == 0xFFFF;
            const double one_us = time_graph(stream, 2 * copies, [&](int i) { go(args(i % copies, 1, lookup)); });
            const double most_us = time_graph(stream, 2 * copies, [&](int i) { go(args(i % copies, most, lookup)); });
            // The same weights again and again: from L2, if they fit.
            const double hot_us = time_graph(stream, 2 * copies, [&](int) { go(args(0, 1, lookup)); });
            auto rate = [&](double us) { return elems / (us * 1e-6) / (sms * 1.98e9); };
            printf(" %s %6.2f %6.2f us %.2fx %.2f %.2f %s |", label, one_us, most_us, cublas / one_us, rate(one_us), rate(hot_us), same ? "same" : "DIFFER");
        };
        // In the label: buffers of words a warp x blocks an SM.
#define VARIANT(label, tokens, weights, table, buffers, blocks) \
    variant(label, tokens, kLookup<table>, [&](const ProductArgs& a) { launch<weights, table, buffers, blocks, tokens>(a, sms, stream); });
        if (int8) {
            VARIANT("slots 1x2", 8, kInt8, Slots, 1, 2)
            VARIANT("high 1x2", 8, kInt8, SlotsHigh, 1, 2)
            VARIANT("buckets 1x2", 8, kInt8, Buckets, 1, 2)
            VARIANT("64", 64, kInt8, Slots, 1, 1)
        } else {
            VARIANT("slots 2x2", 8, kBf16, Slots, 2, 2)
            VARIANT("slots 1x2", 8, kBf16, Slots, 1, 2)
            VARIANT("high 2x2", 8, kBf16, SlotsHigh, 2, 2)
            VARIANT("slots 1x3", 8, kBf16, Slots, 1, 3)
            VARIANT("buckets 2x2", 8, kBf16, Buckets, 2, 2)
            VARIANT("mixed 1x2", 8, kBf16, Mixed, 1, 2)
            VARIANT("64", 64, kBf16, Slots, 2, 1)
        }
#undef VARIANT
        printf("\n");
        fflush(stdout);
        for (auto& l : slots) l.release();
        for (auto& l : buckets) l.release();
        for (auto& l : mixed) l.release();
        for (auto d : dense) cudaFree(d);
        for (auto d : rows) cudaFree(d);
        cudaFree(d_b), cudaFree(d_x), cudaFree(d_scales), cudaFree(y);
    }
};

int main(int argc, char** argv) {
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    Bench bench;
    bench.sms = device.multiProcessorCount;
    CHECK(cudaStreamCreate(&bench.stream));
    CHECK(cublasCreate(&bench.blas));
    CHECK(cublasSetStream(bench.blas, bench.stream));
    void* workspace;
    CHECK(cudaMalloc(&workspace, 64 << 20));
    CHECK(cublasSetWorkspace(bench.blas, workspace, 64 << 20));
    printf("%s, %d SMs; bits in memory; a variant: M = 1, M = 8 or 64, speed-up over cublas at M = 1, weights a clock and SM at 1.98 GHz, cold and always the same\n", device.name, bench.sms);
    std::random_device entropy;
    // --small: shapes for a memory checker; --profile: one large shape, each variant once.
    auto option = [&](const char* name) { return argc > 1 && !strcmp(argv[1], name); };
    const bool small = option("--small"), profile = option("--profile");
    bench.profile = profile;
    if (small || profile) argc--, argv++;
    const std::pair<int, int> shapes[] = {{176, 1104}, {1024, 1024}, {4096, 4096}, {6144, 4096}, {4096, 14336}, {28672, 4096}, {8192, 8192}};
    for (int bytes : {2, 1})
        for (auto& shape : shapes) {
            if (bytes == 1 && shape.first == 8192) continue;
            if ((profile && shape.first != 28672) || (small && shape.first > 1024)) continue;
            Tensor t = random_weights(shape.first, shape.second, bytes, entropy());
            bench.run(bytes == 2 ? "bf16" : "int8", t, pack(t, 12));
        }
    for (int i = 1; i < argc; i++) {
        Tensor t;
        Packed p;
        if (!read_dump(argv[i], t, p)) { printf("cannot read %s\n", argv[i]); return 1; }
        const char* name = strrchr(argv[i], '/') ? strrchr(argv[i], '/') + 1 : argv[i];
        if (t.rows % 128 == 0) stack(t, p, std::max(1, (int)(60000000 / t.elems.size())));
        bench.run(name, t, p);
    }
    return 0;
}
