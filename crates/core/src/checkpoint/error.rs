//! What can go wrong with files and directories.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::{DecodeError, EncodeError};
use crate::safetensors::SafetensorsError;

/// A checkpoint cannot be opened, packed, unpacked or verified.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    // === The source =========================================================
    /// There is no safetensors file where one is needed.
    #[error("{}: no safetensors file in this directory", path.display())]
    NoSafetensors {
        /// The directory.
        path: PathBuf,
    },
    /// The index names a shard that is not there.
    #[error("{}: names the shard `{shard}`, which is missing", index.display())]
    MissingShard {
        /// The index.
        index: PathBuf,
        /// The shard.
        shard: String,
    },
    /// The index is not one.
    #[error("{}: expected an object `weight_map` from tensor names to file names", index.display())]
    Index {
        /// The index.
        index: PathBuf,
    },
    /// Two files have a tensor of the same name.
    #[error("tensor `{tensor}` is both in {} and in {}", first.display(), second.display())]
    DuplicateTensor {
        /// Its name.
        tensor: String,
        /// One file.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// A tensor has the name that packed files need.
    #[error("{}: a tensor is called `__transom__`, the name a packed file needs", path.display())]
    NameClash {
        /// The file.
        path: PathBuf,
    },
    /// Packing what is packed already.
    #[error("{}: is packed already", path.display())]
    AlreadyPacked {
        /// The file or directory.
        path: PathBuf,
    },
    /// Unpacking or verifying what is not packed.
    #[error("{}: is not packed", path.display())]
    NotPacked {
        /// The file or directory.
        path: PathBuf,
    },
    /// A file changed while it was read.
    #[error("{}: changed while it was being packed", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },

    /// Quantising what is quantised already.
    #[error("{}: config.json has a quantization_config already", path.display())]
    AlreadyQuantised {
        /// The directory.
        path: PathBuf,
    },
    /// A matrix to be quantised has a scale beside it already.
    #[error("{}: tensor `{tensor}` has the name that a scale needs", path.display())]
    AlreadyScaled {
        /// The directory.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// No linear layer is to be quantised.
    #[error("{}: no linear layer is selected; embeddings and norms are never quantised", path.display())]
    NothingToQuantise {
        /// The directory.
        path: PathBuf,
    },
    /// A weight that no integer with a scale can stand for.
    #[error("{}: tensor `{tensor}`, row {row}, column {col}: weight is {found}, expected at most 65504", path.display())]
    Unquantisable {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Row of the weight.
        row: usize,
        /// Its column.
        col: usize,
        /// The weight.
        found: f32,
    },

    // === The destination ====================================================
    /// The destination holds something.
    #[error("{}: exists already, expected a new or empty directory", path.display())]
    DestinationNotEmpty {
        /// The destination.
        path: PathBuf,
    },
    /// The destination is the source, or inside it, or holds it.
    #[error("{}: is the source or inside it, expected another place", path.display())]
    DestinationInSource {
        /// The destination.
        path: PathBuf,
    },
    /// The destination exists and is not an unfinished job of this source.
    #[error("{}: exists already and is no unfinished job of this source; --force overwrites", path.display())]
    DestinationExists {
        /// The destination.
        path: PathBuf,
    },
    /// `--shard` on a single file, or out of range.
    #[error("shard {index} of {count}: expected an index below the count, and a directory to pack")]
    Shard {
        /// The index.
        index: usize,
        /// The count.
        count: usize,
    },

    // === Packed files =======================================================
    /// The packed file's own bookkeeping is damaged.
    #[error("{}: {what} is {found}, expected {expected}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
        /// What was found.
        found: String,
        /// What was expected.
        expected: String,
    },

    // === Wrapped ============================================================
    /// A header that is not one.
    #[error("{}: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<SafetensorsError>,
    },
    /// A record that does not decode.
    #[error("{}: {source}", path.display())]
    Decode {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: DecodeError,
    },
    /// A tensor that does not encode.
    #[error("{}: {source}", path.display())]
    Encode {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: EncodeError,
    },
    /// Reading or writing failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Threads could not be started.
    #[error("starting threads: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

/// Adds the path to errors on the way up.
pub(super) trait At<T> {
    fn at(self, path: &Path) -> Result<T, CheckpointError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, path: &Path) -> Result<T, CheckpointError> {
        self.map_err(|source| CheckpointError::Io { path: path.to_owned(), source })
    }
}

impl<T> At<T> for Result<T, SafetensorsError> {
    fn at(self, path: &Path) -> Result<T, CheckpointError> {
        self.map_err(|source| CheckpointError::Safetensors {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }
}

impl<T> At<T> for Result<T, DecodeError> {
    fn at(self, path: &Path) -> Result<T, CheckpointError> {
        self.map_err(|source| CheckpointError::Decode { path: path.to_owned(), source })
    }
}

impl<T> At<T> for Result<T, EncodeError> {
    fn at(self, path: &Path) -> Result<T, CheckpointError> {
        self.map_err(|source| match source {
            EncodeError::Tile { source: crate::TileError::UnknownSymbol { .. }, .. } => {
                CheckpointError::Changed { path: path.to_owned() }
            }
            source => CheckpointError::Encode { path: path.to_owned(), source },
        })
    }
}

pub(super) fn damaged(
    path: &Path,
    what: &'static str,
    found: impl ToString,
    expected: impl ToString,
) -> CheckpointError {
    CheckpointError::Damaged {
        path: path.to_owned(),
        what,
        found: found.to_string(),
        expected: expected.to_string(),
    }
}
