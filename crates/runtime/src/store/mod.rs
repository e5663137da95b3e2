//! Where the matrices of a model are: in memory, or in the file they came from.
//!
//! A [`WeightStore`] keeps as many matrices in memory as its budget allows and
//! reads the others for every use, into a few buffers that are used again and
//! again. A matrix in a buffer is as it is in the file: entropy-coded tiles are
//! decoded inside the product, so that reading is all that loading costs.
//!
//! Three rules keep a product from reading anything but its own weights:
//!
//! 1. A matrix owns its memory, and is handed out as a [`Guard`] that holds it
//!    for as long as the product lasts. Taking the buffer back
//!    ([`Matrix::into_buffer`]) needs the matrix itself, which there is no way to
//!    while a guard lives.
//! 2. A guard borrows the store and cannot be copied; no view of the weights
//!    outlives it.
//! 3. A matrix that is read ahead becomes visible when every byte of it is there
//!    and every tile has been checked, and not before.
//!
//! ```compile_fail,E0505
//! # use transom_runtime::{RuntimeError, store::{MatrixId, WeightStore}};
//! # fn example(store: &WeightStore, id: MatrixId, y: &mut [f32]) -> Result<(), RuntimeError> {
//! let guard = store.get(id)?;
//! let weights = &*guard;
//! drop(guard); // The buffer may be filled with another matrix now ...
//! weights.multiply_with(transom::Isa::best(), &[], y).unwrap(); // ... so this does not compile.
//! # Ok(())
//! # }
//! ```

mod plan;
mod reader;
mod source;
mod state;
mod worker;

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, MutexGuard};
use std::thread::JoinHandle;

use transom::Isa;
use transom::layout::{Layout, Matrix};

use crate::config::Config;
use crate::error::RuntimeError;
use crate::tensors;
pub(crate) use plan::{Plan, expected_bytes};
pub(crate) use source::{Readers, Source};
use state::{Place, Shared, State};

/// A matrix of a model: its place in [`matrices`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MatrixId(usize);

impl MatrixId {
    /// Its place in [`matrices`].
    #[must_use]
    pub const fn index(self) -> usize {
        self.0
    }
}

/// Name and sides of a matrix that a configuration calls for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MatrixInfo {
    /// Name of its tensor.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
}

/// The matrices of a model, in the order in which a pass over it uses them:
/// layer after layer, then the head. An embedding that is not the head too
/// comes last: no product reads it.
#[must_use]
pub fn matrices(config: &Config) -> Vec<MatrixInfo> {
    let mut matrices = Vec::new();
    for layer in 0..config.n_layers {
        for (name, rows, cols, _) in tensors::linears(config) {
            let name = tensors::in_layer(layer, &format!("{name}.weight"));
            matrices.push(MatrixInfo { name, rows, cols });
        }
    }
    let (rows, cols) = (config.vocab_size, config.hidden_size);
    if !config.tie_word_embeddings {
        matrices.push(MatrixInfo { name: tensors::HEAD.to_owned(), rows, cols });
    }
    matrices.push(MatrixInfo { name: tensors::EMBEDDING.to_owned(), rows, cols });
    matrices
}

/// Matrices by their part in a model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ids {
    n_layers: usize,
    tied: bool,
}

impl Ids {
    pub(crate) const fn of(config: &Config) -> Self {
        Self { n_layers: config.n_layers, tied: config.tie_word_embeddings }
    }

    /// Matrix `index` of [`tensors::linears`].
    pub(crate) const fn linear(self, layer: usize, index: usize) -> MatrixId {
        MatrixId(layer * 7 + index)
    }

    pub(crate) const fn head(self) -> MatrixId {
        MatrixId(self.n_layers * 7)
    }

    pub(crate) const fn embedding(self) -> MatrixId {
        MatrixId(self.n_layers * 7 + !self.tied as usize)
    }

    /// How many matrices a pass multiplies with.
    const fn cycle(self) -> usize {
        self.n_layers * 7 + 1
    }
}

/// The matrices of a model, wherever they are, and products with them.
pub trait Weights: Send + Sync + fmt::Debug {
    /// `y = x W^T`, as [`Matrix::multiply_with`].
    ///
    /// # Errors
    ///
    /// If the weights cannot be read or do not decode, with the tensor's name.
    fn multiply(&self, matrix: MatrixId, x: &[f32], y: &mut [f32]) -> Result<(), RuntimeError>;

    /// One row of weights, as [`Matrix::row_with`].
    ///
    /// # Errors
    ///
    /// As [`Weights::multiply`].
    fn row(&self, matrix: MatrixId, row: usize, out: &mut [f32]) -> Result<(), RuntimeError>;

    /// Bytes of memory the weights take, buffers included.
    fn resident_bytes(&self) -> usize;
}

/// Whether memory that is given back is made useless first, so that whoever
/// reads it late does not go unnoticed. For tests: it costs time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Poison {
    /// It keeps what it held.
    #[default]
    Off,
    /// See [`Matrix::poison`].
    On,
}

/// Which matrix has to give way to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Eviction {
    /// Of those that were read from the file, the one that is used last from
    /// now on: the best choice there is (Belady, 1966).
    #[default]
    Scheduled,
    /// Any of them, in an order this seed gives, now and then without need and
    /// even if it was to stay in memory. For tests.
    Random(u64),
}

