//! Rotary position embedding, in the convention of Hugging Face: element i of
//! a head turns together with element i + head_dim / 2.

use std::f64::consts::PI;

/// Base and scaling of the rotation frequencies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeConfig {
    /// Frequencies are powers of 1 / theta.
    pub theta: f64,
    /// How they are changed for longer contexts.
    pub scaling: RopeScaling,
}

/// How frequencies are changed for longer contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, between them a ramp.
    Llama3 {
        /// The divisor.
        factor: f64,
        /// Turns over the original context below which a frequency is low.
        low_freq_factor: f64,
        /// Turns over the original context above which a frequency is high.
        high_freq_factor: f64,
        /// Length of the original context.
        original_max_position_embeddings: usize,
    },
}

impl RopeConfig {
    /// The angle per position of each of the `head_dim / 2` pairs.
    ///
    /// Rounded to f32 where `transformers` does, because the angle of a far
    /// position shows it.
    #[must_use]
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        let exponent = |pair: usize| (2 * pair) as f32 / head_dim as f32;
        (0..head_dim / 2)
            .map(|pair| 1.0 / self.theta.powf(f64::from(exponent(pair))) as f32)
            .map(|frequency| self.scaling.apply(frequency))
            .collect()
    }
}

impl RopeScaling {
    fn apply(self, frequency: f32) -> f32 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor as f32,
            Self::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: length,
            } => {
                let wavelength = 2.0 * PI / f64::from(frequency);
                let turns = length as f64 / wavelength;
                if turns > high {
                    frequency
                } else if turns < low {
                    frequency / factor as f32
                } else {
                    let kept = (turns - low) / (high - low);
                    let frequency = f64::from(frequency);
                    ((1.0 - kept) * frequency / factor + kept * frequency) as f32
                }
            }
        }
    }
}

/// Cosines and sines of one position, `head_dim / 2` each.
///
/// # Panics
///
/// If the three slices differ in length.
pub fn rotation(position: usize, inverse_frequencies: &[f32], cos: &mut [f32], sin: &mut [f32]) {
    assert!(cos.len() == inverse_frequencies.len() && sin.len() == cos.len());
    for (pair, frequency) in inverse_frequencies.iter().enumerate() {
        let angle = f64::from(position as f32 * frequency);
        let (s, c) = angle.sin_cos();
        (cos[pair], sin[pair]) = (c as f32, s as f32);
    }
}

/// Turns one head in place.
///
/// # Panics
///
/// If `head` is not twice as long as `cos` and `sin`.
pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(cos.len());
    assert!(high.len() == cos.len() && sin.len() == cos.len());
    for pair in 0..cos.len() {
        let (a, b) = (low[pair], high[pair]);
        low[pair] = a * cos[pair] - b * sin[pair];
        high[pair] = b * cos[pair] + a * sin[pair];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_high_divides_low_and_ramps_between() {
        let plain = RopeConfig { theta: 500_000.0, scaling: RopeScaling::None };
        let scaled = RopeConfig {
            scaling: RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192,
            },
            ..plain
        };
        let (plain, scaled) = (plain.inverse_frequencies(128), scaled.inverse_frequencies(128));
        assert_eq!(plain[0], 1.0);
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[63], plain[63] / 8.0);
        let ramp: Vec<_> =
            (0..64).filter(|&i| scaled[i] != plain[i] && scaled[i] != plain[i] / 8.0).collect();
        assert!(!ramp.is_empty());
        assert!(ramp.iter().all(|&i| scaled[i] < plain[i] && scaled[i] > plain[i] / 8.0));
    }

    #[test]
    fn rotation_keeps_the_product_of_equally_distant_positions() {
        let frequencies =
            RopeConfig { theta: 10_000.0, scaling: RopeScaling::Linear { factor: 2.0 } }
                .inverse_frequencies(8);
        let turned = |position| {
            let (mut cos, mut sin) = ([0.0; 4], [0.0; 4]);
            rotation(position, &frequencies, &mut cos, &mut sin);
            let mut head = [0.3, -1.0, 0.7, 0.2, 0.9, 0.1, -0.4, 0.5];
            rotate(&mut head, &cos, &sin);
            head
        };
        let dot = |a: [f32; 8], b: [f32; 8]| -> f32 { a.iter().zip(b).map(|(x, y)| x * y).sum() };
        let near = dot(turned(0), turned(3));
        assert!((near - dot(turned(40), turned(43))).abs() < 1e-5);
        assert!((near - dot(turned(0), turned(4))).abs() > 1e-3);
    }
}
