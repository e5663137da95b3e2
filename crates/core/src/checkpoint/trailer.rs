//! The last tensor of a packed file, `__transom__`: what unpacking needs beside
//! the records. (Spec section 8.1.)
//!
//! ```text
//!   0  Magic                  4 bytes  "TRSF"
//!   4  Version_Major          u8
//!   5  Version_Minor          u8
//!   6  Method                 u8       0: header stored, 1: zlib
//!   7  Reserved               u8       0
//!   8  Checksum               u64      xxh3-64 of all other bytes of the tensor
//!  16  Original_Header_Bytes  u64      length prefix included
//!  24  Original_Header_Hash   32 bytes BLAKE3
//!  56  Packed_Header_Hash     32 bytes BLAKE3, padding included
//!  88  Original_Header
//! ```

use std::io::{Read, Write};
use std::path::Path;

use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use xxhash_rust::xxh3::Xxh3;

use super::error::{CheckpointError, damaged};
use crate::record::{VERSION_MAJOR, VERSION_MINOR};
use crate::safetensors::{MAX_HEADER_BYTES, PREFIX_BYTES};

/// Name of the tensor.
pub const TRAILER_NAME: &str = "__transom__";

const MAGIC: [u8; 4] = *b"TRSF";
const FIXED_BYTES: usize = 88;
/// Longest trailer: one that stores the longest header.
pub(super) const MAX_BYTES: u64 = FIXED_BYTES as u64 + PREFIX_BYTES + MAX_HEADER_BYTES;
const STORED: u8 = 0;
const ZLIB: u8 = 1;
/// A compressed header is at most this many times as long as the packed one,
/// so that a small file cannot ask for much memory.
const MAX_EXPANSION: u64 = 4;

/// The trailer before the packed header is known. Its length is final.
pub(super) struct Trailer {
    method: u8,
    stored: Vec<u8>,
    original_bytes: u64,
    original_hash: blake3::Hash,
}

impl Trailer {
    /// `packed_bytes` is the length of the packed file's header.
    pub(super) fn new(original: &[u8], packed_bytes: u64) -> std::io::Result<Self> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(original)?;
        let compressed = encoder.finish()?;
        let small = original.len() as u64 <= MAX_EXPANSION * packed_bytes;
        let (method, stored) = if small && compressed.len() < original.len() {
            (ZLIB, compressed)
        } else {
            (STORED, original.to_vec())
        };
        let original_hash = blake3::hash(original);
        Ok(Self { method, stored, original_bytes: original.len() as u64, original_hash })
    }

    pub(super) fn n_bytes(&self) -> u64 {
        (FIXED_BYTES + self.stored.len()) as u64
    }

    pub(super) fn to_bytes(&self, packed_header: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(FIXED_BYTES + self.stored.len());
        out.extend(MAGIC);
        out.extend([VERSION_MAJOR, VERSION_MINOR, self.method, 0]);
        out.extend([0; 8]);
        out.extend(self.original_bytes.to_le_bytes());
        out.extend(self.original_hash.as_bytes());
        out.extend(blake3::hash(packed_header).as_bytes());
        out.extend(&self.stored);
        let checksum = checksum(&out);
        out[8..16].copy_from_slice(&checksum.to_le_bytes());
        out
    }
}

fn checksum(trailer: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(&trailer[..8]);
    hasher.update(&trailer[16..]);
    hasher.digest()
}

/// Whether these are the first bytes of a trailer.
pub(super) fn is_trailer(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

/// The original header, restored from the trailer of a packed file.
pub(super) fn read(
    path: &Path,
    trailer: &[u8],
    packed_header: &[u8],
) -> Result<Vec<u8>, CheckpointError> {
    let Some((fixed, stored)) = trailer.split_first_chunk::<FIXED_BYTES>() else {
        return Err(damaged(path, "length of the trailer", trailer.len(), "at least 88"));
    };
    if !is_trailer(fixed) {
        return Err(damaged(path, "magic of the trailer", hex(&fixed[..4]), hex(&MAGIC)));
    }
    if fixed[4] != VERSION_MAJOR {
        return Err(damaged(path, "format version", fixed[4], VERSION_MAJOR));
    }
    let expected = u64::from_le_bytes(fixed[8..16].try_into().expect("eight bytes"));
    let found = checksum(trailer);
    if found != expected {
        let show = |checksum| format!("{checksum:#018x}");
        return Err(damaged(path, "checksum of the trailer", show(found), show(expected)));
    }
    if fixed[6] > ZLIB || fixed[7] != 0 {
        let found = format!("{} and {}", fixed[6], fixed[7]);
        return Err(damaged(path, "method and reserved byte", found, "0 or 1 and 0"));
    }
    let packed_hash = blake3::hash(packed_header);
    if packed_hash.as_bytes() != &fixed[56..88] {
        return Err(damaged(path, "hash of the header", packed_hash, hex(&fixed[56..88])));
    }
    let original_bytes = u64::from_le_bytes(fixed[16..24].try_into().expect("eight bytes"));
    let original = match fixed[6] {
        STORED => stored.to_vec(),
        _ => inflate(path, stored, original_bytes, packed_header.len() as u64)?,
    };
    if original.len() as u64 != original_bytes {
        return Err(damaged(path, "length of the original header", original.len(), original_bytes));
    }
    let original_hash = blake3::hash(&original);
    if original_hash.as_bytes() != &fixed[24..56] {
        let expected = hex(&fixed[24..56]);
        return Err(damaged(path, "hash of the original header", original_hash, expected));
    }
    Ok(original)
}

fn inflate(
    path: &Path,
    stored: &[u8],
    original_bytes: u64,
    packed_bytes: u64,
) -> Result<Vec<u8>, CheckpointError> {
    let most = MAX_EXPANSION * packed_bytes;
    if original_bytes > most {
        let expected = format!("at most {most}");
        return Err(damaged(path, "length of the original header", original_bytes, expected));
    }
    let mut original = Vec::new();
    let mut decoder = ZlibDecoder::new(stored).take(original_bytes + 1);
    decoder
        .read_to_end(&mut original)
        .map_err(|error| damaged(path, "compressed original header", error, "zlib data"))?;
    Ok(original)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
