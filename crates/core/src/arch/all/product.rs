//! The arithmetic of [`crate::product`], element by element.

use crate::arch::{LANES_PER_ROW, RowIndices, rows_of_places};
use crate::layout::{Values, WeightType};
use crate::quantize::dequantise;
use crate::tile::{BLOCK, BLOCK_ELEMS, fragment_position};

/// The value of a half-precision number.
///
/// Denormals and special values included; NaN payloads are kept, quiet bit and
/// all, as hardware conversions do for quiet NaNs.
fn from_f16(half: u16) -> f32 {
    let (sign, exponent, mantissa) =
        (u32::from(half >> 15) << 31, u32::from(half >> 10 & 31), u32::from(half & 0x3FF));
    match exponent {
        0 => {
            // mantissa * 2^-24 is exact.
            let magnitude = mantissa as f32 * f32::from_bits((127 - 24) << 23);
            f32::from_bits(sign | magnitude.to_bits())
        }
        31 if mantissa != 0 => f32::from_bits(sign | 0x7FC0_0000 | mantissa << 13),
        31 => f32::from_bits(sign | 0x7F80_0000),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | mantissa << 13),
    }
}

/// Element `index` of planes, widened; integers have the scale `values` begin with.
#[inline(always)]
pub(crate) fn widen(values: Values<'_>, planes: [&[u8]; 2], index: usize) -> f32 {
    let weight = values.weight;
    if weight == WeightType::I8 {
        return dequantise(planes[0][index] as i8, values.scales[0]);
    }
    let word = u16::from_be_bytes([planes[0][index], planes[1][index]]);
    if weight.is_half() {
        from_f16(word)
    } else {
        f32::from_bits(u32::from(word.rotate_right(1)) << 16)
    }
}

/// Element `index` of row-major elements that are no integers, widened.
#[inline(always)]
pub(crate) fn widen_dense(weight: WeightType, bytes: &[u8], index: usize) -> f32 {
    let word = |i: usize| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]);
    match weight {
        WeightType::Bf16 => f32::from_bits(u32::from(word(index)) << 16),
        WeightType::F16 => from_f16(word(index)),
        WeightType::F32 => {
            let bytes = &bytes[4 * index..4 * index + 4];
            f32::from_le_bytes(bytes.try_into().expect("four bytes"))
        }
        WeightType::I8 => unreachable!("integers are dequantised first"),
    }
}

/// What integers of one row stand for.
#[inline(always)]
pub(crate) fn dequantise_row(integers: &[u8], scale: f32, out: &mut [f32]) {
    for (out, q) in out.iter_mut().zip(integers) {
        *out = dequantise(*q as i8, scale);
    }
}

/// Adds the products of a strip of blocks to 256 accumulators, in fragment
/// order. `x` is as long as the strip is wide.
#[inline(always)]
pub(crate) fn accumulate_blocks(
    values: Values<'_>,
    planes: [&[u8]; 2],
    x: &[f32],
    sums: &mut [f32; BLOCK_ELEMS],
) {
    for (block, x) in x.chunks_exact(BLOCK).enumerate() {
        let start = block * BLOCK_ELEMS;
        if values.weight == WeightType::I8 {
            let integers = &planes[0][start..start + BLOCK_ELEMS];
            for (index, sum) in sums.iter_mut().enumerate() {
                let (row, col) = fragment_position(index);
                let weight = dequantise(integers[index] as i8, values.scales[row]);
                *sum = weight.mul_add(x[col], *sum);
            }
            continue;
        }
        let planes = planes.map(|p| &p[start..start + BLOCK_ELEMS]);
        for (index, sum) in sums.iter_mut().enumerate() {
            let (_, col) = fragment_position(index);
            *sum = widen(values, planes, index).mul_add(x[col], *sum);
        }
    }
}

/// Where [`accumulate_blocks`] leaves the accumulators of each row.
pub(crate) static ROW_INDICES: RowIndices = {
    let mut places = [(0, 0); BLOCK_ELEMS];
    let mut index = 0;
    while index < BLOCK_ELEMS {
        let (row, col) = fragment_position(index);
        places[index] = (row as u8, col as u8);
        index += 1;
    }
    rows_of_places(&places)
};

/// Adds the products of a part of a row, which starts at accumulator `lane`.
#[inline(always)]
pub(crate) fn accumulate_run(
    values: Values<'_>,
    planes: [&[u8]; 2],
    x: &[f32],
    lane: usize,
    sums: &mut [f32; LANES_PER_ROW],
) {
    for (index, x) in x.iter().enumerate() {
        let sum = &mut sums[(lane + index) % LANES_PER_ROW];
        *sum = widen(values, planes, index).mul_add(*x, *sum);
    }
}

/// Adds the products of a row of row-major weights with a token.
#[inline(always)]
pub(crate) fn accumulate_row(
    weight: WeightType,
    weights: &[u8],
    x: &[f32],
    sums: &mut [f32; LANES_PER_ROW],
) {
    for (c, x) in x.iter().enumerate() {
        let sum = &mut sums[c % LANES_PER_ROW];
        *sum = widen_dense(weight, weights, c).mul_add(*x, *sum);
    }
}

/// Adds the products of a row of widened weights with a token.
#[inline(always)]
pub(crate) fn accumulate_floats(weights: &[f32], x: &[f32], sums: &mut [f32; LANES_PER_ROW]) {
    let pairs = weights.chunks(LANES_PER_ROW).zip(x.chunks(LANES_PER_ROW));
    for (weights, x) in pairs {
        for ((sum, weight), x) in sums.iter_mut().zip(weights).zip(x) {
            *sum = weight.mul_add(*x, *sum);
        }
    }
}

/// Multiplies as many rows of row-major weights as `y` has.
#[inline(always)]
pub(crate) fn multiply_dense(weight: WeightType, weights: &[u8], x: &[f32], y: &mut [f32]) {
    let row_bytes = x.len() * weight.elem_bytes();
    for (weights, y) in weights.chunks_exact(row_bytes).zip(y) {
        let mut sums = [0.0; LANES_PER_ROW];
        accumulate_row(weight, weights, x, &mut sums);
        *y = reduce(sums);
    }
}

/// Adds 16 accumulators: halves onto halves.
pub(crate) fn reduce(mut sums: [f32; LANES_PER_ROW]) -> f32 {
    for half in [8, 4, 2, 1] {
        for j in 0..half {
            sums[j] += sums[j + half];
        }
    }
    sums[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision_widens_like_the_library() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (from_f16(bits), half::f16::from_bits(bits).to_f32());
            assert_eq!(ours.to_bits(), theirs.to_bits(), "{bits:#06x}");
        }
    }
}
