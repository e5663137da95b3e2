//! `cargo xtask kernels`: compiles the GPU kernels and reads the machine code.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Failure;
use crate::command::Count;
use crate::nvcc;

const KERNELS: &str = "crates/cuda/kernels";
const COMPILED: &str = "target/cuda-sass";

/// The architecture that everything is measured on.
const MEASURED: &str = "90a";

/// What the kernels whose names start so may use and have to have; the first
/// line that fits counts. A kernel that no line fits is an error.
const BUDGETS: &[Budget] = &[
    Budget { prefix: "probe_", registers: 64, matrix: false },
    Budget { prefix: "order_activations", registers: 64, matrix: false },
    Budget { prefix: "fixed_decode_", registers: 128, matrix: false },
    Budget { prefix: "rans_product", registers: 128, matrix: true },
    Budget { prefix: "rans_", registers: 128, matrix: false },
    Budget { prefix: "product_", registers: 128, matrix: true },
    Budget { prefix: "prefill_", registers: 168, matrix: true },
];

/// The first architecture that has the copies products are made of; on older
/// ones their kernels are empty, and the host refuses them.
const FIRST_WITH_PRODUCTS: u32 = 90;
/// Kernels that only one architecture has the instructions for.
const ONLY_MEASURED: &str = "prefill_";

struct Budget {
    /// Of the kernel's name.
    prefix: &'static str,
    /// At most, of a thread.
    registers: u32,
    /// Whether the matrix instructions have to be there.
    matrix: bool,
}

/// Which sources are compiled for which architectures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Everything for sm_90a, and one source with a product for each other architecture.
    Ordinary,
    /// Everything for everything.
    All,
}

/// The step of `cargo xtask test`.
pub fn check_ordinary() -> Result<Count, Failure> {
    crate::cuda_toolkit::run()?;
    run(Scope::Ordinary).map(|()| Count::default())
}

/// Compiles, and checks every kernel.
pub fn run(scope: Scope) -> Result<(), Failure> {
    let root = crate::command::root();
    let compiler = nvcc::program(&root, "nvcc")?;
    let reader = nvcc::program(&root, "cuobjdump")?;
    let sources = nvcc::sources(Path::new(KERNELS))?;
    let is_product = |source: &&PathBuf| {
        source.file_stem().is_some_and(|name| name.to_string_lossy().contains("product"))
    };
    // Until there is a product, any source shows that the architecture compiles.
    let sample = sources.iter().find(is_product).or(sources.first());
    let mut jobs = Vec::new();
    for arch in nvcc::RELEASE {
        let chosen: Vec<&PathBuf> = match scope {
            Scope::Ordinary if arch != MEASURED => sample.into_iter().collect(),
            _ => sources.iter().collect(),
        };
        jobs.extend(chosen.into_iter().map(|source| (arch, source.as_path())));
    }
    let checked = in_parallel(&jobs, |(arch, source)| check(&compiler, &reader, arch, source));
    let mut complaints = Vec::new();
    println!("{:<8} {:<40} {:>9} {:>8}", "arch", "kernel", "registers", "matrix");
    for ((arch, _), kernels) in jobs.iter().zip(checked) {
        for (name, kernel) in kernels? {
            println!("{arch:<8} {name:<40} {:>9} {:>8}", kernel.registers, kernel.n_matrix);
            let found = kernel.complaints(&name, has_matrix(&name, arch));
            complaints.extend(found.map(|what| format!("{arch}: {name}: {what}")));
        }
    }
    if complaints.is_empty() { Ok(()) } else { Err(complaints.join("\n")) }
}

/// Whether a kernel that multiplies is more than empty on that architecture.
fn has_matrix(name: &str, arch: &str) -> bool {
    let is_new = |number: u32| number >= FIRST_WITH_PRODUCTS;
    match name.starts_with(ONLY_MEASURED) {
        true => arch == MEASURED,
        false => arch.trim_end_matches('a').parse().is_ok_and(is_new),
    }
}

/// Results in the order of `items`; one thread a processor.
fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let n_threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut results: Vec<(usize, R)> = std::thread::scope(|scope| {
        let worker = || {
            let mut results = Vec::new();
            loop {
                let index = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let Some(item) = items.get(index) else { return results };
                results.push((index, work(item)));
            }
        };
        let workers: Vec<_> = (0..n_threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("no worker panics")).collect()
    });
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

