//! Products of more than 64 tokens: a library multiplies, and while it does, the
//! next matrix is decoded into a ring of two dense ones. For entropy-coded weights, and GPUs without the kernels that
//! [`crate::product`] has for fixed-rate ones.
//!
//! The kernels that decode run in a stream of their own, ahead of the products,
//! on a few SMs: fewer the more tokens there are, because a product takes the
//! longer for the same decoding. A product waits for its matrix, and the matrix
//! after the next for the product whose place it takes.

use crate::buffer::DeviceBuffer;
use crate::cublas::{Algorithm, Product};
use crate::error::{Result, of_rans};
use crate::fixed::{Decoder, DeviceMatrix};
use crate::rans::{Rans, RansMatrix};
use crate::stream::{Event, Stream, check_length};

/// Weights of a product, of any layout.
#[derive(Debug, Clone, Copy)]
pub enum Weights<'a> {
    /// Row-major BF16 or FP16: nothing to decode.
    Dense(&'a DeviceBuffer<u16>),
    /// In the order of chunks, with one scale or one a row if they are INT8.
    Fixed(&'a DeviceMatrix, Option<&'a DeviceBuffer<f32>>),
    /// Entropy-coded BF16 or FP16.
    Rans(&'a RansMatrix),
}

impl Weights<'_> {
    /// On how many SMs of a GPU they should be decoded while a product of that
    /// many tokens runs, so that both take the same time. An estimate: on an H200
    /// one SM decodes 28 (fixed-rate) or 7 (entropy-coded) weights a
    /// nanosecond, and all multiply 360,000 pairs.
    #[must_use]
    pub fn decoding_sms(&self, n_tokens: usize, n_sms: u32) -> u32 {
        let tokens_sms: usize = match self {
            Self::Dense(_) => return 0,
            Self::Fixed(..) => 360_000 / 28,
            Self::Rans(_) => 360_000 / 7,
        };
        let n = tokens_sms.div_ceil(n_tokens.max(1)) as u32;
        n.clamp(2, (n_sms / 2).max(2))
    }
}

/// A place for one matrix.
#[derive(Debug)]
struct Slot {
    dense: DeviceBuffer<u16>,
    /// The matrix has been decoded.
    ready: Event,
    /// The product has read it.
    free: Event,
    /// Whether a product has been given to the stream since [`Prefill::begin`].
    used: bool,
}

/// Decodes ahead of the products of one stream.
#[derive(Debug)]
pub struct Prefill {
    decoder: Decoder,
    rans: Rans,
    ahead: Stream,
    begun: Event,
    slots: [Slot; 2],
    next: usize,
}

impl Prefill {
    /// For matrices of up to `n_elems` elements; takes four bytes of GPU memory
    /// for each.
    ///
    /// # Errors
    ///
    /// Out of memory, and what the driver reports.
    pub fn new(stream: &Stream, n_elems: usize) -> Result<Self> {
        let device = stream.device();
        let slot = || -> Result<Slot> {
            Ok(Slot {
                dense: DeviceBuffer::new(device, n_elems)?,
                ready: Event::new(device)?,
                free: Event::new(device)?,
                used: false,
            })
        };
        Ok(Self {
            decoder: Decoder::new(device)?,
            rans: Rans::new(device).map_err(of_rans)?,
            ahead: Stream::urgent(device)?,
            begun: Event::new(device)?,
            slots: [slot()?, slot()?],
            next: 0,
        })
    }

    /// Begins a sequence of products: decoding starts when everything in `stream`
    /// is done. To be called before the first product, and inside a capture
    /// before the first product there.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn begin(&mut self, stream: &Stream) -> Result<()> {
        stream.record(&self.begun)?;
        self.slots.iter_mut().for_each(|slot| slot.used = false);
        self.ahead.wait(&self.begun)
    }

    /// `y = x * W^T` in the stream of `product`: `x` is `[m, k]`, `y` `[m, n]`. The
    /// weights are decoded on `n_sms` SMs, while the products before run.
    /// The result has the bits of [`Product::multiply`] of the same weights and
    /// algorithm.
    ///
    /// # Errors
    ///
    /// Sides that are not those of the product, a matrix larger than the ring was
    /// made for, weights that cannot be decoded to the product's type, and what
    /// driver and libraries report.
    pub fn multiply(
        &mut self,
        (product, algorithm): (&Product<'_>, &Algorithm),
        weights: &Weights<'_>,
        x: &DeviceBuffer<u16>,
        y: &mut DeviceBuffer<u16>,
        n_sms: u32,
    ) -> Result<()> {
        let shape = product.shape();
        let (rows, cols) = match weights {
            Weights::Dense(dense) => return product.multiply(algorithm, dense, x, y),
            Weights::Fixed(matrix, _) => (matrix.rows(), matrix.cols()),
            Weights::Rans(matrix) => (matrix.rows(), matrix.cols()),
        };
        check_length("rows of the weights", rows, shape.n)?;
        check_length("columns of the weights", cols, shape.k)?;
        check_length("activations", x.len(), shape.m * shape.k)?;
        check_length("result", y.len(), shape.m * shape.n)?;
        let slot = &mut self.slots[self.next];
        check_length("elements of the ring", slot.dense.len(), slot.dense.len().max(rows * cols))?;
        if slot.used {
            self.ahead.wait(&slot.free)?;
        }
        match *weights {
            Weights::Dense(_) => {}
            Weights::Fixed(matrix, scales) => {
                let n_blocks = Decoder::BLOCKS_PER_SM * n_sms;
                let matrix = (matrix, scales);
                self.decoder.decode_rows(&self.ahead, matrix, 0..rows, &slot.dense, n_blocks)?;
            }
            Weights::Rans(matrix) => {
                self.rans.decode_on(n_sms, &self.ahead, matrix, &slot.dense).map_err(of_rans)?;
            }
        }
        self.ahead.record(&slot.ready)?;
        let stream = product.stream();
        stream.wait(&slot.ready)?;
        // SAFETY: the lengths were checked above; the stream has waited for the
        // weights, and nothing writes them before `free`.
        unsafe {
            product.launch(algorithm, slot.dense.address(), x.address(), y.address())?;
        }
        stream.record(&slot.free)?;
        slot.used = true;
        self.next = 1 - self.next;
        Ok(())
    }
}
