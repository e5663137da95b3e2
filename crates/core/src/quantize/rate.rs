//! Scales and integers that meet a number of bits with little error.
//!
//! The integers of a matrix are entropy-coded with one table, so what matters
//! is their entropy, and it pays to round some weights towards zero, to an
//! integer that is cheaper. Integers `q`, scales `s` and the frequencies `p`
//! that follow from the integers are chosen in turns (entropy-constrained
//! quantisation: Chou, Lookabaugh and Gray, 1989) to minimise, for each row,
//!
//! ```text
//! sum of h (w - q s)^2  +  lambda * sum of -log2 p(q)
//! ```
//!
//! `h` is the mean square of the weight's input, so that the first sum is the
//! error of the row's output if inputs are uncorrelated, or 1. A step `d` costs
//! `h d^2 / 12` a weight and saves `log2 d` bits, so that the price at which it is
//! worth its error is `lambda = h d^2 ln(2) / 6`: the search is one over `d`.
//!
//! The step of a row is proportional to its root mean square: outputs count by
//! their relative error. One step for all rows would leave less error in sum, but
//! models bear it worse (`docs/experiments/int8-rate.md`).

use rayon::prelude::*;

use super::{Granularity, MAX_LEVEL, absmax_scale, dequantise, quantise as nearest};
use crate::dtype::Dtype;
use crate::isa::Isa;
use crate::model::Histogram;
use crate::record::encode_record;

/// Weights that the search for the step looks at, about.
const SAMPLE_ELEMS: usize = 1 << 18;
/// Rounds of choosing scales and integers, then frequencies.
const N_ROUNDS: usize = 5;
/// Halvings of the interval of steps, or of levels of the baseline.
const N_HALVINGS: usize = 14;
/// Attempts to come close to the target from below.
const N_ATTEMPTS: usize = 6;
/// A result this near below the target, in bits a weight, is near enough.
const NEAR_ENOUGH: f64 = 0.005;
/// Factors by which a scale is varied in each round.
const FACTORS: [f32; 5] = [1.0, 0.82, 0.92, 1.08, 1.2];
/// Share of the mean that is added to every input's mean square, so that no
/// weight is free because a text does not use its input.
const DAMPING: f32 = 0.01;

/// A matrix to quantise.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    /// Row-major, finite.
    pub weights: &'a [f32],
    /// Columns.
    pub cols: usize,
    /// Mean square of the input of each column; all count the same without.
    pub input_squares: Option<&'a [f32]>,
}

/// A matrix of integers.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantised {
    /// Row-major signed bytes.
    pub integers: Vec<u8>,
    /// One, or one for each row.
    pub scales: Vec<f32>,
    /// Size and error.
    pub report: RateReport,
}

/// Size and error of a quantised matrix, and of the baseline: scales `absmax / L`
/// with the greatest `L` that meets the bits.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct RateReport {
    /// Bits that a weight takes in the record of the integers.
    pub bits: f64,
    /// Root of the sum of squared errors over that of the squared weights,
    /// each times its input's mean square.
    pub error: f64,
    /// The bits of the baseline.
    pub baseline_bits: f64,
    /// Its error.
    pub baseline_error: f64,
}

/// Quantises a matrix to at most `target_bits` a weight, as its record takes
/// them; to as few as possible where the record of so small a matrix cannot
/// meet them. Never worse than the baseline, which `baseline` asks for.
///
/// # Panics
///
/// If there are not whole rows of weights, or not as many input squares as columns.
///
/// # Cost
///
/// Some twenty passes over the matrix, and a hundred over at most 262,144 of
/// its weights, in parallel. Five bytes a weight beside the weights.
#[must_use]
pub fn quantise(
    matrix: &Matrix<'_>,
    granularity: Granularity,
    target_bits: f64,
    baseline: bool,
) -> Quantised {
    assert_eq!(matrix.weights.len() % matrix.cols.max(1), 0, "part of a row");
    assert!(matrix.input_squares.is_none_or(|h| h.len() == matrix.cols), "inputs and columns");
    let search = Search::new(matrix, granularity);
    let usual = search.baseline(target_bits);
    let (baseline_bits, baseline_error) = (search.bits(&usual), search.error(&usual));
    let mut best = (usual, baseline_bits, baseline_error);
    if !baseline && let Some(found) = search.optimise(target_bits, &best) {
        best = found;
    }
    let (levels, bits, error) = best;
    let report = RateReport { bits, error, baseline_bits, baseline_error };
    Quantised { integers: levels.integers, scales: levels.scales, report }
}

