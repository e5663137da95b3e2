//! Record -> tensor: whole, tile by tile, or in part.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use crate::coder::rans::{DecodeTable, MAX_STREAMS};
use crate::error::DecodeError;
use crate::io::ReadAt;
use crate::isa::Isa;
use crate::record::header::{FIXED_BYTES, RecordHeader};
use crate::record::strips::decode_strips;
use crate::split::join_tile_with;
use crate::tile::{Order, TILE_ROWS, Tile};

/// Tiles held decoded at a time while streaming: 32 MiB of 16-bit elements.
const MAX_PANEL_TILES: usize = 256;
/// Bytes handed to the sink at a time while streaming.
const CHUNK_BYTES: usize = 1 << 20;

/// A record whose header has been read and checked.
///
/// The bytes of the tiles stay in the source, which every call names again.
#[derive(Debug, Clone)]
pub struct Record {
    place: RecordPlace,
    tables: Arc<[DecodeTable]>,
}

/// Where a record lies in its source, and what its header says: a [`Record`]
/// without the tables that decode it, some 20 KB for each coded plane.
#[derive(Debug, Clone)]
pub struct RecordPlace {
    header: Arc<RecordHeader>,
    /// Where the record starts in the source.
    start: u64,
}

impl RecordPlace {
    /// The header.
    #[must_use]
    pub fn header(&self) -> &RecordHeader {
        &self.header
    }

    /// Where the stored bytes of all tiles, end to end, lie in the source.
    #[must_use]
    pub fn tiles_range(&self) -> Range<u64> {
        let first = self.start + u64::from(self.header.header_bytes());
        first..first + self.header.tiles_bytes()
    }

    /// The record, with its tables made anew.
    #[must_use]
    pub fn record(&self) -> Record {
        let tables = self.header.tables.iter().flatten().map(DecodeTable::new).collect();
        Record { place: self.clone(), tables }
    }
}

impl Record {
    /// Reads and checks the header of the record of `record_bytes` bytes that
    /// starts at `start`.
    ///
    /// # Errors
    ///
    /// A [`DecodeError`] if this is no record, or not one this build can read.
    pub fn read(
        source: &(impl ReadAt + ?Sized),
        start: u64,
        record_bytes: u64,
    ) -> Result<Self, DecodeError> {
        let truncated = |expected| DecodeError::RecordTruncated { found: record_bytes, expected };
        let mut fixed = [0; FIXED_BYTES];
        if record_bytes < FIXED_BYTES as u64 {
            return Err(truncated(FIXED_BYTES as u64));
        }
        source.read_exact_at(&mut fixed, start)?;
        let header_bytes = RecordHeader::peek_bytes(&fixed)?;
        if record_bytes < u64::from(header_bytes) {
            return Err(truncated(header_bytes.into()));
        }
        let mut bytes = vec![0; header_bytes as usize];
        source.read_exact_at(&mut bytes, start)?;
        let header = Arc::new(RecordHeader::parse(&bytes, record_bytes)?);
        Ok(RecordPlace { header, start }.record())
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &RecordHeader {
        &self.place.header
    }

    /// Where it lies.
    #[must_use]
    pub const fn place(&self) -> &RecordPlace {
        &self.place
    }

    /// Decode tables of the coded planes, in plane order.
    #[must_use]
    pub fn tables(&self) -> &[DecodeTable] {
        &self.tables
    }

    /// Reads the stored bytes of a tile into `out` and checks them.
    ///
    /// # Errors
    ///
    /// [`DecodeError::TileChecksum`], or the source's own error.
    ///
    /// # Panics
    ///
    /// If there is no such tile.
    pub fn read_tile(
        &self,
        source: &(impl ReadAt + ?Sized),
        index: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), DecodeError> {
        out.resize(self.header().tiles[index].n_bytes as usize, 0);
        self.read_tile_into(source, index, out)
    }

    /// Reads the stored bytes of a tile into `out`, which has their length.
    pub(crate) fn read_tile_into(
        &self,
        source: &(impl ReadAt + ?Sized),
        index: usize,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        source.read_exact_at(out, self.place.start + self.header().tiles[index].start)?;
        self.check_tile(index, out)
    }

    /// The checked bytes of a tile: borrowed if the source is memory,
    /// otherwise read into `buffer`.
    fn stored_tile<'a>(
        &self,
        source: &'a (impl ReadAt + ?Sized),
        index: usize,
        buffer: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], DecodeError> {
        let entry = &self.header().tiles[index];
        match source.borrow_at(self.place.start + entry.start, entry.n_bytes as usize) {
            Some(stored) => self.check_tile(index, stored).map(|()| stored),
            None => self.read_tile(source, index, buffer).map(|()| buffer.as_slice()),
        }
    }

