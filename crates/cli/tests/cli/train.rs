//! `transom train`, and what the other commands make of its checkpoints.

use std::fs;
use std::path::Path;

use crate::{run, run_json, str};

/// Some pages of text, and the options of a model that learns it in seconds.
fn inputs(folder: &Path) -> (String, String) {
    let line = "The quick brown fox jumps over the lazy dog. Pack my box with jugs. ";
    let books: String = (0..20)
        .map(|book| format!("{}\n", serde_json::json!({ "text": line.repeat(20 + book) })))
        .collect();
    let config = serde_json::json!({
        "model": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 280,
        },
        "steps": 30, "batch_size": 4, "passes": 2, "sequence_length": 32,
        "learning_rate": 0.01, "warmup": 4, "log_every": 5, "save_every": 10,
    });
    let (text, options) = (folder.join("books.jsonl"), folder.join("options.json"));
    fs::write(&text, books).unwrap();
    fs::write(&options, config.to_string()).unwrap();
    (str(&text).to_owned(), str(&options).to_owned())
}

#[test]
fn training_makes_checkpoints_that_pack_and_run() {
    let folder = tempfile::tempdir().unwrap();
    let (text, options) = inputs(folder.path());
    for weights in [&["--weights", "bf16"][..], &["--weights", "int8", "--rate", "0.1"]] {
        let out = folder.path().join(weights[1]);
        let base = ["train", &text, "--out", str(&out), "--config", &options, "--threads", "2"];
        let args = [&base[..], weights, &["--json"]].concat();
        let report = run_json(0, &args);
        assert!(report["last"]["validation_perplexity"].as_f64().unwrap() < 60.0, "{report}");
        let log = fs::read_to_string(out.join("log.jsonl")).unwrap();
        assert_eq!(log.lines().count(), 6);
        assert!(fs::read_to_string(out.join("report.html")).unwrap().contains("Validation"));

        let (checkpoint, packed) = (out.join("checkpoint"), out.join("packed"));
        let tensors = run_json(0, &["inspect", str(&checkpoint), "--json"]);
        let is_int8 = |tensor: &&serde_json::Value| tensor["dtype"] == "I8";
        let n_int8 = tensors["tensors"].as_array().unwrap().iter().filter(is_int8).count();
        assert_eq!(n_int8, if weights[1] == "int8" { 14 } else { 0 });
        for args in [
            &["pack", str(&checkpoint), str(&packed)][..],
            &["verify", str(&packed)],
            &["run", str(&packed), "--prompt", "The quick", "--max-tokens", "5"],
        ] {
            let (code, _, stderr) = run(args);
            assert_eq!(code, 0, "{args:?}: {stderr}");
        }
        let args = ["compare", str(&checkpoint), str(&packed), "--max-tokens", "8", "--json"];
        assert_eq!(run_json(0, &args)["identical"], true);

        let weights_file = checkpoint.join("model.safetensors");
        let before = fs::read(&weights_file).unwrap();
        let (code, _, stderr) = run(&[&base[..], weights].concat());
        assert_eq!(code, 2);
        assert!(stderr.contains("holds a run already"), "{stderr}");
        run_json(0, &[&args_resumed(&base, weights)[..], &["--json"]].concat());
        let tensors_again = run_json(0, &["inspect", str(&checkpoint), "--json"]);
        assert_eq!(tensors["tensors"], tensors_again["tensors"]);
        assert_eq!(before.len(), fs::read(&weights_file).unwrap().len());
    }
}

fn args_resumed<'a>(base: &[&'a str], weights: &[&'a str]) -> Vec<&'a str> {
    [base, weights, &["--resume"]].concat()
}

#[test]
fn training_refuses_what_makes_no_sense() {
    let folder = tempfile::tempdir().unwrap();
    let (text, options) = inputs(folder.path());
    let out = folder.path().join("run");
    let bad = folder.path().join("bad.json");
    fs::write(&bad, "{\"stepps\": 3}").unwrap();
    for (more, expected) in [
        (&["--rate", "0.1"][..], "--weights int8"),
        (&["--weights", "int8", "--rate=-1"], "rate"),
        (&["--steps", "0"], "steps"),
        (&["--config", str(&bad)], "stepps"),
        (&["--device", "cuda"], "train-cuda"),
    ] {
        let base = ["train", &text, "--out", str(&out)];
        let config = if more[0] == "--config" { &[][..] } else { &["--config", &options][..] };
        let (code, _, stderr) = run(&[&base[..], config, more].concat());
        assert_eq!(code, 2, "{more:?}: {stderr}");
        assert!(stderr.contains(expected), "{more:?}: {stderr}");
    }
    let (code, _, stderr) = run(&["train", str(&bad), "--out", str(&out)]);
    assert_eq!(code, 2);
    assert!(stderr.contains("bad.json"), "{stderr}");
}
