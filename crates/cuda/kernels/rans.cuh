// rANS in device memory: tables, words, entry points, and the decoding of one
// warp. docs/kernels-rans.md explains the arithmetic.
//
// A *unit* is 16 rows x 256 columns of a matrix in fragment order (docs/format.md,
// 5.1): 16 blocks of 16 x 16, 128 steps of 32 symbols, one warp. In device memory a
// matrix has for each unit an entry point (32 lane states), rows of words (row k
// has word number k of every lane, so no lane needs to know what the others take
// and no two want the same bank), and its raw bits in the order in which a lane
// needs them. These are the words and the raw bits of the record, in another
// order; nothing is coded anew.
#pragma once

#include <cstdint>

namespace transom {
namespace rans {

constexpr int kUnitCols = 256;
constexpr int kUnitBlocks = kUnitCols / 16;
constexpr int kTileRows = 128, kTileCols = 512;

constexpr uint32_t kRowBytes = 64;

/// Of a unit's position: its symbols are not coded, but bytes [block][lane][8].
constexpr uint32_t kRawUnit = 1u << 31;
constexpr uint32_t kRawRows = kUnitBlocks * 256 / kRowBytes;

/// What a decoder needs to know of a slot, in one word:
///
///     bit 31        p + 8         p           0
///         | offset    | symbol (8)  | freq (p)  |
///
/// `offset` is slot - start. False if something does not fit.
__host__ __device__ inline bool slot_entry(uint32_t p, uint32_t offset, uint32_t freq, uint32_t symbol, uint32_t* entry) {
    *entry = offset << (p + 8) | symbol << p | freq;
    return freq < 1u << p && offset < 1u << (24 - p);
}

__host__ __device__ inline uint32_t units_across(uint32_t cols) { return (cols + kUnitCols - 1) / kUnitCols; }

/// A matrix in device memory. Units are numbered from left to right, then down.
struct Matrix {
    const uint4* table;         // of Slots or General
    const uint4* words;         // rows of kRowBytes
    const uint32_t* states;     // [unit][lane 32]
    const uint32_t* positions;  // [unit + 1], number of the unit's first row | kRawUnit
    const uint4* raw;           // [unit][8][lane 32]: two blocks each, see spread_raw; null if elements have one byte
    uint32_t rows, cols;        // multiples of 16
    uint32_t prob_bits;
    uint32_t table_bytes;
    uint32_t one;               // 1: known to the kernel only when it runs, so that it multiplies instead of shifting
    uint32_t f16;               // 1: elements are FP16, else 0
};

/// Raw bits of four elements A B C D of a lane in one word: of the pair A B as they
/// stand in a register of two elements, of C D the same, rotated left by eight.
/// BF16: mantissas in bits 0-6 and 16-22, signs in 15 and 31; FP16: bits 0-7, 16-23.
__host__ __device__ inline uint32_t spread_raw(const uint8_t* raw, bool f16) {
    if (f16) return raw[0] | raw[2] << 8 | raw[1] << 16 | (uint32_t)raw[3] << 24;
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

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}

/// What the steps of every table need in registers. Several are powers of two that
/// the compiler must not know: multiplications have a pipe of their own, shifts
/// share one with the logic.
struct Table {
    static constexpr int kPlanes = 1;  // that are coded
    uint32_t address;  // in shared memory
    uint32_t p;
    uint32_t mask;     // 2^p - 1
    uint32_t one;      // 1
    uint32_t refill;   // 2^16
    uint32_t align;    // what brings the symbols of two elements to their places, 2^(15 - p) for BF16
    uint32_t coded;    // bits of two elements that symbols are
    uint32_t flip;     // what the symbols are flipped by

    __device__ __forceinline__ Table(const Matrix& w, uint32_t address_, uint32_t flip_)
        : address(address_),
          p(w.prob_bits),
          mask((1u << w.prob_bits) - 1),
          one(w.one),
          refill(w.one << 16),
          align(w.one << (15 + w.f16 - w.prob_bits)),
          coded(w.f16 ? 0xFF00FF00 : 0x7F807F80),
          flip(flip_) {}

    __host__ __device__ static uint32_t shared_bytes(const Matrix& w) { return w.table_bytes; }
    /// To shared memory; a barrier must follow.
    __device__ __forceinline__ static void copy(const Matrix& w, void* to, uint32_t thread, uint32_t n_threads) {
        for (uint32_t i = thread; i < w.table_bytes / 16; i += n_threads) ((uint4*)to)[i] = w.table[i];
    }
};

/// A word for each slot, see slot_entry; symbols flipped.
struct Slots : Table {
    uint32_t entry_bytes;  // 4

    __device__ __forceinline__ Slots(const Matrix& w, uint32_t address_, uint32_t flip_, int) : Table(w, address_, flip_), entry_bytes(4 * w.one) {}

