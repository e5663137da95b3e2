//! `transom bench matmul`: the product from weights in each layout.

use std::cell::RefCell;

use serde::Serialize;
use transom::layout::{Layout, Matrix, WeightType};
use transom::{Isa, Record, encode_record};

use crate::args::{BenchMatmul, DeviceName, LayoutName, WeightName};
use crate::command::bench_cuda;
use crate::measure::{self, Job, Samples};
use crate::output::{self, Style};
use crate::progress::Progress;
use crate::table::{Align, Table};
use crate::{Outcome, machine, synthetic, threads};

/// For each layout.
const MIN_SECONDS: f64 = 0.5;
/// Copies of a matrix together exceed the last-level cache by this factor, so
/// that every run finds its weights in memory.
const COLD_FACTOR: u64 = 3;
/// Small matrices stay in the cache rather than take for ever to copy.
const MAX_COPIES: u64 = 256;
/// Taken for the last-level cache where the system does not tell.
const ASSUMED_CACHE_BYTES: u64 = 64 << 20;
const SEED: u64 = 42;

#[derive(Serialize)]
struct Report {
    threads: usize,
    /// Whether all layouts gave the same bits everywhere.
    identical: bool,
    results: Vec<Line>,
}

#[derive(Serialize)]
struct Line {
    device: &'static str,
    dtype: &'static str,
    layout: &'static str,
    rows: usize,
    cols: usize,
    batch: usize,
    /// Median of the runs, microseconds.
    us: f64,
    us_range: [f64; 2],
    runs: usize,
    weight_gbps: f64,
    bits_per_weight: f64,
    /// Null if dense was not measured.
    speedup_vs_dense: Option<f64>,
    /// Whether the product has the bits of the first layout's.
    identical: bool,
}

/// Runs the benchmark.
pub(crate) fn run(args: &BenchMatmul) -> anyhow::Result<Outcome> {
    if args.device == DeviceName::Cuda {
        return bench_cuda::matmul(args);
    }
    anyhow::ensure!(args.csv.is_none(), "--csv is for --device cuda; --json holds the same");
    anyhow::ensure!(args.weights.is_none(), "--weights is for --device cuda");
    anyhow::ensure!(!args.chain, "--chain is for --device cuda");
    let weight_types: Vec<(WeightName, WeightType)> =
        args.dtype.iter().map(|&name| (name, weight_type(name))).collect();
    let shapes: Vec<(usize, usize)> = args.shapes.iter().flat_map(|s| s.0.clone()).collect();
    let n_products = args.dtype.len() * shapes.len() * args.batch.len() * args.layouts.len();
    let n_turns = n_products * measure::N_ROUNDS;
    let progress = Progress::count(args.json.wanted, "measuring", n_turns as u64);
    let n_threads = args.threads.count();
    let results = threads::with(n_threads, || {
        let mut results = Vec::new();
        for &dtype in &weight_types {
            for &sides in &shapes {
                results.extend(measure_shape(args, dtype, sides, &progress)?);
            }
        }
        Ok(results)
    })?;
    progress.finish();
    let identical = results.iter().all(|line| line.identical);
    let report = Report { threads: n_threads, identical, results };
    if args.json.wanted {
        output::print_json(&report)?;
    } else {
        output::print(&text(&report))?;
    }
    Ok(if identical { Outcome::Done } else { Outcome::Differ })
}

/// A matrix in one layout, several times over.
struct Copies {
    layout: Layout,
    matrices: Vec<Matrix>,
}

impl Copies {
    fn new(layout: Layout, build: impl Fn() -> anyhow::Result<Matrix>) -> anyhow::Result<Self> {
        let cache_bytes = machine::last_cache_bytes().unwrap_or(ASSUMED_CACHE_BYTES);
        let first = build()?;
        let n = (COLD_FACTOR * cache_bytes).div_ceil(first.resident_bytes().max(1) as u64);
        let mut matrices = vec![first];
        for _ in 1..n.clamp(2, MAX_COPIES) {
            matrices.push(build()?);
        }
        Ok(Self { layout, matrices })
    }
}

fn measure_shape(
    args: &BenchMatmul,
    (dtype, weight_type): (WeightName, WeightType),
    (rows, cols): (usize, usize),
    progress: &Progress,
) -> anyhow::Result<Vec<Line>> {
    let weights = synthetic::weights(dtype, rows, cols, SEED);
    let packed = encode_record(Isa::best(), weight_type.dtype(), &[rows, cols], &weights)?;
    drop(weights);
    let record = Record::read(&packed, 0, packed.len() as u64)?;
    let copies: Vec<Copies> = args
        .layouts
        .iter()
        .map(|&name| {
            let layout = Layout::from(name);
            Copies::new(layout, || {
                let shape = [rows, cols];
                Ok(Matrix::from_record(&record, &packed, shape, weight_type, layout, Isa::best())?)
            })
        })
        .collect::<anyhow::Result<_>>()?;
    let mut lines = Vec::new();
    for &batch in &args.batch {
        lines.extend(measure_batch(&copies, dtype, batch, progress)?);
    }
    Ok(lines)
}

