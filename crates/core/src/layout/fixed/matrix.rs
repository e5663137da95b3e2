//! A matrix in fixed-rate codes.

use std::ops::Range;

use rayon::prelude::*;

use super::CHUNK_ELEMS;
use super::coding::Coding;
use crate::coder::rans::MAX_STREAMS;
use crate::error::DecodeError;
use crate::io::ReadAt;
use crate::isa::Isa;
use crate::layout::WeightType;
use crate::record::Record;
use crate::tile::{BLOCK, Order, TILE_ELEMS, TILE_ROWS, Tile, Tiling};

/// An element whose exponent has no code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, packed)]
struct Escape {
    /// Element of the chunk.
    position: u16,
    /// Its true high byte.
    high: u8,
}

/// Consecutive elements whose codes lie together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chunk<'a> {
    /// Fields, whole groups.
    pub(crate) fields: &'a [u8],
    /// Low bytes, as many as there are elements; none of integers.
    pub(crate) low: &'a [u8],
    pub(crate) n_elems: usize,
    escapes: &'a [Escape],
}

impl Chunk<'_> {
    /// Puts high bytes that have no code into their places.
    #[inline(always)]
    pub(crate) fn patch(&self, high: &mut [u8; CHUNK_ELEMS]) {
        for escape in self.escapes {
            high[usize::from(escape.position) % CHUNK_ELEMS] = escape.high;
        }
    }
}

/// Consecutive chunks: 16 rows in fragment order, a tile in linear order.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Band<'a> {
    pub(crate) coding: Coding,
    pub(crate) palette: &'a [u8; 16],
    n_elems: usize,
    codes: &'a [u8],
    escapes: &'a [Escape],
    /// Escapes of every chunk.
    counts: &'a [u16],
}

impl<'a> Band<'a> {
    /// The chunks, elements ascending.
    #[inline(always)]
    pub(crate) fn chunks(self) -> impl Iterator<Item = Chunk<'a>> {
        let (mut codes, mut escapes) = (self.codes, self.escapes);
        self.counts.iter().enumerate().map(move |(index, &count)| {
            let n = CHUNK_ELEMS.min(self.n_elems - index * CHUNK_ELEMS);
            let (fields, low, patches);
            (fields, codes) = codes.split_at(self.coding.field_bytes(n));
            (low, codes) = codes.split_at(self.coding.low_bytes(n));
            (patches, escapes) = escapes.split_at(usize::from(count));
            Chunk { fields, low, n_elems: n, escapes: patches }
        })
    }

    /// Decodes chunk after chunk: both planes of its elements.
    pub(crate) fn for_each_chunk(self, isa: Isa, mut sink: impl FnMut([&[u8]; 2])) {
        let mut high = [0; CHUNK_ELEMS];
        for chunk in self.chunks() {
            crate::arch::unpack_highs(isa, self.coding, self.palette, chunk.fields, &mut high);
            chunk.patch(&mut high);
            sink([&high[..chunk.n_elems], chunk.low]);
        }
    }
}

/// How a matrix is cut into bands.
#[derive(Debug, Clone, Copy)]
struct Bands {
    order: Order,
    coding: Coding,
    /// Elements of the matrix.
    n_elems: usize,
    /// Elements of a band; the last may have fewer.
    band_elems: usize,
}

impl Bands {
    fn of(tiling: &Tiling, coding: Coding) -> Self {
        let (order, n_elems) = (tiling.order(), tiling.n_elems());
        let band_elems = match order {
            Order::Fragment => BLOCK * tiling.row_stride(),
            Order::Linear => TILE_ELEMS,
        };
        Self { order, coding, n_elems, band_elems }
    }

    /// Band and element of the band at which a strip starts.
    fn start_of(&self, strip: &Tile) -> (usize, usize) {
        match self.order {
            Order::Fragment => (strip.row_start / BLOCK, strip.col_start * BLOCK),
            Order::Linear => (strip.col_start / TILE_ELEMS, strip.col_start % TILE_ELEMS),
        }
    }

