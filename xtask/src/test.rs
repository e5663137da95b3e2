//! `cargo xtask test`: everything a change has to pass.

use std::time::Instant;

use crate::command::{Count, Line};
use crate::{Failure, hygiene, interpreter, kernels, licences};

/// Does its work and says how many tests it ran.
type Step = fn() -> Result<Count, Failure>;

/// The steps, cheapest first.
const STEPS: &[(&str, Step)] = &[
    ("files in git", hygiene::check),
    ("format", format),
    ("licences", licences::check),
    ("GPU kernels", kernels::check_ordinary),
    ("lints", lints),
    ("documentation", documentation),
    ("library, with debug assertions and overflow checks", library),
    ("GPU kernels, interpreted", interpreter::run),
    ("everything, optimised", everything),
];

/// Tests that need Python fail without it instead of being skipped.
const NO_SKIPPING: (&str, &str) = ("CI", "1");

/// The GPU that the crate is compiled for in these steps; the step before them
/// has compiled for the others too.
const ONE_GPU: (&str, &str) = (crate::nvcc::ARCH_VARIABLE, "90a");

/// Runs every step; stops at the first that fails.
pub fn run() -> Result<(), Failure> {
    let start = Instant::now();
    let mut total = Count::default();
    for (index, (name, step)) in STEPS.iter().enumerate() {
        println!("\n=== {} of {}: {name} ===\n", index + 1, STEPS.len());
        let step_start = Instant::now();
        total.add(step()?);
        println!("\n--- {:.1} s", step_start.elapsed().as_secs_f64());
    }
    println!("\nall {} steps done in {:.0} s", STEPS.len(), start.elapsed().as_secs_f64());
    println!("{} passed, {} failed, {} skipped", total.passed, total.failed, total.ignored);
    Ok(())
}

fn format() -> Result<Count, Failure> {
    Line::new(&["cargo", "fmt", "--all", "--check"]).run()?;
    Ok(Count::default())
}

fn lints() -> Result<Count, Failure> {
    let words = ["cargo", "clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
    Line { env: &[ONE_GPU], words: &words }.run()?;
    let words =
        ["cargo", "clippy", "-p", "transom-cli", "--features", "cuda,train", "--all-targets"];
    Line { env: &[ONE_GPU], words: &[&words[..], &["--", "-D", "warnings"]].concat() }.run()?;
    Ok(Count::default())
}

/// Broken links are errors here. Of the libraries only: doc comments of the
/// command are in part its help texts, where brackets are just brackets.
fn documentation() -> Result<Count, Failure> {
    let words = ["cargo", "doc", "--workspace", "--lib", "--no-deps", "--document-private-items"];
    Line { env: &[ONE_GPU, ("RUSTDOCFLAGS", "-D warnings")], words: &words }.run()?;
    Ok(Count::default())
}

/// Overflow checks and debug assertions are on, and so are cheap optimisations.
/// The suite of `crates/core/src/tests` forces each instruction set in turn.
fn library() -> Result<Count, Failure> {
    let words = ["cargo", "test", "--package", "transom", "--lib", "--tests"];
    Line { env: &[NO_SKIPPING, ("CARGO_PROFILE_DEV_OPT_LEVEL", "1")], words: &words }.count_tests()
}

/// Includes the reference decoder, the documentation's examples and the seeds
/// of the fuzz corpus.
fn everything() -> Result<Count, Failure> {
    let words = ["cargo", "test", "--workspace", "--release"];
    let mut count = Line { env: &[NO_SKIPPING, ONE_GPU], words: &words }.count_tests()?;
    let words = ["cargo", "test", "--package", "transom-cli", "--release", "--features", "train"];
    let only = ["--test", "cli", "--", "train::"];
    count.add(Line { env: &[NO_SKIPPING], words: &[&words[..], &only].concat() }.count_tests()?);
    Ok(count)
}
