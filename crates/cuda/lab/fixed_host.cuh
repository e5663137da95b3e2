// What programs of this folder that multiply fixed-rate weights share: an
// encoder of its own, weights, timing.
#pragma once

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../kernels/fixed.cuh"

using namespace transom;

#define CHECK(call)                                                                  \
    do {                                                                             \
        auto status_ = (call);                                                       \
        if (status_ != 0) {                                                          \
            printf("%s:%d: %s failed: %d\n", __FILE__, __LINE__, #call, (int)status_); \
            exit(1);                                                                 \
        }                                                                            \
    } while (0)

template <class F>
static void parallel(int n, F f) {
    const int threads = std::min(16u, std::max(1u, std::thread::hardware_concurrency()));
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; t++) pool.emplace_back([&, t] { for (int i = t; i < n; i += threads) f(i); });
    for (auto& thread : pool) thread.join();
}

// ---------------------------------------------------------------------------
// Host: encoding. Elements are u16, INT8 ones in the low byte.

static int fragment_row(int lane, int i) { return lane / 4 + (i >> 1 & 1) * 8; }
static int fragment_col(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >> 2 & 1) * 8; }

struct Matrix {
    WeightFormat format;
    int n, k;
    uint32_t bytes;  // of a chunk
    std::vector<uint8_t> chunks;
    std::vector<uint32_t> overflow;
    uint8_t symbols[32] = {};
    std::vector<RowScale> scales;
    double bits = 0, escapes = 0;
};

/// The byte of an element whose windows are coded.
static int key_of(WeightFormat f, uint16_t x) {
    return is_int8(f) ? (x ^ 0x80) & 255 : f == kFixedF16x3 ? x >> 10 << 2 & 0x7C : x >> 7 & 255;
}
static int code_bits(WeightFormat f) { return is_int8(f) ? int8_bits(f) : f == kFixedBf16x4 ? 4 : 3; }

static double half_value(uint16_t x) {
    __half h;
    memcpy(&h, &x, 2);
    return (double)__half2float(h);
}
/// To FP16, ties to even, rounded once.
static double round_half(double x) {
    if (x == 0) return 0;
    const double unit = ldexp(1, std::max(ilogb(x), -14) - 10);
    return nearbyint(x / unit) * unit;
}
static uint16_t half_bits(double x) {
    __half h = __float2half((float)x);
    uint16_t u;
    memcpy(&u, &h, 2);
    return u;
}

/// As `RowScale` of src/fixed/scale.rs; magnitudes that the multipliers give exactly.
struct Row {
    RowScale scale;
    bool exact[128];
};
static Row row_scale(float scale, int bits) {
    Row row = {};
    float factor = 1;
    while (fabsf(scale) / factor * 0x1p24f >= 65520) factor *= 2;
    if (fabsf(scale) >= 0x1p-14f)
        while (fabsf(scale) / factor * 0x1p25f < 65520) factor /= 2;
    const float s = scale / factor;
    int best = -1;
    const uint16_t high0 = half_bits(s * 0x1p24f);
    for (int i = 0; i < 3 * 17 && best < (1 << (bits - 1)); i++) {
        const uint16_t high = high0 + (i % 3 == 2 ? -1 : i % 3);
        if ((high & 0x7C00) == 0x7C00) continue;
        const int near = i / 3;
        const uint16_t low = half_bits((double)s * 0x1p24 - half_value(high)) + (near % 2 ? near / 2 + 1 : -near / 2);
        if ((low & 0x7C00) == 0x7C00) continue;
        bool exact[128] = {};
        int n = 0;
        for (int q = 0; q < 1 << (bits - 1); q++) {
            const double u = ldexp(q, -24), v = round_half(u * half_value(high) + round_half(u * half_value(low)));
            exact[q] = v == half_value(half_bits((float)q * s));
            n += exact[q];
        }
        if (n > best) best = n, memcpy(row.exact, exact, sizeof exact), row.scale = {s, factor, high | (uint32_t)low << 16};
    }
    return row;
}

