//! `transom train`: texts into a model.

use std::fs;
use std::time::Instant;

use anyhow::Context as _;
use serde::Serialize;
use transom_train::data::Books;
use transom_train::export::export;
use transom_train::quantize::Granularity;
use transom_train::train::{
    Corpus, LogLine, Quantization, STATE_NAME, TrainOptions, Trainer, read_log,
};
use transom_train::{AutodiffBackend, Cpu, TrainError};

use crate::Outcome;
use crate::args::{DeviceName, GranularityName, Train, TrainedName};
use crate::output::{self, grouped, note, seconds};
use crate::page;

/// Where in OUT the model is.
const CHECKPOINT: &str = "checkpoint";
const PAGE: &str = "report.html";

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    checkpoint: String,
    weights: u64,
    training_tokens: u64,
    validation_tokens: u64,
    last: Option<LogLine>,
    seconds: f64,
}

/// Trains, and writes the checkpoint.
pub(crate) fn run(args: &Train) -> anyhow::Result<Outcome> {
    match args.device {
        DeviceName::Cpu => run_on::<Cpu>(args),
        #[cfg(feature = "train-cuda")]
        DeviceName::Cuda => run_on::<transom_train::Gpu>(args),
        #[cfg(not(feature = "train-cuda"))]
        DeviceName::Cuda => {
            anyhow::bail!("no GPU support in this build: build it with `--features train-cuda`")
        }
    }
}

fn run_on<B: AutodiffBackend>(args: &Train) -> anyhow::Result<Outcome> {
    let started = Instant::now();
    let options = options(args)?;
    options.check()?;
    let state = args.out.join(STATE_NAME);
    if state.exists() && !args.resume {
        return Err(TrainError::Occupied { path: args.out.clone() }.into());
    }
    let books = Books::read(&args.texts)?;
    let (corpus, tokenizer) = Corpus::prepare(&books, options.model.vocab_size, &args.out)?;
    drop(books);
    let device = B::Device::default();
    let mut trainer = if state.exists() {
        Trainer::<B>::resume(options.clone(), device, &corpus, &state)?
    } else {
        Trainer::<B>::new(options.clone(), device)?
    };
    if !args.json.wanted {
        note(&format!(
            "{} weights; {} tokens to learn from, {} to validate with",
            grouped(options.model.n_weights() as u64),
            grouped(corpus.training.len() as u64),
            grouped(corpus.validation.len() as u64),
        ));
    }
    trainer.run(&corpus, &args.out, None, &mut |line| {
        if !args.json.wanted {
            note(&progress(&options, line));
        }
    })?;
    let checkpoint = args.out.join(CHECKPOINT);
    export(&checkpoint, &options, &trainer.stored(), &tokenizer)?;
    let log = read_log(&args.out)?;
    let path = args.out.join(PAGE);
    fs::write(&path, page::train::page(&options, &log))
        .with_context(|| path.display().to_string())?;
    let report = Report {
        checkpoint: checkpoint.display().to_string(),
        weights: options.model.n_weights() as u64,
        training_tokens: corpus.training.len() as u64,
        validation_tokens: corpus.validation.len() as u64,
        last: log.last().cloned(),
        seconds: started.elapsed().as_secs_f64(),
    };
    if args.json.wanted {
        output::print_json(&report)?;
    } else {
        output::print(&format!("{} in {}\n", report.checkpoint, seconds(report.seconds)))?;
    }
    Ok(Outcome::Done)
}

/// The configuration file, and what the command line says instead.
fn options(args: &Train) -> anyhow::Result<TrainOptions> {
    let mut options = match &args.config {
        None => TrainOptions::default(),
        Some(path) => {
            let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
            serde_json::from_str(&text).with_context(|| path.display().to_string())?
        }
    };
    options.steps = args.steps.unwrap_or(options.steps);
    options.batch_size = args.batch_size.unwrap_or(options.batch_size);
    options.sequence_length = args.sequence_length.unwrap_or(options.sequence_length);
    options.learning_rate = args.learning_rate.unwrap_or(options.learning_rate);
    options.seed = args.seed.unwrap_or(options.seed);
    match args.device {
        DeviceName::Cpu => options.threads = args.threads.count(),
        // A GPU is fullest in one pass.
        DeviceName::Cuda => (options.passes, options.threads) = (1, 1),
    }
    match args.weights {
        TrainedName::Int8 => {
            let granularity = match args.granularity {
                GranularityName::Tensor => Granularity::Tensor,
                GranularityName::Channel => Granularity::Channel,
            };
            options.quantization = Some(Quantization { granularity, rate: args.rate });
        }
        TrainedName::Bf16 if args.rate != 0.0 => {
            anyhow::bail!("`--rate` is the price of integers' bits: it needs `--weights int8`")
        }
        TrainedName::Bf16 => {}
    }
    Ok(options)
}

fn progress(options: &TrainOptions, line: &LogLine) -> String {
    let rest = (options.steps - line.step) * options.tokens_per_step();
    let mut text = format!(
        "step {} of {}: loss {:.4}, {} tokens/s, {} left",
        line.step,
        options.steps,
        line.loss,
        grouped(line.tokens_per_second as u64),
        seconds(rest as f64 / line.tokens_per_second),
    );
    if let Some(bits) = line.bits_per_weight {
        text += &format!(", integers of {bits:.2} bits");
    }
    if let Some(perplexity) = line.validation_perplexity {
        text += &format!(", validation perplexity {perplexity:.2}");
    }
    text
}
