//! Tokens of a trained model, from original and packed weights in all layouts.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{run, run_json, shared_model, str, tiny_model};

#[test]
fn a_trained_model_generates_the_expected_tokens() {
    let Some(model) = shared_model("stories260k") else { return };
    let work = tempfile::tempdir().unwrap();
    let packed = work.path().join("packed");
    assert_eq!(run(&["pack", str(&model), str(&packed)]).0, 0);
    let expected = fs::read(model.join("expected.json")).unwrap();
    let expected: Value = serde_json::from_slice(&expected).unwrap();
    for runs in expected["runs"].as_array().unwrap() {
        let prompt = runs["prompt"].as_str().unwrap();
        for path in [&model, &packed] {
            for layout in ["dense", "fixed", "rans"] {
                let args = ["run", str(path), "--prompt", prompt, "--layout", layout, "--json"];
                let more = ["--temperature", "0", "--max-tokens", "60", "--ignore-eos"];
                let report = run_json(0, &[&args[..], &more].concat());
                assert_eq!(report["prompt_ids"], runs["prompt_ids"]);
                assert_eq!(report["ids"], runs["generated_ids"], "{layout}, {path:?}");
                assert_eq!(report["text"], runs["generated_text"]);
            }
        }
    }
}

#[test]
fn layout_threads_and_packing_change_no_bit_of_the_logits() {
    let work = tempfile::tempdir().unwrap();
    let (model, packed) = (tiny_model(2), work.path().join("packed"));
    assert_eq!(run(&["pack", str(model.path()), str(&packed)]).0, 0);
    let logits = work.path().join("logits");
    let mut expected = Vec::new();
    for path in [model.path(), &packed] {
        for layout in ["dense", "fixed", "rans"] {
            for threads in ["1", "3"] {
                let (code, _, stderr) = run(&[
                    "run",
                    str(path),
                    "--prompt",
                    "abc",
                    "--max-tokens",
                    "8",
                    "--ignore-eos",
                    "--layout",
                    layout,
                    "--threads",
                    threads,
                    "--logits",
                    str(&logits),
                ]);
                assert_eq!(code, 0, "{stderr}");
                let found = fs::read(&logits).unwrap();
                if expected.is_empty() {
                    expected.clone_from(&found);
                }
                assert!(found == expected, "{layout}, {threads} threads, {}", path.display());
            }
        }
    }
}

#[test]
fn a_bound_of_memory_changes_no_bit_and_too_narrow_a_one_is_an_error() {
    let work = tempfile::tempdir().unwrap();
    let (model, packed) = (tiny_model(1), work.path().join("packed"));
    assert_eq!(run(&["pack", str(model.path()), str(&packed)]).0, 0);
    let logits = work.path().join("logits");
    let generate = |path: &Path, more: &[&str]| {
        let args = ["run", str(path), "--prompt", "abc", "--max-tokens", "8", "--ignore-eos"];
        let result = run(&[&args[..], &["--logits", str(&logits)], more].concat());
        (result, fs::read(&logits).unwrap_or_default())
    };
    let ((code, text, _), expected) = generate(model.path(), &[]);
    assert_eq!(code, 0);
    for path in [model.path(), &packed] {
        let ((code, _, stderr), _) = generate(path, &["--memory", "1B"]);
        assert_eq!(code, 2);
        let least = stderr.trim().rsplit(' ').next().unwrap();
        for (layout, prefetch) in [("dense", "0"), ("fixed", "3"), ("rans", "1")] {
            let more = ["--memory", least, "--prefetch", prefetch, "--layout", layout];
            let ((code, found, stderr), logits) = generate(path, &more);
            assert_eq!(code, 0, "{stderr}");
            assert!(stderr.contains("read from the file for every token"), "{stderr}");
            assert!(found == text && logits == expected, "{layout}, {}", path.display());
        }
    }
    let ((code, _, stderr), _) = generate(&packed, &["--memory", "2GB"]);
    assert_eq!(code, 0);
    assert!(stderr.contains("weights: all in memory"), "{stderr}");
}

