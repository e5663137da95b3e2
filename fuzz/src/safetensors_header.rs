//! Any bytes read as a safetensors header: an error or entries that cover the
//! file; and whatever the crate `safetensors` accepts, as it reads it.
//!
//! The input is the number of data bytes (8 bytes, little endian), then JSON.

use safetensors::SafeTensors;
use transom::safetensors::Header;

/// No file is longer.
const MAX_FILE_BYTES: u64 = 1 << 60;

/// See the module.
pub fn check(data: &[u8]) {
    let Some((size, json)) = data.split_first_chunk::<8>() else {
        return;
    };
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json);
    let data_bytes = u64::from_le_bytes(*size) % MAX_FILE_BYTES;
    let file_bytes = bytes.len() as u64 + data_bytes;
    // As it is, so that the prefix is arbitrary too.
    let _ = Header::parse(data.to_vec(), file_bytes);
    let _ = Header::read(data, data.len() as u64);
    let oracle = SafeTensors::read_metadata(&bytes);
    match Header::parse(bytes.clone(), file_bytes) {
        Ok(header) => check_header(&header, &bytes, file_bytes),
        Err(error) => {
            if let Ok((_, metadata)) = oracle
                && metadata.data_len() as u64 == data_bytes
            {
                let text = error.to_string();
                // The crate takes the last of two equal names.
                assert!(text.contains("duplicate"), "{text}: {}", String::from_utf8_lossy(json));
            }
        }
    }
}

fn check_header(header: &Header, bytes: &[u8], file_bytes: u64) {
    assert_eq!(header.bytes(), bytes);
    assert_eq!(header.file_bytes(), file_bytes);
    let mut end = 0;
    for entry in header.entries() {
        assert_eq!(entry.start, end, "{entry:?}");
        end += entry.n_bytes();
    }
    assert_eq!(header.data_start() + end, file_bytes);
    if let Ok((_, metadata)) = SafeTensors::read_metadata(bytes) {
        assert_eq!(metadata.tensors().len(), header.entries().len());
        for entry in header.entries() {
            let info = metadata.info(&entry.name).expect("the crate knows the tensor");
            let offsets = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
            assert_eq!((&info.shape, offsets), (&entry.shape, (entry.start, entry.end)));
        }
    }
}
