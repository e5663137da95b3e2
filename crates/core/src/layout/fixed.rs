//! Fixed-rate codes with escapes, for computing from memory.
//!
//! Of each element a few bits say which of the most frequent exponents it has;
//! the rest of the element is stored as it is, and the elements with a rarer
//! exponent are listed. Everything is in tile order, strip by strip:
//!
//! ```text
//! BF16, 3 bits   per 64 elements: 16 bytes of 2-bit fields, 8 bytes of 1-bit fields
//! BF16, 4 bits   per 64 elements: 32 bytes of 4-bit fields
//! FP16, 3 bits   per 64 elements: 32 bytes of 4-bit fields, 16 bytes of 2-bit fields
//!                (code, then the two mantissa bits of the high byte, then the sign)
//! and the plane of low bytes
//! ```
//!
//! Field `j` of 64 lies in byte `j % (64 / f)`, where `f` is the number of fields
//! a byte holds, at bit `j / (64 / f)` times the width: one load, a shift that
//! differs from lane to lane and a mask give 64 fields in order.

use rayon::prelude::*;

use crate::error::DecodeError;
use crate::io::ReadAt;
use crate::isa::Isa;
use crate::layout::WeightType;
use crate::record::Record;
use crate::tile::{Order, STRIP_ELEMS, Tile, Tiling};

/// Elements whose fields are stored together.
pub(crate) const GROUP: usize = 64;
/// Bits that an escape takes: position and exponent.
const ESCAPE_BITS: f64 = 24.0;

/// How the high byte of an element is coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Coding {
    /// BF16: the exponent is one of eight.
    Exponent3,
    /// BF16: the exponent is one of sixteen.
    Exponent4,
    /// FP16: the five-bit exponent is one of eight; sign and two bits beside it.
    Half3,
}

impl Coding {
    const fn candidates(weight: WeightType) -> &'static [Self] {
        match weight {
            WeightType::Bf16 => &[Self::Exponent3, Self::Exponent4],
            WeightType::F16 => &[Self::Half3],
            WeightType::F32 => &[],
        }
    }

    /// Exponents that have a code.
    const fn n_codes(self) -> usize {
        match self {
            Self::Exponent3 | Self::Half3 => 8,
            Self::Exponent4 => 16,
        }
    }

    /// Bytes that the fields of a group take.
    pub(crate) const fn group_bytes(self) -> usize {
        match self {
            Self::Exponent3 => 24,
            Self::Exponent4 => 32,
            Self::Half3 => 48,
        }
    }

    /// The exponent of a high byte.
    const fn exponent(self, high: u8) -> u8 {
        match self {
            Self::Half3 => high >> 2 & 31,
            _ => high,
        }
    }

    /// The fields of an element whose exponent has this code.
    const fn field(self, high: u8, code: u8) -> u8 {
        match self {
            Self::Half3 => code | (high & 3) << 3 | (high >> 7) << 5,
            _ => code,
        }
    }

    /// The opposite of [`Coding::field`].
    const fn high(self, field: u8, palette: &[u8; 16]) -> u8 {
        match self {
            Self::Half3 => palette[(field & 7) as usize] << 2 | field >> 3 & 3 | field >> 5 << 7,
            _ => palette[field as usize],
        }
    }

    /// Writes the fields of a group.
    fn pack(self, fields: &[u8; GROUP], out: &mut Vec<u8>) {
        match self {
            Self::Exponent3 => {
                pack_fields(fields.map(|f| f & 3), 2, out);
                pack_fields(fields.map(|f| f >> 2), 1, out);
            }
            Self::Exponent4 => pack_fields(*fields, 4, out),
            Self::Half3 => {
                pack_fields(fields.map(|f| f & 15), 4, out);
                pack_fields(fields.map(|f| f >> 4), 2, out);
            }
        }
    }

    /// Reads the fields of a group.
    fn unpack(self, bytes: &[u8]) -> [u8; GROUP] {
        let join = |a: [u8; GROUP], b: [u8; GROUP], shift: u32| {
            std::array::from_fn(|j| a[j] | b[j] << shift)
        };
        match self {
            Self::Exponent3 => join(unpack_fields(&bytes[..16], 2), unpack_ones(&bytes[16..24]), 2),
            Self::Exponent4 => unpack_fields(&bytes[..32], 4),
            Self::Half3 => {
                join(unpack_fields(&bytes[..32], 4), unpack_fields(&bytes[32..48], 2), 4)
            }
        }
    }
}

