//! Checking every byte of a packed file or directory.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::directory::{JOB_NAME, Kind, list};
use super::error::{At, CheckpointError};
use super::file::PackedFile;
use super::manifest::{FileEntry, Manifest, hash_file, is_packed_directory};
use super::unpack::place;
use super::{Options, Progress};

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Difference {
    /// The file.
    pub file: PathBuf,
    /// What is wrong, with the tensor's name where there is one.
    pub what: String,
}

/// What verifying found.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct VerifyReport {
    /// Files checked.
    pub files: usize,
    /// Tensors decoded and compared with their hashes.
    pub tensors: usize,
    /// Bytes of the originals.
    pub original_bytes: u64,
    /// Everything that is not as it should be.
    pub differences: Vec<Difference>,
}

/// Decodes everything in a packed file or directory and compares it with the
/// hashes taken when it was packed; with `against`, with the original too.
///
/// One bad file does not hide the others: all differences are reported.
///
/// # Errors
///
/// [`CheckpointError`] if the packed checkpoint as a whole cannot be read: no
/// manifest, or one that is damaged; or the original cannot be.
pub fn verify(
    packed: &Path,
    against: Option<&Path>,
    options: &Options,
    progress: &dyn Progress,
) -> Result<VerifyReport, CheckpointError> {
    let mut report =
        VerifyReport { files: 0, tensors: 0, original_bytes: 0, differences: Vec::new() };
    if std::fs::metadata(packed).at(packed)?.is_file() {
        let n_bytes = std::fs::metadata(packed).at(packed)?.len();
        progress.start(n_bytes);
        options.install(|| {
            let file = PackedFile::open(packed)?;
            check_file(packed, Ok(file), None, against, options, progress, &mut report)
        })?;
        return Ok(report);
    }
    if !is_packed_directory(packed) {
        return Err(CheckpointError::NotPacked { path: packed.to_owned() });
    }
    let manifest = Manifest::read(packed)?;
    progress.start(manifest.files.iter().map(|file| file.bytes).sum());
    options.install(|| {
        for entry in &manifest.files {
            let path = place(packed, packed, entry)?;
            let original = against.map(|root| place(packed, root, entry)).transpose()?;
            match entry.kind {
                Kind::Packed => {
                    let file = PackedFile::open(&path);
                    let original = original.as_deref();
                    check_file(&path, file, Some(entry), original, options, progress, &mut report)?;
                }
                Kind::Rewritten | Kind::Copied => {
                    check_plain(&manifest, entry, &path, original.as_deref(), &mut report);
                    progress.advance(entry.bytes);
                }
            }
        }
        if let Some(root) = against {
            let items = list(root)?;
            for item in items.iter().filter(|item| manifest.file(&item.name).is_none()) {
                report.differ(&root.join(&item.name), "is not in the packed one".to_owned());
            }
        }
        Ok(())
    })?;
    if packed.join(JOB_NAME).exists() {
        report.differ(packed, "holds an unfinished job".to_owned());
    }
    Ok(report)
}

impl VerifyReport {
    fn differ(&mut self, file: &Path, what: String) {
        self.differences.push(Difference { file: file.to_owned(), what });
    }

    /// The error without the path, which stands beside it.
    fn differ_by(&mut self, file: &Path, error: &CheckpointError) {
        let what = error.to_string();
        let prefix = format!("{}: ", file.display());
        self.differ(file, what.strip_prefix(&prefix).unwrap_or(&what).to_owned());
    }
}

fn check_file(
    path: &Path,
    packed: Result<PackedFile, CheckpointError>,
    entry: Option<&FileEntry>,
    against: Option<&Path>,
    options: &Options,
    progress: &dyn Progress,
    report: &mut VerifyReport,
) -> Result<(), CheckpointError> {
    report.files += 1;
    let packed = match packed {
        Ok(packed) => packed,
        // Of a single file, that it is none of ours is an error, not a difference.
        Err(error @ CheckpointError::NotPacked { .. }) if entry.is_none() => return Err(error),
        Err(error) => {
            report.differ_by(path, &error);
            return Ok(());
        }
    };
    report.tensors += packed.original.entries().len();
    report.original_bytes += packed.original.file_bytes();
    let original = against.and_then(|path| match File::open(path) {
        Ok(file) => Some(file),
        Err(error) => {
            report.differ(path, error.to_string());
            None
        }
    });
    let mut differs_at = None;
    let mut buffer = Vec::new();
    let result = packed.restore(options.isa, progress, |bytes, at| {
        if let Some(file) = &original
            && differs_at.is_none()
        {
            buffer.resize(bytes.len(), 0);
            let read = crate::io::ReadAt::read_exact_at(file, &mut buffer, at);
            if read.is_err() || buffer != bytes {
                let same = bytes.iter().zip(&buffer).take_while(|(a, b)| a == b).count();
                differs_at = Some(at + if read.is_ok() { same as u64 } else { 0 });
            }
        }
        Ok(())
    });
    match (&result, entry) {
        (Err(error), _) => report.differ_by(path, error),
        (Ok(blake3), Some(entry)) if *blake3 != entry.blake3 => {
            report.differ(path, format!("hash is {blake3}, expected {}", entry.blake3));
        }
        _ => {}
    }
    if let Some(entry) = entry
        && packed.packed.file_bytes() != entry.packed_bytes
    {
        let found = packed.packed.file_bytes();
        report.differ(path, format!("{found} bytes, expected {}", entry.packed_bytes));
    }
    if let (Some(against), Some(file)) = (against, &original) {
        let n_bytes = file.metadata().at(against)?.len();
        if n_bytes != packed.original.file_bytes() {
            let expected = packed.original.file_bytes();
            report.differ(against, format!("{n_bytes} bytes, the packed one has {expected}"));
        } else if let Some(at) = differs_at {
            report.differ(against, format!("differs from the packed one at byte {at}"));
        }
    }
    Ok(())
}

fn check_plain(
    manifest: &Manifest,
    entry: &FileEntry,
    path: &Path,
    against: Option<&Path>,
    report: &mut VerifyReport,
) {
    report.files += 1;
    report.original_bytes += entry.bytes;
    if entry.kind == Kind::Rewritten {
        let found = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) => return report.differ(path, error.to_string()),
        };
        let original = entry.original.as_deref().unwrap_or_default();
        let blake3 = blake3::hash(original.as_bytes()).to_hex().to_string();
        if blake3 != entry.blake3 {
            report.differ(path, format!("original has hash {blake3}, expected {}", entry.blake3));
        }
        if manifest.rewritten(entry).ok().is_none_or(|text| text.as_bytes() != found) {
            report.differ(path, "is not what packing makes of the original".to_owned());
        }
    } else {
        match hash_file(path) {
            Err(error) => report.differ_by(path, &error),
            Ok((_, blake3)) if blake3 != entry.blake3 => {
                report.differ(path, format!("hash is {blake3}, expected {}", entry.blake3));
            }
            Ok(_) => {}
        }
    }
    if let Some(against) = against {
        match hash_file(against) {
            Err(error) => report.differ_by(against, &error),
            Ok((_, blake3)) if blake3 != entry.blake3 => {
                report.differ(against, format!("hash is {blake3}, packed was {}", entry.blake3));
            }
            Ok(_) => {}
        }
    }
}