/// Integers and their scales.
#[derive(Debug, Clone)]
struct Levels {
    integers: Vec<u8>,
    scales: Vec<f32>,
}

impl Levels {
    fn histogram(&self) -> Histogram {
        let mut histogram = Histogram::default();
        histogram.add(&self.integers);
        histogram
    }
}

struct Search<'a> {
    weights: &'a [f32],
    cols: usize,
    /// Weights that share a scale: a row or all.
    group: usize,
    /// Of each column, their mean 1; damped.
    sensitivities: Vec<f32>,
    input_squares: Option<&'a [f32]>,
    /// Root mean square of the weights.
    deviation: f32,
}

impl<'a> Search<'a> {
    fn new(matrix: &Matrix<'a>, granularity: Granularity) -> Self {
        let cols = matrix.cols;
        let squares = matrix.input_squares.map_or_else(|| vec![1.0; cols], <[f32]>::to_vec);
        let mean = squares.iter().sum::<f32>() / cols.max(1) as f32;
        // Inputs that are all zero tell nothing.
        let usable = mean.is_normal() && squares.iter().all(|square| *square >= 0.0);
        let sensitivities = match usable {
            true => squares.iter().map(|h| (h / mean + DAMPING) / (1.0 + DAMPING)).collect(),
            false => vec![1.0; cols],
        };
        let group = match granularity {
            Granularity::Tensor => matrix.weights.len(),
            Granularity::Channel => cols,
        };
        let power: f64 = matrix.weights.par_iter().map(|w| f64::from(*w).powi(2)).sum();
        let deviation = (power / matrix.weights.len().max(1) as f64).sqrt() as f32;
        Self {
            deviation,
            weights: matrix.weights,
            cols,
            group: group.max(1),
            sensitivities,
            input_squares: matrix.input_squares.filter(|_| usable),
        }
    }

    // -----------------------------------------------------------------------
    // What a choice costs

    /// Bits a weight of the record.
    fn bits(&self, levels: &Levels) -> f64 {
        let shape = [self.weights.len() / self.cols.max(1), self.cols];
        let record = encode_record(Isa::best(), Dtype::I8, &shape, &levels.integers);
        let n_bytes = record.expect("integers of this shape").len();
        n_bytes as f64 * 8.0 / self.weights.len().max(1) as f64
    }

    /// See [`RateReport::error`].
    fn error(&self, levels: &Levels) -> f64 {
        let square = |col: usize| self.input_squares.map_or(1.0, |squares| squares[col]);
        let (error, total) = (self.weights.par_chunks(self.group))
            .zip(levels.integers.par_chunks(self.group))
            .zip(&levels.scales)
            .map(|((weights, integers), scale)| {
                let (mut error, mut total) = (0.0, 0.0);
                for (index, (weight, q)) in weights.iter().zip(integers).enumerate() {
                    let h = f64::from(square(index % self.cols));
                    error += h * f64::from(weight - dequantise(*q as i8, *scale)).powi(2);
                    total += h * f64::from(*weight).powi(2);
                }
                (error, total)
            })
            .collect::<Vec<_>>()
            .into_iter()
            .fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
        if total > 0.0 { (error / total).sqrt() } else { 0.0 }
    }

    // -----------------------------------------------------------------------
    // The baseline

