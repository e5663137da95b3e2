//! Fixed-rate weights: the layout of `kernels/fixed.cuh`, made on the host.
//!
//! A matrix is cut into chunks of 16 rows x 128 columns, and of each element a
//! few bits say where its exponent lies in a window that the row of the chunk
//! chooses; the other bits are stored as they are. Of an INT8 element they are
//! the sign and a few bits of magnitude. Elements without such a code are listed
//! in the chunk, and those for which the chunk has no place in the overflow of
//! the segment. `docs/kernels.md` draws the layout.

use rayon::prelude::*;
use transom::{DecodeError, Dtype, Isa, ReadAt, Record};

mod decode;
mod int8;
mod scale;
#[cfg(test)]
mod tests;

pub use decode::{Decoder, DeviceMatrix, Part};
use scale::RowCode;
pub use scale::RowScale;

/// Rows of a chunk.
pub const CHUNK_ROWS: usize = 16;
/// Columns of a chunk.
pub const CHUNK_COLS: usize = 128;
/// Elements of a chunk.
pub const CHUNK_ELEMS: usize = CHUNK_ROWS * CHUNK_COLS;
/// After the last escape's place.
const HEADER_PAD: usize = 8;

/// How the weights of a product lie in GPU memory (`kernels/params.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum WeightFormat {
    /// BF16 as it is, in the order of chunks: the twin of the fixed formats.
    DenseBf16 = 0,
    /// FP16 as it is.
    DenseF16 = 1,
    /// INT8 as it is.
    DenseInt8 = 2,
    /// BF16: 3-bit codes of the exponent, 8 raw bits.
    Bf16x3 = 3,
    /// BF16: 4-bit codes, for wide matrices.
    Bf16x4 = 4,
    /// FP16: 3-bit codes of the exponent, 11 raw bits.
    F16x3 = 5,
    /// INT8: 4-bit codes.
    Int8x4 = 6,
    /// INT8: 5-bit codes.
    Int8x5 = 7,
    /// INT8: 6-bit codes.
    Int8x6 = 8,
    /// INT8: 7-bit codes.
    Int8x7 = 9,
}

impl WeightFormat {
    /// Every format.
    pub const ALL: [Self; 10] = [
        Self::DenseBf16,
        Self::DenseF16,
        Self::DenseInt8,
        Self::Bf16x3,
        Self::Bf16x4,
        Self::F16x3,
        Self::Int8x4,
        Self::Int8x5,
        Self::Int8x6,
        Self::Int8x7,
    ];

    /// Type of the elements.
    #[must_use]
    pub const fn dtype(self) -> Dtype {
        match self {
            Self::DenseBf16 | Self::Bf16x3 | Self::Bf16x4 => Dtype::Bf16,
            Self::DenseF16 | Self::F16x3 => Dtype::F16,
            _ => Dtype::I8,
        }
    }

    /// Whether elements are stored as they are.
    #[must_use]
    pub const fn is_dense(self) -> bool {
        (self as i32) < 3
    }

    /// The dense format of the same elements.
    #[must_use]
    pub const fn twin(self) -> Self {
        match self.dtype() {
            Dtype::Bf16 => Self::DenseBf16,
            Dtype::F16 => Self::DenseF16,
            _ => Self::DenseInt8,
        }
    }

