//! Restoring the original of a packed file or directory, byte for byte.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::directory::{JOB_NAME, Kind, resolve};
use super::error::{At, CheckpointError, damaged};
use super::file::{PackedFile, Partial, unpack_file, write_file};
use super::manifest::{FileEntry, MANIFEST_NAME, Manifest, is_packed_directory};
use super::pack::{check_apart, parent};
use super::{Options, Progress};

/// What unpacking did.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct UnpackReport {
    /// Bytes of all files written.
    pub original_bytes: u64,
    /// Bytes of the same files as packed.
    pub packed_bytes: u64,
    /// Files written.
    pub files: usize,
}

/// Unpacks a packed safetensors file or directory.
///
/// Every tensor and every file is compared with its hash while it is written.
///
/// # Errors
///
/// [`CheckpointError`]. A file that is not whole and right is not left behind.
pub fn unpack(
    source: &Path,
    target: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<UnpackReport, CheckpointError> {
    check_apart(source, target)?;
    let exists = || CheckpointError::DestinationExists { path: target.to_owned() };
    if std::fs::metadata(source).at(source)?.is_file() {
        if target.exists() && (!options.force || target.is_dir()) {
            return Err(exists());
        }
        let packed = PackedFile::open(source)?;
        progress.start(packed.original.file_bytes());
        let summary =
            options.install(|| unpack_file(&packed, target, &parent(target), options, progress))?;
        let (original_bytes, packed_bytes) = (summary.bytes, summary.packed_bytes);
        return Ok(UnpackReport { original_bytes, packed_bytes, files: 1 });
    }
    if !is_packed_directory(source) {
        return Err(CheckpointError::NotPacked { path: source.to_owned() });
    }
    let manifest = Manifest::read(source)?;
    let is_empty = !target.exists()
        || (target.is_dir() && std::fs::read_dir(target).at(target)?.next().is_none());
    if !is_empty && (!options.force || !target.is_dir()) {
        return Err(exists());
    }
    progress.start(manifest.files.iter().map(|file| file.bytes).sum());
    options.install(|| unpack_directory(source, target, &manifest, options, progress))
}

fn unpack_directory(
    source: &Path,
    target: &Path,
    manifest: &Manifest,
    options: &Options,
    progress: &dyn Progress,
) -> Result<UnpackReport, CheckpointError> {
    // Unfinished files lie apart, so that a killed run leaves none that looks whole.
    let scratch = target.join(JOB_NAME);
    std::fs::create_dir_all(&scratch).at(&scratch)?;
    for entry in &manifest.files {
        let (from, to) = (place(source, source, entry)?, place(source, target, entry)?);
        let folder = parent(&to);
        std::fs::create_dir_all(&folder).at(&folder)?;
        let blake3 = match entry.kind {
            Kind::Packed => {
                let packed = PackedFile::open(&from)?;
                unpack_file(&packed, &to, &scratch, options, progress)?.blake3
            }
            Kind::Rewritten => {
                let original = entry.original.as_deref().unwrap_or_default();
                write_file(&to, &scratch, original.as_bytes())?;
                progress.advance(entry.bytes);
                blake3::hash(original.as_bytes()).to_hex().to_string()
            }
            Kind::Copied => {
                let hash = copy(&from, &to, &scratch)?;
                progress.advance(entry.bytes);
                hash
            }
        };
        if blake3 != entry.blake3 {
            let _ = std::fs::remove_file(&to);
            return Err(damaged(&from, "hash of the file", blake3, &entry.blake3));
        }
    }
    std::fs::remove_dir_all(&scratch).at(&scratch)?;
    Ok(UnpackReport {
        original_bytes: manifest.files.iter().map(|file| file.bytes).sum(),
        packed_bytes: manifest.files.iter().map(|file| file.packed_bytes).sum(),
        files: manifest.files.len(),
    })
}

/// Where a file of the manifest lies below `root`.
pub(super) fn place(
    source: &Path,
    root: &Path,
    entry: &FileEntry,
) -> Result<PathBuf, CheckpointError> {
    resolve(root, &entry.name).ok_or_else(|| {
        let manifest = source.join(MANIFEST_NAME);
        damaged(&manifest, "name of a file", &entry.name, "a name inside the directory")
    })
}

/// Copies a file of any size; returns its BLAKE3.
pub(super) fn copy(from: &Path, to: &Path, scratch: &Path) -> Result<String, CheckpointError> {
    let partial = Partial::create(to, scratch)?;
    let mut file = File::open(from).at(from)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = std::io::Read::read(&mut file, &mut buffer).at(from)?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
        std::io::Write::write_all(&mut partial.file(), &buffer[..n]).at(to)?;
    }
    partial.finish()?;
    Ok(hasher.finalize().to_hex().to_string())
}
