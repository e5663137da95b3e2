//! `run --logits`: a safetensors file of token ids and their logits.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::Context as _;

/// Writes `ids` I64 `[t]` and `logits` F32 `[t, vocabulary]`. Row i holds the
/// logits that token i was chosen from.
///
/// # Panics
///
/// If there is not one row of `vocabulary` logits for each id.
pub(crate) fn write(
    path: &Path,
    ids: &[u32],
    logits: &[f32],
    vocabulary: usize,
) -> anyhow::Result<()> {
    assert_eq!(logits.len(), ids.len() * vocabulary, "a row of logits for each id");
    let write = || -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(&header(ids.len(), vocabulary))?;
        for &id in ids {
            file.write_all(&i64::from(id).to_le_bytes())?;
        }
        for logit in logits {
            file.write_all(&logit.to_le_bytes())?;
        }
        file.flush()
    };
    write().with_context(|| path.display().to_string())
}

/// Length and text of the header, padded so that the data are aligned.
fn header(n_ids: usize, vocabulary: usize) -> Vec<u8> {
    let ids_end = n_ids * 8;
    let logits_end = ids_end + n_ids * vocabulary * 4;
    let mut text = serde_json::json!({
        "ids": {"dtype": "I64", "shape": [n_ids], "data_offsets": [0, ids_end]},
        "logits": {
            "dtype": "F32",
            "shape": [n_ids, vocabulary],
            "data_offsets": [ids_end, logits_end],
        },
    })
    .to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_readers_find_what_was_written() {
        let file = tempfile::NamedTempFile::new().unwrap();
        write(file.path(), &[7, 1], &[0.5, -0.0, f32::MAX, 1.0, 2.0, 3.0], 3).unwrap();
        let bytes = std::fs::read(file.path()).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let ids = tensors.tensor("ids").unwrap();
        assert_eq!(ids.data(), [7i64.to_le_bytes(), 1i64.to_le_bytes()].concat());
        let logits = tensors.tensor("logits").unwrap();
        assert_eq!(logits.shape(), [2, 3]);
        assert_eq!(logits.data()[4..8], (-0.0f32).to_le_bytes());
    }
}