    /// In the names of the kernels.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::DenseBf16 => "dense_bf16",
            Self::DenseF16 => "dense_f16",
            Self::DenseInt8 => "dense_int8",
            Self::Bf16x3 => "bf16x3",
            Self::Bf16x4 => "bf16x4",
            Self::F16x3 => "f16x3",
            Self::Int8x4 => "int8x4",
            Self::Int8x5 => "int8x5",
            Self::Int8x6 => "int8x6",
            Self::Int8x7 => "int8x7",
        }
    }

    const fn elem_bytes(self) -> usize {
        if matches!(self.dtype(), Dtype::I8) { 1 } else { 2 }
    }

    /// Bits of a code.
    const fn code_bits(self) -> usize {
        match self {
            Self::Bf16x3 | Self::F16x3 => 3,
            Self::Bf16x4 | Self::Int8x4 => 4,
            Self::Int8x5 => 5,
            Self::Int8x6 => 6,
            _ => 7,
        }
    }

    /// Distance of neighbouring codes in the byte that they stand for.
    const fn unit(self) -> usize {
        if matches!(self, Self::F16x3) { 4 } else { 1 }
    }

    /// Where the header of a chunk begins.
    pub(crate) const fn header_offset(self) -> usize {
        match self {
            Self::DenseBf16 | Self::DenseF16 => 4096,
            Self::DenseInt8 => 2048,
            Self::Bf16x3 => 2048 + 768,
            Self::Bf16x4 => 2048 + 1024,
            Self::F16x3 => 2048 + 2 * 768,
            _ => 256 * self.code_bits(),
        }
    }

    /// A byte for each row, where its window begins; INT8 has none.
    pub(crate) const fn window_bytes(self) -> usize {
        if matches!(self.dtype(), Dtype::I8) { 0 } else { CHUNK_ROWS }
    }

    /// Windows, and how many escapes there are and where.
    pub(crate) const fn header_bytes(self) -> usize {
        self.window_bytes() + 8
    }

    /// Bytes of a warp's plane of patches, and of each tile's scales for it (`kernels/fixed.cuh`).
    pub(crate) const fn patch_bytes(self) -> (usize, usize) {
        match self.dtype() {
            _ if self.is_dense() => (0, 0),
            Dtype::I8 => (2 * CHUNK_ELEMS, 4 * CHUNK_ROWS),
            _ => (CHUNK_ELEMS, 0),
        }
    }

    /// Bytes of a chunk with room for at least `places` escapes.
    #[must_use]
    pub const fn chunk_bytes(self, places: usize) -> usize {
        if self.is_dense() {
            return self.header_offset();
        }
        (self.header_offset() + self.header_bytes() + 2 * places + HEADER_PAD).next_multiple_of(16)
    }

    /// The byte of an element that is coded: the exponent, for FP16 at its place
    /// in the high byte, for INT8 the value plus 128.
    const fn key(self, element: u16) -> u8 {
        match self.dtype() {
            Dtype::Bf16 => (element >> 7) as u8,
            Dtype::F16 => (element >> 8) as u8 & 0x7C,
            _ => element as u8 ^ 0x80,
        }
    }

    /// The largest value of [`WeightFormat::key`].
    const fn last_key(self) -> usize {
        if matches!(self, Self::F16x3) { 0x7C } else { 255 }
    }
}

/// Weights of one segment, as they will lie in GPU memory.
#[derive(Debug, Clone, PartialEq)]
pub struct FixedMatrix {
    /// The code.
    pub format: WeightFormat,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Bytes of a chunk.
    pub chunk_bytes: usize,
    /// Chunks, from left to right, then down.
    pub chunks: Vec<u8>,
    /// Escapes for which the chunks have no place: lane, position, and key.
    pub overflow: Vec<u32>,
    /// What the escapes in the chunks index.
    pub symbols: [u8; 32],
    /// Elements outside their windows.
    pub n_escapes: usize,
    /// Extreme values of INT8 weights, otherwise 0.
    pub int8_range: (i8, i8),
    /// Of INT8 weights: one, or one a row.
    pub scales: Vec<RowScale>,
}

/// Register element of a lane: row and column within 16 x 16.
const fn fragment(lane: usize, i: usize) -> (usize, usize) {
    (lane / 4 + 8 * (i >> 1 & 1), 2 * (lane % 4) + (i & 1) + 8 * (i >> 2))
}

/// Register element at place `at` of a lane's 64: four of the upper row, then
/// four of the lower, step by step.
const fn register(at: usize) -> usize {
    (at & 1) | (at >> 2 & 1) << 1 | (at >> 1 & 1) << 2
}

