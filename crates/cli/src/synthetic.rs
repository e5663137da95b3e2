//! Weights for benchmarks, with the statistics of trained ones.

use rayon::prelude::*;

use crate::args::WeightName;

/// Values that a row picks its weights from; a power of two.
const POOL: usize = 1 << 16;

/// Scale of the INT8 weights, for which they are again around 0.02.
pub(crate) const INT8_SCALE: f32 = 0.02 / INT8_SPREAD;
/// Standard deviation of INT8 weights.
const INT8_SPREAD: f32 = 12.5;

/// A `rows` x `cols` matrix, row-major, as little-endian elements: Gaussian,
/// with a standard deviation that differs from row to row around 0.02, but not
/// in INT8, where a row's scale takes it in. In BF16 its exponents have 2.6 to
/// 2.7 bits of entropy, as those of trained models have; in INT8 its elements
/// have 5.5 to 6. The same arguments give the same bytes.
pub(crate) fn weights(dtype: WeightName, rows: usize, cols: usize, seed: u64) -> Vec<u8> {
    let mut random = SplitMix(seed);
    let pool: Vec<f32> = (0..POOL).map(|_| random.gaussian()).collect();
    let size = if dtype == WeightName::Int8 { 1 } else { 2 };
    let mut bytes = vec![0; rows * cols * size];
    bytes.par_chunks_mut((cols * size).max(size)).enumerate().for_each(|(row, bytes)| {
        let mut random = SplitMix(seed ^ (row as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let spread = match dtype {
            WeightName::Int8 => 0.02,
            _ => 0.02 * (0.35 * random.gaussian()).exp(),
        };
        for run in bytes.chunks_mut(256 * size) {
            // Another place of the pool every 256 weights.
            let start = random.next() as usize;
            for (i, element) in run.chunks_exact_mut(size).enumerate() {
                let value = spread * pool[start.wrapping_add(i) % POOL];
                let word = match dtype {
                    WeightName::Bf16 => half::bf16::from_f32(value).to_bits(),
                    WeightName::F16 => half::f16::from_f32(value).to_bits(),
                    WeightName::Int8 => {
                        let q = (value / INT8_SCALE).round().clamp(-127.0, 127.0) as i8;
                        u16::from(q as u8)
                    }
                };
                element.copy_from_slice(&word.to_le_bytes()[..size]);
            }
        }
    });
    bytes
}

/// Activations for a product: `n` Gaussian values.
pub(crate) fn activations(n: usize, seed: u64) -> Vec<f32> {
    let mut random = SplitMix(seed);
    (0..n).map(|_| random.gaussian()).collect()
}

/// The generator of Steele, Lea and Flood (2014).
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Above 0, at most 1.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Box and Muller's transform.
    fn gaussian(&mut self) -> f32 {
        let radius = (-2.0 * self.unit().ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.unit()).cos()) as f32
    }
}

#[cfg(test)]
mod tests {
    use transom::{Dtype, TensorStatistics};

    use super::*;

    #[test]
    fn exponents_have_the_entropy_of_trained_weights() {
        let bytes = weights(WeightName::Bf16, 512, 1024, 7);
        let mut statistics = TensorStatistics::new(Dtype::Bf16);
        statistics.add(&bytes);
        let entropy = statistics.histogram(0).entropy();
        assert!((2.6..2.7).contains(&entropy), "{entropy}");
    }

    #[test]
    fn integers_have_the_entropy_of_trained_weights() {
        let bytes = weights(WeightName::Int8, 512, 1024, 7);
        let mut statistics = TensorStatistics::new(Dtype::I8);
        statistics.add(&bytes);
        let entropy = statistics.histogram(0).entropy();
        assert!((5.5..6.0).contains(&entropy), "{entropy}");
    }

    #[test]
    fn rows_differ_and_the_seed_decides() {
        let bytes = weights(WeightName::F16, 16, 16, 1);
        assert_eq!(bytes, weights(WeightName::F16, 16, 16, 1));
        assert_ne!(bytes, weights(WeightName::F16, 16, 16, 2));
        assert_ne!(bytes[..32], bytes[32..64]);
    }
}
