//! Packing a file or a directory.
//!
//! A directory is a job: its notes lie in `.transom-job` inside the
//! destination until everything is there. `source.json` says which source the
//! job belongs to, `done/` what has been packed, `lock` is held by whoever
//! finishes. So a killed job goes on where it was, and several processes can
//! share one.

use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::directory::{Item, JOB_NAME, Kind, list};
use super::error::{At, CheckpointError};
use super::file::{FileSummary, open, pack_file, write_file};
use super::manifest::{FileEntry, MANIFEST_NAME, Manifest, is_packed_directory, plain_entry};
use super::unpack::copy;
use super::{Options, Progress};

/// What packing did.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PackReport {
    /// Bytes of all original files this call knows the packed size of.
    pub original_bytes: u64,
    /// Bytes of the same files as packed.
    pub packed_bytes: u64,
    /// Files packed by this call.
    pub files_packed: usize,
    /// Files found packed already.
    pub files_resumed: usize,
    /// Whether the checkpoint is complete, or other processes still have to do their part.
    pub complete: bool,
}

/// Packs a safetensors file or a checkpoint directory.
///
/// # Errors
///
/// [`CheckpointError`]. Nothing that looks whole is left behind; a directory's
/// finished files stay, and the same call goes on from there.
///
/// # Cost
///
/// Reads the source twice. Memory does not grow with the checkpoint: under
/// 512 MiB in all.
pub fn pack(
    source: &Path,
    target: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<PackReport, CheckpointError> {
    check_apart(source, target)?;
    let metadata = std::fs::metadata(source).at(source)?;
    if metadata.is_dir() {
        check_not_around(source, target)?;
        return options.install(|| pack_directory(source, target, options, progress));
    }
    if let Some((index, count)) = options.shard {
        return Err(CheckpointError::Shard { index, count });
    }
    if target.exists() && (!options.force || target.is_dir()) {
        return Err(CheckpointError::DestinationExists { path: target.to_owned() });
    }
    progress.start(metadata.len());
    let scratch = parent(target);
    let summary = options.install(|| pack_file(source, target, &scratch, options, progress))?;
    Ok(PackReport {
        original_bytes: summary.bytes,
        packed_bytes: summary.packed_bytes,
        files_packed: 1,
        files_resumed: 0,
        complete: true,
    })
}

pub(super) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Refuses a destination that is the source or lies inside it.
pub(super) fn check_apart(source: &Path, target: &Path) -> Result<(), CheckpointError> {
    let source = source.canonicalize().at(source)?;
    if resolve_target(target)?.starts_with(&source) {
        return Err(CheckpointError::DestinationInSource { path: target.to_owned() });
    }
    Ok(())
}

/// Refuses a destination that holds the source: overwriting an earlier job
/// there might remove it.
fn check_not_around(source: &Path, target: &Path) -> Result<(), CheckpointError> {
    if source.canonicalize().at(source)?.starts_with(resolve_target(target)?) {
        return Err(CheckpointError::DestinationInSource { path: target.to_owned() });
    }
    Ok(())
}

/// Where a destination will be. It need not exist, and after a part that does
/// not, `..` may lead back to one that does.
fn resolve_target(target: &Path) -> Result<PathBuf, CheckpointError> {
    let mut resolved = PathBuf::new();
    for component in std::path::absolute(target).at(target)?.components() {
        match component {
            Component::ParentDir => {
                resolved.pop();
            }
            component => resolved.push(component),
        }
        if let Ok(path) = resolved.canonicalize() {
            resolved = path;
        }
    }
    Ok(resolved)
}

// ---------------------------------------------------------------------------
// Directories

/// What identifies a source, so that a job is not mixed from two.
#[derive(Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Identity {
    files: Vec<FileIdentity>,
}

#[derive(Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct FileIdentity {
    name: String,
    bytes: u64,
    /// Nanoseconds since 1970.
    modified: u128,
    /// BLAKE3 of a safetensors header, empty for other files.
    header_blake3: String,
}

impl Identity {
    fn of(root: &Path, items: &[Item]) -> Result<Self, CheckpointError> {
        let files = items.iter().map(|item| {
            let path = root.join(&item.name);
            let metadata = std::fs::metadata(&path).at(&path)?;
            let modified = metadata.modified().at(&path)?;
            let header_blake3 = match item.kind {
                Kind::Packed => {
                    let (file, header) = open(&path)?;
                    if super::file::is_packed(&path, &file, &header)? {
                        return Err(CheckpointError::AlreadyPacked { path });
                    }
                    blake3::hash(header.bytes()).to_hex().to_string()
                }
                _ => String::new(),
            };
            Ok(FileIdentity {
                name: item.name.clone(),
                bytes: metadata.len(),
                modified: modified.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos()),
                header_blake3,
            })
        });
        Ok(Self { files: files.collect::<Result<_, CheckpointError>>()? })
    }
}

