// Fused product y[M,N] = x[M,K] * W[N,K]^T from fixed-rate weights for up to
// 16 tokens, and its dense twin: the same kernel, only decode_half differs.
//
// A block has kTogether tiles of 16 rows times kApart groups of warps, each
// with an equal share of the slices of K. Every warp has a ring of its own for
// chunks of weights; activations come through L1 into shared memory, half a chunk ahead.
// The sums of all slices meet in shared memory and are added in order.
#pragma once

#include "mma.cuh"
#include "ring.cuh"

namespace transom {

#ifdef __CUDACC__

constexpr int kStages = 2;
/// Columns of activations that are copied at a time: as many as leave room for two blocks an SM.
TRANSOM_BOTH constexpr uint32_t x_cols(int tokens8) { return tokens8 == 1 ? 128 : 64; }
/// A token's, and 16 bytes so that those of eight tokens lie in different banks.
TRANSOM_BOTH constexpr uint32_t x_row_bytes(int tokens8) { return 2 * x_cols(tokens8) + 16; }

/// Shared memory of a block.
template <WeightFormat kFormat, int kTokens8, int kTogether, int kApart>
constexpr uint32_t product_shared_bytes(uint32_t chunk_bytes, uint32_t n_slices) {
    constexpr uint32_t warps = kTogether * kApart;
    const uint32_t sums = 2 * kTogether * sum_slots(n_slices, kApart) * 512 * kTokens8;
    return warps * ((kStages * chunk_bytes + 127) / 128 * 128) + (is_dense(kFormat) ? 0 : warps * kChunkElems) + warps * kTokens8 * 8 * x_row_bytes(kTokens8) + sums + 128 +
           warps * kStages * 8;
}

/// Row-major activations of a chunk's columns, or of half of them, in shared memory; the next are on their way as soon
/// as these are in registers.
template <int kTokens8>
struct Activations {
    static constexpr uint32_t kCols = x_cols(kTokens8), kPieces = kCols / 8;  // of 16 bytes
    static constexpr uint32_t kTokensAtOnce = 32 / kPieces, kRowBytes = x_row_bytes(kTokens8);
    const uint8_t* next;  // the lane's piece of the first token that it copies
    uint32_t to, stride;  // of the stage, and bytes from one token to the next
    uint32_t row[kTokens8];
    uint32_t column, first, end;  // of the next copy
    uint32_t token, n_columns;    // first token, and columns that have the lane's piece

    __device__ __forceinline__ Activations(const ProductParams& p, uint32_t stage, int lane, uint32_t first, uint32_t end)
        : stride(p.x_stride * 2), column(first), first(first), end(end), token(lane / kPieces) {
        next = (const uint8_t*)p.x + (size_t)token * stride + (first + lane % kPieces * 8) * 2;
        to = stage + token * kRowBytes + lane % kPieces * 16;
        n_columns = max(p.x_stride, lane % kPieces * 8) - lane % kPieces * 8;
        // ldmatrix takes the addresses of a matrix's rows, tokens, from eight lanes. Results of tokens that are not there are not stored.
#pragma unroll
        for (int g = 0; g < kTokens8; g++) row[g] = stage + min((uint32_t)(g * 8 + lane % 8), p.tokens - 1) * kRowBytes + lane / 8 * 16;
    }
    /// Starts to copy the next columns, zeros behind the last.
    __device__ __forceinline__ void copy(const ProductParams& p) {
        // The condition is the same for all lanes.
        if (p.tokens <= kTokensAtOnce) copy_tokens<kTokensAtOnce>(p);
        else copy_tokens<8 * kTokens8>(p);
        column += kCols, next += 2 * kCols;
        if (column == end) column = first, next -= (end - first) * 2;
    }
    template <uint32_t kTokens>
    __device__ __forceinline__ void copy_tokens(const ProductParams& p) const {
        const uint32_t n_tokens = column < n_columns ? p.tokens : 0;
#pragma unroll
        for (uint32_t j = 0; j < kTokens; j += kTokensAtOnce) {
            const uint32_t n_bytes = token + j < n_tokens ? 16 : 0;
            asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to + j * kRowBytes), "l"(next + (size_t)j * stride), "r"(n_bytes) : "memory");
        }
    }
    /// The lane's own copies have arrived; those of others after a __syncwarp().
    __device__ __forceinline__ void wait() const { asm volatile("cp.async.wait_all;" ::: "memory"); }
    /// B fragments of k16 steps 2 j and 2 j + 1 of the columns.
    __device__ __forceinline__ uint4 fragments(int g, int j) const {
        uint4 v;
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(row[g] + j * 64) : "memory");
        return v;
    }
};