    pub(crate) fn check_tile(&self, index: usize, stored: &[u8]) -> Result<(), DecodeError> {
        let expected = self.header().tiles[index].checksum;
        match xxh3_64(stored) {
            found if found == expected => Ok(()),
            found => Err(DecodeError::TileChecksum { tile: index, found, expected }),
        }
    }

    /// Decodes the stored bytes of a tile into its planes, in tile order:
    /// plane 0, then plane 1.
    ///
    /// # Errors
    ///
    /// [`DecodeError::Tile`].
    ///
    /// # Panics
    ///
    /// If `stored` or `planes` is not as long as the header says.
    pub fn decode_tile_with(
        &self,
        isa: Isa,
        index: usize,
        stored: &[u8],
        planes: &mut [u8],
    ) -> Result<(), DecodeError> {
        let n = self.header().tiling.tile(index).n_elems();
        assert_eq!(
            planes.len(),
            n * self.header().dtype.elem_bytes(),
            "planes differ from the tile"
        );
        let (high, low) = planes.split_at_mut(n);
        let mut done = 0;
        decode_strips(isa, self.header(), &self.tables, &[(index, stored)], |_, strip, planes| {
            let end = done + strip.n_elems();
            high[done..end].copy_from_slice(planes[0]);
            if !planes[1].is_empty() {
                low[done..end].copy_from_slice(planes[1]);
            }
            done = end;
        })
    }

    /// Reads, checks and decodes tiles, [`MAX_STREAMS`] at the same time, and
    /// hands every strip of theirs to `place`; see [`decode_strips`].
    pub(crate) fn for_each_strip_with(
        &self,
        source: &(impl ReadAt + ?Sized),
        isa: Isa,
        indices: &[usize],
        mut place: impl FnMut(usize, &Tile, [&[u8]; 2]),
    ) -> Result<(), DecodeError> {
        let mut buffers: [Vec<u8>; MAX_STREAMS] = Default::default();
        for group in indices.chunks(MAX_STREAMS) {
            let mut tiles = Vec::with_capacity(MAX_STREAMS);
            for (&index, buffer) in group.iter().zip(&mut buffers) {
                tiles.push((index, self.stored_tile(source, index, buffer)?));
            }
            decode_strips(isa, self.header(), &self.tables, &tiles, &mut place)?;
        }
        Ok(())
    }

    /// Reads, checks and decodes tiles into row-major elements of their own:
    /// `rows * cols` elements each.
    ///
    /// # Errors
    ///
    /// As [`Record::read_tile`] and [`Record::decode_tile_with`].
    ///
    /// # Panics
    ///
    /// If there are no such tiles.
    pub fn load_tiles_with(
        &self,
        source: &(impl ReadAt + ?Sized),
        isa: Isa,
        range: Range<usize>,
    ) -> Result<Vec<Vec<u8>>, DecodeError> {
        let (dtype, tiling) = (self.header().dtype, &self.header().tiling);
        let first = range.start;
        let mut loaded: Vec<Vec<u8>> = (range.clone())
            .map(|index| vec![0; self.header().raw_tile_bytes(&tiling.tile(index))])
            .collect();
        let indices: Vec<usize> = range.collect();
        self.for_each_strip_with(source, isa, &indices, |index, strip, planes| {
            let tile = tiling.tile(index);
            let row_bytes = tile.cols * dtype.elem_bytes();
            let start = (strip.row_start - tile.row_start) * row_bytes
                + (strip.col_start - tile.col_start) * dtype.elem_bytes();
            let target = &mut loaded[index - first][start..];
            join_tile_with(isa, dtype, tiling.order(), strip, planes, target, row_bytes);
        })?;
        Ok(loaded)
    }

