//! The experiment of `docs/experiments/int8-rate.md`: what a bit is worth.
//!
//!     cargo run --release -p transom-runtime --example int8_rate -- MODEL [CHECKPOINT]
//!
//! Quantises MODEL to 3 to 7 bits a weight with scales `absmax / L` (the
//! baseline), for the least error of the weights, and for the least error of the
//! layers' outputs; prints size, errors and perplexity as a Markdown table. The
//! texts are the model's own: it writes one to calibrate with and another to be
//! judged by. Of CHECKPOINT, which need not be a model, the first eight matrices.

#![allow(clippy::print_stdout, reason = "the table is what it is for")]

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex};

use transom::checkpoint::{Checkpoint, Options, QuantizeOptions, TensorInfo, pack, quantize};
use transom::layout::{Layout, Matrix, WeightType};
use transom::quantize::{Granularity, rate};
use transom::{Isa, ReadAt as _};
use transom_runtime::calibrate::input_squares;
use transom_runtime::compare::perplexity;
use transom_runtime::generate::{GenerateOptions, generate};
use transom_runtime::sampler::Sampling;
use transom_runtime::store::{MatrixId, Weights, matrices};
use transom_runtime::{DEFAULT_CHUNK, Model, RuntimeError, Session, StoreOptions};

type Failure = Box<dyn std::error::Error>;

/// Tokens of each text, in pieces of the model's own beginning.
const TEXT_TOKENS: usize = 16_384;
const PIECE_TOKENS: usize = 256;
/// Matrices looked at of a checkpoint that is no model.
const N_MATRICES: usize = 8;

/// Tokens of a window of the text.
const WINDOW: usize = 512;

fn main() -> Result<(), Failure> {
    let mut args = std::env::args_os().skip(1);
    let model = args.next().ok_or("expected the directory of a model")?;
    of_model(Path::new(&model))?;
    args.next().map_or(Ok(()), |checkpoint| of_checkpoint(Path::new(&checkpoint)))
}

fn load(path: &Path) -> Result<Model, RuntimeError> {
    Model::load(path, StoreOptions::new(Layout::Dense), &mut |_| ())
}

/// What a model writes with this seed.
fn write_text(model: &Model, seed: u64) -> Result<String, RuntimeError> {
    let mut text = String::new();
    let prompt = model.tokenizer().encode("", true)?;
    let prompt = if prompt.is_empty() { vec![0] } else { prompt };
    for piece in 0..TEXT_TOKENS / PIECE_TOKENS {
        let seed = seed + piece as u64;
        let options = GenerateOptions {
            max_tokens: PIECE_TOKENS,
            sampling: Sampling { temperature: 1.0, top_p: 1.0, seed },
            ignore_eos: false,
            keep_logits: false,
        };
        let mut session = Session::new(model, prompt.len() + PIECE_TOKENS, DEFAULT_CHUNK)?;
        let found = generate(&mut session, &prompt, &options, |_| ControlFlow::Continue(()))?;
        text += &model.tokenizer().decode_continuation(&prompt, &found.ids)?;
        text.push('\n');
    }
    Ok(text)
}

