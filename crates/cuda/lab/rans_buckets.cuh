// A table without bank conflicts: 256 buckets of slots, a column of entries for each
// lane, and a second look-up where a bucket has slots of several symbols.
#pragma once

#include "../kernels/rans.cuh"

namespace lab {

constexpr uint32_t kBuckets = 256;

/// In device memory: a word for each bucket, then mini tables, a word for each slot
/// of a bucket with several symbols. Words are as slot_entry makes them, but with
/// the offset of the bucket's (or the slot's) first state plus 2^(p - 8) - rest, where
/// rest are the bits of the slot below the bucket: so it is never 0, and a bucket's
/// word below 2^(p + 8) is the number of the first word of its mini table.
struct Buckets : transom::rans::Table {
    uint32_t bucket_mask;  // of a state, the bits that tell the bucket
    uint32_t to_row;       // what brings them to a row of 128 bytes
    uint32_t rest_mask;    // of a state, the bits below, inverted
    uint32_t least;        // 2^(p + 8)
    uint32_t to_offset;    // 2^(24 - p)
    uint32_t four;         // 4

    __device__ __forceinline__ Buckets(const transom::rans::Matrix& w, uint32_t address_, uint32_t flip_, int lane)
        : Table(w, address_ + 4 * lane, flip_),
          bucket_mask(0xFFu << (w.prob_bits - 8)),
          to_row(w.one << (15 - w.prob_bits)),
          rest_mask(~0u << (w.prob_bits - 8)),
          least(1u << (w.prob_bits + 8)),
          to_offset(w.one << (24 - w.prob_bits)),
          four(4 * w.one) {}

    __host__ __device__ static uint32_t shared_bytes(const transom::rans::Matrix& w) { return w.table_bytes + 31 * 4 * kBuckets; }

    __device__ __forceinline__ static void copy(const transom::rans::Matrix& w, void* to, uint32_t thread, uint32_t n_threads) {
        const uint32_t* from = (const uint32_t*)w.table;
        uint32_t* mini = (uint32_t*)to + 32 * kBuckets;
        // `rest` is counted from -2^(p - 8).
        const uint32_t base = transom::rans::shared_address(mini) + (4u << (w.prob_bits - 8));
        for (uint32_t i = thread; i < 32 * kBuckets; i += n_threads) {
            const uint32_t entry = from[i / 32];
            ((uint32_t*)to)[i] = entry >> (w.prob_bits + 8) ? entry : 4 * entry + base;
        }
        for (uint32_t i = thread; i < w.table_bytes / 4 - kBuckets; i += n_threads) mini[i] = from[kBuckets + i];
    }

    __device__ __forceinline__ uint32_t advance(uint32_t& x) const {
        uint32_t entry = transom::rans::load_shared((x & bucket_mask) * to_row + address);
        const uint32_t rest = x | rest_mask, in_mini = rest * four + entry;
        asm volatile(
            "{\n"
            ".reg .pred several;\n"
            "setp.lt.u32 several, %0, %1;\n"
            "@several ld.shared.u32 %0, [%2];\n"
            "}"
            : "+r"(entry)
            : "r"(least), "r"(in_mini));
        x = (entry & mask) * (x >> p) + (rest * one + __umulhi(entry, to_offset));
        return entry;
    }
};

/// Slots, with the offset by a multiplication instead of a shift.
struct SlotsHigh : transom::rans::Slots {
    uint32_t to_offset;  // 2^(24 - p)

    __device__ __forceinline__ SlotsHigh(const transom::rans::Matrix& w, uint32_t address_, uint32_t flip_, int lane)
        : Slots(w, address_, flip_, lane), to_offset(w.one << (24 - w.prob_bits)) {}

    __device__ __forceinline__ uint32_t advance(uint32_t& x) const {
        const uint32_t entry = transom::rans::load_shared((x & mask) * entry_bytes + address);
        x = (entry & mask) * (x >> p) + __umulhi(entry, to_offset);
        return entry;
    }
};

/// Both tables, one after the other: of two steps one takes the slots, which are
/// bound by the banks, and one the buckets, which are bound by the instructions.
struct Mixed : transom::rans::Slots {
    Buckets buckets;

    __device__ __forceinline__ Mixed(const transom::rans::Matrix& w, uint32_t address_, uint32_t flip_, int lane)
        : Slots(w, address_, flip_, lane), buckets(w, address_ + (4u << w.prob_bits), flip_, lane) {}

    __host__ __device__ static uint32_t shared_bytes(const transom::rans::Matrix& w) { return Buckets::shared_bytes(w); }

    __device__ __forceinline__ static void copy(const transom::rans::Matrix& w, void* to, uint32_t thread, uint32_t n_threads) {
        const uint32_t n_slots = 4u << w.prob_bits;
        transom::rans::Matrix part = w;
        part.table_bytes = n_slots;
        Slots::copy(part, to, thread, n_threads);
        part.table += n_slots / 16, part.table_bytes = w.table_bytes - n_slots;
        Buckets::copy(part, (uint8_t*)to + n_slots, thread, n_threads);
    }
};

/// transom::rans::block for it.
__device__ __forceinline__ void block(const Mixed& t, transom::rans::Lane& lane, uint32_t (&entries)[8], uint2&) {
#pragma unroll
    for (int i = 0; i < 8; i++) entries[i] = i % 2 ? transom::rans::step(t.buckets, lane) : transom::rans::step((const transom::rans::Slots&)t, lane);
}

}  // namespace lab