    /// Decodes the whole tensor into `out`, which has room for exactly its
    /// bytes, on the current thread.
    ///
    /// # Errors
    ///
    /// As [`Record::load_tiles_with`]. `out` then holds no promise.
    ///
    /// # Panics
    ///
    /// If `out` has another length.
    pub fn decode_to_slice_with(
        &self,
        source: &(impl ReadAt + ?Sized),
        isa: Isa,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        assert_eq!(out.len() as u64, self.header().content_bytes(), "not the tensor's length");
        let (dtype, tiling) = (self.header().dtype, &self.header().tiling);
        let row_bytes = tiling.row_stride() * dtype.elem_bytes();
        // Tiles of one column have one width, and so stay in step.
        let (across, n_tiles) = (tiling.tiles_across(), tiling.n_tiles());
        let indices: Vec<usize> =
            (0..across).flat_map(|col| (col..n_tiles).step_by(across)).collect();
        self.for_each_strip_with(source, isa, &indices, |_, strip, planes| {
            let start = strip.row_start * row_bytes + strip.col_start * dtype.elem_bytes();
            let target = &mut out[start..];
            join_tile_with(isa, dtype, tiling.order(), strip, planes, target, row_bytes);
        })
    }

    /// Decodes the tensor and hands its bytes to `sink`, in order, at most
    /// 1 MiB at a time. Tiles are decoded in parallel on the current rayon pool.
    ///
    /// # Errors
    ///
    /// As [`Record::load_tiles_with`], or the sink's own error.
    ///
    /// # Cost
    ///
    /// At most 32 MiB of decoded tiles at a time. A matrix of more than 131,072
    /// columns is decoded several times over for this, at most 128 times.
    pub fn stream_with(
        &self,
        source: &(impl ReadAt + ?Sized),
        isa: Isa,
        mut sink: impl FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<(), DecodeError> {
        match self.header().tiling.order() {
            Order::Linear => self.stream_linear(source, isa, &mut sink),
            Order::Fragment => self.stream_fragment(source, isa, &mut sink),
        }
    }

    fn stream_linear(
        &self,
        source: &(impl ReadAt + ?Sized),
        isa: Isa,
        sink: &mut dyn FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<(), DecodeError> {
        let n_tiles = self.header().tiling.n_tiles();
        let batch = MAX_PANEL_TILES.min(2 * MAX_STREAMS * rayon::current_num_threads());
        for first in (0..n_tiles).step_by(batch) {
            let range = first..n_tiles.min(first + batch);
            for tile in self.load_panel(source, isa, range, 0..1)? {
                sink(&tile)?;
            }
        }
        Ok(())
    }

    fn stream_fragment(
        &self,
        source: &(impl ReadAt + ?Sized),
        isa: Isa,
        sink: &mut dyn FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<(), DecodeError> {
        let tiling = &self.header().tiling;
        let across = tiling.tiles_across();
        // As many rows at a time as fit, at least one; and of a single row as
        // many tiles as fit.
        let max_rows = (MAX_PANEL_TILES * TILE_ROWS / across).clamp(1, TILE_ROWS);
        let max_tiles = (MAX_PANEL_TILES * TILE_ROWS / max_rows).min(across);
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        for first in (0..tiling.n_tiles()).step_by(across) {
            let rows = tiling.tile(first).rows;
            for row in (0..rows).step_by(max_rows) {
                let band = row..rows.min(row + max_rows);
                for left in (0..across).step_by(max_tiles) {
                    let range = first + left..first + across.min(left + max_tiles);
                    let panel = self.load_panel(source, isa, range, band.clone())?;
                    emit_rows(&panel, band.len(), &mut chunk, sink)?;
                }
            }
        }
        if !chunk.is_empty() {
            sink(&chunk)?;
        }
        Ok(())
    }

    /// Rows `band` of each tile in `range`, row-major within the tile.
    fn load_panel(
        &self,
        source: &(impl ReadAt + ?Sized),
        isa: Isa,
        range: Range<usize>,
        band: Range<usize>,
    ) -> Result<Vec<Vec<u8>>, DecodeError> {
        let groups: Vec<Range<usize>> = (range.clone().step_by(MAX_STREAMS))
            .map(|first| first..range.end.min(first + MAX_STREAMS))
            .collect();
        let panel: Result<Vec<_>, DecodeError> = groups
            .into_par_iter()
            .map(|group| {
                let mut tiles = self.load_tiles_with(source, isa, group.clone())?;
                for (index, bytes) in group.zip(&mut tiles) {
                    let rows = self.header().tiling.tile(index).rows;
                    if band.len() < rows {
                        let row_bytes = bytes.len() / rows;
                        *bytes = bytes[band.start * row_bytes..band.end * row_bytes].to_vec();
                    }
                }
                Ok(tiles)
            })
            .collect();
        Ok(panel?.into_iter().flatten().collect())
    }

    /// Decodes the tensor and compares it with the hash in the header.
    ///
    /// # Errors
    ///
    /// [`DecodeError::ContentHash`], or as [`Record::stream_with`].
    pub fn verify_with(
        &self,
        source: &(impl ReadAt + ?Sized),
        isa: Isa,
    ) -> Result<(), DecodeError> {
        let mut hasher = blake3::Hasher::new();
        self.stream_with(source, isa, |bytes| {
            hasher.update(bytes);
            Ok(())
        })?;
        self.check_content_hash(&hasher.finalize())
    }

    /// Compares a hash of the decoded bytes with the one in the header.
    ///
    /// # Errors
    ///
    /// [`DecodeError::ContentHash`] if they differ.
    pub fn check_content_hash(&self, found: &blake3::Hash) -> Result<(), DecodeError> {
        let expected = blake3::Hash::from_bytes(self.header().content_hash);
        if *found == expected {
            return Ok(());
        }
        Err(DecodeError::ContentHash {
            found: found.to_hex().to_string(),
            expected: expected.to_hex().to_string(),
        })
    }

    /// Decodes the whole tensor into memory. Meant for small tensors and
    /// tests; the content hash is not checked.
    ///
    /// # Errors
    ///
    /// As [`Record::stream_with`].
    pub fn to_vec(
        &self,
        source: &(impl ReadAt + ?Sized),
        isa: Isa,
    ) -> Result<Vec<u8>, DecodeError> {
        let mut out = Vec::new();
        self.stream_with(source, isa, |bytes| {
            out.extend_from_slice(bytes);
            Ok(())
        })?;
        Ok(out)
    }

    /// Rows and columns of the tensor seen as a matrix: columns are the last
    /// dimension, rows all others.
    #[must_use]
    pub fn matrix_sides(&self) -> (usize, usize) {
        match self.header().shape.split_last() {
            None => (1, 1),
            Some((_, _)) if self.header().tiling.n_elems() == 0 => (0, 0),
            Some((&cols, _)) => (self.header().tiling.n_elems() / cols, cols),
        }
    }

    /// Reads rows `rows` and columns `cols` of the tensor seen as a matrix
    /// (see [`Record::matrix_sides`]), touching only the tiles they lie in.
    /// `out` becomes their elements, row-major.
    ///
    /// # Errors
    ///
    /// [`DecodeError::Slice`] if the ranges are not inside the matrix, or as
    /// [`Record::load_tiles_with`].
    ///
    /// # Cost
    ///
    /// Decodes every tile it touches whole: 65,536 elements each.
    pub fn read_slice_with(
        &self,
        source: &(impl ReadAt + ?Sized),
        isa: Isa,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), DecodeError> {
        let (n_rows, n_cols) = self.matrix_sides();
        let inside = |r: &Range<usize>, n| r.start <= r.end && r.end <= n;
        if !inside(&rows, n_rows) || !inside(&cols, n_cols) {
            return Err(DecodeError::Slice {
                found: format!("rows {rows:?}, columns {cols:?}"),
                expected: format!("rows {:?}, columns {:?}", 0..n_rows, 0..n_cols),
            });
        }
        let elem_bytes = self.header().dtype.elem_bytes();
        out.clear();
        out.resize(rows.len() * cols.len() * elem_bytes, 0);
        if out.is_empty() {
            return Ok(());
        }
        match self.header().tiling.order() {
            Order::Fragment => self.read_rectangle(source, isa, &rows, &cols, out),
            Order::Linear => self.read_runs(source, isa, &rows, &cols, n_cols, out),
        }
    }

    fn read_rectangle(
        &self,
        source: &(impl ReadAt + ?Sized),
        isa: Isa,
        rows: &Range<usize>,
        cols: &Range<usize>,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let tiling = &self.header().tiling;
        let elem_bytes = self.header().dtype.elem_bytes();
        for index in 0..tiling.n_tiles() {
            let tile = tiling.tile(index);
            let row_part = overlap(rows, tile.row_start, tile.rows);
            let col_part = overlap(cols, tile.col_start, tile.cols);
            if row_part.is_empty() || col_part.is_empty() {
                continue;
            }
            let bytes = self.load_tiles_with(source, isa, index..index + 1)?.remove(0);
            for row in row_part {
                let from = (row - tile.row_start) * tile.cols + col_part.start - tile.col_start;
                let to = (row - rows.start) * cols.len() + col_part.start - cols.start;
                let n = col_part.len() * elem_bytes;
                out[to * elem_bytes..][..n].copy_from_slice(&bytes[from * elem_bytes..][..n]);
            }
        }
        Ok(())
    }

    fn read_runs(
        &self,
        source: &(impl ReadAt + ?Sized),
        isa: Isa,
        rows: &Range<usize>,
        cols: &Range<usize>,
        n_cols: usize,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let tiling = &self.header().tiling;
        let elem_bytes = self.header().dtype.elem_bytes();
        for index in 0..tiling.n_tiles() {
            let tile = tiling.tile(index);
            let mut bytes = Vec::new();
            let first_row = (tile.col_start / n_cols).max(rows.start);
            let end_row = (tile.col_start + tile.cols).div_ceil(n_cols).min(rows.end);
            for row in first_row..end_row {
                let run = row * n_cols + cols.start..row * n_cols + cols.end;
                let part = overlap(&run, tile.col_start, tile.cols);
                if part.is_empty() {
                    continue;
                }
                if bytes.is_empty() {
                    bytes = self.load_tiles_with(source, isa, index..index + 1)?.remove(0);
                }
                let from = (part.start - tile.col_start) * elem_bytes;
                let to = (row - rows.start) * cols.len() + part.start - run.start;
                let n = part.len() * elem_bytes;
                out[to * elem_bytes..][..n].copy_from_slice(&bytes[from..][..n]);
            }
        }
        Ok(())
    }
}

fn overlap(range: &Range<usize>, start: usize, n: usize) -> Range<usize> {
    let (low, high) = (range.start.max(start), range.end.min(start + n));
    low..high.max(low)
}

/// Hands row after row of a panel of tiles to the sink, through `chunk`.
fn emit_rows(
    panel: &[Vec<u8>],
    n_rows: usize,
    chunk: &mut Vec<u8>,
    sink: &mut dyn FnMut(&[u8]) -> std::io::Result<()>,
) -> Result<(), DecodeError> {
    for row in 0..n_rows {
        for tile in panel {
            let row_bytes = tile.len() / n_rows;
            if chunk.len() + row_bytes > CHUNK_BYTES {
                sink(chunk)?;
                chunk.clear();
            }
            chunk.extend_from_slice(&tile[row * row_bytes..(row + 1) * row_bytes]);
        }
    }
    Ok(())
}
