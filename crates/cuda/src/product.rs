//! Fused products: `y[tokens, rows] = x[tokens, cols] * W[rows, cols]^T + bias`
//! with weights that are decoded inside the product (`kernels/product.cuh`).
//!
//! FP32 accumulation in an order that is a function of (rows, cols) only
//! (`kernels/reduction.cuh`): every format, number of tokens and launch gives
//! the same bits, and a token's result does not depend on the others.

use half::f16;

use crate::buffer::DeviceBuffer;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::fixed::{CHUNK_COLS, CHUNK_ROWS, FixedMatrix, WeightFormat};
use crate::module::{Function, Launch};
use crate::stream::Stream;

/// Tokens that one product takes at most.
pub const MAX_TOKENS: usize = 64;
/// From this many tokens on activations lie in core matrices.
const CORE_TOKENS: usize = 33;
const MAX_SEGMENTS: usize = 3;
const MAX_SLICES: usize = 16;
const WARPS: usize = 8;

/// `transom::Segment` of `kernels/params.h`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct SegmentParams {
    chunks: u64,
    overflow: u64,
    symbols: u64,
    scales: u64,
    end_tile: u32,
    scale_step: u32,
}

/// `transom::ProductParams`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct ProductParams {
    segments: [SegmentParams; MAX_SEGMENTS],
    x: u64,
    y: u64,
    bias: u64,
    workspace: u64,
    rows: u32,
    cols: u32,
    tokens: u32,
    n_segments: u32,
    chunk_bytes: u32,
    unused: u32,
}

/// `transom::FragmentParams`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct FragmentParams {
    x: u64,
    out: u64,
    cols: u32,
    tokens: u32,
    cores: u32,
    unused: u32,
}

// As in kernels/params.h.
const _: () = assert!(size_of::<SegmentParams>() == 40);
const _: () = assert!(std::mem::offset_of!(SegmentParams, end_tile) == 32);
const _: () = assert!(size_of::<ProductParams>() == 176);
const _: () = assert!(std::mem::offset_of!(ProductParams, x) == 120);
const _: () = assert!(std::mem::offset_of!(ProductParams, rows) == 152);
const _: () = assert!(size_of::<FragmentParams>() == 32);

/// One kernel and its shape (`kernels/product_kernels.cuh`).
#[derive(Debug, Clone)]
struct Variant {
    function: Function,
    /// Groups of 8 tokens.
    groups: usize,
    /// Strips of 16 rows a block.
    together: usize,
    /// Parts of K a block.
    apart: usize,
    /// Stages of the ring of activations.
    x_stages: usize,
    shared_bytes: u32,
}

impl Variant {
    fn new(
        device: &Device,
        format: WeightFormat,
        suffix: &str,
        [groups, together, apart, x_stages]: [usize; 4],
        chunk_bytes: usize,
        n_slices: usize,
    ) -> Result<Self> {
        let function = device.function(&format!("product_{}_{suffix}", format.name()))?;
        // As product_shared_bytes of kernels/product.cuh; two stages of weights.
        let ring = (2 * chunk_bytes).next_multiple_of(128) * WARPS;
        let plane = if format.is_dense() { 0 } else { 2048 * WARPS };
        let x = apart * x_stages * groups * 2048;
        let buffers = if groups <= 2 { 2 } else { 1 };
        let sums = if x_stages == 0 {
            buffers * together * sum_slots(n_slices, apart) * 512 * groups
        } else {
            0
        };
        let bytes = ring + plane + x + sums + 128 + WARPS * 2 * 8 + apart * x_stages * 16;
        function.allow_shared(bytes as u32)?;
        Ok(Self { function, groups, together, apart, x_stages, shared_bytes: bytes as u32 })
    }

    fn n_blocks(&self, n_tiles: usize, n_sms: usize) -> usize {
        n_tiles.div_ceil(self.together).min(2 * n_sms)
    }

    /// Share of the blocks' time that has work.
    fn fill(&self, n_tiles: usize, n_sms: usize) -> f64 {
        let groups = n_tiles.div_ceil(self.together);
        let rounds = groups.div_ceil(2 * n_sms).max(1);
        groups as f64 / (rounds * 2 * n_sms) as f64
    }

    /// Sums of slices that are not in shared memory.
    fn workspace_floats(&self, n_tiles: usize, n_sms: usize, n_slices: usize) -> usize {
        if self.x_stages == 0 {
            return 0;
        }
        let slots = sum_slots(n_slices, self.apart);
        self.n_blocks(n_tiles, n_sms) * 2 * self.together * slots * self.groups * 128
    }
}

fn sum_slots(n_slices: usize, apart: usize) -> usize {
    let own = n_slices / apart;
    n_slices - own + usize::from(own > 0)
}

