//! AVX-512 with VBMI and VBMI2.

use std::arch::x86_64::*;

use super::blocks::{for_each_half, join_run, split_and_join, split_run};
use super::streams::{Kernel, run};
use crate::arch::rank_table::RARE_START;
use crate::arch::{EncodeRanks, RankTable};
use crate::coder::rans::{DecodeTable, EncodeTable, LANES, Stream};
use crate::dtype::Dtype;
use crate::tile::{Order, Tile};

/// Word `i` of the first vector for each even `i` of the pair `(a, b)` seen as
/// one row of 64 words; used to gather low or high halves of 32-bit lanes.
const EVEN_WORDS: [u16; 32] = word_indices(2, 0);
const ODD_WORDS: [u16; 32] = word_indices(2, 1);

const fn word_indices(stride: u16, first: u16) -> [u16; 32] {
    let mut indices = [0; 32];
    let mut i = 0;
    while i < 32 {
        indices[i] = first + stride * i as u16;
        i += 1;
    }
    indices
}

/// Words of `(a, b)` that interleave lanes `first..first + 16` of both.
const fn interleave_indices(first: u16) -> [u16; 32] {
    let mut indices = [0; 32];
    let mut i = 0;
    while i < 16 {
        indices[2 * i] = first + i as u16;
        indices[2 * i + 1] = 32 + first + i as u16;
        i += 1;
    }
    indices
}

/// Loads a whole vector from an array of 64 bytes.
#[inline]
#[target_feature(enable = "avx512f")]
fn load<T, const L: usize>(array: &[T; L]) -> __m512i {
    const { assert!(size_of::<T>() * L >= 64) };
    // SAFETY: the array has at least 64 bytes.
    unsafe { _mm512_loadu_si512(array.as_ptr().cast()) }
}

