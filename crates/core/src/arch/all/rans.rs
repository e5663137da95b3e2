//! One rANS step, symbol by symbol.

use crate::coder::rans::{DecodeTable, EncodeTable, STATE_LOWER_BOUND, WORD_BYTES};

/// Encodes one step, at most 32 symbols, the highest lane first. Words are
/// written before `words[*next]`, which moves down. False if a symbol has no
/// frequency.
#[must_use]
pub(crate) fn encode_step(
    states: &mut [u32],
    symbols: &[u8],
    table: &EncodeTable,
    words: &mut [u16],
    next: &mut usize,
) -> bool {
    for (state, &symbol) in states[..symbols.len()].iter_mut().zip(symbols).rev() {
        let interval = table.intervals[usize::from(symbol)];
        let (start, freq) = (interval >> 16, interval & 0xFFFF);
        if freq == 0 {
            return false;
        }
        if u64::from(*state) >= u64::from(freq) << (32 - table.prob_bits) {
            *next -= 1;
            words[*next] = *state as u16;
            *state >>= 16;
        }
        *state = ((*state / freq) << table.prob_bits) + start + *state % freq;
    }
    true
}

/// Decodes one step, at most 32 symbols, the lowest lane first. Words are
/// taken from the front of `words`. False if there were not enough.
#[must_use]
pub(crate) fn decode_step(
    states: &mut [u32],
    words: &mut &[u8],
    table: &DecodeTable,
    out: &mut [u8],
) -> bool {
    for (state, out) in states.iter_mut().zip(out) {
        let slot = *state & ((1 << table.prob_bits) - 1);
        let symbol = table.symbols[slot as usize];
        let interval = table.intervals[usize::from(symbol)];
        let (start, freq) = (interval >> 16, interval & 0xFFFF);
        *out = symbol;
        *state = freq * (*state >> table.prob_bits) + slot - start;
        if *state < STATE_LOWER_BOUND {
            let Some((word, rest)) = words.split_first_chunk::<WORD_BYTES>() else {
                return false;
            };
            *state = *state << 16 | u32::from(u16::from_le_bytes(*word));
            *words = rest;
        }
    }
    true
}
