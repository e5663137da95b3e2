//! rANS with 32 interleaved lanes: 32-bit states, 16-bit words.
//!
//! Duda, "Asymmetric numeral systems" (arXiv 1311.2540) for the coder; Giesen,
//! "Interleaved entropy coders" (arXiv 1402.3392) for the lanes. Spec section 5.
//!
//! The symbols of a tile are coded in steps of 32, one symbol a lane; with two
//! coded planes a step of the first plane alternates with one of the second. A
//! lane whose state falls below the lower bound takes the next word, lanes in
//! ascending order. The encoder runs backwards from the last step.
//!
//! An encoder normally starts every lane at the lower bound, which wastes 16
//! bits a lane. Here the low half of each starting state carries the last
//! [`TAIL_BYTES`] symbols of the tile instead: the decoder finds them in its
//! final states, whose high halves must all be exactly 1.

#![forbid(unsafe_code)]

use crate::arch;
use crate::error::TileError;
use crate::isa::Isa;
use crate::model::FreqTable;

/// Interleaved coders of a tile.
pub const LANES: usize = 32;
/// A state is never below this between symbols.
pub const STATE_LOWER_BOUND: u32 = 1 << 16;
/// Bytes of the lane states at the head of a tile's stream.
pub const STATES_BYTES: usize = 4 * LANES;
/// Bytes of a word, the unit in which states are refilled.
pub const WORD_BYTES: usize = 2;
/// Symbols that travel in the final states: two a lane.
pub const TAIL_BYTES: usize = 2 * LANES;

/// What the encoder needs to know of each symbol.
#[derive(Debug, Clone)]
pub struct EncodeTable {
    pub(crate) prob_bits: u32,
    pub(crate) freqs: [u32; 256],
    pub(crate) starts: [u32; 256],
    /// `1 / freq`, for the vector encoders, which divide in floating point and
    /// correct the quotient by at most one.
    pub(crate) reciprocals: [f32; 256],
}

impl EncodeTable {
    /// The encoder's view of a frequency table.
    #[must_use]
    pub fn new(freqs: &FreqTable) -> Self {
        Self {
            prob_bits: freqs.prob_bits(),
            freqs: freqs.freqs().map(u32::from),
            starts: freqs.starts().map(u32::from),
            reciprocals: freqs.freqs().map(|f| 1.0 / f32::from(f.max(1))),
        }
    }
}

/// What the decoder needs to know of each slot. Built at load, never stored.
#[derive(Debug, Clone)]
pub struct DecodeTable {
    pub(crate) prob_bits: u32,
    /// Symbol of each slot, `1 << prob_bits` entries.
    pub(crate) symbols: Box<[u8]>,
    /// `start << 16 | freq` of each symbol.
    pub(crate) intervals: Box<[u32; 256]>,
    /// `(freq - 1) << 20 | (slot - start) << 8 | symbol`; only if `prob_bits`
    /// is 12, so that the three fit.
    pub(crate) slots: Option<Box<[u32; 4096]>>,
    /// Tables small enough for vector registers, if the plane allows it.
    pub(crate) ranks: Option<Box<arch::RankTable>>,
}

impl DecodeTable {
    /// The decoder's view of a frequency table.
    ///
    /// # Cost
    ///
    /// Fills `1 << prob_bits` slots: microseconds, and at most 36 KiB.
    #[must_use]
    pub fn new(freqs: &FreqTable) -> Self {
        let (prob_bits, starts) = (freqs.prob_bits(), freqs.starts());
        let mut symbols = Vec::with_capacity(1 << prob_bits);
        let mut intervals = Box::new([0; 256]);
        for symbol in freqs.ranked() {
            let (freq, start) = (freqs.freqs()[usize::from(symbol)], starts[usize::from(symbol)]);
            symbols.resize(symbols.len() + usize::from(freq), symbol);
            intervals[usize::from(symbol)] = u32::from(start) << 16 | u32::from(freq);
        }
        let slots = (prob_bits == 12).then(|| {
            let mut slots = Box::new([0; 4096]);
            for (slot, entry) in slots.iter_mut().enumerate() {
                let interval = intervals[usize::from(symbols[slot])];
                let (start, freq) = (interval >> 16, interval & 0xFFFF);
                *entry = (freq - 1) << 20 | (slot as u32 - start) << 8 | u32::from(symbols[slot]);
            }
            slots
        });
        Self {
            prob_bits,
            symbols: symbols.into_boxed_slice(),
            intervals,
            slots,
            ranks: arch::RankTable::new(freqs).map(Box::new),
        }
    }
}