/// Loads 64 bytes into a register.
///
/// In assembly, because the compiler would otherwise make the load an operand
/// of the expansion that follows, which is slower on Zen 4 (2.4 against
/// 2.7 GB/s of BF16 decoded).
///
/// # Safety
///
/// 64 bytes are readable at `from`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_words(from: *const u8) -> __m512i {
    let words;
    // SAFETY: a plain load of 64 bytes, which the caller has promised.
    unsafe {
        std::arch::asm!(
            "vmovdqu64 {words}, [{from}]",
            words = lateout(zmm_reg) words,
            from = in(reg) from,
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    words
}

// ---------------------------------------------------------------------------
// rANS, decoding

/// See [`crate::arch::decode_whole_steps`].
///
/// # Safety
///
/// AVX-512 as in [`crate::Isa::Avx512`]; all slices have one length.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
pub(crate) unsafe fn decode_whole_steps(
    tables: &[&DecodeTable],
    streams: &mut [Stream<'_, '_, '_>],
) -> usize {
    match (tables, streams.len()) {
        // SAFETY: the numbers of streams and planes are the ones matched on,
        // the rest is the caller's promise.
        (_, 4) => unsafe { decode_streams::<4>(tables, streams) },
        // SAFETY: as above.
        (_, 3) => unsafe { decode_streams::<3>(tables, streams) },
        // SAFETY: as above.
        (_, 2) => unsafe { decode_streams::<2>(tables, streams) },
        // SAFETY: as above.
        (_, 1) => unsafe { decode_streams::<1>(tables, streams) },
        _ => 0,
    }
}

/// # Safety
///
/// As [`decode_whole_steps`]; `streams` has `N` entries.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
unsafe fn decode_streams<const N: usize>(
    tables: &[&DecodeTable],
    streams: &mut [Stream<'_, '_, '_>],
) -> usize {
    match *tables {
        [table] if table.ranks.is_some() => {
            let ranks = table.ranks.as_deref().expect("just matched");
            // SAFETY: the kernel keeps to the conditions of `run`.
            unsafe { run::<N, 1>(streams, |k, n| rank_steps(ranks, k, n)) }
        }
        [table] => {
            // SAFETY: as above.
            unsafe { run::<N, 1>(streams, |k, n| gather_steps([table], k, n)) }
        }
        [first, second] => {
            // SAFETY: as above.
            unsafe { run::<N, 2>(streams, |k, n| gather_steps([first, second], k, n)) }
        }
        _ => 0,
    }
}

/// Steps of planes with a [`RankTable`]: every table stays in registers.
///
/// States are held as high and low halves, 32 lanes of 16 bits each, so that
/// one vector instruction serves all lanes and a refill is
/// `high = low, low = word`.
///
/// # Safety
///
/// As [`run`] asks of its kernel.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
unsafe fn rank_steps<const N: usize>(ranks: &RankTable, k: &mut Kernel<N, 1>, n_steps: usize) {
    let second = |array: &[u16; 64]| load::<u16, 32>(array[32..].try_into().expect("32 left"));
    let (ends, ends2) = (load(&ranks.ends), second(&ranks.ends));
    let (freqs, freqs2) = (load(&ranks.freqs), second(&ranks.freqs));
    let (starts, starts2) = (load(&ranks.starts), second(&ranks.starts));
    let half = |array: &[u8; 128]| load::<u8, 64>(array[64..].try_into().expect("64 left"));
    let (buckets, buckets2) = (load(&ranks.buckets), half(&ranks.buckets));
    let (rare, rare2) = (load(&ranks.rare), half(&ranks.rare));
    let symbols = load(&ranks.symbols);
    let (even, odd) = (load(&EVEN_WORDS), load(&ODD_WORDS));
    let slot_mask = _mm512_set1_epi16(0x0FFF);
    let rare_start = _mm512_set1_epi16(RARE_START as i16);
    let one = _mm512_set1_epi16(1);
    // Byte lookups happen in the low byte of each word.
    let low_bytes = 0x5555_5555_5555_5555;

    let mut low = [_mm512_setzero_si512(); N];
    let mut high = [_mm512_setzero_si512(); N];
    for i in 0..N {
        let a = load::<u32, 16>(k.states[i][..16].try_into().expect("16"));
        let b = load::<u32, 16>(k.states[i][16..].try_into().expect("16"));
        low[i] = _mm512_permutex2var_epi16(a, even, b);
        high[i] = _mm512_permutex2var_epi16(a, odd, b);
    }
    let mut words = k.words;
    let mut outs: [*mut u8; N] = std::array::from_fn(|i| k.outs[i][0]);
    for _ in 0..n_steps {
        for i in 0..N {
            let slot = _mm512_and_si512(low[i], slot_mask);
            let bucket = _mm512_srli_epi16::<5>(slot);
            let rank = _mm512_maskz_permutex2var_epi8(low_bytes, buckets, bucket, buckets2);
            let is_rare = _mm512_cmpge_epu16_mask(slot, rare_start);
            let rare_rank = _mm512_permutex2var_epi8(rare, slot, rare2);
            let rare_rank = _mm512_and_si512(rare_rank, _mm512_set1_epi16(0xFF));
            let rank = _mm512_mask_mov_epi16(rank, is_rare, rare_rank);
            let end = _mm512_permutex2var_epi16(ends, rank, ends2);
            let next = _mm512_cmpge_epu16_mask(slot, end);
            let rank = _mm512_mask_add_epi16(rank, next, rank, one);
            let freq = _mm512_permutex2var_epi16(freqs, rank, freqs2);
            let start = _mm512_permutex2var_epi16(starts, rank, starts2);
            let offset = _mm512_sub_epi16(slot, start);
            let symbol = _mm512_permutexvar_epi8(rank, symbols);
            // SAFETY: `run` promises room for 32 symbols a step.
            unsafe {
                _mm256_storeu_si256(outs[i].cast(), _mm512_cvtepi16_epi8(symbol));
                outs[i] = outs[i].add(LANES);
            }
            // freq * (state >> 12) + offset, in halves; the quotient has 20 bits.
            let quotient_low = _mm512_shldi_epi16::<4>(high[i], low[i]);
            let quotient_high = _mm512_srli_epi16::<12>(high[i]);
            let product_low = _mm512_mullo_epi16(freq, quotient_low);
            let product_high = _mm512_add_epi16(
                _mm512_mulhi_epu16(freq, quotient_low),
                _mm512_mullo_epi16(freq, quotient_high),
            );
            let sum_low = _mm512_add_epi16(product_low, offset);
            let carry = _mm512_cmplt_epu16_mask(sum_low, offset);
            let sum_high = _mm512_mask_add_epi16(product_high, carry, product_high, one);
            // Below 2^16: take the next words, in lane order.
            let refill = _mm512_testn_epi16_mask(sum_high, sum_high);
            // SAFETY: `run` promises 64 readable bytes a step.
            let word = unsafe { load_words(words[i]) };
            high[i] = _mm512_mask_mov_epi16(sum_high, refill, sum_low);
            low[i] = _mm512_mask_expand_epi16(sum_low, refill, word);
            // SAFETY: at most 64 bytes on, within or one past what `run` promises.
            words[i] = unsafe { words[i].add(2 * refill.count_ones() as usize) };
        }
    }
    let (first, last) =
        (load(&const { interleave_indices(0) }), load(&const { interleave_indices(16) }));
    for i in 0..N {
        let a = _mm512_permutex2var_epi16(low[i], first, high[i]);
        let b = _mm512_permutex2var_epi16(low[i], last, high[i]);
        // SAFETY: 32 states of 4 bytes.
        unsafe {
            _mm512_storeu_si512(k.states[i].as_mut_ptr().cast(), a);
            _mm512_storeu_si512(k.states[i].as_mut_ptr().add(16).cast(), b);
        }
        k.outs[i][0] = outs[i];
    }
    k.words = words;
}

/// Steps of any planes: the tables are gathered from memory.
///
/// # Safety
///
/// As [`run`] asks of its kernel.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
unsafe fn gather_steps<const N: usize, const P: usize>(
    tables: [&DecodeTable; P],
    k: &mut Kernel<N, P>,
    n_steps: usize,
) {
    let mut states = [[_mm512_setzero_si512(); 2]; N];
    for i in 0..N {
        states[i][0] = load::<u32, 16>(k.states[i][..16].try_into().expect("16"));
        states[i][1] = load::<u32, 16>(k.states[i][16..].try_into().expect("16"));
    }
    let (mut words, mut outs) = (k.words, k.outs);
    for _ in 0..n_steps {
        for p in 0..P {
            for i in 0..N {
                for h in 0..2 {
                    // SAFETY: `run` promises room for the symbols and, of each
                    // 64 bytes of words, 32 for either half.
                    unsafe {
                        let (state, symbol) = gather_symbol(tables[p], states[i][h]);
                        _mm_storeu_si128(outs[i][p].cast(), symbol);
                        outs[i][p] = outs[i][p].add(LANES / 2);
                        let bound = _mm512_set1_epi32(1 << 16);
                        let refill = _mm512_cmplt_epu32_mask(state, bound);
                        let word = _mm256_loadu_si256(words[i].cast());
                        let word = _mm256_maskz_expand_epi16(refill, word);
                        let moved = _mm512_slli_epi32::<16>(state);
                        let word = _mm512_cvtepu16_epi32(word);
                        states[i][h] = _mm512_mask_or_epi32(state, refill, moved, word);
                        words[i] = words[i].add(2 * refill.count_ones() as usize);
                    }
                }
            }
        }
    }
    (k.words, k.outs) = (words, outs);
    for i in 0..N {
        for h in 0..2 {
            // SAFETY: 32 states of 4 bytes.
            unsafe {
                _mm512_storeu_si512(k.states[i].as_mut_ptr().add(16 * h).cast(), states[i][h])
            };
        }
    }
}

/// Decodes one symbol of 16 lanes: the states before refilling, and the symbols.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn gather_symbol(table: &DecodeTable, state: __m512i) -> (__m512i, __m128i) {
    let prob_bits = _mm_cvtsi32_si128(table.prob_bits as i32);
    let slot = _mm512_and_si512(state, _mm512_set1_epi32((1 << table.prob_bits) - 1));
    let quotient = _mm512_srl_epi32(state, prob_bits);
    if let Some(slots) = &table.slots {
        // SAFETY: a slot is below `1 << prob_bits`, the number of entries.
        let entry = unsafe { _mm512_i32gather_epi32::<4>(slot, slots.as_ptr().cast()) };
        let freq = _mm512_add_epi32(_mm512_srli_epi32::<20>(entry), _mm512_set1_epi32(1));
        let offset = _mm512_and_si512(_mm512_srli_epi32::<8>(entry), _mm512_set1_epi32(0xFFF));
        let product = _mm512_mullo_epi32(freq, quotient);
        return (_mm512_add_epi32(product, offset), _mm512_cvtepi32_epi8(entry));
    }
    // SAFETY: a slot is below `1 << prob_bits`, and three bytes follow the symbols.
    let symbol = unsafe { _mm512_i32gather_epi32::<1>(slot, table.symbols.as_ptr().cast()) };
    let symbol = _mm512_and_si512(symbol, _mm512_set1_epi32(0xFF));
    // SAFETY: a symbol is below 256.
    let interval = unsafe { _mm512_i32gather_epi32::<4>(symbol, table.intervals.as_ptr().cast()) };
    let freq = _mm512_and_si512(interval, _mm512_set1_epi32(0xFFFF));
    let offset = _mm512_sub_epi32(slot, _mm512_srli_epi32::<16>(interval));
    let product = _mm512_mullo_epi32(freq, quotient);
    (_mm512_add_epi32(product, offset), _mm512_cvtepi32_epi8(symbol))
}

// ---------------------------------------------------------------------------
// rANS, encoding

/// See [`crate::arch::encode_whole_steps`].
///
/// # Safety
///
/// AVX-512 as in [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
pub(crate) unsafe fn encode_whole_steps(
    states: &mut [u32; LANES],
    planes: &[&[u8]],
    tables: &[&EncodeTable],
    words: &mut [u16],
    next: &mut usize,
) -> bool {
    match (planes, tables) {
        ([plane], [EncodeTable { prob_bits, ranks: Some(ranks), .. }]) => {
            let look_up = rank_intervals(ranks);
            encode_steps(states, [plane], [*prob_bits], words, next, |_, symbols| look_up(symbols))
        }
        ([plane], [table]) => {
            let tables = [*table];
            let prob_bits = [table.prob_bits];
            encode_steps(states, [plane], prob_bits, words, next, |p, symbols| {
                gather_intervals(tables[p], symbols)
            })
        }
        ([first, second], [a, b]) => {
            let tables = [*a, *b];
            let prob_bits = [a.prob_bits, b.prob_bits];
            encode_steps(states, [first, second], prob_bits, words, next, |p, symbols| {
                gather_intervals(tables[p], symbols)
            })
        }
        _ => unreachable!("one or two planes, each with its table"),
    }
}

/// Frequencies and starts of one step's symbols, lanes 0 to 15 and 16 to 31.
type Intervals = ([__m512i; 2], [__m512i; 2]);

/// Looks symbols up in registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
fn rank_intervals(table: &EncodeRanks) -> impl Fn(&[u8; LANES]) -> Intervals + use<> {
    let part = |i: usize| load::<u8, 64>(table.ranks[64 * i..][..64].try_into().expect("64"));
    let ranks = [part(0), part(1), part(2), part(3)];
    let halves = |array: &[u16; 64]| {
        [0, 32].map(|i| load::<u16, 32>(array[i..][..32].try_into().expect("32")))
    };
    let (freqs, starts) = (halves(&table.freqs), halves(&table.starts));
    move |symbols| {
        // SAFETY: 32 bytes; the features are those of the enclosing function.
        unsafe {
            let symbol = _mm512_cvtepu8_epi16(_mm256_loadu_si256(symbols.as_ptr().cast()));
            // Lookups happen in the low byte of each word; the high ones stay zero.
            let low_bytes = 0x5555_5555_5555_5555;
            let low = _mm512_maskz_permutex2var_epi8(low_bytes, ranks[0], symbol, ranks[1]);
            let high = _mm512_maskz_permutex2var_epi8(low_bytes, ranks[2], symbol, ranks[3]);
            let is_high = _mm512_test_epi16_mask(symbol, _mm512_set1_epi16(0x80));
            let rank = _mm512_mask_mov_epi16(low, is_high, high);
            let widen = |v: __m512i| {
                [
                    _mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)),
                    _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(v)),
                ]
            };
            (
                widen(_mm512_permutex2var_epi16(freqs[0], rank, freqs[1])),
                widen(_mm512_permutex2var_epi16(starts[0], rank, starts[1])),
            )
        }
    }
}

