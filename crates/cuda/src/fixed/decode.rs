//! Fixed-rate weights back to row-major elements, on the GPU
//! (`kernels/fixed_decode.cu`).

use std::ops::Range;

use rayon::prelude::*;
use transom::Dtype;

use super::{CHUNK_COLS, CHUNK_ELEMS, CHUNK_ROWS, FixedMatrix, HEADER_PAD, WeightFormat};
use crate::buffer::DeviceBuffer;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::module::{Function, Launch};
use crate::stream::{Stream, check_length};

const WARPS: usize = 8;
const STAGES: usize = 2;

/// `transom::FixedDecodeParams`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Params {
    chunks: u64,
    overflow: u64,
    symbols: u64,
    scales: u64,
    ids: u64,
    out: u64,
    stride: u64,
    rows: u32,
    cols: u32,
    row_begin: u32,
    row_end: u32,
    col_begin: u32,
    col_end: u32,
    n_ids: u32,
    chunk_bytes: u32,
    scale_step: u32,
    vectors: u32,
}

// As in kernels/fixed_decode.cu.
const _: () = assert!(size_of::<Params>() == 96);
const _: () = assert!(std::mem::offset_of!(Params, rows) == 56);

impl FixedMatrix {
    /// Whether the kernels can read it: every escape lies where its chunk has
    /// room, or in the overflow. What [`FixedMatrix::encode`] makes always is.
    ///
    /// # Errors
    ///
    /// [`Error::Length`], or [`Error::BadChunk`] of the first bad chunk.
    pub fn check(&self) -> Result<()> {
        let (down, across) = (self.rows.div_ceil(CHUNK_ROWS), self.cols.div_ceil(CHUNK_COLS));
        let (chunk_bytes, least) = (self.chunk_bytes, self.format.chunk_bytes(0));
        check_length("bytes of a chunk", chunk_bytes, chunk_bytes.max(least) / 16 * 16)?;
        check_length("bytes of the chunks", self.chunks.len(), down * across * chunk_bytes)?;
        if self.format.is_dense() {
            return Ok(());
        }
        let header = self.format.header_offset();
        let places = (chunk_bytes - header - self.format.header_bytes() - HEADER_PAD) / 2;
        let counts = header + self.format.window_bytes();
        let complaint = |chunk: &[u8]| {
            let field = |at: usize| usize::from(u16::from_le_bytes([chunk[at], chunk[at + 1]]));
            let start = field(counts + 4) | field(counts + 6) << 16;
            if field(counts) > places {
                Some("more escapes than it has room for")
            } else if start + field(counts + 2) > self.overflow.len() {
                Some("escapes beyond the overflow")
            } else {
                None
            }
        };
        let found = self.chunks.par_chunks(chunk_bytes).enumerate();
        match found.find_map_first(|(chunk, bytes)| complaint(bytes).map(|what| (chunk, what))) {
            Some((chunk, what)) => Err(Error::BadChunk { chunk, what }),
            None => Ok(()),
        }
    }
}

/// A matrix in GPU memory in the order of chunks, of a fixed rate or dense.
#[derive(Debug)]
pub struct DeviceMatrix {
    format: WeightFormat,
    rows: usize,
    cols: usize,
    chunk_bytes: usize,
    chunks: DeviceBuffer<u8>,
    overflow: DeviceBuffer<u32>,
    symbols: DeviceBuffer<u8>,
}

impl DeviceMatrix {
    /// Uploads a matrix.
    ///
    /// # Errors
    ///
    /// As [`FixedMatrix::check`], sides of more than 2^31, and what the driver reports.
    pub fn new(stream: &Stream, matrix: &FixedMatrix) -> Result<Self> {
        matrix.check()?;
        for side in [matrix.rows, matrix.cols] {
            check_length("side of the matrix", side, side.min(1 << 31))?;
        }
        Ok(Self {
            format: matrix.format,
            rows: matrix.rows,
            cols: matrix.cols,
            chunk_bytes: matrix.chunk_bytes,
            chunks: stream.upload(&matrix.chunks)?,
            overflow: stream.upload(&matrix.overflow)?,
            symbols: stream.upload(&matrix.symbols)?,
        })
    }

    /// How it is stored.
    #[must_use]
    pub const fn format(&self) -> WeightFormat {
        self.format
    }

    /// Rows.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    #[must_use]
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of GPU memory.
    #[must_use]
    pub const fn resident_bytes(&self) -> usize {
        self.chunks.n_bytes() + self.overflow.n_bytes() + self.symbols.n_bytes()
    }
}

