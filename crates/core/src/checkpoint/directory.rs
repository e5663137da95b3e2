//! What is in a checkpoint directory, and what becomes of each file.

use std::path::{Component, Path, PathBuf};

use super::error::{At, CheckpointError};
use super::manifest::MANIFEST_NAME;

/// The model's configuration; gets a `quantization_config`.
pub(super) const CONFIG_NAME: &str = "config.json";
/// The index of a sharded checkpoint; its total size changes.
pub(super) const INDEX_NAME: &str = "model.safetensors.index.json";
/// Where a packing job keeps its notes, inside the destination.
pub(super) const JOB_NAME: &str = ".transom-job";

/// What packing does with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    /// Its tensors become records.
    Packed,
    /// Its JSON is changed; the manifest keeps the original.
    Rewritten,
    /// It is copied.
    Copied,
}

/// A file of the directory, by its path from there, with `/` between the parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) name: String,
    pub(super) kind: Kind,
}

/// All files below a directory, sorted by name. Links are followed, as the
/// caches of hubs consist of them.
pub(super) fn list(root: &Path) -> Result<Vec<Item>, CheckpointError> {
    let mut items = Vec::new();
    list_into(root, "", &mut items)?;
    items.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(items)
}

fn list_into(directory: &Path, prefix: &str, items: &mut Vec<Item>) -> Result<(), CheckpointError> {
    for entry in std::fs::read_dir(directory).at(directory)? {
        let path = entry.at(directory)?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            let error = std::io::Error::other("the name of the file is not UTF-8");
            return Err(error).at(&path);
        };
        let name = format!("{prefix}{name}");
        let metadata = std::fs::metadata(&path).at(&path)?;
        if metadata.is_dir() {
            if name != JOB_NAME {
                list_into(&path, &format!("{name}/"), items)?;
            }
        } else if metadata.is_file() {
            items.push(Item { kind: kind(&path, &name)?, name });
        }
    }
    Ok(())
}

fn kind(path: &Path, name: &str) -> Result<Kind, CheckpointError> {
    if name.ends_with(".safetensors") {
        return Ok(Kind::Packed);
    }
    if name != CONFIG_NAME && name != INDEX_NAME {
        return Ok(Kind::Copied);
    }
    // What is no JSON object cannot be changed as one.
    let bytes = std::fs::read(path).at(path)?;
    let object = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&bytes);
    Ok(if object.is_ok() { Kind::Rewritten } else { Kind::Copied })
}

/// The path of a file named in a manifest, if it stays below the directory.
pub(super) fn resolve(root: &Path, name: &str) -> Option<PathBuf> {
    // What a part means depends on the system: `\\` and `C:` are ordinary names
    // on Unix, and a checkpoint may have such files.
    let plain = |part: &str| {
        let mut components = Path::new(part).components();
        components.next() == Some(Component::Normal(part.as_ref())) && components.next().is_none()
    };
    // On Windows a colon also names a stream of a file.
    let is_safe = name.split('/').all(plain) && !(cfg!(windows) && name.contains(':'));
    (is_safe && name != MANIFEST_NAME).then(|| root.join(name))
}

/// `config.json` as packed: the original with our `quantization_config`, the
/// one it had inside.
pub(super) fn rewrite_config(original: &str) -> serde_json::Result<String> {
    let mut config: serde_json::Map<String, serde_json::Value> = serde_json::from_str(original)?;
    let inner = config.remove("quantization_config").unwrap_or_default();
    let ours = serde_json::json!({
        "quant_method": "transom",
        "version": crate::record::VERSION_MAJOR,
        "inner": inner,
    });
    config.insert("quantization_config".to_owned(), ours);
    Ok(serde_json::to_string_pretty(&config)? + "\n")
}

/// The index as packed: the original with the bytes of the packed tensors.
pub(super) fn rewrite_index(original: &str, packed_data_bytes: u64) -> serde_json::Result<String> {
    let mut index: serde_json::Map<String, serde_json::Value> = serde_json::from_str(original)?;
    if let Some(metadata) = index.get_mut("metadata").and_then(|m| m.as_object_mut()) {
        metadata.insert("total_size".to_owned(), packed_data_bytes.into());
    }
    Ok(serde_json::to_string_pretty(&index)? + "\n")
}
