//! One packed tensor: header, directory, tiles. (Spec section 3.)

#![forbid(unsafe_code)]

mod header;
mod read;
pub(crate) mod strips;
mod write;

pub use header::{MAGIC, RecordHeader, TileEntry, VERSION_MAJOR, VERSION_MINOR};
pub use read::{Record, RecordPlace};
pub use write::{RecordWriter, TensorStatistics, encode_record};
