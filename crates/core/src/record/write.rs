//! Tensor -> record.

use xxhash_rust::xxh3::xxh3_64;

use crate::coder::rans::{self, EncodeTable, TAIL_BYTES};
use crate::dtype::Dtype;
use crate::error::EncodeError;
use crate::isa::Isa;
use crate::model::{FreqTable, Histogram};
use crate::record::header::{MAX_DIMS, MAX_ELEMS, RecordHeader, TileEntry};
use crate::split::split_tile_with;
use crate::tile::Tiling;

/// Bytes that the lane states of a tile take on average.
const MEAN_STATES_BYTES: usize = 110;

/// What the encoder has to know of a tensor before its first tile: how often
/// each byte occurs in each plane.
#[derive(Debug, Clone)]
pub struct TensorStatistics {
    dtype: Dtype,
    /// Of the planes; all zero where a plane is never coded.
    histograms: [Histogram; 2],
}

impl TensorStatistics {
    /// Statistics of no elements yet.
    #[must_use]
    pub fn new(dtype: Dtype) -> Self {
        Self { dtype, histograms: Default::default() }
    }

    /// Counts elements, in any order; `bytes` holds whole ones.
    ///
    /// # Panics
    ///
    /// If `bytes` ends inside an element.
    pub fn add(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<2>();
        assert!(self.dtype.elem_bytes() == 1 || rest.is_empty(), "half an element");
        let word = u16::from_le_bytes;
        match self.dtype {
            Dtype::Opaque => {}
            Dtype::Bf16 => self.histograms[0].add_mapped(words, |w| (word(w) >> 7) as u8),
            Dtype::F16 => {
                self.histograms[0].add_mapped(words, |[_, high]| high);
                self.histograms[1].add_mapped(words, |[low, _]| low);
            }
            Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::I8 | Dtype::U8 => self.histograms[0].add(bytes),
        }
    }

    /// Adds the counts of another part of the same tensor.
    ///
    /// # Panics
    ///
    /// If the dtypes differ.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.dtype, other.dtype, "parts of one tensor have one dtype");
        for (a, b) in self.histograms.iter_mut().zip(&other.histograms) {
            a.merge(b);
        }
    }

    /// The dtype.
    #[must_use]
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The histogram of a plane; empty if the dtype never codes it.
    ///
    /// # Panics
    ///
    /// If `plane` is not 0 or 1.
    #[must_use]
    pub const fn histogram(&self, plane: usize) -> &Histogram {
        &self.histograms[plane]
    }

    /// Order-0 floor in bits an element: entropy of the planes that have less
    /// than 7.9 bits and may be coded, 8 bits for each of the others.
    #[must_use]
    pub fn floor_bits(&self) -> f64 {
        (0..self.dtype.elem_bytes())
            .map(|p| match self.histograms[p].entropy() {
                entropy
                    if self.dtype.is_codable(p) && entropy < crate::model::MAX_CODED_ENTROPY =>
                {
                    entropy
                }
                _ => 8.0,
            })
            .sum()
    }

    /// The tables of the planes worth coding. None at all if states and tables
    /// would cost more than coding saves, as in tiny tensors.
    fn tables(&self, n_tiles: usize) -> [Option<FreqTable>; 2] {
        let tables = [0, 1].map(|p| FreqTable::choose(&self.histograms[p]));
        let mut saved_bytes = 0.0;
        for (histogram, table) in self.histograms.iter().zip(&tables) {
            if let Some(table) = table {
                let mut written = Vec::new();
                table.write(&mut written);
                let bits_saved = 8.0 - histogram.entropy();
                saved_bytes += histogram.total() as f64 * bits_saved / 8.0 - written.len() as f64;
            }
        }
        let states_bytes = (n_tiles * (MEAN_STATES_BYTES - TAIL_BYTES)) as f64;
        if saved_bytes > states_bytes { tables } else { [None, None] }
    }
}

