//! The arithmetic of [`crate::product`] with AVX2 and FMA: the portable loops,
//! compiled for them.

use crate::arch::{LANES_PER_ROW, all::product};
use crate::layout::WeightType;
use crate::tile::BLOCK_ELEMS;

/// # Safety
///
/// AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn accumulate_blocks(
    weight: WeightType,
    planes: [&[u8]; 2],
    x: &[f32],
    sums: &mut [f32; BLOCK_ELEMS],
) {
    match weight {
        WeightType::Bf16 => product::accumulate_blocks(WeightType::Bf16, planes, x, sums),
        other => product::accumulate_blocks(other, planes, x, sums),
    }
}

/// # Safety
///
/// AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn accumulate_run(
    weight: WeightType,
    planes: [&[u8]; 2],
    x: &[f32],
    lane: usize,
    sums: &mut [f32; LANES_PER_ROW],
) {
    match weight {
        WeightType::Bf16 => product::accumulate_run(WeightType::Bf16, planes, x, lane, sums),
        other => product::accumulate_run(other, planes, x, lane, sums),
    }
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
