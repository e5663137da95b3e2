//! Weight matrices in memory, in a form that products compute from.
//!
//! | layout | what is resident |
//! |---|---|
//! | [`Layout::Dense`] | the original elements, row-major |
//! | [`Layout::Rans`] | the tiles of the record as they are, decoded anew in every product |
//! | [`Layout::Fixed`] | fixed-rate codes and escapes: larger than `Rans`, decoded in a few instructions |
//!
//! All give the same bits in every product; see [`crate::product`].

mod dense;
mod fixed;
mod part;
mod rans;

pub(crate) use dense::DenseMatrix;
pub(crate) use fixed::{Band, CHUNK_ELEMS, Coding, FixedMatrix, GROUP, unpack_highs};
pub(crate) use part::Part;
pub(crate) use rans::RansMatrix;

use std::ops::Range;
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::{DecodeError, EncodeError};
use crate::io::ReadAt;
use crate::isa::Isa;
use crate::record::Record;

/// How a matrix lies in memory while a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// The original elements.
    Dense,
    /// Fixed-rate codes with escapes.
    Fixed,
    /// Entropy-coded, as on disk.
    Rans,
}

impl Layout {
    /// Every layout.
    pub const ALL: [Self; 3] = [Self::Dense, Self::Fixed, Self::Rans];

    /// The name the command line uses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Fixed => "fixed",
            Self::Rans => "rans",
        }
    }
}

/// Element type of a weight matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// bfloat16.
    Bf16,
    /// IEEE 754 half precision.
    F16,
    /// Single precision; always [`Layout::Dense`].
    F32,
    /// A signed byte that stands for its product with the scale of its row,
    /// rounded to half precision; see [`Matrix::with_scales`].
    I8,
}

/// What elements stand for: their type and, if they are integers, the scales
/// of the rows at hand.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Values<'a> {
    pub(crate) weight: WeightType,
    /// Empty unless elements are integers.
    pub(crate) scales: &'a [f32],
}

impl WeightType {
    /// The type a safetensors header names, if products know it.
    #[must_use]
    pub fn from_safetensors(name: &str) -> Option<Self> {
        match name {
            "BF16" => Some(Self::Bf16),
            "F16" => Some(Self::F16),
            "F32" => Some(Self::F32),
            "I8" => Some(Self::I8),
            _ => None,
        }
    }

    /// Bytes of one element.
    #[must_use]
    pub const fn elem_bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::I8 => 1,
        }
    }

    /// The type the codec sees.
    #[must_use]
    pub const fn dtype(self) -> Dtype {
        match self {
            Self::Bf16 => Dtype::Bf16,
            Self::F16 => Dtype::F16,
            Self::F32 => Dtype::Opaque,
            Self::I8 => Dtype::I8,
        }
    }
}

#[derive(Debug)]
pub(crate) enum Body {
    Dense(DenseMatrix),
    Fixed(FixedMatrix),
    Rans(Box<RansMatrix>),
}

/// A matrix of weights `W[rows, cols]`, to be multiplied as `y = x W^T`.
#[derive(Debug)]
pub struct Matrix {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) weight: WeightType,
    pub(crate) body: Body,
    /// Of the rows, if elements are integers; else empty.
    scales: Arc<[f32]>,
}

impl Matrix {
    fn new([rows, cols]: [usize; 2], weight: WeightType, body: Body) -> Self {
        let n_scales = if weight == WeightType::I8 { rows } else { 0 };
        Self { rows, cols, weight, body, scales: vec![1.0; n_scales].into() }
    }

    /// Gives the rows of a matrix of integers their scales, which are 1 before:
    /// an element `q` of row `r` then stands for the FP16 number nearest to
    /// `q * scales[r]`, the product in f32, ties to even.
    ///
    /// # Panics
    ///
    /// If the elements are no integers, or there is not one scale for each row.
    #[must_use]
    pub fn with_scales(mut self, scales: Arc<[f32]>) -> Self {
        assert_eq!(self.weight, WeightType::I8, "only integers have scales");
        assert_eq!(scales.len(), self.rows, "a scale for each row");
        self.scales = scales;
        self
    }

