//! Command-line arguments: every flag, its meaning and its default.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use regex::Regex;
use transom::quantize::Granularity;

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
    /// Pack a safetensors file or a checkpoint directory
    Pack(Pack),
    /// Restore the original files, byte for byte
    Unpack(Unpack),
    /// Check that packed files are whole, and optionally that they equal the originals
    Verify(Verify),
    /// Make a checkpoint with INT8 weights from one with BF16, FP16 or F32 weights
    Quantize(Quantize),
    /// Show sizes and entropies, tensor by tensor
    Inspect(Inspect),
    /// Generate text
    Run(Run),
    /// Generate from two models side by side and measure how far they differ
    Compare(Compare),
    /// Measure speed
    #[command(subcommand)]
    Bench(Bench),
    /// Train a small model from texts
    #[cfg(feature = "train")]
    Train(Train),
    /// Show what this machine has and what transom will use
    Doctor,
    /// Pack, verify and run a model from original and packed weights side by side
    Demo(Demo),
}

/// `transom pack`.
#[derive(Debug, Args)]
#[command(after_help = "\
Repeating the command resumes a job that was interrupted; finished shards are
not packed again. Any other destination that is not empty needs --force.")]
pub struct Pack {
    /// Safetensors file, or directory of a Hugging Face checkpoint
    pub src: PathBuf,
    /// File or directory to make
    pub dst: PathBuf,
    #[command(flatten)]
    pub threads: Threads,
    /// Pack only the shards j with j mod N = I, so that N processes share the work
    #[arg(long, value_name = "I/N", value_parser = parse_share)]
    pub shard: Option<(usize, usize)>,
    /// Replace what DST holds
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub json: Json,
}

/// `transom unpack`.
#[derive(Debug, Args)]
pub struct Unpack {
    /// Packed file or directory
    pub src: PathBuf,
    /// File or directory to make
    pub dst: PathBuf,
    #[command(flatten)]
    pub threads: Threads,
    /// Replace what DST holds
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub json: Json,
}

/// `transom verify`.
#[derive(Debug, Args)]
#[command(after_help = "\
Every tile is decoded, and every tensor and file is compared with its BLAKE3.
Exit code 1 means that something is damaged, or differs from ORIGINAL.")]
pub struct Verify {
    /// Packed file or directory
    pub packed: PathBuf,
    /// Also compare with these files, byte for byte
    #[arg(long, value_name = "ORIGINAL")]
    pub against: Option<PathBuf>,
    #[command(flatten)]
    pub json: Json,
}

/// `transom quantize`.
#[derive(Debug, Args)]
#[command(after_help = "\
This loses information; `compare` shows how much. The result is a Hugging Face
checkpoint in the layout of compressed-tensors: `weight` is I8, `weight_scale`
F32. All linear layers but the head are quantised; embeddings, norms and biases
never are. Without --target-bits scales are the absolute maximum over 127.")]
pub struct Quantize {
    /// Directory of a Hugging Face checkpoint
    pub src: PathBuf,
    /// Directory to make
    pub dst: PathBuf,
    /// What shares a scale: a matrix, or an output channel of one
    #[arg(long, value_name = "GRANULARITY", value_enum)]
    pub granularity: GranularityName,
    /// Quantise the linear layers whose weight's name matches, the head too, and no others
    #[arg(long, value_name = "REGEX")]
    pub include: Option<Regex>,
    /// Leave the linear layers as they are whose weight's name matches
    #[arg(long, value_name = "REGEX")]
    pub skip: Option<Regex>,
    /// Choose scales and integers so that each matrix, once packed, takes at most
    /// this many bits a weight, from 3 to 7
    #[arg(long, value_name = "B", value_parser = parse_target_bits)]
    pub target_bits: Option<f64>,
    /// With --target-bits: least error of the layers' outputs on this text, instead
    /// of the weights
    #[arg(long, value_name = "FILE", requires = "target_bits")]
    pub calibration: Option<PathBuf>,
    #[command(flatten)]
    pub threads: Threads,
    #[command(flatten)]
    pub json: Json,
}

