//! The arithmetic of [`crate::product`] with AVX-512.
//!
//! Accumulators keep the order in which unpacking leaves the elements, so that
//! no weight is ever moved between lanes; only the final sum, once a row, needs
//! to know which is which ([`places`]).

use std::arch::x86_64::*;

use crate::arch::LANES_PER_ROW;
use crate::layout::{Coding, WeightType};
use crate::tile::{BLOCK, BLOCK_ELEMS, STRIP_ELEMS};

// ---------------------------------------------------------------------------
// Fields of the fixed layout

/// See [`crate::arch::unpack_highs`].
///
/// # Safety
///
/// AVX-512 as in [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub(crate) unsafe fn unpack_highs(
    coding: Coding,
    palette: &[u8; 16],
    fields: &[u8],
    high: &mut [u8; STRIP_ELEMS],
) {
    // SAFETY: 16 bytes.
    let palette = unsafe { _mm_loadu_si128(palette.as_ptr().cast()) };
    let palette = _mm512_broadcast_i32x4(palette);
    let groups = fields.chunks_exact(coding.group_bytes()).zip(high.as_chunks_mut::<64>().0);
    for (fields, high) in groups {
        // SAFETY: a group of each coding has the bytes that are read here.
        let v = unsafe {
            match coding {
                Coding::Exponent3 => {
                    let low = two_bits(fields.as_ptr());
                    let ones = fields.as_ptr().add(16).cast::<u64>().read_unaligned();
                    let code = add_four(low, ones);
                    _mm512_shuffle_epi8(palette, code)
                }
                Coding::Exponent4 => _mm512_shuffle_epi8(palette, four_bits(fields.as_ptr())),
                Coding::Half3 => {
                    let low = four_bits(fields.as_ptr());
                    let top = two_bits(fields.as_ptr().add(32));
                    // low: code, mantissa bit 0; top: mantissa bit 1, sign.
                    let code = _mm512_and_si512(low, _mm512_set1_epi8(7));
                    let exponent = _mm512_shuffle_epi8(palette, code);
                    let exponent = _mm512_slli_epi16::<2>(exponent);
                    let bit0 = _mm512_and_si512(_mm512_srli_epi16::<3>(low), _mm512_set1_epi8(1));
                    let bit1 = _mm512_and_si512(top, _mm512_set1_epi8(1));
                    let mantissa = _mm512_or_si512(bit0, _mm512_add_epi8(bit1, bit1));
                    let sign =
                        _mm512_and_si512(_mm512_slli_epi16::<6>(top), _mm512_set1_epi8(-128));
                    _mm512_or_si512(_mm512_or_si512(exponent, mantissa), sign)
                }
            }
        };
        // SAFETY: 64 bytes.
        unsafe { _mm512_storeu_si512(high.as_mut_ptr().cast(), v) };
    }
}

/// Adds 4 to the bytes in `ones`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn add_four(low: __m512i, ones: u64) -> __m512i {
    _mm512_mask_add_epi8(low, ones, low, _mm512_set1_epi8(4))
}

/// 64 fields of two bits from 16 bytes.
///
/// # Safety
///
/// 16 bytes are readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn two_bits(from: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    let v = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(from.cast()) });
    let shifts = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
    _mm512_and_si512(_mm512_srlv_epi32(v, shifts), _mm512_set1_epi8(3))
}

/// 64 fields of four bits from 32 bytes.
///
/// # Safety
///
/// 32 bytes are readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn four_bits(from: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    let v = _mm512_broadcast_i64x4(unsafe { _mm256_loadu_si256(from.cast()) });
    let shifts = _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4);
    _mm512_and_si512(_mm512_srlv_epi64(v, shifts), _mm512_set1_epi8(15))
}

// ---------------------------------------------------------------------------
// Blocks

/// Of a quarter's 64 elements: row and column, within the quarter, of lane `t`
/// of widened vector `v`. BF16: vectors are (first or second half of each 128
/// bits after unpacking, even or odd element).
const fn bf16_place(v: usize, t: usize) -> (usize, usize) {
    let (half, odd) = (v / 2, v % 2);
    let (lane128, dword) = (t / 4, t % 4);
    quarter_place(16 * lane128 + 8 * half + 2 * dword + odd)
}

/// The same for FP16: (first or second half of each 128 bits, lower or upper 256 bits).
const fn f16_place(v: usize, t: usize) -> (usize, usize) {
    let (half, upper) = (v / 2, v % 2);
    quarter_place(16 * (2 * upper + t / 8) + 8 * half + t % 8)
}

/// Row and column of element `index` of a quarter.
const fn quarter_place(index: usize) -> (usize, usize) {
    let (odd, lane) = (index / 32, index % 32);
    (lane / 4, lane % 4 * 2 + odd)
}

