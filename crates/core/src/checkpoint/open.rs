//! A checkpoint to read tensors from, original or packed alike.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use super::directory::{INDEX_NAME, JOB_NAME, Kind, list};
use super::error::{At, CheckpointError};
use super::file::{self, PackedFile};
use super::manifest::{Manifest, is_packed_directory};
use crate::record::Record;
use crate::safetensors::Header;

/// What a checkpoint says of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its dtype in the original file.
    pub dtype: String,
    /// Its shape in the original file.
    pub shape: Vec<usize>,
    /// Bytes in the original file.
    pub original_bytes: u64,
    /// Bytes in this file.
    pub stored_bytes: u64,
    /// The file it is in.
    pub path: PathBuf,
    /// Where in the file it starts.
    start: u64,
    file: usize,
    packed: bool,
}

/// How a tensor is stored.
#[derive(Debug, Clone)]
pub enum TensorKind {
    /// As its elements.
    Dense,
    /// As a record.
    Packed(Box<Record>),
}

/// A tensor, ready to be read.
#[derive(Debug)]
pub struct Tensor<'a> {
    /// What the checkpoint says of it.
    pub info: &'a TensorInfo,
    /// How it is stored.
    pub kind: TensorKind,
    source: &'a File,
}

impl TensorInfo {
    /// Where in the file the tensor starts.
    #[must_use]
    pub const fn start(&self) -> u64 {
        self.start
    }
}

impl Tensor<'_> {
    /// The file.
    #[must_use]
    pub const fn source(&self) -> &File {
        self.source
    }

    /// Where in the file the tensor starts.
    #[must_use]
    pub const fn start(&self) -> u64 {
        self.info.start
    }
}

/// An opened checkpoint. Headers are read and checked, data are not.
#[derive(Debug)]
pub struct Checkpoint {
    root: PathBuf,
    files: Vec<File>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    manifest: Option<Manifest>,
    packed: bool,
}

