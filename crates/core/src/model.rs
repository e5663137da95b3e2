//! The order-0 model: histogram of a plane -> integer frequencies -> bits.
//!
//! Weights are independent of their neighbours for coding purposes, so the
//! only thing worth knowing about a plane is how often each byte occurs in it.

use crate::bits::{BitReader, BitWriter};
use crate::error::TableError;

/// Smallest legal `prob_bits`.
pub const MIN_PROB_BITS: u32 = 12;
/// Largest legal `prob_bits`.
pub const MAX_PROB_BITS: u32 = 15;
/// Coarsest legal resolution of the stored frequencies.
pub const MIN_TABLE_BITS: u32 = 1;
/// A plane is coded when its order-0 entropy, in bits a symbol, is below this.
pub const MAX_CODED_ENTROPY: f64 = 7.9;
/// Bits a symbol that one more bit of `prob_bits` beyond 12 has to save:
/// larger tables decode more slowly.
const MIN_SAVING: f64 = 0.002;
/// Planes of at most this many symbols stay at 12 bits, with which vector
/// decoders hold their tables in registers.
const FEW_SYMBOLS: usize = 64;
/// Largest legal parameter of the Exp-Golomb code.
const MAX_GOLOMB_ORDER: u32 = 12;

/// How often each byte occurs in a plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram {
    /// Occurrences of each symbol.
    pub counts: [u64; 256],
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: [0; 256] }
    }
}

impl Histogram {
    /// Counts `symbols` into the histogram.
    ///
    /// # Cost
    ///
    /// One pass, about a cycle a symbol: four tables, so that runs of one
    /// symbol do not wait for each other's store.
    pub fn add(&mut self, symbols: &[u8]) {
        self.add_mapped(symbols, |symbol| symbol);
    }

    /// Counts `symbol(item)` of every item.
    pub(crate) fn add_mapped<T: Copy>(&mut self, items: &[T], symbol: impl Fn(T) -> u8) {
        // u32 cannot overflow within a piece of this size.
        for piece in items.chunks(1 << 30) {
            let mut tables = [[0u32; 256]; 4];
            let (quads, rest) = piece.as_chunks::<4>();
            for quad in quads {
                for (table, &item) in tables.iter_mut().zip(quad) {
                    table[usize::from(symbol(item))] += 1;
                }
            }
            for &item in rest {
                tables[0][usize::from(symbol(item))] += 1;
            }
            for (symbol, count) in self.counts.iter_mut().enumerate() {
                *count += tables.iter().map(|t| u64::from(t[symbol])).sum::<u64>();
            }
        }
    }

    /// Adds the counts of another histogram.
    pub fn merge(&mut self, other: &Self) {
        for (a, b) in self.counts.iter_mut().zip(&other.counts) {
            *a += b;
        }
    }

    /// Number of symbols counted.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Order-0 entropy in bits a symbol; 0 for an empty histogram.
    #[must_use]
    pub fn entropy(&self) -> f64 {
        let total = self.total() as f64;
        self.counts
            .iter()
            .filter(|&&count| count > 0)
            .map(|&count| count as f64 * (total / count as f64).log2())
            .sum::<f64>()
            / total.max(1.0)
    }

    /// Bits a symbol that `freqs` spends on this histogram.
    fn cost(&self, freqs: &FreqTable) -> f64 {
        let total = self.total() as f64;
        (self.counts.iter().zip(&freqs.freqs))
            .filter(|(count, _)| **count > 0)
            .map(|(&count, &freq)| {
                count as f64 * (f64::from(freqs.prob_bits()) - f64::from(freq).log2())
            })
            .sum::<f64>()
            / total.max(1.0)
    }
}

/// Integer frequencies of the symbols of a plane; they sum to `1 << prob_bits`.
///
/// They are stored with a resolution of `table_bits`, which is `prob_bits` or,
/// for small tensors, coarser: a short table then saves more than exact
/// frequencies would.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreqTable {
    table_bits: u32,
    freqs: [u16; 256],
}

