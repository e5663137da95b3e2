//! `transom doctor`: what this machine has, and what transom will use.

use std::fmt::Write as _;

use transom::Isa;

use crate::output::{self, Style};
use crate::{Outcome, machine};

/// Prints the findings.
pub(crate) fn run() -> anyhow::Result<Outcome> {
    let style = Style::stdout();
    let mut text = String::new();
    let mut section = |title: &str, lines: &[(String, String)]| {
        let _ = writeln!(text, "{}", style.bold(title));
        for (name, value) in lines {
            let _ = writeln!(text, "  {name:<20} {value}");
        }
    };
    section("transom", &[pair("version", env!("CARGO_PKG_VERSION"))]);
    section("Processor", &processor());
    section("Instruction sets", &instruction_sets());
    section("Caches", &caches());
    section("Memory", &memory());
    section("GPUs", &gpus());
    output::print(&text)?;
    Ok(Outcome::Done)
}

fn pair(name: impl Into<String>, value: impl Into<String>) -> (String, String) {
    (name.into(), value.into())
}

fn processor() -> Vec<(String, String)> {
    let n_cores = machine::n_cores();
    vec![
        pair("model", machine::cpu_model().unwrap_or_else(|| "unknown".into())),
        pair("architecture", std::env::consts::ARCH),
        pair("cores", format!("{n_cores} (the default of --threads)")),
    ]
}

fn instruction_sets() -> Vec<(String, String)> {
    let used = Isa::best();
    let value = |isa: Isa| match isa {
        _ if isa == used => "yes, used",
        _ if isa.is_available() => "yes",
        _ => "no",
    };
    Isa::ALL.into_iter().map(|isa| pair(isa.name(), value(isa))).collect()
}

fn caches() -> Vec<(String, String)> {
    let caches = machine::caches();
    if caches.is_empty() {
        return vec![pair("unknown", "this system does not tell")];
    }
    caches
        .into_iter()
        .map(|c| {
            let size = match c.size.strip_suffix('K').and_then(|kib| kib.parse::<u64>().ok()) {
                Some(kib) if kib >= 1024 && kib % 1024 == 0 => format!("{} MiB", kib / 1024),
                Some(kib) => format!("{kib} KiB"),
                None => c.size,
            };
            let name = format!("L{} {}", c.level, c.kind.to_lowercase());
            pair(name, format!("{size}, cores {}", c.shared_by))
        })
        .collect()
}

fn memory() -> Vec<(String, String)> {
    let mut lines = match machine::memory_bytes() {
        Some((total, available)) => {
            vec![pair("total", output::bytes(total)), pair("available", output::bytes(available))]
        }
        None => vec![pair("unknown", "this system does not tell")],
    };
    if let Some(limit) = machine::memory_limit_bytes() {
        lines.push(pair("limit", format!("{} (control group)", output::bytes(limit))));
    }
    lines
}

#[cfg(not(feature = "cuda"))]
fn gpus() -> Vec<(String, String)> {
    vec![pair("none used", "no GPU support in this build")]
}

/// A machine without a GPU is as good as any other: nothing here is an error.
#[cfg(feature = "cuda")]
fn gpus() -> Vec<(String, String)> {
    let built = pair("kernels", format!("for {}", transom_cuda::ARCHITECTURES.replace(',', ", ")));
    let mut lines = vec![built];
    match transom_cuda::list() {
        Err(error) => lines.push(pair("none used", error.to_string())),
        Ok(gpus) => lines.extend(gpus.iter().flat_map(gpu)),
    }
    lines
}

#[cfg(feature = "cuda")]
fn gpu(gpu: &transom_cuda::DeviceInfo) -> Vec<(String, String)> {
    let (major, minor) = gpu.capability;
    let kernels = match gpu.image() {
        Some("ptx") => "compiled by the driver from PTX".to_owned(),
        Some(image) => format!("sm_{image}"),
        None => "none for it in this build: not used".to_owned(),
    };
    let what = format!(
        "{}, {} multiprocessors, compute capability {major}.{minor}",
        output::bytes(gpu.memory_bytes as u64),
        gpu.n_sms
    );
    vec![
        pair(format!("GPU {}", gpu.ordinal), &gpu.name),
        pair("", what),
        pair("", format!("driver for CUDA {}; kernels: {kernels}", gpu.driver())),
    ]
}
