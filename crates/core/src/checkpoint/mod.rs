//! Safetensors files and Hugging Face checkpoint directories <-> packed ones.
//! (Spec section 8.)
//!
//! A packed checkpoint is the same kind of thing as its source: a safetensors
//! file, or a directory of them with everything else beside, that the usual
//! tools can list and store. [`unpack()`] restores every file byte for byte.

#![forbid(unsafe_code)]

mod directory;
mod error;
mod file;
mod inspect;
mod manifest;
mod open;
mod pack;
mod quantize;
mod trailer;
mod unpack;
mod verify;

pub use error::CheckpointError;
pub use inspect::{Inspection, TensorInspection, inspect};
pub use manifest::is_packed_directory;
pub use open::{Checkpoint, Tensor, TensorInfo, TensorKind};
pub use pack::{PackReport, pack};
pub use quantize::{
    QuantizeOptions, QuantizeReport, QuantizedTensor, SCALE_SUFFIX, is_default, quantize,
};
pub use trailer::TRAILER_NAME;
pub use unpack::{UnpackReport, unpack};
pub use verify::{Difference, VerifyReport, verify};

use crate::isa::Isa;

/// How to go about packing, unpacking or verifying.
#[derive(Debug, Clone)]
pub struct Options {
    /// Threads; all processors by default.
    pub threads: usize,
    /// Instruction set.
    pub isa: Isa,
    /// Overwrite what is at the destination.
    pub force: bool,
    /// `(i, n)`: pack only the files whose number is `i` modulo `n`.
    pub shard: Option<(usize, usize)>,
}

impl Default for Options {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { threads, isa: Isa::best(), force: false, shard: None }
    }
}

impl Options {
    /// Runs `work` on a pool of its own.
    fn install<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, CheckpointError> + Send,
    ) -> Result<T, CheckpointError> {
        rayon::ThreadPoolBuilder::new().num_threads(self.threads).build()?.install(work)
    }
}

/// Told how far long work is. All calls may come from any thread.
pub trait Progress: Sync {
    /// The work will come to `total_bytes`.
    fn start(&self, total_bytes: u64);
    /// `n_bytes` more are done.
    fn advance(&self, n_bytes: u64);
}

/// Nobody is watching.
impl Progress for () {
    fn start(&self, _: u64) {}
    fn advance(&self, _: u64) {}
}