    /// The state after a symbol, before the refill. Returns a word with the symbol
    /// in bits p .. p + 8.
    __device__ __forceinline__ uint32_t advance(uint32_t& x) const {
        const uint32_t entry = load_shared((x & mask) * entry_bytes + address);
        x = (entry & mask) * (x >> p) + (entry >> (p + 8));
        return entry;
    }
};

/// For what does not fit into entries: start << 16 | freq of each symbol (256 words),
/// then the symbol of each slot (bytes), not flipped.
struct General : Table {
    __device__ __forceinline__ General(const Matrix& w, uint32_t address_, uint32_t flip_, int) : Table(w, address_, flip_) {}

    __device__ __forceinline__ uint32_t advance(uint32_t& x) const {
        const uint32_t slot = x & mask;
        uint32_t symbol;
        asm volatile("ld.shared.u8 %0, [%1];" : "=r"(symbol) : "r"(address + 1024 + slot));
        const uint32_t interval = load_shared(address + 4 * symbol);
        x = (interval & 0xFFFF) * (x >> p) + slot - (interval >> 16);
        return (symbol ^ flip) << p;
    }
};

/// FP16 with two coded planes: a General of each, one after the other, and 16 times
/// the probability bits of the low plane added to those of the high one. A step
/// decodes a symbol of each.
struct TwoPlanes : General {
    static constexpr int kPlanes = 2;
    General low;

