// Fused product y[M,N] = x[M,K] * W[N,K]^T from fixed-rate weights for up to
// 16 tokens, and its dense twin: the same kernel, only decode_half differs.
//
// A block has kTiles tiles of 16 rows at a time and kApart warps, each with an
// equal share of the slices of K. Every warp has a ring of its own for chunks
// of weights, of the tiles by turns, which share its activations; those come
// through L1 into shared memory, a chunk or half of one ahead. The sums of all
// slices meet in shared memory and are added in order.
#pragma once

#include "mma.cuh"
#include "ring.cuh"

namespace transom {

#ifdef __CUDACC__

/// Columns of activations that are copied at a time: as many as leave room for two blocks an SM.
TRANSOM_BOTH constexpr uint32_t x_cols(int tokens8) { return tokens8 == 1 ? 128 : 64; }
/// A token's, and 16 bytes so that those of eight tokens lie in different banks.
TRANSOM_BOTH constexpr uint32_t x_row_bytes(int tokens8) { return 2 * x_cols(tokens8) + 16; }

/// Shared memory of a block.
template <WeightFormat kFormat, int kTokens8, int kTiles, int kApart>
constexpr uint32_t product_shared_bytes(uint32_t chunk_bytes, uint32_t n_slices) {
    const uint32_t ring = (kStages * chunk_bytes + 127) / 128 * 128, x = kTokens8 * 8 * x_row_bytes(kTokens8);
    return kApart * (ring + plane_bytes(kFormat) + kTiles * scale_bytes(kFormat) + x + kStages * 8) + 128 + 2 * kTiles * sum_slots(n_slices, kApart) * 512 * kTokens8;
}

/// Row-major activations of a chunk's columns, or of half of them, in shared memory; the next are on their way as soon
/// as these are in registers.
template <int kTokens8>
struct Activations {
    static constexpr uint32_t kCols = x_cols(kTokens8), kPieces = kCols / 8;  // of 16 bytes
    static constexpr uint32_t kTokensAtOnce = 32 / kPieces, kRowBytes = x_row_bytes(kTokens8);
    uint64_t from;               // the lane's piece of the first token that it copies, of the first columns
    uint32_t to, stride;         // of the stage, and bytes from two tokens to the next two
    uint32_t row[kTokens8];
    uint32_t offset, end;        // of the next columns, and of those behind the last, in bytes
    uint32_t there;              // bytes that have the lane's piece of x
    uint32_t tokens;             // bit j: whether there is the token that the lane copies as its j-th

