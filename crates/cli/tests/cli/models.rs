//! Tokens of a trained model, from original and packed weights in all layouts.

use serde_json::Value;

use crate::{run, run_json, shared_model, str, tiny_model};

#[test]
fn a_trained_model_generates_the_expected_tokens() {
    let Some(model) = shared_model("stories260k") else { return };
    let work = tempfile::tempdir().unwrap();
    let packed = work.path().join("packed");
    assert_eq!(run(&["pack", str(&model), str(&packed)]).0, 0);
    let expected = std::fs::read(model.join("expected.json")).unwrap();
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
                let found = std::fs::read(&logits).unwrap();
                if expected.is_empty() {
                    expected.clone_from(&found);
                }
                assert!(found == expected, "{layout}, {threads} threads, {}", path.display());
            }
        }
    }
}

#[test]
fn demo_of_the_generated_model_finds_everything_identical() {
    let (code, stdout, stderr) = run(&["demo"]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(stdout.contains("identical"), "{stdout}");
}
