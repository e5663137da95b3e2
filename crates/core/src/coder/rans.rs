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
use crate::bits::{BitReader, BitWriter};
use crate::error::TileError;
use crate::isa::Isa;
use crate::model::FreqTable;

/// Interleaved coders of a tile.
pub const LANES: usize = 32;
/// A state is never below this between symbols.
pub const STATE_LOWER_BOUND: u32 = 1 << 16;
/// Fewest bytes that the lane states take at the head of a tile's stream.
pub const MIN_STATES_BYTES: usize = LANES / 2 + 2 * LANES;
/// Bytes of a word, the unit in which states are refilled.
pub const WORD_BYTES: usize = 2;
/// Symbols that travel in the final states: two a lane.
pub const TAIL_BYTES: usize = 2 * LANES;

/// What the encoder needs to know of each symbol.
#[derive(Debug, Clone)]
pub struct EncodeTable {
    pub(crate) prob_bits: u32,
    /// `start << 16 | freq` of each symbol; 0 if it does not occur.
    pub(crate) intervals: [u32; 256],
    /// The same for vector registers, if the plane has few symbols.
    pub(crate) ranks: Option<Box<arch::EncodeRanks>>,
}

impl EncodeTable {
    /// The encoder's view of a frequency table.
    #[must_use]
    pub fn new(freqs: &FreqTable) -> Self {
        Self {
            prob_bits: freqs.prob_bits(),
            intervals: intervals(freqs),
            ranks: arch::EncodeRanks::new(freqs).map(Box::new),
        }
    }
}

/// `start << 16 | freq` of each symbol; 0 if it does not occur.
fn intervals(freqs: &FreqTable) -> [u32; 256] {
    let starts = freqs.starts();
    std::array::from_fn(|s| u32::from(starts[s]) << 16 | u32::from(freqs.freqs()[s]))
}

/// Bytes behind the symbols, so that four bytes can be read at any of them.
const GATHER_PADDING: usize = 3;

/// What the decoder needs to know of each slot. Built at load, never stored.
#[derive(Debug, Clone)]
pub struct DecodeTable {
    pub(crate) prob_bits: u32,
    /// Symbol of each slot, `1 << prob_bits` entries, and [`GATHER_PADDING`].
    pub(crate) symbols: Box<[u8]>,
    /// `start << 16 | freq` of each symbol.
    pub(crate) intervals: Box<[u32; 256]>,
    /// `(freq - 1) << 20 | (slot - start) << 8 | symbol` of each slot; only if
    /// no frequency is above 4,096, so that the three fit.
    pub(crate) slots: Option<Box<[u32]>>,
    /// Tables small enough for vector registers, if the plane allows it.
    pub(crate) ranks: Option<Box<arch::RankTable>>,
}

impl DecodeTable {
    /// The decoder's view of a frequency table.
    ///
    /// # Cost
    ///
    /// Fills `1 << prob_bits` slots: microseconds, and at most 161 KiB.
    #[must_use]
    pub fn new(freqs: &FreqTable) -> Self {
        let prob_bits = freqs.prob_bits();
        let intervals = Box::new(intervals(freqs));
        let mut symbols = Vec::with_capacity((1 << prob_bits) + GATHER_PADDING);
        for symbol in freqs.ranked() {
            let freq = freqs.freqs()[usize::from(symbol)];
            symbols.resize(symbols.len() + usize::from(freq), symbol);
        }
        let slots = freqs.freqs().iter().all(|&freq| freq <= 1 << 12).then(|| {
            let entry = |(slot, &symbol): (usize, &u8)| {
                let interval = intervals[usize::from(symbol)];
                let (start, freq) = (interval >> 16, interval & 0xFFFF);
                (freq - 1) << 20 | (slot as u32 - start) << 8 | u32::from(symbol)
            };
            symbols.iter().enumerate().map(entry).collect()
        });
        symbols.resize(symbols.len() + GATHER_PADDING, 0);
        Self {
            prob_bits,
            symbols: symbols.into_boxed_slice(),
            intervals,
            slots,
            ranks: arch::RankTable::new(freqs).map(Box::new),
        }
    }
}