/// What of a matrix is decoded.
#[derive(Debug, Clone)]
pub enum Part<'a> {
    /// Everything.
    All,
    /// These rows and columns.
    Range(Range<usize>, Range<usize>),
    /// Row `ids[i]` to row i of the result. A row of the result whose number is
    /// not below the matrix's rows is left alone.
    Rows(&'a DeviceBuffer<u32>),
}

/// The kernels that decode.
#[derive(Debug)]
pub struct Decoder {
    n_sms: u32,
    /// For each format: elements as they are; INT8 dequantised to FP16.
    functions: Vec<(Function, Option<Function>)>,
}

impl Decoder {
    /// Blocks that an SM holds.
    pub(crate) const BLOCKS_PER_SM: u32 = 2;

    /// Looks up the kernels.
    ///
    /// # Errors
    ///
    /// [`Error::NoKernel`], or what the driver reports.
    pub fn new(device: &Device) -> Result<Self> {
        let function = |name: &str| {
            let function = device.function(&format!("fixed_decode_{name}"))?;
            function.allow_shared(device.info().shared_bytes)?;
            Ok(function)
        };
        let pair = |format: &WeightFormat| {
            let is_int8 = format.dtype() == Dtype::I8;
            let half = is_int8.then(|| function(&format!("{}_f16", format.name()))).transpose()?;
            Ok((function(format.name())?, half))
        };
        let functions = WeightFormat::ALL.iter().map(pair).collect::<Result<_>>()?;
        Ok(Self { n_sms: device.info().n_sms, functions })
    }

    /// Decodes BF16 or FP16 weights, row-major, without gaps.
    ///
    /// # Errors
    ///
    /// INT8 weights; a part that is not inside the matrix; an `out` of another
    /// length; what the driver reports.
    ///
    /// # Cost
    ///
    /// Reads the chunks that the part touches once, so 16 rows for each of
    /// [`Part::Rows`]. 16-byte stores if rows of the result are multiples of 16
    /// bytes and the first column too.
    pub fn decode(
        &self,
        stream: &Stream,
        matrix: &DeviceMatrix,
        part: &Part<'_>,
        out: &mut DeviceBuffer<u16>,
    ) -> Result<()> {
        check_length("bytes of an element", matrix.format.elem_bytes(), 2)?;
        let function = &self.functions[matrix.format as usize].0;
        self.launch(stream, function, matrix, part, None, 2, (out.address(), out.len()), None)
    }

    /// Decodes INT8 weights as they are.
    ///
    /// # Errors
    ///
    /// As [`Decoder::decode`], for other weights.
    pub fn decode_int8(
        &self,
        stream: &Stream,
        matrix: &DeviceMatrix,
        part: &Part<'_>,
        out: &mut DeviceBuffer<u8>,
    ) -> Result<()> {
        check_length("bytes of an element", matrix.format.elem_bytes(), 1)?;
        let function = &self.functions[matrix.format as usize].0;
        self.launch(stream, function, matrix, part, None, 1, (out.address(), out.len()), None)
    }

    /// Decodes INT8 weights to FP16 of `f32(q) * f32(scale)`; `scales` are one or
    /// one a row of the matrix.
    ///
    /// # Errors
    ///
    /// As [`Decoder::decode_int8`].
    pub fn dequantise(
        &self,
        stream: &Stream,
        matrix: &DeviceMatrix,
        scales: &DeviceBuffer<f32>,
        part: &Part<'_>,
        out: &mut DeviceBuffer<u16>,
    ) -> Result<()> {
        let function = self.functions[matrix.format as usize].1.as_ref();
        check_length("bytes of an element", matrix.format.elem_bytes(), 1)?;
        let function = function.expect("INT8 has both kernels");
        let out = (out.address(), out.len());
        self.launch(stream, function, matrix, part, Some(scales), 2, out, None)
    }

    /// Some rows, to what a product in a library takes: BF16 or FP16, dequantised
    /// if there are scales. At most `n_blocks` blocks.
    pub(crate) fn decode_rows(
        &self,
        stream: &Stream,
        (matrix, scales): (&DeviceMatrix, Option<&DeviceBuffer<f32>>),
        rows: Range<usize>,
        out: &DeviceBuffer<u16>,
        n_blocks: u32,
    ) -> Result<()> {
        let (plain, dequantising) = &self.functions[matrix.format as usize];
        check_length("kinds of scales", scales.iter().len(), dequantising.iter().len())?;
        let function = dequantising.as_ref().unwrap_or(plain);
        let n_elems = rows.len() * matrix.cols;
        check_length("elements", out.len().min(n_elems), n_elems)?;
        let (part, out) = (Part::Range(rows, 0..matrix.cols), (out.address(), n_elems));
        self.launch(stream, function, matrix, &part, scales, 2, out, Some(n_blocks))
    }

