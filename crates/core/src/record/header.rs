//! The header of a record, and the directory of its tiles.
//!
//! ```text
//!  0  Magic            4 bytes  "TRSM"
//!  4  Version_Major    u8
//!  5  Version_Minor    u8
//!  6  Dtype            u8
//!  7  Coded_Planes     u8       bit p: plane p is coded
//!  8  Header_Checksum  u64      xxh3-64 of all other bytes up to the first tile
//! 16  Content_Hash     32 bytes BLAKE3 of the tensor's bytes
//! 48  Header_Bytes     u32      bytes before the first tile
//! 52  N_Dims, Dims     LEB128
//!     Tables           one for each coded plane
//!     Directory        for each tile: Tile_Bytes u32, Tile_Checksum u64
//! ```

use xxhash_rust::xxh3::Xxh3;

use crate::coder::rans::MIN_STATES_BYTES;
use crate::dtype::Dtype;
use crate::error::DecodeError;
use crate::model::FreqTable;
use crate::tile::{Tile, Tiling};

/// First bytes of a record.
pub const MAGIC: [u8; 4] = *b"TRSM";
/// Readers refuse any other.
pub const VERSION_MAJOR: u8 = 1;
/// Readers ignore what a later minor version adds.
pub const VERSION_MINOR: u8 = 0;

/// Bytes before the shape.
pub(crate) const FIXED_BYTES: usize = 52;
/// Bytes of a directory entry.
pub(crate) const ENTRY_BYTES: usize = 12;
const CHECKSUM_START: usize = 8;
const CHECKSUM_END: usize = 16;
/// Tensors beyond this are refused, so that sizes in bits fit 64 bits.
pub(crate) const MAX_ELEMS: u64 = 1 << 48;
/// More dimensions are refused: a dimension of one byte takes eight in memory.
pub(crate) const MAX_DIMS: usize = 1 << 16;

/// Where a tile lies and what its checksum is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileEntry {
    /// From the start of the record, in bytes.
    pub start: u64,
    /// Length in bytes.
    pub n_bytes: u32,
    /// xxh3-64 of those bytes.
    pub checksum: u64,
}

/// A validated record header.
///
/// Invariants: the tables belong to planes that the dtype may code; the
/// directory has one entry a tile, in order, without gaps; every tile's length
/// is possible.
#[derive(Debug, Clone, PartialEq)]
pub struct RecordHeader {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) tiling: Tiling,
    pub(crate) content_hash: [u8; 32],
    /// Frequencies of plane 0 and plane 1, `None` where the plane is raw.
    pub(crate) tables: [Option<FreqTable>; 2],
    pub(crate) tiles: Vec<TileEntry>,
    pub(crate) header_bytes: u32,
}

impl RecordHeader {
    /// Element type.
    #[must_use]
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Shape, as in the checkpoint; `[bytes]` for [`Dtype::Opaque`].
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How the tensor is cut into tiles.
    #[must_use]
    pub const fn tiling(&self) -> &Tiling {
        &self.tiling
    }

    /// BLAKE3 of the tensor's bytes.
    #[must_use]
    pub const fn content_hash(&self) -> &[u8; 32] {
        &self.content_hash
    }

    /// Bytes of the tensor before packing.
    #[must_use]
    pub const fn content_bytes(&self) -> u64 {
        self.tiling.n_elems() as u64 * self.dtype.elem_bytes() as u64
    }

    /// Bytes before the first tile.
    #[must_use]
    pub const fn header_bytes(&self) -> u32 {
        self.header_bytes
    }

    /// Bytes of the whole record.
    #[must_use]
    pub fn record_bytes(&self) -> u64 {
        self.tiles.last().map_or(u64::from(self.header_bytes), |t| t.start + u64::from(t.n_bytes))
    }

    /// Bytes of all tiles.
    #[must_use]
    pub fn tiles_bytes(&self) -> u64 {
        self.record_bytes() - u64::from(self.header_bytes)
    }

    /// Frequencies of a plane, `None` if it is stored as it is.
    ///
    /// # Panics
    ///
    /// If `plane` is not 0 or 1.
    #[must_use]
    pub const fn table(&self, plane: usize) -> Option<&FreqTable> {
        self.tables[plane].as_ref()
    }

    /// Number of coded planes, 0 to 2.
    #[must_use]
    pub fn n_coded(&self) -> usize {
        self.tables.iter().flatten().count()
    }