    fn plain(&self, level: f64) -> Levels {
        let scales: Vec<f32> = (self.weights.par_chunks(self.group))
            .map(|weights| {
                let absmax = weights.iter().fold(0.0f32, |max, w| max.max(w.abs()));
                absmax_scale(absmax * (f64::from(MAX_LEVEL) / level) as f32)
            })
            .collect();
        let integers = (self.weights.par_chunks(self.group).zip(&scales))
            .flat_map_iter(|(weights, scale)| weights.iter().map(|w| nearest(*w, *scale) as u8))
            .collect();
        Levels { integers, scales }
    }

    /// The greatest level that meets the bits.
    fn baseline(&self, target_bits: f64) -> Levels {
        let most = self.plain(f64::from(MAX_LEVEL));
        if self.bits(&most) <= target_bits {
            return most;
        }
        let (mut low, mut high) = (0.4f64.ln(), f64::from(MAX_LEVEL).ln());
        let mut best = self.plain(low.exp());
        for _ in 0..N_HALVINGS {
            let middle = (low + high) / 2.0;
            let levels = self.plain(middle.exp());
            if self.bits(&levels) <= target_bits {
                (low, best) = (middle, levels);
            } else {
                high = middle;
            }
        }
        best
    }

    // -----------------------------------------------------------------------
    // The search

    /// The best choice found that meets the bits and has less error than
    /// `usual`, which comes with its bits and error.
    fn optimise(&self, target_bits: f64, usual: &(Levels, f64, f64)) -> Option<(Levels, f64, f64)> {
        let sample = self.sample();
        let part = Search {
            weights: &sample,
            group: if self.group == self.cols { self.cols } else { sample.len().max(1) },
            sensitivities: self.sensitivities.clone(),
            ..*self
        };
        if self.deviation == 0.0 {
            return None;
        }
        // Meeting what the baseline needs is enough where the target is out of reach.
        let most = target_bits.max(usual.1);
        let mut wanted = most;
        let mut best: Option<(Levels, f64, f64)> = None;
        for _ in 0..N_ATTEMPTS {
            let step = part.step_for(wanted);
            let levels = self.levels(step, N_ROUNDS);
            let (bits, error) = (self.bits(&levels), self.error(&levels));
            let least = best.as_ref().map_or(usual.2, |best| best.2);
            if bits <= most && error < least {
                best = Some((levels, bits, error));
            }
            if (most - NEAR_ENOUGH..=most).contains(&bits) {
                break;
            }
            wanted += most - NEAR_ENOUGH / 2.0 - bits;
        }
        best
    }

    /// Every so many rows.
    fn sample(&self) -> Vec<f32> {
        let every = self.weights.len().div_ceil(SAMPLE_ELEMS).max(1);
        self.weights.chunks(self.cols.max(1)).step_by(every).flatten().copied().collect()
    }

    /// The step at which the integers have an entropy of `bits`.
    fn step_for(&self, bits: f64) -> f32 {
        // That of a Gaussian is near it.
        let guess = f64::from(self.deviation).ln() + (2.05 - bits) * std::f64::consts::LN_2;
        let (mut low, mut high) = (guess - 3.0, guess + 3.0);
        for _ in 0..N_HALVINGS {
            let middle = (low + high) / 2.0;
            let levels = self.levels(middle.exp() as f32, N_ROUNDS);
            if levels.histogram().entropy() > bits {
                low = middle;
            } else {
                high = middle;
            }
        }
        high.exp() as f32
    }

    /// Integers and scales at the price that belongs to a step.
    fn levels(&self, step: f32, n_rounds: usize) -> Levels {
        let scales: Vec<f32> = (self.weights.par_chunks(self.group))
            .map(|weights| {
                let absmax = weights.iter().fold(0.0f32, |max, w| max.max(w.abs()));
                (step * self.coarseness(weights)).max(absmax / MAX_LEVEL)
            })
            .collect();
        let mut levels = self.round(&scales, 0.0, &[0.0; 256], &[1.0]);
        for _ in 0..n_rounds {
            let costs = costs(&levels.histogram());
            levels = self.round(&levels.scales, step, &costs, &FACTORS);
        }
        levels
    }

