//! What can go wrong in training.

use std::io;
use std::path::{Path, PathBuf};

/// A model cannot be trained or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// An option or a field of the configuration is out of range.
    #[error("`{field}` is {found}, expected {expected}")]
    Field {
        /// Its name.
        field: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A text file does not hold what its name says.
    #[error("{}: {reason}", path.display())]
    Text {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The texts are too short to learn from.
    #[error("{what} have {found} tokens, expected at least {expected}")]
    TooFewTokens {
        /// Which texts.
        what: &'static str,
        /// Tokens there are.
        found: usize,
        /// Tokens needed.
        expected: usize,
    },
    /// The tokenizer cannot be trained, read or used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A state file is damaged or belongs to another run.
    #[error("{}: {reason}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The output directory already holds a run.
    #[error("{}: holds a run already, and it was not asked to go on", path.display())]
    Occupied {
        /// The directory.
        path: PathBuf,
    },
    /// The loss is no number any more.
    #[error("the loss at step {step} is {found}; try a lower learning rate")]
    Diverged {
        /// The step.
        step: usize,
        /// The loss.
        found: f64,
    },
}

/// Adds the path to an error of the system.
pub(crate) trait At<T> {
    /// The same, knowing its path.
    fn at(self, path: &Path) -> Result<T, TrainError>;
}

impl<T> At<T> for Result<T, io::Error> {
    fn at(self, path: &Path) -> Result<T, TrainError> {
        self.map_err(|source| TrainError::Io { path: path.to_owned(), source })
    }
}