fn pack_fields(fields: [u8; GROUP], width: u32, out: &mut Vec<u8>) {
    // One-bit fields are a mask: bit j is field j.
    if width == 1 {
        let mask = fields.iter().rev().fold(0u64, |mask, &f| mask << 1 | u64::from(f));
        out.extend(mask.to_le_bytes());
        return;
    }
    let n_bytes = GROUP * width as usize / 8;
    for byte in 0..n_bytes {
        let parts = fields.iter().skip(byte).step_by(n_bytes).enumerate();
        out.push(parts.fold(0, |sum, (i, &f)| sum | f << (i as u32 * width)));
    }
}

fn unpack_fields(bytes: &[u8], width: u32) -> [u8; GROUP] {
    std::array::from_fn(|j| {
        bytes[j % bytes.len()] >> ((j / bytes.len()) as u32 * width) & ((1 << width) - 1)
    })
}

fn unpack_ones(bytes: &[u8]) -> [u8; GROUP] {
    std::array::from_fn(|j| bytes[j / 8] >> (j % 8) & 1)
}

/// A strip's elements with exponents that have no code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, packed)]
struct Escape {
    /// Element of the strip.
    position: u16,
    /// Its true high byte.
    high: u8,
}

#[derive(Debug, Default)]
struct FixedTile {
    /// Fields of every group, strip after strip; strips are padded to whole groups.
    fields: Vec<u8>,
    low: Vec<u8>,
    escapes: Vec<Escape>,
    /// First escape of every strip, and the end.
    escape_starts: Vec<u32>,
}

#[derive(Debug)]
pub(crate) struct FixedMatrix {
    tiling: Tiling,
    coding: Coding,
    /// Exponent of each code.
    pub(crate) palette: [u8; 16],
    tiles: Vec<FixedTile>,
}

impl FixedMatrix {
    /// The smallest variant, `None` if none is smaller than dense.
    pub(super) fn from_record(
        record: &Record,
        source: &(impl ReadAt + ?Sized),
        weight: WeightType,
        isa: Isa,
    ) -> Result<Option<Self>, DecodeError> {
        let counts = count_high_bytes(record, source, isa)?;
        let size = |coding: &Coding| {
            let fields = coding.group_bytes() as f64 * 8.0 / GROUP as f64;
            fields + 8.0 + ESCAPE_BITS * escape_rate(*coding, &counts)
        };
        let smallest = (Coding::candidates(weight).iter().copied())
            .min_by(|a, b| size(a).total_cmp(&size(b)))
            .filter(|coding| size(coding) < 16.0);
        smallest.map(|coding| Self::with_coding(record, source, coding, &counts, isa)).transpose()
    }

    fn with_coding(
        record: &Record,
        source: &(impl ReadAt + ?Sized),
        coding: Coding,
        counts: &[u64; 256],
        isa: Isa,
    ) -> Result<Self, DecodeError> {
        let palette = choose_palette(coding, counts);
        let tiling = *record.header().tiling();
        let mut code_of = [None; 256];
        for (code, &exponent) in palette[..coding.n_codes()].iter().enumerate().rev() {
            code_of[usize::from(exponent)] = Some(code as u8);
        }
        let indices: Vec<usize> = (0..tiling.n_tiles()).collect();
        let tiles: Vec<Vec<FixedTile>> = indices
            .par_chunks(crate::coder::rans::MAX_STREAMS)
            .map(|group| {
                let mut tiles: Vec<FixedTile> = group
                    .iter()
                    .map(|_| FixedTile { escape_starts: vec![0], ..FixedTile::default() })
                    .collect();
                record.for_each_strip_with(source, isa, group, |index, _, planes| {
                    tiles[index - group[0]].push(coding, &code_of, planes);
                })?;
                tiles.iter_mut().for_each(FixedTile::shrink);
                Ok(tiles)
            })
            .collect::<Result<_, DecodeError>>()?;
        Ok(Self { tiling, coding, palette, tiles: tiles.into_iter().flatten().collect() })
    }

    pub(crate) fn tiling(&self) -> &Tiling {
        &self.tiling
    }

    pub(super) fn resident_bytes(&self) -> usize {
        self.tiles.iter().map(FixedTile::resident_bytes).sum::<usize>() + self.palette.len()
    }

