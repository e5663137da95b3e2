//! Tensors of a checkpoint -> vectors of a model, and where its matrices are.

use std::sync::Arc;

use transom::checkpoint::{Checkpoint, SCALE_SUFFIX, Tensor, TensorKind};
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
            let tensor = loader.tensor(name)?;
            if check(&tensor, name, shape)? == WeightType::I8 && shape.len() != 2 {
                return Err(wrong_dtype(&tensor, name));
            }
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
        let bytes = read_bytes(&tensor, self.isa, length * weight.elem_bytes());
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
}

fn read_bytes(tensor: &Tensor<'_>, isa: Isa, n_bytes: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; n_bytes];
    match &tensor.kind {
        TensorKind::Dense => tensor
            .source()
            .read_exact_at(&mut bytes, tensor.start())
            .map_err(|error| error.to_string())?,
        TensorKind::Packed(record) => {
            let (rows, cols) = record.matrix_sides();
            record
                .read_slice_with(tensor.source(), isa, 0..rows, 0..cols, &mut bytes)
                .map_err(|error| error.to_string())?;
            if bytes.len() != n_bytes {
                return Err(format!("{} bytes, expected {n_bytes}", bytes.len()));
            }
        }
    }
    Ok(bytes)
}

/// The scales of the rows of a matrix of integers: `[rows, 1]`, or one for all
/// of them.
pub(crate) fn scales(
    checkpoint: &Checkpoint,
    matrix: &str,
    rows: usize,
    isa: Isa,
) -> Result<Arc<[f32]>, RuntimeError> {
    let name = matrix.to_owned() + SCALE_SUFFIX;
    let tensor = checkpoint.tensor(&name)?.ok_or_else(|| missing(checkpoint, &name))?;
    let wrong = |reason: String| RuntimeError::Scale {
        path: tensor.info.path.clone(),
        tensor: name.clone(),
        reason,
    };
    let shape = &tensor.info.shape;
    let n: usize = shape.iter().product();
    if !matches!(shape.as_slice(), [1] | [] | [_] | [_, 1]) || (n != 1 && n != rows) {
        return Err(wrong(format!("shape {shape:?}, expected [{rows}, 1] or [1]")));
    }
    let weight = WeightType::from_safetensors(&tensor.info.dtype)
        .filter(|weight| *weight != WeightType::I8)
        .ok_or_else(|| wrong(format!("{}, expected F32, BF16 or F16", tensor.info.dtype)))?;
    let bytes = read_bytes(&tensor, isa, n * weight.elem_bytes()).map_err(&wrong)?;
    let scales = widen(&bytes, weight);
    let is_scale = |scale: &f32| scale.is_finite() && *scale > 0.0;
    if let Some(row) = scales.iter().position(|scale| !is_scale(scale)) {
        return Err(wrong(format!("scale {row} is {}, expected a positive number", scales[row])));
    }
    Ok((0..rows).map(|row| scales[row.min(n - 1)]).collect())
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
    let weight = WeightType::from_safetensors(&tensor.info.dtype);
    weight.ok_or_else(|| wrong_dtype(tensor, name))
}

fn wrong_dtype(tensor: &Tensor<'_>, name: &str) -> RuntimeError {
    RuntimeError::TensorDtype {
        path: tensor.info.path.clone(),
        tensor: name.to_owned(),
        found: tensor.info.dtype.clone(),
    }
}

fn failed(tensor: &Tensor<'_>, name: &str, reason: String) -> RuntimeError {
    RuntimeError::Tensor { path: tensor.info.path.clone(), tensor: name.to_owned(), reason }
}

/// Elements as f32, exactly; integers as they are, without their scales.
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
        WeightType::I8 => bytes.iter().map(|b| f32::from(*b as i8)).collect(),
    }
}
