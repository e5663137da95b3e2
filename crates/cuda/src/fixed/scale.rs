//! Scales of INT8 rows, and how the kernels multiply with them.

use half::f16;

/// A scale of a row: `scale` times `factor`, a power of two (`transom::RowScale` of `kernels/params.h`).
///
/// `multipliers` are two FP16 numbers, `high` in the low half and `low` in the high one, for which
/// `q * 2^-24 * high + q * 2^-24 * low`, rounded to FP16 after the second product and after the sum, is
/// `f16(q * scale)` for the values of the row that have a code. Not so exact ones escape.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub struct RowScale {
    /// Of the weights in the product.
    pub scale: f32,
    /// Of the row's sums.
    pub factor: f32,
    /// See above; 0 for dense weights.
    pub multipliers: u32,
}

// As in kernels/params.h.
const _: () = assert!(size_of::<RowScale>() == 12);

/// 2^24 * scale is an FP16 number below this.
const LIMIT: f32 = 65_520.0;
/// Far more than gives values that fit FP16.
const LARGEST: f32 = 1e30;
/// FP16 numbers on each side of the nearest one that are tried as the low multiplier.
const NEIGHBOURS: u16 = 8;

impl RowScale {
    /// The scale of the row.
    #[must_use]
    pub fn value(self) -> f32 {
        self.scale * self.factor
    }

    /// As it lies in GPU memory, in words of 32 bits.
    #[must_use]
    pub const fn words(self) -> [u32; 3] {
        [self.scale.to_bits(), self.factor.to_bits(), self.multipliers]
    }

    /// For dense weights.
    pub(super) fn new(scale: f32) -> Self {
        // With a larger one all values are zero, or the product refuses them.
        let scale = scale.clamp(-LARGEST, LARGEST);
        let mut factor = 1.0;
        while scale.abs() / factor * 2.0_f32.powi(24) >= LIMIT {
            factor *= 2.0;
        }
        // Not where dequantised values are denormal FP16 numbers, which twice as large ones need not be twice.
        if scale.abs() >= f16::MIN_POSITIVE.to_f32() {
            while scale.abs() / factor * 2.0_f32.powi(25) < LIMIT {
                factor /= 2.0;
            }
        }
        Self { scale: scale / factor, factor, multipliers: 0 }
    }
}

/// The scale of a row in codes of a sign and a magnitude.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowCode {
    pub scale: RowScale,
    /// Bit m: whether the multipliers give the magnitude m exactly.
    exact: u64,
}

impl RowCode {
    /// The multipliers that are exact for the most magnitudes of `bits - 1` bits. Cost: 2^bits operations, most often;
    /// 100 times as many for some in a hundred.
    pub fn new(scale: f32, bits: usize) -> Self {
        let mut best = Self { scale: RowScale::new(scale), exact: 1 };
        let scaled = best.scale.scale;
        let n_magnitudes = 1 << (bits - 1);
        let all = u64::MAX >> (64 - n_magnitudes);
        let whole = scaled * 2.0_f32.powi(24);
        let nearest = f16::from_f32(whole).to_bits();
        for far in 0..=2 * NEIGHBOURS {
            for high in [nearest, nearest.wrapping_add(1), nearest.wrapping_sub(1)] {
                let rest = f16::from_f32(whole - f16::from_bits(high).to_f32()).to_bits();
                let low = match far % 2 {
                    0 => rest.wrapping_sub(far / 2),
                    _ => rest.wrapping_add(far.div_ceil(2)),
                };
                let exact = exact_magnitudes(scaled, n_magnitudes, [high, low].map(f16::from_bits));
                if exact.count_ones() > best.exact.count_ones() {
                    best.exact = exact;
                    best.scale.multipliers = u32::from(high) | u32::from(low) << 16;
                }
                if exact == all {
                    return best;
                }
            }
        }
        best
    }

    /// Sign and magnitude, if that is the value's code.
    pub fn code(&self, value: i8, bits: usize) -> Option<u8> {
        let magnitude = value.unsigned_abs();
        let sign = u8::from(value < 0) << (bits - 1);
        (magnitude < 1 << (bits - 1) && self.exact >> magnitude & 1 == 1)
            .then_some(sign | magnitude)
    }
}

/// Bit m: whether the multipliers give `f16(m * scale)`.
fn exact_magnitudes(scale: f32, n_magnitudes: u16, [high, low]: [f16; 2]) -> u64 {
    if !high.is_finite() || !low.is_finite() {
        return 0;
    }
    (0..n_magnitudes).fold(0, |exact, magnitude| {
        let unit = f64::from(magnitude) * 2.0_f64.powi(-24);
        let found = round_half(unit * high.to_f64() + round_half(unit * low.to_f64()));
        let expected = f16::from_f32(f32::from(magnitude) * scale).to_f64();
        exact | u64::from(found == expected) << magnitude
    })
}

