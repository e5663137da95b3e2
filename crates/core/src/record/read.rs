//! Record -> tensor: whole, tile by tile, or in part.

use std::ops::Range;

use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use crate::coder::rans::{self, DecodeTable};
use crate::error::DecodeError;
use crate::io::ReadAt;
use crate::isa::Isa;
use crate::record::header::{FIXED_BYTES, RecordHeader};
use crate::split::join_tile_with;
use crate::tile::{Order, TILE_ROWS};

/// Tiles held decoded at a time while streaming: 32 MiB of 16-bit elements.
const MAX_PANEL_TILES: usize = 256;
/// Bytes handed to the sink at a time while streaming.
const CHUNK_BYTES: usize = 1 << 20;

/// A record whose header has been read and checked.
///
/// The bytes of the tiles stay in the source, which every call names again.
#[derive(Debug, Clone)]
pub struct Record {
    header: RecordHeader,
    /// Where the record starts in the source.
    start: u64,
    tables: Vec<DecodeTable>,
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
        let header = RecordHeader::parse(&bytes, record_bytes)?;
        let tables = header.tables.iter().flatten().map(DecodeTable::new).collect();
        Ok(Self { header, start, tables })
    }

    /// The header.
    #[must_use]
    pub const fn header(&self) -> &RecordHeader {
        &self.header
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
        let entry = &self.header.tiles[index];
        out.resize(entry.n_bytes as usize, 0);
        source.read_exact_at(out, self.start + entry.start)?;
        let found = xxh3_64(out);
        if found != entry.checksum {
            let expected = entry.checksum;
            return Err(DecodeError::TileChecksum { tile: index, found, expected });
        }
        Ok(())
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
        let tile = self.header.tiling.tile(index);
        assert_eq!(stored.len(), self.header.tiles[index].n_bytes as usize, "not this tile");
        assert_eq!(planes.len(), self.header.raw_tile_bytes(&tile), "planes differ from the tile");
        if !self.header.is_coded(index) {
            planes.copy_from_slice(stored);
            return Ok(());
        }
        let raw_start = stored.len() - self.header.raw_plane_bytes(&tile);
        let (stream, mut raw) = stored.split_at(raw_start);
        let mut coded = Vec::with_capacity(2);
        for (plane, table) in planes.chunks_mut(tile.n_elems()).zip(&self.header.tables) {
            if table.is_some() {
                coded.push(plane);
            } else {
                let (stored, rest) = raw.split_at(plane.len());
                plane.copy_from_slice(stored);
                raw = rest;
            }
        }
        let tables: Vec<&DecodeTable> = self.tables.iter().collect();
        rans::decode_with(isa, stream, &tables, &mut coded)
            .map_err(|source| DecodeError::Tile { tile: index, source })
    }

    /// Reads, checks and decodes a tile into row-major elements of its own:
    /// `out` becomes `rows * cols` elements.
    ///
    /// # Errors
    ///
    /// As [`Record::read_tile`] and [`Record::decode_tile_with`].
    ///
    /// # Panics
    ///
    /// If there is no such tile.
    pub fn load_tile_with(
        &self,
        source: &(impl ReadAt + ?Sized),
        isa: Isa,
        index: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), DecodeError> {
        let tile = self.header.tiling.tile(index);
        let mut stored = Vec::new();
        self.read_tile(source, index, &mut stored)?;
        let mut planes = vec![0; self.header.raw_tile_bytes(&tile)];
        self.decode_tile_with(isa, index, &stored, &mut planes)?;
        out.resize(planes.len(), 0);
        let (dtype, order) = (self.header.dtype, self.header.tiling.order());
        let row_bytes = tile.cols * dtype.elem_bytes();
        join_tile_with(isa, dtype, order, &tile, &planes, out, row_bytes);
        Ok(())
    }

    /// Decodes the tensor and hands its bytes to `sink`, in order, at most
    /// 1 MiB at a time. Tiles are decoded in parallel on the current rayon pool.
    ///
    /// # Errors
    ///
    /// As [`Record::load_tile_with`], or the sink's own error.
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
        match self.header.tiling.order() {
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
        let n_tiles = self.header.tiling.n_tiles();
        let batch = MAX_PANEL_TILES.min(4 * rayon::current_num_threads());
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
        let tiling = &self.header.tiling;
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
        range
            .into_par_iter()
            .map(|index| {
                let tile = self.header.tiling.tile(index);
                let mut bytes = Vec::new();
                self.load_tile_with(source, isa, index, &mut bytes)?;
                if band.len() < tile.rows {
                    let row_bytes = bytes.len() / tile.rows;
                    bytes = bytes[band.start * row_bytes..band.end * row_bytes].to_vec();
                }
                Ok(bytes)
            })
            .collect()
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
        let expected = blake3::Hash::from_bytes(self.header.content_hash);
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
        match self.header.shape.split_last() {
            None => (1, 1),
            Some((_, _)) if self.header.tiling.n_elems() == 0 => (0, 0),
            Some((&cols, _)) => (self.header.tiling.n_elems() / cols, cols),
        }
    }

    /// Reads rows `rows` and columns `cols` of the tensor seen as a matrix
    /// (see [`Record::matrix_sides`]), touching only the tiles they lie in.
    /// `out` becomes their elements, row-major.
    ///
    /// # Errors
    ///
    /// [`DecodeError::Slice`] if the ranges are not inside the matrix, or as
    /// [`Record::load_tile_with`].
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
        let elem_bytes = self.header.dtype.elem_bytes();
        out.clear();
        out.resize(rows.len() * cols.len() * elem_bytes, 0);
        if out.is_empty() {
            return Ok(());
        }
        match self.header.tiling.order() {
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
        let tiling = &self.header.tiling;
        let elem_bytes = self.header.dtype.elem_bytes();
        let mut bytes = Vec::new();
        for index in 0..tiling.n_tiles() {
            let tile = tiling.tile(index);
            let row_part = overlap(rows, tile.row_start, tile.rows);
            let col_part = overlap(cols, tile.col_start, tile.cols);
            if row_part.is_empty() || col_part.is_empty() {
                continue;
            }
            self.load_tile_with(source, isa, index, &mut bytes)?;
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
        let tiling = &self.header.tiling;
        let elem_bytes = self.header.dtype.elem_bytes();
        let mut bytes = Vec::new();
        for index in 0..tiling.n_tiles() {
            let tile = tiling.tile(index);
            let mut loaded = false;
            let first_row = (tile.col_start / n_cols).max(rows.start);
            let end_row = (tile.col_start + tile.cols).div_ceil(n_cols).min(rows.end);
            for row in first_row..end_row {
                let run = row * n_cols + cols.start..row * n_cols + cols.end;
                let part = overlap(&run, tile.col_start, tile.cols);
                if part.is_empty() {
                    continue;
                }
                if !std::mem::replace(&mut loaded, true) {
                    self.load_tile_with(source, isa, index, &mut bytes)?;
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