/// Symbols of each coded plane that travel in the final states.
///
/// `n_elems` is the number of elements of the tile, `n_planes` (1 or 2) the
/// number of coded planes, which share the 64 bytes.
#[must_use]
pub const fn tail_symbols(n_elems: usize, n_planes: usize) -> usize {
    let share = TAIL_BYTES / n_planes;
    if n_elems < share { n_elems } else { share }
}

/// Appends the stream of one tile to `out`: 32 states, then the words.
///
/// `planes` are the one or two coded planes, all of one length, `tables` their
/// frequencies. Every symbol must have a frequency above zero.
///
/// # Errors
///
/// [`TileError::UnknownSymbol`] if a symbol's frequency is zero.
///
/// # Panics
///
/// If the planes differ in length or in number from the tables.
pub fn encode_with(
    isa: Isa,
    planes: &[&[u8]],
    tables: &[&EncodeTable],
    out: &mut Vec<u8>,
) -> Result<(), TileError> {
    assert_eq!(planes.len(), tables.len(), "planes and tables differ in number");
    assert!(planes.iter().all(|p| p.len() == planes[0].len()), "planes differ in length");
    assert!(isa.is_available(), "{isa:?} is not available on this machine");
    for (plane, table) in planes.iter().zip(tables) {
        if let Some(&symbol) = plane.iter().find(|&&s| table.freqs[usize::from(s)] == 0) {
            return Err(TileError::UnknownSymbol { symbol });
        }
    }
    let n_elems = planes[0].len();
    let n_tail = tail_symbols(n_elems, planes.len());
    let n_coded = n_elems - n_tail;
    let mut states = states_from_tail(planes, n_coded);
    // A symbol emits at most one word; the words are written from the back.
    let mut words = vec![0u16; n_coded * planes.len()];
    let first = encode_steps(isa, &mut states, planes, tables, n_coded, &mut words);
    out.extend(states.iter().flat_map(|s| s.to_le_bytes()));
    out.extend(words[first..].iter().flat_map(|w| w.to_le_bytes()));
    Ok(())
}

/// Runs the coder backwards over the first `n_coded` symbols; returns the
/// index of the first word.
fn encode_steps(
    isa: Isa,
    states: &mut [u32; LANES],
    planes: &[&[u8]],
    tables: &[&EncodeTable],
    n_coded: usize,
    words: &mut [u16],
) -> usize {
    let mut next = words.len();
    // A last step with fewer than 32 symbols is left to the scalar version.
    let n_whole = n_coded / LANES * LANES;
    for p in (0..planes.len()).rev() {
        let step = &planes[p][n_whole..n_coded];
        arch::all::rans::encode_step(states, step, tables[p], words, &mut next);
    }
    let whole: Vec<&[u8]> = planes.iter().map(|p| &p[..n_whole]).collect();
    arch::encode_whole_steps(isa, states, &whole, tables, words, &mut next);
    next
}

fn states_from_tail(planes: &[&[u8]], n_coded: usize) -> [u32; LANES] {
    let mut tail = [0; TAIL_BYTES];
    let share = TAIL_BYTES / planes.len();
    for (part, plane) in tail.chunks_mut(share).zip(planes) {
        let symbols = &plane[n_coded..];
        part[..symbols.len()].copy_from_slice(symbols);
    }
    std::array::from_fn(|lane| {
        STATE_LOWER_BOUND | u32::from(u16::from_le_bytes([tail[2 * lane], tail[2 * lane + 1]]))
    })
}

/// A decoder in the middle of a tile.
///
/// [`Cursor::start`], any number of [`Cursor::run_with`], [`Cursor::finish`];
/// [`decode_with`] does all three.
#[derive(Debug, Clone)]
pub struct Cursor<'a> {
    pub(crate) states: [u32; LANES],
    /// The words not yet taken.
    pub(crate) words: &'a [u8],
    /// Symbols decoded of each plane, for error messages.
    n_decoded: usize,
}