struct Job<'a> {
    source: &'a Path,
    target: &'a Path,
    notes: PathBuf,
    items: Vec<Item>,
    options: &'a Options,
}

fn pack_directory(
    source: &Path,
    target: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<PackReport, CheckpointError> {
    if is_packed_directory(source) {
        return Err(CheckpointError::AlreadyPacked { path: source.to_owned() });
    }
    let items = list(source)?;
    // Also finds an index that names a missing file, and tensors with one name.
    super::open::Checkpoint::open(source)?;
    if let Some(clash) = items.iter().find(|item| item.name == MANIFEST_NAME) {
        return Err(CheckpointError::NameClash { path: source.join(&clash.name) });
    }
    if let Some((index, count)) = options.shard
        && index >= count
    {
        return Err(CheckpointError::Shard { index, count });
    }
    let identity = Identity::of(source, &items)?;
    let job = Job { source, target, notes: target.join(JOB_NAME), items, options };
    let lock = job.begin(&identity)?;
    drop(lock);
    let (files_packed, files_resumed) = job.pack_shards(&identity, progress)?;
    job.end(&identity, files_packed, files_resumed)
}

impl Job<'_> {
    /// Joins the job in the destination, or starts one.
    fn begin(&self, identity: &Identity) -> Result<File, CheckpointError> {
        let exists = || CheckpointError::DestinationExists { path: self.target.to_owned() };
        if self.target.exists() && !self.target.is_dir() {
            return Err(exists());
        }
        let found = self.found()?;
        let is_ours = found.as_ref() == Some(identity);
        if !is_ours && (found.is_some() || !self.is_empty()?) {
            if !self.options.force {
                return Err(exists());
            }
            self.clear()?;
        }
        std::fs::create_dir_all(self.notes.join("done")).at(&self.notes)?;
        let lock = self.lock()?;
        // Another process may have been faster.
        match self.found()? {
            Some(found) if found != *identity => return Err(exists()),
            Some(_) => {}
            None => {
                let bytes = serde_json::to_vec_pretty(identity).expect("strings and numbers");
                write_file(&self.notes.join("source.json"), &self.notes, &bytes)?;
            }
        }
        Ok(lock)
    }

    /// Whether the destination holds nothing, or only the notes of a job that
    /// another process is just starting.
    fn is_empty(&self) -> Result<bool, CheckpointError> {
        if !self.target.exists() {
            return Ok(true);
        }
        for entry in std::fs::read_dir(self.target).at(self.target)? {
            if entry.at(self.target)?.file_name() != JOB_NAME {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The source of the job in the destination, if there is a job.
    fn found(&self) -> Result<Option<Identity>, CheckpointError> {
        let path = self.notes.join("source.json");
        match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).at(&path),
            // Notes that cannot be read are those of no job.
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        }
    }

    /// Removes what an earlier job or a finished one wrote; the rest is left alone.
    fn clear(&self) -> Result<(), CheckpointError> {
        let earlier = self.found()?.map(|identity| identity.files).unwrap_or_default();
        let mut names: Vec<String> = earlier.into_iter().map(|file| file.name).collect();
        if let Ok(manifest) = Manifest::read(self.target) {
            names.extend(manifest.files.into_iter().map(|file| file.name));
        }
        let manifest = self.target.join(MANIFEST_NAME);
        let paths = names.iter().filter_map(|name| super::directory::resolve(self.target, name));
        for path in paths.chain([manifest]) {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).at(&path);
                }
                _ => {}
            }
        }
        self.remove_notes()
    }

    /// Another process may remove them too, or be about to: one that has just
    /// made a new lock file finds the job done.
    fn remove_notes(&self) -> Result<(), CheckpointError> {
        use std::io::ErrorKind::{DirectoryNotEmpty, NotFound};
        match std::fs::remove_dir_all(&self.notes) {
            Err(error) if !matches!(error.kind(), NotFound | DirectoryNotEmpty) => {
                Err(error).at(&self.notes)
            }
            _ => Ok(()),
        }
    }

    fn lock(&self) -> Result<File, CheckpointError> {
        let path = self.notes.join("lock");
        let file = File::options().create(true).append(true).open(&path).at(&path)?;
        file.lock().at(&path)?;
        Ok(file)
    }

    fn note(&self, name: &str) -> PathBuf {
        // Names have slashes, file names do not.
        let hash = blake3::hash(name.as_bytes()).to_hex();
        self.notes.join("done").join(format!("{hash}.json"))
    }

    fn done(&self, name: &str) -> Option<FileSummary> {
        let summary: FileSummary =
            serde_json::from_slice(&std::fs::read(self.note(name)).ok()?).ok()?;
        let metadata = std::fs::metadata(self.target.join(name)).ok()?;
        (metadata.len() == summary.packed_bytes).then_some(summary)
    }

    fn pack_shards(
        &self,
        identity: &Identity,
        progress: &dyn Progress,
    ) -> Result<(usize, usize), CheckpointError> {
        let (index, count) = self.options.shard.unwrap_or((0, 1));
        let packed = self.items.iter().zip(&identity.files);
        let packed = packed.filter(|(item, _)| item.kind == Kind::Packed).enumerate();
        let mine: Vec<_> = packed.filter(|(j, _)| j % count == index).map(|(_, f)| f).collect();
        progress.start(mine.iter().map(|(_, file)| file.bytes).sum());
        let (mut files_packed, mut files_resumed) = (0, 0);
        for (item, file) in mine {
            if self.done(&item.name).is_some() {
                files_resumed += 1;
                progress.advance(file.bytes);
                continue;
            }
            let target = self.target.join(&item.name);
            let folder = parent(&target);
            std::fs::create_dir_all(&folder).at(&folder)?;
            let source = self.source.join(&item.name);
            let summary = pack_file(&source, &target, &self.notes, self.options, progress)?;
            let note = serde_json::to_vec(&summary).expect("strings and numbers");
            write_file(&self.note(&item.name), &self.notes, &note)?;
            files_packed += 1;
        }
        Ok((files_packed, files_resumed))
    }

    /// Writes everything else, if all files are packed and nobody else has.
    fn end(
        &self,
        identity: &Identity,
        files_packed: usize,
        files_resumed: usize,
    ) -> Result<PackReport, CheckpointError> {
        let report = |entries: &[FileEntry], complete| PackReport {
            original_bytes: entries.iter().map(|entry| entry.bytes).sum(),
            packed_bytes: entries.iter().map(|entry| entry.packed_bytes).sum(),
            files_packed,
            files_resumed,
            complete,
        };
        let lock = match self.lock() {
            Err(_) if is_packed_directory(self.target) => None,
            lock => Some(lock?),
        };
        if is_packed_directory(self.target) {
            let manifest = Manifest::read(self.target)?;
            // Whoever wrote the manifest may have been killed before this.
            drop(lock);
            self.remove_notes()?;
            return Ok(report(&manifest.files, true));
        }
        let packed = self.items.iter().filter(|item| item.kind == Kind::Packed);
        let summaries: Vec<_> =
            packed.map(|item| self.done(&item.name).map(|summary| (item, summary))).collect();
        let mut entries: Vec<FileEntry> =
            summaries.iter().flatten().map(|(item, summary)| packed_entry(item, summary)).collect();
        if entries.len() < summaries.len() {
            return Ok(report(&entries, false));
        }
        if Identity::of(self.source, &list(self.source)?)? != *identity {
            return Err(CheckpointError::Changed { path: self.source.to_owned() });
        }
        let plain = self.items.iter().filter(|item| item.kind != Kind::Packed);
        for item in plain {
            entries.push(plain_entry(self.source, item)?);
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        let mut manifest = Manifest::new(entries);
        self.write_plain_files(&mut manifest)?;
        write_file(&self.target.join(MANIFEST_NAME), &self.notes, &manifest.to_bytes())?;
        drop(lock);
        self.remove_notes()?;
        Ok(report(&manifest.files, true))
    }

    fn write_plain_files(&self, manifest: &mut Manifest) -> Result<(), CheckpointError> {
        for index in 0..manifest.files.len() {
            let entry = &manifest.files[index];
            let (source, target) = (self.source.join(&entry.name), self.target.join(&entry.name));
            let folder = parent(&target);
            std::fs::create_dir_all(&folder).at(&folder)?;
            match entry.kind {
                Kind::Packed => {}
                Kind::Copied => {
                    if copy(&source, &target, &self.notes)? != entry.blake3 {
                        return Err(CheckpointError::Changed { path: source });
                    }
                }
                Kind::Rewritten => {
                    // It was valid when it was listed.
                    let text = manifest
                        .rewritten(entry)
                        .map_err(|_| CheckpointError::Changed { path: source })?;
                    write_file(&target, &self.notes, text.as_bytes())?;
                    manifest.files[index].packed_bytes = text.len() as u64;
                }
            }
        }
        Ok(())
    }
}

fn packed_entry(item: &Item, summary: &FileSummary) -> FileEntry {
    FileEntry {
        name: item.name.clone(),
        kind: Kind::Packed,
        bytes: summary.bytes,
        blake3: summary.blake3.clone(),
        packed_bytes: summary.packed_bytes,
        packed_data_bytes: summary.packed_data_bytes,
        original: None,
    }
}