    #[allow(clippy::too_many_arguments)]
    fn launch(
        &self,
        stream: &Stream,
        function: &Function,
        matrix: &DeviceMatrix,
        part: &Part<'_>,
        scales: Option<&DeviceBuffer<f32>>,
        elem_bytes: usize,
        (out, out_len): (u64, usize),
        n_blocks: Option<u32>,
    ) -> Result<()> {
        let (rows, cols, ids) = match part {
            Part::All => (0..matrix.rows, 0..matrix.cols, None),
            Part::Range(rows, cols) => (rows.clone(), cols.clone(), None),
            Part::Rows(ids) => (0..matrix.rows, 0..matrix.cols, Some(*ids)),
        };
        for (range, end) in [(&rows, matrix.rows), (&cols, matrix.cols)] {
            check_length("end of the range", range.end, range.end.min(end))?;
            check_length("start of the range", range.start, range.start.min(range.end))?;
        }
        let n_rows = ids.map_or(rows.len(), DeviceBuffer::len);
        check_length("elements of the result", out_len, n_rows * cols.len())?;
        let n_scales = scales.map_or(1, DeviceBuffer::len);
        if n_scales != 1 {
            check_length("scales", n_scales, matrix.rows)?;
        }
        if out_len == 0 {
            return Ok(());
        }
        let n_strips = match ids {
            Some(ids) => ids.len(),
            None => rows.end.div_ceil(CHUNK_ROWS) - rows.start / CHUNK_ROWS,
        };
        let n_tasks = n_strips * (cols.end.div_ceil(CHUNK_COLS) - cols.start / CHUNK_COLS);
        check_length("chunks", n_tasks, n_tasks.min(1 << 30))?;
        let params = Params {
            chunks: matrix.chunks.address(),
            overflow: matrix.overflow.address(),
            symbols: matrix.symbols.address(),
            scales: scales.map_or(0, DeviceBuffer::address),
            ids: ids.map_or(0, DeviceBuffer::address),
            out,
            stride: cols.len() as u64,
            rows: matrix.rows as u32,
            cols: matrix.cols as u32,
            row_begin: rows.start as u32,
            row_end: rows.end as u32,
            col_begin: cols.start as u32,
            col_end: cols.end as u32,
            n_ids: ids.map_or(0, DeviceBuffer::len) as u32,
            chunk_bytes: matrix.chunk_bytes as u32,
            scale_step: u32::from(n_scales != 1),
            vectors: u32::from(
                [cols.len(), cols.start].iter().all(|n| (n * elem_bytes).is_multiple_of(16)),
            ),
        };
        let most = n_blocks.unwrap_or(Self::BLOCKS_PER_SM * self.n_sms).max(1);
        let shared = WARPS * (STAGES * matrix.chunk_bytes + CHUNK_ELEMS * elem_bytes);
        let launch = Launch::new((n_tasks.div_ceil(WARPS) as u32).min(most), 32 * WARPS as u32)
            .shared(shared as u32);
        // SAFETY: the matrix was checked when it was uploaded, ranges and lengths above;
        // freeing buffers waits for the kernel.
        unsafe { function.launch(stream, launch, &params) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_that_point_beyond_their_ends_are_refused() {
        // Every second element of a row escapes: more than the 8 places of a chunk.
        let bytes: Vec<u8> =
            (0..32 * 256).flat_map(|i| (0x3F80_u16 ^ (i % 2) << 14).to_le_bytes()).collect();
        let matrix = FixedMatrix::encode(WeightFormat::Bf16x3, 8, 32, 256, &bytes, &[]);
        assert!(!matrix.overflow.is_empty());
        matrix.check().unwrap();

        let header = matrix.chunk_bytes + WeightFormat::Bf16x3.header_offset();
        let damaged = |at: usize, byte: u8| {
            let mut matrix = matrix.clone();
            matrix.chunks[header + at] = byte;
            matrix.check().unwrap_err()
        };
        // Of the chunks 1 to 3, the second has been damaged.
        assert!(
            matches!(damaged(17, 1), Error::BadChunk { chunk: 1, what } if what.contains("room"))
        );
        for at in [19, 21, 22, 23] {
            assert!(
                matches!(damaged(at, 0xFF), Error::BadChunk { chunk: 1, what } if what.contains("overflow"))
            );
        }
        let mut short = matrix.clone();
        short.chunks.pop();
        assert!(matches!(short.check(), Err(Error::Length { .. })));
        let mut odd = matrix.clone();
        odd.chunk_bytes -= 8;
        assert!(matches!(odd.check(), Err(Error::Length { .. })));
        let mut fewer = matrix;
        fewer.overflow.pop();
        assert!(matches!(fewer.check(), Err(Error::BadChunk { chunk: 3, .. })));
    }
}