impl DecodeTable {
    /// Bytes of memory the table takes.
    #[must_use]
    pub fn resident_bytes(&self) -> usize {
        let slots = self.slots.as_deref().map_or(0, size_of_val);
        let ranks = self.ranks.as_deref().map_or(0, size_of_val);
        self.symbols.len() + size_of_val(&*self.intervals) + slots + ranks
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

/// Writes the states: first, in half a byte each, the number of bits beyond 17
/// (a state has 17 to 32); then, bit after bit, each state without its leading
/// one. States are spread evenly on a logarithmic scale, so this saves 18 of
/// the 128 bytes they would take. (Spec section 5.3.)
fn write_states(states: &[u32; LANES], out: &mut Vec<u8>) {
    let extra = |state: u32| state.ilog2() - 16;
    out.extend(states.as_chunks::<2>().0.iter().map(|&[a, b]| (extra(a) | extra(b) << 4) as u8));
    let mut writer = BitWriter::new(out);
    for &state in states {
        let n_bits = state.ilog2();
        writer.put(state - (1 << n_bits), n_bits);
    }
    writer.finish();
}

/// Reads what [`write_states`] wrote; returns what follows.
fn read_states(stream: &[u8]) -> Result<([u32; LANES], &[u8]), TileError> {
    let truncated = TileError::StreamBytes { found: stream.len() };
    let (lengths, rest) = stream.split_at_checked(LANES / 2).ok_or(truncated.clone())?;
    let mut reader = BitReader::new(rest);
    let mut states = [0; LANES];
    for (lane, state) in states.iter_mut().enumerate() {
        let n_bits = 16 + u32::from(lengths[lane / 2] >> (4 * (lane % 2)) & 0xF);
        *state = reader.take(n_bits).ok_or(truncated.clone())? | 1 << n_bits;
    }
    let n_bytes = reader.finish().ok_or(TileError::StatesPadding)?;
    Ok((states, &rest[n_bytes..]))
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
    let n_elems = planes[0].len();
    let n_tail = tail_symbols(n_elems, planes.len());
    let n_coded = n_elems - n_tail;
    let mut states = states_from_tail(planes, n_coded);
    // A symbol emits at most one word; the words are written from the back.
    let mut words = vec![0u16; n_coded * planes.len()];
    let first = encode_steps(isa, &mut states, planes, tables, n_coded, &mut words)
        .ok_or_else(|| unknown_symbol(planes, tables))?;
    write_states(&states, out);
    out.extend(words[first..].iter().flat_map(|w| w.to_le_bytes()));
    Ok(())
}

/// Runs the coder backwards over the first `n_coded` symbols; returns the
/// index of the first word, `None` if a symbol has no frequency.
fn encode_steps(
    isa: Isa,
    states: &mut [u32; LANES],
    planes: &[&[u8]],
    tables: &[&EncodeTable],
    n_coded: usize,
    words: &mut [u16],
) -> Option<usize> {
    let mut next = words.len();
    // A last step with fewer than 32 symbols is left to the scalar version.
    let n_whole = n_coded / LANES * LANES;
    for p in (0..planes.len()).rev() {
        let step = &planes[p][n_whole..n_coded];
        if !arch::all::rans::encode_step(states, step, tables[p], words, &mut next) {
            return None;
        }
    }
    let whole: Vec<&[u8]> = planes.iter().map(|p| &p[..n_whole]).collect();
    arch::encode_whole_steps(isa, states, &whole, tables, words, &mut next).then_some(next)
}

fn unknown_symbol(planes: &[&[u8]], tables: &[&EncodeTable]) -> TileError {
    let symbol = (planes.iter().zip(tables))
        .find_map(|(plane, table)| {
            plane.iter().find(|&&s| table.intervals[usize::from(s)] & 0xFFFF == 0)
        })
        .expect("the coder met such a symbol");
    TileError::UnknownSymbol { symbol: *symbol }
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
    /// If the states are incomplete, or half a word follows.
    pub fn start(stream: &'a [u8]) -> Result<Self, TileError> {
        let (states, words) = read_states(stream)?;
        if words.len() % WORD_BYTES != 0 {
            return Err(TileError::StreamBytes { found: stream.len() });
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
        let mut streams = [Stream { cursor: self, outs }];
        run_streams_with(isa, tables, &mut streams).map_err(|(_, error)| error)
    }

    /// Decodes what whole vectors of steps have left over, symbol by symbol.
    fn run_rest(
        &mut self,
        tables: &[&DecodeTable],
        outs: &mut [&mut [u8]],
        mut done: usize,
    ) -> Result<(), TileError> {
        let n = outs[0].len();
        while done < n {
            let end = n.min(done + LANES);
            for (out, table) in outs.iter_mut().zip(tables) {
                let step = &mut out[done..end];
                if !arch::all::rans::decode_step(&mut self.states, &mut self.words, table, step) {
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

/// One of several tiles that are decoded at the same time.
#[derive(Debug)]
pub struct Stream<'a, 'o, 'w> {
    /// Where in its tile the decoder is.
    pub cursor: &'a mut Cursor<'w>,
    /// Where the next symbols of each coded plane go.
    pub outs: &'a mut [&'o mut [u8]],
}

/// Tiles that [`run_streams_with`] gains from decoding at the same time.
pub const MAX_STREAMS: usize = 4;

/// [`Cursor::run_with`] on several tiles of one tensor at the same time.
///
/// A lane's next symbol depends on its last one, so a single tile leaves the
/// vector units waiting; [`MAX_STREAMS`] tiles keep them busy. The streams may
/// differ in length.
///
/// # Errors
///
/// The index of the first stream that failed, and why. All streams are then
/// in an unspecified state.
///
/// # Panics
///
/// If the slices of a stream differ in length, or in number from the tables.
pub fn run_streams_with(
    isa: Isa,
    tables: &[&DecodeTable],
    streams: &mut [Stream<'_, '_, '_>],
) -> Result<(), (usize, TileError)> {
    assert!(isa.is_available(), "{isa:?} is not available on this machine");
    for stream in streams.iter() {
        assert_eq!(stream.outs.len(), tables.len(), "planes and tables differ in number");
        let n = stream.outs[0].len();
        assert!(stream.outs.iter().all(|out| out.len() == n), "planes differ in length");
    }
    for (group, streams) in streams.chunks_mut(MAX_STREAMS).enumerate() {
        let fail = |index, error| (group * MAX_STREAMS + index, error);
        let n = streams[0].outs[0].len();
        if streams.iter().all(|stream| stream.outs[0].len() == n) {
            let done = arch::decode_whole_steps(isa, tables, streams);
            for (index, stream) in streams.iter_mut().enumerate() {
                (stream.cursor.run_rest(tables, stream.outs, done[index]))
                    .map_err(|e| fail(index, e))?;
            }
        } else {
            run_ragged(isa, tables, streams).map_err(|(index, error)| fail(index, error))?;
        }
    }
    Ok(())
}

/// [`run_streams_with`] for at most [`MAX_STREAMS`] streams of different
/// lengths: whole steps together up to the end of the shortest, and so on.
fn run_ragged(
    isa: Isa,
    tables: &[&DecodeTable],
    streams: &mut [Stream<'_, '_, '_>],
) -> Result<(), (usize, TileError)> {
    let whole = |stream: &Stream<'_, '_, '_>| stream.outs[0].len() / LANES * LANES;
    let mut done = 0;
    while let Some(end) = streams.iter().map(whole).filter(|&end| end > done).min() {
        let active: Vec<usize> =
            (0..streams.len()).filter(|&index| whole(&streams[index]) > done).collect();
        let mut outs: Vec<Vec<&mut [u8]>> = Vec::with_capacity(active.len());
        let mut cursors = Vec::with_capacity(active.len());
        for stream in streams.iter_mut().filter(|stream| whole(stream) > done) {
            outs.push(stream.outs.iter_mut().map(|out| &mut out[done..end]).collect());
            cursors.push(&mut *stream.cursor);
        }
        let mut together: Vec<Stream<'_, '_, '_>> = cursors
            .into_iter()
            .zip(&mut outs)
            .map(|(cursor, outs)| Stream { cursor, outs })
            .collect();
        run_streams_with(isa, tables, &mut together)
            .map_err(|(index, error)| (active[index], error))?;
        done = end;
    }
    for (index, stream) in streams.iter_mut().enumerate() {
        let first = whole(stream);
        let mut rest: Vec<&mut [u8]> = stream.outs.iter_mut().map(|o| &mut o[first..]).collect();
        stream.cursor.run_rest(tables, &mut rest, 0).map_err(|error| (index, error))?;
    }
    Ok(())
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