    const fn chunks_per_band(&self) -> usize {
        self.band_elems.div_ceil(CHUNK_ELEMS)
    }

    const fn n_chunks(&self) -> usize {
        self.n_elems / self.band_elems * self.chunks_per_band()
            + (self.n_elems % self.band_elems).div_ceil(CHUNK_ELEMS)
    }

    /// Bytes that consecutive elements of a band take from its start on, or
    /// from the start of a chunk.
    const fn code_bytes(&self, n: usize) -> usize {
        self.coding.field_bytes(n) + self.coding.low_bytes(n)
    }

    /// Bytes of all bands. Only the last element of all may not fill its group.
    const fn total_bytes(&self) -> usize {
        self.n_elems / self.band_elems * self.code_bytes(self.band_elems)
            + self.code_bytes(self.n_elems % self.band_elems)
    }
}

/// A matrix in fixed-rate codes.
#[derive(Debug)]
pub(crate) struct FixedMatrix {
    tiling: Tiling,
    bands: Bands,
    /// Exponent of each code.
    palette: [u8; 16],
    /// Chunk after chunk, band after band.
    codes: Vec<u8>,
    /// In the order of the chunks, positions ascending.
    escapes: Vec<Escape>,
    /// Escapes of every chunk.
    counts: Vec<u16>,
    /// First escape of every band, and the end.
    band_escapes: Vec<usize>,
}

impl FixedMatrix {
    /// The smallest variant, `None` if none is smaller than dense.
    pub(crate) fn from_record(
        record: &Record,
        source: &(impl ReadAt + ?Sized),
        weight: WeightType,
        isa: Isa,
    ) -> Result<Option<Self>, DecodeError> {
        let counts = count_high_bytes(record, source, isa)?;
        let coding = Coding::smallest(weight, &counts);
        coding.map(|coding| Self::with_coding(record, source, coding, &counts, isa)).transpose()
    }

    fn with_coding(
        record: &Record,
        source: &(impl ReadAt + ?Sized),
        coding: Coding,
        counts: &[u64; 256],
        isa: Isa,
    ) -> Result<Self, DecodeError> {
        let tiling = *record.header().tiling();
        let bands = Bands::of(&tiling, coding);
        let palette = coding.choose_palette(counts);
        let encoder = Encoder { bands, codes: coding.codes(&palette) };
        let mut codes = vec![0; bands.total_bytes()];
        // Each task has bands to itself: those of a row of tiles, or a few tiles of a run.
        let (n_bands, n_tiles) = match tiling.order() {
            Order::Fragment => (TILE_ROWS / BLOCK, tiling.tiles_across()),
            Order::Linear => (MAX_STREAMS, MAX_STREAMS),
        };
        let task_bytes = n_bands * bands.code_bytes(bands.band_elems);
        let escapes: Vec<Vec<(usize, Escape)>> = (codes.par_chunks_mut(task_bytes).enumerate())
            .map(|(task, codes)| {
                let first = task * n_tiles;
                let tiles: Vec<usize> = (first..tiling.n_tiles().min(first + n_tiles)).collect();
                let mut escapes = Vec::new();
                record.for_each_strip_with(source, isa, &tiles, |_, strip, planes| {
                    encoder.add(strip, planes, task * n_bands, codes, &mut escapes);
                })?;
                escapes.sort_unstable_by_key(|&(chunk, Escape { position, .. })| (chunk, position));
                Ok(escapes)
            })
            .collect::<Result<_, DecodeError>>()?;
        Ok(Self::from_parts(tiling, bands, palette, codes, &escapes))
    }

    fn from_parts(
        tiling: Tiling,
        bands: Bands,
        palette: [u8; 16],
        codes: Vec<u8>,
        listed: &[Vec<(usize, Escape)>],
    ) -> Self {
        let mut counts = vec![0; bands.n_chunks()];
        let mut escapes = Vec::with_capacity(listed.iter().map(Vec::len).sum());
        for &(chunk, escape) in listed.iter().flatten() {
            counts[chunk] += 1;
            escapes.push(escape);
        }
        let mut band_escapes = vec![0];
        for counts in counts.chunks(bands.chunks_per_band()) {
            let n: usize = counts.iter().map(|&n| usize::from(n)).sum();
            band_escapes.push(band_escapes[band_escapes.len() - 1] + n);
        }
        Self { tiling, bands, palette, codes, escapes, counts, band_escapes }
    }

