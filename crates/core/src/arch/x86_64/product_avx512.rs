//! The arithmetic of [`crate::product`] with AVX-512.
//!
//! Accumulators keep the order in which unpacking leaves the elements, so that
//! no weight is ever moved between lanes; only the final sum, once a row, needs
//! to know which is which ([`row_indices`]).

use std::arch::x86_64::*;
use std::array::from_fn;

use crate::arch::{Inputs, LANES_PER_ROW, RowIndices, rows_of_places};
use crate::layout::{Band, CHUNK_ELEMS, Coding, GROUP, Values, WeightType};
use crate::tile::{BLOCK, BLOCK_ELEMS};

// ---------------------------------------------------------------------------
// Fields of the fixed layout

/// How the fields of a coding become high bytes: two look-ups in tables of 64
/// entries. An index counts modulo 64, and entries repeat, so that what a shift
/// leaves above a field needs no mask.
trait Fields {
    const CODING: Coding;

    /// The tables of a palette.
    fn tables(palette: &[u8; 16]) -> [[u8; GROUP]; 2];

    /// The high bytes of a group.
    ///
    /// # Safety
    ///
    /// AVX-512; the group's fields are readable at `from`.
    unsafe fn unpack(from: *const u8, tables: [__m512i; 2]) -> __m512i;
}

struct Exponent3;
struct Exponent4;
struct Half3;
/// A window of `1 << BITS` integers.
struct Window<const BITS: u32>;

impl Fields for Exponent3 {
    const CODING: Coding = Coding::Exponent3;

    fn tables(palette: &[u8; 16]) -> [[u8; GROUP]; 2] {
        [from_fn(|i| palette[i % 4]), from_fn(|i| palette[4 + i % 4])]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
    unsafe fn unpack(from: *const u8, tables: [__m512i; 2]) -> __m512i {
        // SAFETY: the caller's promise; a group has 24 bytes.
        let (low, ones) = unsafe { (two_bits(from), from.add(16).cast::<u64>().read_unaligned()) };
        let below_four = _mm512_permutexvar_epi8(low, tables[0]);
        _mm512_mask_permutexvar_epi8(below_four, ones, low, tables[1])
    }
}

impl Fields for Exponent4 {
    const CODING: Coding = Coding::Exponent4;

    fn tables(palette: &[u8; 16]) -> [[u8; GROUP]; 2] {
        [from_fn(|i| palette[i % 16]); 2]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
    unsafe fn unpack(from: *const u8, tables: [__m512i; 2]) -> __m512i {
        // SAFETY: the caller's promise; a group has 32 bytes.
        _mm512_permutexvar_epi8(unsafe { four_bits(from) }, tables[0])
    }
}

impl Fields for Half3 {
    const CODING: Coding = Coding::Half3;

