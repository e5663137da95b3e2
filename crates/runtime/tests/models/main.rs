//! Whole models: trained, made up, and compared with a naive implementation.

mod bits;
mod config;
mod dtypes;
mod int8;
mod reference;
mod store;
mod stories;
mod wrong_stores;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use transom::checkpoint::{Options, pack};
use transom::layout::Layout;
use transom_runtime::generate::{GenerateOptions, Generation, generate};
use transom_runtime::sampler::Sampling;
use transom_runtime::tiny::SyntheticCheckpoint;
use transom_runtime::{DEFAULT_CHUNK, Model, Session, StoreOptions};

fn load(path: &Path, layout: Layout) -> Model {
    Model::load(path, StoreOptions::new(layout), &mut |_| ()).unwrap()
}

fn written(checkpoint: &SyntheticCheckpoint) -> TempDir {
    let dir = TempDir::new().unwrap();
    checkpoint.write(dir.path()).unwrap();
    dir
}

/// The packed checkpoint of a directory, in `packed` of the one returned.
fn packed(dir: &Path) -> TempDir {
    let target = TempDir::new().unwrap();
    pack(dir, &target.path().join("packed"), &Options::default(), &()).unwrap();
    target
}

fn greedy(model: &Model, prompt: &[u32], max_tokens: usize, ignore_eos: bool) -> Generation {
    let options =
        GenerateOptions { max_tokens, sampling: Sampling::GREEDY, ignore_eos, keep_logits: true };
    let capacity = (prompt.len() + max_tokens).min(model.config().max_position_embeddings);
    let mut session = Session::new(model, capacity, DEFAULT_CHUNK).unwrap();
    generate(&mut session, prompt, &options, |_| ControlFlow::Continue(())).unwrap()
}

/// Bit patterns, which unlike floats are equal only if they are the same.
fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

/// A file that comes with the project's shared data, if it is there.
fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("TRANSOM_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    let path = root.join(path);
    if !path.exists() {
        eprintln!("SKIPPED: {} is absent", path.display());
        return None;
    }
    Some(path)
}
