//! Where a run stands, in a file.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;

use burn_tensor::backend::Backend;
use burn_tensor::{Tensor, TensorData};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::error::{At, TrainError};
use crate::model::TensorSpec;

/// Key of the metadata that holds the step.
const STEP: &str = "step";
/// Key of the metadata that holds what the run was asked for.
const RUN: &str = "run";
/// Prefixes of parameters, and of the optimiser's two moments.
const GROUPS: [&str; 3] = ["parameters.", "first_moments.", "second_moments."];

/// Parameters and moments after a number of steps.
#[derive(Debug, Clone)]
pub struct State<B: Backend> {
    /// Steps done.
    pub step: usize,
    /// Parameters.
    pub parameters: Vec<Tensor<B, 2>>,
    /// Running means of the gradients.
    pub first: Vec<Tensor<B, 2>>,
    /// Running means of their squares.
    pub second: Vec<Tensor<B, 2>>,
}

impl<B: Backend> State<B> {
    /// The state before the first step.
    #[must_use]
    pub fn new(parameters: Vec<Tensor<B, 2>>) -> Self {
        let zeros = || parameters.iter().map(Tensor::zeros_like).collect();
        Self { step: 0, first: zeros(), second: zeros(), parameters }
    }

    /// Writes the state with `run`, a description of what the run was asked
    /// for. A state that was there stays until this one is whole.
    ///
    /// # Errors
    ///
    /// [`TrainError::Io`] if writing fails.
    pub fn save(&self, path: &Path, specs: &[TensorSpec], run: &str) -> Result<(), TrainError> {
        let mut tensors = Vec::new();
        for (group, values) in GROUPS.iter().zip([&self.parameters, &self.first, &self.second]) {
            for (spec, value) in specs.iter().zip(values) {
                let bytes = bytemuck::cast_slice(&floats(value.clone())).to_vec();
                tensors.push((format!("{group}{}", spec.name), vec![spec.rows, spec.cols], bytes));
            }
        }
        let mut views = Vec::new();
        for (name, shape, bytes) in &tensors {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
            views.push((name, view.map_err(|error| wrong(path, error))?));
        }
        let metadata = HashMap::from([
            (STEP.to_owned(), self.step.to_string()),
            (RUN.to_owned(), run.to_owned()),
        ]);
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| wrong(path, e))?;
        write_whole(path, &bytes)
    }

    /// Reads a state that was written for the same `run`.
    ///
    /// # Errors
    ///
    /// [`TrainError::Io`] if it cannot be read, [`TrainError::State`] if it is
    /// damaged or that of another run.
    pub fn load(
        path: &Path,
        specs: &[TensorSpec],
        run: &str,
        device: &B::Device,
    ) -> Result<Self, TrainError> {
        let bytes = fs::read(path).at(path)?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| wrong(path, error))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        if metadata.get(RUN).map(String::as_str) != Some(run) {
            return Err(wrong(path, "was written by a run with other options or texts"));
        }
        let step = metadata.get(STEP).and_then(|step| step.parse().ok());
        let step = step.ok_or_else(|| wrong(path, "does not say its step"))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|error| wrong(path, error))?;
        let group = |prefix: &str| -> Result<Vec<Tensor<B, 2>>, TrainError> {
            let mut values = Vec::new();
            for spec in specs {
                let name = format!("{prefix}{}", spec.name);
                let view = tensors.tensor(&name).map_err(|error| wrong(path, error))?;
                if view.dtype() != Dtype::F32 || view.shape() != [spec.rows, spec.cols] {
                    return Err(wrong(path, format!("{name} has another type or shape")));
                }
                let elements: Vec<f32> = bytemuck::pod_collect_to_vec(view.data());
                let data = TensorData::new(elements, [spec.rows, spec.cols]);
                values.push(Tensor::from_data(data, device));
            }
            Ok(values)
        };
        let [parameters, first, second] = GROUPS;
        Ok(Self {
            step,
            parameters: group(parameters)?,
            first: group(first)?,
            second: group(second)?,
        })
    }
}

/// The elements of a tensor.
pub(crate) fn floats<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// Writes a file that is there whole or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    let partial = Path::new(&name);
    fs::write(partial, bytes).at(partial)?;
    File::open(partial).and_then(|file| file.sync_all()).at(partial)?;
    fs::rename(partial, path).at(path)
}

fn wrong(path: &Path, reason: impl ToString) -> TrainError {
    TrainError::State { path: path.to_owned(), reason: reason.to_string() }
}