/// Weights of one to three row segments in GPU memory, with the kernels for them.
#[derive(Debug)]
pub struct Product {
    format: WeightFormat,
    rows: usize,
    cols: usize,
    chunk_bytes: usize,
    n_sms: usize,
    segments: Vec<Segment>,
    bias: Option<DeviceBuffer<u16>>,
    /// For 8 tokens, 8 with two strips a block, 16, 32 and 64.
    variants: [Variant; 5],
    fragments: Function,
}

#[derive(Debug)]
struct Segment {
    chunks: DeviceBuffer<u8>,
    overflow: DeviceBuffer<u32>,
    symbols: DeviceBuffer<u8>,
    scales: Option<DeviceBuffer<f32>>,
    end_tile: usize,
    scale_step: u32,
}

/// Where a product's activations lie while it runs, and its workspace. One
/// stream uses it at a time.
#[derive(Debug)]
pub struct Scratch {
    x: DeviceBuffer<u32>,
    workspace: DeviceBuffer<f32>,
}

impl Product {
    /// Uploads the segments: matrices of one format, chunk size and number of
    /// columns, all but the last of a multiple of 16 rows. `scales` are one or
    /// one a row for each INT8 segment, and empty for other types. `bias` has an
    /// element a row, BF16 or FP16 as the output is.
    ///
    /// # Errors
    ///
    /// Lengths that do not fit; INT8 weights whose dequantised value does not
    /// fit FP16 ([`Error::Overflow`]); a GPU below compute capability 9.0; what
    /// the driver reports.
    pub fn new(
        device: &Device,
        stream: &Stream,
        matrices: &[FixedMatrix],
        scales: &[Vec<f32>],
        bias: Option<&[u16]>,
    ) -> Result<Self> {
        let first = matrices.first().ok_or(length("segments", 0, 1))?;
        check("segments", matrices.len(), matrices.len().min(MAX_SEGMENTS))?;
        let info = device.info();
        if info.capability < (9, 0) {
            return Err(Error::Unsupported {
                operation: "fused product",
                capability: info.capability,
            });
        }
        let int8 = first.format.dtype() == transom::Dtype::I8;
        check("scales of segments", scales.len(), if int8 { matrices.len() } else { 0 })?;
        let (mut segments, mut rows) = (Vec::new(), 0);
        for (i, matrix) in matrices.iter().enumerate() {
            check("columns of a segment", matrix.cols, first.cols)?;
            check("bytes of a chunk", matrix.chunk_bytes, first.chunk_bytes)?;
            check("format of a segment", matrix.format as usize, first.format as usize)?;
            check("rows above the segment", rows, rows / CHUNK_ROWS * CHUNK_ROWS)?;
            rows += matrix.rows;
            let mut scale_step = 0;
            let scales = match scales.get(i) {
                None => None,
                Some(scales) => {
                    if scales.len() != 1 {
                        check("scales", scales.len(), matrix.rows)?;
                        scale_step = 1;
                    }
                    check_range(matrix, scales)?;
                    Some(stream.upload(scales)?)
                }
            };
            segments.push(Segment {
                chunks: stream.upload(&matrix.chunks)?,
                overflow: stream.upload(&matrix.overflow)?,
                symbols: stream.upload(&matrix.symbols)?,
                scales,
                end_tile: rows.div_ceil(CHUNK_ROWS),
                scale_step,
            });
        }
        if let Some(bias) = bias {
            check("bias", bias.len(), rows)?;
        }
        let (format, chunk_bytes) = (first.format, first.chunk_bytes);
        let n_slices = n_slices(first.cols);
        let variant =
            |suffix, shape| Variant::new(device, format, suffix, shape, chunk_bytes, n_slices);
        Ok(Self {
            format,
            rows,
            cols: first.cols,
            chunk_bytes,
            n_sms: info.n_sms as usize,
            segments,
            bias: bias.map(|bias| stream.upload(bias)).transpose()?,
            variants: [
                variant("m8", [1, 1, 8, 0])?,
                variant("m8_wide", [1, 2, 4, 0])?,
                variant("m16", [2, 1, 8, 0])?,
                variant("m32", [4, 1, 8, 0])?,
                variant("m64", [8, 8, 1, 3])?,
            ],
            fragments: device.function("activation_fragments")?,
        })
    }

    /// Rows of all segments: elements of a token's result.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: elements of a token's activations.
    #[must_use]
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// How the weights are stored.
    #[must_use]
    pub const fn format(&self) -> WeightFormat {
        self.format
    }

    fn n_tiles(&self) -> usize {
        self.rows.div_ceil(CHUNK_ROWS)
    }

    fn variant(&self, n_tokens: usize) -> &Variant {
        let (n_tiles, n_sms) = (self.n_tiles(), self.n_sms);
        let [m8, wide, m16, m32, m64] = &self.variants;
        match n_tokens {
            // Two strips a block where that wastes no block: fewer rounds.
            0..=8 if wide.fill(n_tiles, n_sms) >= m8.fill(n_tiles, n_sms) => wide,
            0..=8 => m8,
            9..=16 => m16,
            17..=32 => m32,
            _ => m64,
        }
    }

