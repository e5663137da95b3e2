//! `cargo xtask fuzz`: every fuzz target for a while.

use std::fs;

use crate::Failure;
use crate::command::Line;

/// Targets, as in `fuzz/Cargo.toml`.
const TARGETS: [&str; 4] = ["record", "safetensors_header", "round_trip", "isa_agree"];
/// Memory of a target, and of one allocation in it, in MiB.
const LIMITS: [&str; 2] = ["-rss_limit_mb=2048", "-malloc_limit_mb=256"];

/// Runs each target for `seconds`. What they find out stays in
/// `target/fuzz-corpus`, and a failing input in `fuzz/artifacts`.
pub fn run(seconds: u32) -> Result<(), Failure> {
    let time = format!("-max_total_time={seconds}");
    for target in TARGETS {
        println!("\n=== {target} ===\n");
        let (corpus, seeds) =
            (format!("target/fuzz-corpus/{target}"), format!("fuzz/corpus-seed/{target}"));
        fs::create_dir_all(&corpus).map_err(|error| format!("{corpus}: {error}"))?;
        let mut words = vec!["rustup", "run", "nightly", "cargo", "fuzz", "run"];
        words.extend(["--features", "libfuzzer", target, &corpus, &seeds, "--", &time]);
        words.extend(LIMITS);
        Line::new(&words).run()?;
    }
    Ok(())
}
