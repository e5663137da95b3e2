//! Memory while packing, verifying and unpacking. A process of its own: the
//! peak is the process's.

#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use transom::checkpoint::{Options, pack, unpack, verify};

fn peak_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
}

/// A sparse file of one BF16 matrix; its first row is not zero.
fn write_matrix(path: &Path, rows: u64, cols: u64) {
    let n_bytes = 2 * rows * cols;
    let json = format!(
        r#"{{"w":{{"dtype":"BF16","shape":[{rows},{cols}],"data_offsets":[0,{n_bytes}]}}}}"#
    );
    let mut head = (json.len() as u64).to_le_bytes().to_vec();
    head.extend(json.as_bytes());
    let data_start = head.len() as u64;
    head.extend((0..2 * cols.min(4096)).map(|i| (i * i % 251) as u8));
    let file = File::create(path).unwrap();
    file.set_len(data_start + n_bytes).unwrap();
    file.write_all_at(&head, 0).unwrap();
}

#[test]
fn a_large_checkpoint_takes_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir_all(at("a/original")).unwrap();
    // 128 MiB each: one row of tiles, one column of tiles.
    write_matrix(&at("a/original/wide.safetensors"), 128, 1 << 19);
    write_matrix(&at("a/model.safetensors"), 1 << 22, 16);
    // Larger than the limit, and not ours to pack.
    File::create(at("a/other.bin")).unwrap().set_len(544 << 20).unwrap();
    let options = Options { threads: 2, ..Options::default() };
    pack(&at("a"), &at("b"), &options, &()).unwrap();
    let packing = peak_mib();
    let report = verify(&at("b"), Some(&at("a")), &options, &()).unwrap();
    assert_eq!(report.differences, []);
    unpack(&at("b"), &at("c"), &options, &()).unwrap();
    println!("peak {packing} MiB packing, {} MiB in all", peak_mib());
    assert!(peak_mib() < 512, "{} MiB, packing {packing} MiB", peak_mib());
}
