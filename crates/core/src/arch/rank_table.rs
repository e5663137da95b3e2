//! Decode tables small enough for vector registers.
//!
//! Symbols are numbered by rank, the order of their intervals. Because rank 0
//! is the most frequent, all symbols with at least 32 slots come first, and a
//! bucket of 32 slots holds at most one border between two of them: the rank
//! of a slot is that of its bucket's first slot, or one more. The rare symbols
//! behind them must fit the last 128 slots, which have a rank each. Exponents
//! of trained weights nearly always do; see [`RankTable::new`].

use crate::model::FreqTable;

/// `prob_bits` of a plane that can have a rank table.
const PROB_BITS: u32 = 12;
/// Ranks that fit the tables.
const MAX_RANKS: usize = 64;
/// Slots of a bucket.
const BUCKET_SLOTS: usize = 32;
/// Slots at the end that are looked up one by one.
pub(crate) const RARE_SLOTS: usize = 128;
/// First of them.
pub(crate) const RARE_START: usize = (1 << PROB_BITS) - RARE_SLOTS;

/// See the module.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub(crate) struct RankTable {
    /// `start + freq` of each rank: the first slot of the next one.
    pub(crate) ends: [u16; MAX_RANKS],
    /// Frequency of each rank.
    pub(crate) freqs: [u16; MAX_RANKS],
    /// First slot of each rank.
    pub(crate) starts: [u16; MAX_RANKS],
    /// Rank of the first slot of each bucket.
    pub(crate) buckets: [u8; (1 << PROB_BITS) / BUCKET_SLOTS],
    /// Rank of each of the last slots.
    pub(crate) rare: [u8; RARE_SLOTS],
    /// Symbol of each rank.
    pub(crate) symbols: [u8; MAX_RANKS],
}

impl RankTable {
    /// The table, or `None` if `prob_bits` is not 12, there are more than 64
    /// symbols, or those with fewer than 32 slots take more than 128 together.
    pub(crate) fn new(freqs: &FreqTable) -> Option<Self> {
        let ranked = freqs.ranked();
        let freq = |symbol: u8| usize::from(freqs.freqs()[usize::from(symbol)]);
        let rare: usize = ranked.iter().map(|&s| freq(s)).filter(|&f| f < BUCKET_SLOTS).sum();
        if freqs.prob_bits() != PROB_BITS || ranked.len() > MAX_RANKS || rare > RARE_SLOTS {
            return None;
        }
        let mut table = Self {
            ends: [0; MAX_RANKS],
            freqs: [0; MAX_RANKS],
            starts: [0; MAX_RANKS],
            buckets: [0; (1 << PROB_BITS) / BUCKET_SLOTS],
            rare: [0; RARE_SLOTS],
            symbols: [0; MAX_RANKS],
        };
        let mut start = 0;
        for (rank, &symbol) in ranked.iter().enumerate() {
            let end = start + freq(symbol);
            table.ends[rank] = end as u16;
            table.freqs[rank] = freq(symbol) as u16;
            table.starts[rank] = start as u16;
            table.symbols[rank] = symbol;
            for slot in start..end {
                if slot % BUCKET_SLOTS == 0 {
                    table.buckets[slot / BUCKET_SLOTS] = rank as u8;
                }
                if let Some(index) = slot.checked_sub(RARE_START) {
                    table.rare[index] = rank as u8;
                }
            }
            start = end;
        }
        Some(table)
    }

    /// The rank of a slot, as the vector decoder finds it.
    #[cfg(test)]
    fn rank(&self, slot: usize) -> u8 {
        let rank = match slot.checked_sub(RARE_START) {
            Some(index) => self.rare[index],
            None => self.buckets[slot / BUCKET_SLOTS],
        };
        rank + u8::from(slot >= usize::from(self.ends[usize::from(rank)]))
    }
}

/// What an encoder needs of a plane of few symbols, for vector registers.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub(crate) struct EncodeRanks {
    /// Rank of each symbol, [`UNKNOWN_RANK`] if it does not occur.
    pub(crate) ranks: [u8; 256],
    /// Frequency of each rank, 0 for the unknown one.
    pub(crate) freqs: [u16; MAX_RANKS],
    /// First slot of each rank.
    pub(crate) starts: [u16; MAX_RANKS],
}

/// Rank of a symbol without a frequency.
const UNKNOWN_RANK: u8 = MAX_RANKS as u8 - 1;

impl EncodeRanks {
    /// The table, or `None` if there are more than 63 symbols.
    pub(crate) fn new(freqs: &FreqTable) -> Option<Self> {
        let ranked = freqs.ranked();
        if ranked.len() > usize::from(UNKNOWN_RANK) {
            return None;
        }
        let starts = freqs.starts();
        let mut table =
            Self { ranks: [UNKNOWN_RANK; 256], freqs: [0; MAX_RANKS], starts: [0; MAX_RANKS] };
        for (rank, symbol) in ranked.into_iter().map(usize::from).enumerate() {
            table.ranks[symbol] = rank as u8;
            table.freqs[rank] = freqs.freqs()[symbol];
            table.starts[rank] = starts[symbol];
        }
        Some(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Histogram;

    #[test]
    fn every_slot_finds_its_rank() {
        let counts: [&[u64]; 5] = [
            &[1],
            &[1, 1],
            &[5000, 2500, 1200, 600, 300, 150, 75, 36, 18, 9, 4, 2, 1, 1, 1],
            &[33; 62],
            &[1, 4, 9, 16, 25, 36, 4000, 4000, 4000, 32, 31, 33],
        ];
        for counts in counts {
            let mut histogram = Histogram::default();
            histogram.counts[100..100 + counts.len()].copy_from_slice(counts);
            let freqs = FreqTable::quantise(&histogram, PROB_BITS);
            let table = RankTable::new(&freqs).expect("few enough symbols");
            let mut slot = 0;
            for (rank, symbol) in freqs.ranked().into_iter().enumerate() {
                assert_eq!(table.symbols[rank], symbol);
                for _ in 0..freqs.freqs()[usize::from(symbol)] {
                    assert_eq!(usize::from(table.rank(slot)), rank, "slot {slot}");
                    slot += 1;
                }
            }
            assert_eq!(slot, 1 << PROB_BITS);
        }
    }

    #[test]
    fn a_plane_with_many_rare_symbols_has_no_table() {
        let mut histogram = Histogram { counts: [0; 256] };
        histogram.counts[0] = 1 << 12;
        histogram.counts[1..60].fill(20);
        assert!(RankTable::new(&FreqTable::quantise(&histogram, PROB_BITS)).is_none());
    }
}