/// Gathers the intervals of symbols from memory.
#[inline]
#[target_feature(enable = "avx512f")]
fn gather_intervals(table: &EncodeTable, symbols: &[u8; LANES]) -> Intervals {
    let gather = |first: usize| {
        // SAFETY: 32 symbols; a symbol is below 256.
        unsafe {
            let symbol = _mm_loadu_si128(symbols.as_ptr().add(first).cast());
            let symbol = _mm512_cvtepu8_epi32(symbol);
            _mm512_i32gather_epi32::<4>(symbol, table.intervals.as_ptr().cast())
        }
    };
    let (a, b) = (gather(0), gather(16));
    let low = _mm512_set1_epi32(0xFFFF);
    (
        [_mm512_and_si512(a, low), _mm512_and_si512(b, low)],
        [_mm512_srli_epi32::<16>(a), _mm512_srli_epi32::<16>(b)],
    )
}

/// `look_up(p, symbols)` gives the intervals of symbols of plane `p`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
fn encode_steps<const P: usize>(
    states: &mut [u32; LANES],
    planes: [&[u8]; P],
    prob_bits: [u32; P],
    words: &mut [u16],
    next: &mut usize,
    look_up: impl Fn(usize, &[u8; LANES]) -> Intervals,
) -> bool {
    let even = load(&EVEN_WORDS);
    let mut state = [0, 16].map(|h| load::<u32, 16>(states[h..h + 16].try_into().expect("16")));
    let mut unknown = 0;
    for first in (0..planes[0].len() / LANES).rev().map(|step| step * LANES) {
        for p in (0..P).rev() {
            let symbols = planes[p][first..first + LANES].try_into().expect("32");
            let (freq, start) = look_up(p, symbols);
            let shift = _mm_cvtsi32_si128(32 - prob_bits[p] as i32);
            let mut full = [0u16; 2];
            for h in 0..2 {
                unknown |= _mm512_testn_epi32_mask(freq[h], freq[h]);
                full[h] = _mm512_cmpge_epu32_mask(_mm512_srl_epi32(state[h], shift), freq[h]);
            }
            // Words of the lanes that are full, in lane order.
            let mask = u32::from(full[0]) | u32::from(full[1]) << 16;
            let word = _mm512_permutex2var_epi16(state[0], even, state[1]);
            let word = _mm512_maskz_compress_epi16(mask, word);
            let n = mask.count_ones();
            *next -= n as usize;
            let target = &mut words[*next..*next + n as usize];
            let lanes = ((1u64 << n) - 1) as u32;
            // SAFETY: the mask keeps the store inside `target`.
            unsafe { _mm512_mask_storeu_epi16(target.as_mut_ptr().cast(), lanes, word) };
            for h in 0..2 {
                let x = _mm512_mask_srli_epi32::<16>(state[h], full[h], state[h]);
                state[h] = encode_symbol(prob_bits[p], freq[h], start[h], x);
            }
        }
    }
    for h in 0..2 {
        // SAFETY: 32 states of 4 bytes.
        unsafe { _mm512_storeu_si512(states.as_mut_ptr().add(16 * h).cast(), state[h]) };
    }
    unknown == 0
}

