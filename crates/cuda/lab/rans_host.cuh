// What the rANS experiments share: an encoder that writes tiles as docs/format.md
// says, tensors from a dump of packed ones, timing.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../kernels/rans_load.cuh"
#include "rans_buckets.cuh"

#define CHECK(call)                                                                  \
    do {                                                                             \
        auto status_ = (call);                                                       \
        if (status_ != 0) {                                                          \
            printf("%s:%d: %s failed: %d\n", __FILE__, __LINE__, #call, (int)status_); \
            exit(1);                                                                 \
        }                                                                            \
    } while (0)

namespace lab {

using namespace transom::rans;

template <class F>
void parallel(int n, F f) {
    const int threads = std::max(1u, std::thread::hardware_concurrency());
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; t++) pool.emplace_back([&, t] { for (int i = t; i < n; i += threads) f(i); });
    for (auto& thread : pool) thread.join();
}

inline int fragment_row(int lane, int j) { return lane / 4 + (j >> 1 & 1) * 8; }
inline int fragment_col(int lane, int j) { return lane % 4 * 2 + (j & 1) + (j >> 2 & 1) * 8; }

inline uint16_t to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/// Elements of BF16 or INT8 (in the low byte).
struct Tensor {
    int rows = 0, cols = 0, elem_bytes = 2;
    std::vector<uint16_t> elems;
};

/// The tiles of a record and the frequencies of its table.
struct Packed {
    int rows = 0, cols = 0, elem_bytes = 2, prob_bits = 12;
    std::vector<uint32_t> freq = std::vector<uint32_t>(256);
    std::vector<uint64_t> starts;
    std::vector<uint8_t> tiles;
    double bits() const { return 8.0 * tiles.size() / rows / cols; }
};

inline uint32_t symbol_of(const Tensor& t, uint16_t w) { return t.elem_bytes == 2 ? (w >> 7) & 255 : w & 255; }

inline std::vector<uint32_t> ranked(const std::vector<uint32_t>& freq) {
    std::vector<uint32_t> order;
    for (uint32_t s = 0; s < 256; s++)
        if (freq[s]) order.push_back(s);
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return freq[a] > freq[b]; });
    return order;
}

inline void encode_stream(const std::vector<uint8_t>& symbols, const std::vector<uint32_t>& freq, const uint32_t* start, int p, std::vector<uint8_t>& out) {
    const int n = (int)symbols.size(), n_coded = n - 64;
    uint32_t x[32];
    for (int l = 0; l < 32; l++) x[l] = 1u << 16 | symbols[n_coded + 2 * l] | symbols[n_coded + 2 * l + 1] << 8;
    std::vector<uint16_t> words;
    for (int i = n_coded - 1; i >= 0; i--) {
        uint32_t& state = x[i % 32];
        const uint32_t f = freq[symbols[i]], s = start[symbols[i]];
        if ((uint64_t)state >= (uint64_t)f << (32 - p)) words.push_back((uint16_t)state), state >>= 16;
        state = ((state / f) << p) + s + state % f;
    }
    uint8_t lengths[16] = {};
    std::vector<uint8_t> bits;
    uint64_t window = 0;
    int held = 0;
    for (int l = 0; l < 32; l++) {
        const int b = 31 - __builtin_clz(x[l]);
        lengths[l / 2] |= (uint8_t)((b - 16) << (4 * (l & 1)));
        window |= (uint64_t)(x[l] & ((1u << b) - 1)) << held;
        for (held += b; held >= 8; held -= 8, window >>= 8) bits.push_back((uint8_t)window);
    }
    if (held) bits.push_back((uint8_t)window);
    out.insert(out.end(), lengths, lengths + 16);
    out.insert(out.end(), bits.begin(), bits.end());
    for (size_t i = words.size(); i-- > 0;) out.push_back((uint8_t)words[i]), out.push_back((uint8_t)(words[i] >> 8));
}