    /// Bytes of memory a record would take, as its frequencies tell; as many
    /// as dense if it has none or no variant is smaller.
    pub(crate) fn expected_bytes(record: &Record, weight: WeightType) -> usize {
        let dense = record.header().content_bytes() as usize;
        let Some(table) = record.header().table(0) else { return dense };
        let counts = table.freqs().map(u64::from);
        let Some(coding) = Coding::smallest(weight, &counts) else { return dense };
        let bands = Bands::of(record.header().tiling(), coding);
        let escapes = coding.escape_rate(&counts) * bands.n_elems as f64;
        let n_bands = bands.n_elems.div_ceil(bands.band_elems) + 1;
        bands.total_bytes()
            + escapes as usize * size_of::<Escape>()
            + bands.n_chunks() * size_of::<u16>()
            + n_bands * size_of::<usize>()
    }

    pub(crate) fn into_buffer(self) -> Vec<u8> {
        self.codes
    }

    /// Makes every exponent that of NaN and forgets where the escapes are.
    pub(crate) fn poison(&mut self) {
        self.palette.fill(0xFF);
        self.band_escapes.fill(0);
        self.counts.fill(0);
    }

    pub(crate) const fn tiling(&self) -> &Tiling {
        &self.tiling
    }

    pub(crate) fn resident_bytes(&self) -> usize {
        self.codes.len()
            + size_of_val(self.escapes.as_slice())
            + size_of_val(self.counts.as_slice())
            + size_of_val(self.band_escapes.as_slice())
            + self.palette.len()
    }

    /// Decodes chunk after chunk of some bands: where it lies and its planes.
    pub(crate) fn for_each_chunk(
        &self,
        isa: Isa,
        bands: Range<usize>,
        mut sink: impl FnMut(&Tile, [&[u8]; 2]),
    ) {
        for band in bands {
            let mut chunk = match self.tiling.order() {
                Order::Fragment => {
                    Tile { row_start: band * BLOCK, col_start: 0, rows: BLOCK, cols: 0 }
                }
                Order::Linear => {
                    Tile { row_start: 0, col_start: band * TILE_ELEMS, rows: 1, cols: 0 }
                }
            };
            self.band(band).for_each_chunk(isa, |planes| {
                chunk.cols = planes[0].len() / chunk.rows;
                sink(&chunk, planes);
                chunk.col_start += chunk.cols;
            });
        }
    }

    /// Rows `16 * index..` in fragment order, tile `index` in linear order.
    pub(crate) fn band(&self, index: usize) -> Band<'_> {
        let (bands, per_band) = (&self.bands, self.bands.chunks_per_band());
        let n_elems = bands.band_elems.min(bands.n_elems - index * bands.band_elems);
        let first_code = index * bands.code_bytes(bands.band_elems);
        let first_chunk = index * per_band;
        Band {
            coding: bands.coding,
            palette: &self.palette,
            n_elems,
            codes: &self.codes[first_code..][..bands.code_bytes(n_elems)],
            escapes: &self.escapes[self.band_escapes[index]..self.band_escapes[index + 1]],
            counts: &self.counts[first_chunk..][..n_elems.div_ceil(CHUNK_ELEMS)],
        }
    }
}

struct Encoder {
    bands: Bands,
    /// Code of each exponent.
    codes: [Option<u8>; 256],
}