fn of_model(path: &Path) -> Result<(), Failure> {
    let model = load(path)?;
    let (calibration, judged) = (write_text(&model, 1_000)?, write_text(&model, 2_000)?);
    let ids = model.tokenizer().encode(&judged, true)?;
    let original = perplexity(&model, &ids, WINDOW)?.ok_or("no text")?;
    let squares = input_squares(model, &calibration, |_, _| ())?;
    println!("{} judged tokens; perplexity of the original {original:.4}\n", ids.len());
    println!(
        "| target | scales | bits a weight | with scales | weight error | output error | perplexity |"
    );
    println!("|---|---|---|---|---|---|---|");
    let none = HashMap::new();
    for (granularity, bits) in [(Granularity::Tensor, None), (Granularity::Channel, None)]
        .into_iter()
        .chain([7.0, 6.0, 5.0, 4.0, 3.0].map(|bits| (Granularity::Channel, Some(bits))))
    {
        let ways = [
            ("absmax / L", true, &none),
            ("least weight error", false, &none),
            ("least output error", false, &squares),
        ];
        for (name, baseline, input_squares) in ways {
            if bits.is_none() && !baseline {
                continue;
            }
            let work = tempfile::tempdir()?;
            let (int8, packed) = (work.path().join("int8"), work.path().join("packed"));
            let options = QuantizeOptions {
                granularity,
                selects: &|name| name != "lm_head.weight",
                target_bits: bits,
                input_squares,
                baseline,
            };
            let report = quantize(path, &int8, &options, &Options::default(), &())?;
            pack(&int8, &packed, &Options::default(), &())?;
            let model = load(&packed)?;
            let found = perplexity(&model, &ids, WINDOW)?.ok_or("no text")?;
            let errors = output_error(path, &int8, &ids)?;
            let n: usize = report.tensors.iter().map(|t| t.shape[0] * t.shape[1]).sum();
            let stored = |suffix: &str| -> Result<f64, Failure> {
                let checkpoint = Checkpoint::open(&packed)?;
                let names: Vec<String> =
                    report.tensors.iter().map(|t| format!("{}{suffix}", t.name)).collect();
                let stored = checkpoint.tensors().filter(|info| names.contains(&info.name));
                Ok(stored.map(|info| info.stored_bytes as f64 * 8.0).sum::<f64>() / n as f64)
            };
            let weight = mean_error(report.tensors.iter().map(|t| t.relative_error));
            let (target, name) = match bits {
                Some(bits) => (format!("{bits}"), name.to_owned()),
                None => ("-".to_owned(), format!("absmax / 127, per {}", granularity.name())),
            };
            let bits = stored("")?;
            println!(
                "| {target} | {name} | {bits:.3} | {:.3} | {:.3} % | {:.3} % | {found:.4} |",
                bits + stored("_scale")?,
                100.0 * weight,
                100.0 * mean_error(errors.into_iter()),
            );
        }
    }
    Ok(())
}

/// Root mean square over matrices.
fn mean_error(errors: impl Iterator<Item = f64>) -> f64 {
    let squares: Vec<f64> = errors.map(|error| error * error).collect();
    (squares.iter().sum::<f64>() / squares.len().max(1) as f64).sqrt()
}

/// Weights only, of the first matrices of a checkpoint that nothing runs.
fn of_checkpoint(path: &Path) -> Result<(), Failure> {
    println!("\n{}, weights only\n", path.file_name().unwrap_or_default().display());
    println!("| target | absmax / L: bits | error | least error: bits | error | ratio |");
    println!("|---|---|---|---|---|---|");
    let checkpoint = Checkpoint::open(path)?;
    let is_matrix = |info: &&TensorInfo| info.shape.len() == 2 && info.dtype == "BF16";
    let matrices: Vec<_> = checkpoint.tensors().filter(is_matrix).take(N_MATRICES).collect();
    for bits in [6.0, 5.0, 4.0, 3.0] {
        let mut rates = Vec::new();
        for info in &matrices {
            let mut bytes = vec![0; info.original_bytes as usize];
            checkpoint.file(info).read_exact_at(&mut bytes, info.start())?;
            let words = bytes.as_chunks().0.iter();
            let weights: Vec<f32> = words.map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect();
            let matrix =
                rate::Matrix { weights: &weights, cols: info.shape[1], input_squares: None };
            rates.push(rate::quantise(&matrix, Granularity::Channel, bits, false).report);
        }
        let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let (usual, least) = (
            mean_error(rates.iter().map(|rate| rate.baseline_error)),
            mean_error(rates.iter().map(|rate| rate.error)),
        );
        println!(
            "| {bits} | {:.3} | {:.3} % | {:.3} | {:.3} % | {:.3} |",
            mean(rates.iter().map(|rate| rate.baseline_bits).collect()),
            100.0 * usual,
            mean(rates.iter().map(|rate| rate.bits).collect()),
            100.0 * least,
            least / usual,
        );
        if let Some(worse) = rates.iter().find(|rate| rate.error >= rate.baseline_error) {
            return Err(format!("not better than the baseline: {worse:?}").into());
        }
    }
    Ok(())
}