    /// Memory for [`Product::run`] with up to `n_tokens` tokens.
    ///
    /// # Errors
    ///
    /// Out of memory.
    pub fn scratch(&self, device: &Device, n_tokens: usize) -> Result<Scratch> {
        let n_words = n_tokens.div_ceil(8) * self.cols.div_ceil(CHUNK_COLS) * 512;
        let n_slices = n_slices(self.cols);
        let floats = (self.variants.iter())
            .map(|variant| variant.workspace_floats(self.n_tiles(), self.n_sms, n_slices))
            .max();
        Ok(Scratch {
            x: DeviceBuffer::new(device, n_words)?,
            workspace: DeviceBuffer::new(device, floats.unwrap_or(0))?,
        })
    }

    /// `y = x * W^T + bias`: `x` is `[n_tokens][cols]`, `y` `[n_tokens][rows]`, of
    /// BF16 for BF16 weights and otherwise FP16; 1 to 64 tokens. Reads the
    /// weights once. Two launches, of which the second loads weights before the
    /// first is done.
    ///
    /// # Errors
    ///
    /// Lengths that do not fit, and what the driver reports.
    pub fn run(
        &self,
        stream: &Stream,
        x: &DeviceBuffer<u16>,
        y: &mut DeviceBuffer<u16>,
        n_tokens: usize,
        scratch: &mut Scratch,
    ) -> Result<()> {
        check("tokens", n_tokens, n_tokens.clamp(1, MAX_TOKENS))?;
        check("activations", x.len(), n_tokens * self.cols)?;
        check("results", y.len(), n_tokens * self.rows)?;
        let n_words = n_tokens.div_ceil(8) * self.cols.div_ceil(CHUNK_COLS) * 512;
        check("scratch", scratch.x.len(), scratch.x.len().max(n_words))?;
        if n_words == 0 || self.rows == 0 {
            return Ok(());
        }
        let variant = self.variant(n_tokens);
        let floats = variant.workspace_floats(self.n_tiles(), self.n_sms, n_slices(self.cols));
        check("workspace", scratch.workspace.len(), scratch.workspace.len().max(floats))?;
        let fragments = FragmentParams {
            x: x.address(),
            out: scratch.x.address(),
            cols: self.cols as u32,
            tokens: n_tokens as u32,
            cores: u32::from(n_tokens >= CORE_TOKENS),
            unused: 0,
        };
        let launch = Launch::new((n_words / 4).div_ceil(256) as u32, 256).dependent(true);
        // SAFETY: the lengths were checked above, and freeing a buffer waits for the kernel.
        unsafe { self.fragments.launch(stream, launch, &fragments)? };
        let mut segments = [SegmentParams::default(); MAX_SEGMENTS];
        for (params, segment) in segments.iter_mut().zip(&self.segments) {
            *params = SegmentParams {
                chunks: segment.chunks.address(),
                overflow: segment.overflow.address(),
                symbols: segment.symbols.address(),
                scales: segment.scales.as_ref().map_or(0, DeviceBuffer::address),
                end_tile: segment.end_tile as u32,
                scale_step: segment.scale_step,
            };
        }
        let params = ProductParams {
            segments,
            x: scratch.x.address(),
            y: y.address(),
            bias: self.bias.as_ref().map_or(0, DeviceBuffer::address),
            workspace: scratch.workspace.address(),
            rows: self.rows as u32,
            cols: self.cols as u32,
            tokens: n_tokens as u32,
            n_segments: self.segments.len() as u32,
            chunk_bytes: self.chunk_bytes as u32,
            unused: 0,
        };
        let n_blocks = variant.n_blocks(self.n_tiles(), self.n_sms) as u32;
        let launch =
            Launch::new(n_blocks, 32 * WARPS as u32).shared(variant.shared_bytes).dependent(true);
        // SAFETY: the segments hold what `FixedMatrix` describes, the lengths of the
        // others were checked above, and freeing a buffer waits for the kernel.
        unsafe { variant.function.launch(stream, launch, &params) }
    }
}

/// As `slices` of `kernels/reduction.cuh`.
fn n_slices(cols: usize) -> usize {
    cols.div_ceil(256).clamp(1, MAX_SLICES)
}

/// Every dequantised value of an INT8 segment fits FP16.
fn check_range(matrix: &FixedMatrix, scales: &[f32]) -> Result<()> {
    let (low, high) = matrix.int8_range;
    for &scale in scales {
        for q in [low, high] {
            if !f16::from_f32(f32::from(q) * scale).is_finite() {
                return Err(Error::Overflow { value: q, scale_bits: scale.to_bits() });
            }
        }
    }
    Ok(())
}

fn length(what: &'static str, found: usize, expected: usize) -> Error {
    Error::Length { what, found, expected }
}

fn check(what: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(length(what, found, expected)) }
}
