//! Any bytes read as a record: an error or data, the same on every
//! instruction set and through every call, and never a panic.
//!
//! The bytes are tried as they are, and again with sizes and checksums
//! repaired, so that mutations of a valid record get as far as the coder.

use std::io;

use transom::coder::rans::{EncodeTable, encode_with};
use transom::tile::Tiling;
use transom::{DecodeError, Record};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::available_isas;

/// Tensors beyond this are decoded in part only, to keep the fuzzer fast.
const MAX_CONTENT_BYTES: u64 = 1 << 20;
/// Bytes of the header before the shape.
const FIXED_BYTES: usize = 52;
/// Bytes of a directory entry.
const ENTRY_BYTES: usize = 12;

/// See the module.
pub fn check(data: &[u8]) {
    check_record(data);
    if let Some(repaired) = repair(data) {
        check_record(&repaired);
    }
}

/// What `check` does with one record. Returns whether it was decoded.
pub fn check_record(bytes: &[u8]) -> bool {
    let Ok(record) = Record::read(bytes, 0, bytes.len() as u64) else {
        return false;
    };
    if record.header().content_bytes() > MAX_CONTENT_BYTES {
        check_first_tile(&record, bytes);
        return false;
    }
    let isas = available_isas();
    let mut results: Vec<Result<Vec<u8>, String>> = Vec::new();
    for &isa in &isas {
        results.push(record.to_vec(bytes, isa).map_err(|error| describe(&error)));
    }
    for (isa, result) in isas.iter().zip(&results).skip(1) {
        assert_eq!(result.is_ok(), results[0].is_ok(), "{isa:?} against scalar: {results:?}");
    }
    let Ok(expected) = results[0].clone() else {
        return false;
    };
    assert_eq!(expected.len() as u64, record.header().content_bytes());
    for (&isa, result) in isas.iter().zip(&results) {
        assert_eq!(result.as_ref(), Ok(&expected), "{isa:?}");
        // A pattern, so that a byte that is not written shows.
        let mut whole = vec![0xA5; expected.len()];
        record.decode_to_slice_with(bytes, isa, &mut whole).expect("it was decoded before");
        assert_eq!(whole, expected, "{isa:?}: into a slice");
        let (n_rows, n_cols) = record.matrix_sides();
        record.read_slice_with(bytes, isa, 0..n_rows, 0..n_cols, &mut whole).expect("all of it");
        assert_eq!(whole, expected, "{isa:?}: as a slice");
    }
    check_streams(&record, bytes);
    let _ = record.verify_with(bytes, isas[0]);
    true
}

/// A stream that decodes is the one that the encoder writes for its symbols.
fn check_streams(record: &Record, bytes: &[u8]) {
    let header = record.header();
    let tables: Vec<EncodeTable> =
        (0..2).filter_map(|p| header.table(p)).map(EncodeTable::new).collect();
    let tables: Vec<&EncodeTable> = tables.iter().collect();
    for index in (0..header.tiles().len()).filter(|&index| header.is_coded(index)) {
        let tile = header.tiling().tile(index);
        let mut stored = Vec::new();
        record.read_tile(bytes, index, &mut stored).expect("it was read before");
        let mut planes = vec![0xA5; header.raw_tile_bytes(&tile)];
        for isa in available_isas() {
            record.decode_tile_with(isa, index, &stored, &mut planes).expect("it was decoded");
            let coded: Vec<&[u8]> = (planes.chunks(tile.n_elems()).enumerate())
                .filter_map(|(p, plane)| header.table(p).map(|_| plane))
                .collect();
            let mut stream = Vec::new();
            encode_with(isa, &coded, &tables, &mut stream).expect("the symbols have frequencies");
            assert_eq!(stream, stored[..stream.len()], "{isa:?}, tile {index}");
        }
    }
}

fn check_first_tile(record: &Record, bytes: &[u8]) {
    let loads: Vec<_> =
        available_isas().into_iter().map(|isa| record.load_tiles_with(bytes, isa, 0..1)).collect();
    for load in &loads {
        assert_eq!(load.as_ref().ok(), loads[0].as_ref().ok());
    }
    // The sink stops the stream, so that this costs a few tiles at most.
    let mut n_bytes = 0u64;
    let result = record.stream_with(bytes, transom::Isa::best(), |chunk| {
        n_bytes += chunk.len() as u64;
        if n_bytes > MAX_CONTENT_BYTES { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
    });
    assert!(result.is_err() || n_bytes <= MAX_CONTENT_BYTES);
}

fn describe(error: &DecodeError) -> String {
    format!("{error:?}")
}

/// The bytes with the length of the last tile and all checksums made right,
/// as far as that is possible.
#[must_use]
pub fn repair(data: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = data.to_vec();
    let (&fixed, rest) = data.split_first_chunk::<FIXED_BYTES>()?;
    let header_bytes = u32::from_le_bytes(fixed[48..].try_into().ok()?) as usize;
    if header_bytes > data.len() {
        return None;
    }
    let n_tiles = Tiling::of(&take_shape(rest)?)?.n_tiles();
    let directory = header_bytes.checked_sub(n_tiles.checked_mul(ENTRY_BYTES)?)?;
    if directory < FIXED_BYTES {
        return None;
    }
    let mut start = header_bytes;
    for index in 0..n_tiles {
        let entry = directory + index * ENTRY_BYTES;
        let stored = u32::from_le_bytes(bytes[entry..entry + 4].try_into().ok()?) as usize;
        let left = bytes.len().checked_sub(start)?;
        let n_bytes = if index + 1 == n_tiles { left } else { stored.min(left) };
        bytes[entry..entry + 4].copy_from_slice(&u32::try_from(n_bytes).ok()?.to_le_bytes());
        let checksum = xxh3_64(&bytes[start..start + n_bytes]);
        bytes[entry + 4..entry + ENTRY_BYTES].copy_from_slice(&checksum.to_le_bytes());
        start += n_bytes;
    }
    let mut hasher = Xxh3::new();
    hasher.update(&bytes[..8]);
    hasher.update(&bytes[16..header_bytes]);
    let checksum = hasher.digest();
    bytes[8..16].copy_from_slice(&checksum.to_le_bytes());
    Some(bytes)
}

fn take_shape(mut rest: &[u8]) -> Option<Vec<usize>> {
    let n_dims = take_leb128(&mut rest)?;
    if n_dims > rest.len() {
        return None;
    }
    (0..n_dims).map(|_| take_leb128(&mut rest)).collect()
}

fn take_leb128(bytes: &mut &[u8]) -> Option<usize> {
    let mut value = 0;
    for i in 0..9 {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= usize::from(byte & 0x7F) << (7 * i);
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}