/// `transom inspect`.
#[derive(Debug, Args)]
#[command(after_help = "\
The entropy floor is the order-0 entropy of the coded planes plus the raw bits,
tensor by tensor: no code that treats weights as independent can be smaller.
For an original, the sizes are those of its tensors before packing.")]
pub struct Inspect {
    /// Original or packed file or directory
    pub path: PathBuf,
    #[command(flatten)]
    pub json: Json,
    /// Also write a page with pictures; it needs no network
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// `transom run`.
#[derive(Debug, Args)]
pub struct Run {
    /// Checkpoint directory, original or packed
    pub model: PathBuf,
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
    /// Put the prompt into the model's chat template
    #[arg(long)]
    pub chat: bool,
    /// Stop after this many tokens
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_tokens: usize,
    /// 0 always takes the most likely token; higher is more random
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = parse_temperature)]
    pub temperature: f32,
    /// Sample from the most likely tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = parse_top_p)]
    pub top_p: f32,
    /// Seed of the random numbers
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Do not stop at the end-of-text token
    #[arg(long)]
    pub ignore_eos: bool,
    /// How weights lie in memory [default: dense for an original, fixed for a packed model]
    #[arg(long, value_name = "LAYOUT", value_enum)]
    pub layout: Option<LayoutName>,
    /// Memory that weights may take, as 6000000000, 6GB or 5.5GiB; matrices beyond
    /// that are read from the file for every token [default: everything, if it fits]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub memory: Option<u64>,
    /// Matrices to read ahead, if the memory allows
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = parse_prefetch)]
    pub prefetch: usize,
    #[command(flatten)]
    pub threads: Threads,
    #[command(flatten)]
    pub json: Json,
    /// Write token ids (I64 [t]) and logits (F32 [t, vocabulary]) as safetensors
    #[arg(long, value_name = "FILE")]
    pub logits: Option<PathBuf>,
}

/// `transom compare`.
#[derive(Debug, Args)]
#[command(after_help = "\
Both models generate greedily from the same prompts; logits are compared along
the text that BASE writes. Exit code 0 means that all tokens and all logits are
identical to the bit, 1 that they are not.")]
pub struct Compare {
    /// Checkpoint directory to compare with
    pub base: PathBuf,
    /// Checkpoint directory to judge
    pub other: PathBuf,
    /// Prompts, one a line [default: eight built-in ones]
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Tokens to generate for each prompt
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub max_tokens: usize,
    /// How the weights of BASE lie in memory [default: as for run]
    #[arg(long, value_name = "LAYOUT", value_enum)]
    pub layout_base: Option<LayoutName>,
    /// How the weights of OTHER lie in memory [default: as for run]
    #[arg(long, value_name = "LAYOUT", value_enum)]
    pub layout_other: Option<LayoutName>,
    /// Also measure the perplexity of both on this text
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Tokens of the text that are seen together
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..), requires = "text")]
    pub window: u32,
    #[command(flatten)]
    pub json: Json,
    /// Also write a page with pictures; it needs no network
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// `transom bench`.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Coding speed and ratio, against zstd, lz4 and memcpy
    Codec(BenchCodec),
    /// Speed of the matrix product from compressed weights
    Matmul(BenchMatmul),
    /// Speed of a model whose weights are read from a file, packed against original
    Stream(BenchStream),
    /// Speed of decoding whole matrices on a GPU
    Decode(BenchDecode),
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
at least five runs and half a second; on a GPU, of eleven replays of a graph of
many launches, and the baseline is the fastest algorithm of cuBLAS with dense
weights, for INT8 in FP16.

On a GPU, more than 64 tokens are a prompt: weights are decoded ahead of the
products of cuBLAS, several numbers of multiprocessors are tried, and the result
is the fastest, in microseconds a product of a sequence.")]
pub struct BenchMatmul {
    /// Where to multiply
    #[arg(long, value_name = "DEVICE", value_enum, default_value = "cpu")]
    pub device: DeviceName,
    /// Products to measure: llama-8b, llama-70b, or ROWSxCOLS
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "llama-8b")]
    pub shapes: Vec<Shapes>,
    /// Tokens multiplied at once
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1",
          value_parser = parse_batch)]
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
    /// Products of one token of which each waits for the one before (GPU only)
    #[arg(long, conflicts_with = "batch")]
    pub chain: bool,
    /// More than 64 tokens: decode weights ahead of a library's products instead of inside of products (GPU only)
    #[arg(long, conflicts_with = "chain")]
    pub ahead: bool,
    /// Take the BF16 weights of this checkpoint, packed or not, instead of synthetic ones (GPU only)
    #[arg(long, value_name = "PATH")]
    pub weights: Option<PathBuf>,
    #[command(flatten)]
    pub threads: Threads,
    #[command(flatten)]
    pub json: Json,
    /// Also write the table as CSV (GPU only)
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
}

