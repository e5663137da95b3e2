//! The arithmetic outside the matrix products: f32, in an order that depends
//! on the lengths only, in portable code that every machine runs alike.

/// Partial sums kept side by side, so that the compiler can use vectors.
const LANES: usize = 16;

/// Sum of products: lane by lane, then the lanes in halves.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let mut sums = [0.0_f32; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    for (lane, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        sums[lane] += a * b;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

/// `out = weight * x / rms(x)`.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = inverse_rms(x, eps);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = weight * (x * scale);
    }
}

/// [`rms_norm`] in place.
pub(crate) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = inverse_rms(x, eps);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = weight * (*x * scale);
    }
}

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// `gate = silu(gate) * up`.
pub(crate) fn swiglu(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + (-*gate).exp()) * up;
    }
}

/// `x += y`.
pub(crate) fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// `x += factor * y`.
pub(crate) fn add_scaled(x: &mut [f32], factor: f32, y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += factor * y;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_counts_once_at_every_length() {
        for n in 0..70 {
            let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let ones = vec![1.0; n];
            assert_eq!(dot(&a, &ones), (n * n.saturating_sub(1) / 2) as f32);
        }
    }

    #[test]
    fn a_normalised_vector_has_mean_square_one() {
        let x: Vec<f32> = (0..48).map(|i| (i as f32 - 20.0) * 0.3).collect();
        let mut out = vec![0.0; 48];
        rms_norm(&x, &[1.0; 48], 0.0, &mut out);
        assert!((dot(&out, &out) / 48.0 - 1.0).abs() < 1e-6);
        let mut same = x;
        rms_norm_in_place(&mut same, &[1.0; 48], 0.0);
        assert_eq!(same, out);
    }

    #[test]
    fn silu_saturates_without_nan() {
        let mut gate = [-200.0, 0.0, 200.0];
        swiglu(&mut gate, &[2.0, 2.0, 2.0]);
        assert_eq!(gate, [0.0, 0.0, 400.0]);
    }
}
