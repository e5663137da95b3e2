//! The header of a safetensors file.
//!
//! A file is eight bytes of header length, the header in JSON, and the data.
//! The header is kept byte for byte, because unpacking has to restore it, and
//! parsed into entries that are proved to cover the data exactly.
//! Source: <https://github.com/huggingface/safetensors#format>.

#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::fmt;
use std::io;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use crate::io::ReadAt;

/// Longest header, in bytes of JSON, as in the reference implementation.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes of the header's length.
pub const PREFIX_BYTES: u64 = 8;
/// Name of the header's entry that is no tensor.
pub const METADATA: &str = "__metadata__";

/// The bytes are not the header of a valid safetensors file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SafetensorsError {
    /// Shorter than its own header.
    #[error("file of {found} bytes, a header needs {expected}")]
    Truncated {
        /// Bytes of the file.
        found: u64,
        /// Bytes needed.
        expected: u64,
    },
    /// The header is longer than any header may be.
    #[error("header of {found} bytes, expected at most {expected}")]
    HeaderTooLarge {
        /// Length the file gives.
        found: u64,
        /// [`MAX_HEADER_BYTES`].
        expected: u64,
    },
    /// The header is not the JSON a header is; duplicate names come here too.
    #[error("header is not valid: {0}")]
    Json(serde_json::Error),
    /// Offsets of a tensor run backwards.
    #[error("tensor `{tensor}`: data from {start} to {end}")]
    Offsets {
        /// Its name.
        tensor: String,
        /// First byte.
        start: u64,
        /// End of its bytes.
        end: u64,
    },
    /// There is a gap before a tensor, or it overlaps the one before.
    #[error("tensor `{tensor}`: data start at {found}, expected {expected}")]
    NotContiguous {
        /// Its name.
        tensor: String,
        /// Where its data start.
        found: u64,
        /// Where the data before end.
        expected: u64,
    },
    /// The data are not as long as the tensors together.
    #[error("{found} bytes of data, tensors take {expected}")]
    DataBytes {
        /// Bytes behind the header.
        found: u64,
        /// Where the last tensor ends.
        expected: u64,
    },
    /// A tensor does not have the bytes its shape takes.
    #[error("tensor `{tensor}`: {found} bytes, {dtype} {shape:?} takes {expected}")]
    TensorBytes {
        /// Its name.
        tensor: String,
        /// Its dtype.
        dtype: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes it has.
        found: u64,
        /// Bytes it should have, or `an impossible number`.
        expected: String,
    },
    /// Reading failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its dtype as the header names it; may be one this build does not know.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// First byte, from the end of the header.
    pub start: u64,
    /// End of its bytes, from the end of the header.
    pub end: u64,
}

impl Entry {
    /// Bytes of the tensor.
    #[must_use]
    pub const fn n_bytes(&self) -> u64 {
        self.end - self.start
    }
}

/// A validated header.
///
/// Invariants: names are unique; entries are in the order of their data and
/// cover it without gaps; a dtype of known width has the bytes its shape takes.
#[derive(Debug, Clone)]
pub struct Header {
    bytes: Vec<u8>,
    metadata: Option<serde_json::Map<String, serde_json::Value>>,
    entries: Vec<Entry>,
}

impl Header {
    /// Reads the header of a file of `file_bytes` bytes.
    ///
    /// # Errors
    ///
    /// A [`SafetensorsError`].
    pub fn read(
        source: &(impl ReadAt + ?Sized),
        file_bytes: u64,
    ) -> Result<Self, SafetensorsError> {
        let mut prefix = [0; PREFIX_BYTES as usize];
        if file_bytes < PREFIX_BYTES {
            return Err(SafetensorsError::Truncated { found: file_bytes, expected: PREFIX_BYTES });
        }
        source.read_exact_at(&mut prefix, 0)?;
        let n_bytes = header_bytes(&prefix)?;
        if file_bytes < n_bytes {
            return Err(SafetensorsError::Truncated { found: file_bytes, expected: n_bytes });
        }
        let mut bytes = vec![0; n_bytes as usize];
        source.read_exact_at(&mut bytes, 0)?;
        Self::parse(bytes, file_bytes)
    }

