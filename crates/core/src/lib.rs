//! Lossless entropy coding of language-model weights.
//!
//! A tensor's elements are split into byte planes ([`split`]), the planes worth
//! it are entropy-coded tile by tile ([`coder`], with the frequencies of
//! [`model`]), and the result is a self-describing [`Record`]. Weights come
//! back bit for bit. The format is specified in `docs/format.md`.
//!
//! Every operation that has vector implementations takes an [`Isa`]; all give
//! the same bytes.

mod arch;
mod bits;
pub mod checkpoint;
pub mod coder;
mod dtype;
mod error;
mod io;
mod isa;
pub mod layout;
pub mod model;
pub mod product;
pub mod quantize;
pub mod record;
pub mod safetensors;
pub mod split;
#[cfg(test)]
mod tests;
pub mod tile;

pub use checkpoint::{Checkpoint, CheckpointError};
pub use dtype::Dtype;
pub use error::{DecodeError, EncodeError, TableError, TileError};
pub use io::ReadAt;
pub use isa::Isa;
pub use record::{
    Record, RecordHeader, RecordPlace, RecordWriter, TensorStatistics, encode_record,
};
