//! What is known of the machine. Absent on systems that do not tell.

use std::fs;
use std::path::Path;

/// Cores this process may use.
pub(crate) fn n_cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The processor's own name.
pub(crate) fn cpu_model() -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    field(&info, "model name").map(str::to_owned)
}

/// Main memory in bytes: all of it, and what is available.
pub(crate) fn memory_bytes() -> Option<(u64, u64)> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    Some((kib_field(&info, "MemTotal")?, kib_field(&info, "MemAvailable")?))
}

/// Memory limit of this process's control group, if there is one.
pub(crate) fn memory_limit_bytes() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let limit = Path::new("/sys/fs/cgroup").join(group).join("memory.max");
    fs::read_to_string(limit).ok()?.trim().parse().ok()
}

/// Bytes of memory this process can still get: what the machine has available,
/// or what its control group allows, whichever is less.
pub(crate) fn available_bytes() -> Option<u64> {
    let (_, available) = memory_bytes()?;
    Some(memory_limit_bytes().map_or(available, |limit| available.min(limit)))
}

/// Asks the system to forget the pages of a file that it holds, so that the
/// next reader finds the file on the disk. Without effect on systems that
/// cannot.
pub(crate) fn forget_file(path: &Path) -> std::io::Result<()> {
    let file = fs::File::open(path)?;
    #[cfg(target_os = "linux")]
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    let _ = file;
    Ok(())
}

/// Most memory this process ever had resident, in bytes (`VmHWM`).
pub(crate) fn peak_rss_bytes() -> Option<u64> {
    kib_field(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM")
}

/// A cache that the first core sees.
#[derive(Debug)]
pub(crate) struct Cache {
    /// 1 is nearest.
    pub(crate) level: String,
    /// Data, Instruction or Unified.
    pub(crate) kind: String,
    /// As the kernel writes it, in KiB: `32768K`.
    pub(crate) size: String,
    /// Cores that share it, as a list of ranges.
    pub(crate) shared_by: String,
}

/// Caches of the first core, nearest first.
pub(crate) fn caches() -> Vec<Cache> {
    let read = |index: usize, name: &str| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{name}");
        fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
    };
    (0..)
        .map_while(|index| {
            Some(Cache {
                level: read(index, "level")?,
                kind: read(index, "type")?,
                size: read(index, "size")?,
                shared_by: read(index, "shared_cpu_list")?,
            })
        })
        .collect()
}

/// Size of the largest cache, in bytes.
pub(crate) fn last_cache_bytes() -> Option<u64> {
    let kib = |cache: &Cache| cache.size.strip_suffix('K')?.parse::<u64>().ok();
    caches().iter().filter_map(kib).max().map(|kib| kib * 1024)
}

/// Value of `name : value` in one of the kernel's tables.
fn field<'a>(table: &'a str, name: &str) -> Option<&'a str> {
    table.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

fn kib_field(table: &str, name: &str) -> Option<u64> {
    field(table, name)?.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_kernel_tables_are_found() {
        let table = "MemTotalX: 1 kB\nMemTotal:  16 kB\nmodel name\t: A: B\nbad: x kB\n";
        assert_eq!(kib_field(table, "MemTotal"), Some(16 * 1024));
        assert_eq!(field(table, "model name"), Some("A: B"));
        assert_eq!((kib_field(table, "bad"), kib_field(table, "none")), (None, None));
    }
}