    __device__ __forceinline__ Activations(const ProductParams& p, uint32_t stage, int lane, uint32_t first, uint32_t columns_end)
        : stride(computed_once(p.x_stride * 2 * kTokensAtOnce)), offset(0), end(computed_once((columns_end - first) * 2)) {
        const uint32_t column = first + lane % kPieces * 8;
        const uint32_t token = lane / kPieces;
        from = computed_once((uint64_t)p.x + ((uint64_t)token * p.x_stride + column) * 2);
        to = stage + token * kRowBytes + lane % kPieces * 16;
        there = computed_once((max(p.x_stride, column) - column) * 2);
        tokens = 0;
#pragma unroll
        for (uint32_t j = 0; j < 8 * kTokens8 / kTokensAtOnce; j++) tokens |= (token + j * kTokensAtOnce < p.tokens) << j;
        tokens = computed_once(tokens);
        // ldmatrix takes the addresses of a matrix's rows, tokens, from eight lanes. Results of tokens that are not there are not stored.
#pragma unroll
        for (int g = 0; g < kTokens8; g++) row[g] = stage + min((uint32_t)(g * 8 + lane % 8), p.tokens - 1) * kRowBytes + lane / 8 * 16;
    }
    /// Starts to copy the next columns, zeros behind the last. Tokens that are not there are not read.
    __device__ __forceinline__ void copy() {
        const uint64_t at = from + offset;
        const uint32_t n_bytes = offset < there ? 16 : 0;
#pragma unroll
        for (uint32_t j = 0; j < 8 * kTokens8 / kTokensAtOnce; j++) {
            asm volatile(
                "{\n.reg .pred there;\nsetp.ne.u32 there, %3, 0;\n@there cp.async.ca.shared.global [%0], [%1], 16, %2;\n}" ::"r"(to + j * kTokensAtOnce * kRowBytes),
                "l"(at + (uint64_t)j * stride), "r"(n_bytes), "r"(tokens & 1u << j)
                : "memory");
        }
        offset += 2 * kCols;
        if (offset == end) offset = 0;
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

template <WeightFormat kFormat, int kTokens8, int kTiles, int kApart>
__device__ __forceinline__ void product(const ProductParams& p) {
    constexpr bool kDense = is_dense(kFormat);
    constexpr int kTileFloats = kTokens8 * 128;
    constexpr uint32_t kXBytes = kTokens8 * 8 * x_row_bytes(kTokens8);
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = lane_index();
    const uint32_t bytes = kDense ? chunk_bytes(kFormat, 0) : p.chunk_bytes;
    const uint32_t ring_bytes = (kStages * bytes + 127) / 128 * 128;
    const uint32_t n_slices = slices(p.rows, p.cols), across = (p.cols + kChunkCols - 1) / kChunkCols;
    const uint32_t slots = sum_slots(n_slices, kApart), own = n_slices / kApart;

    uint32_t at = 0;
    auto take = [&](uint32_t n_bytes) {
        at += n_bytes;
        return shared + computed_once(at - n_bytes);
    };
    uint8_t* ring_memory = take(kApart * ring_bytes) + warp * ring_bytes;
    uint8_t* plane = take(kApart * plane_bytes(kFormat)) + warp * plane_bytes(kFormat);
    float* scales = (float*)take(kApart * kTiles * scale_bytes(kFormat)) + warp * kTiles * kChunkRows;
    const uint32_t x_stage = computed_once(shared_address(take(kApart * kXBytes)) + warp * kXBytes);
    uint8_t* symbols = take(128);
    const uint32_t bar = computed_once(shared_address(take(kApart * kStages * 8)) + warp * kStages * 8);
    float* sums = (float*)(shared + at);  // [2][tile][slot][token group][128]

    if (lane == 0) {
        for (int i = 0; i < kStages; i++) barrier_init(bar + 8 * i, 1);
        asm volatile("fence.mbarrier_init.release.cluster;");
    }
    asm volatile("griddepcontrol.launch_dependents;");
    __syncwarp();

    const uint32_t n_groups = p.n_tiles / kTiles;
    const uint32_t rounds = (n_groups - blockIdx.x + gridDim.x - 1) / gridDim.x;
    const uint32_t slice_first = n_slices * warp / kApart, slice_last = n_slices * (warp + 1) / kApart;
    const uint32_t first = computed_once(min(across, slice_begin(p.rows, p.cols, slice_first) / kChunkCols));
    const uint32_t end = computed_once(min(across, slice_begin(p.rows, p.cols, slice_last) / kChunkCols));

    ChunkRing<kTiles> ring(p, ring_memory, bar, bytes, first, end, blockIdx.x * kTiles, gridDim.x * kTiles);
    for (int i = 0; i < kStages; i++) ring.fill(lane, i);
    if (!kDense) {
        for (int i = lane; i < (int)plane_bytes(kFormat) / 16; i += 32) ((uint4*)plane)[i] = make_uint4(0, 0, 0, 0);
        if (warp < (int)p.n_segments) symbols[warp * 32 + lane] = p.segments[warp].symbols[lane];
    }
    __syncthreads();
    // Activations and output belong to the kernel before this one until here.
    asm volatile("griddepcontrol.wait;" ::: "memory");

    Activations<kTokens8> activations(p, x_stage, lane, first * kChunkCols, end * kChunkCols);
    if (first < end) activations.copy();

    for (uint32_t round = 0; round < rounds; round++) {
        const uint32_t tile = (blockIdx.x + round * gridDim.x) * kTiles;
        uint32_t segment[kTiles];
        Steps steps[kTiles];
        float acc[kTiles][kTokens8][4] = {}, total[kTiles][kTokens8][4];
#pragma unroll
        for (int t = 0; t < kTiles; t++) {
            segment[t] = locate(p, tile + t).segment;
            steps[t] = load_steps<kFormat>(p, tile + t, lane, scales + t * kChunkRows);
#pragma unroll
            for (int g = 0; g < kTokens8; g++)
#pragma unroll
                for (int i = 0; i < 4; i++) total[t][g][i] = -0.0f;  // -0 + s is s for every s
        }
        float* out = sums + (round % 2 * kTiles * slots + (warp == 0 ? 0 : slice_first - own + (own > 0 ? 1 : 0))) * kTileFloats;
        uint32_t slice = slice_first;
        uint32_t border = min(across, slice_begin(p.rows, p.cols, slice + 1) / kChunkCols);
        for (uint32_t c = first; c < end; c++) {
            constexpr int kUnits = x_cols(kTokens8) / 32;  // of two k16 steps
            static_assert(kTiles == 1 || kUnits == 4, "tiles of a round share the activations of whole chunks");
            uint4 x[kTokens8][kUnits];
            auto load_x = [&]() {
#pragma unroll
                for (int g = 0; g < kTokens8; g++)
#pragma unroll
                    for (int j = 0; j < kUnits; j++) x[g][j] = activations.fragments(g, j);
                // All lanes have read the stage.
                __syncwarp();
            };
            auto multiply = [&](auto which) {
                constexpr int t = decltype(which)::value;
                const uint8_t* chunk = ring.wait();
                Patches<kFormat> patches = {};
                if (!kDense) patches.put(chunk + header_offset(kFormat), symbols + segment[t] * 32, p.segments[segment[t]], scales + t * kChunkRows, plane, lane);
                auto half = [&](auto which) {
                    constexpr int h = decltype(which)::value;
                    const bool fresh = kUnits == 2 || (t == 0 && h == 0);
                    if (fresh) activations.wait();
                    // Patches and activations of all lanes are there.
                    if (fresh || h == 0) __syncwarp();
                    if (fresh) load_x();
                    if (kUnits == 2) activations.copy();
                    uint32_t a[16];
                    decode_half<kFormat, h>(chunk, plane, lane, steps[t], a);
#pragma unroll
                    for (int j = 0; j < 2; j++)
#pragma unroll
                        for (int g = 0; g < kTokens8; g++) {
                            const uint4 v = x[g][(2 * h + j) % kUnits];
                            mma<is_half(kFormat)>(acc[t][g], a + 8 * j, v.x, v.y);
                            mma<is_half(kFormat)>(acc[t][g], a + 8 * j + 4, v.z, v.w);
                        }
                };
                half(Constant<0>());
                // Not before: the copies would hold up the loads of the first half.
                if (t == 0 && kUnits == 4) activations.copy();
                half(Constant<1>());
                if (!kDense) {
                    __syncwarp();
                    patches.clear(plane, lane);
                }
                // Filled again only when every lane's loads have arrived: the products above have read them.
                __syncwarp();
                ring.release(lane);
            };
            multiply(Constant<0>());
            if constexpr (kTiles == 2) multiply(Constant<1>());
            if (c + 1 == border) {
#pragma unroll
                for (int t = 0; t < kTiles; t++) {
                    float* to = out + t * slots * kTileFloats;
#pragma unroll
                    for (int g = 0; g < kTokens8; g++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            total[t][g][i] = warp == 0 ? total[t][g][i] + acc[t][g][i] : acc[t][g][i];
                            acc[t][g][i] = 0;
                        }
                    if (warp > 0 || c + 1 == end) {
#pragma unroll
                        for (int g = 0; g < kTokens8; g++) ((float4*)to)[g * 32 + lane] = make_float4(total[t][g][0], total[t][g][1], total[t][g][2], total[t][g][3]);
                    }
                }
                if (warp > 0) out += kTileFloats;
                slice++;
                border = min(across, slice_begin(p.rows, p.cols, slice + 1) / kChunkCols);
            }
        }
        __syncthreads();
        const float* from = sums + round % 2 * kTiles * slots * kTileFloats;
        for (uint32_t i = threadIdx.x; i < kTiles * kTileFloats; i += 32 * kApart) {
            // Consecutive threads: rows of a tile, then tokens.
            const uint32_t row = i % 16, token = i / 16 % (kTokens8 * 8), t = i / kTileFloats;
            const uint32_t n = (tile + t) * 16 + row;
            if (n >= p.rows || token >= p.tokens) continue;
            const float* v = from + t * slots * kTileFloats + token / 8 * 128 + (row % 8 * 4 + token % 8 / 2) * 4 + row / 8 * 2 + token % 2;
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