    /// The step of some weights that share a scale, relative to that of all.
    fn coarseness(&self, weights: &[f32]) -> f32 {
        let squares: f32 = weights.iter().map(|w| w * w).sum();
        let relative = (squares / weights.len() as f32).sqrt() / self.deviation;
        if relative.is_normal() { relative } else { 1.0 }
    }

    /// The best of some multiples of every scale, and the integers for it.
    fn round(&self, scales: &[f32], step: f32, costs: &[f32; 256], factors: &[f32]) -> Levels {
        let mut integers = vec![0; self.weights.len()];
        let groups = (self.weights.par_chunks(self.group))
            .zip(integers.par_chunks_mut(self.group))
            .zip(scales);
        let scales = groups
            .map(|((weights, integers), scale)| {
                let step = step * self.coarseness(weights);
                let lambda = step * step * std::f32::consts::LN_2 / 6.0;
                let tried = factors.par_iter().map(|factor| {
                    let mut tried = vec![0; weights.len()];
                    let found = self.choose(weights, scale * factor, lambda, costs, &mut tried);
                    (found, scale * factor, tried)
                });
                let tried: Vec<_> = tried.collect();
                let best = (tried.into_iter())
                    .min_by(|a, b| a.0.cost.total_cmp(&b.0.cost))
                    .expect("at least one factor");
                let (found, scale, chosen) = best;
                integers.copy_from_slice(&chosen);
                // The scale with the least error for these integers.
                let fitted = (found.weight_level / found.level_level) as f32;
                match fitted {
                    _ if found.level_level == 0.0 => 1.0f32.min(scale),
                    s if s.is_finite() && s > 0.0 => s,
                    _ => scale,
                }
            })
            .collect();
        Levels { integers, scales }
    }

    /// For each weight the nearest integer or the next towards zero, whichever
    /// has the lower cost.
    fn choose(
        &self,
        weights: &[f32],
        scale: f32,
        lambda: f32,
        costs: &[f32; 256],
        integers: &mut [u8],
    ) -> Found {
        let mut found = Found::default();
        let inverse = 1.0 / scale;
        let rows = weights.chunks(self.cols).zip(integers.chunks_mut(self.cols));
        for (weights, integers) in rows {
            // A row at a time: f32 holds its sums well enough.
            let (mut cost, mut weight_level, mut level_level) = (0.0f32, 0.0f32, 0.0f32);
            let weights = weights.iter().zip(&self.sensitivities);
            for (out, (weight, h)) in integers.iter_mut().zip(weights) {
                let level = (weight * inverse).round_ties_even().clamp(-MAX_LEVEL, MAX_LEVEL);
                let inner = level - if level == 0.0 { 0.0 } else { level.signum() };
                let cost_of = |level: f32| {
                    let error = weight - level * scale;
                    h * error * error + lambda * costs[usize::from(level as i8 as u8)]
                };
                let (near, cheap) = (cost_of(level), cost_of(inner));
                let (level, least) = if cheap < near { (inner, cheap) } else { (level, near) };
                *out = level as i8 as u8;
                cost += least;
                weight_level += h * weight * level;
                level_level += h * level * level;
            }
            found.cost += f64::from(cost);
            found.weight_level += f64::from(weight_level);
            found.level_level += f64::from(level_level);
        }
        found
    }
}

/// Sums over weights that share a scale.
#[derive(Debug, Default, Clone, Copy)]
struct Found {
    cost: f64,
    /// Of sensitivity, weight and integer.
    weight_level: f64,
    /// Of sensitivity and squared integer.
    level_level: f64,
}

