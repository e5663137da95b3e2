// Check and timing of kernels/product.cuh: fused products from fixed-rate
// weights against their dense twins (bit for bit) and cuBLAS (time).
//
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -DFORMATS=0 -o product_fixed product_fixed.cu -lcublas -lcublasLt
//   product_fixed check | time [tokens,...] [shape index,...]
//
// FORMATS: 0 BF16 (3 bits), 1 INT8 (5 and 6 bits), 2 FP16, 3 BF16 (4 bits) and INT8 (4 and 7 bits).
#include "../kernels/product.cuh"
#include "../kernels/product_batch.cuh"
#include "fixed_host.cuh"

// ---------------------------------------------------------------------------
// Device

template <WeightFormat kFormat, int kTokens8, int kTiles, int kApart, int kBlocks>
__global__ void __launch_bounds__(32 * kApart, kBlocks) product_kernel(const __grid_constant__ ProductParams p) {
    product<kFormat, kTokens8, kTiles, kApart>(p);
}
template <WeightFormat kFormat, int kTokens8>
__global__ void __launch_bounds__(32 * kBatchWarps, 1) batch_kernel(const __grid_constant__ ProductParams p) {
    product_batch<kFormat, kTokens8>(p);
}

struct Variant {
    std::string name;
    WeightFormat format;
    int tokens8, tiles, apart, blocks;  // tiles 0: product_batch
    void (*kernel)(ProductParams);
    uint32_t (*shared)(uint32_t, uint32_t);
};

static int n_sms = 132;
static float* workspace;
static uint32_t* meetings;
constexpr size_t kWorkspace = 512u << 20, kMeetings = 1 << 14;

/// Blocks an SM, strips a block, and blocks that share K, of product_batch, as in src/product/shape.rs.
struct Shape {
    uint32_t per_sm, strips, parts, groups;
};
static Shape shape_of(uint32_t tiles, uint32_t across, uint32_t n_slices, uint32_t tokens8, const std::vector<uint32_t>& sizes) {
    Shape best = {};
    double least = 1e30;
    for (uint32_t per_sm : sizes)
        for (uint32_t parts = 1; parts <= n_slices; parts++)
            for (uint32_t strips = 1; strips <= kBatchWarps / per_sm; strips++) {
                const uint32_t groups = (tiles + strips - 1) / strips, at_once = n_sms * per_sm;
                const double rounds = (groups * parts + at_once - 1) / at_once, chunks = (double)across / n_slices * ((n_slices + parts - 1) / parts);
                if (parts > 1 && rounds > 1) continue;
                double work = rounds * chunks * (1240 + 73 * per_sm * strips) * (per_sm == 2 ? 1.1 : 1);
                if (parts > 1) work += 2000 + (double)sum_slots(n_slices, parts) * strips * per_sm / parts * tokens8 * 8;
                if (work <= least) least = work, best = {per_sm, strips, parts, parts > 1 ? groups : std::min(groups, at_once)};
            }
    return best;
}
static Shape shape_of(const Variant& v, const ProductParams& p) {
    std::vector<uint32_t> sizes = {1};
    if (v.shared(p.chunk_bytes, kBatchWarps / 2) <= 112 << 10) sizes.push_back(2);
    Shape shape = shape_of(p.n_tiles, (p.cols + 127) / 128, slices(p.rows, p.cols), v.tokens8, sizes);
    // per_sm,strips,parts
    if (const char* forced = getenv("SHAPE")) {
        sscanf(forced, "%u,%u,%u", &shape.per_sm, &shape.strips, &shape.parts);
        shape.groups = (p.n_tiles + shape.strips - 1) / shape.strips;
        if (shape.parts == 1) shape.groups = std::min<uint32_t>(shape.groups, n_sms * shape.per_sm);
    }
    return shape;
}

