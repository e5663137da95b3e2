//! Compiles the kernels: a fatbin for each `kernels/*.cu`, embedded by `src/module.rs`.
//!
//! Fatbins are kept in `<target>/cuda-kernels`, so that the profiles share them
//! and only what has changed is compiled.

// What a build script prints is for cargo.
#![allow(clippy::print_stdout)]

#[path = "build/nvcc.rs"]
mod nvcc;

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};

fn main() -> ExitCode {
    for path in ["build.rs", "build/nvcc.rs", "kernels"] {
        println!("cargo::rerun-if-changed={path}");
    }
    for variable in ["NVCC", nvcc::ARCH_VARIABLE] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\n{error}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let variable = |name: &str| std::env::var(name).map_err(|error| format!("{name}: {error}"));
    let manifest_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out_dir = PathBuf::from(variable("OUT_DIR")?);
    let repository = manifest_dir.join("../..");
    let wanted = std::env::var(nvcc::ARCH_VARIABLE).ok();
    let architectures = architectures(wanted.as_deref())?;
    // A toolkit installed later is found then.
    println!(
        "cargo::rerun-if-changed={}",
        repository.join(nvcc::INSTALLED).join("bin/nvcc").display()
    );
    let compiler = nvcc::program(&repository, "nvcc")?;
    // <target>/<profile>/build/<package>/out
    let target = out_dir.ancestors().nth(4).expect("cargo's folders");
    let kept = target.join("cuda-kernels").join(architectures.join("-"));
    std::fs::create_dir_all(&kept).map_err(|error| format!("{}: {error}", kept.display()))?;
    let sources = nvcc::sources(&manifest_dir.join("kernels"))?;

    let n_jobs = variable("NUM_JOBS")?.parse().unwrap_or(1).max(1);
    let n_workers = n_jobs.min(sources.len()).max(1);
    let next = AtomicUsize::new(0);
    let results = std::thread::scope(|scope| {
        let worker = || {
            let mut results = Vec::new();
            while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                results.push(fatbin(&compiler, source, &architectures, n_jobs / n_workers, &kept));
            }
            results
        };
        let workers: Vec<_> = (0..n_workers).map(|_| scope.spawn(worker)).collect();
        let results =
            workers.into_iter().flat_map(|worker| worker.join().expect("no worker panics"));
        results.collect::<Result<Vec<PathBuf>, String>>()
    })?;

    let mut code = String::from("&[\n");
    let mut fatbins = results;
    fatbins.sort();
    for path in fatbins {
        let name = path.file_stem().unwrap_or_default();
        let _ = writeln!(code, "    ({name:?}, include_bytes!({path:?})),");
    }
    code += "]\n";
    let file = out_dir.join("images.rs");
    std::fs::write(&file, code).map_err(|error| format!("{}: {error}", file.display()))?;
    println!("cargo::rustc-env=TRANSOM_CUDA_ARCHITECTURES={}", architectures.join(","));
    Ok(())
}

/// Compiles a source unless that has been done; returns its fatbin.
fn fatbin(
    compiler: &Path,
    source: &Path,
    architectures: &[&str],
    n_threads: usize,
    kept: &Path,
) -> Result<PathBuf, String> {
    let mut hasher = DefaultHasher::new();
    ingredients(compiler, source, architectures)?.hash(&mut hasher);
    let stamp_text = format!("{:016x}", hasher.finish());
    let name = source.file_stem().expect("a source has a name");
    let fatbin = kept.join(name).with_extension("fatbin");
    let stamp = kept.join(name).with_extension("stamp");
    if fatbin.is_file() && std::fs::read_to_string(&stamp).is_ok_and(|text| text == stamp_text) {
        return Ok(fatbin);
    }
    let _ = std::fs::remove_file(&stamp);
    nvcc::compile(compiler, source, architectures, n_threads.max(1), &fatbin)?;
    std::fs::write(&stamp, stamp_text).map_err(|error| format!("{}: {error}", stamp.display()))?;
    Ok(fatbin)
}

/// The architectures that a value of [`nvcc::ARCH_VARIABLE`] selects, in the order of [`nvcc::RELEASE`].
fn architectures(value: Option<&str>) -> Result<Vec<&'static str>, String> {
    let value = value.unwrap_or("all").trim();
    if value == "all" {
        return Ok(nvcc::RELEASE.to_vec());
    }
    let wanted: Vec<&str> =
        value.split(',').map(|name| name.trim().trim_start_matches("sm_")).collect();
    if let Some(unknown) = wanted.iter().find(|name| !nvcc::RELEASE.contains(name)) {
        let variable = nvcc::ARCH_VARIABLE;
        let known = nvcc::RELEASE.join(", ");
        return Err(format!("{variable}: `{unknown}`, expected `all` or a list of {known}"));
    }
    Ok(nvcc::RELEASE.into_iter().filter(|name| wanted.contains(name)).collect())
}

/// Everything that decides what a fatbin holds: the source, the headers beside
/// it that it includes, and the options.
fn ingredients(compiler: &Path, source: &Path, architectures: &[&str]) -> Result<Vec<u8>, String> {
    let mut bytes = compiler.display().to_string().into_bytes();
    bytes.extend(
        nvcc::FLAGS.join(" ").bytes().chain(nvcc::generate(architectures).join(" ").bytes()),
    );
    let mut files = vec![source.to_owned()];
    let mut next = 0;
    while let Some(file) = files.get(next).cloned() {
        next += 1;
        let text = std::fs::read_to_string(&file)
            .map_err(|error| format!("{}: {error}", file.display()))?;
        for line in text.lines() {
            let Some(rest) = line.trim().strip_prefix("#include \"") else { continue };
            let name = rest.split('"').next().unwrap_or_default();
            let header = file.parent().expect("a source is in a folder").join(name);
            if !files.contains(&header) {
                files.push(header);
            }
        }
        bytes.extend_from_slice(text.as_bytes());
    }
    Ok(bytes)
}
