//! `cargo xtask gpu-bundle`: tests and benchmarks for a machine with a GPU and no Rust.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::Failure;
use crate::command::Line;
use crate::nvcc;

/// What is to be carried.
const FOLDER: &str = "target/gpu-bundle";
/// Compiled for sm_90a alone; apart from the ordinary build, which is for all GPUs.
const BUILD: &str = "target/gpu-bundle-build";
/// Its checkpoint is packed into the bundle if it is there.
const REAL_TENSORS: &str = "../shared/models/gpt2-small-partial";
const MAX_BYTES: u64 = 48 << 20;

/// Makes the folder.
pub fn run() -> Result<(), Failure> {
    let text = |error: std::io::Error| format!("{FOLDER}: {error}");
    if Path::new(FOLDER).exists() {
        fs::remove_dir_all(FOLDER).map_err(text)?;
    }
    fs::create_dir_all(FOLDER).map_err(text)?;
    let env = [
        (nvcc::ARCH_VARIABLE, "90a"),
        ("CARGO_PROFILE_RELEASE_DEBUG", "0"),
        ("CARGO_PROFILE_RELEASE_STRIP", "symbols"),
    ];
    let build = ["--release", "--target-dir", BUILD, "--message-format", "json-render-diagnostics"];

    let words =
        [&["cargo", "build", "-p", "transom-cli", "--features", "cuda"], &build[..]].concat();
    let cli = built(&Line { env: &env, words: &words }, "transom")?;
    let words = [&["cargo", "test", "-p", "transom-cuda", "--test", "gpu", "--no-run"], &build[..]]
        .concat();
    let tests = built(&Line { env: &env, words: &words }, "gpu")?;
    copy(&cli, "transom")?;
    copy(&tests, "gpu-tests")?;

    let packed = format!("{FOLDER}/gpt2-small-partial");
    if Path::new(REAL_TENSORS).is_dir() {
        let cli = cli.to_str().ok_or("the path of the build is not text")?;
        Line::new(&[cli, "pack", REAL_TENSORS, &packed]).run()?;
    } else {
        println!("{REAL_TENSORS} is not there: the bundle has no real tensors");
    }
    let commit = Line::new(&["git", "describe", "--always", "--dirty"]).output()?;
    fs::write(format!("{FOLDER}/commit"), commit).map_err(text)?;
    let script = format!("{FOLDER}/run.sh");
    fs::write(&script, include_str!("gpu_bundle.sh")).map_err(text)?;

    let n_bytes = size(Path::new(FOLDER)).map_err(text)?;
    println!(
        "{FOLDER}: {:.1} MiB; run it with: bash {script} [folder for the results]",
        n_bytes as f64 / (1 << 20) as f64
    );
    if n_bytes > MAX_BYTES {
        return Err(format!("{FOLDER}: {n_bytes} bytes, expected at most {MAX_BYTES}"));
    }
    Ok(())
}

/// Builds, and returns the program of that name, as cargo reports it.
fn built(line: &Line<'_>, name: &str) -> Result<PathBuf, Failure> {
    let output = line.output()?;
    let messages = String::from_utf8_lossy(&output);
    let mut programs = messages.lines().filter_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        let program = message["executable"].as_str()?;
        (message["target"]["name"] == name).then(|| PathBuf::from(program))
    });
    programs.next_back().ok_or_else(|| format!("cargo built no program `{name}`"))
}

/// Copies it, and compresses the copy.
fn copy(program: &Path, name: &str) -> Result<(), Failure> {
    let to = format!("{FOLDER}/{name}");
    fs::copy(program, &to).map_err(|error| format!("{}: {error}", program.display()))?;
    Line::new(&["gzip", "-9", "-n", &to]).run()
}

fn size(folder: &Path) -> std::io::Result<u64> {
    let mut n_bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        n_bytes += if metadata.is_dir() { size(&entry.path())? } else { metadata.len() };
    }
    Ok(n_bytes)
}
