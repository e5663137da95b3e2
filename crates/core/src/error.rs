//! What can go wrong, by direction and by place.

use std::io;

/// The stream of a tile is not one the encoder writes (spec section 5).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TileError {
    /// Shorter than the lane states, or the words end in half a word.
    #[error("coded stream of {found} bytes, expected 32 states and a whole number of words")]
    StreamBytes {
        /// Length of the stream.
        found: usize,
    },
    /// The words ran out before the tile was complete.
    #[error("words ran out after {decoded} symbols of each plane")]
    OutOfWords {
        /// Symbols of each plane decoded up to the last whole step.
        decoded: usize,
    },
    /// Unused bits behind the lane states are not zero.
    #[error("unused bits behind the lane states are not zero")]
    StatesPadding,
    /// All symbols are there, and words are left.
    #[error("{found} words left over, expected none")]
    WordsLeft {
        /// How many.
        found: usize,
    },
    /// A lane does not end at the lower bound.
    #[error("lane {lane} ends at {found:#x}, expected 0x1 in the high half")]
    FinalState {
        /// The lane.
        lane: usize,
        /// Its final state.
        found: u32,
    },
    /// The unused part of the final states is not zero.
    #[error("final states carry symbols beyond the end of the tile")]
    TailPadding,
    /// Encoding: a symbol the frequencies do not know, so the data are not
    /// those the histogram was taken of.
    #[error("symbol {symbol:#04x} has no frequency: the data changed after they were counted")]
    UnknownSymbol {
        /// The symbol.
        symbol: u8,
    },
}

/// A frequency table is not valid (spec section 5.2).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// The header ends inside the table.
    #[error("frequency table is cut off")]
    Truncated,
    /// `table_bits` out of range.
    #[error("table_bits is {found}, expected 1 to 15")]
    TableBits {
        /// The value.
        found: u32,
    },
    /// Order of the Exp-Golomb code out of range.
    #[error("Exp-Golomb order is {found}, expected at most 12")]
    GolombOrder {
        /// The value.
        found: u32,
    },
    /// First symbol after the last, or one of the two has no frequency.
    #[error(
        "symbols {first} to {last}: expected an ascending range that begins and ends with a frequency above 0"
    )]
    SymbolRange {
        /// First symbol.
        first: u8,
        /// Last symbol.
        last: u8,
    },
    /// A frequency too long to be one.
    #[error("a frequency is longer than 16 bits")]
    Frequency,
    /// Frequencies do not sum to `1 << table_bits`.
    #[error("frequencies sum to {found}, expected {expected}")]
    Sum {
        /// The sum, or the first partial sum beyond the expected one.
        found: u32,
        /// `1 << table_bits`.
        expected: u32,
    },
    /// Unused bits of the last byte are not zero.
    #[error("unused bits after the frequency table are not zero")]
    Padding,
}