static void launch(const Variant& v, ProductParams p, bool chained, cudaStream_t stream) {
    p.n_tiles = p.segments[p.n_segments - 1].end_tile;
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[1];
    int n_attributes = 0;
    if (v.tiles > 0) {
        config.dynamicSmemBytes = v.shared(p.chunk_bytes, slices(p.rows, p.cols));
        config.gridDim = dim3(std::min<uint32_t>(v.blocks * n_sms, (p.n_tiles + v.tiles - 1) / v.tiles));
        config.blockDim = dim3(32 * v.apart);
    } else {
        const Shape shape = shape_of(v, p);
        const uint32_t warps = std::min((shape.strips + 3) / 4 * 4, kBatchWarps / shape.per_sm), n_slices = slices(p.rows, p.cols);
        p.strips = shape.strips, p.parts = shape.parts, p.part_share = (65535 + shape.parts) / shape.parts, p.slots = sum_slots(n_slices, shape.parts);
        p.meetings = meetings, p.patience = getenv("PATIENCE") ? atoi(getenv("PATIENCE")) : 64;
        if (batch_workspace_floats(shape.groups, shape.parts, shape.strips, n_slices, v.tokens8) * 4 > kWorkspace || shape.groups > kMeetings) printf("workspace\n"), exit(1);
        config.gridDim = dim3(shape.parts, shape.groups), config.blockDim = dim3(32 * warps), config.dynamicSmemBytes = v.shared(p.chunk_bytes, warps);
    }
    CHECK(cudaFuncSetAttribute((const void*)v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.dynamicSmemBytes));
    config.stream = stream;
    if (chained) {
        attributes[n_attributes].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[n_attributes++].val.programmaticStreamSerializationAllowed = 1;
    }
    config.attrs = attributes;
    config.numAttrs = n_attributes;
    CHECK(cudaLaunchKernelEx(&config, v.kernel, p));
}

