// rANS in device memory: tables, words, entry points, and the decoding of one
// warp. docs/kernels.md, "rans", explains the arithmetic.
//
// A *unit* is 16 rows x 256 columns of a matrix in fragment order (docs/format.md,
// 5.1): 16 blocks of 16 x 16, 128 steps of 32 symbols, one warp. In device memory a
// matrix has for each unit an entry point (32 lane states, position of the next word),
// and its raw plane in the order in which a lane needs it. The words of a tile are
// those of the record, unchanged.
#pragma once

#include <cstdint>

namespace transom {
namespace rans {

constexpr int kUnitCols = 256;
constexpr int kTileRows = 128, kTileCols = 512;
constexpr int kUnitRawBytes = 16 * kUnitCols;

// The ring of words of a warp: three chunks, and a copy of the first behind the
// last, so that a block of eight steps reads on without wrapping around.
constexpr int kChunkBytes = 512;
constexpr int kRingBytes = 4 * kChunkBytes;

/// A slot of the fast table: what the decoder needs to know in one word.
///
///     bit 31            p + 8         p           0
///         | adjustment  | symbol (8)  | freq (p)  |
///
/// With x the state, q = x >> p and r = x mod 2^p the slot, the next state is
/// freq * q + r - start. As freq * x / 2^p = freq * q + freq * r / 2^p, and the
/// last term depends on the slot alone, it is the high half of
/// (freq << (32 - p)) * x plus adjustment = r - start - floor(freq * r / 2^p):
/// one multiplication, whose operands need neither mask nor shift.
__host__ __device__ inline bool fast_entry(uint32_t p, uint32_t slot, uint32_t start, uint32_t freq, uint32_t symbol, uint32_t* entry) {
#ifdef RANS_PLAIN
    *entry = (slot - start) << (p + 8) | symbol << p | freq;
    return freq < 1u << p && slot - start < 1u << (24 - p);
#endif
    int32_t adjustment = (int32_t)(slot - start) - (int32_t)((uint64_t)freq * slot >> p);
    int32_t limit = 1 << (23 - p);
    *entry = (uint32_t)adjustment << (p + 8) | symbol << p | freq;
    return freq < 1u << p && -limit <= adjustment && adjustment < limit;
}

#ifdef __CUDACC__

/// What the steps of a table need in registers.
struct Params {
    uint32_t table;  // address in shared memory
    uint32_t mask;   // 2^p - 1
    uint32_t four;   // 4, unknown to the compiler, which would use the busier adder
    uint32_t scale;  // 2^(32 - p), likewise
    uint32_t shift;  // p + 8
    uint32_t lower;  // lanes below this one
    uint32_t flip;   // what the table's symbols are flipped by
};

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ uint32_t opaque(uint32_t v) {
    asm volatile("" : "+r"(v));
    return v;
}

__device__ __forceinline__ Params make_params(uint32_t table, uint32_t p, uint32_t lane, uint32_t flip = 0) {
    return {opaque(table), opaque((1u << p) - 1), opaque(4), opaque(1u << (32 - p)), opaque(p + 8), opaque((1u << lane) - 1), flip};
}

/// Decodes one symbol of every lane; returns its table entry, with the symbol
/// in bits p .. p + 8. `words` is the shared address of the next word.
__device__ __forceinline__ uint32_t step(const Params& t, uint32_t& x, uint32_t& words) {
    uint32_t entry;
#ifdef X_CONFLICT_FREE
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(entry) : "r"(((x & t.mask & ~31u) | (threadIdx.x & 31)) * t.four + t.table));
#else
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(entry) : "r"((x & t.mask) * t.four + t.table));
#endif
#ifdef RANS_PLAIN
    x = (entry & t.mask) * (x >> (t.shift - 8)) + (entry >> t.shift);
#else
    asm("mad.hi.u32 %0, %1, %0, %2;" : "+r"(x) : "r"(entry * t.scale), "r"((uint32_t)((int32_t)entry >> t.shift)));
#endif
    asm volatile(
        "{\n"
        ".reg .pred low;\n"
        ".reg .b32 taken, before, address, word;\n"
        "setp.lt.u32 low, %0, 65536;\n"
        "vote.sync.ballot.b32 taken, low, 0xFFFFFFFF;\n"
        "and.b32 before, taken, %2;\n"
        "popc.b32 before, before;\n"
        "mad.lo.u32 address, before, 2, %1;\n"
        "ld.shared.u16 word, [address];\n"
        "@low prmt.b32 %0, word, %0, 0x5410;\n"
#ifdef X_NO_TOTAL
        "add.u32 %1, %1, 10;\n"
#else
        "popc.b32 taken, taken;\n"
        "mad.lo.u32 %1, taken, 2, %1;\n"
#endif
        "}"
        : "+r"(x), "+r"(words)
        : "r"(t.lower));
    return entry;
}

/// Symbols of the last two steps of a tile, which lie in the final states,
/// where a table entry would have them. (docs/format.md, 5.5)
__device__ __forceinline__ uint32_t tail_symbol(const Params& t, uint32_t x, int lane, int which) {
    uint32_t state = __shfl_sync(~0u, x, 16 * which + lane / 2);
    return (((state >> (8 * (lane & 1))) & 0xFF) ^ t.flip) << (t.shift - 8);
}

