//! Tensors of a checkpoint -> vectors of a model, and where its matrices are.

use std::sync::Arc;

use transom::checkpoint::{Checkpoint, Tensor, TensorKind};
use transom::layout::WeightType;
use transom::{Isa, ReadAt};

use crate::config::Config;
use crate::error::RuntimeError;
use crate::model::LoadProgress;
use crate::store::{self, MatrixInfo, Readers, Source};
use crate::tensors;

/// Loads the vectors of a model, and finds its matrices.
pub(crate) struct Loader<'a> {
    checkpoint: &'a Arc<Checkpoint>,
    isa: Isa,
    progress: &'a mut dyn FnMut(LoadProgress),
    state: LoadProgress,
}

impl<'a> Loader<'a> {
    /// A loader that has found every tensor the configuration calls for.
    pub(crate) fn new(
        checkpoint: &'a Arc<Checkpoint>,
        config: &Config,
        isa: Isa,
        progress: &'a mut dyn FnMut(LoadProgress),
    ) -> Result<Self, RuntimeError> {
        let wanted = tensors::all(config);
        let state = LoadProgress { n_tensors: 0, n_tensors_total: wanted.len(), weights_bytes: 0 };
        let loader = Self { checkpoint, isa, progress, state };
        for (name, shape) in &wanted {
            check(&loader.tensor(name)?, name, shape)?;
        }
        Ok(loader)
    }

    /// Bytes of everything loaded.
    pub(crate) const fn weights_bytes(&self) -> usize {
        self.state.weights_bytes
    }

    /// Where the matrices of a model are; `direct` as in [`crate::StoreOptions`].
    pub(crate) fn sources(
        &self,
        config: &Config,
        direct: bool,
    ) -> Result<Vec<Source>, RuntimeError> {
        let mut readers = Readers::default();
        store::matrices(config)
            .iter()
            .map(|MatrixInfo { name, rows, cols }| {
                let shape = [*rows, *cols];
                Source::find(self.checkpoint, name, shape, self.isa, direct, &mut readers)
            })
            .collect()
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

    /// Counts a tensor that has been loaded.
    pub(crate) fn loaded(&mut self, n_bytes: usize) {
        self.state.n_tensors += 1;
        self.state.weights_bytes += n_bytes;
        (self.progress)(self.state);
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'a>, RuntimeError> {
        self.checkpoint.tensor(name)?.ok_or_else(|| missing(self.checkpoint, name))
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
                    .read_slice_with(tensor.source(), self.isa, 0..rows, 0..cols, &mut bytes)
                    .map_err(|error| error.to_string())?;
                if bytes.len() != n_bytes {
                    return Err(format!("{} bytes, expected {n_bytes}", bytes.len()));
                }
            }
        }
        Ok(bytes)
    }
}

/// The error for a tensor that is not there.
pub(crate) fn missing(checkpoint: &Checkpoint, name: &str) -> RuntimeError {
    RuntimeError::MissingTensor { path: checkpoint.root().to_owned(), tensor: name.to_owned() }
}

/// The element type of a tensor that has the shape it should have.
pub(crate) fn check(
    tensor: &Tensor<'_>,
    name: &str,
    shape: &[usize],
) -> Result<WeightType, RuntimeError> {
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
pub(crate) fn widen(bytes: &[u8], weight: WeightType) -> Vec<f32> {
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
