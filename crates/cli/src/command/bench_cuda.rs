//! `transom bench matmul --device cuda` and `transom bench decode`.

#[cfg(feature = "cuda")]
mod decode;
#[cfg(feature = "cuda")]
mod matmul;
#[cfg(feature = "cuda")]
mod report;
#[cfg(feature = "cuda")]
mod weights;

#[cfg(feature = "cuda")]
pub(crate) use {decode::decode, matmul::matmul};

#[cfg(not(feature = "cuda"))]
pub(crate) use without::{decode, matmul};

#[cfg(not(feature = "cuda"))]
mod without {
    use crate::Outcome;
    use crate::args::{BenchDecode, BenchMatmul};

    const NO_SUPPORT: &str = "no GPU support in this build: build it with `--features cuda`";

    /// Runs the benchmark of products.
    pub(crate) fn matmul(_: &BenchMatmul) -> anyhow::Result<Outcome> {
        anyhow::bail!(NO_SUPPORT)
    }

    /// Runs the benchmark of decoding.
    pub(crate) fn decode(_: &BenchDecode) -> anyhow::Result<Outcome> {
        anyhow::bail!(NO_SUPPORT)
    }
}