/// Places of the 16 vectors of a block: quarters in element order, four each.
const fn block_places(half: bool) -> [(u8, u8); BLOCK_ELEMS] {
    let mut places = [(0, 0); BLOCK_ELEMS];
    let mut index = 0;
    while index < BLOCK_ELEMS {
        let (vector, t) = (index / 16, index % 16);
        let (quarter, v) = (vector / 4, vector % 4);
        let (row, col) = if half { f16_place(v, t) } else { bf16_place(v, t) };
        // Quarters: upper left, lower left, upper right, lower right.
        places[index] = ((row + 8 * (quarter % 2)) as u8, (col + 8 * (quarter / 2)) as u8);
        index += 1;
    }
    places
}

static BF16_PLACES: [(u8, u8); BLOCK_ELEMS] = block_places(false);
static F16_PLACES: [(u8, u8); BLOCK_ELEMS] = block_places(true);

/// See [`crate::arch::accumulator_places`].
pub(crate) fn places(weight: WeightType) -> &'static [(u8, u8); BLOCK_ELEMS] {
    if weight.is_half() { &F16_PLACES } else { &BF16_PLACES }
}

/// Columns of the lanes of vector `v` of the left quarters; eight more in the
/// right ones. Rows do not matter, so vectors `v` and `v ^ 2` agree.
const fn column_indices(half: bool, v: usize) -> [i32; 16] {
    let mut indices = [0; 16];
    let mut t = 0;
    while t < 16 {
        let (_, col) = if half { f16_place(v, t) } else { bf16_place(v, t) };
        indices[t] = col as i32;
        t += 1;
    }
    indices
}

/// See [`crate::arch::accumulate_blocks`].
///
/// # Safety
///
/// AVX-512 as in [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
pub(crate) unsafe fn accumulate_blocks(
    weight: WeightType,
    planes: [&[u8]; 2],
    x: &[f32],
    sums: &mut [f32; BLOCK_ELEMS],
) {
    if weight.is_half() {
        blocks::<true>(planes, x, sums);
    } else {
        blocks::<false>(planes, x, sums);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
fn blocks<const HALF: bool>(planes: [&[u8]; 2], x: &[f32], sums: &mut [f32; BLOCK_ELEMS]) {
    let n_blocks = x.len() / BLOCK;
    assert!(planes.iter().all(|plane| plane.len() >= n_blocks * BLOCK_ELEMS), "planes too short");
    let columns = const { [column_indices(HALF, 0), column_indices(HALF, 1)] };
    // SAFETY: 16 indices each.
    let left = unsafe {
        [
            _mm512_loadu_si512(columns[0].as_ptr().cast()),
            _mm512_loadu_si512(columns[1].as_ptr().cast()),
        ]
    };
    let eight = _mm512_set1_epi32(8);
    let right = [_mm512_add_epi32(left[0], eight), _mm512_add_epi32(left[1], eight)];
    let mut acc = [_mm512_setzero_ps(); 16];
    for (i, acc) in acc.iter_mut().enumerate() {
        // SAFETY: 256 sums.
        *acc = unsafe { _mm512_loadu_ps(sums.as_ptr().add(16 * i)) };
    }
    for block in 0..n_blocks {
        // SAFETY: the block's 16 activations and 256 elements are there, see above.
        unsafe {
            let activations = _mm512_loadu_ps(x.as_ptr().add(block * BLOCK));
            let x = [
                [
                    _mm512_permutexvar_ps(left[0], activations),
                    _mm512_permutexvar_ps(left[1], activations),
                ],
                [
                    _mm512_permutexvar_ps(right[0], activations),
                    _mm512_permutexvar_ps(right[1], activations),
                ],
            ];
            for quarter in 0..4 {
                let at = block * BLOCK_ELEMS + 64 * quarter;
                let high = _mm512_loadu_si512(planes[0].as_ptr().add(at).cast());
                let low = _mm512_loadu_si512(planes[1].as_ptr().add(at).cast());
                let words = [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)];
                for half in 0..2 {
                    let w = widen::<HALF>(words[half]);
                    let first = 4 * quarter + 2 * half;
                    acc[first] = _mm512_fmadd_ps(w[0], x[quarter / 2][0], acc[first]);
                    acc[first + 1] = _mm512_fmadd_ps(w[1], x[quarter / 2][1], acc[first + 1]);
                }
            }
        }
    }
    for (i, acc) in acc.into_iter().enumerate() {
        // SAFETY: 256 sums.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr().add(16 * i), acc) };
    }
}

/// Widens 32 joined words in the order of [`bf16_place`] or [`f16_place`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
fn widen<const HALF: bool>(words: __m512i) -> [__m512; 2] {
    if HALF {
        [
            _mm512_cvtph_ps(_mm512_castsi512_si256(words)),
            _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(words)),
        ]
    } else {
        let words = _mm512_shrdi_epi16::<1>(words, words);
        let odd = _mm512_set1_epi32(0xFFFF_0000_u32 as i32);
        [
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)),
            _mm512_castsi512_ps(_mm512_and_si512(words, odd)),
        ]
    }
}

// ---------------------------------------------------------------------------
// Rows