/// `(x / freq << prob_bits) + start + x % freq` in 16 lanes.
///
/// The quotient is below 2^20, so dividing in single precision is off by less
/// than one and by at most one after truncation; the remainder tells.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn encode_symbol(prob_bits: u32, freq: __m512i, start: __m512i, x: __m512i) -> __m512i {
    let ratio = _mm512_div_ps(_mm512_cvtepu32_ps(x), _mm512_cvtepi32_ps(freq));
    let quotient = _mm512_cvttps_epi32(ratio);
    let remainder = _mm512_sub_epi32(x, _mm512_mullo_epi32(quotient, freq));
    let one = _mm512_set1_epi32(1);
    let too_high = _mm512_cmplt_epi32_mask(remainder, _mm512_setzero_si512());
    let quotient = _mm512_mask_sub_epi32(quotient, too_high, quotient, one);
    let remainder = _mm512_mask_add_epi32(remainder, too_high, remainder, freq);
    let too_low = _mm512_cmpge_epi32_mask(remainder, freq);
    let quotient = _mm512_mask_add_epi32(quotient, too_low, quotient, one);
    let remainder = _mm512_mask_sub_epi32(remainder, too_low, remainder, freq);
    let shifted = _mm512_sll_epi32(quotient, _mm_cvtsi32_si128(prob_bits as i32));
    _mm512_add_epi32(_mm512_add_epi32(shifted, start), remainder)
}