impl Checkpoint {
    /// Opens a safetensors file, or a directory of them.
    ///
    /// In a directory with `model.safetensors.index.json` the files it names
    /// count, otherwise all safetensors files that lie directly in it.
    ///
    /// # Errors
    ///
    /// [`CheckpointError`] if there is none, or one is not valid.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let mut checkpoint = Self {
            root: path.to_owned(),
            files: Vec::new(),
            tensors: Vec::new(),
            by_name: HashMap::new(),
            manifest: None,
            packed: false,
        };
        if std::fs::metadata(path).at(path)?.is_file() {
            checkpoint.add(path)?;
            return Ok(checkpoint);
        }
        if is_packed_directory(path) {
            checkpoint.manifest = Some(Manifest::read(path)?);
        }
        for shard in shards(path)? {
            checkpoint.add(&path.join(shard))?;
        }
        Ok(checkpoint)
    }

    fn add(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let (opened, header) = file::open(path)?;
        if file::is_packed(path, &opened, &header)? {
            let packed = PackedFile::new(path, opened, header)?;
            self.packed = true;
            let start = packed.packed.data_start();
            for (original, entry) in packed.tensors() {
                let info = self.info(path, original, entry.n_bytes(), start + entry.start, true);
                self.insert(info)?;
            }
            self.files.push(packed.file);
        } else {
            self.add_dense(path, &header)?;
            self.files.push(opened);
        }
        Ok(())
    }

    fn add_dense(&mut self, path: &Path, header: &Header) -> Result<(), CheckpointError> {
        for entry in header.entries() {
            let start = header.data_start() + entry.start;
            let info = self.info(path, entry, entry.n_bytes(), start, false);
            self.insert(info)?;
        }
        Ok(())
    }

    fn info(
        &self,
        path: &Path,
        original: &crate::safetensors::Entry,
        stored_bytes: u64,
        start: u64,
        packed: bool,
    ) -> TensorInfo {
        TensorInfo {
            name: original.name.clone(),
            dtype: original.dtype.clone(),
            shape: original.shape.clone(),
            original_bytes: original.n_bytes(),
            stored_bytes,
            path: path.to_owned(),
            start,
            file: self.files.len(),
            packed,
        }
    }

    fn insert(&mut self, info: TensorInfo) -> Result<(), CheckpointError> {
        if let Some(&index) = self.by_name.get(&info.name) {
            return Err(CheckpointError::DuplicateTensor {
                tensor: info.name,
                first: self.tensors[index].path.clone(),
                second: info.path,
            });
        }
        self.by_name.insert(info.name.clone(), self.tensors.len());
        self.tensors.push(info);
        Ok(())
    }

    /// Where the checkpoint is.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether any of its files is packed.
    #[must_use]
    pub const fn is_packed(&self) -> bool {
        self.packed
    }

    /// The tensors, file after file, in the order of their data.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.tensors.iter()
    }

    /// The file a tensor of this checkpoint is in.
    #[must_use]
    pub fn file(&self, info: &TensorInfo) -> &File {
        &self.files[info.file]
    }

    /// Whether there is a tensor of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// A tensor by name, `Ok(None)` if there is none.
    ///
    /// # Errors
    ///
    /// If the header of its record is not valid.
    pub fn tensor(&self, name: &str) -> Result<Option<Tensor<'_>>, CheckpointError> {
        let Some(&index) = self.by_name.get(name) else { return Ok(None) };
        let info = &self.tensors[index];
        let source = &self.files[info.file];
        let kind = if info.packed {
            let record = Record::read(source, info.start, info.stored_bytes)
                .map_err(|error| error.in_tensor(name))
                .at(&info.path)?;
            TensorKind::Packed(Box::new(record))
        } else {
            TensorKind::Dense
        };
        Ok(Some(Tensor { info, kind, source }))
    }

    /// The original bytes of a file beside the tensors, such as
    /// `config.json`; `Ok(None)` if there is none, or this is a single file.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn file_bytes(&self, name: &str) -> Result<Option<Vec<u8>>, CheckpointError> {
        let rewritten = self.manifest.as_ref().and_then(|manifest| manifest.file(name));
        if let Some(original) = rewritten.and_then(|entry| entry.original.as_ref()) {
            return Ok(Some(original.clone().into_bytes()));
        }
        if !self.root.is_dir() {
            return Ok(None);
        }
        let path = self.root.join(name);
        match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            result => result.map(Some).at(&path),
        }
    }
}

/// The names of the safetensors files that make up the model of a directory.
pub(super) fn shards(root: &Path) -> Result<Vec<String>, CheckpointError> {
    let index = root.join(INDEX_NAME);
    if index.is_file() {
        return indexed_shards(root, &index);
    }
    let shards: Vec<String> = list(root)?
        .into_iter()
        .filter(|item| item.kind == Kind::Packed && !item.name.contains('/'))
        .map(|item| item.name)
        .collect();
    if shards.is_empty() || root.join(JOB_NAME).is_dir() {
        return Err(CheckpointError::NoSafetensors { path: root.to_owned() });
    }
    Ok(shards)
}

fn indexed_shards(root: &Path, index: &Path) -> Result<Vec<String>, CheckpointError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let bytes = std::fs::read(index).at(index)?;
    let Index { weight_map } = serde_json::from_slice(&bytes)
        .map_err(|_| CheckpointError::Index { index: index.to_owned() })?;
    let mut shards: Vec<String> = weight_map.into_values().collect();
    shards.sort();
    shards.dedup();
    for shard in &shards {
        let path = super::directory::resolve(root, shard);
        if path.is_none_or(|path| !path.is_file()) {
            let (index, shard) = (index.to_owned(), shard.clone());
            return Err(CheckpointError::MissingShard { index, shard });
        }
    }
    Ok(shards)
}