/// The FP16 number nearest to a finite one, ties to even. Once: conversions by way of FP32 round twice.
fn round_half(x: f64) -> f64 {
    let exponent = (x.to_bits() >> 52 & 0x7FF) as i32 - 1023;
    let unit = 2.0_f64.powi(exponent.max(-14) - 10);
    (x / unit).round_ties_even() * unit
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random_scales(from: i32, to: i32) -> impl Iterator<Item = f32> {
        let mut bits = 0x2545_F491_4F6C_DD1D_u64;
        std::iter::from_fn(move || {
            bits ^= bits << 13;
            bits ^= bits >> 7;
            bits ^= bits << 17;
            let exponent = (from + 127) as u64 + (bits >> 32) % (to - from) as u64;
            Some(f32::from_bits((exponent as u32) << 23 | bits as u32 & 0x7F_FFFF))
        })
    }

    /// `dequantise` of `kernels/fixed.cuh`, of dense weights.
    fn dequantise(q: i8, scale: f32) -> f32 {
        let step = scale * 2.0_f32.powi(100) * 2.0_f32.powi(33);
        let u = (i16::from(q) + 128) as u32;
        f32::from_bits(u << 16).mul_add(step, step * -(2.0_f32.powi(-126)))
    }

    #[test]
    fn one_fused_multiply_add_dequantises_exactly() {
        let some = [1.0, 0.031_249_998, 0.031_25, 515.0, 1e-40, -0.01, 0.0, 6.2e-5];
        for scale in random_scales(-40, 9).take(20_000).chain(some) {
            let row = RowScale::new(scale);
            let RowScale { scale: scaled, factor, .. } = row;
            assert_eq!(row.value(), scale);
            for q in -128..=127_i8 {
                let expected = f32::from(q) * scale;
                let found = dequantise(q, scaled);
                assert_eq!(found * factor, expected, "{q} * {scale:e}");
                let half = f16::from_f32(found).to_f32() * factor;
                if expected.abs() <= f16::MAX.to_f32() {
                    assert_eq!(half, f16::from_f32(expected).to_f32(), "{q} * {scale:e}");
                }
            }
        }
        assert_eq!(dequantise(0, RowScale::new(f32::MAX).scale), 0.0);
        assert!(RowScale::new(f32::NAN).value().is_nan());
    }

    #[test]
    fn rounding_is_to_the_nearest() {
        for bits in (0..0x7BFF_u16).step_by(7) {
            let [a, b] = [bits, bits + 1].map(|bits| f16::from_bits(bits).to_f64());
            let middle = f64::midpoint(a, b);
            assert_eq!(round_half(a), a);
            assert_eq!(round_half(middle), if bits % 2 == 0 { a } else { b });
            assert_eq!(round_half(middle * (1.0 + 1e-15)), b);
            assert_eq!(round_half(-middle * (1.0 - 1e-15)), -a);
        }
    }

    #[test]
    fn codes_of_usual_scales_are_exact_but_for_few() {
        for bits in [4, 5, 6, 7] {
            let (mut n_codes, mut n_exact, mut n_exact_rows) = (0, 0, 0);
            for scale in random_scales(-14, 4).take(4000) {
                let row = RowCode::new(scale, bits);
                let [high, low] =
                    [0, 16].map(|shift| f16::from_bits((row.scale.multipliers >> shift) as u16));
                for q in -128..=127_i8 {
                    let Some(code) = row.code(q, bits) else { continue };
                    let magnitude = code & ((1 << (bits - 1)) - 1);
                    assert_eq!((code >> (bits - 1) == 1, magnitude), (q < 0, q.unsigned_abs()));
                    // As the kernel does it.
                    let unit = f64::from(q) * 2.0_f64.powi(-24);
                    let found = round_half(unit * high.to_f64() + round_half(unit * low.to_f64()));
                    let expected = f16::from_f32(f32::from(q) * scale).to_f64();
                    assert_eq!(found * f64::from(row.scale.factor), expected, "{q} * {scale:e}");
                    n_exact += 1;
                }
                n_codes += (2 << (bits - 1)) - 1;
                n_exact_rows += u32::from(row.exact.count_ones() == 1 << (bits - 1));
            }
            assert!(n_exact_rows > 4000 / 100 * 98, "{bits} bits: {n_exact_rows} rows of 4000");
            assert!(n_exact * 500 > n_codes * 499, "{bits} bits: {n_exact} of {n_codes}");
        }
    }

    #[test]
    fn zero_always_has_a_code() {
        for scale in [0.0, 1e-12, 1e-40, f32::MAX, f32::INFINITY, f32::NAN, -0.3, 65_504.0] {
            assert_eq!(RowCode::new(scale, 6).code(0, 6), Some(0), "{scale:e}");
        }
    }
}