/// Starts of overflows, so far of their rows of chunks, become absolute.
static void join_overflow(Matrix& out, const std::vector<std::vector<uint32_t>>& overflow, uint32_t offset) {
    const int across = (out.k + 127) / 128;
    for (size_t tile = 0; tile < overflow.size(); tile++) {
        for (int c = 0; c < across; c++) {
            uint8_t* at = &out.chunks[(tile * across + c) * out.bytes] + header_offset(out.format) + offset;
            uint32_t start;
            memcpy(&start, at, 4);
            start += (uint32_t)out.overflow.size();
            memcpy(at, &start, 4);
        }
        out.overflow.insert(out.overflow.end(), overflow[tile].begin(), overflow[tile].end());
    }
}

static Matrix encode_int8(WeightFormat f, int places, const std::vector<uint16_t>& w, int n, int k, const std::vector<float>& scales) {
    Matrix out;
    out.format = f, out.n = n, out.k = k, out.bytes = (chunk_bytes(f, places) + 15) / 16 * 16;
    const int bits = int8_bits(f), fields = 16 / bits, left = 16 - fields * bits, together = std::min(left, fields), joined = left ? together * bits / left : 0;
    const int tiles = (n + 15) / 16, across = (k + 127) / 128;
    out.chunks.assign((size_t)tiles * across * out.bytes, 0);
    std::vector<Row> rows(n);
    parallel(n, [&](int r) { rows[r] = row_scale(scales[scales.size() == 1 ? 0 : r], bits); });
    for (auto& r : rows) out.scales.push_back(r.scale);
    for (int i = 0; i < 32; i++) out.symbols[i] = 128 + ((i % 2 ? -1 : 1) * ((1 << (bits - 1)) + i / 2));
    std::atomic<uint64_t> total{0};
    std::vector<std::vector<uint32_t>> overflow(tiles);
    parallel(tiles, [&](int tile) {
        for (int c = 0; c < across; c++) {
            uint8_t* chunk = &out.chunks[((size_t)tile * across + c) * out.bytes];
            uint8_t* header = chunk + header_offset(f);
            uint32_t n_in = 0, n_over = 0, start = (uint32_t)overflow[tile].size();
            for (int s = 0; s < 8; s++)
                for (int lane = 0; lane < 32; lane++)
                    for (int i = 0; i < 8; i++) {
                        const int row = tile * 16 + fragment_row(lane, i), col = c * 128 + s * 16 + fragment_col(lane, i);
                        if (row >= n || col >= k) continue;
                        const int q = (int8_t)w[(size_t)row * k + col], magnitude = abs(q);
                        uint32_t code = 0;
                        if (magnitude >= 1 << (bits - 1) || !rows[row].exact[magnitude]) {
                            const uint32_t place = (s * 32 + lane) * 8 + i;
                            int symbol = 0;
                            while (symbol < 32 && out.symbols[symbol] != q + 128) symbol++;
                            if (symbol < 32 && n_in < (uint32_t)places) {
                                const uint16_t e = (uint16_t)(place | symbol << 11);
                                memcpy(header + header_bytes(f) + 2 * n_in++, &e, 2);
                            } else {
                                overflow[tile].push_back(place | (uint32_t)(q + 128) << 16), n_over++;
                            }
                        } else {
                            code = (q < 0) << (bits - 1) | magnitude;
                        }
                        const int half = s / 4, pair = s % 4 * 4 + i / 2;
                        for (int t = 0; t < bits; t++) {
                            const int at = i % 2 * 16 + (t < bits - 1 ? t : 15);
                            int word, bit;
                            if (pair < fields * bits) {
                                word = pair / fields, bit = (at + bits * (pair % fields)) % 32;
                            } else {
                                const int extra = pair - fields * bits, to = (at + bits * (extra % together)) % 32, piece = (to + 1) % 16 / left;
                                word = extra / together * joined + piece, bit = (to + 32 - (piece + 1) * left) % 32;
                            }
                            const int base = half * 128 * bits + (word < 4 ? lane * 16 + word * 4 : word < 6 && bits & 2 ? 512 + lane * 8 + (word - 4) * 4 : (bits & 2 ? 768 : 512) + lane * 4);
                            chunk[base + bit / 8] |= (code >> t & 1) << bit % 8;
                        }
                    }
            const uint16_t counts[2] = {(uint16_t)n_in, (uint16_t)n_over};
            memcpy(header, counts, 4);
            memcpy(header + 4, &start, 4);
            total += n_in + n_over;
        }
    });
    join_overflow(out, overflow, window_bytes(f) + 4);
    out.bits = (out.chunks.size() + 4 * out.overflow.size()) * 8.0 / ((double)n * k);
    out.escapes = (double)total / ((double)n * k);
    if (out.overflow.empty()) out.overflow.push_back(0);
    return out;
}