/// Elements of a chunk by lane and place; `None` outside the matrix.
type Elements = [[Option<u16>; 64]; 32];

/// What one row of chunks becomes.
struct Strip {
    windows: Vec<[u8; CHUNK_ROWS]>,
    rare: [u64; 256],
}

impl FixedMatrix {
    /// Encodes a row-major matrix of `format`'s elements (little endian), with
    /// room for `places` escapes in a chunk of 2,048; the others go to the
    /// overflow, which costs a dependent load. Padding decodes to finite values,
    /// which activations of zero multiply. `scales` are one or one a row for INT8,
    /// of other types none; a value that the kernels could not multiply with its
    /// scale exactly escapes, so other scales take other codes. Cost: some 20
    /// operations an element, parallel.
    ///
    /// # Panics
    ///
    /// If `bytes` has not rows x cols elements, or for another number of scales.
    #[must_use]
    pub fn encode(
        format: WeightFormat,
        places: usize,
        rows: usize,
        cols: usize,
        bytes: &[u8],
        scales: &[f32],
    ) -> Self {
        assert_eq!(bytes.len(), rows * cols * format.elem_bytes(), "bytes of the matrix");
        let is_int8 = format.dtype() == Dtype::I8;
        let n_scales = scales.len();
        assert!(if is_int8 { n_scales == 1 || n_scales == rows } else { n_scales == 0 }, "scales");
        let (down, across) = (rows.div_ceil(CHUNK_ROWS), cols.div_ceil(CHUNK_COLS));
        let chunk_bytes = format.chunk_bytes(places);
        let mut matrix = Self {
            format,
            rows,
            cols,
            chunk_bytes,
            chunks: vec![0; down * across * chunk_bytes],
            overflow: Vec::new(),
            symbols: [0; 32],
            n_escapes: 0,
            int8_range: (0, 0),
            scales: Vec::new(),
        };
        if is_int8 {
            let value = |&byte: &u8| byte as i8;
            matrix.int8_range = (
                bytes.par_iter().map(value).min().unwrap_or(0),
                bytes.par_iter().map(value).max().unwrap_or(0),
            );
        }
        let gather = |tile: usize, c: usize| -> Elements {
            std::array::from_fn(|lane| {
                std::array::from_fn(|at| {
                    let (row, col) = fragment(lane, register(at));
                    let row = tile * CHUNK_ROWS + row;
                    let col = c * CHUNK_COLS + at / 8 * 16 + col;
                    let index = row * cols + col;
                    (row < rows && col < cols).then(|| match format.elem_bytes() {
                        1 => u16::from(bytes[index]),
                        _ => u16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]),
                    })
                })
            })
        };
        let strip_bytes = (across * chunk_bytes).max(1);
        if format.is_dense() {
            matrix.scales = scales.iter().map(|&scale| RowScale::new(scale)).collect();
            matrix.chunks.par_chunks_mut(strip_bytes).enumerate().for_each(|(tile, strip)| {
                for (c, chunk) in strip.chunks_mut(chunk_bytes).enumerate() {
                    store_dense(format, &gather(tile, c), chunk);
                }
            });
            return matrix;
        }
        let bits = format.code_bits();
        // None, but for INT8.
        let codes: Vec<RowCode> =
            scales.par_iter().map(|&scale| RowCode::new(scale, bits)).collect();
        matrix.scales = codes.iter().map(|code| code.scale).collect();
        // Of an element in a row of a tile, `None` if it escapes.
        let code = |tile: usize, windows: &[u8; CHUNK_ROWS], row: usize, element: u16| {
            if is_int8 {
                let code = &codes[if n_scales == 1 { 0 } else { tile * CHUNK_ROWS + row }];
                return code.code(element as i8, bits);
            }
            let code = usize::from(format.key(element).checked_sub(windows[row])?) / format.unit();
            (code < 1 << bits).then_some(code as u8)
        };
        let strips: Vec<Strip> = (0..down)
            .into_par_iter()
            .map(|tile| {
                let mut strip = Strip { windows: Vec::with_capacity(across), rare: [0; 256] };
                for c in 0..across {
                    let elements = gather(tile, c);
                    let windows =
                        if is_int8 { [0; CHUNK_ROWS] } else { choose_windows(format, &elements) };
                    for (row, element) in inside(&elements) {
                        if code(tile, &windows, row, element).is_none() {
                            strip.rare[usize::from(format.key(element))] += 1;
                        }
                    }
                    strip.windows.push(windows);
                }
                strip
            })
            .collect();
        let mut rare = [0; 256];
        for strip in &strips {
            rare.iter_mut().zip(strip.rare).for_each(|(sum, n)| *sum += n);
        }
        let mut order: Vec<u8> = (0..=255).collect();
        order.sort_by_key(|&key| std::cmp::Reverse(rare[usize::from(key)]));
        matrix.symbols.copy_from_slice(&order[..32]);
        let mut index = [None; 256];
        for (i, &symbol) in matrix.symbols.iter().enumerate() {
            index[usize::from(symbol)] = Some(i as u16);
        }
        let overflow: Vec<(Vec<u32>, usize)> = matrix
            .chunks
            .par_chunks_mut(strip_bytes)
            .zip(&strips)
            .enumerate()
            .map(|(tile, (strip, Strip { windows, .. }))| {
                let (mut overflow, mut n_escapes) = (Vec::new(), 0);
                for (c, chunk) in strip.chunks_mut(chunk_bytes).enumerate() {
                    let code = |row: usize, element: u16| code(tile, &windows[c], row, element);
                    let elements = gather(tile, c);
                    chunk[format.header_offset()..][..format.window_bytes()]
                        .copy_from_slice(&windows[c][..format.window_bytes()]);
                    n_escapes +=
                        store(format, places, code, &index, &elements, chunk, &mut overflow);
                }
                (overflow, n_escapes)
            })
            .collect();
        // Starts become absolute.
        let at = format.header_offset() + format.window_bytes() + 4;
        for (strip, (more, n_escapes)) in matrix.chunks.chunks_mut(strip_bytes).zip(overflow) {
            for chunk in strip.chunks_mut(chunk_bytes) {
                let field: &mut [u8; 4] = (&mut chunk[at..at + 4]).try_into().expect("4 bytes");
                let start = u32::from_le_bytes(*field) + matrix.overflow.len() as u32;
                *field = start.to_le_bytes();
            }
            matrix.overflow.extend(more);
            matrix.n_escapes += n_escapes;
        }
        matrix
    }

    /// The smallest format and number of places for a matrix; dense if nothing
    /// is smaller. `sample_rows` rows from all over decide.
    ///
    /// # Panics
    ///
    /// As [`FixedMatrix::encode`], and if the type has no format.
    #[must_use]
    pub fn choose(
        dtype: Dtype,
        rows: usize,
        cols: usize,
        bytes: &[u8],
        scales: &[f32],
    ) -> (WeightFormat, usize) {
        let candidates: Vec<WeightFormat> = (WeightFormat::ALL.into_iter())
            .filter(|format| format.dtype() == dtype && !format.is_dense())
            .collect();
        assert!(!candidates.is_empty(), "{dtype:?} has no product");
        // Sixteen strips are enough to know the rate of escapes.
        let row_bytes = bytes.len() / rows.max(1);
        let step = (rows / CHUNK_ROWS / 16).max(1) * CHUNK_ROWS;
        let sample_rows: Vec<usize> = (0..rows)
            .step_by(step)
            .take(16)
            .flat_map(|row| row..(row + CHUNK_ROWS).min(rows))
            .collect();
        let sample: Vec<u8> = (sample_rows.iter())
            .flat_map(|row| &bytes[row * row_bytes..][..row_bytes])
            .copied()
            .collect();
        let scales: Vec<f32> = match scales.len() {
            0 | 1 => scales.to_vec(),
            _ => sample_rows.iter().map(|&row| scales[row]).collect(),
        };
        let mut best = (candidates[0].twin(), 0);
        let mut least = best.0.chunk_bytes(0) as f64;
        for format in candidates {
            let encoded = Self::encode(format, 0, sample_rows.len(), cols, &sample, &scales);
            let n_chunks = (encoded.chunks.len() / encoded.chunk_bytes).max(1);
            let mean = encoded.n_escapes as f64 / n_chunks as f64;
            // Room for most chunks: two standard deviations above the mean, and whole 16 bytes.
            let places = (mean + 2.0 * mean.sqrt()) as usize / 8 * 8 + 8;
            let size = format.chunk_bytes(places) as f64;
            if size < least {
                (best, least) = ((format, places), size);
            }
        }
        best
    }

    /// A record's weights in the smallest format, with the scales of INT8 ones.
    ///
    /// # Errors
    ///
    /// What decoding the record reports.
    ///
    /// # Panics
    ///
    /// As [`FixedMatrix::choose`].
    pub fn from_record(
        record: &Record,
        source: &(impl ReadAt + ?Sized),
        scales: &[f32],
        isa: Isa,
    ) -> Result<Self, DecodeError> {
        let bytes = record.to_vec(source, isa)?;
        let (rows, cols) = record.matrix_sides();
        let dtype = record.header().dtype();
        let (format, places) = Self::choose(dtype, rows, cols, &bytes, scales);
        Ok(Self::encode(format, places, rows, cols, &bytes, scales))
    }

    /// Bits of GPU memory for each weight.
    #[must_use]
    pub fn bits_per_weight(&self) -> f64 {
        let n_bytes = self.chunks.len() + 4 * self.overflow.len() + self.symbols.len();
        n_bytes as f64 * 8.0 / (self.rows * self.cols).max(1) as f64
    }
}

