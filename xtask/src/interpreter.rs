//! The GPU kernels in an interpreter, without a GPU: `crates/cuda/interpreter`.

use std::path::Path;
use std::process::Command;

use crate::Failure;
use crate::command::{Count, Line};
use crate::nvcc;

const KERNELS: &str = "crates/cuda/kernels";
const PROGRAM: &str = "crates/cuda/interpreter/run.py";
const PTX: &str = "target/interpreter/ptx";
const MATRICES: &str = "target/interpreter/matrices";
/// What the kernels are translated for.
const ARCH: &str = "90a";

/// Where pip puts numpy.
const PACKAGES: &str = "target/interpreter/python";
const NUMPY: &str = "numpy==2.3.5";
/// What is installed, once it is whole.
const STAMP: &str = "target/interpreter/python/installed.txt";

/// The seed of `cargo xtask test`: a check that passes has to pass again.
const SEED: &str = "1";

/// Runs every case with the usual seed.
pub fn run() -> Result<Count, Failure> {
    run_with(SEED)
}

/// Runs every case. Without Python that is a failure in CI and otherwise skipped.
pub fn run_with(seed: &str) -> Result<Count, Failure> {
    let python = Command::new("python3").args(["-m", "pip", "--version"]).output();
    if !python.is_ok_and(|output| output.status.success()) {
        if std::env::var_os("CI").is_some() {
            return Err("CI needs python3 with pip to interpret the GPU kernels".to_owned());
        }
        println!("SKIPPED: python3 with pip is missing, the GPU kernels are not interpreted");
        return Ok(Count { ignored: 1, ..Count::default() });
    }
    crate::cuda_toolkit::run()?;
    install_numpy()?;
    translate()?;
    write_matrices()?;
    let words = ["python3", PROGRAM, PTX, MATRICES, "--seed", seed];
    let env =
        [("PYTHONPATH", PACKAGES), ("PYTHONDONTWRITEBYTECODE", "1"), ("OPENBLAS_NUM_THREADS", "1")];
    Line { env: &env, words: &words }.count_tests()
}

fn install_numpy() -> Result<(), Failure> {
    // The wheel is made for one version of Python.
    let version = Line::new(&["python3", "--version"]).output()?;
    let wanted = format!("{NUMPY}, {}", String::from_utf8_lossy(&version).trim());
    if std::fs::read_to_string(STAMP).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    empty(PACKAGES)?;
    let pip = ["python3", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
    let options = ["--no-deps", "--only-binary=:all:", "--no-compile", "--target", PACKAGES, NUMPY];
    Line::new(&[&pip[..], &options].concat()).run()?;
    std::fs::write(STAMP, wanted).map_err(|error| format!("{STAMP}: {error}"))
}

/// Kernels -> PTX.
fn translate() -> Result<(), Failure> {
    let compiler = nvcc::program(&crate::command::root(), "nvcc")?;
    empty(PTX)?;
    let sources = nvcc::sources(Path::new(KERNELS))?;
    std::thread::scope(|scope| {
        let translate = |source: &Path| {
            let name = source.file_stem().expect("a source has a name");
            let out = Path::new(PTX).join(name).with_extension("ptx");
            nvcc::translate(&compiler, source, ARCH, &out)
        };
        let jobs: Vec<_> =
            sources.iter().map(|source| scope.spawn(move || translate(source))).collect();
        jobs.into_iter().try_for_each(|job| job.join().expect("no job panics"))
    })
}

/// By the encoders of the libraries.
fn write_matrices() -> Result<(), Failure> {
    empty(MATRICES)?;
    let words = ["cargo", "run", "--quiet", "--release", "--package", "transom-cuda"];
    let example = ["--example", "interpreter_matrices", "--", MATRICES];
    let env = [(nvcc::ARCH_VARIABLE, ARCH)];
    Line { env: &env, words: &[&words[..], &example].concat() }.run()
}

/// Makes an empty folder.
fn empty(folder: &str) -> Result<(), Failure> {
    let text = |error: std::io::Error| format!("{folder}: {error}");
    if Path::new(folder).exists() {
        std::fs::remove_dir_all(folder).map_err(text)?;
    }
    std::fs::create_dir_all(folder).map_err(text)
}
