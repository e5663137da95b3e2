//! Fixed-rate codes with escapes, for computing from memory.
//!
//! Of each element a few bits say which of the most frequent exponents it has;
//! the rest of the element is stored as it is, and the elements with a rarer
//! exponent are listed. Of an integer the bits say where in a window of
//! consecutive values it lies, and those outside are listed.
//!
//! ```text
//! BF16, 3 bits   per 64 elements: 16 bytes of 2-bit fields, 8 bytes of 1-bit fields
//! BF16, 4 bits   per 64 elements: 32 bytes of 4-bit fields
//! FP16, 3 bits   per 64 elements: 32 bytes of 4-bit fields, 16 bytes of 2-bit fields
//!                (code, then the two mantissa bits of the high byte, then the sign)
//! and a low byte per element
//!
//! INT8, 4 bits   per 64 elements: 32 bytes of 4-bit fields
//! INT8, 5 bits   the same, 8 bytes of 1-bit fields
//! INT8, 6 bits   32 bytes of 4-bit fields, 16 bytes of 2-bit fields
//! INT8, 7 bits   the same, 8 bytes of 1-bit fields
//! ```
//!
//! Elements are cut into bands, which products read from end to end: 16 rows,
//! block after block, in fragment order, a tile in linear order. A band is cut
//! into chunks of 2,048 elements, 16x128 in fragment order: the fields of the
//! chunk, then its low bytes, then the next chunk. So the memory is read as one
//! stream, however many rows and columns there are.

mod coding;
mod matrix;

pub(crate) use coding::{Coding, GROUP, unpack_highs};
pub(crate) use matrix::{Band, FixedMatrix};

/// Elements of a full chunk.
pub(crate) const CHUNK_ELEMS: usize = 2048;