/// Encodes the tiles of one tensor, in order or in parallel, and then its header.
///
/// The header has a length known beforehand, so that tiles can be written
/// behind it as they come: [`RecordWriter::header_bytes`], then
/// [`RecordWriter::encode_tile`] for every tile in order, then
/// [`RecordWriter::finish`].
#[derive(Debug)]
pub struct RecordWriter {
    header: RecordHeader,
    tables: Vec<EncodeTable>,
}

/// An encoded tile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedTile {
    /// What goes into the record.
    pub bytes: Vec<u8>,
    /// xxh3-64 of those bytes.
    pub checksum: u64,
}

impl RecordWriter {
    /// A writer for a tensor with these statistics.
    ///
    /// # Errors
    ///
    /// [`EncodeError::DataBytes`] if the statistics do not cover the shape, or
    /// the shape is too large for a record.
    pub fn new(
        shape: &[usize],
        statistics: &TensorStatistics,
        content_hash: [u8; 32],
    ) -> Result<Self, EncodeError> {
        let dtype = statistics.dtype;
        let too_large = || EncodeError::DataBytes {
            found: 0,
            shape: shape.to_vec(),
            dtype: dtype.name(),
            expected: u64::MAX,
        };
        let fits = |tiling: &Tiling| {
            tiling.n_elems() as u64 <= MAX_ELEMS
                && shape.len() <= MAX_DIMS
                && shape.iter().all(|&dim| i64::try_from(dim).is_ok())
        };
        let tiling = Tiling::of(shape).filter(fits).ok_or_else(too_large)?;
        let counted = statistics.histograms[0].total();
        if dtype.is_codable(0) && counted != tiling.n_elems() as u64 {
            return Err(EncodeError::DataBytes {
                found: counted * dtype.elem_bytes() as u64,
                shape: shape.to_vec(),
                dtype: dtype.name(),
                expected: tiling.n_elems() as u64 * dtype.elem_bytes() as u64,
            });
        }
        let tables = statistics.tables(tiling.n_tiles());
        let encode_tables = tables.iter().flatten().map(EncodeTable::new).collect();
        let mut header = RecordHeader {
            dtype,
            shape: shape.to_vec(),
            tiling,
            content_hash,
            tables,
            tiles: Vec::new(),
            header_bytes: 0,
        };
        header.measure().ok_or_else(too_large)?;
        Ok(Self { header, tables: encode_tables })
    }

    /// How the tensor is cut into tiles.
    #[must_use]
    pub const fn tiling(&self) -> &Tiling {
        &self.header.tiling
    }

    /// Length of the header that [`RecordWriter::finish`] returns.
    #[must_use]
    pub const fn header_bytes(&self) -> u32 {
        self.header.header_bytes
    }

    /// Encodes one tile.
    ///
    /// `source` is row-major and starts at the tile's first element; rows are
    /// `row_stride_bytes` apart (not used in linear order).
    ///
    /// # Errors
    ///
    /// [`EncodeError::Tile`] if the tile holds bytes the statistics never saw.
    ///
    /// # Panics
    ///
    /// If there is no such tile or `source` ends before it does.
    pub fn encode_tile(
        &self,
        isa: Isa,
        index: usize,
        source: &[u8],
        row_stride_bytes: usize,
    ) -> Result<EncodedTile, EncodeError> {
        let tile = self.header.tiling.tile(index);
        let n = tile.n_elems();
        let order = self.header.tiling.order();
        let mut planes = vec![0; self.header.raw_tile_bytes(&tile)];
        split_tile_with(
            isa,
            self.header.dtype,
            order,
            &tile,
            source,
            row_stride_bytes,
            &mut planes,
        );
        let mut bytes = Vec::new();
        if !self.tables.is_empty() {
            self.encode_planes(isa, &planes, n, &mut bytes)
                .map_err(|source| EncodeError::Tile { tile: index, source })?;
        }
        // Never larger than the elements themselves.
        if self.tables.is_empty() || bytes.len() >= planes.len() {
            bytes = planes;
        }
        let checksum = xxh3_64(&bytes);
        Ok(EncodedTile { bytes, checksum })
    }