/// `transom bench decode`.
#[derive(Debug, Args)]
#[command(after_help = "\
Decodes BF16, FP16 and INT8 weights to dense ones, INT8 as it is and to FP16.
GB/s are of what is written. Also measures how fast the GPU reads and copies its
memory. What is decoded must be the original; exit code 1 means that it is not.")]
pub struct BenchDecode {
    /// Where to decode
    #[arg(long, value_name = "DEVICE", value_enum, default_value = "cuda")]
    pub device: DeviceName,
    /// Matrices to decode: llama-8b, llama-70b, or ROWSxCOLS
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "4096x4096,28672x4096"
    )]
    pub shapes: Vec<Shapes>,
    /// Take the BF16 weights of this checkpoint, packed or not, instead of synthetic ones
    #[arg(long, value_name = "PATH")]
    pub weights: Option<PathBuf>,
    #[command(flatten)]
    pub threads: Threads,
    #[command(flatten)]
    pub json: Json,
    /// Also write the table as CSV
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
}

/// `transom bench stream`.
#[derive(Debug, Args)]
#[command(after_help = "\
Both models run under the same bound of memory, in turns, over the same tokens.
Before every turn the system is asked to forget the files, so that they are read
from the disk. The logits must be identical; exit code 1 means that they are
not. The result is the median of the turns.")]
pub struct BenchStream {
    /// Original checkpoint directory
    pub original: PathBuf,
    /// The same, packed
    pub packed: PathBuf,
    /// Memory that weights may take [default: a tenth of the original's size]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub memory: Option<u64>,
    /// Matrices to read ahead
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = parse_prefetch)]
    pub prefetch: usize,
    /// Read through the system's file cache, as run does for a model that fits
    /// the memory of the machine
    #[arg(long)]
    pub cached: bool,
    /// Tokens of each turn, one after the other
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = parse_positive)]
    pub tokens: usize,
    /// Turns of each
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = parse_positive)]
    pub turns: usize,
    #[command(flatten)]
    pub threads: Threads,
    #[command(flatten)]
    pub json: Json,
}

/// `transom train`.
#[cfg(feature = "train")]
#[derive(Debug, Args)]
#[command(after_help = "\
A .txt file is a book, a .jsonl file has one in the field `text` of every line;
either may be compressed with zstd (.zst). Every tenth book is held out to validate
with; of fewer than ten books, the end of the last one. OUT receives the tokenizer,
which is kept if there is one, log.jsonl, report.html, the state, and in checkpoint
the model as a Hugging Face checkpoint.")]
pub struct Train {
    /// Files, or directories of them
    #[arg(required = true)]
    pub texts: Vec<PathBuf>,
    /// Directory of the run
    #[arg(long, value_name = "OUT")]
    pub out: PathBuf,
    /// What weights of linear layers (but the head) are: BF16 in the checkpoint, or integers
    /// in every step and in the checkpoint
    #[arg(long, value_name = "TYPE", value_enum, default_value = "bf16")]
    pub weights: TrainedName,
    /// Weights that share a scale
    #[arg(long, value_name = "WHAT", value_enum, default_value = "channel")]
    pub granularity: GranularityName,
    /// Nats of loss that a bit of the integers' entropy is worth; scales are learned then
    #[arg(long, value_name = "LAMBDA", default_value_t = 0.0)]
    pub rate: f64,
    /// JSON file with the shape of the model (`model`) and any other option of training
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Steps of the optimiser [default: 1000]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Sequences of a step [default: 16]
    #[arg(long, value_name = "N")]
    pub batch_size: Option<usize>,
    /// Tokens of a sequence [default: 256]
    #[arg(long, value_name = "N")]
    pub sequence_length: Option<usize>,
    /// Learning rate after the warm-up [default: 0.002]
    #[arg(long, value_name = "RATE")]
    pub learning_rate: Option<f64>,
    /// Seed of the random numbers [default: 0]
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Go on from the state in OUT, if there is one
    #[arg(long)]
    pub resume: bool,
    /// Where to train
    #[arg(long, value_name = "DEVICE", value_enum, default_value = "cpu")]
    pub device: DeviceName,
    #[command(flatten)]
    pub threads: Threads,
    #[command(flatten)]
    pub json: Json,
}

