//! INT8 weights: `q = clamp(round(w / scale), -127, 127)`, and back.
//!
//! An integer `q` stands for the FP16 number nearest to `q * scale`, where the
//! product is rounded to f32 first and both roundings take ties to even. There
//! is a scale for a tensor or for each of its rows, stored as f32.

#![forbid(unsafe_code)]

pub mod rate;

/// What shares a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Granularity {
    /// All weights of a matrix.
    Tensor,
    /// The weights of a row, which is an output channel.
    Channel,
}

impl Granularity {
    /// The name configurations and the command line use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tensor => "tensor",
            Self::Channel => "channel",
        }
    }
}

/// The largest finite FP16 number.
pub const MAX_F16: f32 = 65_504.0;
/// Integers lie between this and its negative.
pub const MAX_LEVEL: f32 = 127.0;

/// The scale with which `absmax` becomes 127; 1 if that would be 0.
#[must_use]
pub fn absmax_scale(absmax: f32) -> f32 {
    match absmax / MAX_LEVEL {
        0.0 => 1.0,
        scale => scale,
    }
}

/// The integer for a weight: the nearest, ties to even, at most 127 from 0.
/// Weight and scale are finite, the scale is positive.
#[must_use]
pub fn quantise(weight: f32, scale: f32) -> i8 {
    (weight / scale).round_ties_even().clamp(-MAX_LEVEL, MAX_LEVEL) as i8
}

/// What an integer stands for; infinite if FP16 cannot hold it.
#[inline(always)]
#[must_use]
pub fn dequantise(q: i8, scale: f32) -> f32 {
    round_to_f16(f32::from(q) * scale)
}

/// The FP16 number nearest to `x`, ties to even, as f32. NaN stays NaN.
///
/// Without branches, so that compilers make vectors of it.
#[inline(always)]
#[must_use]
pub fn round_to_f16(x: f32) -> f32 {
    const SIGN: u32 = 1 << 31;
    /// Below this FP16 numbers are multiples of 2^-24, as are f32 around 0.75.
    const MIN_NORMAL: f32 = 6.103_515_6e-5;
    const AROUND: f32 = 0.75;
    let bits = x.to_bits();
    let magnitude = f32::from_bits(bits & !SIGN);
    // To 10 bits of mantissa; a carry moves on into the exponent.
    let even = bits >> 13 & 1;
    let normal = f32::from_bits((bits & !SIGN).wrapping_add(0xFFF + even) & !0x1FFF);
    let normal = if normal > MAX_F16 { f32::INFINITY } else { normal };
    let small = (magnitude + AROUND) - AROUND;
    let rounded = if magnitude < MIN_NORMAL { small } else { normal };
    let rounded = if magnitude.is_nan() { f32::NAN } else { rounded };
    f32::from_bits(rounded.to_bits() | bits & SIGN)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_half_and_what_lies_between_two_rounds_like_the_library() {
        for bits in 0..=u16::MAX {
            let half = half::f16::from_bits(bits).to_f32();
            if half.is_nan() {
                assert!(round_to_f16(half).is_nan());
                continue;
            }
            let next = half::f16::from_bits(bits.wrapping_add(1)).to_f32();
            let middle = half / 2.0 + next / 2.0;
            for around in [half, middle, 65_520.0, -65_519.996] {
                for x in [around.next_down(), around, around.next_up()] {
                    let expected = half::f16::from_f32(x).to_f32();
                    let found = round_to_f16(x);
                    let same = found.to_bits() == expected.to_bits();
                    assert!(same || found.is_nan() && expected.is_nan(), "{x:e}: {found:e}");
                }
            }
        }
    }

    /// The nearest integer in exact arithmetic: both are multiples of 2^-149,
    /// but f64 holds the quotient well enough to know when it is near a tie.
    fn reference(weight: f32, scale: f32) -> i8 {
        let quotient = f64::from(weight) / f64::from(scale);
        let below = quotient.floor();
        let part = quotient - below;
        let nearest = match part.partial_cmp(&0.5) {
            Some(std::cmp::Ordering::Less) => below,
            Some(std::cmp::Ordering::Greater) => below + 1.0,
            _ if below % 2.0 == 0.0 => below,
            _ => below + 1.0,
        };
        nearest.clamp(-127.0, 127.0) as i8
    }

    proptest! {
        #[test]
        fn any_float_rounds_like_the_library(bits in any::<u32>()) {
            let x = f32::from_bits(bits);
            let (found, expected) = (round_to_f16(x), half::f16::from_f32(x).to_f32());
            prop_assert!(found.to_bits() == expected.to_bits() || found.is_nan() && x.is_nan());
        }

        #[test]
        fn integers_are_the_nearest(weight in -70_000f32..70_000.0, scale in 1e-6f32..600.0) {
            let (found, expected) = (quantise(weight, scale), reference(weight, scale));
            // The definition divides in f32: it may take a tie for what is nearly one.
            let quotient = f64::from(weight) / f64::from(scale);
            let from_tie = (quotient - quotient.floor() - 0.5).abs();
            prop_assert!(found == expected || from_tie < 2e-5, "{found} {expected} {quotient}");
        }

        #[test]
        fn what_comes_back_is_the_half_next_to_the_product(q in -128i8..=127, scale in any::<f32>()) {
            let product = f32::from(q) * scale;
            let expected = half::f16::from_f32(product).to_f32();
            let found = dequantise(q, scale);
            prop_assert!(found.to_bits() == expected.to_bits() || found.is_nan() && product.is_nan());
        }

        #[test]
        fn absmax_uses_the_whole_range(absmax in 1e-30f32..65_504.0) {
            prop_assert_eq!(quantise(absmax, absmax_scale(absmax)), 127);
            prop_assert_eq!(quantise(-absmax, absmax_scale(absmax)), -127);
        }
    }

    #[test]
    fn ties_go_to_even_integers_and_zeros_keep_a_scale() {
        for (weight, q) in [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-3.5, -4), (1e9, 127)] {
            assert_eq!(quantise(weight, 1.0), q, "{weight}");
        }
        assert_eq!(absmax_scale(0.0), 1.0);
        // An absolute maximum so small that its 127th part is none.
        assert_eq!(absmax_scale(f32::from_bits(1)), 1.0);
    }
}