static Matrix encode(WeightFormat f, int places, const std::vector<uint16_t>& w, int n, int k, const std::vector<float>& scales) {
    if (is_int8(f) && !is_dense(f)) return encode_int8(f, places, w, n, k, scales);
    Matrix out;
    for (float scale : is_int8(f) ? scales : std::vector<float>()) out.scales.push_back(row_scale(scale, 8).scale);
    out.format = f, out.n = n, out.k = k;
    out.bytes = (chunk_bytes(f, places) + 15) / 16 * 16;
    const int tiles = (n + 15) / 16, across = (k + 127) / 128;
    out.chunks.assign((size_t)tiles * across * out.bytes, 0);
    auto element = [&](int tile, int c, int lane, int s, int i, bool* inside) -> uint16_t {
        const int row = tile * 16 + fragment_row(lane, i), col = c * 128 + s * 16 + fragment_col(lane, i);
        *inside = row < n && col < k;
        return *inside ? w[(size_t)row * k + col] : 0;
    };
    if (is_dense(f)) {
        parallel(tiles, [&](int tile) {
            for (int c = 0; c < across; c++)
                for (int s = 0; s < 8; s++)
                    for (int lane = 0; lane < 32; lane++)
                        for (int i = 0; i < 8; i++) {
                            bool inside;
                            const uint16_t x = element(tile, c, lane, s, i, &inside);
                            uint8_t* chunk = &out.chunks[((size_t)tile * across + c) * out.bytes];
                            const int at = (i & 1) | (i >> 2 & 1) << 1 | (i >> 1 & 1) << 2;
                            if (f == kDenseInt8) chunk[(s / 2 * 32 + lane) * 16 + s % 2 * 8 + at] = (uint8_t)x;
                            else memcpy(chunk + (s * 32 + lane) * 16 + 2 * i, &x, 2);
                        }
        });
        out.bits = out.bytes * 8.0 / kChunkElems;
        return out;
    }
    const int unit = f == kFixedF16x3 ? 4 : 1, n_codes = 1 << code_bits(f), top = f == kFixedF16x3 ? 0x7C : 255;
    std::vector<uint8_t> windows((size_t)tiles * across * 16);
    std::vector<std::vector<uint64_t>> rare(tiles);
    parallel(tiles, [&](int tile) {
        rare[tile].assign(256, 0);
        for (int c = 0; c < across; c++) {
            int histogram[16][257] = {};
            for (int lane = 0; lane < 32; lane++)
                for (int s = 0; s < 8; s++)
                    for (int i = 0; i < 8; i++) {
                        bool inside;
                        const uint16_t x = element(tile, c, lane, s, i, &inside);
                        if (inside) histogram[fragment_row(lane, i)][key_of(f, x)]++;
                    }
            for (int row = 0; row < 16; row++) {
                int most = -1, best = 0, now = 0;
                const int* h = histogram[row];
                for (int j = 0; j < n_codes - 1; j++) now += h[j * unit];
                for (int base = 0; base + (n_codes - 1) * unit <= top; base += unit) {
                    now += h[base + (n_codes - 1) * unit];
                    if (now > most) most = now, best = base;
                    now -= h[base];
                }
                windows[((size_t)tile * across + c) * 16 + row] = (uint8_t)best;
                for (int key = 0; key < 256; key++)
                    if (key < best || key >= best + n_codes * unit) rare[tile][key] += h[key];
            }
        }
    });
    std::vector<uint64_t> counts(256);
    for (auto& r : rare)
        for (int i = 0; i < 256; i++) counts[i] += r[i];
    std::vector<int> order(256);
    for (int i = 0; i < 256; i++) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return counts[a] > counts[b]; });
    int index[256];
    std::fill(index, index + 256, -1);
    for (int i = 0; i < 32; i++) out.symbols[i] = (uint8_t)order[i], index[order[i]] = i;
    std::vector<std::vector<uint32_t>> overflow(tiles);
    std::atomic<uint64_t> total{0};
    parallel(tiles, [&](int tile) {
        uint64_t n_escapes = 0;
        for (int c = 0; c < across; c++) {
            uint8_t* chunk = &out.chunks[((size_t)tile * across + c) * out.bytes];
            const uint8_t* window = &windows[((size_t)tile * across + c) * 16];
            uint8_t* header = chunk + header_offset(f);
            uint32_t n_in = 0, n_over = 0, start = (uint32_t)overflow[tile].size();
            for (int lane = 0; lane < 32; lane++)
                for (int at = 0; at < 64; at++) {
                    const int s = at / 8, half = s / 4, i = (at & 1) | (at >> 2 & 1) << 1 | (at >> 1 & 1) << 2;
                    bool inside, partner_inside;
                    const uint16_t x = element(tile, c, lane, s, i, &inside), partner = element(tile, c, lane, s, i ^ 1, &partner_inside);
                    const int row = fragment_row(lane, i), key = key_of(f, x);
                    int code = (key - window[row]) / unit;
                    if (!inside) code = 0;
                    else if (key < window[row] || code >= n_codes) {
                        const uint32_t position = (at / 16 * 32 + lane) * 16 + at % 16;
                        code = 0, n_escapes++;
                        if (index[key] >= 0 && n_in < (uint32_t)places) {
                            const uint16_t e = (uint16_t)(position | index[key] << 11);
                            memcpy(header + header_bytes(f) + 2 * n_in++, &e, 2);
                        } else {
                            overflow[tile].push_back(position | (uint32_t)key << 16), n_over++;
                        }
                    }
                    auto put3 = [&](int offset, uint32_t value) {
                        // Word w of a half: 0 and 1 as pairs, 2 alone; the second half 0 alone, 1 and 2 as pairs.
                        auto word = [&](int w) {
                            const int at4 = half == 0 ? (w < 2 ? 2 * lane + w : 64 + lane) : (w == 0 ? 96 + lane : 128 + 2 * lane + w - 1);
                            return chunk + offset + 4 * at4;
                        };
                        for (int bit = 0; bit < 3; bit++) {
                            const int which = s % 4 < 3 ? s % 4 : bit, place = 4 * (at % 8) + (s % 4 < 3 ? bit : 3);
                            word(which)[place / 8] |= (uint8_t)((value >> bit & 1) << place % 8);
                        }
                    };
                    const int word = at % 32 / 4, byte = at % 4;  // of the half
                    auto put4 = [&](int offset) { chunk[offset + (half * 32 + lane) * 16 + word / 2 * 4 + byte] |= (uint8_t)((code & 15) << (word % 2 * 4)); };
                    uint8_t& raw = chunk[(s / 2 * 32 + lane) * 16 + s % 2 * 8 + at % 8];
                    if (f == kFixedBf16x3 || f == kFixedBf16x4) {
                        raw = (uint8_t)((x & 127) << 1 | partner >> 15);
                        if (f == kFixedBf16x3) put3(2048, code);
                        else put4(2048);
                    } else if (f == kFixedF16x3) {
                        raw = (uint8_t)x;
                        put3(2048, code);
                        put3(2048 + 768, (x >> 15) << 2 | (x >> 8 & 3));
                    }
                }
            const uint16_t in16 = (uint16_t)n_in, over16 = (uint16_t)n_over;
            memcpy(header, window, 16);
            memcpy(header + 16, &in16, 2);
            memcpy(header + 18, &over16, 2);
            memcpy(header + 20, &start, 4);
        }
        total += n_escapes;
    });
    join_overflow(out, overflow, window_bytes(f) + 4);
    out.bits = (out.chunks.size() + 4 * out.overflow.size()) * 8.0 / ((double)n * k);
    out.escapes = (double)total / ((double)n * k);
    if (out.overflow.empty()) out.overflow.push_back(0);
    return out;
}

