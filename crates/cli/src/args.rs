//! Command-line arguments: every flag, its meaning and its default.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

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
    /// Speed of the matrix product from compressed weights
    Matmul(BenchMatmul),
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

/// `transom bench matmul`.
#[derive(Debug, Args)]
#[command(after_help = "\
Weights are synthetic: Gaussian with a spread that differs from row to row, as
in trained models. They are read cold: each run takes another copy, so that no
cache holds it. All layouts must give identical bits; exit code 1 means that
they do not. Runs of the layouts are interleaved; the result is the median of
at least five runs and half a second.")]
pub struct BenchMatmul {
    /// Products to measure: llama-8b, llama-70b, or ROWSxCOLS
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "llama-8b")]
    pub shapes: Vec<Shapes>,
    /// Tokens multiplied at once
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1",
          value_parser = parse_positive)]
    pub batch: Vec<usize>,
    /// Layouts to measure
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        value_enum,
        default_value = "dense,fixed,rans"
    )]
    pub layouts: Vec<LayoutName>,
    /// Element types to measure
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_enum, default_value = "bf16")]
    pub dtype: Vec<WeightName>,
    #[command(flatten)]
    pub threads: Threads,
    #[command(flatten)]
    pub json: Json,
}

/// `--threads`.
#[derive(Debug, Args)]
pub struct Threads {
    /// Threads to use [default: all cores]
    #[arg(long = "threads", value_name = "N", value_parser = parse_positive)]
    n: Option<usize>,
}

impl Threads {
    /// The number asked for, or the number of cores.
    pub fn count(&self) -> usize {
        self.n.unwrap_or_else(crate::machine::n_cores)
    }
}

/// `--json`.
#[derive(Debug, Args)]
pub struct Json {
    /// Print one JSON document
    #[arg(long = "json")]
    pub wanted: bool,
}

/// How weights lie in memory while a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LayoutName {
    /// As they are
    Dense,
    /// Codes of a fixed length: fast, small
    Fixed,
    /// Entropy-coded, as on disk: smallest
    Rans,
}

/// Element types of weights that products take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WeightName {
    /// bfloat16
    Bf16,
    /// IEEE half precision
    F16,
}

impl WeightName {
    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

/// Products to measure, as named on the command line.
#[derive(Debug, Clone)]
pub struct Shapes(pub Vec<(usize, usize)>);

impl std::str::FromStr for Shapes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shapes = match text {
            "llama-8b" => {
                vec![(6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336), (128_256, 4096)]
            }
            "llama-70b" => vec![(10_240, 8192), (8192, 8192), (57_344, 8192), (8192, 28_672)],
            _ => vec![parse_sides(text).ok_or_else(|| {
                format!(
                    "expected llama-8b, llama-70b or ROWSxCOLS with positive multiples of 16 \
                     of at most {MAX_SIDE}"
                )
            })?],
        };
        Ok(Self(shapes))
    }
}

/// Keeps a matrix within 2^32 elements.
const MAX_SIDE: usize = 1 << 18;

fn parse_sides(text: &str) -> Option<(usize, usize)> {
    let (rows, cols) = text.split_once('x')?;
    let (rows, cols) = (rows.parse().ok()?, cols.parse().ok()?);
    let fits = |side: usize| side > 0 && side <= MAX_SIDE && side.is_multiple_of(16);
    (fits(rows) && fits(cols) && rows * cols <= 1 << 32).then_some((rows, cols))
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

    #[test]
    fn shares_and_shapes_that_make_no_sense_are_refused() {
        assert_eq!("32x48".parse::<Shapes>().unwrap().0, [(32, 48)]);
        for text in ["", "x", "16", "0x16", "15x16", "16x16x16", "1048576x16", "262144x262144"] {
            assert!(text.parse::<Shapes>().is_err(), "{text}");
        }
    }
}
