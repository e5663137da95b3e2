//! `transom.json`: the files of the original directory. (Spec section 8.2.)

use std::path::Path;

use super::directory::{CONFIG_NAME, Item, Kind, rewrite_config, rewrite_index};
use super::error::{At, CheckpointError, damaged};

/// Name of the manifest.
pub(super) const MANIFEST_NAME: &str = "transom.json";
const FORMAT: &str = "transom checkpoint";
const VERSION: u32 = 1;
/// What stands before and after the hash that ends the document.
const HASH_KEY: &str = "  \"blake3\": \"";
const HASH_END: &str = "\"\n}\n";

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileEntry {
    pub(super) name: String,
    pub(super) kind: Kind,
    /// Of the original.
    pub(super) bytes: u64,
    /// Of the original.
    pub(super) blake3: String,
    /// Of the file as packed.
    pub(super) packed_bytes: u64,
    /// Of its tensors as packed; 0 for other files.
    #[serde(default)]
    pub(super) packed_data_bytes: u64,
    /// The original text of a rewritten file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) original: Option<String>,
}

/// All files, sorted by name.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    format: String,
    version: u32,
    pub(super) files: Vec<FileEntry>,
}

impl Manifest {
    pub(super) fn new(files: Vec<FileEntry>) -> Self {
        Self { format: FORMAT.to_owned(), version: VERSION, files }
    }

    /// The document. Its last field is the BLAKE3 of all that stands before it.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let json = serde_json::to_string_pretty(self).expect("strings and numbers");
        let open = json.strip_suffix("\n}").expect("an object over several lines");
        let body = format!("{open},\n");
        let hash = blake3::hash(body.as_bytes()).to_hex();
        format!("{body}{HASH_KEY}{hash}{HASH_END}").into_bytes()
    }

    /// Reads and checks the manifest of a packed directory.
    pub(super) fn read(root: &Path) -> Result<Self, CheckpointError> {
        let path = root.join(MANIFEST_NAME);
        let bytes = std::fs::read(&path).at(&path)?;
        let tail_bytes = HASH_KEY.len() + 64 + HASH_END.len();
        let Some(body_bytes) = bytes.len().checked_sub(tail_bytes) else {
            return Err(damaged(&path, "length", bytes.len(), format!("at least {tail_bytes}")));
        };
        let (body, tail) = bytes.split_at(body_bytes);
        let expected = format!("{HASH_KEY}{}{HASH_END}", blake3::hash(body).to_hex());
        if tail != expected.as_bytes() {
            let found = String::from_utf8_lossy(tail).trim().to_owned();
            return Err(damaged(&path, "hash of the manifest", found, expected.trim()));
        }
        let json = [body.strip_suffix(b",\n").unwrap_or(body), b"\n}"].concat();
        let manifest: Self = serde_json::from_slice(&json)
            .map_err(|error| damaged(&path, "manifest", error, "a list of files"))?;
        if manifest.format != FORMAT || manifest.version != VERSION {
            let found = format!("{} {}", manifest.format, manifest.version);
            return Err(damaged(&path, "format", found, format!("{FORMAT} {VERSION}")));
        }
        Ok(manifest)
    }

    pub(super) fn file(&self, name: &str) -> Option<&FileEntry> {
        self.files.iter().find(|file| file.name == name)
    }

    fn packed_data_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.packed_data_bytes).sum()
    }

    /// What a rewritten file has to look like in the packed directory.
    pub(super) fn rewritten(&self, entry: &FileEntry) -> serde_json::Result<String> {
        let original = entry.original.as_deref().unwrap_or_default();
        if entry.name == CONFIG_NAME {
            rewrite_config(original)
        } else {
            rewrite_index(original, self.packed_data_bytes())
        }
    }
}

/// Whether a directory is a finished packed checkpoint.
#[must_use]
pub fn is_packed_directory(root: &Path) -> bool {
    root.join(MANIFEST_NAME).is_file()
}

/// The entry of a file that is not packed.
pub(super) fn plain_entry(root: &Path, item: &Item) -> Result<FileEntry, CheckpointError> {
    let path = root.join(&item.name);
    let (original, bytes, blake3) = match item.kind {
        Kind::Rewritten => {
            let text = std::fs::read_to_string(&path).at(&path)?;
            let blake3 = blake3::hash(text.as_bytes()).to_hex().to_string();
            let bytes = text.len() as u64;
            (Some(text), bytes, blake3)
        }
        _ => {
            let (bytes, blake3) = hash_file(&path)?;
            (None, bytes, blake3)
        }
    };
    Ok(FileEntry {
        name: item.name.clone(),
        kind: item.kind,
        bytes,
        blake3,
        packed_bytes: bytes,
        packed_data_bytes: 0,
        original,
    })
}

/// Bytes and BLAKE3 of a file of any size.
pub(super) fn hash_file(path: &Path) -> Result<(u64, String), CheckpointError> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(std::fs::File::open(path).at(path)?).at(path)?;
    Ok((hasher.count(), hasher.finalize().to_hex().to_string()))
}
