//! `transom inspect`: sizes and entropies, tensor by tensor.

use std::path::{Path, PathBuf};

use serde::Serialize;
use transom::checkpoint::{self, Inspection, Options};

use crate::Outcome;
use crate::args::Inspect;
use crate::output::{self, Style, grouped, keep_end};
use crate::page;
use crate::progress::Progress;
use crate::table::{Align, Table};

/// What is known of a checkpoint.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) path: PathBuf,
    /// Whether it holds records.
    pub(crate) packed: bool,
    pub(crate) original_bytes: u64,
    /// Of the records; null in an original.
    pub(crate) packed_bytes: Option<u64>,
    pub(crate) weights: u64,
    pub(crate) bits_per_weight: f64,
    /// Order-0 floor, a weight.
    pub(crate) entropy_bits: f64,
    pub(crate) tensors: Vec<Tensor>,
}

/// What is known of a tensor.
#[derive(Debug, Serialize)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) weights: u64,
    pub(crate) original_bytes: u64,
    pub(crate) packed_bytes: Option<u64>,
    pub(crate) entropy_bits: f64,
    pub(crate) bits_per_weight: f64,
    /// Of the first plane; empty if it is never coded.
    #[serde(skip)]
    pub(crate) histogram: Vec<u64>,
}

impl Report {
    fn new(path: &Path, found: Inspection) -> Self {
        let tensors = found.tensors.into_iter().map(|tensor| Tensor {
            name: tensor.name,
            dtype: tensor.dtype,
            weights: tensor.shape.iter().map(|&side| side as u64).product(),
            shape: tensor.shape,
            original_bytes: tensor.original_bytes,
            packed_bytes: tensor.packed_bytes,
            entropy_bits: tensor.entropy_bits,
            bits_per_weight: tensor.bits_per_weight,
            histogram: tensor.histogram,
        });
        Self {
            path: path.to_owned(),
            packed: found.packed,
            original_bytes: found.original_bytes,
            packed_bytes: found.packed_bytes,
            weights: found.weights,
            bits_per_weight: found.bits_per_weight,
            entropy_bits: found.entropy_bits,
            tensors: tensors.collect(),
        }
    }
}

/// Prints the report, and writes the page if asked to.
pub(crate) fn run(args: &Inspect) -> anyhow::Result<Outcome> {
    let progress = Progress::bytes(args.json.wanted, "reading");
    let found = checkpoint::inspect(&args.path, &Options::default(), &progress);
    progress.finish();
    let report = Report::new(&args.path, found?);
    if let Some(file) = &args.html {
        crate::html::write(file, &page::inspect::page(&report))?;
    }
    if args.json.wanted {
        output::print_json(&report)?;
    } else {
        output::print(&text(&report))?;
    }
    Ok(Outcome::Done)
}

/// `[4096, 14336]` as `4096x14336`.
pub(crate) fn shape(shape: &[usize]) -> String {
    match shape {
        [] => "scalar".into(),
        _ => shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x"),
    }
}

fn text(report: &Report) -> String {
    let style = Style::stdout();
    let stored = if report.packed { "packed" } else { "stored" };
    let mut table = Table::new(&[
        ("tensor", Align::Left),
        ("dtype", Align::Left),
        ("shape", Align::Right),
        ("original", Align::Right),
        (stored, Align::Right),
        ("bits/weight", Align::Right),
        ("floor", Align::Right),
        ("over floor", Align::Right),
    ]);
    for tensor in &report.tensors {
        table.row([
            keep_end(&tensor.name, 60),
            tensor.dtype.clone(),
            shape(&tensor.shape),
            grouped(tensor.original_bytes),
            grouped(tensor.packed_bytes.unwrap_or(tensor.original_bytes)),
            format!("{:.3}", tensor.bits_per_weight),
            format!("{:.3}", tensor.entropy_bits),
            format!("{:+.3}", tensor.bits_per_weight - tensor.entropy_bits),
        ]);
    }
    table.render(style) + "\n" + &totals(report, style)
}

fn totals(report: &Report, style: Style) -> String {
    let per_weight = |bits: f64| format!("{bits:.3} bits a weight");
    let share = |n: u64| 100.0 * n as f64 / report.original_bytes.max(1) as f64;
    let floor_bytes = (report.entropy_bits * report.weights as f64 / 8.0).round() as u64;
    let line = |name: &str, n: u64, rest: String| {
        format!(
            "{} {:>20} B  {:>6.2} %  {rest}\n",
            style.bold(&format!("{name:<9}")),
            grouped(n),
            share(n)
        )
    };
    let mut text = format!(
        "{} tensors, {} weights\n",
        grouped(report.tensors.len() as u64),
        grouped(report.weights)
    );
    let original_bits = report.original_bytes as f64 * 8.0 / report.weights.max(1) as f64;
    text += &line("original", report.original_bytes, per_weight(original_bits));
    if let Some(packed_bytes) = report.packed_bytes {
        let over = report.bits_per_weight - report.entropy_bits;
        let rest = format!("{}, {over:+.3} over the floor", per_weight(report.bits_per_weight));
        text += &line("packed", packed_bytes, rest);
    }
    text + &line("floor", floor_bytes, per_weight(report.entropy_bits))
}
