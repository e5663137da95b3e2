//! `cargo xtask cuda-toolkit`: the kernel compiler, from PyPI, into `target`.

use std::path::Path;

use crate::Failure;
use crate::command::Line;

/// Where pip puts the packages; `crates/cuda/build/nvcc.rs` looks there.
const FOLDER: &str = "target/cuda-toolkit";
/// What is installed, once it is whole.
const STAMP: &str = "target/cuda-toolkit/installed.txt";

/// The packages, exact: code made by a newer CUDA does not load with the
/// drivers that this one supports.
const PACKAGES: [&str; 7] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-cuobjdump==13.2.86",
    "nvidia-cuda-nvdisasm==13.2.86",
];

/// Programs that have to be there afterwards.
const PROGRAMS: [&str; 3] = ["nvcc", "cuobjdump", "nvdisasm"];

/// Installs what is not installed yet.
pub fn run() -> Result<(), Failure> {
    let wanted = PACKAGES.join("\n");
    if std::fs::read_to_string(STAMP).is_ok_and(|found| found == wanted) && missing().is_none() {
        println!("{FOLDER}: the CUDA toolkit is there");
        return Ok(());
    }
    let python = "The CUDA toolkit comes from PyPI: Python 3 with pip is needed.";
    if Line::new(&["python3", "-m", "pip", "--version"]).run().is_err() {
        return Err(format!("`python3 -m pip` does not work. {python}"));
    }
    // A half installed one, or another version.
    if Path::new(FOLDER).exists() {
        std::fs::remove_dir_all(FOLDER).map_err(|error| format!("{FOLDER}: {error}"))?;
    }
    let pip = ["python3", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
    let options = ["--no-deps", "--only-binary=:all:", "--no-compile", "--target", FOLDER];
    Line::new(&[&pip[..], &options, &PACKAGES].concat()).run()?;
    if let Some(program) = missing() {
        return Err(format!("{FOLDER}: the packages are installed and hold no {program}"));
    }
    std::fs::write(STAMP, wanted).map_err(|error| format!("{STAMP}: {error}"))?;
    println!("{FOLDER}: the CUDA toolkit is installed");
    Ok(())
}

fn missing() -> Option<&'static str> {
    let bin = Path::new(crate::nvcc::INSTALLED).join("bin");
    PROGRAMS.into_iter().find(|program| !bin.join(program).is_file())
}