// ---------------------------------------------------------------------------
// The error of the layers' outputs, each layer given the original's inputs

/// Of every quantised matrix, the error of its outputs on a text relative to them.
fn output_error(original: &Path, int8: &Path, ids: &[u32]) -> Result<Vec<f64>, Failure> {
    let config = load(original)?.config().clone();
    let (base, other) = (Checkpoint::open(original)?, Checkpoint::open(int8)?);
    let mut pairs = Vec::new();
    for info in matrices(&config) {
        let shape = [info.rows, info.cols];
        let other = match other.has(&format!("{}_scale", info.name)) {
            true => Some(matrix(&other, &info.name, shape)?),
            false => None,
        };
        pairs.push((matrix(&base, &info.name, shape)?, other));
    }
    let sums = Arc::new(Mutex::new(vec![(0.0, 0.0); pairs.len()]));
    let weights = Box::new(Both { pairs, sums: Arc::clone(&sums) });
    let model = Model::with_weights(original, weights)?;
    perplexity(&model, ids, WINDOW)?;
    let sums = sums.lock().map_err(|_| "a thread has ended")?;
    let quantised = sums.iter().filter(|(error, _)| *error > 0.0);
    Ok(quantised.map(|(error, total): &(f64, f64)| (error / total).sqrt()).collect())
}

fn matrix(checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Result<Matrix, Failure> {
    let find = |name: &str| {
        checkpoint.tensors().find(|info| info.name == name).ok_or_else(|| format!("no {name}"))
    };
    let info = find(name)?;
    let weight = WeightType::from_safetensors(&info.dtype).ok_or("an unknown dtype")?;
    let (file, start) = (checkpoint.file(info), info.start());
    let matrix = Matrix::from_dense(file, start, shape, weight, Layout::Dense, Isa::best())?;
    if weight != WeightType::I8 {
        return Ok(matrix);
    }
    let info = find(&format!("{name}_scale"))?;
    let mut bytes = vec![0; info.original_bytes as usize];
    checkpoint.file(info).read_exact_at(&mut bytes, info.start())?;
    let scales: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    Ok(matrix.with_scales((0..shape[0]).map(|row| scales[row % scales.len()]).collect()))
}

/// Original matrices, which the model runs with, and quantised ones beside them.
#[derive(Debug)]
struct Both {
    pairs: Vec<(Matrix, Option<Matrix>)>,
    /// Squares of differences, and of the outputs.
    sums: Arc<Mutex<Vec<(f64, f64)>>>,
}

impl Weights for Both {
    fn multiply(&self, matrix: MatrixId, x: &[f32], y: &mut [f32]) -> Result<(), RuntimeError> {
        let failed = |error: transom::DecodeError| std::io::Error::other(error.to_string());
        let (base, other) = &self.pairs[matrix.index()];
        base.multiply_with(Isa::best(), x, y).map_err(failed)?;
        let Some(other) = other else { return Ok(()) };
        let mut found = vec![0.0; y.len()];
        other.multiply_with(Isa::best(), x, &mut found).map_err(failed)?;
        let square = |value: f32| f64::from(value).powi(2);
        let mut sums = self.sums.lock().map_err(|_| std::io::Error::other("a thread has ended"))?;
        let sum = &mut sums[matrix.index()];
        sum.0 += y.iter().zip(&found).map(|(y, found)| square(y - found)).sum::<f64>();
        sum.1 += y.iter().map(|y| square(*y)).sum::<f64>();
        Ok(())
    }

    fn row(&self, matrix: MatrixId, row: usize, out: &mut [f32]) -> Result<(), RuntimeError> {
        let row = self.pairs[matrix.index()].0.row_with(Isa::best(), row, out);
        Ok(row.map_err(|error| std::io::Error::other(error.to_string()))?)
    }

    fn resident_bytes(&self) -> usize {
        self.pairs.iter().map(|(base, _)| base.resident_bytes()).sum()
    }
}