// ---------------------------------------------------------------------------
// Split and join

/// Bytes of 32 words, seen as pairs of columns: `byte` of the even columns of
/// 32 pairs, then of the odd ones.
const fn plane_indices(byte: u8) -> [u8; 64] {
    let mut indices = [0; 64];
    let mut i = 0;
    while i < 32 {
        indices[i] = 4 * i as u8 + byte;
        indices[32 + i] = 4 * i as u8 + 2 + byte;
        i += 1;
    }
    indices
}

/// The opposite: pairs `first..first + 16` from the high bytes (in the first
/// vector) and the low bytes (in the second).
const fn pair_indices(first: u8) -> [u8; 64] {
    let mut indices = [0; 64];
    let mut i = 0;
    while i < 16 {
        let pair = first + i as u8;
        indices[4 * i] = 64 + pair;
        indices[4 * i + 1] = pair;
        indices[4 * i + 2] = 64 + 32 + pair;
        indices[4 * i + 3] = 32 + pair;
        i += 1;
    }
    indices
}

split_and_join!("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2");

/// Fragment order, two bytes an element.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2")]
fn split_blocks<const ROTATE: bool>(
    tile: &Tile,
    source: &[u8],
    row_stride_bytes: usize,
    planes: &mut [u8],
) -> usize {
    let n = tile.n_elems();
    assert_eq!(planes.len(), 2 * n);
    let (take_high, take_low) =
        (load(&const { plane_indices(1) }), load(&const { plane_indices(0) }));
    let (first, planes) = (source.as_ptr(), planes.as_mut_ptr());
    for_each_half(tile, 2, row_stride_bytes, source.len(), |offset, at| {
        for right in 0..2 {
            // SAFETY: eight rows of 32 bytes are inside `source`; the quarter,
            // 64 elements, is inside both planes.
            unsafe {
                let line = |r: usize| {
                    _mm_loadu_si128(first.add(offset + r * row_stride_bytes + 16 * right).cast())
                };
                let four = |r: usize| {
                    let v = four_lines(line(r), line(r + 1), line(r + 2), line(r + 3));
                    if ROTATE { _mm512_shldi_epi16::<1>(v, v) } else { v }
                };
                let (top, bottom) = (four(0), four(4));
                let high = planes.add(at + 128 * right);
                _mm512_storeu_si512(high.cast(), _mm512_permutex2var_epi8(top, take_high, bottom));
                let low = high.add(n);
                _mm512_storeu_si512(low.cast(), _mm512_permutex2var_epi8(top, take_low, bottom));
            }
        }
    });
    n
}