#[test]
fn a_corrupt_tile_of_streamed_weights_ends_the_run_with_its_name() {
    let work = tempfile::tempdir().unwrap();
    let (model, packed) = (tiny_model(1), work.path().join("packed"));
    assert_eq!(run(&["pack", str(model.path()), str(&packed)]).0, 0);
    let file = packed.join("model.safetensors");
    let args = ["run", str(&packed), "--prompt", "abc", "--memory"];
    let (_, _, stderr) = run(&[&args[..], &["1"]].concat());
    let least = stderr.trim().rsplit(' ').next().unwrap().to_owned();
    let header = transom_header(&file);
    let tensor = "model.layers.1.mlp.down_proj.weight";
    let mut bytes = fs::read(&file).unwrap();
    bytes[header[tensor] - 100] ^= 1;
    fs::write(&file, bytes).unwrap();
    let (code, _, stderr) = run(&[&args[..], &[&least]].concat());
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains(tensor) && stderr.contains(str(&file)), "{stderr}");
    assert!(stderr.contains("checksum"), "{stderr}");
}

/// Where each tensor of a safetensors file ends.
fn transom_header(file: &Path) -> std::collections::HashMap<String, usize> {
    let bytes = fs::read(file).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    let tensors = header.as_object().unwrap().iter();
    tensors
        .filter_map(|(name, tensor)| {
            let end = tensor["data_offsets"][1].as_u64()? as usize;
            Some((name.clone(), 8 + n + end))
        })
        .collect()
}

#[test]
fn bench_stream_compares_original_and_packed() {
    let work = tempfile::tempdir().unwrap();
    let (model, packed) = (tiny_model(1), work.path().join("packed"));
    assert_eq!(run(&["pack", str(model.path()), str(&packed)]).0, 0);
    let args = ["bench", "stream", str(model.path()), str(&packed), "--memory", "200kB"];
    let report = run_json(0, &[&args[..], &["--turns", "2", "--json"]].concat());
    assert_eq!(report["identical"], true);
    let results = report["results"].as_array().unwrap();
    assert_eq!(results.len(), 2);
    for (line, weights) in results.iter().zip(["original", "packed"]) {
        assert_eq!(line["weights"], weights);
        assert_eq!(line["tokens"], 4);
        assert!(line["matrices_streamed"].as_u64().unwrap() > 0);
        assert!(line["weight_gbps"].as_f64().unwrap() > 0.0);
    }
    // The other way round they are not what the names say.
    let (code, _, stderr) = run(&["bench", "stream", str(&packed), str(model.path())]);
    assert_eq!(code, 2);
    assert!(stderr.contains("expected an original checkpoint"), "{stderr}");
}

/// A model that comes with the source.
fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models").join(name)
}

#[test]
fn demo_finds_everything_identical_and_shipped_models_are_small() {
    let (code, stdout, stderr) = run(&["demo"]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    for name in ["models/demo\n", "models/demo-int8\n"] {
        assert!(stdout.contains(name), "{stdout}");
    }
    // Three layouts of two models, tokens and logits; and the verdict.
    assert_eq!(stdout.matches("identical").count(), 2 * (2 * 4 + 1) + 1, "{stdout}");
    for (name, limit, dtype) in [("demo", 8_000_000, "BF16"), ("demo-int8", 4_000_000, "I8")] {
        let files = fs::read_dir(shipped(name)).unwrap();
        let bytes: u64 = files.map(|file| file.unwrap().metadata().unwrap().len()).sum();
        assert!(bytes <= limit, "{name}: {bytes}");
        let report = run_json(0, &["inspect", str(&shipped(name)), "--json"]);
        let tensors = report["tensors"].as_array().unwrap();
        let q_proj = tensors
            .iter()
            .find(|tensor| tensor["name"].as_str().unwrap().ends_with("0.self_attn.q_proj.weight"));
        assert_eq!(q_proj.unwrap()["dtype"], dtype);
    }
}

#[test]
fn demo_fails_with_a_damaged_model() {
    let work = tempfile::tempdir().unwrap();
    for file in fs::read_dir(shipped("demo-int8")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), work.path().join(file.file_name())).unwrap();
    }
    let weights = work.path().join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let (code, _, stderr) = run(&["demo", str(work.path())]);
    assert_ne!(code, 0);
    assert!(stderr.contains("model.safetensors"), "{stderr}");
}