/// What the machine code of a kernel says.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Kernel {
    /// Of a thread.
    registers: u32,
    /// Matrix instructions.
    n_matrix: usize,
    /// Those that end a group of them, which go on together while other work is done.
    n_groups: usize,
    /// Loads from and stores to local memory in innermost loops.
    n_local: usize,
}

impl Kernel {
    fn complaints(&self, name: &str, has_matrix: bool) -> impl Iterator<Item = String> {
        let mut complaints = Vec::new();
        match BUDGETS.iter().find(|budget| name.starts_with(budget.prefix)) {
            None => complaints.push("no line of BUDGETS in xtask/src/kernels.rs fits".to_owned()),
            Some(budget) => {
                if self.registers > budget.registers {
                    let (found, allowed) = (self.registers, budget.registers);
                    complaints.push(format!("{found} registers, expected at most {allowed}"));
                }
                if budget.matrix && has_matrix && self.n_matrix == 0 {
                    complaints.push("no matrix instruction (HMMA, HGMMA)".to_owned());
                }
            }
        }
        if self.n_groups > 0 && self.n_groups == self.n_matrix {
            complaints.push("wgmma instructions wait for each other, expected groups".to_owned());
        }
        if self.n_local > 0 {
            complaints.push(format!(
                "{} accesses to local memory in innermost loops, expected none",
                self.n_local
            ));
        }
        complaints.into_iter()
    }
}

type Kernels = BTreeMap<String, Kernel>;

fn check(compiler: &Path, reader: &Path, arch: &str, source: &Path) -> Result<Kernels, Failure> {
    let folder = Path::new(COMPILED).join(arch);
    std::fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let name = source.file_stem().expect("a source has a name");
    let fatbin = folder.join(name).with_extension("fatbin");
    nvcc::compile(compiler, source, &[arch], 1, &fatbin)?;
    let read = |option: &str| -> Result<String, Failure> {
        let output = Command::new(reader).arg(option).arg(&fatbin).output();
        let output = output.map_err(|error| format!("{}: {error}", reader.display()))?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(format!(
                "{} {option} {}: {}\n{}",
                reader.display(),
                fatbin.display(),
                output.status,
                String::from_utf8_lossy(&output.stderr)
            )),
        }
    };
    let kernels = parse(&read("-sass")?, &read("-res-usage")?);
    // A source without kernels would pass every check.
    if kernels.is_empty() || kernels.values().any(|kernel| kernel.registers == 0) {
        return Err(format!("{}: the machine code could not be read", source.display()));
    }
    Ok(kernels)
}

/// Reads the two listings of cuobjdump.
fn parse(sass: &str, usage: &str) -> Kernels {
    let mut kernels = Kernels::new();
    for text in sass.split("Function : ").skip(1) {
        let name = text.lines().next().unwrap_or_default().trim();
        kernels.insert(name.to_owned(), parse_function(text));
    }
    let mut current = None;
    for line in usage.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("Function ") {
            current = kernels.get_mut(name.trim_end_matches(':'));
        }
        let registers = line.split_once("REG:").and_then(|(_, rest)| rest.split(' ').next());
        if let (Some(kernel), Some(Ok(registers))) = (current.as_mut(), registers.map(str::parse)) {
            kernel.registers = registers;
        }
    }
    kernels
}

/// Of code: 32 instructions.
const LONG_LOOP_BYTES: u64 = 32 * 16;