#[inline]
#[target_feature(enable = "avx512f")]
fn four_lines(a: __m128i, b: __m128i, c: __m128i, d: __m128i) -> __m512i {
    let v = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(a), b);
    _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(v, c), d)
}

/// How far ahead of the block at hand its rows are fetched for writing. A
/// strip has too many rows for the hardware to see them as streams.
const AHEAD_BYTES: usize = 256;

/// Fragment order, two bytes an element.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2")]
fn join_blocks<const ROTATE: bool>(
    tile: &Tile,
    planes: [&[u8]; 2],
    target: &mut [u8],
    row_stride_bytes: usize,
) -> usize {
    let n = tile.n_elems();
    assert_eq!(planes.map(<[u8]>::len), [n, n]);
    let take = [load(&const { pair_indices(0) }), load(&const { pair_indices(16) })];
    let rows = [
        _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
        _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15),
    ];
    let (high, low) = (planes[0].as_ptr(), planes[1].as_ptr());
    let (len, target) = (target.len(), target.as_mut_ptr());
    for_each_half(tile, 2, row_stride_bytes, len, |offset, at| {
        // SAFETY: both quarters, 64 elements each, are inside both planes;
        // eight rows of 32 bytes are inside `target`.
        unsafe {
            let quarter = |plane: *const u8, right: usize| {
                _mm512_loadu_si512(plane.add(at + 128 * right).cast())
            };
            let (left_high, left_low) = (quarter(high, 0), quarter(low, 0));
            let (right_high, right_low) = (quarter(high, 1), quarter(low, 1));
            for r in 0..8 {
                let ahead = target.wrapping_add(offset + r * row_stride_bytes + AHEAD_BYTES);
                _mm_prefetch::<_MM_HINT_ET0>(ahead.cast());
            }
            for (h, take) in take.into_iter().enumerate() {
                let join = |high: __m512i, low: __m512i| {
                    let v = _mm512_permutex2var_epi8(high, take, low);
                    if ROTATE { _mm512_shrdi_epi16::<1>(v, v) } else { v }
                };
                let (left, right) = (join(left_high, left_low), join(right_high, right_low));
                for (pair, rows) in rows.into_iter().enumerate() {
                    let v = _mm512_permutex2var_epi64(left, rows, right);
                    let line = target.add(offset + (4 * h + 2 * pair) * row_stride_bytes);
                    _mm256_storeu_si256(line.cast(), _mm512_castsi512_si256(v));
                    let line = line.add(row_stride_bytes);
                    _mm256_storeu_si256(line.cast(), _mm512_extracti64x4_epi64::<1>(v));
                }
            }
        }
    });
    n
}

