//! Tensors and side files of a checkpoint directory of plain safetensors.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;
use transom::{ReadAt, Record};

pub(crate) struct Checkpoint {
    dir: PathBuf,
    files: Vec<(PathBuf, File)>,
    tensors: HashMap<String, (usize, u64, TensorInfo)>,
}

pub(crate) struct TensorInfo {
    pub(crate) dtype: String,
    pub(crate) shape: Vec<u64>,
}

pub(crate) enum TensorKind {
    Dense,
    #[allow(dead_code)]
    Packed(Record),
}

pub(crate) struct Tensor<'a> {
    file: &'a (PathBuf, File),
    pub(crate) start: u64,
    pub(crate) info: &'a TensorInfo,
    pub(crate) kind: TensorKind,
}

impl Tensor<'_> {
    pub(crate) fn path(&self) -> &Path {
        &self.file.0
    }
    pub(crate) fn source(&self) -> &File {
        &self.file.1
    }
}

impl Checkpoint {
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        let mut this = Self { dir: dir.to_owned(), files: Vec::new(), tensors: HashMap::new() };
        let mut paths: Vec<PathBuf> = fs::read_dir(dir)?
            .filter_map(|e| Some(e.ok()?.path()))
            .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
            .collect();
        paths.sort();
        for path in paths {
            let file = File::open(&path)?;
            let mut length = [0; 8];
            ReadAt::read_exact_at(&file, &mut length, 0)?;
            let length = u64::from_le_bytes(length);
            let mut header = vec![0; length as usize];
            ReadAt::read_exact_at(&file, &mut header, 8)?;
            let header: serde_json::Map<String, Value> = serde_json::from_slice(&header)?;
            let index = this.files.len();
            for (name, entry) in header.iter().filter(|(name, _)| *name != "__metadata__") {
                let info = TensorInfo {
                    dtype: entry["dtype"].as_str().unwrap_or_default().to_owned(),
                    shape: entry["shape"]
                        .as_array()
                        .into_iter()
                        .flatten()
                        .filter_map(Value::as_u64)
                        .collect(),
                };
                let start = 8 + length + entry["data_offsets"][0].as_u64().unwrap_or_default();
                this.tensors.insert(name.clone(), (index, start, info));
            }
            this.files.push((path, file));
        }
        Ok(this)
    }

    pub(crate) fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let (file, start, info) = self.tensors.get(name)?;
        Some(Tensor { file: &self.files[*file], start: *start, info, kind: TensorKind::Dense })
    }

    pub(crate) fn file_bytes(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match fs::read(self.dir.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}