/// Bits that each integer takes; those that do not occur count as half of one.
fn costs(histogram: &Histogram) -> [f32; 256] {
    let total = histogram.total().max(1) as f64;
    histogram.counts.map(|count| (total / (count as f64).max(0.5)).log2() as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Roughly normal weights whose deviation differs from row to row, with
    /// rare ones far away.
    fn weights(rows: usize, cols: usize) -> Vec<f32> {
        let mut state = 0x9E37_79B9_7F4A_7C15u64;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u32 << 24) as f32
        };
        let mut normal = || (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
        let mut out = Vec::new();
        for _ in 0..rows {
            let deviation = 0.02 * (0.3 * normal()).exp();
            for col in 0..cols {
                let rare = if col % 499 == 0 { 6.0 } else { 1.0 };
                out.push(deviation * rare * normal());
            }
        }
        out
    }

    #[test]
    fn every_target_is_met_with_less_error_than_the_baseline() {
        let weights = weights(192, 512);
        let input_squares: Vec<f32> = (0..512).map(|c| 0.1 + (c % 37) as f32).collect();
        for granularity in [Granularity::Tensor, Granularity::Channel] {
            for input_squares in [None, Some(&input_squares[..])] {
                for bits in [3.0, 4.0, 5.0, 6.0, 7.0] {
                    let matrix = Matrix { weights: &weights, cols: 512, input_squares };
                    let found = quantise(&matrix, granularity, bits, false);
                    let report = found.report;
                    let context = format!("{granularity:?} {bits} {report:?}");
                    assert!(report.bits <= bits, "{context}");
                    assert!(report.error < report.baseline_error, "{context}");
                    assert!(report.baseline_bits <= bits, "{context}");
                    // Where 127 steps to either side do not suffice, it is not used up.
                    let natural = report.baseline_bits < bits - 0.05;
                    assert!(natural || report.bits > bits - 0.05, "{context}");
                    let n_scales = if granularity == Granularity::Tensor { 1 } else { 192 };
                    assert_eq!(found.scales.len(), n_scales);
                    assert!(found.scales.iter().all(|s| s.is_finite() && *s > 0.0));
                }
            }
        }
    }

    #[test]
    fn the_report_is_that_of_the_integers() {
        let weights = weights(64, 256);
        let matrix = Matrix { weights: &weights, cols: 256, input_squares: None };
        let found = quantise(&matrix, Granularity::Channel, 4.0, false);
        let (mut error, mut total) = (0.0f64, 0.0f64);
        for (index, (w, q)) in weights.iter().zip(&found.integers).enumerate() {
            let back = half::f16::from_f32(f32::from(*q as i8) * found.scales[index / 256]);
            error += f64::from(w - back.to_f32()).powi(2);
            total += f64::from(*w).powi(2);
        }
        assert!(((error / total).sqrt() - found.report.error).abs() < 1e-9);
        let record = encode_record(Isa::best(), Dtype::I8, &[64, 256], &found.integers).unwrap();
        assert_eq!(record.len() as f64 * 8.0 / (64.0 * 256.0), found.report.bits);
        let again = quantise(&matrix, Granularity::Channel, 4.0, false);
        assert_eq!(again, found);
        let baseline = quantise(&matrix, Granularity::Channel, 4.0, true).report;
        assert_eq!(baseline.error, found.report.baseline_error);
        assert_eq!(baseline.bits, found.report.baseline_bits);
    }

    #[test]
    fn matrices_of_nothing_much_are_quantised() {
        for (weights, cols) in
            [(vec![], 16), (vec![0.0; 64], 8), (vec![1e-40; 64], 8), (vec![2.5], 1)]
        {
            for granularity in [Granularity::Tensor, Granularity::Channel] {
                let matrix = Matrix { weights: &weights, cols, input_squares: None };
                let found = quantise(&matrix, granularity, 3.0, false);
                assert_eq!(found.integers.len(), weights.len());
                assert!(found.scales.iter().all(|s| s.is_finite() && *s > 0.0));
                let same = |(w, q): (&f32, &u8)| (*w == 0.0) <= (*q == 0);
                assert!(weights.iter().zip(&found.integers).all(same));
            }
        }
    }
}