/// Times one product in all layouts, and compares the results.
fn measure_batch(
    copies: &[Copies],
    dtype: WeightName,
    batch: usize,
    progress: &Progress,
) -> anyhow::Result<Vec<Line>> {
    let (rows, cols) = (copies[0].matrices[0].rows(), copies[0].matrices[0].cols());
    let x = synthetic::activations(batch * cols, SEED);
    let outputs: Vec<RefCell<Vec<f32>>> =
        copies.iter().map(|_| RefCell::new(vec![f32::NAN; batch * rows])).collect();
    let mut jobs: Vec<Job<'_>> = Vec::new();
    for (copies, output) in copies.iter().zip(&outputs) {
        let mut next = 0;
        let x = &x;
        jobs.push(Box::new(move || {
            copies.matrices[next].multiply_with(Isa::best(), x, &mut output.borrow_mut())?;
            next = (next + 1) % copies.matrices.len();
            Ok(())
        }));
    }
    let samples = measure::interleaved(&mut jobs, MIN_SECONDS, || progress.add(1))?;
    drop(jobs);
    let bits = |values: &RefCell<Vec<f32>>| -> Vec<u32> {
        values.borrow().iter().map(|v| v.to_bits()).collect()
    };
    let expected = bits(&outputs[0]);
    let dense = copies.iter().position(|c| c.layout == Layout::Dense).map(|i| samples[i].median());
    Ok(copies
        .iter()
        .zip(&samples)
        .zip(&outputs)
        .map(|((copies, samples), output)| Line {
            identical: bits(output) == expected,
            ..line(copies, dtype, batch, samples, dense)
        })
        .collect())
}

fn line(
    copies: &Copies,
    dtype: WeightName,
    batch: usize,
    samples: &Samples,
    dense: Option<f64>,
) -> Line {
    let matrix = &copies.matrices[0];
    let seconds = samples.median();
    Line {
        device: "cpu",
        dtype: dtype.name(),
        layout: copies.layout.name(),
        rows: matrix.rows(),
        cols: matrix.cols(),
        batch,
        us: seconds * 1e6,
        us_range: [samples.min() * 1e6, samples.max() * 1e6],
        runs: samples.n_runs(),
        weight_gbps: matrix.resident_bytes() as f64 / 1e9 / seconds,
        bits_per_weight: matrix.bits_per_weight(),
        speedup_vs_dense: dense.map(|dense| dense / seconds),
        identical: false,
    }
}

fn text(report: &Report) -> String {
    let mut table = Table::new(&[
        ("dtype", Align::Left),
        ("rows x cols", Align::Right),
        ("batch", Align::Right),
        ("layout", Align::Left),
        ("bits/weight", Align::Right),
        ("us", Align::Right),
        ("min..max", Align::Right),
        ("GB/s", Align::Right),
        ("vs dense", Align::Right),
        ("result", Align::Left),
    ]);
    for line in &report.results {
        table.row([
            line.dtype.to_owned(),
            format!("{}x{}", line.rows, line.cols),
            line.batch.to_string(),
            line.layout.to_owned(),
            format!("{:.2}", line.bits_per_weight),
            format!("{:.0}", line.us),
            format!("{:.0}..{:.0}", line.us_range[0], line.us_range[1]),
            format!("{:.2}", line.weight_gbps),
            line.speedup_vs_dense.map_or_else(|| "-".into(), |s| format!("{s:.2}x")),
            if line.identical { "identical" } else { "DIFFERS" }.into(),
        ]);
    }
    let n = report.threads;
    format!("CPU, {n} threads, weights cold\n\n{}", table.render(Style::stdout()))
}

fn weight_type(name: WeightName) -> WeightType {
    match name {
        WeightName::Bf16 => WeightType::Bf16,
        WeightName::F16 => WeightType::F16,
        WeightName::Int8 => WeightType::I8,
    }
}

impl From<LayoutName> for Layout {
    fn from(name: LayoutName) -> Self {
        match name {
            LayoutName::Dense => Self::Dense,
            LayoutName::Fixed => Self::Fixed,
            LayoutName::Rans => Self::Rans,
        }
    }
}