    /// Parses the header of a file of `file_bytes` bytes: `bytes` is length
    /// and JSON, no more.
    ///
    /// # Errors
    ///
    /// A [`SafetensorsError`].
    pub fn parse(bytes: Vec<u8>, file_bytes: u64) -> Result<Self, SafetensorsError> {
        let header = Self::parse_alone(bytes)?;
        let (found, expected) = (file_bytes, header.file_bytes());
        if found < header.data_start() {
            return Err(SafetensorsError::Truncated { found, expected: header.data_start() });
        }
        if found != expected {
            let data = |n: u64| n - header.data_start();
            return Err(SafetensorsError::DataBytes {
                found: data(found),
                expected: data(expected),
            });
        }
        Ok(header)
    }

    /// Parses the header of a file that is not at hand.
    ///
    /// # Errors
    ///
    /// A [`SafetensorsError`].
    pub fn parse_alone(bytes: Vec<u8>) -> Result<Self, SafetensorsError> {
        let found = bytes.len() as u64;
        let Some(prefix) = bytes.first_chunk::<8>() else {
            return Err(SafetensorsError::Truncated { found, expected: PREFIX_BYTES });
        };
        let expected = header_bytes(prefix)?;
        if found != expected {
            return Err(SafetensorsError::Truncated { found, expected });
        }
        let Fields { metadata, mut entries } =
            serde_json::from_slice(&bytes[PREFIX_BYTES as usize..])
                .map_err(SafetensorsError::Json)?;
        entries.sort_by_key(|entry| (entry.start, entry.end));
        check_entries(&entries)?;
        Ok(Self { bytes, metadata, entries })
    }

    /// Length and JSON, as in the file.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Where the data start in the file.
    #[must_use]
    pub fn data_start(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Bytes of the file.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.data_start().saturating_add(self.entries.last().map_or(0, |entry| entry.end))
    }

    /// The tensors, in the order of their data.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entry `__metadata__`.
    #[must_use]
    pub const fn metadata(&self) -> Option<&serde_json::Map<String, serde_json::Value>> {
        self.metadata.as_ref()
    }
}

/// Bytes of length and JSON together.
fn header_bytes(prefix: &[u8; 8]) -> Result<u64, SafetensorsError> {
    let json_bytes = u64::from_le_bytes(*prefix);
    if json_bytes > MAX_HEADER_BYTES {
        return Err(SafetensorsError::HeaderTooLarge {
            found: json_bytes,
            expected: MAX_HEADER_BYTES,
        });
    }
    Ok(PREFIX_BYTES + json_bytes)
}

fn check_entries(entries: &[Entry]) -> Result<(), SafetensorsError> {
    let mut end = 0;
    for entry in entries {
        let tensor = || entry.name.clone();
        if entry.end < entry.start {
            return Err(SafetensorsError::Offsets {
                tensor: tensor(),
                start: entry.start,
                end: entry.end,
            });
        }
        if entry.start != end {
            return Err(SafetensorsError::NotContiguous {
                tensor: tensor(),
                found: entry.start,
                expected: end,
            });
        }
        end = entry.end;
        let n_elems =
            entry.shape.iter().try_fold(1u64, |n, &dim| n.checked_mul(u64::try_from(dim).ok()?));
        let n_bits = match (n_elems, bits(&entry.dtype)) {
            (Some(n), Some(bits)) => n.checked_mul(bits),
            (Some(_), None) => continue,
            (None, _) => None,
        };
        if n_bits.is_none() || n_bits != entry.n_bytes().checked_mul(8) {
            return Err(SafetensorsError::TensorBytes {
                tensor: tensor(),
                dtype: entry.dtype.clone(),
                shape: entry.shape.clone(),
                found: entry.n_bytes(),
                expected: n_bits
                    .map_or("an impossible number".to_owned(), |n| format!("{}", n as f64 / 8.0)),
            });
        }
    }
    Ok(())
}

