//! AVX2.

use std::arch::x86_64::*;

use super::blocks::{for_each_half, join_run, split_and_join, split_run};
use super::streams::{Kernel, run};
use crate::coder::rans::{DecodeTable, LANES, Stream};
use crate::dtype::Dtype;
use crate::tile::{Order, Tile};

/// Lanes of one vector.
const WIDTH: usize = 8;

// ---------------------------------------------------------------------------
// rANS, decoding

/// For each set of lanes that take a word: which word each lane takes.
const REFILL: [[u8; WIDTH]; 256] = {
    let mut table = [[0; WIDTH]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut word) = (0, 0);
        while lane < WIDTH {
            table[mask][lane] = word;
            word += (mask >> lane & 1) as u8;
            lane += 1;
        }
        mask += 1;
    }
    table
};

/// Decodes as many whole steps of one tile as it can; returns the number of
/// symbols of each plane. Four vectors of lanes keep the units busy, so one
/// tile at a time is enough.
///
/// # Safety
///
/// AVX2; `stream` has one or two slices, of one length.
#[target_feature(enable = "avx2")]
pub(crate) unsafe fn decode_whole_steps(
    tables: &[&DecodeTable],
    stream: &mut Stream<'_, '_, '_>,
) -> usize {
    let stream = std::slice::from_mut(stream);
    match *tables {
        // SAFETY: one stream with as many planes as matched on; the kernel
        // keeps to the conditions of `run`.
        [table] => unsafe { run::<1, 1>(stream, |k, n| steps([table], k, n)) },
        // SAFETY: as above.
        [first, second] => unsafe { run::<1, 2>(stream, |k, n| steps([first, second], k, n)) },
        _ => 0,
    }
}