/// Counts instructions; registers stand in the other listing.
fn parse_function(text: &str) -> Kernel {
    let mut kernel = Kernel::default();
    let mut local = Vec::new();
    // First and last address.
    let mut loops: Vec<(u64, u64)> = Vec::new();
    for line in text.lines().map(str::trim) {
        // "/*0010*/  @P0 LDL.64 R2, [R1] ; /* .. */"
        let Some((address, code)) = line.strip_prefix("/*").and_then(|rest| rest.split_once("*/"))
        else {
            continue;
        };
        let (Ok(address), Some((code, _))) =
            (u64::from_str_radix(address, 16), code.split_once(';'))
        else {
            continue;
        };
        let mut words = code.split_whitespace().skip_while(|word| word.starts_with('@'));
        match words.next().unwrap_or_default().split('.').next().unwrap_or_default() {
            "LDL" | "STL" => local.push(address),
            "HMMA" => kernel.n_matrix += 1,
            "HGMMA" => {
                kernel.n_matrix += 1;
                kernel.n_groups += usize::from(code.contains("gsb0"));
            }
            "BRA" => {
                let target = words.last().and_then(|word| word.strip_prefix("0x"));
                let target = target.and_then(|digits| u64::from_str_radix(digits, 16).ok());
                loops.extend(target.filter(|target| *target < address).map(|t| (t, address)));
            }
            _ => {}
        }
    }
    let holds = |a: &(u64, u64), b: &(u64, u64)| a != b && a.0 <= b.0 && b.1 <= a.1;
    // A loop that waits for a copy does not make the loop around it cold.
    let long: Vec<_> = loops.iter().copied().filter(|(a, b)| b - a >= LONG_LOOP_BYTES).collect();
    let innermost_of = |loops: &[(u64, u64)]| -> Vec<(u64, u64)> {
        loops.iter().copied().filter(|a| !loops.iter().any(|b| holds(a, b))).collect()
    };
    let innermost = [innermost_of(&loops), innermost_of(&long)].concat();
    let in_loop =
        |address: &&u64| innermost.iter().any(|(first, last)| (first..=last).contains(address));
    kernel.n_local = local.iter().filter(in_loop).count();
    kernel
}

#[cfg(test)]
mod tests {
    use super::*;

    const SASS: &str = "\
        \tcode for sm_90a
        \t\tFunction : fixed_product_a
        \t.headerflags\t@\"EF_CUDA_SM90\"
        /*0000*/                   LDC R1, c[0x0][0x28] ;  /* 0x00000a00ff017b82 */
                                                           /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDL.64 R2, [R1] ;       /* 0x0 */
        /*0020*/                   STL [R1], R2 ;          /* 0x0 */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ; /* 0x0 */
        /*0040*/              @!P1 BRA P2, 0x20 ;          /* 0x0 */
        /*0050*/                   LDL R2, [R1] ;          /* 0x0 */
        /*0060*/               @P0 BRA 0x10 ;              /* 0x0 */
        /*0070*/                   BRA 0x70;               /* 0x0 */
        \t\tFunction : probe_xor
        /*0000*/                   STL [R1], R2 ;          /* 0x0 */";
    const USAGE: &str = "\
        Resource usage:
         Common:
          GLOBAL:0
         Function fixed_product_a:
          REG:200 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
         Function probe_xor:
          REG:16 STACK:0 SHARED:0 LOCAL:0";

    #[test]
    fn the_listings_of_cuobjdump_are_read() {
        let kernels = parse(SASS, USAGE);
        let expected = Kernel { registers: 200, n_matrix: 1, n_groups: 0, n_local: 1 };
        assert_eq!(kernels["fixed_product_a"], expected);
        let expected = Kernel { registers: 16, ..Kernel::default() };
        assert_eq!(kernels["probe_xor"], expected);
    }

    #[test]
    fn kernels_out_of_budget_are_refused() {
        let complaints = |name: &str, registers, n_matrix, n_local, arch| {
            let kernel = Kernel { registers, n_matrix, n_local, n_groups: 0 };
            kernel.complaints(name, has_matrix(name, arch)).count()
        };
        assert_eq!(complaints("product_x", 128, 8, 0, "90a"), 0);
        assert_eq!(complaints("product_x", 255, 0, 3, "90a"), 3);
        assert_eq!(complaints("product_x", 255, 0, 3, "89"), 2);
        assert_eq!(complaints("product_x", 128, 8, 1, "90a"), 1);
        assert_eq!(complaints("probe_x", 20, 0, 0, "90a"), 0);
        assert_eq!(complaints("unknown", 20, 0, 0, "90a"), 1);
        assert_eq!(complaints("prefill_x", 168, 0, 0, "120"), 0);
        assert_eq!(complaints("prefill_x", 168, 0, 0, "90a"), 1);
        let kernel = |n_groups| Kernel { registers: 90, n_matrix: 8, n_groups, n_local: 0 };
        assert_eq!(kernel(2).complaints("product_x", true).count(), 0);
        assert_eq!(kernel(8).complaints("product_x", true).count(), 1);
    }

    #[test]
    fn work_in_parallel_keeps_its_order() {
        let items: Vec<usize> = (0..100).collect();
        assert_eq!(in_parallel(&items, |i| i * 2), items.iter().map(|i| i * 2).collect::<Vec<_>>());
    }
}
