// Record -> matrix in device memory: parses and checks every tile's stream,
// finds the entry points and re-lays the raw plane. One warp a tile.
#pragma once

#include "rans.cuh"

namespace transom {
namespace rans {

enum TileError : uint32_t { kStreamBytes = 1, kStatesPadding, kOutOfWords, kWordsLeft, kFinalState };

struct LoadArgs {
    const uint8_t* tiles;          // the record from its first tile on
    const uint64_t* tile_starts;   // [tile + 1], bytes from `tiles`
    const uint32_t* word_starts;   // [tile], number of a tile's first word in `words`; multiples of 8
    const uint32_t* table;
    uint16_t* words;               // room for the stream of each tile, and 2048 bytes
    uint32_t* states;
    uint32_t* positions;
    uint4* raw;                    // null if elements have one byte
    unsigned long long* first_bad; // minimum of tile << 8 | TileError
    uint32_t rows, cols, prob_bits, n_tiles;
};

#ifdef __CUDACC__

constexpr int kLoadWarps = 8;

/// Bits of the lane states, `n_bits` from bit `at` on, byte after byte.
__device__ __forceinline__ uint32_t take_bits(const uint8_t* bytes, uint32_t at, uint32_t n_bits) {
    uint64_t window = 0;
    for (uint32_t i = 0; i <= (at % 8 + n_bits - 1) / 8; i++) window |= (uint64_t)bytes[at / 8 + i] << (8 * i);
    return (uint32_t)(window >> (at % 8)) & (uint32_t)((1ull << n_bits) - 1);
}

__device__ inline uint32_t load_tile(const LoadArgs& args, const Params& params, uint32_t tile, uint32_t ring, int lane) {
    const uint32_t across = (args.cols + kTileCols - 1) / kTileCols, units = units_across(args.cols);
    const uint32_t row = tile / across * kTileRows, col = tile % across * kTileCols;
    const uint32_t strips = min((uint32_t)kTileRows, args.rows - row) / 16, blocks = min((uint32_t)kTileCols, args.cols - col) / 16;
    const uint32_t n = strips * blocks * 256;
    const uint8_t* stored = args.tiles + args.tile_starts[tile];
    const uint32_t n_bytes = (uint32_t)(args.tile_starts[tile + 1] - args.tile_starts[tile]);
    const uint32_t n_stream = n_bytes - (args.raw ? n : 0);
    // States.
    if (n_stream < 16 + 64) return kStreamBytes;
    const uint32_t n_bits = 16 + (stored[lane / 2] >> (4 * (lane & 1)) & 15);
    uint32_t end = n_bits;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
        uint32_t other = __shfl_up_sync(~0u, end, i);
        if (lane >= i) end += other;
    }
    const uint32_t all_bits = __shfl_sync(~0u, end, 31), n_states = 16 + (all_bits + 7) / 8;
    if (n_stream < n_states) return kStreamBytes;
    if ((n_stream - n_states) % 2) return kStreamBytes;
    if (all_bits % 8 && stored[n_states - 1] >> (all_bits % 8)) return kStatesPadding;
    uint32_t x = take_bits(stored + 16, end - n_bits, n_bits) | 1u << n_bits;
    // Words, to where they are aligned.
    const uint32_t n_words = (n_stream - n_states) / 2, first = args.word_starts[tile];
    const uint8_t* from = stored + n_states;
    for (uint32_t i = lane; i < n_words; i += 32) args.words[first + i] = (uint16_t)(from[2 * i] | from[2 * i + 1] << 8);
    // Raw bits, to the lanes that need them.
    if (args.raw) {
        const uint8_t* raw = stored + n_stream + lane;
        for (uint32_t i = 0; i < strips * blocks; i += 1) {
            const uint32_t strip = i / blocks, b = i % blocks, c = col + 16 * b;
            uint8_t bytes[8];
#pragma unroll
            for (int j = 0; j < 8; j++) bytes[j] = raw[i * 256 + 32 * j];
            uint2* to = (uint2*)(args.raw + ((size_t)(row / 16 + strip) * units * 8 + c / 32) * 32 + lane) + (c / 16) % 2;
            *to = make_uint2(spread_raw(bytes), spread_raw(bytes + 4));
        }
    }
    __threadfence_block();
    __syncwarp();
    Words words;
    words.begin(args.words, first, ring, lane);
    words.arrive();
    for (uint32_t i = 0; i < strips * blocks; i++) {
        const uint32_t c = col + i % blocks * 16, position = words.position(args.words, lane);
        if (position > first + n_words) return kOutOfWords;
        if (c % kUnitCols == 0) {
            const size_t unit = (size_t)(row / 16 + i / blocks) * units + c / kUnitCols;
            args.states[unit * 32 + lane] = x;
            if (lane == 0) args.positions[unit] = position;
        }
        uint32_t entries[8];
        block(params, x, words, lane, i + 1 == strips * blocks, entries);
    }
    wait_copies<0>();
    const uint32_t position = words.position(args.words, lane);
    if (position > first + n_words) return kOutOfWords;
    if (position < first + n_words) return kWordsLeft;
    if (__any_sync(~0u, x >> 16 != 1)) return kFinalState;
    return 0;
}

__global__ void __launch_bounds__(32 * kLoadWarps) load_kernel(const __grid_constant__ LoadArgs args) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t* table = (uint32_t*)(shared + kLoadWarps * kRingBytes);
    for (uint32_t i = threadIdx.x; i < 1u << args.prob_bits; i += 32 * kLoadWarps) table[i] = args.table[i];
    __syncthreads();
    const Params params = make_params(shared_address(table), args.prob_bits, lane);
    for (uint32_t tile = blockIdx.x * kLoadWarps + warp; tile < args.n_tiles; tile += gridDim.x * kLoadWarps) {
        const uint32_t error = load_tile(args, params, tile, shared_address(shared) + warp * kRingBytes, lane);
        wait_copies<0>();
        __syncwarp();
        if (error && lane == 0) atomicMin(args.first_bad, (unsigned long long)tile << 8 | error);
    }
}

#endif  // __CUDACC__

}  // namespace rans
}  // namespace transom