impl FreqTable {
    /// The table the encoder uses for a plane: the resolution that makes table
    /// and symbols together smallest, where each bit beyond 12 has to save
    /// 0.002 bits a symbol, and a plane of at most 64 symbols stays at 12.
    ///
    /// `None` if the plane is empty or its entropy is 7.9 bits or more: then
    /// it is stored as it is.
    #[must_use]
    pub fn choose(histogram: &Histogram) -> Option<Self> {
        let total = histogram.total() as f64;
        if total == 0.0 || histogram.entropy() >= MAX_CODED_ENTROPY {
            return None;
        }
        let n_symbols = histogram.counts.iter().filter(|&&count| count > 0).count();
        let bits = |table: &Self| f64::from(table.stored_bits()) + total * histogram.cost(table);
        let mut best: Option<(f64, Self)> = None;
        let max_bits = if n_symbols <= FEW_SYMBOLS { MIN_PROB_BITS } else { MAX_PROB_BITS };
        for table_bits in (MIN_TABLE_BITS..=max_bits).filter(|&bits| n_symbols <= 1 << bits) {
            let table = Self::quantise(histogram, table_bits);
            let needed = if table_bits > MIN_PROB_BITS { total * MIN_SAVING } else { 0.0 };
            let size = bits(&table);
            if best.as_ref().is_none_or(|(least, _)| size + needed < *least) {
                best = Some((size, table));
            }
        }
        best.map(|(_, table)| table)
    }

    /// Frequencies proportional to the counts, at least one unit for every
    /// symbol that occurs; a unit is `1 << (prob_bits - table_bits)`.
    ///
    /// Starts from rounding down and then moves one unit at a time where it
    /// saves (or costs) least: a unit on top of `freq` is worth about
    /// `count / (freq + 1/2)`, compared here in integers, so that every
    /// machine gives the same table.
    ///
    /// # Panics
    ///
    /// If the histogram is empty, has more symbols than there are units, or
    /// `table_bits` is not in 1..=15.
    #[must_use]
    pub fn quantise(histogram: &Histogram, table_bits: u32) -> Self {
        assert!((MIN_TABLE_BITS..=MAX_PROB_BITS).contains(&table_bits), "table_bits {table_bits}");
        let total = u128::from(histogram.total());
        assert!(total > 0, "a histogram without symbols has no frequencies");
        let scale = 1u32 << table_bits;
        let mut freqs = histogram.counts.map(|count| match count {
            0 => 0,
            _ => ((u128::from(count) << table_bits) / total).max(1) as u32,
        });
        let gain = |symbol: usize, freq: u32| {
            // count / (2 freq + 1), as a fraction to compare.
            (u128::from(histogram.counts[symbol]), u128::from(2 * freq + 1))
        };
        let less = |a: (u128, u128), b: (u128, u128)| a.0 * b.1 < b.0 * a.1;
        loop {
            let sum: u32 = freqs.iter().sum();
            if sum == scale {
                break;
            }
            let mut chosen: Option<(usize, (u128, u128))> = None;
            for symbol in 0..256 {
                let freq = freqs[symbol];
                let value = match sum < scale {
                    true if freq > 0 => gain(symbol, freq),
                    false if freq > 1 => gain(symbol, freq - 1),
                    _ => continue,
                };
                let better = chosen.is_none_or(|(_, best)| {
                    if sum < scale { less(best, value) } else { less(value, best) }
                });
                if better {
                    chosen = Some((symbol, value));
                }
            }
            let (symbol, _) = chosen.expect("there are at least as many units as symbols");
            if sum < scale {
                freqs[symbol] += 1;
            } else {
                freqs[symbol] -= 1;
            }
        }
        Self::from_units(table_bits, freqs)
    }

    fn from_units(table_bits: u32, units: [u32; 256]) -> Self {
        let table = Self { table_bits, freqs: [0; 256] };
        Self { freqs: units.map(|units| (units << table.shift()) as u16), ..table }
    }

    /// Frequencies sum to `1 << prob_bits`.
    #[must_use]
    pub const fn prob_bits(&self) -> u32 {
        if self.table_bits > MIN_PROB_BITS { self.table_bits } else { MIN_PROB_BITS }
    }