/// See [`crate::arch::accumulate_run`].
///
/// # Safety
///
/// AVX-512 as in [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
pub(crate) unsafe fn accumulate_run(
    weight: WeightType,
    planes: [&[u8]; 2],
    x: &[f32],
    lane: usize,
    sums: &mut [f32; LANES_PER_ROW],
) {
    let n = x.len();
    assert!(planes.iter().all(|plane| plane.len() == n), "planes and activations differ");
    // Up to a column that is a multiple of 16.
    let head = n.min((LANES_PER_ROW - lane) % LANES_PER_ROW);
    let split = |at: usize| planes.map(|plane| plane.split_at(at));
    let [high, low] = split(head);
    let (x_head, x) = x.split_at(head);
    crate::arch::all::product::accumulate_run(weight, [high.0, low.0], x_head, lane, sums);
    // SAFETY: 16 sums.
    let mut acc = unsafe { _mm512_loadu_ps(sums.as_ptr()) };
    for first in (0..x.len()).step_by(LANES_PER_ROW) {
        let left = (x.len() - first).min(LANES_PER_ROW);
        let mask = ((1u32 << left) - 1) as u16;
        // SAFETY: the mask keeps the loads inside the slices.
        unsafe {
            let high = _mm_maskz_loadu_epi8(mask, high.1.as_ptr().add(first).cast());
            let low = _mm_maskz_loadu_epi8(mask, low.1.as_ptr().add(first).cast());
            let x = _mm512_maskz_loadu_ps(mask, x.as_ptr().add(first));
            let word = _mm256_slli_epi16::<8>(_mm256_cvtepu8_epi16(high));
            let word = _mm256_or_si256(word, _mm256_cvtepu8_epi16(low));
            let w = if weight.is_half() {
                _mm512_cvtph_ps(word)
            } else {
                let word = _mm256_shrdi_epi16::<1>(word, word);
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(word)))
            };
            acc = _mm512_mask3_fmadd_ps(w, x, acc, mask);
        }
    }
    // SAFETY: 16 sums.
    unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), acc) };
}

/// Rows multiplied at a time: enough to keep loads and additions in flight.
const ROWS: usize = 8;

/// See [`crate::arch::multiply_dense`].
///
/// # Safety
///
/// AVX-512 as in [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
pub(crate) unsafe fn multiply_dense(weight: WeightType, weights: &[u8], x: &[f32], y: &mut [f32]) {
    let row_bytes = x.len() * weight.elem_bytes();
    assert!(weights.len() >= row_bytes * y.len(), "fewer weights than outputs");
    for (i, y) in y.chunks_mut(ROWS).enumerate() {
        let weights = &weights[i * ROWS * row_bytes..];
        // SAFETY: as many rows as `y` has follow.
        unsafe {
            match (weight, y.len()) {
                (WeightType::Bf16, ROWS) => dense_rows::<ROWS>(weight, weights, x, y),
                (WeightType::F16, ROWS) => dense_rows::<ROWS>(weight, weights, x, y),
                (WeightType::F32, ROWS) => dense_rows::<ROWS>(weight, weights, x, y),
                _ => {
                    for (row, y) in y.iter_mut().enumerate() {
                        let y = std::slice::from_mut(y);
                        dense_rows::<1>(weight, &weights[row * row_bytes..], x, y);
                    }
                }
            }
        }
    }
}

/// # Safety
///
/// `weights` holds `N` rows, `y` as many outputs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
unsafe fn dense_rows<const N: usize>(weight: WeightType, weights: &[u8], x: &[f32], y: &mut [f32]) {
    let row_bytes = x.len() * weight.elem_bytes();
    let mut acc = [_mm512_setzero_ps(); N];
    let whole = x.len() / LANES_PER_ROW * LANES_PER_ROW;
    for col in (0..whole).step_by(LANES_PER_ROW) {
        // SAFETY: 16 columns of `N` rows are there.
        unsafe {
            let x = _mm512_loadu_ps(x.as_ptr().add(col));
            for (row, acc) in acc.iter_mut().enumerate() {
                let from = weights.as_ptr().add(row * row_bytes + col * weight.elem_bytes());
                let w = match weight {
                    WeightType::Bf16 => {
                        let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
                    }
                    WeightType::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())),
                    WeightType::F32 => _mm512_loadu_ps(from.cast()),
                };
                *acc = _mm512_fmadd_ps(w, x, *acc);
            }
        }
    }
    for (row, (acc, y)) in acc.into_iter().zip(y).enumerate() {
        let mut sums = [0.0; LANES_PER_ROW];
        // SAFETY: 16 sums.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), acc) };
        let weights = &weights[row * row_bytes..(row + 1) * row_bytes];
        for (lane, (c, x)) in (whole..).zip(&x[whole..]).enumerate() {
            let w = crate::arch::all::product::widen_dense(weight, weights, c);
            sums[lane] = w.mul_add(*x, sums[lane]);
        }
        *y = crate::arch::all::product::reduce(sums);
    }
}