inline Packed pack(const Tensor& t, int prob_bits = 12) {
    Packed out;
    out.rows = t.rows, out.cols = t.cols, out.elem_bytes = t.elem_bytes, out.prob_bits = prob_bits;
    const int n_threads = 64;
    std::vector<std::vector<uint64_t>> parts(n_threads, std::vector<uint64_t>(256));
    parallel(n_threads, [&](int part) {
        for (size_t i = t.elems.size() * part / n_threads; i < t.elems.size() * (part + 1) / n_threads; i++) parts[part][symbol_of(t, t.elems[i])]++;
    });
    const uint32_t total = 1u << prob_bits;
    uint32_t sum = 0, most = 0;
    for (int s = 0; s < 256; s++) {
        uint64_t count = 0;
        for (auto& part : parts) count += part[s];
        out.freq[s] = count ? std::max<uint32_t>(1, (uint32_t)(count * total / t.elems.size())) : 0;
        sum += out.freq[s];
        if (out.freq[s] > out.freq[most]) most = s;
    }
    out.freq[most] += total - sum;
    uint32_t start[256] = {}, at = 0;
    for (uint32_t s : ranked(out.freq)) start[s] = at, at += out.freq[s];
    const int across = (t.cols + 511) / 512, down = (t.rows + 127) / 128;
    std::vector<std::vector<uint8_t>> tiles(across * down);
    parallel(across * down, [&](int tile) {
        const int row0 = tile / across * 128, col0 = tile % across * 512;
        const int rows = std::min(128, t.rows - row0), cols = std::min(512, t.cols - col0);
        std::vector<uint8_t> symbols, raw;
        for (int r = 0; r < rows; r += 16)
            for (int c = 0; c < cols; c += 16)
                for (int i = 0; i < 256; i++) {
                    const uint16_t w = t.elems[(size_t)(row0 + r + fragment_row(i % 32, i / 32)) * t.cols + col0 + c + fragment_col(i % 32, i / 32)];
                    symbols.push_back((uint8_t)symbol_of(t, w));
                    raw.push_back((uint8_t)(w << 1 | w >> 15));
                }
        encode_stream(symbols, out.freq, start, prob_bits, tiles[tile]);
        if (t.elem_bytes == 2) tiles[tile].insert(tiles[tile].end(), raw.begin(), raw.end());
    });
    out.starts.push_back(0);
    for (auto& tile : tiles) {
        out.tiles.insert(out.tiles.end(), tile.begin(), tile.end());
        out.starts.push_back(out.tiles.size());
    }
    return out;
}

/// Stores a tile as it is.
inline void make_raw(const Tensor& t, Packed& p, int tile) {
    const int across = (t.cols + 511) / 512, row0 = tile / across * 128, col0 = tile % across * 512;
    const int rows = std::min(128, t.rows - row0), cols = std::min(512, t.cols - col0);
    std::vector<uint8_t> planes[2];
    for (int r = 0; r < rows; r += 16)
        for (int c = 0; c < cols; c += 16)
            for (int i = 0; i < 256; i++) {
                const uint16_t w = t.elems[(size_t)(row0 + r + fragment_row(i % 32, i / 32)) * t.cols + col0 + c + fragment_col(i % 32, i / 32)];
                planes[0].push_back((uint8_t)symbol_of(t, w));
                if (t.elem_bytes == 2) planes[1].push_back((uint8_t)(w << 1 | w >> 15));
            }
    planes[0].insert(planes[0].end(), planes[1].begin(), planes[1].end());
    std::vector<uint8_t> tiles(p.tiles.begin(), p.tiles.begin() + p.starts[tile]);
    tiles.insert(tiles.end(), planes[0].begin(), planes[0].end());
    tiles.insert(tiles.end(), p.tiles.begin() + p.starts[tile + 1], p.tiles.end());
    const int64_t more = (int64_t)planes[0].size() - (int64_t)(p.starts[tile + 1] - p.starts[tile]);
    for (size_t i = tile + 1; i < p.starts.size(); i++) p.starts[i] += more;
    p.tiles = tiles;
}

/// The matrix `times` times, one below the other.
inline void stack(Tensor& t, Packed& p, int times) {
    if (t.rows % 128) { printf("tiles of the lower edge cannot be stacked\n"); exit(1); }
    const size_t n = t.elems.size(), n_tiles = p.starts.size() - 1, bytes = p.tiles.size();
    t.elems.resize(n * times);
    p.tiles.resize(bytes * times);
    for (int i = 1; i < times; i++) {
        std::copy_n(t.elems.begin(), n, t.elems.begin() + n * i);
        std::copy_n(p.tiles.begin(), bytes, p.tiles.begin() + bytes * i);
        for (size_t j = 1; j <= n_tiles; j++) p.starts.push_back(bytes * i + p.starts[j]);
    }
    t.rows *= times, p.rows *= times;
}