    /// Decodes one strip: its high bytes into `high`, its low bytes borrowed.
    ///
    /// `strip` counts the strips of tile `tile`, `n` is the number of its elements.
    pub(crate) fn strip<'a>(
        &'a self,
        isa: Isa,
        tile: usize,
        strip: usize,
        n: usize,
        high: &'a mut [u8; STRIP_ELEMS],
    ) -> [&'a [u8]; 2] {
        let whole = STRIP_ELEMS.min(self.strip_stride(tile));
        let next = self.tiles.get(tile + 1);
        let tile = &self.tiles[tile];
        let strip_bytes = whole.div_ceil(GROUP) * self.coding.group_bytes();
        let fields = &tile.fields[strip * strip_bytes..];
        let fields = &fields[..n.div_ceil(GROUP) * self.coding.group_bytes()];
        let low = &tile.low[strip * whole..][..n];
        // The strip after this one, in this tile or the next.
        let ahead: [&[u8]; 2] = match (tile.fields.get((strip + 1) * strip_bytes..), next) {
            (Some(fields), _) if !fields.is_empty() => [fields, &tile.low[(strip + 1) * whole..]],
            (_, Some(next)) => [&next.fields, &next.low],
            _ => [&[], &[]],
        };
        crate::arch::unpack_highs(isa, self.coding, &self.palette, fields, ahead, high);
        let range = tile.escape_starts[strip] as usize..tile.escape_starts[strip + 1] as usize;
        for escape in &tile.escapes[range] {
            high[usize::from(escape.position)] = escape.high;
        }
        [&high[..n], low]
    }

    /// Elements of every strip of a tile but the last.
    fn strip_stride(&self, tile: usize) -> usize {
        let tile: Tile = self.tiling.tile(tile);
        match self.tiling.order() {
            Order::Linear => STRIP_ELEMS,
            Order::Fragment => crate::tile::BLOCK * tile.cols,
        }
    }
}

impl FixedTile {
    fn push(&mut self, coding: Coding, code_of: &[Option<u8>; 256], planes: [&[u8]; 2]) {
        for (group, highs) in planes[0].chunks(GROUP).enumerate() {
            let mut fields = [0; GROUP];
            for (j, (field, &high)) in fields.iter_mut().zip(highs).enumerate() {
                let code = code_of[usize::from(coding.exponent(high))];
                *field = coding.field(high, code.unwrap_or(0));
                if code.is_none() {
                    self.escapes.push(Escape { position: (group * GROUP + j) as u16, high });
                }
            }
            coding.pack(&fields, &mut self.fields);
        }
        self.low.extend(planes[1]);
        self.escape_starts.push(self.escapes.len() as u32);
    }

    fn shrink(&mut self) {
        self.fields.shrink_to_fit();
        self.low.shrink_to_fit();
        self.escapes.shrink_to_fit();
    }

    fn resident_bytes(&self) -> usize {
        self.fields.len()
            + self.low.len()
            + size_of_val(self.escapes.as_slice())
            + size_of_val(self.escape_starts.as_slice())
    }
}

/// Portable version of [`crate::arch::unpack_highs`]; it defines the result.
pub(crate) fn unpack_highs(coding: Coding, palette: &[u8; 16], fields: &[u8], high: &mut [u8]) {
    let groups = fields.chunks_exact(coding.group_bytes()).zip(high.chunks_mut(GROUP));
    for (fields, high) in groups {
        for (high, field) in high.iter_mut().zip(coding.unpack(fields)) {
            *high = coding.high(field, palette);
        }
    }
}

/// How often each high byte occurs: from the record's own frequencies, in
/// parts of their sum, or if it has none by counting.
fn count_high_bytes(
    record: &Record,
    source: &(impl ReadAt + ?Sized),
    isa: Isa,
) -> Result<[u64; 256], DecodeError> {
    if let Some(table) = record.header().table(0) {
        return Ok(table.freqs().map(u64::from));
    }
    let mut histogram = crate::model::Histogram::default();
    let indices: Vec<usize> = (0..record.header().tiling().n_tiles()).collect();
    record.for_each_strip_with(source, isa, &indices, |_, _, planes| histogram.add(planes[0]))?;
    Ok(histogram.counts)
}

fn exponent_counts(coding: Coding, counts: &[u64; 256]) -> [u64; 256] {
    let mut exponents = [0; 256];
    for (high, count) in (0..=255).zip(counts) {
        exponents[usize::from(coding.exponent(high))] += count;
    }
    exponents
}

/// The most frequent exponents, in ascending order; unused places repeat the last.
fn choose_palette(coding: Coding, counts: &[u64; 256]) -> [u8; 16] {
    let counts = exponent_counts(coding, counts);
    let mut exponents: Vec<u8> = (0..=255).collect();
    exponents.sort_by_key(|&e| std::cmp::Reverse(counts[usize::from(e)]));
    exponents.truncate(coding.n_codes());
    exponents.sort_unstable();
    let last = exponents[exponents.len() - 1];
    std::array::from_fn(|code| exponents.get(code).copied().unwrap_or(last))
}

