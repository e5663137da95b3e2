//! `transom compare`: two models side by side.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;
use transom_runtime::compare::{CompareOptions, Comparison, compare};
use transom_runtime::{Model, StoreOptions};

use crate::args::Compare;
use crate::output::{self, Style, flatten, keep_start};
use crate::progress::Progress;
use crate::table::{Align, Table};
use crate::{Outcome, machine, model, page, threads};

/// What `compare` runs without `--prompts`: prose, code, numbers, dialogue and
/// other scripts, so that different parts of a vocabulary are asked for.
pub(crate) const PROMPTS: [&str; 8] = [
    "Once upon a time",
    "The capital of France is",
    "fn main() {\n    let numbers = vec![1, 2, 3];",
    "1, 1, 2, 3, 5, 8, 13,",
    "Q: Why is the sky blue?\nA:",
    "Die Würde des Menschen ist",
    "\"Where are you going?\" she asked.",
    "In 1905, Albert Einstein published",
];

/// The comparison, as JSON gives it and the page shows it.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) base: String,
    pub(crate) other: String,
    pub(crate) layout_base: &'static str,
    pub(crate) layout_other: &'static str,
    /// All tokens and all logits are the same to the bit.
    pub(crate) identical: bool,
    /// For each prompt the first different token, if there is one.
    pub(crate) first_divergence: Vec<Option<usize>>,
    pub(crate) max_abs_logit_diff: f64,
    /// KL(base || other), in nats.
    pub(crate) mean_kl: f64,
    pub(crate) perplexity_base: Option<f64>,
    pub(crate) perplexity_other: Option<f64>,
    pub(crate) prompts: Vec<Prompt>,
}

/// One prompt.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Prompt {
    pub(crate) prompt: String,
    pub(crate) base_ids: Vec<u32>,
    pub(crate) other_ids: Vec<u32>,
    pub(crate) base_text: String,
    pub(crate) other_text: String,
    pub(crate) first_divergence: Option<usize>,
    pub(crate) max_abs_logit_diff: f64,
    pub(crate) mean_kl: f64,
    /// For each token that BASE generated.
    pub(crate) kl: Vec<f64>,
}

/// Loads both models, compares them, and reports.
pub(crate) fn run(args: &Compare) -> anyhow::Result<Outcome> {
    let prompts = match &args.prompts {
        Some(file) => read_prompts(file)?,
        None => PROMPTS.map(str::to_owned).to_vec(),
    };
    let text = args.text.as_deref().map(read_text).transpose()?;
    let report = threads::with(machine::n_cores(), || {
        let layouts = (
            model::layout(&args.base, args.layout_base)?,
            model::layout(&args.other, args.layout_other)?,
        );
        let quiet = args.json.wanted;
        let base = model::load(&args.base, StoreOptions::new(layouts.0), quiet)?;
        let other = model::load(&args.other, StoreOptions::new(layouts.1), quiet)?;
        let options = CompareOptions {
            prompts: &prompts,
            max_tokens: args.max_tokens,
            text: text.as_deref(),
            window: args.window as usize,
        };
        let progress = Progress::count(quiet, "comparing prompts", prompts.len() as u64);
        let comparison = compare(&base, &other, &options, &mut |index| {
            progress.set(index as u64, prompts.len() as u64);
        })?;
        progress.finish();
        let names = [&args.base, &args.other].map(|path| path.display().to_string());
        report(names, [layouts.0.name(), layouts.1.name()], &prompts, &base, comparison)
    })?;
    if let Some(file) = &args.html {
        crate::html::write(file, &page::compare::page(&report))?;
    }
    if args.json.wanted {
        output::print_json(&report)?;
    } else {
        output::print(&summary(&report))?;
    }
    Ok(if is_same(&report) { Outcome::Done } else { Outcome::Differ })
}

/// Perplexities count as well.
fn is_same(report: &Report) -> bool {
    let bits = |perplexity: Option<f64>| perplexity.map(f64::to_bits);
    report.identical && bits(report.perplexity_base) == bits(report.perplexity_other)
}

fn read_text(file: &Path) -> anyhow::Result<String> {
    fs::read_to_string(file).with_context(|| file.display().to_string())
}

/// Lines that are not blank.
fn read_prompts(file: &Path) -> anyhow::Result<Vec<String>> {
    let text = read_text(file)?;
    let prompts: Vec<String> =
        text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect();
    anyhow::ensure!(!prompts.is_empty(), "{}: holds no prompt", file.display());
    Ok(prompts)
}

fn report(
    [base, other]: [String; 2],
    [layout_base, layout_other]: [&'static str; 2],
    prompts: &[String],
    model: &Model,
    comparison: Comparison,
) -> anyhow::Result<Report> {
    let text =
        |prompt_ids: &[u32], ids: &[u32]| model.tokenizer().decode_continuation(prompt_ids, ids);
    let first_divergence = comparison.prompts.iter().map(|p| p.first_divergence).collect();
    let prompts = prompts
        .iter()
        .zip(comparison.prompts)
        .map(|(prompt, found)| {
            Ok(Prompt {
                prompt: prompt.clone(),
                base_text: text(&found.prompt_ids, &found.base_ids)?,
                other_text: text(&found.prompt_ids, &found.other_ids)?,
                base_ids: found.base_ids,
                other_ids: found.other_ids,
                first_divergence: found.first_divergence,
                max_abs_logit_diff: found.max_abs_logit_diff,
                mean_kl: found.mean_kl,
                kl: found.kl,
            })
        })
        .collect::<anyhow::Result<_>>()?;
    Ok(Report {
        base,
        other,
        layout_base,
        layout_other,
        identical: comparison.identical,
        first_divergence,
        max_abs_logit_diff: comparison.max_abs_logit_diff,
        mean_kl: comparison.mean_kl,
        perplexity_base: comparison.perplexity_base,
        perplexity_other: comparison.perplexity_other,
        prompts,
    })
}

fn summary(report: &Report) -> String {
    let style = Style::stdout();
    let mut table = Table::new(&[
        ("prompt", Align::Left),
        ("tokens", Align::Right),
        ("first different", Align::Right),
        ("largest logit difference", Align::Right),
        ("mean KL, nats", Align::Right),
    ]);
    for prompt in &report.prompts {
        table.row([
            keep_start(&flatten(&prompt.prompt), 36),
            prompt.base_ids.len().to_string(),
            prompt.first_divergence.map_or_else(|| "none".into(), |i| format!("token {i}")),
            difference(prompt.max_abs_logit_diff),
            difference(prompt.mean_kl),
        ]);
    }
    let mut text = format!(
        "base   {} ({})\nother  {} ({})\n\n{}\n",
        report.base,
        report.layout_base,
        report.other,
        report.layout_other,
        table.render(style)
    );
    if let (Some(base), Some(other)) = (report.perplexity_base, report.perplexity_other) {
        text += &format!("perplexity: base {base:.6}, other {other:.6}\n");
    }
    text + &match is_same(report) {
        true => style.good("identical: every token and every logit, to the bit\n"),
        false => style.bad("different\n"),
    }
}

fn difference(value: f64) -> String {
    if value == 0.0 { "0".into() } else { format!("{value:.3e}") }
}
