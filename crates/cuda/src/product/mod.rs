//! Fused products: `y[tokens, rows] = x[tokens, cols] * W[rows, cols]^T + bias`
//! with weights that are decoded inside the product (`kernels/product.cuh`).
//!
//! FP32 accumulation. Up to [`INVARIANT_TOKENS`] its order is a function of (rows,
//! cols) only (`kernels/reduction.cuh`): every format, number of tokens and launch gives
//! the same bits, and a token's result does not depend on the others. With more
//! tokens it is a function of (rows, cols, tokens) and the GPU's number of multiprocessors: every format gives the same bits,
//! dense weights as any other.

use half::f16;

use crate::buffer::DeviceBuffer;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::fixed::{CHUNK_COLS, CHUNK_ROWS, FixedMatrix, WeightFormat};
use crate::module::{Function, Launch};
use crate::stream::Stream;

pub(crate) mod params;
mod prefill;
mod shape;

use params::ActivationOrder;
use prefill::{Prefill, PrefillLaunch};
use shape::{BATCH_TOKENS, Variants, Weights};

/// Up to so many tokens in a product, each has the result that it has alone.
pub const INVARIANT_TOKENS: usize = 64;
const MAX_SEGMENTS: usize = 3;
/// How often a block asks whether the others are done before it leaves its share of the sums to the last of them:
/// some tens of microseconds.
const PATIENCE: u32 = 64;

/// Weights of one to three row segments in GPU memory, with the kernels for them.
#[derive(Debug)]
pub struct Product {
    format: WeightFormat,
    rows: usize,
    cols: usize,
    chunk_bytes: usize,
    /// Of all segments, one after the other.
    chunks: DeviceBuffer<u8>,
    segments: Vec<Segment>,
    bias: Option<DeviceBuffer<u16>>,
    variants: Variants,
    prefill: Option<Prefill>,
    order_activations: Function,
}

#[derive(Debug)]
struct Segment {
    overflow: DeviceBuffer<u32>,
    symbols: DeviceBuffer<u8>,
    scales: DeviceBuffer<u32>,
    end_tile: usize,
    scale_step: u32,
}

/// Where a product's activations lie while it runs, and its workspace. One
/// stream uses it at a time.
#[derive(Debug)]
pub struct Scratch {
    x: DeviceBuffer<u32>,
    workspace: DeviceBuffer<f32>,
    /// Zero between products.
    meetings: DeviceBuffer<u32>,
}