#define VARIANT(f, t8, tg, ap, bl)                                                                            \
    {                                                                                                         \
        std::string(#f " " #t8 " " #tg "x" #ap " b") + std::to_string(bl), f, t8, tg, ap, bl, product_kernel<f, t8, tg, ap, bl>,            \
            [](uint32_t b, uint32_t s) { return product_shared_bytes<f, t8, tg, ap>(b, s); }                   \
    }
#define BATCH(f, t8)                                                                                          \
    {                                                                                                         \
        #f " " #t8 " batch", f, t8, 0, 0, 1, batch_kernel<f, t8>, [](uint32_t b, uint32_t w) { return batch_shared_bytes<f, t8>(b, w); } \
    }
// Blocks an SM for up to 8 tokens, as in product_*.cu.
constexpr int blocks_of(WeightFormat f) { return f == kDenseInt8 ? 3 : 2; }
#define DEFAULTS(f) VARIANT(f, 1, 1, 8, blocks_of(f)), VARIANT(f, 1, 2, 8, 2), VARIANT(f, 1, 1, 16, 1), VARIANT(f, 2, 1, 8, 2), BATCH(f, 4), BATCH(f, 8)

static const std::vector<Variant> variants = {
#if FORMATS == 0
    DEFAULTS(kDenseBf16), DEFAULTS(kFixedBf16x3),
#elif FORMATS == 1
    DEFAULTS(kDenseInt8), DEFAULTS(kFixedInt8x5), DEFAULTS(kFixedInt8x6),
#elif FORMATS == 2
    DEFAULTS(kDenseF16), DEFAULTS(kFixedF16x3),
#else
    DEFAULTS(kDenseBf16), DEFAULTS(kFixedBf16x4), DEFAULTS(kDenseInt8), DEFAULTS(kFixedInt8x4), DEFAULTS(kFixedInt8x7),
#endif
};

/// Pairs of tiles only if there is no other.
static std::vector<const Variant*> find(WeightFormat f, int tokens, int rows) {
    std::vector<const Variant*> out;
    for (auto& v : variants)
        if (v.format == f && 8 * v.tokens8 >= tokens && (v.tokens8 == 1 || 4 * v.tokens8 < tokens) && (v.tiles != 2 || (rows + 15) / 16 % 2 == 0)) out.push_back(&v);
    return out;
}

/// Core matrices of row-major activations; unused tokens are NaN, columns beyond k zero.
static std::vector<uint16_t> core_matrices(const std::vector<uint16_t>& x, int m, int k) {
    const int across = (k + 127) / 128, groups = (m + 7) / 8;
    std::vector<uint16_t> out;
    for (int c = 0; c < across; c++)
        for (int g = 0; g < groups; g++)
            for (int col = c * 128; col < c * 128 + 128; col += 8)
                for (int token = g * 8; token < g * 8 + 8; token++)
                    for (int i = col; i < col + 8; i++) out.push_back(token >= m ? 0xFFFF : i < k ? x[(size_t)token * k + i] : 0);
    return out;
}

static uint32_t x_stride(int k) { return (k + 7) / 8 * 8; }

/// Rows of a multiple of 8 elements, zero beyond k.
static std::vector<uint16_t> padded_rows(const std::vector<uint16_t>& x, int m, int k) {
    std::vector<uint16_t> out((size_t)m * x_stride(k));
    for (int token = 0; token < m; token++) std::copy_n(&x[(size_t)token * k], k, &out[(size_t)token * x_stride(k)]);
    return out;
}

// ---------------------------------------------------------------------------
// Check

/// Sums with a NaN or an infinity tell nothing of one weight.
static bool p0_has_nan(WeightFormat f, int kind) { return kind == 2 && !is_int8(f); }

static int check() {
    int failures = 0, checks = 0;
    std::random_device device_seed;
    const uint32_t seed = device_seed();
    std::mt19937 rng(seed);
    printf("seed %u\n", seed);
    std::vector<WeightFormat> formats;
    for (auto& v : variants)
        if (!is_dense(v.format) && (formats.empty() || formats.back() != v.format)) formats.push_back(v.format);
    const int shapes[][2] = {{16, 128}, {1, 1}, {15, 17}, {17, 129}, {129, 127}, {127, 4097}, {4097, 129}, {272, 2000}, {6144, 4096}, {1000, 6000}};
    for (WeightFormat f : formats) {
        std::vector<double> worst;
        for (auto& shape : shapes) {
            for (int kind = 0; kind < 4; kind++) {
                const int n = shape[0], k = shape[1];
                if ((size_t)n * k > 5000000 && kind > 1) continue;
                const bool half = is_half(f);
                auto w = make_weights(f, kind, n, k, rng);
                // Two segments where there are two tiles: the same matrix, cut.
                const int cut = n > 16 && kind % 2 == 0 ? (n / 2 + 15) / 16 * 16 : 0;
                const int places = kind == 1 ? 40 : kind == 2 ? 0 : 32;
                struct Part { Matrix m; std::vector<uint16_t> w; };
                std::vector<int> borders = {0};
                if (cut) borders.push_back(cut);
                borders.push_back(n);
                ProductParams base[2] = {};
                std::vector<void*> held;
                std::vector<float> scale(n);
                std::mt19937 srng(rng());
                // Some beyond 2^-5, where a row has a factor.
                for (auto& s : scale) s = ldexpf(1 + srng() % (1 << 23) / (float)(1 << 23), -14 + (int)(srng() % (kind == 3 ? 20 : 4)));
                for (int twin = 0; twin < 2; twin++) {
                    ProductParams& p = base[twin];
                    std::vector<uint8_t> chunks;
                    for (size_t i = 0; i + 1 < borders.size(); i++) {
                        std::vector<uint16_t> part(w.begin() + (size_t)borders[i] * k, w.begin() + (size_t)borders[i + 1] * k);
                        std::vector<float> s(scale.begin() + borders[i], scale.begin() + (kind != 1 ? borders[i + 1] : borders[i] + 1));
                        Matrix m = encode(twin ? twin_of(f) : f, places, part, borders[i + 1] - borders[i], k, s);
                        p.chunk_bytes = m.bytes;
                        chunks.insert(chunks.end(), m.chunks.begin(), m.chunks.end());
                        p.segments[i].overflow = m.overflow.empty() ? nullptr : upload(m.overflow);
                        p.segments[i].symbols = upload(std::vector<uint8_t>(m.symbols, m.symbols + 32));
                        p.segments[i].scales = upload(m.scales);
                        p.segments[i].scale_step = m.scales.size() > 1;
                        p.segments[i].end_tile = (borders[i + 1] + 15) / 16;
                        held.insert(held.end(), {(void*)p.segments[i].overflow, (void*)p.segments[i].symbols, (void*)p.segments[i].scales});
                    }
                    p.chunks = upload(chunks);
                    held.push_back((void*)p.chunks);
                    p.n_segments = (uint32_t)borders.size() - 1;
                    p.rows = n, p.cols = k, p.workspace = workspace;
                }
                std::normal_distribution<float> normal;
                std::vector<uint16_t> x((size_t)64 * k), bias(n);
                for (auto& v : x) v = half ? as_half(normal(rng)) : to_bf16(normal(rng));
                for (auto& v : bias) v = half ? as_half(normal(rng)) : to_bf16(normal(rng));
                uint16_t* dbias = upload(bias);
                std::vector<uint16_t> reference((size_t)64 * n), got;
                uint16_t* y;
                CHECK(cudaMalloc(&y, (size_t)64 * n * 2 + 64));
                auto run = [&](const Variant& v, ProductParams p, int first, int m, bool with_bias = true) {
                    std::vector<uint16_t> part(x.begin() + (size_t)first * k, x.begin() + (size_t)(first + m) * k);
                    uint16_t* b = upload(v.tiles == 0 ? core_matrices(part, m, k) : padded_rows(part, m, k));
                    p.x = b, p.x_stride = x_stride(k), p.y = y, p.tokens = m, p.bias = kind == 0 && with_bias ? dbias : nullptr;
                    std::vector<uint16_t> out((size_t)m * n + 32);
                    CHECK(cudaMemset(y, 0xFF, out.size() * 2));
                    CHECK(cudaMemset(workspace, 0xFF, 64 << 20));
                    launch(v, p, false, 0);
                    CHECK(cudaDeviceSynchronize());
                    CHECK(cudaMemcpy(out.data(), y, out.size() * 2, cudaMemcpyDeviceToHost));
                    cudaFree(b);
                    for (int i = 0; i < 32; i++)
                        if (out[(size_t)m * n + i] != 0xFFFF) failures++, printf("written beyond the end: %s\n", v.name.c_str());
                    out.resize((size_t)m * n);
                    return out;
                };
                // The reference: the twin with 64 tokens; everything else must be its rows.
                reference = run(*find(twin_of(f), 64, n)[0], base[1], 0, 64);
                auto expect = [&](const Variant& v, const ProductParams& p, int first, int m) {
                    got = run(v, p, first, m);
                    checks++;
                    if (memcmp(got.data(), &reference[(size_t)first * n], got.size() * 2) != 0) {
                        size_t i = 0;
                        while (got[i] == reference[(size_t)first * n + i]) i++;
                        failures++;
                        if (failures < 20) printf("DIFFER %s %dx%d kind %d m %d: token %zu row %zu: %04x, twin %04x\n", v.name.c_str(), n, k, kind, m, i / n, i % n, got[i], reference[(size_t)first * n + i]);
                    }
                };
                for (int m : {1, 3, 8, 9, 16, 31, 32, 33, 64})
                    for (int twin = 0; twin < 2; twin++)
                        for (auto v : find(twin ? twin_of(f) : f, m, n)) expect(*v, base[twin], m == 1 ? 37 % 64 : m == 3 ? 11 : 0, m);
                if (kind == 0 && !half) {
                    double error = 0, norm = 0;
                    for (int i = 0; i < 200; i++) {
                        const int row = rng() % n, token = rng() % 64;
                        double sum = widen(half, bias[row]);
                        for (int c = 0; c < k; c++) sum += (double)widen(half, w[(size_t)row * k + c]) * widen(half, x[(size_t)token * k + c]);
                        const double d = widen(half, reference[(size_t)token * n + row]) - sum;
                        error += d * d, norm += sum * sum;
                    }
                    if (!(sqrt(error / norm) < 4e-3)) failures++, printf("twin is wrong: %dx%d error %g\n", n, k, sqrt(error / norm));
                }
                if (kind == 0 && is_int8(f)) {
                    double error = 0, norm = 0;
                    for (int i = 0; i < 200; i++) {
                        const int row = rng() % n, token = rng() % 64;
                        double sum = widen(true, bias[row]);
                        for (int c = 0; c < k; c++) sum += (double)widen(true, as_half((float)(int8_t)w[(size_t)row * k + c] * scale[row])) * widen(true, x[(size_t)token * k + c]);
                        const double d = widen(true, reference[(size_t)token * n + row]) - sum;
                        error += d * d, norm += sum * sum;
                    }
                    if (!(sqrt(error / norm) < 1e-3)) failures++, printf("INT8 twin is wrong: %dx%d error %g\n", n, k, sqrt(error / norm));
                }
                if (kind <= 3 && !p0_has_nan(f, kind)) {
                    // One activation is 1, the others zero: the result is the weight itself, dequantised.
                    const int m = 8;
                    std::vector<uint16_t> ones((size_t)m * k);
                    std::vector<int> columns;
                    for (int i = 0; i < m; i++) columns.push_back(rng() % k), ones[(size_t)i * k + columns[i]] = half ? as_half(1) : to_bf16(1);
                    std::swap(x, ones);
                    for (int tokens : {8, 33}) {
                        x.resize((size_t)64 * k);
                        ProductParams q = base[0];
                        got = run(*find(f, tokens, n)[0], q, 0, tokens, false);
                        for (int i = 0; i < m; i++)
                            for (int row = 0; row < n; row++) {
                                const uint16_t v = w[(size_t)row * k + columns[i]];
                                const uint16_t expected = is_int8(f) ? as_half((float)(int8_t)v * scale[kind == 1 ? (row < (cut ? cut : n) ? 0 : cut) : row]) : v;
                                checks++;
                                if (got[(size_t)i * n + row] != expected && !(expected << 1 == 0x10000 && got[(size_t)i * n + row] << 1 == 0) && (expected & 0x7FFF) != 0) {
                                    if (failures++ < 20) printf("WEIGHT %dx%d kind %d row %d: %04x, expected %04x\n", n, k, kind, row, got[(size_t)i * n + row], expected);
                                }
                            }
                    }
                    std::swap(x, ones);
                }
                if (n == 272)
                    for (int i = 0; i < 200; i++) expect(*find(f, i % 2 ? 8 : 64, n)[0], base[0], 0, i % 2 ? 8 : 64);
                for (void* p : held) cudaFree(p);
                cudaFree(y), cudaFree(dbias);
            }
        }
        printf("format %d: %d checks, %d failures\n", f, checks, failures);
    }
    return failures;
}

// ---------------------------------------------------------------------------
// Time

static void time_all(const std::vector<int>& batches, const std::vector<int>& which) {
    const Gemm gemm;
    const cudaStream_t stream = gemm.stream;
    std::vector<WeightFormat> formats;
    for (auto& v : variants)
        if (formats.empty() || formats.back() != v.format) formats.push_back(v.format);
    for (int index : which) {
        const int n = layer_shapes[index][0], k = layer_shapes[index][1], n0 = std::min(n, 2048);
        const bool half = is_half(formats[0]);
        const size_t elems = (size_t)n * k;
        const int copies = (int)std::max<size_t>(1, (420u << 20) / elems + (elems < (420u << 20)));
        std::mt19937 rng(n + k);
        std::vector<uint16_t*> row_major(copies);
        {
            auto w = make_weights(half ? kDenseF16 : kDenseBf16, 0, n0, k, rng);
            std::vector<uint8_t> bytes((uint8_t*)w.data(), (uint8_t*)(w.data() + w.size()));
            for (auto& p : row_major) p = (uint16_t*)replicate(bytes, 2 * elems);
        }
        std::normal_distribution<float> normal;
        std::vector<uint16_t> x((size_t)64 * k);
        for (auto& v : x) v = half ? as_half(normal(rng)) : to_bf16(normal(rng));
        uint16_t* dx = upload(x);
        // Core matrices depend on the number of tokens.
        std::vector<uint16_t*> b;
        for (int m : batches) b.push_back(upload(core_matrices(x, m, k)));
        uint16_t* y;
        CHECK(cudaMalloc(&y, (size_t)64 * n * 2));
        const cudaDataType_t type = half ? CUDA_R_16F : CUDA_R_16BF;
        std::vector<double> best(batches.size()), gemmex(batches.size());
        for (size_t i = 0; i < batches.size(); i++) {
            gemmex[i] = gemm.time(batches[i], n, k, type, row_major, dx, y, 2 * copies);
            best[i] = std::min(gemmex[i], gemm.time_lt(batches[i], n, k, type, row_major, dx, y, 2 * copies));
        }
        for (auto p : row_major) cudaFree(p);
        std::vector<std::vector<uint16_t>> reference(batches.size());
        for (WeightFormat f : formats) {
            // INT8: a spread that suits the window, 16 or 64 places for escapes.
            std::mt19937 again(n * 3 + k);
            auto w = make_weights(f, f == kFixedInt8x5 ? 4 : 0, n0, k, again);
            std::mt19937 random(n);
            std::vector<float> scales(n0);
            for (auto& s : scales) s = ldexpf(1 + random() % (1 << 23) / (float)(1 << 23), -11 + random() % 2);
            const int places = getenv("PLACES") ? atoi(getenv("PLACES")) : f == kFixedInt8x5 ? 64 : is_int8(f) ? 16 : 32;
            Matrix m = encode(f, places, w, n0, k, scales);
            const std::vector<RowScale> some = m.scales;
            while (!some.empty() && m.scales.size() < (size_t)n) m.scales.insert(m.scales.end(), some.begin(), some.end());
            const size_t bytes = (size_t)(n / 16) * (k / 128) * m.bytes;
            const int copies = (int)std::max<size_t>(1, (400u << 20) / bytes + 1);
            std::vector<uint8_t*> chunks(copies);
            for (auto& p : chunks) p = replicate(m.chunks, bytes);
            ProductParams p = {};
            p.segments[0] = {m.overflow.empty() ? nullptr : upload(m.overflow), upload(std::vector<uint8_t>(m.symbols, m.symbols + 32)), upload(m.scales), (uint32_t)n / 16, 1};
            p.y = y, p.workspace = workspace, p.rows = n, p.cols = k, p.n_segments = 1, p.chunk_bytes = m.bytes;
            for (size_t i = 0; i < batches.size(); i++) {
                p.tokens = batches[i];
                for (auto v : find(f, batches[i], n)) {
                    const double us = time_graph(stream, 2 * copies, [&](int c) {
                        ProductParams q = p;
                        q.chunks = chunks[c % copies];
                        q.x = v->tiles == 0 ? b[i] : dx, q.x_stride = k;
                        launch(*v, q, true, stream);
                    });
                    std::vector<uint16_t> out((size_t)batches[i] * n);
                    CHECK(cudaMemcpy(out.data(), y, out.size() * 2, cudaMemcpyDeviceToHost));
                    if (reference[i].empty()) reference[i] = out;
                    const bool comparable = !is_int8(f), same = memcmp(out.data(), reference[i].data(), out.size() * 2) == 0;
                    std::string name = v->name;
                    if (v->tiles == 0) {
                        p.n_tiles = n / 16;
                        const Shape shape = shape_of(*v, p);
                        name += " " + std::to_string(shape.per_sm) + "," + std::to_string(shape.strips) + "," + std::to_string(shape.parts);
                    }
                    printf("%6dx%5d M %2d %-28s %6.3f bits %4.1f%% esc %8.2f us %5.2f TB/s | gemmex %8.2f best %8.2f | %.3f%s\n", n, k, batches[i], name.c_str(), m.bits, 100 * m.escapes, us,
                           bytes / us / 1e6, gemmex[i], best[i], best[i] / us, comparable && !same ? " DIFFERS" : "");
                    fflush(stdout);
                }
            }
            for (auto p : chunks) cudaFree(p);
            cudaFree((void*)p.segments[0].overflow), cudaFree((void*)p.segments[0].symbols), cudaFree((void*)p.segments[0].scales);
        }
        for (auto p : b) cudaFree(p);
        cudaFree(dx), cudaFree(y);
    }
}

int main(int argc, char** argv) {
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    n_sms = device.multiProcessorCount;
    CHECK(cudaMalloc(&workspace, kWorkspace));
    CHECK(cudaMalloc(&meetings, kMeetings * 8));
    CHECK(cudaMemset(meetings, 0, kMeetings * 8));
    printf("%s, %d SMs\n", device.name, n_sms);
    if (argc > 1 && !strcmp(argv[1], "time")) {
        time_all(numbers(argc > 2 ? argv[2] : "1,8,16,32,64"), numbers(argc > 3 ? argv[3] : "0,1,2,3,4,5,6,7,8"));
        return 0;
    }
    return check() != 0;
}
