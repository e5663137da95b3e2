//! A matrix in its file.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use transom::ReadAt;
use transom::checkpoint::{Checkpoint, TensorInfo, TensorKind};
use transom::layout::{Layout, Matrix, WeightType};
use transom::quantize::round_to_f16;
use transom::{DecodeError, Isa, RecordPlace};

use super::reader::Reader;
use crate::error::RuntimeError;
use crate::weights::{check, missing, scales, widen};

/// The decode tables of an element's two bytes, each as large as can be.
const MAX_TABLES_BYTES: usize = 2 * (162 << 10);

/// Where a matrix can be read again.
#[derive(Debug)]
pub(crate) struct Source {
    checkpoint: Arc<Checkpoint>,
    info: TensorInfo,
    shape: [usize; 2],
    weight: WeightType,
    /// Of the rows, if elements are integers; else empty.
    scales: Arc<[f32]>,
    /// `None` if the file holds the elements themselves.
    record: Option<RecordPlace>,
    reader: Arc<Reader>,
    isa: Isa,
}

/// The readers of a checkpoint's files.
#[derive(Debug, Default)]
pub(crate) struct Readers(HashMap<PathBuf, Arc<Reader>>);

impl Readers {
    fn of(
        &mut self,
        checkpoint: &Checkpoint,
        info: &TensorInfo,
        direct: bool,
    ) -> std::io::Result<Arc<Reader>> {
        if let Some(reader) = self.0.get(&info.path) {
            return Ok(Arc::clone(reader));
        }
        let reader = Arc::new(Reader::new(&info.path, checkpoint.file(info), direct)?);
        self.0.insert(info.path.clone(), Arc::clone(&reader));
        Ok(reader)
    }
}

impl Source {
    /// Finds a matrix; nothing but its header is read.
    pub(crate) fn find(
        checkpoint: &Arc<Checkpoint>,
        name: &str,
        shape: [usize; 2],
        isa: Isa,
        direct: bool,
        readers: &mut Readers,
    ) -> Result<Self, RuntimeError> {
        let tensor = checkpoint.tensor(name)?.ok_or_else(|| missing(checkpoint, name))?;
        let weight = check(&tensor, name, &shape)?;
        let scales = match weight {
            WeightType::I8 => scales(checkpoint, name, shape[0], isa)?,
            _ => Arc::default(),
        };
        let record = match tensor.kind {
            TensorKind::Dense => None,
            TensorKind::Packed(record) => Some(record.place().clone()),
        };
        let reader = readers.of(checkpoint, tensor.info, direct)?;
        let (checkpoint, info) = (Arc::clone(checkpoint), tensor.info.clone());
        Ok(Self { checkpoint, info, shape, weight, scales, record, reader, isa })
    }

    /// The matrix in a layout, to stay in memory.
    pub(crate) fn load(&self, layout: Layout) -> Result<Matrix, RuntimeError> {
        let file = self.checkpoint.file(&self.info);
        let (shape, weight, isa) = (self.shape, self.weight, self.isa);
        let matrix = match &self.record {
            None => Matrix::from_dense(file, self.info.start(), shape, weight, layout, isa)
                .map_err(|error| self.failed(&error)),
            Some(place) => Matrix::from_record(&place.record(), file, shape, weight, layout, isa)
                .map_err(|error| self.failed(&error)),
        };
        Ok(self.scaled(matrix?))
    }

    fn scaled(&self, matrix: Matrix) -> Matrix {
        match self.weight {
            WeightType::I8 => matrix.with_scales(Arc::clone(&self.scales)),
            _ => matrix,
        }
    }

    /// Bytes it will take in a layout, about, or at most if it is encoded in memory.
    pub(crate) fn expected_bytes(&self, layout: Layout) -> usize {
        let original_bytes = self.info.original_bytes as usize + size_of_val(&*self.scales);
        match &self.record {
            None if layout == Layout::Rans => original_bytes + MAX_TABLES_BYTES,
            None => original_bytes,
            Some(place) => Matrix::expected_bytes(&place.record(), self.weight, layout),
        }
    }

    /// Bytes of memory it takes while it is in a buffer, tables included.
    pub(crate) fn buffer_bytes(&self) -> usize {
        let tables = self.record.as_ref().map_or(0, |_| {
            let beside = self.stored_bytes() + self.kept_bytes();
            // F32 is kept as it is, without tables or index.
            self.expected_bytes(Layout::Rans).saturating_sub(beside)
        });
        Reader::buffer_bytes(self.stored_bytes()) + tables
    }

    /// Bytes it takes in the file.
    fn stored_bytes(&self) -> usize {
        match &self.record {
            None => self.info.original_bytes as usize,
            Some(place) => place.header().tiles_bytes() as usize,
        }
    }

    /// Bytes that stay in memory when the matrix does not: the index of tiles
    /// and the scales.
    pub(crate) fn kept_bytes(&self) -> usize {
        let index = self.record.as_ref().map_or(0, |place| size_of_val(place.header().tiles()));
        index + size_of_val(&*self.scales)
    }

    /// Reads the matrix as it is in the file, into memory used before.
    pub(crate) fn read(&self, mut buffer: Vec<u8>) -> Result<Matrix, RuntimeError> {
        let start = match &self.record {
            None => self.info.start(),
            Some(place) => place.tiles_range().start,
        };
        let range = (self.reader.read(start, self.stored_bytes(), &mut buffer))
            .map_err(|error| self.failed(&error))?;
        let matrix = match &self.record {
            None => Ok(Matrix::from_elements(buffer, range, self.shape, self.weight)),
            Some(place) => {
                Matrix::from_tiles(place.record(), buffer, range, self.shape, self.weight)
                    .map_err(|error| self.failed(&error))
            }
        };
        Ok(self.scaled(matrix?))
    }

    /// Reads one row, widened to f32.
    pub(crate) fn read_row(&self, row: usize, out: &mut [f32]) -> Result<(), RuntimeError> {
        let file = self.checkpoint.file(&self.info);
        let cols = self.shape[1];
        let mut bytes = vec![0; cols * self.weight.elem_bytes()];
        match &self.record {
            None => {
                let start = self.info.start() + (row * bytes.len()) as u64;
                file.read_exact_at(&mut bytes, start).map_err(|error| self.failed(&error))?;
            }
            // Of this type the codec knows the bytes only.
            Some(place) if self.weight == WeightType::F32 => {
                let range = row * bytes.len()..(row + 1) * bytes.len();
                place
                    .record()
                    .read_slice_with(file, self.isa, 0..1, range, &mut bytes)
                    .map_err(|error| self.failed(&error))?;
            }
            Some(place) => place
                .record()
                .read_slice_with(file, self.isa, row..row + 1, 0..cols, &mut bytes)
                .map_err(|error| self.failed(&error))?,
        }
        out.copy_from_slice(&widen(&bytes, self.weight));
        if let Some(&scale) = self.scales.get(row) {
            out.iter_mut().for_each(|weight| *weight = round_to_f16(*weight * scale));
            if let Some(col) = out.iter().position(|weight| weight.is_infinite()) {
                return Err(self.failed(&DecodeError::Overflow { row, col }));
            }
        }
        Ok(())
    }

    /// An error that names tensor and file.
    pub(crate) fn failed(&self, reason: &dyn std::fmt::Display) -> RuntimeError {
        RuntimeError::Tensor {
            path: self.info.path.clone(),
            tensor: self.info.name.clone(),
            reason: reason.to_string(),
        }
    }
}