/// The bytes are not a valid record or packed file, or not one this build can read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    // === Record header ======================================================
    /// The record does not start with the magic number (spec section 3.1).
    #[error("not a transom record: magic is {found:02x?}, expected {expected:02x?}")]
    WrongMagic {
        /// First bytes found.
        found: [u8; 4],
        /// The magic number.
        expected: [u8; 4],
    },
    /// A major version this build cannot read (spec section 3.2).
    #[error("format version {found}, this build reads version {expected}")]
    Version {
        /// Major version found.
        found: u8,
        /// Major version of this build.
        expected: u8,
    },
    /// The record is shorter than its header says, or than any header.
    #[error("record of {found} bytes, its header needs {expected}")]
    RecordTruncated {
        /// Bytes of the record.
        found: u64,
        /// Bytes needed.
        expected: u64,
    },
    /// Header and tiles do not add up to the record.
    #[error("record of {found} bytes, header and tiles take {expected}")]
    RecordBytes {
        /// Bytes of the record.
        found: u64,
        /// Sum of header and tiles.
        expected: u64,
    },
    /// The checksum of header and directory is wrong.
    #[error("header checksum is {found:#018x}, expected {expected:#018x}")]
    HeaderChecksum {
        /// Computed from the bytes.
        found: u64,
        /// Stored in the header.
        expected: u64,
    },
    /// No dtype has this code.
    #[error("dtype code {found}, expected at most {expected}")]
    Dtype {
        /// The code.
        found: u8,
        /// The highest legal code.
        expected: u8,
    },
    /// A plane is marked as coded that this dtype does not have or never codes.
    #[error("coded planes {found:#04x} are not possible for {dtype}")]
    CodedPlanes {
        /// The bit set.
        found: u8,
        /// Name of the dtype.
        dtype: &'static str,
    },
    /// The shape is cut off, not canonical or too large.
    #[error("shape is cut off, not in its shortest form, or has more than 2^48 elements")]
    Shape,
    /// A frequency table is not valid.
    #[error("plane {plane}: {source}")]
    Table {
        /// The plane.
        plane: usize,
        /// What is wrong with it.
        source: TableError,
    },
    /// The header is not of the length its fields give.
    #[error("header of {found} bytes, its fields take {expected}")]
    HeaderBytes {
        /// The length stored.
        found: u64,
        /// The length computed.
        expected: u64,
    },

    // === Tiles ==============================================================
    /// A tile takes more bytes than its elements, or fewer than its raw planes.
    #[error("tile {tile}: {found} bytes, expected {min} to {max}")]
    TileBytes {
        /// The tile.
        tile: usize,
        /// The length stored.
        found: usize,
        /// Shortest possible.
        min: usize,
        /// Longest possible.
        max: usize,
    },
    /// The checksum of a tile is wrong.
    #[error("tile {tile}: checksum is {found:#018x}, expected {expected:#018x}")]
    TileChecksum {
        /// The tile.
        tile: usize,
        /// Computed from the bytes.
        found: u64,
        /// Stored in the directory.
        expected: u64,
    },
    /// An integer weight stands for a number that FP16 cannot hold.
    #[error("weight in row {row}, column {col}: integer times scale overflows FP16")]
    Overflow {
        /// Its row.
        row: usize,
        /// Its column.
        col: usize,
    },
    /// A tile does not decode.
    #[error("tile {tile}: {source}")]
    Tile {
        /// The tile.
        tile: usize,
        /// What is wrong with it.
        source: TileError,
    },
    /// The decoded tensor is not the one that was packed.
    #[error("content hash is {found}, expected {expected}")]
    ContentHash {
        /// BLAKE3 of the decoded bytes, in hexadecimal.
        found: String,
        /// BLAKE3 stored, in hexadecimal.
        expected: String,
    },
    /// Rows or columns asked for do not exist or do not start and end where slices may.
    #[error("slice {found}, expected a part of {expected}")]
    Slice {
        /// What was asked for.
        found: String,
        /// What there is.
        expected: String,
    },

    // === Wrapped ============================================================
    /// Reading failed.
    #[error("reading failed: {0}")]
    Io(#[from] io::Error),
    /// Where an error happened: the tensor, added on the way up.
    #[error("tensor `{tensor}`: {source}")]
    InTensor {
        /// The tensor's name.
        tensor: String,
        /// What happened.
        source: Box<DecodeError>,
    },
}

impl DecodeError {
    /// The same error, with the name of the tensor it happened in.
    #[must_use]
    pub fn in_tensor(self, tensor: &str) -> Self {
        Self::InTensor { tensor: tensor.to_owned(), source: Box::new(self) }
    }
}

/// A tensor cannot be encoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The data are not of the length that shape and dtype give.
    #[error("{found} bytes of data, shape {shape:?} of {dtype} takes {expected}")]
    DataBytes {
        /// Bytes given.
        found: u64,
        /// The shape.
        shape: Vec<usize>,
        /// Name of the dtype.
        dtype: &'static str,
        /// Bytes expected, `u64::MAX` if that overflows.
        expected: u64,
    },
    /// A tile does not encode.
    #[error("tile {tile}: {source}")]
    Tile {
        /// The tile.
        tile: usize,
        /// What is wrong with it.
        source: TileError,
    },
    /// Reading the source or writing the record failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// What was encoded in memory does not decode: the source changed meanwhile.
    #[error("{0}")]
    Decode(#[from] DecodeError),
    /// Where an error happened: the tensor, added on the way up.
    #[error("tensor `{tensor}`: {source}")]
    InTensor {
        /// The tensor's name.
        tensor: String,
        /// What happened.
        source: Box<EncodeError>,
    },
}

impl EncodeError {
    /// The same error, with the name of the tensor it happened in.
    #[must_use]
    pub fn in_tensor(self, tensor: &str) -> Self {
        Self::InTensor { tensor: tensor.to_owned(), source: Box::new(self) }
    }
}
