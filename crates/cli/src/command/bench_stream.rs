//! `transom bench stream`: a model that is read from its file for every token.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, bail};
use serde::Serialize;
use transom::checkpoint::Checkpoint;
use transom::layout::Layout;
use transom_runtime::store::Residency;
use transom_runtime::{DEFAULT_CHUNK, Model, Session, StoreOptions};

use crate::args::BenchStream;
use crate::measure::Samples;
use crate::output::{self, Style, bytes};
use crate::progress::Progress;
use crate::table::{Align, Table};
use crate::{Outcome, machine, model, threads};

/// The usual bound is the original's size by this.
const DEFAULT_SHARE: u64 = 10;

#[derive(Serialize)]
struct Report {
    threads: usize,
    memory: u64,
    prefetch: usize,
    original_bytes: u64,
    /// Whether the logits of both were the same to the bit.
    identical: bool,
    results: Vec<Line>,
}

#[derive(Serialize)]
struct Line {
    weights: &'static str,
    file_bytes: u64,
    weights_bytes: u64,
    matrices_resident: usize,
    matrices_streamed: usize,
    tokens: usize,
    /// Median of the tokens, seconds.
    seconds_per_token: f64,
    seconds_range: [f64; 2],
    tokens_per_second: f64,
    /// Original bytes of all weights by the time of a token.
    weight_gbps: f64,
    speedup_vs_original: f64,
}

/// One of the two models.
struct Side<'a> {
    name: &'static str,
    path: &'a Path,
    layout: Layout,
}

/// Runs the benchmark.
pub(crate) fn run(args: &BenchStream) -> anyhow::Result<Outcome> {
    let sides = [
        Side { name: "original", path: &args.original, layout: Layout::Dense },
        Side { name: "packed", path: &args.packed, layout: Layout::Rans },
    ];
    let sizes = [checkpoint_bytes(&args.original, false)?, checkpoint_bytes(&args.packed, true)?];
    let memory = args.memory.unwrap_or(sizes[0] / DEFAULT_SHARE);
    let n_threads = args.threads.count();
    let (seconds, models, identical) = threads::with(n_threads, || measure(args, &sides, memory))?;
    let original = seconds[0].median();
    let results = sides.iter().zip(&seconds).zip(models).zip(sizes).map(
        |(((side, samples), (residency, weights_bytes)), file_bytes)| Line {
            weights: side.name,
            file_bytes,
            weights_bytes,
            matrices_resident: residency.n_resident,
            matrices_streamed: residency.n_streamed,
            tokens: samples.n_runs(),
            seconds_per_token: samples.median(),
            seconds_range: [samples.min(), samples.max()],
            tokens_per_second: 1.0 / samples.median(),
            weight_gbps: sizes[0] as f64 / 1e9 / samples.median(),
            speedup_vs_original: original / samples.median(),
        },
    );
    let report = Report {
        threads: n_threads,
        memory,
        prefetch: args.prefetch,
        original_bytes: sizes[0],
        identical,
        results: results.collect(),
    };
    if args.json.wanted {
        output::print_json(&report)?;
    } else {
        output::print(&text(&report))?;
    }
    Ok(if identical { Outcome::Done } else { Outcome::Differ })
}

/// Bytes of all tensors in the files.
fn checkpoint_bytes(path: &Path, packed: bool) -> anyhow::Result<u64> {
    let checkpoint = Checkpoint::open(path)?;
    if checkpoint.is_packed() != packed {
        let expected = if packed { "a packed checkpoint" } else { "an original checkpoint" };
        bail!("{}: expected {expected}", path.display());
    }
    Ok(checkpoint.tensors().map(|tensor| tensor.stored_bytes).sum())
}

type Measured = (Vec<Samples>, Vec<(Residency, u64)>, bool);

/// Times every token of every turn; each finds its files forgotten.
fn measure(args: &BenchStream, sides: &[Side<'_>], memory: u64) -> anyhow::Result<Measured> {
    let mut models = Vec::new();
    for side in sides {
        let options = StoreOptions {
            memory: Some(memory),
            prefetch: args.prefetch,
            direct: !args.cached,
            ..StoreOptions::new(side.layout)
        };
        models.push(model::load(side.path, options, args.json.wanted)?);
    }
    let mut seconds = vec![Samples::default(); sides.len()];
    let mut identical = true;
    let progress = Progress::count(args.json.wanted, "measuring", args.turns as u64);
    for turn in 0..args.turns {
        let mut expected = None;
        for ((side, model), seconds) in sides.iter().zip(&models).zip(&mut seconds) {
            let mut session = Session::new(model, args.tokens, DEFAULT_CHUNK)?;
            let mut logits = Vec::new();
            for token in 0..args.tokens {
                forget(side.path)?;
                let started = Instant::now();
                let found = session.forward(&[token_id(model, turn, token)], 1)?;
                seconds.push(started.elapsed().as_secs_f64());
                logits.extend(found.iter().map(|logit| logit.to_bits()));
            }
            identical &= expected.get_or_insert_with(|| logits.clone()) == &logits;
        }
        progress.add(1);
    }
    progress.finish();
    let held = |model: &Model| {
        let residency = model.residency().context("a model without a store")?;
        Ok((residency, model.weights_bytes() as u64))
    };
    Ok((seconds, models.iter().map(held).collect::<anyhow::Result<_>>()?, identical))
}

/// Some token of the vocabulary.
fn token_id(model: &Model, turn: usize, token: usize) -> u32 {
    ((turn * 31 + token * 7) % model.config().vocab_size) as u32
}

/// Asks the system to forget what it knows of a checkpoint's files.
fn forget(path: &Path) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(path)?;
    let mut files: Vec<&Path> = checkpoint.tensors().map(|tensor| tensor.path.as_path()).collect();
    files.dedup();
    for file in files {
        machine::forget_file(file).with_context(|| file.display().to_string())?;
    }
    Ok(())
}

fn text(report: &Report) -> String {
    let mut table = Table::new(&[
        ("weights", Align::Left),
        ("in the file", Align::Right),
        ("in memory", Align::Right),
        ("matrices streamed", Align::Right),
        ("s/token", Align::Right),
        ("min..max", Align::Right),
        ("weights, GB/s", Align::Right),
        ("vs original", Align::Right),
    ]);
    for line in &report.results {
        let n = line.matrices_resident + line.matrices_streamed;
        table.row([
            line.weights.to_owned(),
            bytes(line.file_bytes),
            bytes(line.weights_bytes),
            format!("{} of {n}", line.matrices_streamed),
            format!("{:.3}", line.seconds_per_token),
            format!("{:.3}..{:.3}", line.seconds_range[0], line.seconds_range[1]),
            format!("{:.2}", line.weight_gbps),
            format!("{:.2}x", line.speedup_vs_original),
        ]);
    }
    format!(
        "CPU, {} threads, files cold, weights in at most {}, {} matrices ahead; logits {}\n\n{}",
        report.threads,
        bytes(report.memory),
        report.prefetch,
        if report.identical { "identical" } else { "DIFFER" },
        table.render(Style::stdout()),
    )
}
