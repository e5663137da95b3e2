//! From logits to the next token.

use crate::error::RuntimeError;

/// How a token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; higher is more random.
    pub temperature: f32,
    /// Only the most likely tokens that together have this probability are
    /// drawn from; 1 for all.
    pub top_p: f32,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Sampling {
    /// Always the most likely token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_p: 1.0, seed: 0 };
}

/// Chooses tokens; the same seed and logits give the same tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    random: SplitMix64,
    /// Token and probability, kept between calls for their memory.
    candidates: Vec<(u32, f64)>,
}

impl Sampler {
    /// A sampler in its first state.
    ///
    /// # Errors
    ///
    /// [`RuntimeError::Sampling`] if a parameter is out of range.
    pub fn new(sampling: Sampling) -> Result<Self, RuntimeError> {
        let wrong = |name, found, expected| RuntimeError::Sampling { name, found, expected };
        if !(sampling.temperature >= 0.0 && sampling.temperature.is_finite()) {
            return Err(wrong("temperature", sampling.temperature, "0 or more"));
        }
        if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
            return Err(wrong("top-p", sampling.top_p, "more than 0 and at most 1"));
        }
        Ok(Self { sampling, random: SplitMix64(sampling.seed), candidates: Vec::new() })
    }

    /// The next token. Logits must be finite and not empty.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        if self.sampling.temperature == 0.0 {
            return argmax(logits);
        }
        self.weigh(logits);
        let nucleus = self.nucleus();
        let total: f64 = self.candidates[..nucleus].iter().map(|c| c.1).sum();
        let mut left = self.random.unit() * total;
        for &(token, probability) in &self.candidates[..nucleus] {
            left -= probability;
            if left < 0.0 {
                return token;
            }
        }
        self.candidates[nucleus - 1].0
    }

    /// Fills `candidates` with probabilities, not yet divided by their sum.
    fn weigh(&mut self, logits: &[f32]) {
        let max = f64::from(logits[argmax(logits) as usize]);
        let temperature = f64::from(self.sampling.temperature);
        let weight = |logit: f32| ((f64::from(logit) - max) / temperature).exp();
        self.candidates.clear();
        self.candidates.extend((0..).zip(logits.iter().map(|&logit| weight(logit))));
    }

    /// Sorts `candidates` if need be; how many of them are drawn from.
    fn nucleus(&mut self) -> usize {
        if self.sampling.top_p >= 1.0 {
            return self.candidates.len();
        }
        self.candidates.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let wanted =
            f64::from(self.sampling.top_p) * self.candidates.iter().map(|c| c.1).sum::<f64>();
        let mut sum = 0.0;
        for (index, candidate) in self.candidates.iter().enumerate() {
            sum += candidate.1;
            if sum >= wanted {
                return index + 1;
            }
        }
        self.candidates.len()
    }
}

/// The token with the highest logit; the lowest of those that share it.
#[must_use]
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

/// Steele, Lea and Flood's generator: 64 bits of state, equidistributed.
#[derive(Debug, Clone)]
pub(crate) struct SplitMix64(pub(crate) u64);

impl SplitMix64 {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`; a power of two or far less than 2^64, so that the rest of the
    /// division does not show.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Uniform in [0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32, top_p: f32, seed: u64) -> Sampler {
        Sampler::new(Sampling { temperature, top_p, seed }).unwrap()
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        assert_eq!(argmax(&[0.0, 2.0, -1.0, 2.0]), 1);
        assert_eq!(sampler(0.0, 1.0, 7).choose(&[-3.0, -3.0]), 0);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let logits = [0.5_f32.ln(), 0.3_f32.ln(), 0.2_f32.ln()];
        let mut counts = [0; 3];
        let mut sampler = sampler(1.0, 1.0, 1);
        for _ in 0..20_000 {
            counts[sampler.choose(&logits) as usize] += 1;
        }
        for (count, expected) in counts.into_iter().zip([10_000, 6_000, 4_000]) {
            assert!(i32::abs(count - expected) < 300, "{counts:?}");
        }
    }

    #[test]
    fn top_p_keeps_the_smallest_sufficient_set() {
        let logits = [0.2_f32.ln(), 0.5_f32.ln(), 0.3_f32.ln()];
        let mut sampler = sampler(1.0, 0.6, 3);
        let drawn: Vec<u32> = (0..1000).map(|_| sampler.choose(&logits)).collect();
        assert!(drawn.contains(&1) && drawn.contains(&2) && !drawn.contains(&0));
    }

    #[test]
    fn equal_seeds_give_equal_tokens_and_others_do_not() {
        let logits: Vec<f32> = (0..100).map(|i| (i % 7) as f32 * 0.1).collect();
        let draw = |seed| {
            let mut sampler = sampler(0.8, 0.95, seed);
            (0..50).map(|_| sampler.choose(&logits)).collect::<Vec<_>>()
        };
        assert_eq!(draw(11), draw(11));
        assert_ne!(draw(11), draw(12));
    }

    #[test]
    fn parameters_out_of_range_are_errors() {
        for (temperature, top_p) in [(-1.0, 1.0), (f32::NAN, 1.0), (1.0, 0.0), (1.0, 1.5)] {
            let sampling = Sampling { temperature, top_p, seed: 0 };
            assert!(matches!(Sampler::new(sampling), Err(RuntimeError::Sampling { .. })));
        }
    }
}