    /// Resolution of the stored frequencies, at most `prob_bits`.
    #[must_use]
    pub const fn table_bits(&self) -> u32 {
        self.table_bits
    }

    /// Every frequency is a multiple of `1 << shift`.
    const fn shift(&self) -> u32 {
        self.prob_bits() - self.table_bits
    }

    /// Frequency of each symbol, 0 if it does not occur.
    #[must_use]
    pub const fn freqs(&self) -> &[u16; 256] {
        &self.freqs
    }

    /// Symbols that occur, in the order in which their intervals lie: by
    /// descending frequency, equal ones by ascending symbol (spec section 5.2).
    #[must_use]
    pub fn ranked(&self) -> Vec<u8> {
        let mut symbols: Vec<u8> = (0..=255).filter(|&s| self.freqs[usize::from(s)] > 0).collect();
        symbols.sort_by_key(|&s| (std::cmp::Reverse(self.freqs[usize::from(s)]), s));
        symbols
    }

    /// First slot of each symbol's interval; meaningless where the frequency is 0.
    #[must_use]
    pub fn starts(&self) -> [u16; 256] {
        let mut starts = [0; 256];
        let mut next = 0;
        for symbol in self.ranked() {
            starts[usize::from(symbol)] = next;
            next += self.freqs[usize::from(symbol)];
        }
        starts
    }

    /// First and last symbol, the units of all between them, and the order of
    /// the Exp-Golomb code that takes fewest bits.
    fn stored(&self) -> (usize, usize, Vec<u32>, u32) {
        let first = self.freqs.iter().position(|&f| f > 0).expect("some symbol occurs");
        let last = self.freqs.iter().rposition(|&f| f > 0).expect("some symbol occurs");
        let units: Vec<u32> =
            self.freqs[first..=last].iter().map(|&f| u32::from(f) >> self.shift()).collect();
        let bits = |k: u32| units.iter().map(|&u| golomb_bits(u, k)).sum::<u32>();
        let order = (0..=MAX_GOLOMB_ORDER).min_by_key(|&k| bits(k)).expect("not empty");
        (first, last, units, order)
    }

    /// Bits that [`FreqTable::write`] writes.
    fn stored_bits(&self) -> u32 {
        let (_, _, units, order) = self.stored();
        24 + units.iter().map(|&u| golomb_bits(u, order)).sum::<u32>()
    }

    /// Writes the table (spec section 5.2): `table_bits`, order `k` of the
    /// code, first and last symbol, then the frequencies between them, in
    /// units, in Exp-Golomb code of order `k`.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let (first, last, units, order) = self.stored();
        let mut writer = BitWriter::new(out);
        writer.put(self.table_bits, 4);
        writer.put(order, 4);
        writer.put(first as u32, 8);
        writer.put(last as u32, 8);
        units.into_iter().for_each(|units| put_golomb(&mut writer, units, order));
        writer.finish();
    }

    /// Reads what [`FreqTable::write`] wrote; returns the table and the bytes read.
    pub(crate) fn read(bytes: &[u8]) -> Result<(Self, usize), TableError> {
        let mut reader = BitReader::new(bytes);
        let table_bits = reader.take(4).ok_or(TableError::Truncated)?;
        if !(MIN_TABLE_BITS..=MAX_PROB_BITS).contains(&table_bits) {
            return Err(TableError::TableBits { found: table_bits });
        }
        let order = reader.take(4).ok_or(TableError::Truncated)?;
        if order > MAX_GOLOMB_ORDER {
            return Err(TableError::GolombOrder { found: order });
        }
        let first = reader.take(8).ok_or(TableError::Truncated)? as usize;
        let last = reader.take(8).ok_or(TableError::Truncated)? as usize;
        let bad_range = TableError::SymbolRange { first: first as u8, last: last as u8 };
        if first > last {
            return Err(bad_range);
        }
        let (mut units, mut sum) = ([0; 256], 0);
        for units in &mut units[first..=last] {
            *units = take_golomb(&mut reader, order)?;
            sum += *units;
            if sum > 1 << table_bits {
                return Err(TableError::Sum { found: sum, expected: 1 << table_bits });
            }
        }
        if sum != 1 << table_bits {
            return Err(TableError::Sum { found: sum, expected: 1 << table_bits });
        }
        if units[first] == 0 || units[last] == 0 {
            return Err(bad_range);
        }
        let n_bytes = reader.finish().ok_or(TableError::Padding)?;
        Ok((Self::from_units(table_bits, units), n_bytes))
    }
}