/// For eight rows of 16 bytes in two vectors: quarter `right` in fragment order.
const fn byte_plane_indices(right: u8) -> [u8; 64] {
    let mut indices = [0; 64];
    let mut i = 0;
    while i < 32 {
        let at = i as u8 / 4 * 16 + 8 * right + i as u8 % 4 * 2;
        indices[i] = at;
        indices[32 + i] = at + 1;
        i += 1;
    }
    indices
}

/// The opposite: rows `first..first + 4` of 16 bytes from the left quarter (in
/// the first vector) and the right one (in the second).
const fn byte_row_indices(first: u8) -> [u8; 64] {
    let mut indices = [0; 64];
    let mut i = 0;
    while i < 64 {
        let (row, col) = (first + i as u8 / 16, i as u8 % 16);
        indices[i] = col / 8 * 64 + col % 2 * 32 + row * 4 + col % 8 / 2;
        i += 1;
    }
    indices
}

/// Fragment order, one byte an element.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn split_byte_blocks(
    tile: &Tile,
    source: &[u8],
    row_stride_bytes: usize,
    plane: &mut [u8],
) -> usize {
    assert_eq!(plane.len(), tile.n_elems());
    let take = [load(&const { byte_plane_indices(0) }), load(&const { byte_plane_indices(1) })];
    let (first, plane) = (source.as_ptr(), plane.as_mut_ptr());
    for_each_half(tile, 1, row_stride_bytes, source.len(), |offset, at| {
        // SAFETY: eight rows of 16 bytes are inside `source`; both quarters,
        // 64 elements each, are inside the plane.
        unsafe {
            let line = |r: usize| _mm_loadu_si128(first.add(offset + r * row_stride_bytes).cast());
            let four = |r: usize| four_lines(line(r), line(r + 1), line(r + 2), line(r + 3));
            let (top, bottom) = (four(0), four(4));
            for (right, take) in take.into_iter().enumerate() {
                let v = _mm512_permutex2var_epi8(top, take, bottom);
                _mm512_storeu_si512(plane.add(at + 128 * right).cast(), v);
            }
        }
    });
    tile.n_elems()
}

/// Fragment order, one byte an element.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn join_byte_blocks(
    tile: &Tile,
    plane: &[u8],
    target: &mut [u8],
    row_stride_bytes: usize,
) -> usize {
    assert_eq!(plane.len(), tile.n_elems());
    let take = [load(&const { byte_row_indices(0) }), load(&const { byte_row_indices(4) })];
    let plane = plane.as_ptr();
    let (len, target) = (target.len(), target.as_mut_ptr());
    for_each_half(tile, 1, row_stride_bytes, len, |offset, at| {
        // SAFETY: both quarters, 64 elements each, are inside the plane; eight
        // rows of 16 bytes are inside `target`.
        unsafe {
            let left = _mm512_loadu_si512(plane.add(at).cast());
            let right = _mm512_loadu_si512(plane.add(at + 128).cast());
            for (h, take) in take.into_iter().enumerate() {
                let v = _mm512_permutex2var_epi8(left, take, right);
                let line = |r: usize| target.add(offset + (4 * h + r) * row_stride_bytes).cast();
                _mm_storeu_si128(line(0), _mm512_castsi512_si128(v));
                _mm_storeu_si128(line(1), _mm512_extracti32x4_epi32::<1>(v));
                _mm_storeu_si128(line(2), _mm512_extracti32x4_epi32::<2>(v));
                _mm_storeu_si128(line(3), _mm512_extracti32x4_epi32::<3>(v));
            }
        }
    });
    tile.n_elems()
}