    fn encode_planes(
        &self,
        isa: Isa,
        planes: &[u8],
        n: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), crate::error::TileError> {
        let is_coded = |p: &usize| self.header.tables[*p].is_some();
        let n_planes = self.header.dtype.elem_bytes();
        let plane = |p: usize| &planes[p * n..(p + 1) * n];
        let coded: Vec<&[u8]> = (0..n_planes).filter(is_coded).map(plane).collect();
        let tables: Vec<&EncodeTable> = self.tables.iter().collect();
        rans::encode_with(isa, &coded, &tables, out)?;
        (0..n_planes).filter(|p| !is_coded(p)).for_each(|p| out.extend(plane(p)));
        Ok(())
    }

    /// The header, once every tile is encoded. `tiles` gives length and
    /// checksum of each, in order.
    ///
    /// # Panics
    ///
    /// If the number of tiles is not that of the tiling.
    #[must_use]
    pub fn finish(mut self, tiles: impl IntoIterator<Item = (u32, u64)>) -> Vec<u8> {
        let mut start = u64::from(self.header.header_bytes);
        for (n_bytes, checksum) in tiles {
            self.header.tiles.push(TileEntry { start, n_bytes, checksum });
            start += u64::from(n_bytes);
        }
        assert_eq!(self.header.tiles.len(), self.header.tiling.n_tiles(), "tiles are missing");
        self.header.to_bytes()
    }
}

/// Encodes a tensor held in memory into a record.
///
/// # Errors
///
/// [`EncodeError::DataBytes`] if `data` is not as long as shape and dtype say.
///
/// # Example
///
/// ```
/// use transom::{Dtype, Isa, Record, encode_record};
///
/// let weights: Vec<u8> = (0..4096u32).flat_map(|i| [i as u8, 0x3F]).collect();
/// let record = encode_record(Isa::best(), Dtype::Bf16, &[64, 64], &weights)?;
/// assert!(record.len() < weights.len());
///
/// let read = Record::read(&record, 0, record.len() as u64)?;
/// assert_eq!(read.to_vec(&record, Isa::best())?, weights);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn encode_record(
    isa: Isa,
    dtype: Dtype,
    shape: &[usize],
    data: &[u8],
) -> Result<Vec<u8>, EncodeError> {
    let expected = Tiling::of(shape).and_then(|t| t.n_elems().checked_mul(dtype.elem_bytes()));
    if expected != Some(data.len()) {
        return Err(EncodeError::DataBytes {
            found: data.len() as u64,
            shape: shape.to_vec(),
            dtype: dtype.name(),
            expected: expected.map_or(u64::MAX, |n| n as u64),
        });
    }
    let mut statistics = TensorStatistics::new(dtype);
    statistics.add(data);
    let writer = RecordWriter::new(shape, &statistics, *blake3::hash(data).as_bytes())?;
    let tiling = *writer.tiling();
    let row_stride_bytes = tiling.row_stride() * dtype.elem_bytes();
    let mut tiles = Vec::with_capacity(tiling.n_tiles());
    for index in 0..tiling.n_tiles() {
        let tile = tiling.tile(index);
        let first = tile.row_start * row_stride_bytes + tile.col_start * dtype.elem_bytes();
        tiles.push(writer.encode_tile(isa, index, &data[first..], row_stride_bytes)?);
    }
    let entries: Vec<_> = tiles.iter().map(|t| (t.bytes.len() as u32, t.checksum)).collect();
    let mut out = writer.finish(entries);
    tiles.iter().for_each(|tile| out.extend(&tile.bytes));
    Ok(out)
}
