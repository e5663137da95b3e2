//! Stored tiles -> strips of planes, small enough to stay in the nearest cache.

use crate::coder::rans::{
    Cursor, DecodeTable, MAX_STREAMS, Stream, TAIL_BYTES, run_streams_with, tail_symbols,
};
use crate::error::{DecodeError, TileError};
use crate::isa::Isa;
use crate::record::header::RecordHeader;
use crate::tile::{STRIP_ELEMS, Tile};

/// A plane of the strip at hand.
enum Plane<'a> {
    /// Stored as it is: the rest of the tile's plane.
    Raw(&'a [u8]),
    /// Entropy-coded.
    Coded(Box<CodedPlane>),
}

struct CodedPlane {
    strip: [u8; STRIP_ELEMS],
    /// The tile's last symbols, known once the cursor has finished.
    tail: [u8; TAIL_BYTES],
}

/// A stored tile that is decoded strip by strip.
struct TileDecoder<'a> {
    index: usize,
    /// `None` once finished, and for raw tiles.
    cursor: Option<Cursor<'a>>,
    /// As many as an element has bytes.
    planes: Vec<Plane<'a>>,
    /// Elements whose symbols come from words rather than final states.
    n_coded: usize,
    /// Elements decoded.
    done: usize,
}

impl<'a> TileDecoder<'a> {
    fn new(header: &RecordHeader, index: usize, stored: &'a [u8]) -> Result<Self, TileError> {
        let n = header.tiling().tile(index).n_elems();
        assert_eq!(stored.len(), header.tiles()[index].n_bytes as usize, "not this tile");
        let is_coded = header.is_coded(index);
        let (mut cursor, mut raw, mut n_coded) = (None, stored, 0);
        if is_coded {
            let stream;
            (stream, raw) = stored.split_at(stored.len() - header.n_raw_planes() * n);
            cursor = Some(Cursor::start(stream)?);
            n_coded = n - tail_symbols(n, header.n_coded());
        }
        let mut planes = Vec::with_capacity(2);
        for p in 0..header.dtype().elem_bytes() {
            planes.push(if is_coded && header.table(p).is_some() {
                Plane::Coded(Box::new(CodedPlane {
                    strip: [0; STRIP_ELEMS],
                    tail: [0; TAIL_BYTES],
                }))
            } else {
                let plane;
                (plane, raw) = raw.split_at(n);
                Plane::Raw(plane)
            });
        }
        Ok(Self { index, cursor, planes, n_coded, done: 0 })
    }

    /// Where the next coded symbols go: what is left of `n` elements before the tail.
    fn outs(&mut self, n: usize) -> (Option<&mut Cursor<'a>>, Vec<&mut [u8]>) {
        let n = n.min(self.n_coded - self.done.min(self.n_coded));
        let outs = (self.planes.iter_mut())
            .filter_map(|plane| match plane {
                Plane::Coded(coded) => Some(&mut coded.strip[..n]),
                Plane::Raw(_) => None,
            })
            .collect();
        (self.cursor.as_mut(), outs)
    }

    /// Completes a strip of `n` elements whose coded symbols are there.
    fn complete(&mut self, n: usize, n_planes: usize, n_elems: usize) -> Result<(), TileError> {
        let end = self.done + n;
        if end >= self.n_coded
            && let Some(cursor) = self.cursor.take()
        {
            let share = tail_symbols(n_elems, n_planes);
            let mut tails: Vec<&mut [u8]> = (self.planes.iter_mut())
                .filter_map(|plane| match plane {
                    Plane::Coded(coded) => Some(&mut coded.tail[..share]),
                    Plane::Raw(_) => None,
                })
                .collect();
            cursor.finish(&mut tails)?;
        }
        let first = self.done.max(self.n_coded);
        for plane in &mut self.planes {
            if let Plane::Coded(coded) = plane
                && end > first
            {
                let tail = &coded.tail[first - self.n_coded..end - self.n_coded];
                coded.strip[first - self.done..n].copy_from_slice(tail);
            }
        }
        Ok(())
    }

    /// The planes of the strip, which is then behind us.
    fn advance(&mut self, n: usize) -> [&[u8]; 2] {
        self.done += n;
        let mut planes: [&[u8]; 2] = [&[], &[]];
        for (slot, plane) in planes.iter_mut().zip(&mut self.planes) {
            *slot = match plane {
                Plane::Coded(coded) => &coded.strip[..n],
                Plane::Raw(rest) => {
                    let strip;
                    (strip, *rest) = rest.split_at(n);
                    strip
                }
            };
        }
        planes
    }
}

/// Decodes stored tiles, at most [`MAX_STREAMS`] at the same time, and hands
/// every strip to `sink`: index of its tile, where it lies in the matrix, and
/// its planes in tile order. Strips of one tile come in order.
///
/// `tiles` are indices and stored bytes, as long as the header says.
///
/// # Errors
///
/// [`DecodeError::Tile`].
pub(crate) fn decode_strips(
    isa: Isa,
    header: &RecordHeader,
    tables: &[DecodeTable],
    tiles: &[(usize, &[u8])],
    mut sink: impl FnMut(usize, &Tile, [&[u8]; 2]),
) -> Result<(), DecodeError> {
    let tables: Vec<&DecodeTable> = tables.iter().collect();
    for group in tiles.chunks(MAX_STREAMS) {
        let mut decoders = Vec::with_capacity(group.len());
        for &(index, stored) in group {
            decoders.push(
                TileDecoder::new(header, index, stored)
                    .map_err(|source| DecodeError::Tile { tile: index, source })?,
            );
        }
        decode_group(isa, header, &tables, &mut decoders, &mut sink)?;
    }
    Ok(())
}

fn decode_group(
    isa: Isa,
    header: &RecordHeader,
    tables: &[&DecodeTable],
    decoders: &mut [TileDecoder<'_>],
    sink: &mut impl FnMut(usize, &Tile, [&[u8]; 2]),
) -> Result<(), DecodeError> {
    let (tiling, order) = (header.tiling(), header.tiling().order());
    let mut strips: Vec<_> =
        decoders.iter().map(|decoder| tiling.tile(decoder.index).strips(order)).collect();
    loop {
        let at: Vec<Option<Tile>> = strips.iter_mut().map(Iterator::next).collect();
        if at.iter().all(Option::is_none) {
            return Ok(());
        }
        let (mut cursors, mut outs, mut indices) = (Vec::new(), Vec::new(), Vec::new());
        for (decoder, strip) in decoders.iter_mut().zip(&at) {
            let index = decoder.index;
            if let Some(strip) = strip
                && let (Some(cursor), out) = decoder.outs(strip.n_elems())
            {
                indices.push(index);
                cursors.push(cursor);
                outs.push(out);
            }
        }
        let mut streams: Vec<Stream<'_, '_, '_>> = (cursors.into_iter().zip(&mut outs))
            .map(|(cursor, outs)| Stream { cursor, outs })
            .collect();
        run_streams_with(isa, tables, &mut streams)
            .map_err(|(i, source)| DecodeError::Tile { tile: indices[i], source })?;
        for (decoder, strip) in decoders.iter_mut().zip(&at) {
            let Some(strip) = strip else { continue };
            let tile = decoder.index;
            (decoder.complete(strip.n_elems(), tables.len(), tiling.tile(tile).n_elems()))
                .map_err(|source| DecodeError::Tile { tile, source })?;
            sink(tile, strip, decoder.advance(strip.n_elems()));
        }
    }
}