/// Bits of an element, of the dtypes whose width is known.
fn bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ"
        | "F8_E5M2FNUZ" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

struct Fields {
    metadata: Option<serde_json::Map<String, serde_json::Value>>,
    entries: Vec<Entry>,
}

#[derive(serde::Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldsVisitor)
    }
}

/// Reads the entries one by one: a map would keep the last of two equal names.
struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let mut fields = Fields { metadata: None, entries: Vec::new() };
        let mut names = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !names.insert(name.clone()) {
                return Err(A::Error::custom(format!("duplicate name `{name}`")));
            }
            if name == METADATA {
                fields.metadata = map.next_value()?;
                continue;
            }
            let Info { dtype, shape, data_offsets: [start, end] } = map.next_value()?;
            fields.entries.push(Entry { name, dtype, shape, start, end });
        }
        Ok(fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str, data_bytes: u64) -> Result<Header, SafetensorsError> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.as_bytes());
        let file_bytes = bytes.len() as u64 + data_bytes;
        Header::parse(bytes, file_bytes)
    }

    #[test]
    fn entries_come_in_the_order_of_their_data() {
        let header = parse(
            r#"{"b":{"dtype":"BF16","shape":[2],"data_offsets":[4,8]},
                "__metadata__":{"format":"pt"},
                "a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}   "#,
            8,
        )
        .unwrap();
        let names: Vec<_> = header.entries().iter().map(|e| e.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(header.metadata().unwrap()["format"], "pt");
    }

    #[test]
    fn metadata_may_be_null() {
        assert!(parse(r#"{"__metadata__":null}"#, 0).unwrap().metadata().is_none());
    }

    #[test]
    fn invalid_headers_are_refused_each_for_its_reason() {
        use SafetensorsError as E;
        let one = |dtype: &str, shape: &str, start: u64, end: u64| {
            format!(
                r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}}}"#
            )
        };
        assert!(matches!(parse("[]", 0), Err(E::Json(_))));
        assert!(matches!(parse(&one("U8", "[4]", 1, 5), 5), Err(E::NotContiguous { .. })));
        assert!(matches!(
            parse(&one("U8", "[4]", 4, 0), 4),
            Err(E::NotContiguous { .. } | E::Offsets { .. })
        ));
        assert!(matches!(parse(&one("U8", "[4]", 0, 4), 5), Err(E::DataBytes { .. })));
        assert!(matches!(parse(&one("U8", "[4]", 0, 9), 4), Err(E::TensorBytes { .. })));
        assert!(matches!(parse(&one("BF16", "[4]", 0, 4), 4), Err(E::TensorBytes { .. })));
        assert!(matches!(
            parse(&one("F32", "[4294967296,4294967296,4]", 0, 4), 4),
            Err(E::TensorBytes { .. })
        ));
        // More bits than a u64 counts, on both sides.
        let many = 1 << 62;
        let error = parse(&one("F64", "[4611686018427387904,8]", 0, many), many);
        assert!(matches!(error, Err(E::TensorBytes { .. })));
        assert!(parse(&one("NEW_TYPE", "[3]", 0, 4), 4).is_ok());
        let twice = r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#;
        let error = parse(twice, 0).unwrap_err().to_string();
        assert!(error.contains("duplicate name `a`"), "{error}");
        let mut large = (MAX_HEADER_BYTES + 1).to_le_bytes().to_vec();
        large.push(b'{');
        assert!(matches!(Header::parse(large, u64::MAX), Err(E::HeaderTooLarge { .. })));
        assert!(matches!(Header::parse(vec![1], 1), Err(E::Truncated { .. })));
    }
}
