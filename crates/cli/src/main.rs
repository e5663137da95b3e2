//! The command line of transom.

#![forbid(unsafe_code)]

mod args;
mod command;
mod html;
mod logits;
mod machine;
mod measure;
mod model;
mod output;
mod page;
mod progress;
mod svg;
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
        Command::Pack(args) => command::pack::run(&args),
        Command::Unpack(args) => command::unpack::run(&args),
        Command::Verify(args) => command::verify::run(&args),
        Command::Quantize(args) => command::quantize::run(&args),
        Command::Inspect(args) => command::inspect::run(&args),
        Command::Run(args) => command::run::run(&args),
        Command::Compare(args) => command::compare::run(&args),
        Command::Bench(Bench::Codec(args)) => command::bench_codec::run(&args),
        Command::Bench(Bench::Matmul(args)) => command::bench_matmul::run(&args),
        Command::Bench(Bench::Stream(args)) => command::bench_stream::run(&args),
        Command::Bench(Bench::Decode(args)) => command::bench_cuda::decode(&args),
        #[cfg(feature = "train")]
        Command::Train(args) => command::train::run(&args),
        Command::Doctor => command::doctor::run(),
        Command::Demo(args) => command::demo::run(&args),
    }
}
