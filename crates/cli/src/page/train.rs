//! The page that `train` writes.

use transom_train::train::{LogLine, TrainOptions};

use crate::html;
use crate::output::grouped;
use crate::svg::{self, Line};

/// The whole page, of a run that may not have ended.
pub(crate) fn page(options: &TrainOptions, log: &[LogLine]) -> String {
    let weights = match &options.quantization {
        None => "BF16".to_owned(),
        Some(quantization) => {
            let rate = match quantization.rate {
                0.0 => String::new(),
                rate => format!(", {rate} nats for each bit of entropy"),
            };
            format!("INT8, a scale per {}{rate}", quantization.granularity.name())
        }
    };
    let subtitle = format!(
        "{} weights in {} layers of width {}; {weights}; seed {}",
        grouped(options.model.n_weights() as u64),
        options.model.num_hidden_layers,
        options.model.hidden_size,
        options.seed,
    );
    html::page("Training", &subtitle, &(totals(options, log) + &perplexity(log) + &loss(log)))
}

fn totals(options: &TrainOptions, log: &[LogLine]) -> String {
    let Some(last) = log.last() else { return String::new() };
    let steps = format!("{} / {}", grouped(last.step as u64), grouped(options.steps as u64));
    let mut cards = vec![
        ("", steps, "steps".to_owned()),
        ("", grouped(last.tokens), "tokens learned from".to_owned()),
        ("", format!("{:.3}", last.loss), "loss of the last step, nats".to_owned()),
    ];
    let latest = |of: fn(&LogLine) -> Option<f64>| log.iter().rev().find_map(of);
    if let Some(perplexity) = latest(|line| line.validation_perplexity) {
        cards.push(("good", format!("{perplexity:.2}"), "validation perplexity".to_owned()));
    }
    if let Some(bits) = latest(|line| line.bits_per_weight) {
        cards.push(("good", format!("{bits:.2}"), "bits of entropy an integer".to_owned()));
    }
    html::cards(&cards)
}

fn perplexity(log: &[LogLine]) -> String {
    let points: Vec<(usize, f64)> =
        log.iter().filter_map(|line| Some((line.step, line.validation_perplexity?))).collect();
    if points.is_empty() {
        return String::new();
    }
    let rows: Vec<Vec<String>> =
        points.iter().map(|(step, value)| vec![step.to_string(), format!("{value:.3}")]).collect();
    let line = Line { class: "mean", tip: "validation perplexity".into(), points };
    let chart = svg::lines("step", "perplexity of text held out", &[line]);
    let table = html::table(&["step", "perplexity"], rows);
    let details = format!("<details><summary>Numbers</summary>{table}</details>");
    let explanation =
        "Of text that is not learned from, by the weights as a checkpoint holds them.";
    html::section("Validation", explanation, &(chart + &details))
}

fn loss(log: &[LogLine]) -> String {
    let points = log.iter().map(|line| (line.step, line.loss)).collect();
    let line = Line { class: "series", tip: "loss".into(), points };
    let chart = svg::lines("step", "loss, nats a token", &[line]);
    html::section("Loss", "Cross-entropy of the sequences of single steps.", &chart)
}