/// Bits of `value` in Exp-Golomb code of order `k`.
fn golomb_bits(value: u32, k: u32) -> u32 {
    2 * (value + (1 << k)).ilog2() - k + 1
}

/// Exp-Golomb of order `k`: with `v = value + 2^k` of `b + 1` bits, `b - k`
/// zeros, a one, then the low `b` bits of `v`.
fn put_golomb(writer: &mut BitWriter<'_>, value: u32, k: u32) {
    let v = value + (1 << k);
    let b = v.ilog2();
    writer.put(0, b - k);
    writer.put(1, 1);
    writer.put(v - (1 << b), b);
}

fn take_golomb(reader: &mut BitReader<'_>, k: u32) -> Result<u32, TableError> {
    let mut b = k;
    while reader.take(1).ok_or(TableError::Truncated)? == 0 {
        b += 1;
        // Units are at most 2^15, so v has at most 16 bits here.
        if b > MAX_PROB_BITS {
            return Err(TableError::Frequency);
        }
    }
    let low = reader.take(b).ok_or(TableError::Truncated)?;
    Ok((1 << b) + low - (1 << k))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram(pairs: &[(u8, u64)]) -> Histogram {
        let mut h = Histogram::default();
        for &(symbol, count) in pairs {
            h.counts[usize::from(symbol)] = count;
        }
        h
    }

    fn round_trip(table: &FreqTable) {
        let mut bytes = Vec::new();
        table.write(&mut bytes);
        let n_bytes = bytes.len();
        bytes.push(0xFF);
        assert_eq!(FreqTable::read(&bytes).unwrap(), (table.clone(), n_bytes));
        for cut in 0..n_bytes {
            assert!(FreqTable::read(&bytes[..cut]).is_err());
        }
    }

    #[test]
    fn every_symbol_that_occurs_gets_a_slot_and_the_sum_is_exact() {
        for table_bits in 8..=MAX_PROB_BITS {
            for h in [
                histogram(&[(7, 1)]),
                histogram(&[(0, u64::MAX >> 1), (255, 1)]),
                Histogram { counts: std::array::from_fn(|i| 1 + i as u64 * i as u64) },
                Histogram { counts: [1 << 40; 256] },
            ] {
                let table = FreqTable::quantise(&h, table_bits);
                let sum: u32 = table.freqs.iter().map(|&f| u32::from(f)).sum();
                assert_eq!(sum, 1 << table.prob_bits());
                assert_eq!(table.prob_bits(), table_bits.max(12));
                for (count, freq) in h.counts.iter().zip(&table.freqs) {
                    assert_eq!(*count > 0, *freq > 0);
                }
                round_trip(&table);
            }
        }
    }

    #[test]
    fn a_flat_plane_is_not_coded_and_a_skewed_one_is() {
        assert!(FreqTable::choose(&Histogram { counts: [9; 256] }).is_none());
        assert!(FreqTable::choose(&Histogram::default()).is_none());
        let table = FreqTable::choose(&histogram(&[(3, 5), (9, 70)])).unwrap();
        assert_eq!(table.prob_bits(), 12);
        assert_eq!(table.table_bits(), 3);
        assert_eq!(table.ranked(), [9, 3]);
        assert_eq!(table.starts()[3], table.freqs()[9]);
    }

    #[test]
    fn histogram_counts_what_a_plain_loop_counts() {
        let symbols: Vec<u8> = (0..1003u32).map(|i| ((i * i) >> 3) as u8).collect();
        let mut expected = [0u64; 256];
        symbols.iter().for_each(|&s| expected[usize::from(s)] += 1);
        let mut h = Histogram::default();
        h.add(&symbols[..500]);
        h.add(&symbols[500..]);
        assert_eq!(h.counts, expected);
        assert_eq!(h.total(), 1003);
    }
}
