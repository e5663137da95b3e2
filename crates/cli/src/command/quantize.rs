//! `transom quantize`: floating-point weights into integers.

use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use anyhow::Context as _;
use serde::Serialize;
use transom::checkpoint::{self, Options, QuantizeOptions, QuantizeReport, QuantizedTensor};
use transom::layout::Layout;
use transom_runtime::StoreOptions;
use transom_runtime::calibrate::input_squares;

use crate::args::Quantize;
use crate::output::{self, Style, bytes, keep_end, seconds};
use crate::progress::Progress;
use crate::table::{Align, Table};
use crate::{Outcome, model, threads};

#[derive(Serialize)]
struct Report {
    source: String,
    destination: String,
    granularity: &'static str,
    target_bits: Option<f64>,
    /// What the errors of `rate` are those of: `weights` or `outputs`.
    minimised: Option<&'static str>,
    /// Bits of the quantised matrices once packed, without their scales.
    bits_per_weight: Option<f64>,
    #[serde(flatten)]
    quantized: QuantizeReport,
    seconds: f64,
}

/// Quantises, and reports sizes and errors.
pub(crate) fn run(args: &Quantize) -> anyhow::Result<Outcome> {
    let started = Instant::now();
    let input_squares = match &args.calibration {
        Some(text) => threads::with(args.threads.count(), || calibrate(args, text))?,
        None => HashMap::new(),
    };
    let selects = |name: &str| {
        let wanted = match &args.include {
            Some(include) => include.is_match(name),
            None => checkpoint::is_default(name),
        };
        wanted && !args.skip.as_ref().is_some_and(|skip| skip.is_match(name))
    };
    let options = Options { threads: args.threads.count(), ..Options::default() };
    let quantize = QuantizeOptions {
        granularity: args.granularity.into(),
        selects: &selects,
        target_bits: args.target_bits,
        input_squares: &input_squares,
        baseline: false,
    };
    let progress = Progress::bytes(args.json.wanted, "quantising");
    let quantized = checkpoint::quantize(&args.src, &args.dst, &quantize, &options, &progress);
    progress.finish();
    let quantized = quantized?;
    let minimised = if input_squares.is_empty() { "weights" } else { "outputs" };
    let report = Report {
        source: args.src.display().to_string(),
        destination: args.dst.display().to_string(),
        granularity: quantize.granularity.name(),
        target_bits: args.target_bits,
        minimised: args.target_bits.map(|_| minimised),
        bits_per_weight: mean_bits(&quantized.tensors),
        quantized,
        seconds: started.elapsed().as_secs_f64(),
    };
    if args.json.wanted {
        output::print_json(&report)?;
    } else {
        output::print(&text(&report))?;
    }
    Ok(Outcome::Done)
}

/// The mean squares of the inputs on a text.
fn calibrate(args: &Quantize, text: &Path) -> anyhow::Result<HashMap<String, Vec<f32>>> {
    let path = text;
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let model = model::load(&args.src, StoreOptions::new(Layout::Dense), args.json.wanted)?;
    let progress = Progress::count(args.json.wanted, "calibrating, tokens", 0);
    let squares = input_squares(model, &text, |done, total| {
        progress.set(done as u64, total as u64);
    });
    progress.finish();
    squares.with_context(|| path.display().to_string())
}

fn n_weights(tensor: &QuantizedTensor) -> f64 {
    (tensor.shape[0] * tensor.shape[1]) as f64
}

fn mean_bits(tensors: &[QuantizedTensor]) -> Option<f64> {
    let bits = |tensor: &QuantizedTensor| Some(tensor.rate?.bits * n_weights(tensor));
    let sum: Option<f64> = tensors.iter().map(bits).sum();
    Some(sum? / tensors.iter().map(n_weights).sum::<f64>())
}

fn text(report: &Report) -> String {
    let has_rate = report.target_bits.is_some();
    let mut columns =
        vec![("matrix", Align::Left), ("shape", Align::Right), ("error", Align::Right)];
    if has_rate {
        columns.extend([
            ("bits/weight", Align::Right),
            ("minimised error", Align::Right),
            ("absmax/L: bits", Align::Right),
            ("its error", Align::Right),
        ]);
    }
    let mut table = Table::new(&columns);
    let percent = |error: f64| format!("{:.3} %", 100.0 * error);
    for tensor in &report.quantized.tensors {
        let mut row = vec![
            keep_end(&tensor.name, 60),
            super::inspect::shape(&tensor.shape),
            percent(tensor.relative_error),
        ];
        if let Some(rate) = &tensor.rate {
            row.extend([
                format!("{:.3}", rate.bits),
                percent(rate.error),
                format!("{:.3}", rate.baseline_bits),
                percent(rate.baseline_error),
            ]);
        }
        table.row(row);
    }
    let mut text = table.render(Style::stdout()) + "\n";
    if let (Some(bits), Some(what)) = (report.bits_per_weight, report.minimised) {
        text += &format!("{bits:.3} bits a weight once packed; least error of the {what}\n");
    }
    text + &format!(
        "{}: {} -> {} in {}; {} matrices are INT8, one scale for each {}\n",
        report.destination,
        bytes(report.quantized.original_bytes),
        bytes(report.quantized.quantized_bytes),
        seconds(report.seconds),
        report.quantized.tensors.len(),
        report.granularity,
    )
}