static WeightFormat twin_of(WeightFormat f) { return is_int8(f) ? kDenseInt8 : is_half(f) ? kDenseF16 : kDenseBf16; }
template <class T>
static T* upload(const std::vector<T>& v, size_t spare = 0) {
    T* p;
    CHECK(cudaMalloc(&p, v.size() * sizeof(T) + spare));
    CHECK(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

static uint16_t to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static uint16_t as_half(float f) {
    __half h = __float2half(f);
    uint16_t u;
    memcpy(&u, &h, 2);
    return u;
}
static float widen(bool half, uint16_t x) {
    if (!half) {
        uint32_t u = (uint32_t)x << 16;
        float f;
        memcpy(&f, &u, 4);
        return f;
    }
    __half h;
    memcpy(&h, &x, 2);
    return __half2float(h);
}


static std::vector<uint16_t> make_weights(WeightFormat f, int kind, int n, int k, std::mt19937& seed) {
    std::vector<uint16_t> w((size_t)n * k);
    const uint32_t s0 = seed();
    parallel(n, [&](int row) {
        std::mt19937 rng(s0 + row);
        std::normal_distribution<float> normal;
        const float sigma = 0.02f * expf(0.25f * normal(rng));
        for (int c = 0; c < k; c++) {
            uint16_t& x = w[(size_t)row * k + c];
            const float v = sigma * normal(rng);
            x = is_int8(f) ? (uint16_t)(uint8_t)(int8_t)std::max(-127.f, std::min(127.f, rintf(v * (kind == 4 ? 300 : 400)))) : is_half(f) ? as_half(v) : to_bf16(v);
            const uint32_t r = rng();
            if (kind == 1 && r % 100 < 40) x = is_int8(f) ? r >> 16 & 255 : is_half(f) ? (uint16_t)((r >> 16 & 0x7FFF) % 0x7C00) : (uint16_t)((r >> 16 & 0x7FFF) % 0x7F80);
            if (kind == 2) x = is_int8(f) ? r >> 16 & 255 : (uint16_t)(r >> 16);  // everything: NaN, infinity, -0, denormals
            if (kind == 3) x = is_int8(f) ? 5 : 0x3C2A;                            // one value
        }
    });
    return w;
}

static double time_graph(cudaStream_t stream, int n, const std::function<void(int)>& run, int times = 9) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < n; i++) run(i);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t start, stop;
    cudaEventCreate(&start);
    cudaEventCreate(&stop);
    std::vector<float> ms;
    for (int i = 0; i < times + 3; i++) {
        cudaEventRecord(start, stream);
        CHECK(cudaGraphLaunch(exec, stream));
        cudaEventRecord(stop, stream);
        CHECK(cudaEventSynchronize(stop));
        float t;
        cudaEventElapsedTime(&t, start, stop);
        if (i >= 3) ms.push_back(t);
    }
    std::sort(ms.begin(), ms.end());
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    return ms[ms.size() / 2] * 1e3 / n;
}

