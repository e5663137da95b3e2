//! The arithmetic of [`crate::product`] with AVX2 and FMA: the portable loops,
//! compiled for them.

use crate::arch::{LANES_PER_ROW, all::product};
use crate::layout::{Values, WeightType};
use crate::tile::BLOCK_ELEMS;

/// # Safety
///
/// AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn accumulate_blocks(
    values: Values<'_>,
    planes: [&[u8]; 2],
    x: &[f32],
    sums: &mut [f32; BLOCK_ELEMS],
) {
    // A call for each type, so that the loops do not ask for it.
    let of = |weight| Values { weight, ..values };
    match values.weight {
        WeightType::Bf16 => product::accumulate_blocks(of(WeightType::Bf16), planes, x, sums),
        WeightType::I8 => product::accumulate_blocks(of(WeightType::I8), planes, x, sums),
        other => product::accumulate_blocks(of(other), planes, x, sums),
    }
}

/// # Safety
///
/// AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn accumulate_run(
    values: Values<'_>,
    planes: [&[u8]; 2],
    x: &[f32],
    lane: usize,
    sums: &mut [f32; LANES_PER_ROW],
) {
    // A call for each type, so that the loops do not ask for it.
    let of = |weight| Values { weight, ..values };
    match values.weight {
        WeightType::Bf16 => product::accumulate_run(of(WeightType::Bf16), planes, x, lane, sums),
        WeightType::I8 => product::accumulate_run(of(WeightType::I8), planes, x, lane, sums),
        other => product::accumulate_run(of(other), planes, x, lane, sums),
    }
}

/// # Safety
///
/// AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn dequantise_row(integers: &[u8], scale: f32, out: &mut [f32]) {
    product::dequantise_row(integers, scale, out);
}

/// # Safety
///
/// AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn accumulate_floats(
    weights: &[f32],
    x: &[f32],
    sums: &mut [f32; LANES_PER_ROW],
) {
    product::accumulate_floats(weights, x, sums);
}

/// # Safety
///
/// AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn multiply_dense(weight: WeightType, weights: &[u8], x: &[f32], y: &mut [f32]) {
    match weight {
        WeightType::Bf16 => product::multiply_dense(WeightType::Bf16, weights, x, y),
        other => product::multiply_dense(other, weights, x, y),
    }
}

/// # Safety
///
/// AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn accumulate_row(
    weight: WeightType,
    weights: &[u8],
    x: &[f32],
    sums: &mut [f32; LANES_PER_ROW],
) {
    match weight {
        WeightType::Bf16 => product::accumulate_row(WeightType::Bf16, weights, x, sums),
        other => product::accumulate_row(other, weights, x, sums),
    }
}
