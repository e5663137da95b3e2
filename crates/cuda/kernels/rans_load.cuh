// Record -> matrix in device memory: parses and checks every tile's stream, finds
// the entry points, and brings words and raw bits into the order of the lanes.
// One warp a tile. The words are read where they lie, whatever their alignment.
// Twice: first how many rows of words each unit has, then the words themselves.
#pragma once

#include "rans.cuh"

namespace transom {
namespace rans {

enum TileError : uint32_t { kStreamBytes = 1, kStatesPadding, kOutOfWords, kWordsLeft, kFinalState };

struct LoadArgs {
    const uint8_t* tiles;          // the record from its first tile on
    const uint64_t* tile_starts;   // [tile + 1], bytes from `tiles`
    const uint4* table;
    uint4* words;                  // null: measure
    uint32_t* states;
    uint32_t* positions;           // as in Matrix; when measuring, rows of words of each unit | kRawUnit
    uint4* raw;                    // null if every plane is coded
    unsigned long long* first_bad; // minimum of tile << 8 | TileError
    uint32_t rows, cols, prob_bits, table_bytes, one, n_tiles;
    uint32_t f16, unused;
};

#ifdef __CUDACC__

constexpr int kLoadWarps = 8;
constexpr int kLoadBytes = 8 * kUnitBlocks * kRowBytes;  // the most words that a unit of one coded plane can have

/// `n_bits` bits from bit `at` on, byte after byte.
__device__ __forceinline__ uint32_t take_bits(const uint8_t* bytes, uint32_t at, uint32_t n_bits) {
    uint64_t window = 0;
    for (uint32_t i = 0; i <= (at % 8 + n_bits - 1) / 8; i++) window |= (uint64_t)bytes[at / 8 + i] << (8 * i);
    return (uint32_t)(window >> (at % 8)) & (uint32_t)((1ull << n_bits) - 1);
}

template <class AnyTable>
__device__ inline uint32_t load_tile(const LoadArgs& args, const AnyTable& table, uint32_t tile, uint16_t* taken, int lane) {
    const uint32_t across = (args.cols + kTileCols - 1) / kTileCols, units = units_across(args.cols);
    const uint32_t row = tile / across * kTileRows, col = tile % across * kTileCols;
    const uint32_t strips = min((uint32_t)kTileRows, args.rows - row) / 16, blocks = min((uint32_t)kTileCols, args.cols - col) / 16;
    const uint32_t n = strips * blocks * 256;
    const uint8_t* stored = args.tiles + args.tile_starts[tile];
    const uint32_t n_bytes = (uint32_t)(args.tile_starts[tile + 1] - args.tile_starts[tile]);
    const uint32_t n_stream = n_bytes - (args.raw ? n : 0);
    const bool is_raw = n_stream == n * AnyTable::kPlanes;
    // Raw bits, to the lanes that need them.
    if (args.raw && args.words) {
        const uint8_t* raw = stored + n_stream + lane;
        for (uint32_t i = 0; i < strips * blocks; i++) {
            const uint32_t c = col + 16 * (i % blocks);
            uint8_t bytes[8];
#pragma unroll
            for (int j = 0; j < 8; j++) bytes[j] = raw[i * 256 + 32 * j];
            uint2* to = (uint2*)(args.raw + ((size_t)(row / 16 + i / blocks) * units * 8 + c / 32) * 32 + lane) + (c / 16) % 2;
            *to = make_uint2(spread_raw(bytes, args.f16), spread_raw(bytes + 4, args.f16));
        }
    }
    uint32_t x = 0, n_states = 0, n_words = 0;
    if (!is_raw) {
        if (n_stream < 16 + 64) return kStreamBytes;
        const uint32_t n_bits = 16 + (stored[lane / 2] >> (4 * (lane & 1)) & 15);
        uint32_t end = n_bits;
#pragma unroll
        for (int i = 1; i < 32; i *= 2) {
            uint32_t other = __shfl_up_sync(~0u, end, i);
            if (lane >= i) end += other;
        }
        const uint32_t all_bits = __shfl_sync(~0u, end, 31);
        n_states = 16 + (all_bits + 7) / 8;
        if (n_stream < n_states || (n_stream - n_states) % 2) return kStreamBytes;
        if (all_bits % 8 && stored[n_states - 1] >> (all_bits % 8)) return kStatesPadding;
        x = take_bits(stored + 16, end - n_bits, n_bits) | 1u << n_bits;
        n_words = (n_stream - n_states) / 2;
    }
    const uint8_t* from = stored + n_states;
    uint32_t used = 0;
    for (uint32_t strip = 0; strip < strips; strip++) {
        for (uint32_t b0 = 0; b0 < blocks; b0 += kUnitBlocks) {
            const size_t unit = (size_t)(row / 16 + strip) * units + (col + 16 * b0) / kUnitCols;
            const uint32_t b1 = min(blocks, b0 + kUnitBlocks);
            if (is_raw) {
                if (!args.words) {
                    if (lane == 0) args.positions[unit] = (kRawRows * AnyTable::kPlanes) | kRawUnit;
                    continue;
                }
                uint2* to = (uint2*)(args.words + (size_t)(args.positions[unit] & ~kRawUnit) * (kRowBytes / 16));
                for (int plane = 0; plane < AnyTable::kPlanes; plane++) {
                    for (uint32_t b = b0; b < b1; b++) {
                        uint2 v = make_uint2(0, 0);
                        for (int j = 0; j < 8; j++) (j < 4 ? v.x : v.y) |= (uint32_t)stored[plane * n + (strip * blocks + b) * 256 + 32 * j + lane] << (8 * (j & 3));
                        to[(plane * kUnitBlocks + b - b0) * 32 + lane] = v;
                    }
                }
                args.states[unit * 32 + lane] = 0;
                continue;
            }
            const uint32_t start = x;
            uint32_t count = 0;
            for (uint32_t b = b0; b < b1; b++) {
                const int steps = strip + 1 == strips && b + 1 == blocks ? 8 - 2 / AnyTable::kPlanes : 8;
                for (int i = 0; i < steps * AnyTable::kPlanes; i++) {
                    if constexpr (AnyTable::kPlanes == 2) i % 2 ? table.low.advance(x) : table.advance(x);
                    else table.advance(x);
                    const bool low = x < 1u << 16;
                    const uint32_t who = __ballot_sync(~0u, low), at = used + __popc(who & ((1u << lane) - 1));
                    if (low) {
                        const uint32_t word = at < n_words ? from[2 * at] | from[2 * at + 1] << 8 : 0;
                        x = x << 16 | word;
                        taken[32 * count++ + lane] = (uint16_t)word;
                    }
                    used += __popc(who);
                }
                if (used > n_words) return kOutOfWords;
            }
            const uint32_t n_rows = __reduce_max_sync(~0u, count);
            if (!args.words) {
                if (lane == 0) args.positions[unit] = n_rows;
                continue;
            }
            args.states[unit * 32 + lane] = start;
            for (uint32_t i = count; i < n_rows; i++) taken[32 * i + lane] = 0;
            __syncwarp();
            uint4* to = args.words + (size_t)args.positions[unit] * (kRowBytes / 16);
            for (uint32_t i = lane; i < n_rows * (kRowBytes / 16); i += 32) to[i] = ((const uint4*)taken)[i];
            __syncwarp();
        }
    }
    if (is_raw) return 0;
    if (used < n_words) return kWordsLeft;
    if (__any_sync(~0u, x >> 16 != 1)) return kFinalState;
    return 0;
}

template <class AnyTable>
__device__ __forceinline__ void load_body(const LoadArgs& args) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint8_t* at_table = shared + kLoadWarps * kLoadBytes * AnyTable::kPlanes;
    Matrix w = {};
    w.table = args.table, w.prob_bits = args.prob_bits, w.table_bytes = args.table_bytes, w.one = args.one;
    AnyTable::copy(w, at_table, threadIdx.x, 32 * kLoadWarps);
    __syncthreads();
    const AnyTable table(w, shared_address(at_table), 0, lane);
    for (uint32_t tile = blockIdx.x * kLoadWarps + warp; tile < args.n_tiles; tile += gridDim.x * kLoadWarps) {
        const uint32_t error = load_tile(args, table, tile, (uint16_t*)(shared + warp * kLoadBytes * AnyTable::kPlanes), lane);
        __syncwarp();
        if (error && lane == 0) atomicMin(args.first_bad, (unsigned long long)tile << 8 | error);
    }
}

#endif  // __CUDACC__

}  // namespace rans
}  // namespace transom
