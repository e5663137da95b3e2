// Record -> matrix in device memory: parses and checks every tile's stream, finds
// the entry points, and brings words and raw bits into the order of the lanes.
// One warp a tile. The words are read where they lie, whatever their alignment.
#pragma once

#include "rans.cuh"

namespace transom {
namespace rans {

enum TileError : uint32_t { kStreamBytes = 1, kStatesPadding, kOutOfWords, kWordsLeft, kFinalState };

struct LoadArgs {
    const uint8_t* tiles;          // the record from its first tile on
    const uint64_t* tile_starts;   // [tile + 1], bytes from `tiles`
    const uint32_t* word_starts;   // [tile], see load_words
    const uint4* table;
    uint16_t* words;               // room for the words of each tile, and 1024 bytes
    uint32_t* states;
    uint8_t* counts;
    uint32_t* positions;
    uint4* raw;                    // null if elements have one byte
    unsigned long long* first_bad; // minimum of tile << 8 | TileError
    uint32_t rows, cols, prob_bits, general, entry_bytes, n_tiles;
};

/// Words to set aside for a tile of `units` units and `n` elements, whose stream has
/// n_stream bytes (n if it is not coded): each unit begins at a multiple of 8 words.
__host__ __device__ inline uint32_t load_words(uint32_t n_stream, uint32_t units, uint32_t n, bool is_raw) {
    (void)n;
    return is_raw ? units * kUnitBlocks * 128 : (n_stream / 2 + 8 * units + 7) / 8 * 8;
}

#ifdef __CUDACC__

constexpr int kLoadWarps = 8;
constexpr int kLoadStride = 130;  // u16 a lane of the words of a unit on their way; 65 words, so that banks differ
constexpr int kLoadBytes = 32 * kLoadStride * 2;

/// `n_bits` bits from bit `at` on, byte after byte.
__device__ __forceinline__ uint32_t take_bits(const uint8_t* bytes, uint32_t at, uint32_t n_bits) {
    uint64_t window = 0;
    for (uint32_t i = 0; i <= (at % 8 + n_bits - 1) / 8; i++) window |= (uint64_t)bytes[at / 8 + i] << (8 * i);
    return (uint32_t)(window >> (at % 8)) & (uint32_t)((1ull << n_bits) - 1);
}

template <bool kGeneral>
__device__ inline uint32_t load_tile(const LoadArgs& args, const Params& params, uint32_t tile, uint16_t* taken, int lane) {
    const uint32_t across = (args.cols + kTileCols - 1) / kTileCols, units = units_across(args.cols);
    const uint32_t row = tile / across * kTileRows, col = tile % across * kTileCols;
    const uint32_t strips = min((uint32_t)kTileRows, args.rows - row) / 16, blocks = min((uint32_t)kTileCols, args.cols - col) / 16;
    const uint32_t n = strips * blocks * 256;
    const uint8_t* stored = args.tiles + args.tile_starts[tile];
    const uint32_t n_bytes = (uint32_t)(args.tile_starts[tile + 1] - args.tile_starts[tile]);
    const uint32_t n_stream = n_bytes - (args.raw ? n : 0);
    const bool is_raw = n_stream == n;
    // Raw bits, to the lanes that need them.
    if (args.raw) {
        const uint8_t* raw = stored + n_stream + lane;
        for (uint32_t i = 0; i < strips * blocks; i++) {
            const uint32_t c = col + 16 * (i % blocks);
            uint8_t bytes[8];
#pragma unroll
            for (int j = 0; j < 8; j++) bytes[j] = raw[i * 256 + 32 * j];
            uint2* to = (uint2*)(args.raw + ((size_t)(row / 16 + i / blocks) * units * 8 + c / 32) * 32 + lane) + (c / 16) % 2;
            *to = make_uint2(spread_raw(bytes), spread_raw(bytes + 4));
        }
    }
    uint32_t position = args.word_starts[tile];
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
    uint16_t* mine = taken + lane * kLoadStride;
    for (uint32_t strip = 0; strip < strips; strip++) {
        for (uint32_t b0 = 0; b0 < blocks; b0 += kUnitBlocks) {
            const size_t unit = (size_t)(row / 16 + strip) * units + (col + 16 * b0) / kUnitCols;
            const uint32_t b1 = min(blocks, b0 + kUnitBlocks);
            if (is_raw) {
                for (uint32_t b = b0; b < b1; b++) {
                    uint2 v = make_uint2(0, 0);
                    for (int j = 0; j < 8; j++) (j < 4 ? v.x : v.y) |= (uint32_t)stored[(strip * blocks + b) * 256 + 32 * j + lane] << (8 * (j & 3));
                    ((uint2*)(args.words + position))[(b - b0) * 32 + lane] = v;
                }
                args.states[unit * 32 + lane] = 0;
                args.counts[unit * 32 + lane] = 0;
                if (lane == 0) args.positions[unit] = position | kRawUnit;
                position += kUnitBlocks * 128;
                continue;
            }
            const uint32_t start = x;
            uint32_t count = 0;
            for (uint32_t b = b0; b < b1; b++) {
                const int steps = strip + 1 == strips && b + 1 == blocks ? 6 : 8;
                for (int i = 0; i < steps; i++) {
                    advance<kGeneral>(params, x);
                    const bool low = x < 1u << 16;
                    const uint32_t who = __ballot_sync(~0u, low), at = used + __popc(who & ((1u << lane) - 1));
                    if (low) {
                        const uint32_t word = at < n_words ? from[2 * at] | from[2 * at + 1] << 8 : 0;
                        x = x << 16 | word;
                        mine[count++] = (uint16_t)word;
                    }
                    used += __popc(who);
                }
                if (used > n_words) return kOutOfWords;
            }
            uint32_t end = count;
#pragma unroll
            for (int i = 1; i < 32; i *= 2) {
                uint32_t other = __shfl_up_sync(~0u, end, i);
                if (lane >= i) end += other;
            }
            args.states[unit * 32 + lane] = start;
            args.counts[unit * 32 + lane] = (uint8_t)count;
            if (lane == 0) args.positions[unit] = position;
            for (uint32_t i = 0; i < count; i++) args.words[position + end - count + i] = mine[i];
            position += (__shfl_sync(~0u, end, 31) + 7) / 8 * 8;
        }
    }
    if (is_raw) return 0;
    if (used < n_words) return kWordsLeft;
    if (__any_sync(~0u, x >> 16 != 1)) return kFinalState;
    return 0;
}

template <bool kGeneral>
__device__ __forceinline__ void load_body(const LoadArgs& args) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint8_t* table = shared + kLoadWarps * kLoadBytes;
    for (uint32_t i = threadIdx.x; i < table_bytes(args.prob_bits, kGeneral) / 16; i += 32 * kLoadWarps) ((uint4*)table)[i] = args.table[i];
    __syncthreads();
    const Params params = {shared_address(table), (1u << args.prob_bits) - 1, args.entry_bytes, 1, args.prob_bits, 0};
    for (uint32_t tile = blockIdx.x * kLoadWarps + warp; tile < args.n_tiles; tile += gridDim.x * kLoadWarps) {
        const uint32_t error = load_tile<kGeneral>(args, params, tile, (uint16_t*)(shared + warp * kLoadBytes), lane);
        __syncwarp();
        if (error && lane == 0) atomicMin(args.first_bad, (unsigned long long)tile << 8 | error);
    }
}

#endif  // __CUDACC__

}  // namespace rans
}  // namespace transom
