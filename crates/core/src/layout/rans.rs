//! The tiles of a record as they are.

use std::ops::Range;

use rayon::prelude::*;

use crate::coder::rans::DecodeTable;
use crate::dtype::Dtype;
use crate::error::{DecodeError, EncodeError};
use crate::io::ReadAt;
use crate::isa::Isa;
use crate::layout::Part;
use crate::record::strips::decode_strips;
use crate::record::{Record, RecordWriter, TensorStatistics};
use crate::tile::{Order, TILE_ROWS, Tile, Tiling};

#[derive(Debug)]
pub(crate) struct RansMatrix {
    /// Says where in its source the tiles were; here they start at byte 0.
    record: Record,
    /// All tiles, end to end.
    bytes: Part,
}

impl RansMatrix {
    pub(super) fn from_record(
        record: &Record,
        source: &(impl ReadAt + ?Sized),
    ) -> Result<Self, DecodeError> {
        let header = record.header();
        let mut bytes = vec![0; header.tiles_bytes() as usize];
        let mut rest = bytes.as_mut_slice();
        let mut tiles = Vec::with_capacity(header.tiles().len());
        for entry in header.tiles() {
            let tile;
            (tile, rest) = rest.split_at_mut(entry.n_bytes as usize);
            tiles.push(tile);
        }
        (tiles.into_par_iter().enumerate())
            .try_for_each(|(index, tile)| record.read_tile_into(source, index, tile))?;
        Ok(Self { record: record.clone(), bytes: bytes.into() })
    }

    /// From the tiles of a record, end to end, which are checked one after the other.
    pub(super) fn from_tiles(record: Record, bytes: Part) -> Result<Self, DecodeError> {
        let (found, expected) = (bytes.len() as u64, record.header().tiles_bytes());
        if found != expected {
            return Err(DecodeError::RecordTruncated { found, expected });
        }
        let matrix = Self { record, bytes };
        for index in 0..matrix.record.header().tiles().len() {
            matrix.record.check_tile(index, matrix.stored(index))?;
        }
        Ok(matrix)
    }

    pub(crate) fn tiling(&self) -> &Tiling {
        self.record.header().tiling()
    }

    pub(super) fn resident_bytes(&self) -> usize {
        Self::expected_bytes(&self.record)
    }

    /// Bytes of memory a record takes.
    pub(super) fn expected_bytes(record: &Record) -> usize {
        let tables: usize = record.tables().iter().map(DecodeTable::resident_bytes).sum();
        let header = record.header();
        header.tiles_bytes() as usize + size_of_val(header.tiles()) + tables
    }

    pub(super) fn into_buffer(self) -> Vec<u8> {
        self.bytes.into_buffer()
    }

    /// Overwrites every tile.
    pub(super) fn poison(&mut self) {
        self.bytes.fill(0xFF);
    }

    fn stored(&self, index: usize) -> &[u8] {
        let header = self.record.header();
        let entry = &header.tiles()[index];
        let start = (entry.start - u64::from(header.header_bytes())) as usize;
        &self.bytes[start..start + entry.n_bytes as usize]
    }

    /// Decodes tiles strip by strip; see [`decode_strips`].
    pub(crate) fn for_each_strip(
        &self,
        isa: Isa,
        tiles: Range<usize>,
        sink: impl FnMut(usize, &Tile, [&[u8]; 2]),
    ) -> Result<(), DecodeError> {
        let tiles: Vec<(usize, &[u8])> = tiles.map(|index| (index, self.stored(index))).collect();
        decode_strips(isa, self.record.header(), self.record.tables(), &tiles, sink)
    }
}

/// Encodes elements at a position of a source into a record in memory.
pub(super) fn encode_in_memory(
    source: &(impl ReadAt + ?Sized),
    start: u64,
    shape: [usize; 2],
    dtype: Dtype,
    isa: Isa,
) -> Result<Vec<u8>, EncodeError> {
    let row_bytes = shape[1] * dtype.elem_bytes();
    let panel_bytes = (row_bytes * TILE_ROWS).max(1);
    let n_bytes = row_bytes * shape[0];
    let read = |first: usize, n: usize| -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; n];
        source.read_exact_at(&mut bytes, start + first as u64)?;
        Ok(bytes)
    };
    let statistics = (0..n_bytes.div_ceil(panel_bytes))
        .into_par_iter()
        .map(|panel| {
            let first = panel * panel_bytes;
            let mut statistics = TensorStatistics::new(dtype);
            statistics.add(&read(first, panel_bytes.min(n_bytes - first))?);
            Ok(statistics)
        })
        .try_reduce(
            || TensorStatistics::new(dtype),
            |mut a, b| {
                a.merge(&b);
                Ok::<_, EncodeError>(a)
            },
        )?;
    // The elements are not going to be verified against a hash: they are at hand.
    let writer = RecordWriter::new(&shape, &statistics, [0; 32])?;
    let tiling = *writer.tiling();
    let stride = tiling.row_stride() * dtype.elem_bytes();
    // A panel is a row of tiles, or in linear order a single tile.
    let per_panel = match tiling.order() {
        Order::Fragment => tiling.tiles_across(),
        Order::Linear => 1,
    };
    let panels: Vec<Vec<_>> = (0..tiling.n_tiles() / per_panel)
        .into_par_iter()
        .map(|panel| {
            let tiles = panel * per_panel..(panel + 1) * per_panel;
            let (first, last) = (tiling.tile(tiles.start), tiling.tile(tiles.end - 1));
            let at = |tile: &Tile| tile.row_start * stride + tile.col_start * dtype.elem_bytes();
            let end = at(&last) + (last.rows - 1) * stride + last.cols * dtype.elem_bytes();
            let bytes = read(at(&first), end - at(&first))?;
            tiles
                .map(|index| {
                    let offset = at(&tiling.tile(index)) - at(&first);
                    writer.encode_tile(isa, index, &bytes[offset..], stride)
                })
                .collect::<Result<_, EncodeError>>()
        })
        .collect::<Result<_, EncodeError>>()?;
    let tiles: Vec<_> = panels.into_iter().flatten().collect();
    let mut out = writer.finish(tiles.iter().map(|t| (t.bytes.len() as u32, t.checksum)));
    out.reserve_exact(tiles.iter().map(|tile| tile.bytes.len()).sum());
    tiles.iter().for_each(|tile| out.extend(&tile.bytes));
    Ok(out)
}