template <WeightFormat kFormat, int kTokens8, int kTogether, int kApart>
__device__ __forceinline__ void product(const ProductParams& p) {
    constexpr bool kDense = is_dense(kFormat);
    constexpr int kWarps = kTogether * kApart, kTileFloats = kTokens8 * 128;
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = lane_index(), strip = warp % kTogether, group = warp / kTogether;
    const uint32_t bytes = kDense ? chunk_bytes(kFormat, 0) : p.chunk_bytes;
    const uint32_t ring_bytes = (kStages * bytes + 127) / 128 * 128;
    const uint32_t n_slices = slices(p.rows, p.cols), across = (p.cols + kChunkCols - 1) / kChunkCols;
    const uint32_t slots = sum_slots(n_slices, kApart), own = n_slices / kApart;

    uint8_t* at = shared;
    uint8_t* ring_memory = at + warp * ring_bytes;
    at += kWarps * ring_bytes;
    uint8_t* plane = at + warp * kChunkElems;
    at += kDense ? 0 : kWarps * kChunkElems;
    const uint32_t x_stage = computed_once(shared_address(at) + warp * kTokens8 * 8 * x_row_bytes(kTokens8));
    at += kWarps * kTokens8 * 8 * x_row_bytes(kTokens8);
    uint8_t* symbols = at;
    at += 128;
    const uint32_t bar = computed_once(shared_address(at) + warp * kStages * 8);
    at += kWarps * kStages * 8;
    float* sums = (float*)at;  // [2][strip][slot][token group][128]

    if (lane == 0) {
        for (int i = 0; i < kStages; i++) barrier_init(bar + 8 * i, 1);
        asm volatile("fence.mbarrier_init.release.cluster;");
    }
    asm volatile("griddepcontrol.launch_dependents;");
    __syncwarp();

    const uint32_t n_groups = (p.n_tiles + kTogether - 1) / kTogether;
    const uint32_t rounds = (n_groups - blockIdx.x + gridDim.x - 1) / gridDim.x;
    const uint32_t slice_first = n_slices * group / kApart, slice_last = n_slices * (group + 1) / kApart;
    const uint32_t first = computed_once(min(across, slice_begin(p.rows, p.cols, slice_first) / kChunkCols));
    const uint32_t end = computed_once(min(across, slice_begin(p.rows, p.cols, slice_last) / kChunkCols));

    ChunkRing<kStages> ring(p, ring_memory, bar, bytes, first, end, blockIdx.x * kTogether + strip, gridDim.x * kTogether);
    for (int i = 0; i < kStages; i++) ring.fill(p, lane, i);
    if (!kDense) {
        for (int i = lane; i < (int)kChunkElems / 16; i += 32) ((uint4*)plane)[i] = make_uint4(0, 0, 0, 0);
        if (warp < (int)p.n_segments) symbols[warp * 32 + lane] = p.segments[warp].symbols[lane];
    }
    __syncthreads();
    // Activations and output belong to the kernel before this one until here.
    asm volatile("griddepcontrol.wait;" ::: "memory");

    Activations<kTokens8> activations(p, x_stage, lane, first * kChunkCols, end * kChunkCols);
    if (first < end) activations.copy(p);

    for (uint32_t round = 0; round < rounds; round++) {
        const uint32_t tile = (blockIdx.x + round * gridDim.x) * kTogether + strip;
        if (tile < p.n_tiles) {
            const uint32_t segment = locate(p, tile).segment;
            float steps[2];
            load_steps<kFormat>(p, tile, lane, steps);
            float* out = sums + ((round % 2 * kTogether + strip) * slots + (group == 0 ? 0 : slice_first - own + (own > 0 ? 1 : 0))) * kTileFloats;
            float acc[kTokens8][4] = {}, total[kTokens8][4];
#pragma unroll
            for (int g = 0; g < kTokens8; g++)
#pragma unroll
                for (int i = 0; i < 4; i++) total[g][i] = -0.0f;  // -0 + s is s for every s
            uint32_t slice = slice_first;
            uint32_t border = min(across, slice_begin(p.rows, p.cols, slice + 1) / kChunkCols);
            for (uint32_t c = first; c < end; c++) {
                const uint8_t* chunk = ring.wait();
                const uint8_t* header = chunk + header_offset(kFormat);
                Patches patches = {};
                if (!kDense) patches.put(header, symbols + segment * 32, p.segments[segment], plane, lane);
                constexpr int kUnits = x_cols(kTokens8) / 32;  // of two k16 steps
                uint4 x[kTokens8][kUnits];
                auto load_x = [&]() {
                    activations.wait();
                    // Patches and activations of all lanes are there.
                    __syncwarp();
#pragma unroll
                    for (int g = 0; g < kTokens8; g++)
#pragma unroll
                        for (int j = 0; j < kUnits; j++) x[g][j] = activations.fragments(g, j);
                    // All lanes have read the stage.
                    __syncwarp();
                    activations.copy(p);
                };
                auto half = [&](auto which) {
                    constexpr int h = decltype(which)::value;
                    if (h == 0 || kUnits == 2) load_x();
                    uint32_t a[16];
                    decode_half<kFormat, h>(chunk, plane, lane, steps[0], steps[1], a);
#pragma unroll
                    for (int j = 0; j < 2; j++)
#pragma unroll
                        for (int g = 0; g < kTokens8; g++) {
                            const uint4 v = x[g][(2 * h + j) % kUnits];
                            mma<is_half(kFormat)>(acc[g], a + 8 * j, v.x, v.y);
                            mma<is_half(kFormat)>(acc[g], a + 8 * j + 4, v.z, v.w);
                        }
                };
                half(Constant<0>());
                half(Constant<1>());
                if (!kDense) {
                    __syncwarp();
                    patches.clear(plane, lane);
                }
                // Filled again only when every lane's loads have arrived: the products above have read them.
                __syncwarp();
                ring.release(p, lane);
                if (c + 1 == border) {
                    if (group == 0) {
#pragma unroll
                        for (int g = 0; g < kTokens8; g++)
#pragma unroll
                            for (int i = 0; i < 4; i++) total[g][i] += acc[g][i];
                    }
                    if (group > 0 || c + 1 == end) {
#pragma unroll
                        for (int g = 0; g < kTokens8; g++) {
                            float v[4];
#pragma unroll
                            for (int i = 0; i < 4; i++) v[i] = group == 0 ? total[g][i] : acc[g][i];
                            ((float4*)out)[g * 32 + lane] = make_float4(v[0], v[1], v[2], v[3]);
                        }
                    }
#pragma unroll
                    for (int g = 0; g < kTokens8; g++)
#pragma unroll
                        for (int i = 0; i < 4; i++) acc[g][i] = 0;
                    if (group > 0) out += kTileFloats;
                    slice++;
                    border = min(across, slice_begin(p.rows, p.cols, slice + 1) / kChunkCols);
                }
            }
        }
        __syncthreads();
        const float* from = sums + round % 2 * kTogether * slots * kTileFloats;
        for (uint32_t i = threadIdx.x; i < kTogether * kTileFloats; i += 32 * kWarps) {
            // Consecutive threads: rows of a tile, then tokens.
            const uint32_t row = i % 16, token = i / 16 % (kTokens8 * 8), s = i / kTileFloats;
            const uint32_t n = ((blockIdx.x + round * gridDim.x) * kTogether + s) * 16 + row;
            if (n >= p.rows || token >= p.tokens) continue;
            const float* v = from + s * slots * kTileFloats + token / 8 * 128 + (row % 8 * 4 + token % 8 / 2) * 4 + row / 8 * 2 + token % 2;
            float sum = v[0];
#pragma unroll 8
            for (uint32_t j = 1; j < slots; j++) sum += v[j * kTileFloats];
            store_result<kFormat>(p, token, n, sum);
        }
    }
    // Copied for a round that does not come.
    activations.wait();
}

#endif  // __CUDACC__

}  // namespace transom
