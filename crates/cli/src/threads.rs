//! Pools of threads.

use anyhow::Context as _;

/// Runs `work` where all parallel loops use `n_threads` threads.
pub(crate) fn with<T: Send>(
    n_threads: usize,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build();
    pool.with_context(|| format!("starting {n_threads} threads"))?.install(work)
}