/// How a [`WeightStore`] keeps its matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreOptions {
    /// Layout of the matrices that stay in memory.
    pub layout: Layout,
    /// The instruction set that decodes and multiplies.
    pub isa: Isa,
    /// Bytes that weights and buffers may take; `None`: all matrices stay in memory.
    pub memory: Option<u64>,
    /// Matrices to read ahead of their use, if the memory allows.
    pub prefetch: usize,
    /// Whether matrices that do not stay in memory are read without the
    /// system's file cache, where the file system allows. Right for a model
    /// larger than the memory of the machine: the cache would forget each
    /// matrix before it is read again, and cost the processor a copy.
    pub direct: bool,
    /// Whether memory is made useless when it is given back.
    pub poison: Poison,
    /// Which matrix gives way.
    pub eviction: Eviction,
}

impl StoreOptions {
    /// All matrices in memory, in this layout, on the fastest instruction set
    /// of the machine; four to be read ahead once the memory is bounded.
    #[must_use]
    pub fn new(layout: Layout) -> Self {
        Self {
            layout,
            isa: Isa::best(),
            memory: None,
            prefetch: 4,
            direct: false,
            poison: Poison::Off,
            eviction: Eviction::Scheduled,
        }
    }
}

/// What a store has decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Residency {
    /// Matrices that stay in memory.
    pub n_resident: usize,
    /// Matrices that are read from the file for every use. An embedding that no
    /// product needs counts here although only rows of it are read.
    pub n_streamed: usize,
    /// Buffers they are read into.
    pub n_buffers: usize,
    /// Bytes of each buffer.
    pub buffer_bytes: usize,
}

/// Threads that read matrices.
const N_WORKERS: usize = 2;

/// The matrices of a model, within a budget of memory; see [the module](self).
#[derive(Debug)]
pub struct WeightStore {
    shared: Arc<Shared>,
    residency: Residency,
    resident_bytes: usize,
    workers: Vec<JoinHandle<()>>,
}

impl WeightStore {
    /// Loads what stays in memory, calling `loaded` with the bytes of each.
    pub(crate) fn new(
        sources: Vec<Source>,
        ids: Ids,
        plan: &Plan,
        options: StoreOptions,
        mut loaded: impl FnMut(usize),
    ) -> Result<Self, RuntimeError> {
        let mut places = Vec::with_capacity(sources.len());
        let mut resident_bytes = plan.n_buffers * plan.buffer_bytes;
        for (source, &pinned) in sources.iter().zip(&plan.resident) {
            if !pinned {
                resident_bytes += source.kept_bytes();
                places.push(Place::File);
                continue;
            }
            let matrix = source.load(options.layout)?;
            resident_bytes += matrix.resident_bytes();
            loaded(matrix.resident_bytes());
            places.push(Place::Resident(Arc::new(matrix)));
        }
        let n_resident = plan.resident.iter().filter(|&&resident| resident).count();
        let residency = Residency {
            n_resident,
            n_streamed: sources.len() - n_resident,
            n_buffers: plan.n_buffers,
            buffer_bytes: plan.buffer_bytes,
        };
        let state = State::new(places, ids.cycle(), plan, options);
        let shared = Arc::new(Shared::new(sources, state, options));
        let mut store = Self { shared, residency, resident_bytes, workers: Vec::new() };
        // While one checks what it has read, the disk works for the other.
        for _ in 0..plan.n_buffers.min(N_WORKERS) {
            store.workers.push(worker::spawn(Arc::clone(&store.shared))?);
        }
        Ok(store)
    }

    /// What has been decided.
    #[must_use]
    pub const fn residency(&self) -> Residency {
        self.residency
    }

    /// A matrix, to be multiplied with. Waits until it is in memory; matrices
    /// that follow it are read ahead.
    ///
    /// Each guard keeps a buffer. A thread that holds one and asks for another
    /// matrix may wait for ever if there is no second buffer.
    ///
    /// # Errors
    ///
    /// [`RuntimeError::Tensor`] if it cannot be read or a tile is not what it was.
    pub fn get(&self, id: MatrixId) -> Result<Guard<'_>, RuntimeError> {
        let matrix = self.shared.get(id.0)?;
        Ok(Guard { matrix: Some(matrix), shared: &self.shared })
    }
}

impl Weights for WeightStore {
    fn multiply(&self, matrix: MatrixId, x: &[f32], y: &mut [f32]) -> Result<(), RuntimeError> {
        let weights = self.get(matrix)?;
        let product = weights.multiply_with(self.shared.isa, x, y);
        product.map_err(|error| self.shared.sources[matrix.0].failed(&error))
    }

    fn row(&self, matrix: MatrixId, row: usize, out: &mut [f32]) -> Result<(), RuntimeError> {
        let source = &self.shared.sources[matrix.0];
        match self.shared.if_in_memory(matrix.0) {
            Some(weights) => {
                let guard = Guard { matrix: Some(weights), shared: &self.shared };
                guard.row_with(self.shared.isa, row, out).map_err(|error| source.failed(&error))
            }
            None => source.read_row(row, out),
        }
    }

    fn resident_bytes(&self) -> usize {
        self.resident_bytes
    }
}

impl Drop for WeightStore {
    fn drop(&mut self) {
        self.shared.stop();
        for worker in self.workers.drain(..) {
            // It has nothing to say: a panic of it has stopped the store.
            let _ = worker.join();
        }
    }
}

/// A matrix that stays where it is while it is being read.
#[derive(Debug)]
pub struct Guard<'s> {
    /// `None` only while it is dropped.
    matrix: Option<Arc<Matrix>>,
    shared: &'s Shared,
}

impl Deref for Guard<'_> {
    type Target = Matrix;

    fn deref(&self) -> &Matrix {
        self.matrix.as_ref().expect("a guard that lives")
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // Under the lock, so that whoever looks for a matrix that nobody reads
        // sees either all of this or nothing.
        let state: MutexGuard<'_, State> = self.shared.lock();
        self.matrix = None;
        self.shared.changed(state);
    }
}