    /// The tiles, in order.
    #[must_use]
    pub fn tiles(&self) -> &[TileEntry] {
        &self.tiles
    }

    /// Bytes of a tile whose planes are all stored as they are.
    #[must_use]
    pub const fn raw_tile_bytes(&self, tile: &Tile) -> usize {
        tile.n_elems() * self.dtype.elem_bytes()
    }

    /// Number of planes that are stored as they are even in a coded tile.
    #[must_use]
    pub fn n_raw_planes(&self) -> usize {
        self.dtype.elem_bytes() - self.n_coded()
    }

    /// Bytes that the uncoded planes take in a coded tile.
    #[must_use]
    pub fn raw_plane_bytes(&self, tile: &Tile) -> usize {
        tile.n_elems() * self.n_raw_planes()
    }

    /// Whether a tile is coded. One that takes as many bytes as its elements is raw.
    #[must_use]
    pub fn is_coded(&self, index: usize) -> bool {
        let tile = self.tiling.tile(index);
        self.n_coded() > 0 && (self.tiles[index].n_bytes as usize) < self.raw_tile_bytes(&tile)
    }

    /// Everything before the directory.
    fn write_fields(&self, out: &mut Vec<u8>) {
        let coded = (0..2).filter(|&p| self.tables[p].is_some()).fold(0, |bits, p| bits | 1 << p);
        out.extend(MAGIC);
        out.extend([VERSION_MAJOR, VERSION_MINOR, self.dtype.code(), coded]);
        out.extend([0; CHECKSUM_END - CHECKSUM_START]);
        out.extend(self.content_hash);
        out.extend(self.header_bytes.to_le_bytes());
        put_leb128(out, self.shape.len() as u64);
        self.shape.iter().for_each(|&dim| put_leb128(out, dim as u64));
        self.tables.iter().flatten().for_each(|table| table.write(out));
    }

    /// Sets `header_bytes` from the other fields and the number of tiles.
    /// `None` if the header would not fit 32 bits.
    pub(crate) fn measure(&mut self) -> Option<()> {
        let mut fields = Vec::new();
        self.write_fields(&mut fields);
        let directory = self.tiling.n_tiles().checked_mul(ENTRY_BYTES)?;
        self.header_bytes = u32::try_from(fields.len().checked_add(directory)?).ok()?;
        Some(())
    }

    /// The header as bytes, directory included.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.header_bytes as usize);
        self.write_fields(&mut out);
        for tile in &self.tiles {
            out.extend(tile.n_bytes.to_le_bytes());
            out.extend(tile.checksum.to_le_bytes());
        }
        let checksum = checksum(&out);
        out[CHECKSUM_START..CHECKSUM_END].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// The length of the header, from its first [`FIXED_BYTES`] bytes.
    pub(crate) fn peek_bytes(fixed: &[u8; FIXED_BYTES]) -> Result<u32, DecodeError> {
        let magic: [u8; 4] = fixed[..4].try_into().expect("four bytes");
        if magic != MAGIC {
            return Err(DecodeError::WrongMagic { found: magic, expected: MAGIC });
        }
        if fixed[4] != VERSION_MAJOR {
            return Err(DecodeError::Version { found: fixed[4], expected: VERSION_MAJOR });
        }
        Ok(u32::from_le_bytes(fixed[48..].try_into().expect("four bytes")))
    }

