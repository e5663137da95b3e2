// rANS in device memory: tables, words, entry points, and the decoding of one
// warp. docs/kernels.md, "rans", explains the arithmetic.
//
// A *unit* is 16 rows x 256 columns of a matrix in fragment order (docs/format.md,
// 5.1): 16 blocks of 16 x 16, 128 steps of 32 symbols, one warp. In device memory a
// matrix has for each unit an entry point (32 lane states), the words that each
// lane takes (lane after lane, so no lane needs to know what the others take), and
// its raw bits in the order in which a lane needs them. These are the words and
// the raw bits of the record, in another order; nothing is coded anew.
#pragma once

#include <cstdint>

namespace transom {
namespace rans {

constexpr int kUnitCols = 256;
constexpr int kUnitBlocks = kUnitCols / 16;
constexpr int kTileRows = 128, kTileCols = 512;

/// Of a unit's position: its symbols are not coded, but bytes [block][lane][8].
constexpr uint32_t kRawUnit = 1u << 31;

/// A slot of the fast table: what the decoder needs to know in one word.
///
///     bit 31        p + 8         p           0
///         | offset    | symbol (8)  | freq (p)  |
///
/// `offset` is slot - start. False if something does not fit; such a plane takes
/// the general table: start << 16 | freq of each symbol (256 words), then the
/// symbol of each slot (bytes).
__host__ __device__ inline bool fast_entry(uint32_t p, uint32_t offset, uint32_t freq, uint32_t symbol, uint32_t* entry) {
    *entry = offset << (p + 8) | symbol << p | freq;
    return freq < 1u << p && offset < 1u << (24 - p);
}

/// Bytes of a table.
__host__ __device__ inline uint32_t table_bytes(uint32_t prob_bits, bool general) {
    return general ? 1024 + (1u << prob_bits) : 4u << prob_bits;
}

__host__ __device__ inline uint32_t units_across(uint32_t cols) { return (cols + kUnitCols - 1) / kUnitCols; }

/// A matrix in device memory. Units are numbered from left to right, then down.
struct Matrix {
    const uint4* table;         // fast or general
    const uint16_t* words;      // of all units, each from a multiple of 8
    const uint32_t* states;     // [unit][lane 32]
    const uint8_t* counts;      // [unit][lane 32], words that each lane takes
    const uint32_t* positions;  // [unit], number of the unit's first word, or of its bytes / 2 | kRawUnit
    const uint4* raw;           // [unit][8][lane 32]: two blocks each, see spread_raw; null if elements have one byte
    uint32_t rows, cols;        // multiples of 16
    uint32_t prob_bits;
    uint32_t general;           // 1 if the table is general
    uint32_t entry_bytes;       // 4: known to the kernel only when it runs, so that it multiplies instead of shifting
    uint32_t align;             // 2^(15 - prob_bits), likewise
};

/// Raw bits of four elements A B C D of a lane in one word: of the pair A B as
/// they stand in a register of two BF16, mantissas in bits 0-6 and 16-22, signs in
/// 15 and 31; of C D the same, rotated left by eight.
__host__ __device__ inline uint32_t spread_raw(const uint8_t* raw) {
    auto pair = [](uint32_t low, uint32_t high) { return low >> 1 | (low & 1) << 15 | (high >> 1) << 16 | high << 31; };
    uint32_t ab = pair(raw[0], raw[1]), cd = pair(raw[2], raw[3]);
    return ab | cd << 8 | cd >> 24;
}

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void copy16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ uint4 load_once(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

/// Arguments known when compiling.
struct Yes { static constexpr bool value = true; };
struct No { static constexpr bool value = false; };

/// What the steps of a table need in registers.
struct Params {
    uint32_t table;        // address in shared memory
    uint32_t mask;         // 2^p - 1
    uint32_t entry_bytes;  // 4
    uint32_t one;          // 1
    uint32_t p;
    uint32_t flip;         // what the table's symbols are flipped by
};

__device__ __forceinline__ Params make_params(const Matrix& w, uint32_t table, uint32_t flip) {
    return {table, (1u << w.prob_bits) - 1, w.entry_bytes, w.entry_bytes >> 2, w.prob_bits, flip};
}

/// Copies a table to shared memory; a barrier must follow.
__device__ __forceinline__ void copy_table(const Matrix& w, void* to, uint32_t thread, uint32_t n_threads) {
    const uint32_t n = table_bytes(w.prob_bits, w.general) / 16;
    for (uint32_t i = thread; i < n; i += n_threads) ((uint4*)to)[i] = w.table[i];
}

/// The state after a symbol, before the refill. Returns a word with the symbol in
/// bits p .. p + 8.
template <bool kGeneral>
__device__ __forceinline__ uint32_t advance(const Params& t, uint32_t& x) {
    const uint32_t slot = x & t.mask;
    uint32_t entry;
    if (kGeneral) {
        uint32_t symbol, interval;
        asm volatile("ld.shared.u8 %0, [%1];" : "=r"(symbol) : "r"(t.table + 1024 + slot));
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(interval) : "r"(t.table + 4 * symbol));
        x = (interval & 0xFFFF) * (x >> t.p) + slot - (interval >> 16);
        return (symbol ^ t.flip) << t.p;
    }
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(entry) : "r"(slot * t.entry_bytes + t.table));
    x = (entry & t.mask) * (x >> t.p) + (entry >> (t.p + 8));
    return entry;
}

/// One lane's place in its words.
struct Lane {
    uint32_t x;     // state
    uint32_t word;  // the next word, read ahead
    uint32_t next;  // address of the one after that, in shared memory
};

/// Decodes a symbol; see advance.
template <bool kGeneral>
__device__ __forceinline__ uint32_t step(const Params& t, Lane& lane) {
    const uint32_t entry = advance<kGeneral>(t, lane.x);
    asm volatile(
        "{\n"
        ".reg .pred low;\n"
        "setp.lt.u32 low, %0, 65536;\n"
        "@low prmt.b32 %0, %1, %0, 0x5410;\n"
        "@low ld.shared.u16 %1, [%2];\n"
        "@low mad.lo.u32 %2, %3, 2, %2;\n"  // an addition, for the multiplier, which is less busy
        "}"
        : "+r"(lane.x), "+r"(lane.word), "+r"(lane.next)
        : "r"(t.one));
    return entry;
}

/// Symbols of the last two steps of a tile, which lie in the final states,
/// where a table entry would have them. (docs/format.md, 5.5)
__device__ __forceinline__ uint32_t tail_symbol(const Params& t, uint32_t x, int lane, int which) {
    uint32_t state = __shfl_sync(~0u, x, 16 * which + lane / 2);
    return (((state >> (8 * (lane & 1))) & 0xFF) ^ t.flip) << t.p;
}

/// Brings the units of one warp to it, one after another: while one is decoded,
/// the words of the next are on their way into shared memory, and the entry point
/// of the one after that is read. `Next` returns a unit's number at each call, in
/// the order of decoding, and ~0u after the last.
///
/// A unit with more words than kBuffer bytes is decoded from global memory.
/// With kBuffers == 1 the words are awaited instead: half the memory.
template <int kBuffer, int kBuffers, class Next>
struct Feeder {
    const Matrix& w;
    Next next;
    uint32_t buffer;                       // shared address of kBuffers buffers
    int lane;
    uint32_t turn = 0;
    uint32_t unit2, x2, count2, position2; // entry point, read
    uint32_t unit1, x1, first1, position1; // words on their way; first1: this lane's first
    bool fits1 = false;

