//! The committed seeds, through the same checks as the fuzzer's inputs.

use std::fs;
use std::path::Path;

/// The seeds of one target.
fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus-seed").join(target);
    let mut seeds: Vec<(String, Vec<u8>)> = fs::read_dir(&dir)
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap())
        })
        .collect();
    seeds.sort();
    assert!(!seeds.is_empty(), "{} is empty", dir.display());
    seeds
}

/// Every seed, every prefix of a short one, and one changed byte at a time.
fn replay(target: &str, check: fn(&[u8])) {
    for (name, seed) in seeds(target) {
        eprintln!("{target}/{name}: {} bytes", seed.len());
        check(&seed);
        let step = seed.len().div_ceil(64).max(1);
        for at in (0..seed.len()).step_by(step) {
            check(&seed[..at]);
            let mut changed = seed.clone();
            changed[at] ^= 1 << (at % 8);
            check(&changed);
        }
    }
}

#[test]
fn generated_seeds_are_current() {
    for seed in transom_fuzz::seeds::all() {
        let stored = seeds(seed.target).into_iter().find(|(name, _)| *name == seed.name);
        let is_current = stored.is_some_and(|(_, bytes)| bytes == seed.bytes);
        assert!(is_current, "{}/{}: run `cargo xtask golden`", seed.target, seed.name);
    }
}

#[test]
fn record() {
    replay("record", transom_fuzz::record::check);
}

#[test]
fn some_record_seeds_are_records() {
    let decoded = |(_, seed): &(String, Vec<u8>)| transom_fuzz::record::check_record(seed);
    let n_decoded = seeds("record").iter().filter(|seed| decoded(seed)).count();
    assert!(n_decoded >= 8, "{n_decoded} seeds decode");
}

#[test]
fn round_trip() {
    replay("round_trip", transom_fuzz::round_trip::check);
}

#[test]
fn isa_agree() {
    replay("isa_agree", transom_fuzz::isa_agree::check);
}

#[test]
fn safetensors_header() {
    replay("safetensors_header", transom_fuzz::safetensors_header::check);
}