impl<'a> Cursor<'a> {
    /// Begins a tile. `stream` is exactly the tile's states and words.
    ///
    /// # Errors
    ///
    /// If the states are incomplete or out of range, or half a word follows.
    pub fn start(stream: &'a [u8]) -> Result<Self, TileError> {
        let Some((head, words)) = stream.split_at_checked(STATES_BYTES) else {
            return Err(TileError::StreamBytes { found: stream.len() });
        };
        if words.len() % WORD_BYTES != 0 {
            return Err(TileError::StreamBytes { found: stream.len() });
        }
        let states: [u32; LANES] = std::array::from_fn(|lane| {
            u32::from_le_bytes(head[4 * lane..4 * lane + 4].try_into().expect("four bytes"))
        });
        if let Some(lane) = states.iter().position(|&s| s < STATE_LOWER_BOUND) {
            return Err(TileError::State { lane, found: states[lane] });
        }
        Ok(Self { states, words, n_decoded: 0 })
    }

    /// Decodes the next symbols of each plane, as many as `outs` hold.
    ///
    /// `outs` are one or two slices of one length, which is a multiple of 32
    /// except in the last call before [`Cursor::finish`].
    ///
    /// # Errors
    ///
    /// [`TileError::OutOfWords`].
    ///
    /// # Panics
    ///
    /// If the slices differ in length or in number from the tables.
    pub fn run_with(
        &mut self,
        isa: Isa,
        tables: &[&DecodeTable],
        outs: &mut [&mut [u8]],
    ) -> Result<(), TileError> {
        assert_eq!(outs.len(), tables.len(), "planes and tables differ in number");
        assert!(outs.iter().all(|o| o.len() == outs[0].len()), "planes differ in length");
        let n = outs[0].len();
        let mut done = arch::decode_whole_steps(isa, self, tables, outs);
        while done < n {
            let end = n.min(done + LANES);
            for (out, table) in outs.iter_mut().zip(tables) {
                let complete = arch::all::rans::decode_step(
                    &mut self.states,
                    &mut self.words,
                    table,
                    &mut out[done..end],
                );
                if !complete {
                    return Err(TileError::OutOfWords { decoded: self.n_decoded + done });
                }
            }
            done = end;
        }
        self.n_decoded += n;
        Ok(())
    }

    /// Ends the tile: checks that nothing is left and writes the last symbols
    /// of each plane, [`tail_symbols`] many.
    ///
    /// # Errors
    ///
    /// If words are left over, a lane does not end at the lower bound, or the
    /// unused part of the final states is not zero.
    pub fn finish(self, outs: &mut [&mut [u8]]) -> Result<(), TileError> {
        if !self.words.is_empty() {
            return Err(TileError::WordsLeft { found: self.words.len() / WORD_BYTES });
        }
        if let Some(lane) = self.states.iter().position(|&s| s >> 16 != 1) {
            return Err(TileError::FinalState { lane, found: self.states[lane] });
        }
        let mut tail = [0; TAIL_BYTES];
        for (pair, state) in tail.chunks_exact_mut(2).zip(self.states) {
            pair.copy_from_slice(&(state as u16).to_le_bytes());
        }
        let share = TAIL_BYTES / outs.len();
        for (part, out) in tail.chunks(share).zip(outs) {
            let (symbols, padding) = part.split_at(out.len());
            out.copy_from_slice(symbols);
            if padding.iter().any(|&b| b != 0) {
                return Err(TileError::TailPadding);
            }
        }
        Ok(())
    }
}

/// Decodes the stream of one tile into its one or two coded planes.
///
/// # Errors
///
/// A [`TileError`] if the stream is not one that [`encode_with`] writes for
/// these frequencies and this many elements. `outs` then holds no promise.
///
/// # Panics
///
/// If the slices differ in length or in number from the tables.
pub fn decode_with(
    isa: Isa,
    stream: &[u8],
    tables: &[&DecodeTable],
    outs: &mut [&mut [u8]],
) -> Result<(), TileError> {
    let n_elems = outs[0].len();
    let n_coded = n_elems - tail_symbols(n_elems, outs.len());
    let mut cursor = Cursor::start(stream)?;
    let (mut coded, mut tail): (Vec<&mut [u8]>, Vec<&mut [u8]>) =
        outs.iter_mut().map(|out| out.split_at_mut(n_coded)).unzip();
    cursor.run_with(isa, tables, &mut coded)?;
    cursor.finish(&mut tail)
}