    /// What the elements of some rows stand for.
    pub(crate) fn values(&self, rows: Range<usize>) -> Values<'_> {
        let scales = self.scales.get(rows).unwrap_or_default();
        Values { weight: self.weight, scales }
    }

    /// Whether some integer would stand for more than FP16 can hold.
    pub(crate) fn may_overflow(&self) -> bool {
        self.scales.iter().any(|scale| scale.abs() * 128.0 > crate::quantize::MAX_F16)
    }

    /// Loads a matrix from its record. Tiles are read and checked in parallel
    /// on the current rayon pool.
    ///
    /// [`Layout::Fixed`] falls back to dense where no variant is smaller, and
    /// F32 is always dense; [`Matrix::layout`] tells.
    ///
    /// # Errors
    ///
    /// As [`Record::read_tile`] and [`Record::decode_tile_with`];
    /// [`DecodeError::Slice`] if the record is no matrix of this type.
    ///
    /// # Cost
    ///
    /// Beside the layout, a few tiles a thread.
    pub fn from_record(
        record: &Record,
        source: &(impl ReadAt + ?Sized),
        shape: [usize; 2],
        weight: WeightType,
        layout: Layout,
        isa: Isa,
    ) -> Result<Self, DecodeError> {
        check_shape(record, shape, weight)?;
        let body = match layout {
            _ if weight == WeightType::F32 => {
                Body::Dense(DenseMatrix::from_record(record, source, isa)?)
            }
            Layout::Dense => Body::Dense(DenseMatrix::from_record(record, source, isa)?),
            Layout::Rans => Body::Rans(Box::new(RansMatrix::from_record(record, source)?)),
            Layout::Fixed => match FixedMatrix::from_record(record, source, weight, isa)? {
                Some(fixed) => Body::Fixed(fixed),
                None => Body::Dense(DenseMatrix::from_record(record, source, isa)?),
            },
        };
        Ok(Self::new(shape, weight, body))
    }

    /// Loads a matrix from its original elements, row-major from byte `start`
    /// of `source` on. Layouts other than dense are encoded in memory.
    ///
    /// # Errors
    ///
    /// [`EncodeError::Io`] if the source cannot be read,
    /// [`EncodeError::Decode`] if it changes meanwhile.
    pub fn from_dense(
        source: &(impl ReadAt + ?Sized),
        start: u64,
        shape: [usize; 2],
        weight: WeightType,
        layout: Layout,
        isa: Isa,
    ) -> Result<Self, EncodeError> {
        if layout == Layout::Dense || weight == WeightType::F32 {
            let body = Body::Dense(DenseMatrix::read(source, start, shape, weight)?);
            return Ok(Self::new(shape, weight, body));
        }
        let bytes = rans::encode_in_memory(source, start, shape, weight.dtype(), isa)?;
        let record = Record::read(&bytes, 0, bytes.len() as u64)?;
        Ok(Self::from_record(&record, &bytes, shape, weight, layout, isa)?)
    }

    /// A matrix of original elements, row-major, which are bytes `range` of `buffer`.
    ///
    /// # Panics
    ///
    /// If the range is not inside the buffer, or not as long as the shape says.
    #[must_use]
    pub fn from_elements(
        buffer: Vec<u8>,
        range: Range<usize>,
        shape: [usize; 2],
        weight: WeightType,
    ) -> Self {
        let n_elems = shape[0].checked_mul(shape[1]).expect("a matrix in memory");
        let bytes = Part::new(buffer, range);
        assert_eq!(bytes.len(), n_elems * weight.elem_bytes(), "not the matrix's length");
        let body = Body::Dense(DenseMatrix { bytes });
        Self::new(shape, weight, body)
    }

    /// A matrix of the tiles of a record, end to end, as they lie at
    /// [`RecordPlace::tiles_range`](crate::RecordPlace::tiles_range), which are bytes `range` of `buffer`. Its layout
    /// is [`Layout::Rans`], but dense for F32.
    ///
    /// # Errors
    ///
    /// [`DecodeError::RecordTruncated`], [`DecodeError::TileChecksum`], or
    /// [`DecodeError::Slice`] if the record is no matrix of this type.
    ///
    /// # Panics
    ///
    /// If the range is not inside the buffer.
    ///
    /// # Cost
    ///
    /// Checks the tiles on the current thread, at about the speed of memory;
    /// nothing is decoded.
    pub fn from_tiles(
        record: Record,
        buffer: Vec<u8>,
        range: Range<usize>,
        shape: [usize; 2],
        weight: WeightType,
    ) -> Result<Self, DecodeError> {
        check_shape(&record, shape, weight)?;
        let rans = RansMatrix::from_tiles(record, Part::new(buffer, range.clone()))?;
        if weight == WeightType::F32 {
            // Tiles of types unknown to the codec are the elements themselves.
            return Ok(Self::from_elements(rans.into_buffer(), range, shape, weight));
        }
        Ok(Self::new(shape, weight, Body::Rans(Box::new(rans))))
    }

    /// Bytes of memory that a matrix takes which [`Matrix::from_record`] loads:
    /// exactly, but within a few per cent for [`Layout::Fixed`].
    #[must_use]
    pub fn expected_bytes(record: &Record, weight: WeightType, layout: Layout) -> usize {
        let (rows, _) = record.matrix_sides();
        let scales = if weight == WeightType::I8 { rows * size_of::<f32>() } else { 0 };
        scales
            + match layout {
                _ if weight == WeightType::F32 => record.header().content_bytes() as usize,
                Layout::Dense => record.header().content_bytes() as usize,
                Layout::Fixed => FixedMatrix::expected_bytes(record, weight),
                Layout::Rans => RansMatrix::expected_bytes(record),
            }
    }

    /// The memory of the weights, to be used again.
    #[must_use]
    pub fn into_buffer(self) -> Vec<u8> {
        match self.body {
            Body::Dense(dense) => dense.bytes.into_buffer(),
            Body::Fixed(fixed) => fixed.into_buffer(),
            Body::Rans(rans) => rans.into_buffer(),
        }
    }

    /// Makes the weights useless in a way that shows: what is computed from
    /// them afterwards is not a number, or [`DecodeError::Tile`]. For tests of
    /// programs that use memory again.
    pub fn poison(&mut self) {
        // No integer is not a number.
        self.scales = vec![f32::NAN; self.scales.len()].into();
        match &mut self.body {
            Body::Dense(dense) => dense.bytes.fill(0xFF),
            Body::Fixed(fixed) => fixed.poison(),
            Body::Rans(rans) => rans.poison(),
        }
    }

    /// Output features.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    #[must_use]
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// Element type.
    #[must_use]
    pub const fn weight_type(&self) -> WeightType {
        self.weight
    }

    /// The layout it really has.
    #[must_use]
    pub const fn layout(&self) -> Layout {
        match self.body {
            Body::Dense(_) => Layout::Dense,
            Body::Fixed(_) => Layout::Fixed,
            Body::Rans(_) => Layout::Rans,
        }
    }

    /// Bytes of memory the weights take, tables and scales included.
    #[must_use]
    pub fn resident_bytes(&self) -> usize {
        size_of_val(&*self.scales)
            + match &self.body {
                Body::Dense(dense) => dense.resident_bytes(),
                Body::Fixed(fixed) => fixed.resident_bytes(),
                Body::Rans(rans) => rans.resident_bytes(),
            }
    }

    /// Bits of memory a weight takes, tables included.
    #[must_use]
    pub fn bits_per_weight(&self) -> f64 {
        self.resident_bytes() as f64 * 8.0 / (self.rows * self.cols).max(1) as f64
    }
}

fn check_shape(record: &Record, shape: [usize; 2], weight: WeightType) -> Result<(), DecodeError> {
    let header = record.header();
    let n_bytes = (shape[0] as u64)
        .checked_mul(shape[1] as u64)
        .and_then(|n| n.checked_mul(weight.elem_bytes() as u64));
    let same_shape = weight == WeightType::F32 || header.shape() == shape;
    if header.dtype() == weight.dtype() && same_shape && n_bytes == Some(header.content_bytes()) {
        return Ok(());
    }
    Err(DecodeError::Slice {
        found: format!("{} {:?}", header.dtype().name(), header.shape()),
        expected: format!("{weight:?} {shape:?}"),
    })
}
