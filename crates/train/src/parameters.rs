//! What is learned, and the weights that follow from it.

use burn_tensor::backend::Backend;
use burn_tensor::{FloatDType, Tensor};

use crate::model::{Role, TensorSpec};
use crate::quantize::{Granularity, fake_quantize, levels, rate, scales, stretched};
use crate::train::{Quantization, TrainOptions};

/// Scales start this far above the smallest, as `ln(scale / smallest - 1)`.
const INITIAL_STRETCH: f32 = -2.0;

/// A tensor of a checkpoint.
#[derive(Debug, Clone)]
pub struct Stored<B: Backend> {
    /// Its name and shape.
    pub spec: TensorSpec,
    /// Its values.
    pub values: Values<B>,
}

/// Values that a checkpoint can hold, as f32.
#[derive(Debug, Clone)]
pub enum Values<B: Backend> {
    /// Rounded to BF16.
    Bf16(Tensor<B, 2>),
    /// Integers and their scales, `[rows, 1]` or `[1, 1]`.
    Int8 {
        /// From -127 to 127.
        integers: Tensor<B, 2>,
        /// Any positive numbers.
        scales: Tensor<B, 2>,
    },
}

impl<B: Backend> Stored<B> {
    /// The weights that a model has of it.
    #[must_use]
    pub fn weights(&self) -> Tensor<B, 2> {
        match &self.values {
            Values::Bf16(weights) => weights.clone(),
            Values::Int8 { integers, scales } => {
                let product = integers.clone() * scales.clone();
                product.cast(FloatDType::F16).cast(FloatDType::F32)
            }
        }
    }
}

/// The tensors of a model, and the stretches of those whose scales are learned.
#[derive(Debug)]
pub(crate) struct Parameters {
    /// All of them: the model's first.
    pub(crate) specs: Vec<TensorSpec>,
    n_model: usize,
    quantization: Option<Quantization>,
}

impl Parameters {
    pub(crate) fn new(options: &TrainOptions) -> Self {
        let mut specs = options.model.tensors();
        let n_model = specs.len();
        if let Some(quantization) = options.quantization.filter(Quantization::learns_scales) {
            let stretch = |spec: &TensorSpec| TensorSpec {
                name: format!("{}_stretch", spec.name),
                rows: if quantization.granularity == Granularity::Channel { spec.rows } else { 1 },
                cols: 1,
                role: Role::Stretch,
            };
            let stretches: Vec<_> =
                specs.iter().filter(|spec| spec.role.is_linear()).map(stretch).collect();
            specs.extend(stretches);
        }
        Self { specs, n_model, quantization: options.quantization }
    }

    /// Their values before training.
    pub(crate) fn initial<B: Backend>(
        &self,
        options: &TrainOptions,
        device: &B::Device,
    ) -> Vec<Tensor<B, 2>> {
        let mut values = options.model.initial(options.seed, device);
        let stretch =
            |spec: &TensorSpec| Tensor::full([spec.rows, spec.cols], INITIAL_STRETCH, device);
        values.extend(self.specs[self.n_model..].iter().map(stretch));
        values
    }

    /// The model's tensors with, if they are rounded, their scales.
    fn with_scales<'a, B: Backend>(
        &'a self,
        values: &'a [Tensor<B, 2>],
    ) -> impl Iterator<Item = (&'a TensorSpec, &'a Tensor<B, 2>, Option<Tensor<B, 2>>)> {
        let (model, mut stretches) = (&values[..self.n_model], values[self.n_model..].iter());
        self.specs.iter().zip(model).map(move |(spec, weights)| {
            let quantization = self.quantization.filter(|_| spec.role.is_linear());
            let scales = quantization.map(|quantization| {
                // Learning is left to the stretch: a weight's size is not for its scale's sake.
                let smallest = scales(weights.clone().detach(), quantization.granularity);
                match stretches.next() {
                    Some(stretch) => stretched(smallest, stretch.clone()),
                    None => smallest,
                }
            });
            (spec, weights, scales)
        })
    }

    /// The weights that a forward pass computes with.
    pub(crate) fn weights<B: Backend>(&self, values: &[Tensor<B, 2>]) -> Vec<Tensor<B, 2>> {
        let weights = |(_, weights, scales): (_, &Tensor<B, 2>, Option<_>)| match scales {
            Some(scales) => fake_quantize(weights.clone(), scales),
            None => weights.clone(),
        };
        self.with_scales(values).map(weights).collect()
    }

    /// What the integers' entropy adds to the loss, if it does.
    pub(crate) fn rate<B: Backend>(&self, values: &[Tensor<B, 2>]) -> Option<Tensor<B, 1>> {
        let quantization = self.quantization.filter(Quantization::learns_scales)?;
        let linear = || self.specs.iter().filter(|spec| spec.role.is_linear());
        let n_weights: usize = linear().map(|spec| spec.rows * spec.cols).sum();
        self.with_scales(values)
            .filter_map(|(spec, weights, scales)| {
                let share = (spec.rows * spec.cols) as f64 / n_weights as f64;
                Some(rate(weights.clone(), scales?).mul_scalar(share * quantization.rate))
            })
            .reduce(|sum, rate| sum + rate)
    }

    /// The tensors of a checkpoint.
    pub(crate) fn stored<B: Backend>(&self, values: &[Tensor<B, 2>]) -> Vec<Stored<B>> {
        let stored =
            |(spec, weights, scales): (&TensorSpec, &Tensor<B, 2>, Option<Tensor<B, 2>>)| {
                let values = match scales {
                    Some(scales) => {
                        Values::Int8 { integers: levels(weights.clone(), scales.clone()), scales }
                    }
                    None => {
                        Values::Bf16(weights.clone().cast(FloatDType::BF16).cast(FloatDType::F32))
                    }
                };
                Stored { spec: spec.clone(), values }
            };
        self.with_scales(values).map(stored).collect()
    }
}
