//! The command line of transom.

#![forbid(unsafe_code)]

mod args;
mod command;
mod machine;
mod measure;
mod output;
mod progress;
mod synthetic;
mod table;
mod threads;

use std::process::ExitCode;

use args::{Bench, Cli, Command};
use clap::Parser;
use output::StdoutClosed;

/// How a command that did not fail ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Everything asked for is done: exit code 0.
    Done,
    /// It ran, and data differ from what they should be: exit code 1.
    Differ,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Differ) => ExitCode::from(1),
        // Whoever reads the output has seen enough.
        Err(error) if error.is::<StdoutClosed>() => ExitCode::SUCCESS,
        Err(error) => {
            output::report(&error);
            ExitCode::from(2)
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<Outcome> {
    match cli.command {
        Command::Bench(Bench::Codec(args)) => command::bench_codec::run(&args),
        Command::Bench(Bench::Matmul(args)) => command::bench_matmul::run(&args),
        Command::Doctor => command::doctor::run(),
    }
}
