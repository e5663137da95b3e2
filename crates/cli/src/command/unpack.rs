//! `transom unpack`: packed files into the originals.

use std::time::Instant;

use serde::Serialize;
use transom::checkpoint::{self, Options};

use crate::Outcome;
use crate::args::Unpack;
use crate::output::{self, bytes, seconds};
use crate::progress::Progress;

#[derive(Serialize)]
struct Report {
    source: String,
    destination: String,
    original_bytes: u64,
    files: usize,
    seconds: f64,
}

/// Unpacks, and reports what was restored.
pub(crate) fn run(args: &Unpack) -> anyhow::Result<Outcome> {
    let started = Instant::now();
    let options =
        Options { threads: args.threads.count(), force: args.force, ..Options::default() };
    let progress = Progress::bytes(args.json.wanted, "unpacking");
    let unpacked = checkpoint::unpack(&args.src, &args.dst, &options, &progress);
    progress.finish();
    let unpacked = unpacked?;
    let report = Report {
        source: args.src.display().to_string(),
        destination: args.dst.display().to_string(),
        original_bytes: unpacked.original_bytes,
        files: unpacked.files,
        seconds: started.elapsed().as_secs_f64(),
    };
    if args.json.wanted {
        output::print_json(&report)?;
    } else {
        output::print(&format!(
            "{}: {} files, {}, as they were before packing, in {}\n",
            report.destination,
            report.files,
            bytes(report.original_bytes),
            seconds(report.seconds),
        ))?;
    }
    Ok(Outcome::Done)
}