/// A packed tensor and its elements from a file: rows, cols, bytes of an element,
/// prob_bits, tiles (u32 each), frequencies u32[256], tile starts u64, tiles, elements.
inline bool read_dump(const std::string& path, Tensor& t, Packed& p) {
    FILE* f = fopen(path.c_str(), "rb");
    if (!f) return false;
    uint32_t head[5];
    bool ok = fread(head, 4, 5, f) == 5;
    t.rows = p.rows = head[0], t.cols = p.cols = head[1], t.elem_bytes = p.elem_bytes = head[2], p.prob_bits = head[3];
    p.starts.resize(head[4] + 1);
    ok = ok && fread(p.freq.data(), 4, 256, f) == 256 && fread(p.starts.data(), 8, p.starts.size(), f) == p.starts.size();
    p.tiles.resize(p.starts.back());
    ok = ok && fread(p.tiles.data(), 1, p.tiles.size(), f) == p.tiles.size();
    std::vector<uint8_t> bytes((size_t)t.rows * t.cols * t.elem_bytes);
    ok = ok && fread(bytes.data(), 1, bytes.size(), f) == bytes.size();
    t.elems.resize((size_t)t.rows * t.cols);
    for (size_t i = 0; i < t.elems.size(); i++) t.elems[i] = t.elem_bytes == 2 ? (uint16_t)(bytes[2 * i] | bytes[2 * i + 1] << 8) : bytes[i];
    fclose(f);
    return ok;
}

/// Gaussian weights whose standard deviation varies from row to row.
inline Tensor random_weights(int rows, int cols, int elem_bytes, uint64_t seed) {
    Tensor t;
    t.rows = rows, t.cols = cols, t.elem_bytes = elem_bytes;
    t.elems.resize((size_t)rows * cols);
    parallel(rows, [&](int row) {
        std::mt19937 rng((uint32_t)(seed * 7919 + row));
        std::normal_distribution<float> normal;
        const float sigma = elem_bytes == 2 ? 0.02f * expf(0.25f * normal(rng)) : 13.f;
        uint64_t state = 88172645463325252ull + ((uint64_t)row + (seed << 32)) * 0x9E3779B97F4A7C15ull;
        auto next = [&] { state ^= state << 13; state ^= state >> 7; return state ^= state << 17; };
        for (int i = 0; i < 8; i++) next();
        for (int col = 0; col < cols; col++) {
            const float u = ((next() >> 40) + 1) / 16777217.f, angle = 6.2831853f * (next() >> 40) / 16777216.f;
            const float v = sigma * sqrtf(-2 * logf(u)) * cosf(angle);
            t.elems[(size_t)row * cols + col] = elem_bytes == 2 ? to_bf16(v) : (uint16_t)(uint8_t)(int8_t)std::max(-128.f, std::min(127.f, rintf(v)));
        }
    });
    return t;
}

