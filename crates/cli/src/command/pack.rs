//! `transom pack`: originals into packed files.

use std::time::Instant;

use serde::Serialize;
use transom::checkpoint::{self, Options};

use crate::Outcome;
use crate::args::Pack;
use crate::output::{self, bytes, seconds};
use crate::progress::Progress;

#[derive(Serialize)]
struct Report {
    source: String,
    destination: String,
    original_bytes: u64,
    packed_bytes: u64,
    /// Files this run has packed, and found packed by an earlier one.
    files_packed: usize,
    files_resumed: usize,
    /// False while shards of other processes are missing.
    complete: bool,
    seconds: f64,
}

/// Packs, and reports sizes.
pub(crate) fn run(args: &Pack) -> anyhow::Result<Outcome> {
    let started = Instant::now();
    let options = Options {
        threads: args.threads.count(),
        force: args.force,
        shard: args.shard,
        ..Options::default()
    };
    let progress = Progress::bytes(args.json.wanted, "packing");
    let packed = checkpoint::pack(&args.src, &args.dst, &options, &progress);
    progress.finish();
    let packed = packed?;
    let report = Report {
        source: args.src.display().to_string(),
        destination: args.dst.display().to_string(),
        original_bytes: packed.original_bytes,
        packed_bytes: packed.packed_bytes,
        files_packed: packed.files_packed,
        files_resumed: packed.files_resumed,
        complete: packed.complete,
        seconds: started.elapsed().as_secs_f64(),
    };
    if args.json.wanted {
        output::print_json(&report)?;
    } else {
        output::print(&summary(&report))?;
    }
    Ok(Outcome::Done)
}

fn summary(report: &Report) -> String {
    let percent = 100.0 * report.packed_bytes as f64 / report.original_bytes.max(1) as f64;
    let mut text = format!(
        "{}: {} -> {} ({percent:.1} %) in {}\n",
        report.destination,
        bytes(report.original_bytes),
        bytes(report.packed_bytes),
        seconds(report.seconds),
    );
    if report.files_resumed > 0 {
        text += &format!("{} files were packed already\n", report.files_resumed);
    }
    if !report.complete {
        text += "shards of other processes are still missing\n";
    }
    text
}
