//! Command-line arguments: every flag, its meaning and its default.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Pack, verify and run language models with losslessly compressed weights.
///
/// Weights are entropy-coded; they come back bit for bit, and a model runs
/// from the packed weights with exactly the results of the original.
#[derive(Debug, Parser)]
#[command(
    name = "transom",
    version,
    max_term_width = 100,
    after_help = "Exit codes: 0 done, 1 data differ, 2 error."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// One variant a subcommand.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Measure speed
    #[command(subcommand)]
    Bench(Bench),
    /// Show what this machine has and what transom will use
    Doctor,
}

/// `transom bench`.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Coding speed and ratio, against zstd, lz4 and memcpy
    Codec(BenchCodec),
}

/// `transom bench codec`.
#[derive(Debug, Args)]
#[command(after_help = "\
GB/s are 10^9 uncompressed bytes a second. All data are in memory. Transom's
encoding counts symbols, codes every tile and computes the tile checksums; its
decoding checks them, decodes, and puts the elements back in their order.
BLAKE3, which pack and verify add, is left out in both directions. The others
code pieces of 8 MiB, without checksums. The output of every engine is compared
with the input; exit code 1 means that one differs. Runs of the engines are
interleaved; the result is the median of at least five runs and one second.")]
pub struct BenchCodec {
    /// Safetensors file; any other file counts as one tensor of bytes
    #[arg(long, value_name = "FILE")]
    pub input: PathBuf,
    /// Threads of every engine
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = parse_positive)]
    pub threads: usize,
    #[command(flatten)]
    pub json: Json,
}

/// `--json`.
#[derive(Debug, Args)]
pub struct Json {
    /// Print one JSON document
    #[arg(long = "json")]
    pub wanted: bool,
}

/// Largest number of threads that is believed.
const MAX_COUNT: usize = 4096;

fn parse_positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if (1..=MAX_COUNT).contains(&n) => Ok(n),
        _ => Err(format!("expected a number from 1 to {MAX_COUNT}")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn definitions_are_consistent() {
        Cli::command().debug_assert();
    }
}