/// What weights are trained as.
#[cfg(feature = "train")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TrainedName {
    /// BF16
    Bf16,
    /// INT8 and scales
    Int8,
}

/// `transom demo`.
#[derive(Debug, Args)]
pub struct Demo {
    /// Checkpoint directory, packed or not [default: the models that come with the source]
    pub model: Option<PathBuf>,
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

/// Where a benchmark runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceName {
    /// The processor
    Cpu,
    /// The first NVIDIA GPU
    Cuda,
}

/// Element types of weights that products take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WeightName {
    /// bfloat16
    Bf16,
    /// IEEE half precision
    F16,
    /// Integers of 8 bits with a scale (GPU only)
    Int8,
}

impl WeightName {
    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        }
    }
}

/// What shares a scale, as named on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GranularityName {
    /// One scale for a matrix
    Tensor,
    /// One scale for each row
    Channel,
}

impl From<GranularityName> for Granularity {
    fn from(name: GranularityName) -> Self {
        match name {
            GranularityName::Tensor => Self::Tensor,
            GranularityName::Channel => Self::Channel,
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

/// Largest number of tokens that is multiplied at once.
const MAX_BATCH: usize = 1 << 16;

fn parse_batch(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if (1..=MAX_BATCH).contains(&n) => Ok(n),
        _ => Err(format!("expected a number from 1 to {MAX_BATCH}")),
    }
}

/// Most matrices to read ahead: more than any model has.
const MAX_PREFETCH: usize = 1 << 20;

fn parse_prefetch(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n <= MAX_PREFETCH => Ok(n),
        _ => Err(format!("expected a number from 0 to {MAX_PREFETCH}")),
    }
}

/// A number of bytes, with a decimal or binary unit or none.
fn parse_bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, f64); 10] = [
        ("KiB", 1024.0),
        ("MiB", 1048576.0),
        ("GiB", 1073741824.0),
        ("TiB", 1099511627776.0),
        ("kB", 1e3),
        ("KB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("TB", 1e12),
        ("B", 1.0),
    ];
    let (number, unit) = UNITS
        .iter()
        .find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)))
        .unwrap_or((text, 1.0));
    match number.trim_end().parse::<f64>() {
        Ok(n) if (0.0..1e18).contains(&(n * unit)) => Ok((n * unit) as u64),
        _ => Err("expected a number of bytes, as 6000000000, 6GB or 5.5GiB".into()),
    }
}

fn parse_target_bits(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(bits) if (3.0..=7.0).contains(&bits) => Ok(bits),
        _ => Err("expected a number from 3 to 7".into()),
    }
}

fn parse_temperature(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(t) if t.is_finite() && t >= 0.0 => Ok(t),
        _ => Err("expected a number not below 0".into()),
    }
}

fn parse_top_p(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(p) if p > 0.0 && p <= 1.0 => Ok(p),
        _ => Err("expected a number above 0 and at most 1".into()),
    }
}

fn parse_share(text: &str) -> Result<(usize, usize), String> {
    let parsed = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    match parsed {
        Some((i, n)) if i < n => Ok((i, n)),
        _ => Err("expected I/N with I below N, for instance 0/4".into()),
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
        assert_eq!(parse_share("1/4"), Ok((1, 4)));
        for text in ["", "1", "4/4", "5/4", "-1/4", "0/0", "a/b", "1/2/3"] {
            assert!(parse_share(text).is_err(), "{text}");
        }
        assert_eq!("32x48".parse::<Shapes>().unwrap().0, [(32, 48)]);
        for text in ["", "x", "16", "0x16", "15x16", "16x16x16", "1048576x16", "262144x262144"] {
            assert!(text.parse::<Shapes>().is_err(), "{text}");
        }
    }

    #[test]
    fn sampling_parameters_out_of_range_are_refused() {
        assert!(parse_temperature("0.7").is_ok() && parse_top_p("1").is_ok());
        for text in ["-1", "nan", "inf", "x"] {
            assert!(parse_temperature(text).is_err(), "{text}");
        }
        for text in ["0", "1.1", "nan", ""] {
            assert!(parse_top_p(text).is_err(), "{text}");
        }
    }
}