    /// Reads a header. `bytes` is exactly the header, `record_bytes` the
    /// length of the whole record.
    ///
    /// # Errors
    ///
    /// A [`DecodeError`] of the group "record header", or
    /// [`DecodeError::TileBytes`] for a length no tile can have.
    pub fn parse(bytes: &[u8], record_bytes: u64) -> Result<Self, DecodeError> {
        let Some((fixed, rest)) = bytes.split_first_chunk::<FIXED_BYTES>() else {
            return Err(DecodeError::RecordTruncated {
                found: bytes.len() as u64,
                expected: FIXED_BYTES as u64,
            });
        };
        let header_bytes = Self::peek_bytes(fixed)?;
        if header_bytes as usize != bytes.len() {
            return Err(DecodeError::HeaderBytes {
                found: header_bytes.into(),
                expected: bytes.len() as u64,
            });
        }
        let stored = &fixed[CHECKSUM_START..CHECKSUM_END];
        let expected = u64::from_le_bytes(stored.try_into().expect("eight bytes"));
        let found = checksum(bytes);
        if found != expected {
            return Err(DecodeError::HeaderChecksum { found, expected });
        }
        let dtype = Dtype::from_code(fixed[6])
            .ok_or(DecodeError::Dtype { found: fixed[6], expected: Dtype::U8.code() })?;
        let (shape, rest) = take_shape(rest)?;
        let tiling = Tiling::of(&shape)
            .filter(|tiling| tiling.n_elems() as u64 <= MAX_ELEMS)
            .ok_or(DecodeError::Shape)?;
        let (tables, rest) = take_tables(fixed[7], dtype, rest)?;
        let mut header = Self {
            dtype,
            shape,
            tiling,
            content_hash: fixed[16..48].try_into().expect("32 bytes"),
            tables,
            tiles: Vec::new(),
            header_bytes,
        };
        let directory_bytes = tiling.n_tiles() * ENTRY_BYTES;
        // A later minor version may put more fields before the directory.
        let fits = match fixed[5] {
            VERSION_MINOR => rest.len() == directory_bytes,
            _ => rest.len() >= directory_bytes,
        };
        if !fits {
            let expected = bytes.len() - rest.len() + directory_bytes;
            let found = u64::from(header_bytes);
            return Err(DecodeError::HeaderBytes { found, expected: expected as u64 });
        }
        header.take_directory(&rest[rest.len() - directory_bytes..])?;
        if header.record_bytes() != record_bytes {
            let expected = header.record_bytes();
            return Err(DecodeError::RecordBytes { found: record_bytes, expected });
        }
        Ok(header)
    }

    fn take_directory(&mut self, directory: &[u8]) -> Result<(), DecodeError> {
        let mut start = u64::from(self.header_bytes);
        let mut tiles = Vec::with_capacity(directory.len() / ENTRY_BYTES);
        for (index, entry) in directory.chunks_exact(ENTRY_BYTES).enumerate() {
            let n_bytes = u32::from_le_bytes(entry[..4].try_into().expect("four bytes"));
            let checksum = u64::from_le_bytes(entry[4..].try_into().expect("eight bytes"));
            let tile = self.tiling.tile(index);
            let max = self.raw_tile_bytes(&tile);
            let min = match self.n_coded() {
                0 => max,
                _ => max.min(self.raw_plane_bytes(&tile) + MIN_STATES_BYTES),
            };
            let found = n_bytes as usize;
            if !(min..=max).contains(&found) {
                return Err(DecodeError::TileBytes { tile: index, found, min, max });
            }
            tiles.push(TileEntry { start, n_bytes, checksum });
            start += u64::from(n_bytes);
        }
        self.tiles = tiles;
        Ok(())
    }
}

fn checksum(header: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(&header[..CHECKSUM_START]);
    hasher.update(&header[CHECKSUM_END..]);
    hasher.digest()
}

fn take_shape(mut rest: &[u8]) -> Result<(Vec<usize>, &[u8]), DecodeError> {
    let n_dims = take_leb128(&mut rest).ok_or(DecodeError::Shape)?;
    // A dimension takes at least one byte.
    if n_dims > rest.len().min(MAX_DIMS) as u64 {
        return Err(DecodeError::Shape);
    }
    let shape = (0..n_dims)
        .map(|_| take_leb128(&mut rest).and_then(|dim| usize::try_from(dim).ok()))
        .collect::<Option<_>>()
        .ok_or(DecodeError::Shape)?;
    Ok((shape, rest))
}

type Tables = [Option<FreqTable>; 2];

fn take_tables(coded: u8, dtype: Dtype, mut rest: &[u8]) -> Result<(Tables, &[u8]), DecodeError> {
    let mut tables = [None, None];
    let codable = (0..2).filter(|&p| dtype.is_codable(p)).fold(0, |bits, p| bits | 1 << p);
    if coded & !codable != 0 {
        return Err(DecodeError::CodedPlanes { found: coded, dtype: dtype.name() });
    }
    for (plane, table) in tables.iter_mut().enumerate() {
        if coded >> plane & 1 == 1 {
            let (freqs, n_bytes) =
                FreqTable::read(rest).map_err(|source| DecodeError::Table { plane, source })?;
            *table = Some(freqs);
            rest = &rest[n_bytes..];
        }
    }
    Ok((tables, rest))
}

fn put_leb128(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// `None` if cut off, longer than necessary, or beyond 63 bits.
fn take_leb128(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for i in 0..9 {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7F) << (7 * i);
        if byte < 0x80 {
            return (i == 0 || byte > 0).then_some(value);
        }
    }
    None
}
