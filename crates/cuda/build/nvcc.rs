//! The kernel compiler: where it is, how it is called, for which GPUs.
//!
//! Used by the build script of this crate and by `cargo xtask kernels`, so that
//! both compile the kernels in the same way.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Folder of the compiler that `cargo xtask cuda-toolkit` installs, from the
/// root of the repository.
pub const INSTALLED: &str = "target/cuda-toolkit/nvidia/cu13";

/// Architectures of a release, as nvcc names them without `sm_`. The last also
/// comes as PTX, from which the driver makes code for newer GPUs.
pub const RELEASE: [&str; 6] = ["80", "86", "89", "90a", "100a", "120"];

/// Selects architectures of [`RELEASE`], separated by commas; `all` is all of them.
pub const ARCH_VARIABLE: &str = "TRANSOM_CUDA_ARCH";

/// Finds a program of the CUDA toolkit: in the toolkit of this repository, or
/// on the path. For `nvcc`, the variable NVCC comes first.
pub fn program(repository: &Path, name: &str) -> Result<PathBuf, String> {
    let named = (name == "nvcc").then(|| std::env::var_os("NVCC")).flatten().map(PathBuf::from);
    let installed = repository.join(INSTALLED).join("bin").join(name);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|folder| folder.join(name));
    let mut candidates = named.into_iter().chain([installed]).chain(on_path);
    candidates.find(|candidate| candidate.is_file()).ok_or_else(|| {
        format!("there is no {name}, which the GPU kernels need. To install it:\n\n    cargo xtask cuda-toolkit\n")
    })
}

/// What nvcc is told besides architectures and files.
pub const FLAGS: [&str; 6] =
    ["-std=c++17", "-O3", "-lineinfo", "-Werror", "all-warnings", "-fatbin"];

/// The options for these architectures. The short `-arch=sm_90a` would also
/// compile for plain sm_90.
pub fn generate(architectures: &[&str]) -> Vec<String> {
    let mut options: Vec<String> = architectures
        .iter()
        .map(|arch| format!("-gencode=arch=compute_{arch},code=sm_{arch}"))
        .collect();
    if architectures == RELEASE {
        let newest = RELEASE[RELEASE.len() - 1];
        options.push(format!("-gencode=arch=compute_{newest},code=compute_{newest}"));
    }
    options
}

/// Compiles one source into PTX for one architecture.
#[allow(dead_code, reason = "only for the interpreter of cargo xtask test")]
pub fn translate(nvcc: &Path, source: &Path, arch: &str, ptx: &Path) -> Result<(), String> {
    let mut command = Command::new(nvcc);
    let flags = FLAGS.into_iter().filter(|flag| !matches!(*flag, "-fatbin" | "-lineinfo"));
    command.args(flags).arg(format!("-arch=compute_{arch}")).arg("-ptx");
    run(command.arg("-o").arg(ptx).arg(source), source)
}

/// Compiles one source into a fatbin, with `n_threads` architectures at a time.
pub fn compile(
    nvcc: &Path,
    source: &Path,
    architectures: &[&str],
    n_threads: usize,
    fatbin: &Path,
) -> Result<(), String> {
    let mut command = Command::new(nvcc);
    command.args(FLAGS).args(generate(architectures));
    command.arg(format!("-t{n_threads}")).arg("-o").arg(fatbin).arg(source);
    run(&mut command, source)
}

fn run(command: &mut Command, source: &Path) -> Result<(), String> {
    let typed = format!("{command:?}").replace('"', "");
    let output = command.output().map_err(|error| format!("{typed}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{}: {}\n{said}\nTo repeat it:\n\n    {typed}\n", source.display(), output.status))
}

/// The sources in the folder of the kernels, by name.
pub fn sources(kernels: &Path) -> Result<Vec<PathBuf>, String> {
    let listing =
        std::fs::read_dir(kernels).map_err(|error| format!("{}: {error}", kernels.display()))?;
    let mut sources: Vec<PathBuf> = listing
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|ending| ending == "cu"))
        .collect();
    sources.sort();
    Ok(sources)
}