/// One copy of `from` after the other until `to` is full.
static uint8_t* replicate(const std::vector<uint8_t>& from, size_t bytes) {
    uint8_t* to;
    CHECK(cudaMalloc(&to, bytes));
    for (size_t at = 0; at < bytes; at += from.size()) {
        const size_t n = std::min(from.size(), bytes - at);
        if (at == 0) CHECK(cudaMemcpy(to, from.data(), n, cudaMemcpyHostToDevice));
        else CHECK(cudaMemcpy(to + at, to, n, cudaMemcpyDeviceToDevice));
    }
    return to;
}

/// Rows and columns of Llama 3.1 8B's and 70B's layers.
static const int layer_shapes[][2] = {{6144, 4096}, {4096, 4096}, {28672, 4096}, {4096, 14336}, {128256, 4096}, {10240, 8192}, {8192, 8192}, {57344, 8192}, {8192, 28672}};

static std::vector<int> numbers(const char* text) {
    std::vector<int> out;
    for (const char* p = text; *p;) {
        out.push_back(atoi(p));
        while (*p && *p != ',') p++;
        if (*p) p++;
    }
    return out;
}

/// cuBLAS: y[m, n] = x[m, k] * w[n, k]^T.
struct Gemm {
    static constexpr size_t kSpace = 64 << 20;
    cudaStream_t stream;
    cublasHandle_t blas;
    cublasLtHandle_t lt;
    void* space;

