// Fixed-rate or dense weights in the order of chunks -> row-major elements:
// ranges of rows and columns, or single rows (embeddings).
#include "fixed.cuh"

namespace transom {

struct FixedDecodeParams {
    const uint8_t* chunks;     // as Segment's
    const uint32_t* overflow;
    const uint8_t* symbols;
    const float* scales;       // [rows] or [1]; INT8 to FP16 only
    const uint32_t* ids;       // [n_ids] rows to gather, or null; one that is not below `rows` is left out
    void* out;                 // [row_end - row_begin or n_ids][stride]
    uint64_t stride;           // elements from a row of `out` to the next
    uint32_t rows, cols;       // of the matrix
    uint32_t row_begin, row_end, col_begin, col_end;
    uint32_t n_ids;
    uint32_t chunk_bytes;
    uint32_t scale_step;       // 1: a scale a row, 0: one for all
    uint32_t vectors;          // whether pieces of 16 bytes of `out` that begin at every 16 bytes of the matrix's rows are aligned
};

static_assert(sizeof(FixedDecodeParams) == 96 && offsetof(FixedDecodeParams, rows) == 56, "mirrored in Rust");

constexpr uint32_t kDecodeWarps = 8, kDecodeStages = 2;

/// Shared memory of a block.
constexpr uint32_t decode_shared_bytes(uint32_t chunk_bytes, uint32_t elem_bytes) { return kDecodeWarps * (kDecodeStages * chunk_bytes + kChunkElems * elem_bytes); }

__device__ __forceinline__ void copy16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Until all copies but those of the last group are done.
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(kDecodeStages - 1) : "memory"); }

/// FP16 of f32(q) * scale; the low half is of `q0`.
__device__ __forceinline__ uint32_t to_half(float q0, float q1, float scale) {
    uint32_t out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(__fmul_rn(q1, scale)), "f"(__fmul_rn(q0, scale)));
    return out;
}
/// Value of an INT8 weight from the byte q + 128 that the selector puts below 2^23's.
__device__ __forceinline__ float int8_value(uint32_t bytes, uint32_t selector) { return __uint_as_float(__byte_perm(bytes, 0x4B000000u, selector)) - 8388736.0f; }

/// Where an element lies in a tile of 16 x 128 in shared memory. Pieces of 16
/// bytes are swapped about, to spare the banks.
template <uint32_t kElemBytes>
__device__ __forceinline__ uint32_t tile_address(uint32_t row, uint32_t col) {
    constexpr uint32_t kPiece = 16 / kElemBytes;
    return (row * kChunkCols * kElemBytes + (row & 7) * 16 + col % kPiece * kElemBytes) ^ col / kPiece * 16;
}

/// Decodes half a chunk; escaped elements have the windows of their rows.
template <WeightFormat kFormat, bool kDequantise, int kHalf>
__device__ __forceinline__ void decode_to_tile(const uint8_t* chunk, int lane, float scale0, float scale1, uint8_t* tile) {
    constexpr uint32_t kElemBytes = is_int8(kFormat) && !kDequantise ? 1 : 2;
    const uint32_t place = tile_address<kElemBytes>(lane / 4, lane % 4 * 2);
    // This lane's columns of a piece; of its upper row or the one eight below.
    auto at = [&](uint32_t piece, uint32_t lower) { return tile + (place ^ piece * 16) + lower * 8 * kChunkCols * kElemBytes; };
    if constexpr (is_int8(kFormat) && !is_dense(kFormat)) {
        uint32_t q[16];
        int8_half<(int)int8_bits(kFormat), kHalf>(chunk, lane, q);
#pragma unroll
        for (uint32_t i = 0; i < 16; i++) {
            const uint32_t piece = 2 * (4 * kHalf + i / 4) + i % 4 / 2, lower = i % 2;
            if constexpr (kDequantise) {
                *(uint32_t*)at(piece, lower) = to_half(from_16<true>((uint16_t)q[i]) * 0x1p24f, from_16<true>((uint16_t)(q[i] >> 16)) * 0x1p24f, lower ? scale1 : scale0);
            } else {
                const uint32_t signs = q[i] >> 15 & 0x00010001u, bytes = ((q[i] & 0x007F007Fu) ^ signs * 0xFF) + signs;
                *(uint16_t*)(at(piece / 2, lower) + piece % 2 * 8) = (uint16_t)__byte_perm(bytes, 0, 0x4420);
            }
        }
    } else if constexpr (is_int8(kFormat)) {
        uint32_t e[8];
        keys_half<kFormat, kHalf>(chunk, lane, e);
#pragma unroll
        for (uint32_t j = 0; j < 8; j++) {
            const uint32_t step = 4 * kHalf + j / 2;
            if constexpr (kDequantise) {
                const float scale = j % 2 ? scale1 : scale0;
                *(uint32_t*)at(2 * step, j % 2) = to_half(int8_value(e[j], 0x7440), int8_value(e[j], 0x7441), scale);
                *(uint32_t*)at(2 * step + 1, j % 2) = to_half(int8_value(e[j], 0x7442), int8_value(e[j], 0x7443), scale);
            } else {
                const uint32_t bytes = e[j] ^ 0x80808080u;
                *(uint16_t*)at(step, j % 2) = (uint16_t)bytes;
                *(uint16_t*)(at(step, j % 2) + 8) = (uint16_t)(bytes >> 16);
            }
        }
    } else {
        uint32_t a[16];
        if constexpr (is_dense(kFormat)) {
            decode_half<kFormat, kHalf>(chunk, nullptr, lane, Steps{}, a);
        } else {
            uint32_t e[8];
            keys_half<kFormat, kHalf>(chunk, lane, e);
            join_half<kFormat, kHalf>(chunk, lane, e, a);
        }
#pragma unroll
        for (uint32_t i = 0; i < 16; i++) *(uint32_t*)at(2 * (4 * kHalf + i / 4) + i % 4 / 2, i % 2) = a[i];
    }
}