fn store_dense(format: WeightFormat, elements: &Elements, chunk: &mut [u8]) {
    for (lane, places) in elements.iter().enumerate() {
        for (at, element) in places.iter().enumerate() {
            let element = element.unwrap_or(0);
            if format.elem_bytes() == 1 {
                chunk[byte_place(lane, at)] = element as u8;
            } else {
                let place = (at / 8 * 32 + lane) * 16 + 2 * register(at);
                chunk[place..place + 2].copy_from_slice(&element.to_le_bytes());
            }
        }
    }
}

/// Place of an element in the plane of patches.
const fn escape_place(format: WeightFormat, lane: usize, at: usize) -> usize {
    match format.dtype() {
        Dtype::I8 => int8::element_place(lane, at / 8, register(at)),
        _ => byte_place(lane, at),
    }
}

/// Byte of an element where a chunk has one for each: raw bits, INT8.
const fn byte_place(lane: usize, at: usize) -> usize {
    (at / 16 * 32 + lane) * 16 + at % 16
}

/// Rows of a chunk's elements that are in the matrix, and the elements.
fn inside(elements: &Elements) -> impl Iterator<Item = (usize, u16)> {
    elements.iter().enumerate().flat_map(|(lane, places)| {
        let row = move |at: usize| fragment(lane, register(at)).0;
        places.iter().enumerate().filter_map(move |(at, element)| Some((row(at), (*element)?)))
    })
}