    __device__ __forceinline__ static Matrix plane(const Matrix& w, int which) {
        Matrix one_plane = w;
        one_plane.prob_bits = w.prob_bits >> (4 * which) & 15;
        return one_plane;
    }
    __device__ __forceinline__ TwoPlanes(const Matrix& w, uint32_t address_, uint32_t flip_, int lane)
        : General(plane(w, 0), address_, flip_, lane), low(plane(w, 1), address_ + 1024 + (1u << (w.prob_bits & 15)), flip_, lane) {}
};

/// One lane's place in its words.
struct Lane {
    uint32_t x;     // state
    uint32_t word;  // the next word, read ahead
    uint32_t next;  // address of the one after that, in shared memory
};

/// Decodes a symbol; see Slots::advance.
template <class AnyTable>
__device__ __forceinline__ uint32_t step(const AnyTable& t, Lane& lane) {
    const uint32_t entry = t.advance(lane.x);
    asm volatile(
        "{\n"
        ".reg .pred low;\n"
        "setp.lt.u32 low, %0, 65536;\n"
        "@low mad.lo.u32 %0, %0, %4, %1;\n"
        "@low ld.shared.u16 %1, [%2];\n"
        "@low mad.lo.u32 %2, %3, 64, %2;\n"
        "}"
        : "+r"(lane.x), "+r"(lane.word), "+r"(lane.next)
        : "r"(t.one), "r"(t.refill));
    return entry;
}

/// Symbols of the last two steps of a tile, which lie in the final states,
/// where a table entry would have them. (docs/format.md, 5.5)
__device__ __forceinline__ uint32_t tail_symbol(const Table& t, uint32_t x, int lane, int which) {
    uint32_t state = __shfl_sync(~0u, x, 16 * which + lane / 2);
    return (((state >> (8 * (lane & 1))) & 0xFF) ^ t.flip) << t.p;
}

/// Brings the units of one warp to it, one after another: while one is decoded,
/// the words of the next are on their way into shared memory, and the entry point
/// of the one after that is read. `Next` returns a unit's number at each call, in
/// the order of decoding, and ~0u after the last.
///
/// A unit of more than kRows rows of words is decoded from global memory.
/// With kBuffers == 1 the words are awaited instead: half the memory.
template <int kRows, int kBuffers, class Next>
struct Feeder {
    const Matrix& w;
    Next next;
    uint32_t buffer;                     // shared address of kBuffers buffers
    int lane;
    uint32_t turn = 0;
    uint32_t unit2, x2, position2, end2; // entry point, read
    uint32_t unit1, x1, position1;       // words on their way
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
            position2 = w.positions[unit2], end2 = w.positions[unit2 + 1];
        }
    }
    __device__ __forceinline__ void stage() {
        unit1 = unit2;
        if (unit1 != ~0u) {
            const uint32_t n_rows = (end2 - position2) & ~kRawUnit;
            x1 = x2, position1 = position2;
            fits1 = n_rows <= kRows && !(position1 & kRawUnit);
            if (fits1) {
                __syncwarp();
                const uint4* from = w.words + (size_t)position1 * (kRowBytes / 16);
                for (uint32_t i = lane; i < n_rows * (kRowBytes / 16); i += 32) copy16(buffer + turn * kRows * kRowBytes + i * 16, from + i);
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
    uint32_t taken;     // words that this lane has taken; only if not in_shared
    bool in_shared;
};

/// The next unit, its words in shared memory.
template <int kRows, int kBuffers, class Next>
__device__ __forceinline__ Unit take(Feeder<kRows, kBuffers, Next>& feeder) {
    if (kBuffers == 1) feeder.stage();
    Unit unit;
    unit.index = feeder.unit1;
    if (unit.index == ~0u) return unit;
    unit.lane.x = feeder.x1;
    unit.position = feeder.position1;
    unit.taken = 0;
    unit.in_shared = feeder.fits1;
    const uint32_t begin = feeder.buffer + feeder.turn * kRows * kRowBytes + 2 * feeder.lane;
    if (kBuffers == 2) {
        feeder.turn ^= 1;
        feeder.stage();
    }
    feeder.fetch();
    wait_copies<kBuffers - 1>();
    __syncwarp();
    asm volatile("ld.shared.u16 %0, [%1];" : "=r"(unit.lane.word) : "r"(begin));
    unit.lane.next = begin + kRowBytes;
    return unit;
}

/// Raw bits of element i of a lane, as spread_raw puts them for FP16.
__device__ __forceinline__ void put_raw(uint2& raw, int i, uint32_t byte) {
    const uint32_t shift = 16 * (i & 1) + 8 * (i >> 1 & 1);
    uint32_t& word = i < 4 ? raw.x : raw.y;
    if (i % 4 == 0) word = 0;
    word |= (byte & 0xFF) << shift;
}

/// Decodes a block of a unit whose words lie in shared memory, not the last of its
/// tile: eight words with the symbols in bits p .. p + 8. `raw`: its raw bits, which
/// are decoded too if there are two coded planes.
template <class AnyTable>
__device__ __forceinline__ void block(const AnyTable& t, Lane& lane, uint32_t (&entries)[8], uint2& raw) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        entries[i] = step(t, lane);
        if constexpr (AnyTable::kPlanes == 2) put_raw(raw, i, step(t.low, lane) >> t.low.p);
    }
}

/// The next symbol of any unit that is coded.
template <class AnyTable>
__device__ __forceinline__ uint32_t any_step(const AnyTable& t, const uint16_t* rows, Unit& unit, int lane) {
    if (unit.in_shared) return step(t, unit.lane);
    const uint32_t entry = t.advance(unit.lane.x);
    if (unit.lane.x < 1u << 16) unit.lane.x = unit.lane.x << 16 | rows[unit.taken++ * 32 + lane];
    return entry;
}

/// Decodes block number `at` of any unit. `is_tail`: the last block of a tile.
template <class AnyTable>
__device__ __forceinline__ void slow_block(const AnyTable& t, const uint4* words, Unit& unit, uint32_t at, int lane, bool is_tail, uint32_t (&entries)[8], uint2& raw) {
    const uint16_t* rows = (const uint16_t*)words + (size_t)(unit.position & ~kRawUnit) * (kRowBytes / 2);
    uint2 high = make_uint2(0, 0), low = high;
    if (unit.position & kRawUnit) {
        high = ((const uint2*)rows)[at * 32 + lane];
        high.x ^= t.flip * 0x01010101u, high.y ^= t.flip * 0x01010101u;
        if (AnyTable::kPlanes == 2) low = ((const uint2*)rows)[(kUnitBlocks + at) * 32 + lane];
    } else {
        auto shift_in = [](uint2& bytes, uint32_t byte) {
            bytes.x = __funnelshift_r(bytes.x, bytes.y, 8);
            bytes.y = bytes.y >> 8 | byte << 24;
        };
#pragma unroll 1
        for (int i = 0; i < 8; i++) {
            const bool in_states = is_tail && i >= 8 - 2 / AnyTable::kPlanes;
            shift_in(high, (in_states ? tail_symbol(t, unit.lane.x, lane, AnyTable::kPlanes == 2 ? 0 : i - 6) : any_step(t, rows, unit, lane)) >> t.p);
            if constexpr (AnyTable::kPlanes == 2) shift_in(low, (in_states ? tail_symbol(t.low, unit.lane.x, lane, 1) : any_step(t.low, rows, unit, lane)) >> t.low.p);
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        entries[i] = ((i < 4 ? high.x : high.y) >> (8 * (i & 3)) & 0xFF) << t.p;
        if (AnyTable::kPlanes == 2) put_raw(raw, i, (i < 4 ? low.x : low.y) >> (8 * (i & 3)));
    }
}

/// Two elements of two bytes from the words of two symbols and raw bits in place.
__device__ __forceinline__ uint32_t join(const Table& t, uint32_t low, uint32_t high, uint32_t raw) {
    const uint32_t symbols = __byte_perm(low, high, 0x6521) * t.align;
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0xD8;" : "=r"(out) : "r"(raw), "r"(symbols), "r"(t.coded));
    return out;
}

/// The A fragment of a block from its symbols and two words of raw bits.
__device__ __forceinline__ void join_block(const Table& t, const uint32_t (&e)[8], uint2 raw, uint32_t (&a)[4]) {
    a[0] = join(t, e[0], e[1], raw.x);
    a[1] = join(t, e[2], e[3], __funnelshift_r(raw.x, raw.x, 8));
    a[2] = join(t, e[4], e[5], raw.y);
    a[3] = join(t, e[6], e[7], __funnelshift_r(raw.y, raw.y, 8));
}

#endif  // __CUDACC__

}  // namespace rans
}  // namespace transom