/// # Safety
///
/// As [`run`] asks of its kernel.
#[target_feature(enable = "avx2")]
unsafe fn steps<const P: usize>(tables: [&DecodeTable; P], k: &mut Kernel<1, P>, n_steps: usize) {
    let mut states: [__m256i; LANES / WIDTH] = std::array::from_fn(|v| {
        // SAFETY: eight of 32 states.
        unsafe { _mm256_loadu_si256(k.states[0].as_ptr().add(WIDTH * v).cast()) }
    });
    let (mut words, mut outs) = (k.words[0], k.outs[0]);
    for _ in 0..n_steps {
        for (table, out) in tables.iter().zip(&mut outs) {
            let mut symbols = [_mm256_setzero_si256(); LANES / WIDTH];
            for (state, symbol) in states.iter_mut().zip(&mut symbols) {
                let decoded;
                (decoded, *symbol) = decode_symbol(table, *state);
                // Below 2^16, that is, high half zero: take words in lane order.
                let high = _mm256_srli_epi32::<16>(decoded);
                let refill = _mm256_cmpeq_epi32(high, _mm256_setzero_si256());
                let mask = _mm256_movemask_ps(_mm256_castsi256_ps(refill)) as usize;
                // SAFETY: `run` promises, of each 64 bytes of words, 16 for
                // every vector; an entry of the table has eight bytes.
                let (next, order) = unsafe {
                    (_mm_loadu_si128(words.cast()), _mm_loadl_epi64(REFILL[mask].as_ptr().cast()))
                };
                let next = _mm256_cvtepu16_epi32(next);
                let next = _mm256_permutevar8x32_epi32(next, _mm256_cvtepu8_epi32(order));
                let refilled = _mm256_or_si256(_mm256_slli_epi32::<16>(decoded), next);
                *state = _mm256_blendv_epi8(decoded, refilled, refill);
                // SAFETY: at most 16 bytes on, within what `run` promises.
                words = unsafe { words.add(2 * mask.count_ones() as usize) };
            }
            let [a, b, c, d] = symbols;
            let (ab, cd) = (_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
            let packed = _mm256_packus_epi16(ab, cd);
            let in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            // SAFETY: `run` promises room for 32 symbols a step.
            unsafe {
                let packed = _mm256_permutevar8x32_epi32(packed, in_order);
                _mm256_storeu_si256((*out).cast(), packed);
                *out = out.add(LANES);
            }
        }
    }
    for (v, state) in states.into_iter().enumerate() {
        // SAFETY: eight of 32 states.
        unsafe { _mm256_storeu_si256(k.states[0].as_mut_ptr().add(WIDTH * v).cast(), state) };
    }
    (k.words[0], k.outs[0]) = (words, outs);
}

/// Decodes one symbol of eight lanes: the states before refilling, and the symbols.
#[inline]
#[target_feature(enable = "avx2")]
fn decode_symbol(table: &DecodeTable, state: __m256i) -> (__m256i, __m256i) {
    let slot = _mm256_and_si256(state, _mm256_set1_epi32((1 << table.prob_bits) - 1));
    let quotient = _mm256_srl_epi32(state, _mm_cvtsi32_si128(table.prob_bits as i32));
    if let Some(slots) = &table.slots {
        // SAFETY: a slot is below `1 << prob_bits`, the number of entries.
        let entry = unsafe { _mm256_i32gather_epi32::<4>(slots.as_ptr().cast(), slot) };
        let freq = _mm256_add_epi32(_mm256_srli_epi32::<20>(entry), _mm256_set1_epi32(1));
        let offset = _mm256_and_si256(_mm256_srli_epi32::<8>(entry), _mm256_set1_epi32(0xFFF));
        let product = _mm256_mullo_epi32(freq, quotient);
        let symbol = _mm256_and_si256(entry, _mm256_set1_epi32(0xFF));
        return (_mm256_add_epi32(product, offset), symbol);
    }
    // SAFETY: a slot is below `1 << prob_bits`, and three bytes follow the symbols.
    let symbol = unsafe { _mm256_i32gather_epi32::<1>(table.symbols.as_ptr().cast(), slot) };
    let symbol = _mm256_and_si256(symbol, _mm256_set1_epi32(0xFF));
    // SAFETY: a symbol is below 256.
    let interval = unsafe { _mm256_i32gather_epi32::<4>(table.intervals.as_ptr().cast(), symbol) };
    let freq = _mm256_and_si256(interval, _mm256_set1_epi32(0xFFFF));
    let offset = _mm256_sub_epi32(slot, _mm256_srli_epi32::<16>(interval));
    (_mm256_add_epi32(_mm256_mullo_epi32(freq, quotient), offset), symbol)
}

// ---------------------------------------------------------------------------
// Split and join
//
// A half of a block is eight rows of 16 elements; its left and right quarters
// sit in the two 128-bit lanes of a vector and go the same way.

split_and_join!("avx2");

/// Transposes 4x4 groups of 32 bits in either 128-bit lane.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(rows: [__m256i; 4]) -> [__m256i; 4] {
    let [a, b, c, d] = rows;
    let (ab_low, ab_high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    let (cd_low, cd_high) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    [
        _mm256_unpacklo_epi64(ab_low, cd_low),
        _mm256_unpackhi_epi64(ab_low, cd_low),
        _mm256_unpacklo_epi64(ab_high, cd_high),
        _mm256_unpackhi_epi64(ab_high, cd_high),
    ]
}

/// Fragment order, two bytes an element.
#[target_feature(enable = "avx2")]
fn split_blocks<const ROTATE: bool>(
    tile: &Tile,
    source: &[u8],
    row_stride_bytes: usize,
    planes: &mut [u8],
) -> usize {
    let n = tile.n_elems();
    assert_eq!(planes.len(), 2 * n);
    // Of eight elements: low bytes of the even ones, of the odd ones, high bytes alike.
    let gather = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15,
    ));
    let (first, planes) = (source.as_ptr(), planes.as_mut_ptr());
    for_each_half(tile, 2, row_stride_bytes, source.len(), |offset, at| {
        for rows in 0..2 {
            // SAFETY: eight rows of 32 bytes are inside `source`; both
            // quarters, 64 elements each, are inside both planes.
            unsafe {
                let line = |r: usize| {
                    let line = first.add(offset + (4 * rows + r) * row_stride_bytes);
                    let v = _mm256_loadu_si256(line.cast());
                    let v = if ROTATE {
                        _mm256_or_si256(_mm256_slli_epi16::<1>(v), _mm256_srli_epi16::<15>(v))
                    } else {
                        v
                    };
                    _mm256_shuffle_epi8(v, gather)
                };
                let parts = transpose([line(0), line(1), line(2), line(3)]);
                let places = [n, n + 32, 0, 32];
                for (part, place) in parts.into_iter().zip(places) {
                    let left = planes.add(at + place + 16 * rows);
                    _mm_storeu_si128(left.cast(), _mm256_castsi256_si128(part));
                    let right = left.add(128);
                    _mm_storeu_si128(right.cast(), _mm256_extracti128_si256::<1>(part));
                }
            }
        }
    });
    n
}