template <class T>
T* upload(const std::vector<T>& v) {
    T* p;
    CHECK(cudaMalloc(&p, std::max<size_t>(16, v.size() * sizeof(T))));
    CHECK(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}
template <class T>
T* poisoned(size_t n) {
    T* p;
    CHECK(cudaMalloc(&p, n * sizeof(T)));
    CHECK(cudaMemset(p, 0xFF, n * sizeof(T)));
    return p;
}

enum Lookup { kGeneral, kSlots, kBucketed, kMixed };

/// Table of the device: the one asked for, or the general one if something does not
/// fit. Symbols of INT8 have their top bit flipped.
inline std::vector<uint32_t> make_table(const Packed& p, Lookup& lookup) {
    const uint32_t bits = p.prob_bits, flip = p.elem_bytes == 1 ? 128 : 0, size = 1u << bits, bucket = size / kBuckets;
    std::vector<uint32_t> intervals(256), starts, table;
    std::vector<uint8_t> symbols;
    for (uint32_t s : ranked(p.freq)) {
        intervals[s] = (uint32_t)symbols.size() << 16 | p.freq[s];
        starts.insert(starts.end(), p.freq[s], (uint32_t)symbols.size());
        symbols.insert(symbols.end(), p.freq[s], (uint8_t)s);
    }
    if (symbols.size() != size) { printf("frequencies do not sum up\n"); exit(1); }
    bool fits = true;
    auto entry = [&](uint32_t slot, uint32_t more) {
        uint32_t word;
        fits = slot_entry(bits, slot - starts[slot] + more, p.freq[symbols[slot]], symbols[slot] ^ flip, &word) && fits;
        return word;
    };
    if (lookup == kSlots || lookup == kMixed) {
        for (uint32_t i = 0; i < size; i++) table.push_back(entry(i, 0));
    }
    if (lookup == kBucketed || lookup == kMixed) {
        std::vector<uint32_t> mini;
        for (uint32_t first = 0; first < size; first += bucket) {
            if (starts[first] == starts[first + bucket - 1]) {
                table.push_back(entry(first, bucket));
                continue;
            }
            table.push_back((uint32_t)mini.size());
            for (uint32_t rest = 0; rest < bucket; rest++) mini.push_back(entry(first + rest, bucket - rest));
        }
        table.insert(table.end(), mini.begin(), mini.end());
    }
    if (fits && lookup != kGeneral) return table;
    lookup = kGeneral;
    table = intervals;
    table.resize(256 + size / 4);
    memcpy(table.data() + 256, symbols.data(), symbols.size());
    return table;
}

/// A loaded matrix and what it takes.
struct Loaded {
    Matrix matrix;
    Lookup lookup;
    double bits = 0;  // of words, entry points and raw bits, an element
    double rows = 0;  // of words a unit, on average
    uint32_t most_rows = 0;
    double load_us = 0;
    uint64_t first_bad = 0;
    void* owned[5] = {};
    void release() { for (void* p : owned) cudaFree(p); }
};

template <class AnyTable>
__global__ void __launch_bounds__(32 * kLoadWarps) load_kernel(const __grid_constant__ LoadArgs args) {
    load_body<AnyTable>(args);
}

template <class AnyTable>
void launch_load(const LoadArgs& args) {
    Matrix w = {};
    w.table_bytes = args.table_bytes;
    const int shared = kLoadWarps * kLoadBytes + (int)AnyTable::shared_bytes(w);
    CHECK(cudaFuncSetAttribute(load_kernel<AnyTable>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    load_kernel<AnyTable><<<std::min<uint32_t>(2 * 132, (args.n_tiles + kLoadWarps - 1) / kLoadWarps), 32 * kLoadWarps, shared>>>(args);
    CHECK(cudaGetLastError());
}

inline Loaded load(const Packed& p, Lookup lookup = kSlots) {
    Loaded out;
    const std::vector<uint32_t> table = make_table(p, lookup);
    const uint32_t n_tiles = (uint32_t)p.starts.size() - 1, table_bytes = 4 * (uint32_t)table.size();
    const size_t n_units = (size_t)p.rows / 16 * units_across(p.cols);
    uint8_t* tiles = upload(p.tiles);
    uint64_t* starts = upload(p.starts);
    uint4* d_table = (uint4*)upload(table);
    uint32_t* states = poisoned<uint32_t>(n_units * 32);
    uint32_t* positions = poisoned<uint32_t>(n_units + 1);
    uint4* raw = p.elem_bytes == 2 ? poisoned<uint4>(n_units * 256) : nullptr;
    unsigned long long* bad = poisoned<unsigned long long>(1);
    LoadArgs args = {tiles, starts, d_table, nullptr, states, positions, raw, bad, (uint32_t)p.rows, (uint32_t)p.cols, (uint32_t)p.prob_bits, table_bytes, 1, n_tiles};
    cudaEvent_t start, stop;
    cudaEventCreate(&start), cudaEventCreate(&stop);
    auto timed = [&] {
        cudaEventRecord(start);
        lookup == kGeneral ? launch_load<General>(args) : lookup == kBucketed ? launch_load<Buckets>(args) : launch_load<Slots>(args);
        cudaEventRecord(stop);
        CHECK(cudaDeviceSynchronize());
        float ms;
        cudaEventElapsedTime(&ms, start, stop);
        return ms * 1e3;
    };
    timed();
    out.load_us = timed();
    unsigned long long first;
    CHECK(cudaMemcpy(&first, bad, 8, cudaMemcpyDeviceToHost));
    out.first_bad = first;
    size_t at = 0;
    uint4* words = nullptr;
    if (first == ~0ull) {
        std::vector<uint32_t> places(n_units + 1);
        CHECK(cudaMemcpy(places.data(), positions, 4 * n_units, cudaMemcpyDeviceToHost));
        places[n_units] = 0;
        for (auto& place : places) {
            const uint32_t rows = place & ~kRawUnit;
            place = (uint32_t)at | (place & kRawUnit);
            at += rows;
            if (rows > out.most_rows) out.most_rows = rows;
        }
        CHECK(cudaMemcpy(positions, places.data(), 4 * n_units + 4, cudaMemcpyHostToDevice));
        args.words = words = poisoned<uint4>((at + 1) * kRowBytes / 16);
        timed();
        out.load_us += timed();
        CHECK(cudaMemcpy(&first, bad, 8, cudaMemcpyDeviceToHost));
        out.first_bad = first;
    }
    cudaFree(tiles), cudaFree(starts), cudaFree(bad);
    out.matrix = {d_table, words, states, positions, raw, (uint32_t)p.rows, (uint32_t)p.cols, (uint32_t)p.prob_bits, table_bytes, 1, 0};
    out.lookup = lookup;
    out.bits = 8.0 * ((double)kRowBytes * at + n_units * 132.0 + (raw ? n_units * 4096.0 : 0)) / p.rows / p.cols;
    out.rows = (double)at / n_units;
    void* owned[5] = {d_table, words, states, positions, raw};
    memcpy(out.owned, owned, sizeof owned);
    return out;
}

/// Median microseconds of a launch in a graph of many.
inline double time_graph(cudaStream_t stream, int n, const std::function<void(int)>& run) {
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

}  // namespace lab
