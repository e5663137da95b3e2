//! pack, verify, unpack: every file comes back.

use std::fs;
use std::path::Path;

use crate::{assert_same_folders, run, run_json, shared_model, str, tiny_model};

/// Packs, verifies alone and against the original, unpacks and compares.
fn round_trip(original: &Path) {
    let work = tempfile::tempdir().unwrap();
    let (packed, back) = (work.path().join("packed"), work.path().join("back"));
    let report = run_json(0, &["pack", str(original), str(&packed), "--json"]);
    assert!(report["packed_bytes"].as_u64() < report["original_bytes"].as_u64(), "{report}");
    for args in [
        &["verify", str(&packed)][..],
        &["verify", str(&packed), "--against", str(original)],
        &["unpack", str(&packed), str(&back)],
    ] {
        let (code, _, stderr) = run(args);
        assert_eq!(code, 0, "{args:?}: {stderr}");
    }
    assert_same_folders(original, &back);
}

#[test]
fn the_tiny_model_in_one_file() {
    round_trip(tiny_model(1).path());
}

#[test]
fn the_tiny_model_in_shards() {
    round_trip(tiny_model(3).path());
}

#[test]
fn a_trained_model() {
    if let Some(model) = shared_model("stories260k") {
        round_trip(&model);
    }
}

#[test]
fn a_single_file() {
    let work = tempfile::tempdir().unwrap();
    let original = tiny_model(1);
    let original = original.path().join("model.safetensors");
    let (packed, back) = (work.path().join("p.safetensors"), work.path().join("b.safetensors"));
    for args in [
        &["pack", str(&original), str(&packed)][..],
        &["verify", str(&packed), "--against", str(&original)],
        &["unpack", str(&packed), str(&back)],
    ] {
        let (code, _, stderr) = run(args);
        assert_eq!(code, 0, "{args:?}: {stderr}");
    }
    assert!(fs::read(&original).unwrap() == fs::read(&back).unwrap());
    assert!(fs::metadata(&packed).unwrap().len() < fs::metadata(&original).unwrap().len());
}

#[test]
fn shards_packed_by_several_processes_equal_those_of_one() {
    let work = tempfile::tempdir().unwrap();
    let model = tiny_model(3);
    let (one, several) = (work.path().join("one"), work.path().join("several"));
    assert_eq!(run(&["pack", str(model.path()), str(&one)]).0, 0);
    for share in ["1/2", "0/2"] {
        let (code, _, stderr) = run(&["pack", str(model.path()), str(&several), "--shard", share]);
        assert_eq!(code, 0, "{stderr}");
    }
    assert_same_folders(&one, &several);
}

#[test]
fn verify_tells_what_differs_from_the_original() {
    let work = tempfile::tempdir().unwrap();
    let model = tiny_model(1);
    let packed = work.path().join("packed");
    assert_eq!(run(&["pack", str(model.path()), str(&packed)]).0, 0);
    let file = model.path().join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let args = ["verify", str(&packed), "--against", str(model.path())];
    let (code, stdout, stderr) = run(&args);
    assert_eq!(code, 1, "{stdout}{stderr}");
    assert!((stdout + &stderr).contains("model.safetensors"));
}
