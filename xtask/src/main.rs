//! Chores of this repository: `cargo xtask <verb>`.

#![forbid(unsafe_code)]
// The output of this program is for people at a terminal.
#![allow(clippy::print_stdout)]

mod command;
mod cuda_toolkit;
mod fuzz;
mod golden;
mod gpu_bundle;
mod hygiene;
mod int8;
mod interpreter;
mod kernels;
mod licences;
#[path = "../../crates/cuda/build/nvcc.rs"]
mod nvcc;
mod test;

use std::process::ExitCode;

/// What went wrong, and where possible the command that shows it again.
type Failure = String;

const USAGE: &str = "\
usage: cargo xtask <verb>

  test              everything a change has to pass
  golden            write the generated files anew
  fuzz [seconds]    run every fuzz target for so long, 60 seconds unless told
                    (needs cargo-fuzz, a nightly toolchain and a C++ compiler)
  cuda-toolkit      install the compiler of the GPU kernels into target
                    (needs Python 3 with pip, and PyPI)
  kernels [--all]   compile the GPU kernels and check their machine code: those for
                    sm_90a and one for each other architecture, or all for all
  interpreter [seed]
                    run the GPU kernels in an interpreter, without a GPU
  gpu-bundle        make the folder target/gpu-bundle, to be carried to a machine with
                    a GPU and no Rust; its run.sh runs tests and benchmarks
  int8-experiment DIR [cpu|cuda]
                    train in DIR what is not there, quantise, pack, compare, and write
                    docs/experiments/int8.md";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = std::env::set_current_dir(command::root())
        .map_err(|error| format!("{}: {error}", command::root().display()))
        .and_then(|()| match args[..] {
            ["test"] => test::run(),
            ["golden"] => golden::run(),
            ["fuzz"] => fuzz::run(60),
            ["fuzz", seconds] => match seconds.parse() {
                Ok(seconds) => fuzz::run(seconds),
                Err(_) => Err(format!("`{seconds}` is no number of seconds\n\n{USAGE}")),
            },
            ["cuda-toolkit"] => cuda_toolkit::run(),
            ["kernels"] => kernels::run(kernels::Scope::Ordinary),
            ["kernels", "--all"] => kernels::run(kernels::Scope::All),
            ["interpreter"] => interpreter::run().map(|_| ()),
            ["interpreter", seed] => interpreter::run_with(seed).map(|_| ()),
            ["gpu-bundle"] => gpu_bundle::run(),
            ["int8-experiment", folder] => int8::run(folder, "cpu"),
            ["int8-experiment", folder, device @ ("cpu" | "cuda")] => int8::run(folder, device),
            _ => Err(USAGE.to_owned()),
        });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}