    __device__ __forceinline__ Feeder(const Matrix& w_, Next next_, uint32_t buffer_, int lane_) : w(w_), next(next_), buffer(buffer_), lane(lane_) {
        fetch();
        if (kBuffers == 2) {
            stage();
            fetch();
        }
    }
    __device__ __forceinline__ void fetch() {
        unit2 = next();
        if (unit2 != ~0u) {
            x2 = w.states[(size_t)unit2 * 32 + lane];
            count2 = w.counts[(size_t)unit2 * 32 + lane];
            position2 = w.positions[unit2];
        }
    }
    __device__ __forceinline__ void stage() {
        unit1 = unit2;
        if (unit1 != ~0u) {
            uint32_t end = count2;
#pragma unroll
            for (int i = 1; i < 32; i *= 2) {
                uint32_t other = __shfl_up_sync(~0u, end, i);
                if (lane >= i) end += other;
            }
            const uint32_t n_bytes = 2 * __shfl_sync(~0u, end, 31);
            x1 = x2, position1 = position2, first1 = end - count2;
            fits1 = n_bytes <= kBuffer;
            if (fits1) {
                __syncwarp();
                const uint8_t* from = (const uint8_t*)(w.words + (position1 & ~kRawUnit));
                for (uint32_t i = 16 * lane; i < n_bytes; i += 512) copy16(buffer + turn * kBuffer + i, from + i);
            }
        }
        commit_copies();
    }
};

/// A unit that a warp is about to decode.
struct Unit {
    uint32_t index;     // ~0u: there is none
    Lane lane;
    uint32_t position;  // as in Matrix
    uint32_t first;     // number of the lane's next word in `words`; only if not in_shared
    bool in_shared;
};

/// The next unit, its words in shared memory.
template <int kBuffer, int kBuffers, class Next>
__device__ __forceinline__ Unit take(Feeder<kBuffer, kBuffers, Next>& feeder) {
    if (kBuffers == 1) feeder.stage();
    Unit unit;
    unit.index = feeder.unit1;
    if (unit.index == ~0u) return unit;
    unit.lane.x = feeder.x1;
    unit.position = feeder.position1;
    unit.first = (feeder.position1 & ~kRawUnit) + feeder.first1;
    unit.in_shared = feeder.fits1 && !(feeder.position1 & kRawUnit);
    unit.lane.next = feeder.buffer + feeder.turn * kBuffer + 2 * feeder.first1;
    if (kBuffers == 2) {
        feeder.turn ^= 1;
        feeder.stage();
    }
    feeder.fetch();
    wait_copies<kBuffers - 1>();
    __syncwarp();
    if (unit.in_shared) {
        asm volatile("ld.shared.u16 %0, [%1];" : "=r"(unit.lane.word) : "r"(unit.lane.next));
        unit.lane.next += 2;
    }
    return unit;
}

/// The symbols, a byte each, of a block of a unit that is not coded, or whose
/// words did not fit shared memory.
template <bool kGeneral>
__device__ __forceinline__ uint2 slow_block(const Params& t, const uint16_t* words, Unit& unit, uint32_t at, int lane, bool is_tail) {
    if (unit.position & kRawUnit) {
        const uint2 v = ((const uint2*)(words + (unit.position & ~kRawUnit)))[at * 32 + lane];
        const uint32_t flip = t.flip * 0x01010101u;
        return make_uint2(v.x ^ flip, v.y ^ flip);
    }
    uint32_t low = 0, high = 0;
#pragma unroll 1
    for (int i = 0; i < 8; i++) {
        uint32_t entry;
        if (is_tail && i >= 6) {
            entry = tail_symbol(t, unit.lane.x, lane, i - 6);
        } else {
            entry = advance<kGeneral>(t, unit.lane.x);
            if (unit.lane.x < 1u << 16) unit.lane.x = unit.lane.x << 16 | words[unit.first++];
        }
        low = __funnelshift_r(low, high, 8);
        high = high >> 8 | (entry >> t.p) << 24;
    }
    return make_uint2(low, high);
}

/// Decodes block number `at` of a unit: eight words with the symbols in bits
/// p .. p + 8. `is_tail`: the last block of a tile. kInShared: unit.in_shared.
template <bool kGeneral, bool kInShared>
__device__ __forceinline__ void block(const Params& t, const uint16_t* words, Unit& unit, uint32_t at, int lane, bool is_tail, uint32_t (&entries)[8]) {
    if (kInShared) {
#pragma unroll
        for (int i = 0; i < 6; i++) entries[i] = step<kGeneral>(t, unit.lane);
        if (is_tail) {
#pragma unroll
            for (int i = 0; i < 2; i++) entries[6 + i] = tail_symbol(t, unit.lane.x, lane, i);
        } else {
#pragma unroll
            for (int i = 6; i < 8; i++) entries[i] = step<kGeneral>(t, unit.lane);
        }
    } else {
        const uint2 v = slow_block<kGeneral>(t, words, unit, at, lane, is_tail);
#pragma unroll
        for (int i = 0; i < 8; i++) entries[i] = ((i < 4 ? v.x : v.y) >> (8 * (i & 3)) & 0xFF) << t.p;
    }
}

/// Two elements of BF16 from the words of two symbols and raw bits in place.
/// `align` is 2^(15 - p).
__device__ __forceinline__ uint32_t join_bf16(uint32_t low, uint32_t high, uint32_t raw, uint32_t align) {
    const uint32_t exponents = __byte_perm(low, high, 0x6521) * align;
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, 0x7F807F80, 0xD8;" : "=r"(out) : "r"(raw), "r"(exponents));
    return out;
}

/// The A fragment of a block of BF16 from its symbols and two words of raw bits.
__device__ __forceinline__ void join_block(const uint32_t (&e)[8], uint32_t raw0, uint32_t raw1, uint32_t align, uint32_t (&a)[4]) {
    a[0] = join_bf16(e[0], e[1], raw0, align);
    a[1] = join_bf16(e[2], e[3], __funnelshift_r(raw0, raw0, 8), align);
    a[2] = join_bf16(e[4], e[5], raw1, align);
    a[3] = join_bf16(e[6], e[7], __funnelshift_r(raw1, raw1, 8), align);
}

#endif  // __CUDACC__

}  // namespace rans
}  // namespace transom