fn escape_rate(coding: Coding, counts: &[u64; 256]) -> f64 {
    let palette = choose_palette(coding, counts);
    let exponents = exponent_counts(coding, counts);
    let total: u64 = exponents.iter().sum();
    let inside: u64 = palette[..coding.n_codes()].iter().map(|&e| exponents[usize::from(e)]).sum();
    (total - inside) as f64 / total.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::join_tile_with;
    use crate::{Dtype, encode_record};

    const CODINGS: [(Dtype, Coding); 3] = [
        (Dtype::Bf16, Coding::Exponent3),
        (Dtype::Bf16, Coding::Exponent4),
        (Dtype::F16, Coding::Half3),
    ];

    /// The elements back from a matrix, row-major.
    fn to_bytes(fixed: &FixedMatrix, dtype: Dtype, isa: Isa) -> Vec<u8> {
        let (tiling, order) = (fixed.tiling(), fixed.tiling().order());
        let row_bytes = tiling.row_stride() * dtype.elem_bytes();
        let mut bytes = vec![0; tiling.n_elems() * dtype.elem_bytes()];
        // What an earlier strip leaves behind must not show.
        let mut high = [0xA5; STRIP_ELEMS];
        for index in 0..tiling.n_tiles() {
            for (s, strip) in tiling.tile(index).strips(order).enumerate() {
                let planes = fixed.strip(isa, index, s, strip.n_elems(), &mut high);
                let at = strip.row_start * row_bytes + strip.col_start * dtype.elem_bytes();
                join_tile_with(isa, dtype, order, &strip, planes, &mut bytes[at..], row_bytes);
            }
        }
        bytes
    }

    fn n_escapes(fixed: &FixedMatrix) -> usize {
        fixed.tiles.iter().map(|tile| tile.escapes.len()).sum()
    }

    /// Encodes with `coding` forced and decodes on every instruction set;
    /// returns the number of escapes.
    fn round_trip(dtype: Dtype, coding: Coding, shape: [usize; 2], words: &[u16]) -> usize {
        let isa = Isa::best();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let packed = encode_record(isa, dtype, &shape, &bytes).unwrap();
        let record = Record::read(&packed, 0, packed.len() as u64).unwrap();
        let counts = count_high_bytes(&record, &packed, isa).unwrap();
        let fixed = FixedMatrix::with_coding(&record, &packed, coding, &counts, isa).unwrap();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            assert!(to_bytes(&fixed, dtype, isa) == bytes, "{coding:?} {shape:?} {isa:?}");
        }
        n_escapes(&fixed)
    }

    #[test]
    fn every_bit_pattern_survives_every_coding() {
        let words: Vec<u16> = (0..=u16::MAX).map(|i| i.wrapping_mul(40_503)).collect();
        for (dtype, coding) in CODINGS {
            // All exponents are equally frequent, and most have no code.
            let n_exponents = if dtype == Dtype::F16 { 32 } else { 256 };
            let expected = words.len() / n_exponents * (n_exponents - coding.n_codes());
            assert_eq!(round_trip(dtype, coding, [256, 256], &words), expected);
            assert_eq!(round_trip(dtype, coding, [1, 65_536], &words), expected);
            round_trip(dtype, coding, [255, 255], &words[..255 * 255]);
        }
    }

    #[test]
    fn every_share_of_escapes_survives_every_coding() {
        for (dtype, coding) in CODINGS {
            for percent in [0, 2, 40] {
                let words: Vec<u16> = (0..144 * 528usize)
                    .map(|i| {
                        let noise = (i * 2_654_435_761) >> 7;
                        if noise % 100 < percent { (noise >> 3) as u16 } else { 0x3C11 }
                    })
                    .collect();
                let n = round_trip(dtype, coding, [144, 528], &words);
                let share = n * 100 / words.len();
                assert!(share <= percent && share * 4 >= percent, "{coding:?}: {share} %");
            }
        }
    }

    #[test]
    fn a_strip_of_nothing_but_escapes_survives() {
        // The first 16 rows have the exponents that nothing else has.
        for (dtype, coding) in CODINGS {
            let words: Vec<u16> = (0..512 * 512u32)
                .map(|i| match i < 16 * 512 {
                    true => 0x0123,
                    false => 0x3C00 + 0x0400 * (i % 16) as u16,
                })
                .collect();
            assert!(round_trip(dtype, coding, [512, 512], &words) >= 16 * 512);
        }
    }

    #[test]
    fn one_distinct_element_survives_without_escapes() {
        for (dtype, coding) in CODINGS {
            for word in [0, 0x3F80, 0x8000, 0xFFFF] {
                assert_eq!(round_trip(dtype, coding, [48, 32], &[word; 48 * 32]), 0);
                assert_eq!(round_trip(dtype, coding, [1, 1], &[word]), 0);
            }
        }
    }
}
