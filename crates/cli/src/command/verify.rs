//! `transom verify`: whether packed files are whole, and equal the originals.

use serde::Serialize;
use transom::checkpoint::{self, Difference, Options};

use crate::Outcome;
use crate::args::Verify;
use crate::output::{self, Style, bytes};
use crate::progress::Progress;

#[derive(Serialize)]
struct Report {
    packed: String,
    against: Option<String>,
    ok: bool,
    files: usize,
    tensors: usize,
    original_bytes: u64,
    /// What is damaged or differs, and where.
    differences: Vec<String>,
}

/// Verifies everything; one bad file does not hide the rest.
pub(crate) fn run(args: &Verify) -> anyhow::Result<Outcome> {
    let progress = Progress::bytes(args.json.wanted, "verifying");
    let against = args.against.as_deref();
    let found = checkpoint::verify(&args.packed, against, &Options::default(), &progress);
    progress.finish();
    let found = found?;
    let report = Report {
        packed: args.packed.display().to_string(),
        against: against.map(|path| path.display().to_string()),
        ok: found.differences.is_empty(),
        files: found.files,
        tensors: found.tensors,
        original_bytes: found.original_bytes,
        differences: found.differences.iter().map(describe).collect(),
    };
    if args.json.wanted {
        output::print_json(&report)?;
    } else {
        report.differences.iter().for_each(|line| output::note(&format!("transom: {line}")));
        output::print(&summary(&report))?;
    }
    Ok(if report.ok { Outcome::Done } else { Outcome::Differ })
}

/// `file: what is wrong`.
pub(crate) fn describe(difference: &Difference) -> String {
    format!("{}: {}", difference.file.display(), difference.what)
}

fn summary(report: &Report) -> String {
    let style = Style::stdout();
    let what = format!(
        "{}: {} files, {} tensors, {}",
        report.packed,
        report.files,
        report.tensors,
        bytes(report.original_bytes)
    );
    let verdict = match (report.ok, &report.against) {
        (true, None) => style.good("whole"),
        (true, Some(original)) => style.good(&format!("whole, and identical to {original}")),
        (false, _) => style.bad(&format!("{} differences", report.differences.len())),
    };
    format!("{what}: {verdict}\n")
}