impl Encoder {
    /// Encodes a strip. `codes` starts with band `first_band`; escapes are
    /// listed with the chunk of the matrix they are in.
    fn add(
        &self,
        strip: &Tile,
        planes: [&[u8]; 2],
        first_band: usize,
        codes: &mut [u8],
        escapes: &mut Vec<(usize, Escape)>,
    ) {
        let bands = &self.bands;
        let (band, start) = bands.start_of(strip);
        let chunk = band * bands.chunks_per_band() + start / CHUNK_ELEMS;
        let first_code =
            (band - first_band) * bands.code_bytes(bands.band_elems) + bands.code_bytes(start);
        let mut codes = &mut codes[first_code..];
        let mut low = planes[1];
        for (index, high) in planes[0].chunks(CHUNK_ELEMS).enumerate() {
            let (fields, rest) = codes.split_at_mut(bands.coding.field_bytes(high.len()));
            let (target, rest) = rest.split_at_mut(bands.coding.low_bytes(high.len()));
            let now;
            (now, low) = low.split_at(target.len());
            target.copy_from_slice(now);
            bands.coding.encode(&self.codes, high, fields, |position, high| {
                escapes.push((chunk + index, Escape { position: position as u16, high }));
            });
            codes = rest;
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
    const WINDOWS: [(Coding, i32); 4] = [
        (Coding::Window4, 16),
        (Coding::Window5, 32),
        (Coding::Window6, 64),
        (Coding::Window7, 128),
    ];

    /// The elements back from a matrix, row-major.
    fn to_bytes(fixed: &FixedMatrix, dtype: Dtype, isa: Isa) -> Vec<u8> {
        let (tiling, order) = (fixed.tiling(), fixed.tiling().order());
        let row_bytes = tiling.row_stride() * dtype.elem_bytes();
        let mut bytes = vec![0; tiling.n_elems() * dtype.elem_bytes()];
        let n_bands = fixed.band_escapes.len() - 1;
        fixed.for_each_chunk(isa, 0..n_bands, |chunk, planes| {
            let at = chunk.row_start * row_bytes + chunk.col_start * dtype.elem_bytes();
            join_tile_with(isa, dtype, order, chunk, planes, &mut bytes[at..], row_bytes);
        });
        bytes
    }

    fn n_escapes(fixed: &FixedMatrix) -> usize {
        fixed.escapes.len()
    }

    /// Encodes with `coding` forced and decodes on every instruction set;
    /// returns the number of escapes.
    fn round_trip(dtype: Dtype, coding: Coding, shape: [usize; 2], words: &[u16]) -> usize {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        round_trip_bytes(dtype, coding, shape, &bytes)
    }

    fn round_trip_bytes(dtype: Dtype, coding: Coding, shape: [usize; 2], bytes: &[u8]) -> usize {
        let isa = Isa::best();
        let packed = encode_record(isa, dtype, &shape, bytes).unwrap();
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
    fn integers_survive_every_window_wherever_it_lies() {
        for (coding, n_codes) in WINDOWS {
            let all: Vec<u8> = (0..=u16::MAX).map(|i| i.wrapping_mul(40_503) as u8).collect();
            let escapes = (65_536 - 256 * n_codes) as usize;
            assert_eq!(round_trip_bytes(Dtype::I8, coding, [256, 256], &all), escapes);
            assert_eq!(round_trip_bytes(Dtype::I8, coding, [1, 65_536], &all), escapes);
            round_trip_bytes(Dtype::I8, coding, [255, 255], &all[..255 * 255]);
            for middle in [-128, -100, 0, 40, 127] {
                // Nearly all in one window, a few anywhere.
                let first = (middle - n_codes / 2).clamp(-128, 128 - n_codes);
                let bytes: Vec<u8> = (0..144 * 528)
                    .map(|i: i32| match i % 97 {
                        0 => (i / 97) as u8,
                        _ => (first + i.wrapping_mul(48_271).rem_euclid(1009) % n_codes) as u8,
                    })
                    .collect();
                let escapes = round_trip_bytes(Dtype::I8, coding, [144, 528], &bytes);
                assert!(escapes <= bytes.len() / 97 + 1, "{coding:?} {middle}: {escapes}");
            }
            assert_eq!(round_trip_bytes(Dtype::I8, coding, [48, 32], &[0x80; 48 * 32]), 0);
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