/// Fragment order, two bytes an element.
#[target_feature(enable = "avx2")]
fn join_blocks<const ROTATE: bool>(
    tile: &Tile,
    planes: [&[u8]; 2],
    target: &mut [u8],
    row_stride_bytes: usize,
) -> usize {
    let n = tile.n_elems();
    assert_eq!(planes.map(<[u8]>::len), [n, n]);
    let (high, low) = (planes[0].as_ptr(), planes[1].as_ptr());
    let (len, target) = (target.len(), target.as_mut_ptr());
    for_each_half(tile, 2, row_stride_bytes, len, |offset, at| {
        for rows in 0..2 {
            // SAFETY: both quarters, 64 elements each, are inside both planes;
            // eight rows of 32 bytes are inside `target`.
            unsafe {
                let part = |plane: *const u8, odd: usize| {
                    let left = plane.add(at + 32 * odd + 16 * rows);
                    _mm256_loadu2_m128i(left.add(128).cast(), left.cast())
                };
                let rotate = |v: __m256i| {
                    if ROTATE {
                        _mm256_or_si256(_mm256_srli_epi16::<1>(v), _mm256_slli_epi16::<15>(v))
                    } else {
                        v
                    }
                };
                // Four rows of even columns, then of odd ones, as 16-bit words.
                let words = |odd: usize| {
                    let (low, high) = (part(low, odd), part(high, odd));
                    let (first, second) =
                        (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
                    [rotate(first), rotate(second)]
                };
                let (even, odd) = (words(0), words(1));
                for r in 0..2 {
                    let line = target.add(offset + (4 * rows + 2 * r) * row_stride_bytes);
                    let v = _mm256_unpacklo_epi16(even[r], odd[r]);
                    _mm256_storeu_si256(line.cast(), v);
                    let v = _mm256_unpackhi_epi16(even[r], odd[r]);
                    _mm256_storeu_si256(line.add(row_stride_bytes).cast(), v);
                }
            }
        }
    });
    n
}

/// Fragment order, one byte an element.
#[target_feature(enable = "avx2")]
fn split_byte_blocks(
    tile: &Tile,
    source: &[u8],
    row_stride_bytes: usize,
    plane: &mut [u8],
) -> usize {
    assert_eq!(plane.len(), tile.n_elems());
    // Of 16 columns: even and odd ones of the left quarter, of the right one.
    let gather = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15,
    ));
    let (first, plane) = (source.as_ptr(), plane.as_mut_ptr());
    for_each_half(tile, 1, row_stride_bytes, source.len(), |offset, at| {
        // SAFETY: eight rows of 16 bytes are inside `source`; both quarters,
        // 64 elements each, are inside the plane.
        unsafe {
            // Rows `r` and `r + 4` in the two lanes.
            let line = |r: usize| {
                let top = first.add(offset + r * row_stride_bytes);
                let bottom = top.add(4 * row_stride_bytes);
                let v = _mm256_loadu2_m128i(bottom.cast(), top.cast());
                _mm256_shuffle_epi8(v, gather)
            };
            let parts = transpose([line(0), line(1), line(2), line(3)]);
            for (part, place) in parts.into_iter().zip([0, 32, 128, 160]) {
                _mm256_storeu_si256(plane.add(at + place).cast(), part);
            }
        }
    });
    tile.n_elems()
}

/// Fragment order, one byte an element.
#[target_feature(enable = "avx2")]
fn join_byte_blocks(
    tile: &Tile,
    plane: &[u8],
    target: &mut [u8],
    row_stride_bytes: usize,
) -> usize {
    assert_eq!(plane.len(), tile.n_elems());
    let scatter = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15,
    ));
    let plane = plane.as_ptr();
    let (len, target) = (target.len(), target.as_mut_ptr());
    for_each_half(tile, 1, row_stride_bytes, len, |offset, at| {
        // SAFETY: both quarters, 64 elements each, are inside the plane; eight
        // rows of 16 bytes are inside `target`.
        unsafe {
            let part = |place: usize| _mm256_loadu_si256(plane.add(at + place).cast());
            let rows = transpose([part(0), part(32), part(128), part(160)]);
            for (r, row) in rows.into_iter().enumerate() {
                let v = _mm256_shuffle_epi8(row, scatter);
                let top: *mut u8 = target.add(offset + r * row_stride_bytes);
                _mm_storeu_si128(top.cast(), _mm256_castsi256_si128(v));
                let bottom = top.add(4 * row_stride_bytes);
                _mm_storeu_si128(bottom.cast(), _mm256_extracti128_si256::<1>(v));
            }
        }
    });
    tile.n_elems()
}