/// The window of each row with the most elements in it.
fn choose_windows(format: WeightFormat, elements: &Elements) -> [u8; CHUNK_ROWS] {
    let mut histogram = [[0u32; 256]; CHUNK_ROWS];
    for (row, element) in inside(elements) {
        histogram[row][usize::from(format.key(element))] += 1;
    }
    let (unit, n_codes) = (format.unit(), 1 << format.code_bits());
    let span = (n_codes - 1) * unit;
    histogram.map(|counts| {
        let inside = |base: usize| -> u32 { counts[base..=base + span].iter().step_by(unit).sum() };
        let mut now = inside(0);
        let (mut best, mut most) = (0, now);
        for base in (unit..=format.last_key() - span).step_by(unit) {
            now = now + counts[base + span] - counts[base - unit];
            if now > most {
                (best, most) = (base, now);
            }
        }
        best as u8
    })
}

/// Writes a chunk of zeros but for the windows; returns the number of escapes.
/// `code` is that of an element in a row.
fn store(
    format: WeightFormat,
    places: usize,
    code: impl Fn(usize, u16) -> Option<u8>,
    index: &[Option<u16>; 256],
    elements: &Elements,
    chunk: &mut [u8],
    overflow: &mut Vec<u32>,
) -> usize {
    let header = format.header_offset();
    let (start, mut n_inline) = (overflow.len(), 0);
    for (lane, row_of) in elements.iter().enumerate() {
        for (at, element) in row_of.iter().enumerate() {
            let x = element.unwrap_or(0);
            let (key, place) = (format.key(x), escape_place(format, lane, at));
            // Padding: code 0 is finite, whatever the window.
            let found = match element {
                Some(x) => code(fragment(lane, register(at)).0, *x),
                None => Some(0),
            };
            if found.is_none() {
                match index[usize::from(key)] {
                    Some(symbol) if n_inline < places => {
                        let to = header + format.header_bytes() + 2 * n_inline;
                        let escape = place as u16 | symbol << 11;
                        chunk[to..to + 2].copy_from_slice(&escape.to_le_bytes());
                        n_inline += 1;
                    }
                    _ => overflow.push(place as u32 | u32::from(key) << 16),
                }
            }
            let code = found.unwrap_or(0);
            match format {
                WeightFormat::Bf16x3 | WeightFormat::Bf16x4 => {
                    let partner = row_of[at ^ 1].unwrap_or(0);
                    chunk[byte_place(lane, at)] = ((x & 127) << 1 | partner >> 15) as u8;
                    if format == WeightFormat::Bf16x3 {
                        put3(&mut chunk[2048..], lane, at, code);
                    } else {
                        put4(&mut chunk[2048..], lane, at, code);
                    }
                }
                WeightFormat::F16x3 => {
                    chunk[byte_place(lane, at)] = x as u8;
                    put3(&mut chunk[2048..], lane, at, code);
                    put3(&mut chunk[2048 + 768..], lane, at, ((x >> 15) << 2 | x >> 8 & 3) as u8);
                }
                _ => int8::put_code(chunk, format.code_bits(), place, code),
            }
        }
    }
    let n_over = overflow.len() - start;
    let counts = header + format.window_bytes();
    chunk[counts..counts + 2].copy_from_slice(&(n_inline as u16).to_le_bytes());
    chunk[counts + 2..counts + 4].copy_from_slice(&(n_over as u16).to_le_bytes());
    chunk[counts + 4..counts + 8].copy_from_slice(&(start as u32).to_le_bytes());
    n_inline + n_over
}

/// Three bits: steps 0 to 2 of a half have a word each, and step 3 the top bits
/// of their nibbles. Words 0 and 1 of the first half are pairs, word 2 stands
/// alone; in the second half word 0 stands alone.
fn put3(plane: &mut [u8], lane: usize, at: usize, value: u8) {
    let (half, step) = (at / 32, at / 8 % 4);
    for bit in 0..3 {
        let word = if step < 3 { step } else { bit };
        let shift = 4 * (at % 8) + if step < 3 { bit } else { 3 };
        let place = match (half, word) {
            (0, 2) => 64 + lane,
            (0, _) => 2 * lane + word,
            (_, 0) => 96 + lane,
            _ => 128 + 2 * lane + word - 1,
        };
        plane[4 * place + shift / 8] |= (value >> bit & 1) << (shift % 8);
    }
}

/// Four bits: word s of a lane's half is step s, the low nibbles its upper row.
fn put4(plane: &mut [u8], lane: usize, at: usize, value: u8) {
    let (half, word) = (at / 32, at % 32 / 4);
    plane[(half * 32 + lane) * 16 + word / 2 * 4 + at % 4] |= value << (word % 2 * 4);
}