    Gemm() {
        CHECK(cudaStreamCreate(&stream));
        CHECK(cublasCreate(&blas));
        CHECK(cublasLtCreate(&lt));
        CHECK(cublasSetStream(blas, stream));
        CHECK(cudaMalloc(&space, kSpace));
        CHECK(cublasSetWorkspace(blas, space, kSpace));
    }
    /// Microseconds of cublasGemmEx.
    double time(int m, int n, int k, cudaDataType_t type, const std::vector<uint16_t*>& w, const uint16_t* x, uint16_t* y, int launches) const {
        const float one = 1, zero = 0;
        return time_graph(stream, launches, [&](int c) {
            CHECK(cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, n, m, k, &one, w[c % w.size()], type, k, x, type, k, &zero, y, type, n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
        });
    }
    /// Of the fastest of eight heuristics of cublasLtMatmul.
    double time_lt(int m, int n, int k, cudaDataType_t type, const std::vector<uint16_t*>& w, const uint16_t* x, uint16_t* y, int launches) const {
        const float one = 1, zero = 0;
        const cublasOperation_t transposed = CUBLAS_OP_T;
        cublasLtMatmulDesc_t desc;
        cublasLtMatrixLayout_t la, lb, lc;
        cublasLtMatmulPreference_t preference;
        CHECK(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        CHECK(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed));
        CHECK(cublasLtMatrixLayoutCreate(&la, type, k, n, k));
        CHECK(cublasLtMatrixLayoutCreate(&lb, type, k, m, k));
        CHECK(cublasLtMatrixLayoutCreate(&lc, type, n, m, n));
        CHECK(cublasLtMatmulPreferenceCreate(&preference));
        CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kSpace, sizeof kSpace));
        cublasLtMatmulHeuristicResult_t found[8];
        int n_found = 0;
        cublasLtMatmulAlgoGetHeuristic(lt, desc, la, lb, lc, lc, preference, 8, found, &n_found);
        double best = 1e9;
        for (int h = 0; h < n_found; h++) {
            auto run = [&](int c) { return cublasLtMatmul(lt, desc, &one, w[c % w.size()], la, x, lb, &zero, y, lc, y, lc, &found[h].algo, space, kSpace, stream); };
            if (found[h].state != CUBLAS_STATUS_SUCCESS || run(0) != CUBLAS_STATUS_SUCCESS) continue;
            CHECK(cudaStreamSynchronize(stream));
            best = std::min(best, time_graph(stream, launches, [&](int c) { CHECK(run(c)); }, 5));
        }
        return best;
    }
};