/// Gives an escaped element its key.
template <WeightFormat kFormat, bool kDequantise>
__device__ __forceinline__ void patch(const FixedDecodeParams& p, uint32_t escape, uint32_t key, const uint8_t* windows, uint32_t strip, uint8_t* tile) {
    const auto [row, col] = escape_place<kFormat>(escape);
    if constexpr (!is_int8(kFormat)) {
        *(uint16_t*)(tile + tile_address<2>(row, col)) ^= (uint16_t)((key ^ windows[row]) << (kFormat == kFixedF16x3 ? 8 : 7));
    } else if constexpr (kDequantise) {
        const float scale = __ldg(p.scales + (size_t)min(strip * kChunkRows + row, p.rows - 1) * p.scale_step);
        *(uint16_t*)(tile + tile_address<2>(row, col)) = (uint16_t)to_half((float)(int)key - 128.0f, 0, scale);
    } else {
        tile[tile_address<1>(row, col)] = (uint8_t)(key ^ 0x80);
    }
}

/// A warp decodes chunk after chunk; the next one is on its way meanwhile.
template <WeightFormat kFormat, bool kDequantise>
__device__ __forceinline__ void decode_chunks(const FixedDecodeParams& p) {
    constexpr uint32_t kElemBytes = is_int8(kFormat) && !kDequantise ? 1 : 2, kPiece = 16 / kElemBytes, kPieces = kChunkCols / kPiece;
    extern __shared__ __align__(128) uint8_t shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint8_t* stages = shared + warp * (kDecodeStages * p.chunk_bytes + kChunkElems * kElemBytes);
    uint8_t* tile = stages + kDecodeStages * p.chunk_bytes;
    const uint32_t across = (p.cols + kChunkCols - 1) / kChunkCols, first = p.col_begin / kChunkCols;
    const uint32_t columns = (p.col_end + kChunkCols - 1) / kChunkCols - first, first_strip = p.row_begin / kChunkRows;
    const uint32_t n_strips = p.ids ? p.n_ids : (p.row_end + kChunkRows - 1) / kChunkRows - first_strip;
    const uint32_t n_tasks = n_strips * columns, step = gridDim.x * kDecodeWarps;
    uint32_t next = blockIdx.x * kDecodeWarps + warp;
    // Strip and column of a task; its row of the result is `task / columns`, of a strip that is not there nothing.
    struct Place {
        uint32_t index, strip, column;
        bool there;
    };
    auto locate = [&](uint32_t task) {
        const uint32_t index = task / columns, column = first + (task - index * columns);
        if (!p.ids) return Place{index, first_strip + index, column, true};
        const uint32_t id = p.ids[index];
        return Place{index, id / kChunkRows, column, id < p.rows};
    };
    auto fetch = [&](uint32_t stage) {
        if (next < n_tasks) {
            const Place place = locate(next);
            const uint8_t* from = p.chunks + ((size_t)place.strip * across + place.column) * p.chunk_bytes;
            uint8_t* to = stages + stage * p.chunk_bytes;
            for (uint32_t i = lane * 16; place.there && i < p.chunk_bytes; i += 512) copy16(to + i, from + i);
        }
        commit_copies();
        next += step;
    };
    for (uint32_t i = 0; i < kDecodeStages; i++) fetch(i);
    // The piece of a tile that this lane stores first; the next is kStep rows on.
    constexpr uint32_t kStep = 32 / kPieces, kRowBytes = kChunkCols * kElemBytes;
    const uint32_t out_row = lane / kPieces, out_col = lane % kPieces * kPiece, out_place = tile_address<kElemBytes>(out_row, out_col);
    uint32_t stage = 0;
    for (uint32_t task = blockIdx.x * kDecodeWarps + warp; task < n_tasks; task += step) {
        const uint8_t* chunk = stages + stage * p.chunk_bytes;
        const Place place = locate(task);
        const uint32_t row0 = place.strip * kChunkRows, col0 = place.column * kChunkCols;
        float scale0 = 0, scale1 = 0;
        if (kDequantise && place.there) {
            scale0 = __ldg(p.scales + (size_t)min(row0 + lane / 4, p.rows - 1) * p.scale_step);
            scale1 = __ldg(p.scales + (size_t)min(row0 + lane / 4 + 8, p.rows - 1) * p.scale_step);
        }
        wait_copies();
        __syncwarp();
        if (place.there) {
            decode_to_tile<kFormat, kDequantise, 0>(chunk, lane, scale0, scale1, tile);
            decode_to_tile<kFormat, kDequantise, 1>(chunk, lane, scale0, scale1, tile);
            if constexpr (!is_dense(kFormat)) {
                __syncwarp();
                const uint8_t* header = chunk + header_offset(kFormat);
                const uint2 counts = *(const uint2*)(header + window_bytes(kFormat));
#pragma unroll 1
                for (uint32_t i = lane; i < (counts.x & 0xFFFF); i += 32) {
                    const uint32_t escape = ((const uint16_t*)(header + header_bytes(kFormat)))[i];
                    patch<kFormat, kDequantise>(p, escape, __ldg(p.symbols + (escape >> 11)), header, place.strip, tile);
                }
#pragma unroll 1
                for (uint32_t i = lane; i < counts.x >> 16; i += 32) {
                    const uint32_t escape = __ldg(p.overflow + counts.y + i);
                    patch<kFormat, kDequantise>(p, escape, escape >> 16 & 0xFF, header, place.strip, tile);
                }
            }
        }
        __syncwarp();
        fetch(stage);
        stage = stage + 1 == kDecodeStages ? 0 : stage + 1;
        const bool inside = p.vectors && !p.ids && row0 >= p.row_begin && row0 + kChunkRows <= p.row_end && col0 >= p.col_begin && col0 + kChunkCols <= p.col_end;
        if (inside) {
            uint8_t* to = (uint8_t*)p.out + ((size_t)(row0 + out_row - p.row_begin) * p.stride + col0 + out_col - p.col_begin) * kElemBytes;
#pragma unroll
            for (uint32_t i = 0; i < kChunkRows / kStep; i++) {
                // The row's last bits, of which those of `out_row` and of the step are apart, swap the pieces.
                *(uint4*)to = *(const uint4*)(tile + (out_place ^ (i * kStep & 7) * 16) + i * kStep * kRowBytes);
                to += kStep * p.stride * kElemBytes;
            }
        } else if (place.there) {
            const uint32_t begin = p.ids ? p.ids[place.index] : max(row0, p.row_begin), end = p.ids ? begin + 1 : min(row0 + kChunkRows, p.row_end);
#pragma unroll 1
            for (uint32_t i = lane; i < (end - begin) * kPieces; i += 32) {
                const uint32_t row = begin + i / kPieces, col = col0 + i % kPieces * kPiece;
                const uint4 v = *(const uint4*)(tile + tile_address<kElemBytes>(row - row0, col - col0));
                uint8_t* to = (uint8_t*)p.out + ((size_t)(p.ids ? place.index : row - p.row_begin) * p.stride + col - p.col_begin) * kElemBytes;
                if (p.vectors && col >= p.col_begin && col + kPiece <= p.col_end) {
                    *(uint4*)to = v;
                } else {
                    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                    for (uint32_t j = 0; j < kPiece; j++)
                        if (col + j >= p.col_begin && col + j < p.col_end) {
                            const uint32_t element = words[j * kElemBytes / 4] >> j * kElemBytes % 4 * 8;
                            if constexpr (kElemBytes == 2) ((uint16_t*)to)[j] = (uint16_t)element;
                            else to[j] = (uint8_t)element;
                        }
                }
            }
        }
        __syncwarp();
    }
}

}  // namespace transom

#define TRANSOM_DECODE(name, format, dequantise) \
    extern "C" __global__ void __launch_bounds__(256, 2) fixed_decode_##name(const __grid_constant__ transom::FixedDecodeParams p) { transom::decode_chunks<transom::format, dequantise>(p); }

TRANSOM_DECODE(dense_bf16, kDenseBf16, false)
TRANSOM_DECODE(dense_f16, kDenseF16, false)
TRANSOM_DECODE(bf16x3, kFixedBf16x3, false)
TRANSOM_DECODE(bf16x4, kFixedBf16x4, false)
TRANSOM_DECODE(f16x3, kFixedF16x3, false)
// INT8 as it is, and dequantised to FP16.
#define TRANSOM_DECODE_INT8(name, format) TRANSOM_DECODE(name, format, false) TRANSOM_DECODE(name##_f16, format, true)
TRANSOM_DECODE_INT8(dense_int8, kDenseInt8)
TRANSOM_DECODE_INT8(int8x4, kFixedInt8x4)
TRANSOM_DECODE_INT8(int8x5, kFixedInt8x5)
TRANSOM_DECODE_INT8(int8x6, kFixedInt8x6)
TRANSOM_DECODE_INT8(int8x7, kFixedInt8x7)
