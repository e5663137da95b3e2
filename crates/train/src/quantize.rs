//! Weights as integers of 8 bits times a scale, in a way that can be trained.
//!
//! In the forward pass a weight w is `q * scale` rounded to FP16, with `q = round(w / scale)`,
//! ties to even, and `scale` the largest magnitude divided by 127; its gradient is that of
//! w, as if nothing had been rounded (the straight-through estimator of Bengio, Léonard
//! and Courville, arXiv 1308.3432). These are the weights that `transom` runs.

use std::f64::consts::LN_2;

use burn_tensor::backend::Backend;
use burn_tensor::{FloatDType, Tensor};
use serde::{Deserialize, Serialize};

/// Largest integer.
pub const MAX_LEVEL: f32 = 127.0;

/// What shares a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Granularity {
    /// A whole matrix.
    Tensor,
    /// A row, which is an output of the layer.
    Channel,
}

impl Granularity {
    /// The name in `quantization_config`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tensor => "tensor",
            Self::Channel => "channel",
        }
    }
}

/// Scales of a matrix, `[rows, 1]` or `[1, 1]`: its largest magnitude divided by 127, 1 for
/// zeros.
#[must_use]
pub fn scales<B: Backend>(weights: Tensor<B, 2>, granularity: Granularity) -> Tensor<B, 2> {
    let magnitudes = weights.abs();
    let largest = match granularity {
        Granularity::Channel => magnitudes.max_dim(1),
        Granularity::Tensor => magnitudes.max_dim(1).max_dim(0),
    };
    let zero = largest.clone().equal_elem(0.0);
    // 127 / 127 is 1.
    largest.mask_fill(zero, MAX_LEVEL).div_scalar(MAX_LEVEL)
}

/// Scales widened by `1 + exp(stretch)`, so that fewer integers are used; no weight is ever
/// clamped.
#[must_use]
pub fn stretched<B: Backend>(scales: Tensor<B, 2>, stretch: Tensor<B, 2>) -> Tensor<B, 2> {
    scales * stretch.exp().add_scalar(1.0)
}

/// The integers of a matrix, as floats.
#[must_use]
pub fn levels<B: Backend>(weights: Tensor<B, 2>, scales: Tensor<B, 2>) -> Tensor<B, 2> {
    round_half_even(weights / scales).clamp(-MAX_LEVEL, MAX_LEVEL)
}

/// The weights as they are once quantised.
///
/// Roundings have the gradient of what they round: a weight has that of its rounded one, a scale
/// that of Esser et al., "Learned Step Size Quantization", section 2.1.
#[must_use]
pub fn fake_quantize<B: Backend>(weights: Tensor<B, 2>, scales: Tensor<B, 2>) -> Tensor<B, 2> {
    let integers = levels(weights.clone().detach(), scales.clone().detach());
    let steps = weights / scales.clone();
    let product = with_gradient_of(integers, steps) * scales;
    let rounded = product.clone().detach().cast(FloatDType::F16).cast(FloatDType::F32);
    with_gradient_of(rounded, product)
}

/// `value` with the gradient of `source`: the difference is 0 exactly.
fn with_gradient_of<B: Backend>(value: Tensor<B, 2>, source: Tensor<B, 2>) -> Tensor<B, 2> {
    value + (source.clone() - source.detach())
}

/// A differentiable estimate of the entropy of the integers of a matrix, in bits a weight: that of
/// the two-sided geometric distribution with their mean magnitude, which has the largest entropy
/// of all such distributions, so that it is a bound.
///
/// Its value is that of the integers, its gradient that of the weights in units of their scales.
#[must_use]
pub fn rate<B: Backend>(weights: Tensor<B, 2>, scales: Tensor<B, 2>) -> Tensor<B, 1> {
    let integers = levels(weights.clone().detach(), scales.clone().detach());
    let soft = (weights / scales).abs().mean();
    geometric_entropy(soft.clone() - soft.detach() + integers.abs().mean())
}

/// Entropy of the two-sided geometric distribution with mean magnitude m.
///
/// With `r = sqrt(1 + m²)` its parameter is `t = (r - 1) / m`, which is written
/// here as `m / (r + 1)`, and the probability of 0 is `(1 - t) / (1 + t)`.
fn geometric_entropy<B: Backend>(mean: Tensor<B, 1>) -> Tensor<B, 1> {
    // Far below what any matrix that is not all zeros has; keeps logarithms finite.
    let m = mean.clamp_min(1e-9);
    let root = (m.clone() * m.clone()).add_scalar(1.0).sqrt();
    let t = m.clone() / root.add_scalar(1.0);
    let zero = t.clone().neg().add_scalar(1.0).log() - t.clone().add_scalar(1.0).log();
    (zero + m * t.log()).neg().div_scalar(LN_2)
}

/// Entropy of the integers themselves, in bits each: what an entropy coder needs.
#[must_use]
pub fn entropy<B: Backend>(integers: Tensor<B, 2>) -> f64 {
    let mut counts = [0_u64; 256];
    let mut n = 0_u64;
    for integer in integers.into_data().iter::<f32>() {
        counts[usize::from(integer as i8 as u8)] += 1;
        n += 1;
    }
    let share = |count: u64| count as f64 / n as f64;
    counts.iter().filter(|count| **count > 0).map(|c| -share(*c) * share(*c).log2()).sum()
}

/// Rounds to the nearest integer, ties to even, with nothing but floors: how
/// backends round ties differs.
fn round_half_even<B: Backend>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    let floor = x.clone().floor();
    let rest = x - floor.clone();
    let odd = floor.clone() - floor.clone().mul_scalar(0.5).floor().mul_scalar(2.0);
    let above = rest.clone().greater_elem(0.5).float();
    let tie = rest.equal_elem(0.5).float();
    floor + above + tie * odd
}