    /// Code and mantissa bit 0, then mantissa bit 1 and sign.
    fn tables(palette: &[u8; 16]) -> [[u8; GROUP]; 2] {
        [
            from_fn(|i| palette[i % 8] << 2 | (i / 8 % 2) as u8),
            from_fn(|i| ((i % 2) << 1 | (i / 2 % 2) << 7) as u8),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
    unsafe fn unpack(from: *const u8, tables: [__m512i; 2]) -> __m512i {
        // SAFETY: the caller's promise; a group has 48 bytes.
        let (low, top) = unsafe { (four_bits(from), two_bits(from.add(32))) };
        let low = _mm512_permutexvar_epi8(low, tables[0]);
        _mm512_or_si512(low, _mm512_permutexvar_epi8(top, tables[1]))
    }
}

impl<const BITS: u32> Fields for Window<BITS> {
    const CODING: Coding = match BITS {
        4 => Coding::Window4,
        5 => Coding::Window5,
        6 => Coding::Window6,
        _ => Coding::Window7,
    };

    /// The sum of the least integer and four bits, then that of two more.
    fn tables(palette: &[u8; 16]) -> [[u8; GROUP]; 2] {
        [from_fn(|i| palette[0].wrapping_add((i % 16) as u8)), from_fn(|i| ((i % 4) << 4) as u8)]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
    unsafe fn unpack(from: *const u8, tables: [__m512i; 2]) -> __m512i {
        // SAFETY: the caller's promise; a group has so many bytes.
        let mut sum = _mm512_permutexvar_epi8(unsafe { four_bits(from) }, tables[0]);
        let mut done = 32;
        if BITS >= 6 {
            // SAFETY: as above.
            let two = _mm512_permutexvar_epi8(unsafe { two_bits(from.add(done)) }, tables[1]);
            sum = _mm512_add_epi8(sum, two);
            done += 16;
        }
        if BITS % 2 == 1 {
            // SAFETY: as above.
            let ones = unsafe { from.add(done).cast::<u64>().read_unaligned() };
            let top = _mm512_set1_epi8(1 << (BITS - 1));
            sum = _mm512_mask_add_epi8(sum, ones, sum, top);
        }
        sum
    }
}

/// 64 fields of two bits from 16 bytes, with other bits above them.
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
    _mm512_srlv_epi32(v, shifts)
}

/// 64 fields of four bits from 32 bytes, with other bits above them.
///
/// # Safety
///
/// 32 bytes are readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn four_bits(from: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    let v = _mm512_broadcast_i64x4(unsafe { _mm256_loadu_si256(from.cast()) });
    _mm512_srlv_epi64(v, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_tables<F: Fields>(palette: &[u8; 16]) -> [__m512i; 2] {
    let [first, second] = F::tables(palette);
    // SAFETY: 64 entries each.
    unsafe {
        [_mm512_loadu_si512(first.as_ptr().cast()), _mm512_loadu_si512(second.as_ptr().cast())]
    }
}

/// See [`crate::arch::unpack_highs`].
///
/// # Safety
///
/// AVX-512 as in [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
pub(crate) unsafe fn unpack_highs(
    coding: Coding,
    palette: &[u8; 16],
    fields: &[u8],
    high: &mut [u8; CHUNK_ELEMS],
) {
    match coding {
        Coding::Exponent3 => {
            unpack_groups::<Exponent3>(load_tables::<Exponent3>(palette), fields, high)
        }
        Coding::Exponent4 => {
            unpack_groups::<Exponent4>(load_tables::<Exponent4>(palette), fields, high)
        }
        Coding::Half3 => unpack_groups::<Half3>(load_tables::<Half3>(palette), fields, high),
        Coding::Window4 => {
            unpack_groups::<Window<4>>(load_tables::<Window<4>>(palette), fields, high)
        }
        Coding::Window5 => {
            unpack_groups::<Window<5>>(load_tables::<Window<5>>(palette), fields, high)
        }
        Coding::Window6 => {
            unpack_groups::<Window<6>>(load_tables::<Window<6>>(palette), fields, high)
        }
        Coding::Window7 => {
            unpack_groups::<Window<7>>(load_tables::<Window<7>>(palette), fields, high)
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
fn unpack_groups<F: Fields>(tables: [__m512i; 2], fields: &[u8], high: &mut [u8; CHUNK_ELEMS]) {
    let group_bytes = const { F::CODING.group_bytes() };
    for (fields, high) in fields.chunks_exact(group_bytes).zip(high.as_chunks_mut::<GROUP>().0) {
        // SAFETY: a group of fields is there, and room for 64 bytes.
        unsafe {
            let bytes = F::unpack(fields.as_ptr(), tables);
            _mm512_storeu_si512(high.as_mut_ptr().cast(), bytes);
        }
    }
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

static BF16_ROWS: RowIndices = rows_of_places(&block_places(false));
static F16_ROWS: RowIndices = rows_of_places(&block_places(true));

/// See [`crate::arch::accumulator_indices`].
pub(crate) fn row_indices(weight: WeightType) -> &'static RowIndices {
    match weight {
        WeightType::F16 => &F16_ROWS,
        // Bytes stay where they are.
        WeightType::I8 => &crate::arch::all::product::ROW_INDICES,
        _ => &BF16_ROWS,
    }
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
    values: Values<'_>,
    planes: [&[u8]; 2],
    x: &[f32],
    sums: &mut [f32; BLOCK_ELEMS],
) {
    match values.weight {
        WeightType::I8 => {
            let mut acc = load_sums(sums);
            add_integers(planes[0], x, &scales_of_rows(values.scales), &mut acc, |_| ());
            store_sums(acc, sums);
        }
        WeightType::F16 => blocks::<true>(planes, x, sums),
        _ => blocks::<false>(planes, x, sums),
    }
}

/// The accumulators of a block: 16 vectors, quarters in element order.
type Accumulators = [__m512; 16];

#[inline]
#[target_feature(enable = "avx512f")]
fn load_sums(sums: &[f32; BLOCK_ELEMS]) -> Accumulators {
    let mut acc = [_mm512_setzero_ps(); 16];
    for i in 0..16 {
        // SAFETY: 256 sums.
        acc[i] = unsafe { _mm512_loadu_ps(sums.as_ptr().add(16 * i)) };
    }
    acc
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_sums(acc: Accumulators, sums: &mut [f32; BLOCK_ELEMS]) {
    for i in 0..16 {
        // SAFETY: 256 sums.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr().add(16 * i), acc[i]) };
    }
}

/// Columns of the lanes, of even and odd elements of the left and the right quarters.
#[inline]
#[target_feature(enable = "avx512f")]
fn columns<const HALF: bool>() -> [[__m512i; 2]; 2] {
    let columns = const { [column_indices(HALF, 0), column_indices(HALF, 1)] };
    // SAFETY: 16 indices each.
    let left = unsafe {
        [
            _mm512_loadu_si512(columns[0].as_ptr().cast()),
            _mm512_loadu_si512(columns[1].as_ptr().cast()),
        ]
    };
    let eight = _mm512_set1_epi32(8);
    [left, [_mm512_add_epi32(left[0], eight), _mm512_add_epi32(left[1], eight)]]
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
fn blocks<const HALF: bool>(planes: [&[u8]; 2], x: &[f32], sums: &mut [f32; BLOCK_ELEMS]) {
    let mut acc = load_sums(sums);
    add_blocks::<HALF>(planes, x, &columns::<HALF>(), &mut acc, |_| ());
    store_sums(acc, sums);
}

/// Multiplies whole blocks with one token; `before_block` is called with the
/// index of each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
fn add_blocks<const HALF: bool>(
    planes: [&[u8]; 2],
    x: &[f32],
    columns: &[[__m512i; 2]; 2],
    acc: &mut Accumulators,
    before_block: impl Fn(usize),
) {
    let n_blocks = x.len() / BLOCK;
    assert!(planes.iter().all(|plane| plane.len() >= n_blocks * BLOCK_ELEMS), "planes too short");
    for block in 0..n_blocks {
        before_block(block);
        // SAFETY: the block's 16 activations and 256 elements are there, see above.
        unsafe {
            let activations = _mm512_loadu_ps(x.as_ptr().add(block * BLOCK));
            for quarter in 0..4 {
                let columns = columns[quarter / 2];
                let even = _mm512_permutexvar_ps(columns[0], activations);
                let odd = _mm512_permutexvar_ps(columns[1], activations);
                let at = block * BLOCK_ELEMS + 64 * quarter;
                let high = _mm512_loadu_si512(planes[0].as_ptr().add(at).cast());
                let low = _mm512_loadu_si512(planes[1].as_ptr().add(at).cast());
                let words = [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)];
                for half in 0..2 {
                    let w = widen::<HALF>(words[half]);
                    let first = 4 * quarter + 2 * half;
                    acc[first] = _mm512_fmadd_ps(w[0], even, acc[first]);
                    acc[first + 1] = _mm512_fmadd_ps(w[1], odd, acc[first + 1]);
                }
            }
        }
    }
}

/// The scale of each lane of 16 consecutive integers: those of four rows, for
/// rows 0, 4, 8 and 12 on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn scales_of_rows(scales: &[f32]) -> [__m512; 4] {
    assert!(scales.len() >= BLOCK, "a scale for each row of the block");
    let lane_rows = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    let mut out = [_mm512_setzero_ps(); 4];
    for (i, out) in out.iter_mut().enumerate() {
        // SAFETY: there are 16 scales.
        let four = unsafe { _mm_loadu_ps(scales.as_ptr().add(4 * i)) };
        *out = _mm512_permutexvar_ps(lane_rows, _mm512_broadcast_f32x4(four));
    }
    out
}

/// What 16 integers stand for; see [`crate::quantize`].
#[inline]
#[target_feature(enable = "avx512f")]
fn dequantise(integers: __m128i, scales: __m512) -> __m512 {
    let product = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(integers)), scales);
    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm512_cvtph_ps(_mm512_cvtps_ph::<NEAREST>(product))
}

/// Multiplies whole blocks of integers with one token. Accumulators are in the
/// order of the elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
fn add_integers(
    integers: &[u8],
    x: &[f32],
    scales: &[__m512; 4],
    acc: &mut Accumulators,
    before_block: impl Fn(usize),
) {
    let n_blocks = x.len() / BLOCK;
    assert!(integers.len() >= n_blocks * BLOCK_ELEMS, "integers end early");
    // Element i of a quarter lies in column 2 * (i % 4) + i / 32, eight more
    // in the right quarters.
    let even = _mm512_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6, 0, 2, 4, 6, 0, 2, 4, 6);
    for block in 0..n_blocks {
        before_block(block);
        // SAFETY: the block's 16 activations and 256 elements are there, see above.
        unsafe {
            let activations = _mm512_loadu_ps(x.as_ptr().add(block * BLOCK));
            for side in 0..2 {
                for odd in 0..2 {
                    let first = _mm512_set1_epi32(8 * side as i32 + odd as i32);
                    let columns = _mm512_add_epi32(even, first);
                    let inputs = _mm512_permutexvar_ps(columns, activations);
                    for rows in 0..4 {
                        // Quarters: upper left, lower left, upper right, lower right.
                        let vector = 8 * side + 4 * (rows / 2) + 2 * odd + rows % 2;
                        let at = integers.as_ptr().add(block * BLOCK_ELEMS + 16 * vector);
                        let weights = dequantise(_mm_loadu_si128(at.cast()), scales[rows]);
                        acc[vector] = _mm512_fmadd_ps(weights, inputs, acc[vector]);
                    }
                }
            }
        }
    }
}

/// See [`crate::arch::dequantise_row`].
///
/// # Safety
///
/// AVX-512 as in [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
pub(crate) unsafe fn dequantise_row(integers: &[u8], scale: f32, out: &mut [f32]) {
    let n = integers.len().min(out.len());
    let scales = _mm512_set1_ps(scale);
    for first in (0..n).step_by(LANES_PER_ROW) {
        let mask = ((1u32 << (n - first).min(LANES_PER_ROW)) - 1) as __mmask16;
        // SAFETY: the mask keeps within both slices.
        unsafe {
            let bytes = _mm_maskz_loadu_epi8(mask, integers.as_ptr().add(first).cast());
            let out = out.as_mut_ptr().add(first);
            _mm512_mask_storeu_ps(out, mask, dequantise(bytes, scales));
        }
    }
}

/// See [`crate::arch::accumulate_band`]; one token.
///
/// # Safety
///
/// AVX-512 as in [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
pub(crate) unsafe fn accumulate_band(
    values: Values<'_>,
    band: Band<'_>,
    x: &[f32],
    sums: &mut [f32; BLOCK_ELEMS],
) {
    match band.coding {
        Coding::Window4 => band_integers::<Window<4>>(values, band, x, sums),
        Coding::Window5 => band_integers::<Window<5>>(values, band, x, sums),
        Coding::Window6 => band_integers::<Window<6>>(values, band, x, sums),
        Coding::Window7 => band_integers::<Window<7>>(values, band, x, sums),
        Coding::Exponent3 => band_blocks::<Exponent3, false>(band, x, sums),
        Coding::Exponent4 => band_blocks::<Exponent4, false>(band, x, sums),
        Coding::Half3 => band_blocks::<Half3, true>(band, x, sums),
    }
}

/// Bytes from what is multiplied to what is fetched meanwhile, into the second
/// cache: the first one has too few misses under way to keep memory busy
/// (0.9 against 1.4 times the speed of dense on Zen 4, whatever the distance).
const FETCH_AHEAD: usize = 32 << 10;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
fn band_blocks<F: Fields, const HALF: bool>(
    band: Band<'_>,
    mut x: &[f32],
    sums: &mut [f32; BLOCK_ELEMS],
) {
    let tables = load_tables::<F>(band.palette);
    let columns = columns::<HALF>();
    let mut acc = load_sums(sums);
    let mut high = [0; CHUNK_ELEMS];
    let block_bytes = const { F::CODING.field_bytes(BLOCK_ELEMS) + BLOCK_ELEMS };
    for chunk in band.chunks() {
        unpack_groups::<F>(tables, chunk.fields, &mut high);
        chunk.patch(&mut high);
        let now;
        (now, x) = x.split_at(chunk.low.len() / BLOCK);
        let ahead = chunk.fields.as_ptr().wrapping_add(FETCH_AHEAD);
        add_blocks::<HALF>([&high, chunk.low], now, &columns, &mut acc, |block| {
            for line in 0..block_bytes.div_ceil(64) {
                // Prefetching has no effect but on time, whatever the address.
                let at = ahead.wrapping_add(block * block_bytes + 64 * line);
                _mm_prefetch::<_MM_HINT_T1>(at.cast());
            }
        });
    }
    store_sums(acc, sums);
}

/// [`band_blocks`] of integers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
fn band_integers<F: Fields>(
    values: Values<'_>,
    band: Band<'_>,
    mut x: &[f32],
    sums: &mut [f32; BLOCK_ELEMS],
) {
    let tables = load_tables::<F>(band.palette);
    let scales = scales_of_rows(values.scales);
    let mut acc = load_sums(sums);
    let mut integers = [0; CHUNK_ELEMS];
    let block_bytes = const { F::CODING.field_bytes(BLOCK_ELEMS) };
    for chunk in band.chunks() {
        unpack_groups::<F>(tables, chunk.fields, &mut integers);
        chunk.patch(&mut integers);
        let now;
        (now, x) = x.split_at(chunk.n_elems / BLOCK);
        let ahead = chunk.fields.as_ptr().wrapping_add(FETCH_AHEAD);
        add_integers(&integers, now, &scales, &mut acc, |block| {
            for line in 0..block_bytes.div_ceil(64) {
                // Prefetching has no effect but on time, whatever the address.
                let at = ahead.wrapping_add(block * block_bytes + 64 * line);
                _mm_prefetch::<_MM_HINT_T1>(at.cast());
            }
        });
    }
    store_sums(acc, sums);
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
    values: Values<'_>,
    planes: [&[u8]; 2],
    x: &[f32],
    lane: usize,
    sums: &mut [f32; LANES_PER_ROW],
) {
    let n = x.len();
    let is_integer = values.weight == WeightType::I8;
    let low_bytes = if is_integer { 0 } else { n };
    let lens = planes.map(<[u8]>::len);
    assert_eq!(lens, [n, low_bytes], "planes and activations differ");
    // Up to a column that is a multiple of 16.
    let head = n.min((LANES_PER_ROW - lane) % LANES_PER_ROW);
    let [high, low] = planes.map(|plane| plane.split_at(head.min(plane.len())));
    let (x_head, x) = x.split_at(head);
    crate::arch::all::product::accumulate_run(values, [high.0, low.0], x_head, lane, sums);
    let scales = _mm512_set1_ps(values.scales.first().copied().unwrap_or(1.0));
    // SAFETY: 16 sums.
    let mut acc = unsafe { _mm512_loadu_ps(sums.as_ptr()) };
    for first in (0..x.len()).step_by(LANES_PER_ROW) {
        let left = (x.len() - first).min(LANES_PER_ROW);
        let mask = ((1u32 << left) - 1) as u16;
        // SAFETY: the mask keeps the loads inside the slices.
        unsafe {
            let high = _mm_maskz_loadu_epi8(mask, high.1.as_ptr().add(first).cast());
            let x = _mm512_maskz_loadu_ps(mask, x.as_ptr().add(first));
            if is_integer {
                acc = _mm512_mask3_fmadd_ps(dequantise(high, scales), x, acc, mask);
                continue;
            }
            let low = _mm_maskz_loadu_epi8(mask, low.1.as_ptr().add(first).cast());
            let word = _mm256_slli_epi16::<8>(_mm256_cvtepu8_epi16(high));
            let word = _mm256_or_si256(word, _mm256_cvtepu8_epi16(low));
            let w = if values.weight.is_half() {
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

/// Dense rows multiplied at the same time with a single token: enough to keep
/// loads and additions in flight.
const ROWS: usize = 8;
/// Dense rows, and tokens, multiplied at the same time if there are more.
const SIDE: usize = 4;

/// A type of row-major elements.
trait Element {
    const BYTES: usize;

    /// The elements of 16 columns that `mask` selects, zeros for the others.
    ///
    /// # Safety
    ///
    /// AVX-512; the selected elements are readable at `from`.
    unsafe fn load(mask: __mmask16, from: *const u8) -> __m512;
}

struct Bf16;
struct F16;
struct F32;

impl Element for Bf16 {
    const BYTES: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
    unsafe fn load(mask: __mmask16, from: *const u8) -> __m512 {
        // SAFETY: the caller's promise; a masked load touches nothing else.
        let words = unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words)))
    }
}

impl Element for F16 {
    const BYTES: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
    unsafe fn load(mask: __mmask16, from: *const u8) -> __m512 {
        // SAFETY: as above.
        _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) })
    }
}

impl Element for F32 {
    const BYTES: usize = 4;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
    unsafe fn load(mask: __mmask16, from: *const u8) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_maskz_loadu_ps(mask, from.cast()) }
    }
}

/// The sum of a row's accumulators, in the order of the definition.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
fn tree(sums: __m512) -> f32 {
    let eight = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps::<1>(sums));
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// See [`crate::arch::multiply_dense`].
///
/// # Safety
///
/// AVX-512 as in [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
pub(crate) unsafe fn multiply_dense(
    weight: WeightType,
    elems: &[u8],
    x: &[f32],
    cols: usize,
    y: &mut [f32],
) {
    let row_bytes = cols * weight.elem_bytes();
    assert_eq!(elems.len() % row_bytes, 0, "part of a row");
    assert_eq!(x.len() * (elems.len() / row_bytes), y.len() * cols, "x and y differ in tokens");
    assert_eq!(x.len() % cols, 0, "part of a token");
    // SAFETY: the lengths agree.
    unsafe {
        match weight {
            WeightType::Bf16 => multiply_rows::<Bf16>(elems, x, cols, y),
            WeightType::F16 => multiply_rows::<F16>(elems, x, cols, y),
            WeightType::F32 => multiply_rows::<F32>(elems, x, cols, y),
            WeightType::I8 => unreachable!("integers are dequantised first"),
        }
    }
}

/// # Safety
///
/// AVX-512; `elems` holds whole rows, `x` is `tokens * cols` and `y` `tokens * rows`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
unsafe fn multiply_rows<E: Element>(elems: &[u8], x: &[f32], cols: usize, y: &mut [f32]) {
    let row_bytes = cols * E::BYTES;
    let (n_rows, n_tokens) = (elems.len() / row_bytes, x.len() / cols);
    let mut row = 0;
    while row < n_rows {
        let mut token = 0;
        let left = n_rows - row;
        let rows = match left {
            ROWS.. if n_tokens == 1 => ROWS,
            SIDE.. => SIDE,
            _ => 1,
        };
        while token < n_tokens {
            let tokens = if n_tokens - token >= SIDE { SIDE } else { 1 };
            let elems = &elems[row * row_bytes..];
            let x = &x[token * cols..];
            let y = &mut y[token * n_rows + row..];
            // SAFETY: so many rows and tokens are left.
            unsafe {
                match (rows, tokens) {
                    (ROWS, _) => multiply::<E, ROWS, 1>(elems, x, cols, y, n_rows),
                    (SIDE, SIDE) => multiply::<E, SIDE, SIDE>(elems, x, cols, y, n_rows),
                    (SIDE, _) => multiply::<E, SIDE, 1>(elems, x, cols, y, n_rows),
                    (_, SIDE) => multiply::<E, 1, SIDE>(elems, x, cols, y, n_rows),
                    _ => multiply::<E, 1, 1>(elems, x, cols, y, n_rows),
                }
            }
            token += tokens;
        }
        row += rows;
    }
}

/// Multiplies `R` rows with `T` tokens; outputs of a token are `n_rows` apart.
///
/// # Safety
///
/// AVX-512; `elems` has `R` rows, `x` has `T` tokens, and `y` room for their products.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
unsafe fn multiply<E: Element, const R: usize, const T: usize>(
    elems: &[u8],
    x: &[f32],
    cols: usize,
    y: &mut [f32],
    n_rows: usize,
) {
    let mut sums = [[_mm512_setzero_ps(); T]; R];
    // SAFETY: the caller's promise; tokens lie end to end.
    unsafe { multiply_add_all::<E, R, T>(elems, x, cols, cols, &mut sums) };
    for (r, sums) in sums.into_iter().enumerate() {
        for (t, sums) in sums.into_iter().enumerate() {
            y[t * n_rows + r] = tree(sums);
        }
    }
}

/// See [`crate::arch::accumulate_rows`].
///
/// # Safety
///
/// AVX-512 as in [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
pub(crate) unsafe fn accumulate_rows(
    weight: WeightType,
    elems: &[u8],
    inputs: Inputs<'_>,
    n_tokens: usize,
    sums: &mut [[f32; LANES_PER_ROW]],
) {
    let row_bytes = inputs.n_cols * weight.elem_bytes();
    assert_eq!(elems.len(), sums.len() / n_tokens * row_bytes, "rows and sums differ");
    assert!(inputs.x.len() >= (n_tokens - 1) * inputs.stride + inputs.n_cols, "x ends early");
    // SAFETY: the lengths agree.
    unsafe {
        match weight {
            WeightType::Bf16 => add_rows::<Bf16>(elems, inputs, n_tokens, sums),
            WeightType::F16 => add_rows::<F16>(elems, inputs, n_tokens, sums),
            WeightType::F32 => add_rows::<F32>(elems, inputs, n_tokens, sums),
            WeightType::I8 => unreachable!("integers are dequantised first"),
        }
    }
}

/// See [`crate::arch::accumulate_floats`].
///
/// # Safety
///
/// AVX-512 as in [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
pub(crate) unsafe fn accumulate_floats(
    weights: &[f32],
    inputs: Inputs<'_>,
    n_tokens: usize,
    sums: &mut [[f32; LANES_PER_ROW]],
) {
    // SAFETY: floats are bytes, four times as many; x86-64 is little endian.
    let bytes =
        unsafe { std::slice::from_raw_parts(weights.as_ptr().cast::<u8>(), size_of_val(weights)) };
    // SAFETY: the caller's promise.
    unsafe { accumulate_rows(WeightType::F32, bytes, inputs, n_tokens, sums) };
}

/// # Safety
///
/// AVX-512; `elems` holds as many rows as `sums` does, `inputs` `n_tokens` tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
unsafe fn add_rows<E: Element>(
    elems: &[u8],
    inputs: Inputs<'_>,
    n_tokens: usize,
    sums: &mut [[f32; LANES_PER_ROW]],
) {
    let n_rows = sums.len() / n_tokens;
    let mut row = 0;
    while row < n_rows {
        let rows = if n_rows - row >= SIDE { SIDE } else { 1 };
        let elems = &elems[row * inputs.n_cols * E::BYTES..];
        let mut token = 0;
        while token < n_tokens {
            let tokens = if n_tokens - token >= SIDE { SIDE } else { 1 };
            let x = &inputs.x[token * inputs.stride..];
            let sums = &mut sums[row * n_tokens + token..];
            // SAFETY: so many rows and tokens are left.
            unsafe {
                match (rows, tokens) {
                    (SIDE, SIDE) => add::<E, SIDE, SIDE>(elems, x, inputs, n_tokens, sums),
                    (SIDE, _) => add::<E, SIDE, 1>(elems, x, inputs, n_tokens, sums),
                    (_, SIDE) => add::<E, 1, SIDE>(elems, x, inputs, n_tokens, sums),
                    _ => add::<E, 1, 1>(elems, x, inputs, n_tokens, sums),
                }
            }
            token += tokens;
        }
        row += rows;
    }
}

/// Adds the products of `R` rows with `T` tokens; sums of a row are `n_tokens`
/// from those of the next.
///
/// # Safety
///
/// AVX-512; `elems` has `R` rows, `x` has `T` tokens at the distance `inputs` names.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
unsafe fn add<E: Element, const R: usize, const T: usize>(
    elems: &[u8],
    x: &[f32],
    inputs: Inputs<'_>,
    n_tokens: usize,
    sums: &mut [[f32; LANES_PER_ROW]],
) {
    let mut acc = [[_mm512_setzero_ps(); T]; R];
    for r in 0..R {
        for t in 0..T {
            // SAFETY: 16 sums.
            acc[r][t] = unsafe { _mm512_loadu_ps(sums[r * n_tokens + t].as_ptr()) };
        }
    }
    // SAFETY: the caller's promise.
    unsafe { multiply_add_all::<E, R, T>(elems, x, inputs.n_cols, inputs.stride, &mut acc) };
    for r in 0..R {
        for t in 0..T {
            // SAFETY: 16 sums.
            unsafe { _mm512_storeu_ps(sums[r * n_tokens + t].as_mut_ptr(), acc[r][t]) };
        }
    }
}

/// Adds all columns of `R` rows, which lie end to end, and `T` tokens, which
/// are `stride` apart.
///
/// # Safety
///
/// AVX-512; `elems` has `R` rows, `x` has `T` tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
unsafe fn multiply_add_all<E: Element, const R: usize, const T: usize>(
    elems: &[u8],
    x: &[f32],
    cols: usize,
    stride: usize,
    sums: &mut [[__m512; T]; R],
) {
    debug_assert!(elems.len() >= R * cols * E::BYTES && x.len() >= (T - 1) * stride + cols);
    let whole = cols / BLOCK * BLOCK;
    for first in (0..whole).step_by(BLOCK) {
        // SAFETY: 16 columns from `first` on are inside every row.
        unsafe { multiply_add::<E, R, T>(elems, x, [cols, stride], first, !0, sums) };
    }
    if whole < cols {
        let mask = ((1u32 << (cols - whole)) - 1) as __mmask16;
        // SAFETY: the mask selects what is left of every row.
        unsafe { multiply_add::<E, R, T>(elems, x, [cols, stride], whole, mask, sums) };
    }
}

/// Adds the columns from `first` on that `mask` selects.
///
/// # Safety
///
/// AVX-512; the selected columns are inside the `R` rows and `T` tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
unsafe fn multiply_add<E: Element, const R: usize, const T: usize>(
    elems: &[u8],
    x: &[f32],
    [cols, stride]: [usize; 2],
    first: usize,
    mask: __mmask16,
    sums: &mut [[__m512; T]; R],
) {
    let mut inputs = [_mm512_setzero_ps(); T];
    for (t, inputs) in inputs.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *inputs = unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr().add(t * stride + first)) };
    }
    for (r, sums) in sums.iter_mut().enumerate() {
        // SAFETY: as above.
        let weights = unsafe { E::load(mask, elems.as_ptr().add((r * cols + first) * E::BYTES)) };
        for (sum, inputs) in sums.iter_mut().zip(inputs) {
            *sum = _mm512_mask3_fmadd_ps(weights, inputs, *sum, mask);
        }
    }
}