impl Product {
    /// Uploads the segments: matrices of one format, chunk size and number of
    /// columns, all but the last of a multiple of 16 rows. `bias` has an element a
    /// row, BF16 or FP16 as the output is.
    ///
    /// # Errors
    ///
    /// Lengths that do not fit; chunks that are not valid; INT8 weights whose dequantised value does not
    /// fit FP16 ([`Error::Overflow`]); a GPU below compute capability 9.0; what
    /// the driver reports.
    pub fn new(
        device: &Device,
        stream: &Stream,
        matrices: &[FixedMatrix],
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
        let (mut segments, mut rows) = (Vec::new(), 0);
        let n_bytes = matrices.iter().map(|matrix| matrix.chunks.len()).sum();
        // The kernels count in units of 16 bytes.
        check("bytes of chunks", n_bytes, n_bytes.min(16 * u32::MAX as usize))?;
        let mut chunks = Vec::with_capacity(n_bytes);
        for matrix in matrices {
            check("columns of a segment", matrix.cols, first.cols)?;
            check("bytes of a chunk", matrix.chunk_bytes, first.chunk_bytes)?;
            check("format of a segment", matrix.format as usize, first.format as usize)?;
            matrix.check()?;
            check("rows above the segment", rows, rows / CHUNK_ROWS * CHUNK_ROWS)?;
            rows += matrix.rows;
            let n_scales = matrix.scales.len();
            if n_scales > 1 || matrix.format.dtype() == transom::Dtype::I8 {
                check("scales", n_scales, if n_scales == 1 { 1 } else { matrix.rows })?;
            }
            check_range(matrix)?;
            let scales: Vec<u32> = matrix.scales.iter().flat_map(|s| s.words()).collect();
            chunks.extend_from_slice(&matrix.chunks);
            segments.push(Segment {
                overflow: stream.upload(&matrix.overflow)?,
                symbols: stream.upload(&matrix.symbols)?,
                scales: stream.upload(&scales)?,
                end_tile: rows.div_ceil(CHUNK_ROWS),
                scale_step: u32::from(n_scales != 1),
            });
        }
        if let Some(bias) = bias {
            check("bias", bias.len(), rows)?;
        }
        let (format, chunk_bytes) = (first.format, first.chunk_bytes);
        let weights = Weights {
            format,
            chunk_bytes,
            n_tiles: rows.div_ceil(CHUNK_ROWS),
            across: first.cols.div_ceil(CHUNK_COLS),
            n_slices: shape::n_slices(first.cols),
        };
        Ok(Self {
            format,
            rows,
            cols: first.cols,
            chunk_bytes,
            chunks: stream.upload(&chunks)?,
            segments,
            bias: bias.map(|bias| stream.upload(bias)).transpose()?,
            variants: Variants::new(device, weights)?,
            prefill: Prefill::new(device, weights)?,
            order_activations: device.function("order_activations")?,
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

    /// Memory for [`Product::run`] with up to `n_tokens` tokens.
    ///
    /// # Errors
    ///
    /// Out of memory.
    pub fn scratch(&self, device: &Device, n_tokens: usize) -> Result<Scratch> {
        let (floats, words) = self.shared_sums(n_tokens);
        Ok(Scratch {
            x: DeviceBuffer::new(device, self.scratch_words(n_tokens))?,
            workspace: DeviceBuffer::new(device, floats)?,
            meetings: DeviceBuffer::new(device, words)?,
        })
    }

    /// Floats of sums that blocks share, and words at which they meet, of any product of up to that many tokens.
    fn shared_sums(&self, n_tokens: usize) -> (usize, usize) {
        let (floats, words) = (self.variants.workspace_floats(), self.variants.meeting_words());
        match &self.prefill {
            Some(prefill) if n_tokens > INVARIANT_TOKENS => {
                (floats.max(prefill.workspace_floats()), words.max(prefill.meeting_words()))
            }
            _ => (floats, words),
        }
    }

    /// Of activations in another order than row-major, or with rows of another length.
    fn scratch_words(&self, n_tokens: usize) -> usize {
        let n_few = n_tokens.min(INVARIANT_TOKENS);
        let few = n_few.div_ceil(8) * self.cols.div_ceil(CHUNK_COLS) * 512;
        let is_padded = !self.cols.is_multiple_of(8);
        few.max(if is_padded { n_tokens * self.cols.div_ceil(8) * 4 } else { 0 })
    }

    /// `y = x * W^T + bias`: `x` is `[n_tokens][cols]`, `y` `[n_tokens][rows]`, of
    /// BF16 for BF16 weights and otherwise FP16. Up to 64 tokens it reads the
    /// weights once; with more, once for every 128 or 256, as long as the GPU has compute capability 9.0, otherwise for every 64.
    /// 17 to 64 tokens, or columns that are no multiple of 8, take two launches, of
    /// which the second loads weights before the first is done.
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
        check("tokens", n_tokens, n_tokens.clamp(1, u32::MAX as usize))?;
        check("activations", x.len(), n_tokens * self.cols)?;
        check("results", y.len(), n_tokens * self.rows)?;
        let n_words = self.scratch_words(n_tokens);
        check("scratch", scratch.x.len(), scratch.x.len().max(n_words))?;
        let (floats, words) = self.shared_sums(n_tokens);
        check("workspace", scratch.workspace.len(), scratch.workspace.len().max(floats))?;
        check("meetings", scratch.meetings.len(), scratch.meetings.len().max(words))?;
        if n_words == 0 || self.rows == 0 {
            return Ok(());
        }
        if n_tokens > INVARIANT_TOKENS
            && let Some(with) = self.prefill.as_ref().and_then(|prefill| prefill.choose(n_tokens))
        {
            return self.run_many(stream, x.address(), y.address(), n_tokens, scratch, &with);
        }
        for first in (0..n_tokens).step_by(INVARIANT_TOKENS) {
            let x = x.address() + 2 * (first * self.cols) as u64;
            let y = y.address() + 2 * (first * self.rows) as u64;
            let n_tokens = INVARIANT_TOKENS.min(n_tokens - first);
            self.run_few(stream, x, y, n_tokens, scratch)?;
        }
        Ok(())
    }

    /// Up to 64 tokens. Expects that lengths fit.
    fn run_few(
        &self,
        stream: &Stream,
        x: u64,
        y: u64,
        n_tokens: usize,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let variant = self.variants.choose(n_tokens);
        let x_stride = self.cols.next_multiple_of(8);
        let order = match n_tokens {
            BATCH_TOKENS.. => Some(ActivationOrder::CoreMatrices),
            _ if x_stride != self.cols => Some(ActivationOrder::Rows),
            _ => None,
        };
        if let Some(order) = order {
            self.order_activations(stream, x, n_tokens, order, scratch)?;
        }
        let params = params::Product {
            x: order.map_or(x, |_| scratch.x.address()),
            workspace: scratch.workspace.address(),
            meetings: scratch.meetings.address(),
            x_stride: x_stride as u32,
            strips: variant.shape.strips as u32,
            parts: variant.shape.parts as u32,
            slots: variant.slots as u32,
            part_share: 65_536_u32.div_ceil(variant.shape.parts as u32),
            patience: PATIENCE,
            ..self.params(y, n_tokens)
        };
        // SAFETY: the segments hold what `FixedMatrix` describes, the lengths of the
        // others were checked above, and freeing a buffer waits for the kernel.
        unsafe { variant.function.launch(stream, variant.launch, &params) }
    }

    /// More than 64 tokens. Expects that lengths fit.
    fn run_many(
        &self,
        stream: &Stream,
        x: u64,
        y: u64,
        n_tokens: usize,
        scratch: &mut Scratch,
        with: &PrefillLaunch<'_>,
    ) -> Result<()> {
        let stride = self.cols.next_multiple_of(8);
        let mut from = x;
        if stride != self.cols {
            self.order_activations(stream, x, n_tokens, ActivationOrder::Rows, scratch)?;
            from = scratch.x.address();
        }
        let half = self.format.twin() != WeightFormat::DenseBf16;
        let sides = [n_tokens, self.cols, stride];
        let params = params::Prefill {
            product: params::Product {
                workspace: scratch.workspace.address(),
                meetings: scratch.meetings.address(),
                ..self.params(y, n_tokens)
            },
            x: prefill::tensor_map(from, sides, with.box_tokens, half)?,
            whole: with.whole as u32,
            unused: [0; 15],
        };
        // SAFETY: as in `run_few`.
        unsafe { with.function.launch(stream, with.launch, &params) }
    }

    /// What products of any number of tokens are told.
    fn params(&self, y: u64, n_tokens: usize) -> params::Product {
        let mut segments = [params::Segment::default(); MAX_SEGMENTS];
        for (params, segment) in segments.iter_mut().zip(&self.segments) {
            *params = params::Segment {
                overflow: segment.overflow.address(),
                symbols: segment.symbols.address(),
                scales: segment.scales.address(),
                end_tile: segment.end_tile as u32,
                scale_step: segment.scale_step,
            };
        }
        params::Product {
            segments,
            chunks: self.chunks.address(),
            y,
            bias: self.bias.as_ref().map_or(0, DeviceBuffer::address),
            rows: self.rows as u32,
            cols: self.cols as u32,
            tokens: n_tokens as u32,
            n_segments: self.segments.len() as u32,
            n_tiles: self.rows.div_ceil(CHUNK_ROWS) as u32,
            chunk_bytes: self.chunk_bytes as u32,
            ..params::Product::default()
        }
    }

    /// Puts row-major activations into `scratch` in another order. Expects that they fit.
    fn order_activations(
        &self,
        stream: &Stream,
        x: u64,
        n_tokens: usize,
        order: ActivationOrder,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let n_units = match order {
            ActivationOrder::Rows => n_tokens * self.cols.div_ceil(8),
            _ => n_tokens.div_ceil(8) * self.cols.div_ceil(CHUNK_COLS) * 128,
        };
        let params = params::Activations {
            x,
            out: scratch.x.address(),
            cols: self.cols as u32,
            tokens: n_tokens as u32,
            order: order as u32,
            unused: 0,
        };
        let launch = Launch::new(n_units.div_ceil(256) as u32, 256).dependent(true);
        // SAFETY: `run` checked the lengths, and freeing a buffer waits for the kernel.
        unsafe { self.order_activations.launch(stream, launch, &params) }
    }
}

/// Every dequantised value of an INT8 segment fits FP16.
fn check_range(matrix: &FixedMatrix) -> Result<()> {
    let (low, high) = matrix.int8_range;
    for scale in &matrix.scales {
        let scale = scale.value();
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