__device__ __forceinline__ void copy16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// The words of one warp on their way through shared memory.
struct Words {
    const uint8_t* source;  // this lane's 16 bytes of the chunk after the ring
    uint32_t ring;          // shared address of the ring
    uint32_t next;          // shared address of the next word
    uint32_t border;        // where the chunk of `next` ends

    /// Begins at word number `position` of `pool`, whose allocation goes on for
    /// at least 4 * kChunkBytes behind the last word. `arrive` must follow.
    __device__ __forceinline__ void begin(const uint16_t* pool, uint32_t position, uint32_t ring_, int lane) {
        ring = ring_;
        source = (const uint8_t*)(pool + (position & ~7u)) + 16 * lane;
        next = ring + 2 * (position & 7);
        border = ring + kChunkBytes;
        __syncwarp();
        copy16(ring + 16 * lane, source);
        copy16(ring + 3 * kChunkBytes + 16 * lane, source);
        copy16(ring + kChunkBytes + 16 * lane, source + kChunkBytes);
        commit_copies();
        copy16(ring + 2 * kChunkBytes + 16 * lane, source + 2 * kChunkBytes);
        commit_copies();
        source += 3 * kChunkBytes;
    }
    __device__ __forceinline__ void arrive() {
        wait_copies<1>();
        __syncwarp();
    }

    /// Number of the next word in `pool`.
    __device__ __forceinline__ uint32_t position(const uint16_t* pool, int lane) const {
        uint32_t loaded = (uint32_t)((source - 16 * lane - (const uint8_t*)pool) / 2);
        return loaded - 3 * kChunkBytes / 2 + (next - (border - kChunkBytes)) / 2;
    }

    /// Before every block: makes sure that the words of eight steps, at most one
    /// chunk, are there.
    __device__ __forceinline__ void refill(int lane) {
        if (next >= border) {
            __syncwarp();
            uint32_t to = border - kChunkBytes + 16 * lane;
            copy16(to, source);
            if (border == ring + kChunkBytes) copy16(to + 3 * kChunkBytes, source);
            commit_copies();
            source += kChunkBytes;
            border += kChunkBytes;
            if (border > ring + 3 * kChunkBytes) {
                border -= 3 * kChunkBytes;
                next -= 3 * kChunkBytes;
            }
            wait_copies<1>();
            __syncwarp();
        }
    }
};

/// Raw bits of four elements A B C D of a lane in one word: of the pair A B as
/// they stand in a register of two BF16, mantissas in bits 0-6 and 16-22, signs in
/// 15 and 31; of C D the same, rotated left by eight.
__host__ __device__ inline uint32_t spread_raw(const uint8_t* raw) {
    auto pair = [](uint32_t low, uint32_t high) { return low >> 1 | (low & 1) << 15 | (high >> 1) << 16 | high << 31; };
    uint32_t ab = pair(raw[0], raw[1]), cd = pair(raw[2], raw[3]);
    return ab | cd << 8 | cd >> 24;
}

/// Two elements of BF16 from two table entries and raw bits in place.
/// `align` is 2^(15 - p).
__device__ __forceinline__ uint32_t join_bf16(uint32_t low, uint32_t high, uint32_t raw, uint32_t align) {
    uint32_t exponents = __byte_perm(low, high, 0x6521) * align;
    return (exponents & 0x7F807F80u) | (raw & ~0x7F807F80u);
}

/// A matrix in device memory. Units are numbered from left to right, then down.
struct Matrix {
    const uint32_t* table;      // fast entries, 2^prob_bits
    const uint16_t* words;      // of all tiles, each from a multiple of 8; 2048 bytes more than used
    const uint32_t* states;     // [unit][lane 32]
    const uint32_t* positions;  // [unit], number of the unit's first word
    const uint4* raw;           // [unit][8][lane 32]: two blocks each, see spread_raw
    uint32_t rows, cols;        // multiples of 16
    uint32_t prob_bits;
    uint32_t unused;
};

__host__ __device__ inline uint32_t units_across(uint32_t cols) { return (cols + kUnitCols - 1) / kUnitCols; }

__device__ __forceinline__ uint4 load_once(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

/// Decodes a block of 16 x 16: eight table entries. `is_tail`: the last block of
/// a tile.
__device__ __forceinline__ void block(const Params& t, uint32_t& x, Words& words, int lane, bool is_tail, uint32_t (&entries)[8]) {
    words.refill(lane);
#pragma unroll
    for (int i = 0; i < 6; i++) entries[i] = step(t, x, words.next);
    if (is_tail) {
#pragma unroll
        for (int i = 0; i < 2; i++) entries[6 + i] = tail_symbol(t, x, lane, i);
    } else {
#pragma unroll
        for (int i = 6; i < 8; i++) entries[i] = step(t, x, words.next);
    }
}

/// The A fragment of a block of BF16 from its entries and two words of raw bits.
__device__ __forceinline__ void join_block(const uint32_t (&e)[8], uint32_t raw0, uint32_t raw1, uint32_t align, uint32_t (&a)[4]) {
    a[0] = join_bf16(e[0], e[1], raw0, align);
    a[1] = join_bf16(e[2], e[3], __funnelshift_r(raw0, raw0, 8), align);
    a[2] = join_bf16(e[4], e[5], raw1, align);
    a[3] = join_bf16(e[6], e[7], __funnelshift_r(raw1, raw1, 8), align);
}

#endif  // __CUDACC__

}  // namespace rans
}  // namespace transom
