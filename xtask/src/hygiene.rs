//! What may be in git: text, small test files and small models; nothing built.

use std::fs;
use std::path::Path;

use crate::Failure;
use crate::command::{Count, Line};

/// Largest file, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// The same of files of a model that ships with the source.
const MAX_MODEL_BYTES: u64 = 8 << 20;
const MODELS: &str = "models";
/// Endings of files that a compiler writes.
const BUILT: [&str; 14] = [
    "a", "bin", "class", "cubin", "dll", "dylib", "exe", "fatbin", "o", "ptx", "pyc", "rlib", "so",
    "wasm",
];
/// First bytes of files that a compiler writes: ELF, PE, Mach-O.
const BUILT_MAGIC: [&[u8]; 3] = [b"\x7FELF", b"MZ\x90\0", b"\xCF\xFA\xED\xFE"];

/// Checks every file in git's index.
pub fn check() -> Result<Count, Failure> {
    let listing = Line::new(&["git", "ls-files", "-z"]).output()?;
    let listing = String::from_utf8_lossy(&listing);
    let paths: Vec<&str> = listing.split_terminator('\0').collect();
    let complaints: Vec<String> = paths
        .iter()
        .filter_map(|path| complaint(Path::new(path)).map(|what| format!("{path}: {what}")))
        .collect();
    println!(
        "{} files, at most {MAX_FILE_BYTES} bytes each, models {MAX_MODEL_BYTES}",
        paths.len()
    );
    if complaints.is_empty() { Ok(Count::default()) } else { Err(complaints.join("\n")) }
}

fn complaint(path: &Path) -> Option<String> {
    // A file that is deleted and not yet committed so.
    let n_bytes = fs::symlink_metadata(path).ok().filter(fs::Metadata::is_file)?.len();
    let limit = if path.starts_with(MODELS) { MAX_MODEL_BYTES } else { MAX_FILE_BYTES };
    if n_bytes > limit {
        return Some(format!("{n_bytes} bytes, expected at most {limit}"));
    }
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    if BUILT.contains(&ending) {
        return Some(format!("ends in .{ending}, which is for built files"));
    }
    let bytes = fs::read(path).ok()?;
    BUILT_MAGIC.iter().any(|magic| bytes.starts_with(magic)).then(|| "is a built file".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_files_are_recognised() {
        let program = std::env::current_exe().unwrap();
        assert!(complaint(&program).is_some(), "a program passes");
        assert_eq!(complaint(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))), None);
    }
}
