//! The page of `compare --html`.

use crate::command::compare::{Prompt, Report};
use crate::html::{self, escape};
use crate::output::{flatten, grouped, keep_start};
use crate::svg::{self, Line};

/// The whole page.
pub(crate) fn page(report: &Report) -> String {
    let title = if report.identical { "Identical to the bit" } else { "The models differ" };
    let subtitle = format!(
        "{} ({}) against {} ({})",
        report.base, report.layout_base, report.other, report.layout_other
    );
    let body =
        totals(report) + &tokens(report) + &parted(report) + &divergence(report) + &texts(report);
    html::page(title, &subtitle, &body)
}

fn totals(report: &Report) -> String {
    let n_tokens: usize = report.prompts.iter().map(|p| p.base_ids.len()).sum();
    let n_same = report.first_divergence.iter().filter(|d| d.is_none()).count();
    let n_prompts = report.prompts.len();
    let class = |good: bool| if good { "good" } else { "bad" };
    let mut cards = vec![
        (
            class(n_same == n_prompts),
            format!("{n_same} / {n_prompts}"),
            "prompts with the same text".into(),
        ),
        ("", grouped(n_tokens as u64), "tokens compared".to_owned()),
        (
            class(report.max_abs_logit_diff == 0.0),
            number(report.max_abs_logit_diff),
            "largest difference of a logit".into(),
        ),
        (class(report.mean_kl == 0.0), number(report.mean_kl), "mean KL divergence, nats".into()),
    ];
    if let (Some(base), Some(other)) = (report.perplexity_base, report.perplexity_other) {
        let label = format!("perplexity, base {base:.4}");
        cards.push((class(base.to_bits() == other.to_bits()), format!("{other:.4}"), label));
    }
    html::cards(&cards)
}

fn number(value: f64) -> String {
    match value {
        0.0 => "0".into(),
        v if v < 1e-3 => format!("{v:.2e}"),
        v => format!("{v:.4}"),
    }
}

/// A strip of cells for each prompt: equal and unequal tokens.
fn tokens(report: &Report) -> String {
    let rows: Vec<svg::Stack> = report
        .prompts
        .iter()
        .map(|prompt| {
            let parts = runs(prompt)
                .into_iter()
                .map(|(same, n)| {
                    let word = if same { "equal" } else { "different" };
                    let class = if same { "coded" } else { "differ" };
                    (class, n as f64, format!("{n} {word} tokens"))
                })
                .collect();
            let note = match prompt.first_divergence {
                None => "all equal".into(),
                Some(index) => format!("differs from token {index}"),
            };
            svg::Stack { name: keep_start(&flatten(&prompt.prompt), 26), parts, note }
        })
        .collect();
    let chart = svg::stacks("tokens by prompt", &rows);
    html::section(
        "Tokens, prompt by prompt",
        "Each bar is the text that BASE generated. After a first different token the two models \
         write different texts, so equal tokens behind it are chance.",
        &(chart + &html::key(&[("coded", "equal"), ("bad", "different")])),
    )
}

/// Lengths of runs of equal and of different tokens.
fn runs(prompt: &Prompt) -> Vec<(bool, usize)> {
    let mut runs: Vec<(bool, usize)> = Vec::new();
    let n = prompt.base_ids.len().max(prompt.other_ids.len());
    for i in 0..n {
        let same = prompt.base_ids.get(i) == prompt.other_ids.get(i);
        match runs.last_mut() {
            Some(run) if run.0 == same => run.1 += 1,
            _ => runs.push((same, 1)),
        }
    }
    runs
}

/// How many of the prompts have had a different token, along the texts.
fn parted(report: &Report) -> String {
    if report.first_divergence.iter().all(Option::is_none) {
        return String::new();
    }
    let n = report.prompts.iter().map(|p| p.base_ids.len()).max().unwrap_or(0);
    let share = |token: usize| {
        let parted = report.first_divergence.iter().flatten().filter(|&&first| first <= token);
        100.0 * parted.count() as f64 / report.prompts.len().max(1) as f64
    };
    let values: Vec<f64> = (0..n).map(share).collect();
    let line = Line::through("mean", "prompts that have parted".into(), &values);
    let chart = svg::lines("token generated", "prompts whose texts differ so far, %", &[line]);
    html::section(
        "Divergence by position",
        "Each model reads what it has written itself, so that one different token changes all that \
         follows.",
        &(chart + &html::key(&[("sign", "share of the prompts")])),
    )
}

/// KL divergence along the texts.
fn divergence(report: &Report) -> String {
    if report.prompts.iter().flat_map(|p| &p.kl).all(|&kl| kl == 0.0) {
        return html::section(
            "KL divergence by position",
            "Zero at every position of every prompt: both models assign every token of the \
             vocabulary the same probability, to the bit.",
            "",
        );
    }
    let mut lines: Vec<Line> =
        report.prompts.iter().map(|p| Line::through("series", p.prompt.clone(), &p.kl)).collect();
    lines.push(Line::through("mean", "mean of the prompts".into(), &mean(report)));
    let chart = svg::lines("token generated", "KL(base || other), nats", &lines);
    html::section(
        "KL divergence by position",
        "How far the distribution of the next token differs, both models reading the same text. \
         One line a prompt, and their mean.",
        &(chart + &html::key(&[("coded", "a prompt"), ("sign", "mean")])),
    )
}

fn mean(report: &Report) -> Vec<f64> {
    let n = report.prompts.iter().map(|p| p.kl.len()).max().unwrap_or(0);
    (0..n)
        .map(|i| {
            let values: Vec<f64> =
                report.prompts.iter().filter_map(|p| p.kl.get(i).copied()).collect();
            values.iter().sum::<f64>() / values.len() as f64
        })
        .collect()
}

fn texts(report: &Report) -> String {
    let rows: String = report
        .prompts
        .iter()
        .map(|p| {
            let mut cells = format!("<td class=\"text\">{}</td>", escape(&p.prompt));
            cells += &format!("<td class=\"text\">{}</td>", escape(&p.base_text));
            cells += &match p.first_divergence {
                None => "<td class=\"text\">the same</td>".to_owned(),
                Some(_) => format!("<td class=\"text\">{}</td>", escape(&p.other_text)),
            };
            format!("<tr>{cells}</tr>\n")
        })
        .collect();
    let table = format!(
        "<div class=\"wide\"><table class=\"texts\"><tr><th>prompt</th><th>base</th><th>other</th></tr>\n\
         {rows}</table></div>"
    );
    let explanation = "What each model generated, always taking the most likely token.";
    html::section("Texts", explanation, &table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_both_texts() {
        let mut prompt = Prompt {
            base_ids: vec![1, 2, 3, 4],
            other_ids: vec![1, 2, 9, 4, 5],
            ..Prompt::default()
        };
        assert_eq!(runs(&prompt), [(true, 2), (false, 1), (true, 1), (false, 1)]);
        prompt.other_ids = prompt.base_ids.clone();
        assert_eq!(runs(&prompt), [(true, 4)]);
    }
}
