//! Tensors of a checkpoint -> matrices and vectors of a model.

use transom::ReadAt;
use transom::checkpoint::{Checkpoint, Tensor, TensorKind};
use transom::layout::{Matrix, WeightType};

use crate::config::Config;
use crate::error::RuntimeError;
use crate::model::{LoadOptions, LoadProgress};
use crate::tensors;

/// Loads the tensors of a model one after the other.
///
/// This is the one place that knows where weights come from; a store that
/// keeps layers elsewhere than in memory takes its place.
pub(crate) struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    options: LoadOptions,
    progress: &'a mut dyn FnMut(LoadProgress),
    state: LoadProgress,
}

impl<'a> Loader<'a> {
    /// A loader that has found every tensor the configuration calls for.
    pub(crate) fn new(
        checkpoint: &'a Checkpoint,
        config: &Config,
        options: LoadOptions,
        progress: &'a mut dyn FnMut(LoadProgress),
    ) -> Result<Self, RuntimeError> {
        let wanted = tensors::all(config);
        let state = LoadProgress { n_tensors: 0, n_tensors_total: wanted.len(), weights_bytes: 0 };
        let loader = Self { checkpoint, options, progress, state };
        for (name, shape) in &wanted {
            check(&loader.tensor(name)?, name, shape)?;
        }
        Ok(loader)
    }

    /// Bytes of everything loaded.
    pub(crate) const fn weights_bytes(&self) -> usize {
        self.state.weights_bytes
    }

    /// A weight matrix in the layout asked for.
    pub(crate) fn matrix(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Matrix, RuntimeError> {
        let tensor = self.tensor(name)?;
        let weight = check(&tensor, name, &[rows, cols])?;
        let matrix = self.read_matrix(&tensor, weight, [rows, cols]);
        let matrix = matrix.map_err(|reason| failed(&tensor, name, reason))?;
        self.loaded(matrix.resident_bytes());
        Ok(matrix)
    }

    /// A norm's weights or a bias, widened to f32.
    pub(crate) fn vector(&mut self, name: &str, length: usize) -> Result<Vec<f32>, RuntimeError> {
        let tensor = self.tensor(name)?;
        let weight = check(&tensor, name, &[length])?;
        let bytes = self.read_bytes(&tensor, length * weight.elem_bytes());
        let bytes = bytes.map_err(|reason| failed(&tensor, name, reason))?;
        let vector = widen(&bytes, weight);
        self.loaded(size_of_val(vector.as_slice()));
        Ok(vector)
    }

    fn loaded(&mut self, n_bytes: usize) {
        self.state.n_tensors += 1;
        self.state.weights_bytes += n_bytes;
        (self.progress)(self.state);
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'a>, RuntimeError> {
        self.checkpoint.tensor(name)?.ok_or_else(|| RuntimeError::MissingTensor {
            path: self.checkpoint.root().to_owned(),
            tensor: name.to_owned(),
        })
    }

    fn read_matrix(
        &self,
        tensor: &Tensor<'_>,
        weight: WeightType,
        shape: [usize; 2],
    ) -> Result<Matrix, String> {
        let LoadOptions { layout, isa } = self.options;
        match &tensor.kind {
            TensorKind::Dense => {
                Matrix::from_dense(tensor.source(), tensor.start(), shape, weight, layout, isa)
                    .map_err(|error| error.to_string())
            }
            TensorKind::Packed(record) => {
                Matrix::from_record(record, tensor.source(), shape, weight, layout, isa)
                    .map_err(|error| error.to_string())
            }
        }
    }

    fn read_bytes(&self, tensor: &Tensor<'_>, n_bytes: usize) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0; n_bytes];
        match &tensor.kind {
            TensorKind::Dense => tensor
                .source()
                .read_exact_at(&mut bytes, tensor.start())
                .map_err(|error| error.to_string())?,
            TensorKind::Packed(record) => {
                let (rows, cols) = record.matrix_sides();
                record
                    .read_slice_with(
                        tensor.source(),
                        self.options.isa,
                        0..rows,
                        0..cols,
                        &mut bytes,
                    )
                    .map_err(|error| error.to_string())?;
                if bytes.len() != n_bytes {
                    return Err(format!("{} bytes, expected {n_bytes}", bytes.len()));
                }
            }
        }
        Ok(bytes)
    }
}

fn check(tensor: &Tensor<'_>, name: &str, shape: &[usize]) -> Result<WeightType, RuntimeError> {
    let expected: Vec<u64> = shape.iter().map(|&side| side as u64).collect();
    let found: Vec<u64> = tensor.info.shape.iter().map(|&side| side as u64).collect();
    if found != expected {
        return Err(RuntimeError::TensorShape {
            path: tensor.info.path.clone(),
            tensor: name.to_owned(),
            found,
            expected,
        });
    }
    WeightType::from_safetensors(&tensor.info.dtype).ok_or_else(|| RuntimeError::TensorDtype {
        path: tensor.info.path.clone(),
        tensor: name.to_owned(),
        found: tensor.info.dtype.clone(),
    })
}

fn failed(tensor: &Tensor<'_>, name: &str, reason: String) -> RuntimeError {
    RuntimeError::Tensor { path: tensor.info.path.clone(), tensor: name.to_owned(), reason }
}

/// Elements as f32, exactly.
fn widen(bytes: &[u8], weight: WeightType) -> Vec<f32> {
    let half = |f: fn(u16) -> f32| {
        bytes.as_chunks::<2>().0.iter().map(|b| f(u16::from_le_bytes(*b))).collect()
    };
    match weight {
        WeightType::Bf16 => half(|bits| half::bf16::from_bits(bits).to_f32()),
        WeightType::F16 => half(|bits| half::f16::from_bits(bits).to_f32()),
        WeightType::F32 => {
            bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
        }
    }
}
