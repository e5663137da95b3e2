//! INT8 checkpoints from the command line, and what every other command makes
//! of them.

use std::path::Path;

use serde_json::Value;

use crate::{assert_same_folders, run, run_json, shared_model, str, tiny_model};

/// Every command on a model, quantised.
fn check(model: &Path, granularity: &str) {
    let work = tempfile::tempdir().unwrap();
    let [int8, packed, restored] =
        ["int8", "packed", "restored"].map(|name| work.path().join(name));
    let args = ["quantize", str(model), str(&int8), "--granularity", granularity, "--json"];
    let report = run_json(0, &args);
    assert_eq!(report["granularity"], granularity);
    let tensors = report["tensors"].as_array().unwrap();
    assert!(!tensors.is_empty());
    for tensor in tensors {
        let error = tensor["relative_error"].as_f64().unwrap();
        assert!(error > 0.0 && error < 0.05, "{tensor}");
    }

    assert_eq!(run(&["pack", str(&int8), str(&packed)]).0, 0);
    let (code, _, stderr) = run(&["verify", str(&packed), "--against", str(&int8)]);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(run(&["unpack", str(&packed), str(&restored)]).0, 0);
    assert_same_folders(&int8, &restored);
    let inspected = run_json(0, &["inspect", str(&packed), "--json"]);
    let integers: Vec<&Value> = (inspected["tensors"].as_array().unwrap().iter())
        .filter(|tensor| tensor["dtype"] == "I8")
        .collect();
    assert_eq!(integers.len(), tensors.len());

    let logits = work.path().join("logits");
    let mut expected = Vec::new();
    for path in [&int8, &packed] {
        for layout in ["dense", "fixed", "rans"] {
            for threads in ["1", "2"] {
                let args = ["run", str(path), "--prompt", "Once upon", "--max-tokens", "12"];
                let more = ["--layout", layout, "--threads", threads, "--logits", str(&logits)];
                let (code, _, stderr) = run(&[&args[..], &["--ignore-eos"], &more].concat());
                assert_eq!(code, 0, "{stderr}");
                let found = std::fs::read(&logits).unwrap();
                if expected.is_empty() {
                    expected.clone_from(&found);
                }
                assert!(found == expected, "{layout}, {threads} threads, {}", path.display());
            }
        }
    }
    let args = ["compare", str(&int8), str(&packed), "--max-tokens", "8", "--json"];
    assert_eq!(run_json(0, &args)["identical"], true);
    let page = work.path().join("page.html");
    let args = ["compare", str(model), str(&int8), "--max-tokens", "8", "--json", "--html"];
    let report = run_json(1, &[&args[..], &[str(&page)]].concat());
    assert!(report["max_abs_logit_diff"].as_f64().unwrap() > 0.0);
    assert!(report["mean_kl"].as_f64().unwrap() > 0.0);
    assert!(std::fs::read_to_string(&page).unwrap().contains("KL divergence by position"));
    let (code, stdout, stderr) = run(&["demo", str(&int8)]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    let args = ["bench", "stream", str(&int8), str(&packed), "--memory", "120kB", "--turns", "1"];
    assert_eq!(run_json(0, &[&args[..], &["--json"]].concat())["identical"], true);
}

#[test]
fn every_command_takes_a_generated_model_of_integers() {
    let model = tiny_model(2);
    check(model.path(), "tensor");
    check(model.path(), "channel");
}

#[test]
fn every_command_takes_a_trained_model_of_integers() {
    let Some(model) = shared_model("stories260k") else { return };
    check(&model, "channel");
}

#[test]
fn the_same_call_gives_the_same_bytes() {
    let (model, work) = (tiny_model(1), tempfile::tempdir().unwrap());
    for more in [&[][..], &["--target-bits", "4.5"]] {
        let [a, b] = ["a", "b"].map(|name| work.path().join(format!("{name}{}", more.len())));
        for (target, threads) in [(&a, "1"), (&b, "2")] {
            let args = ["quantize", str(model.path()), str(target), "--granularity", "channel"];
            let (code, _, stderr) = run(&[&args[..], &["--threads", threads], more].concat());
            assert_eq!(code, 0, "{stderr}");
        }
        assert_same_folders(&a, &b);
    }
}

#[test]
fn fewer_bits_are_met_by_the_packed_file_with_less_error_than_the_baseline() {
    let (model, work) = (tiny_model(1), tempfile::tempdir().unwrap());
    let text = work.path().join("text");
    std::fs::write(&text, "Some words to run the model over. ".repeat(8)).unwrap();
    for (index, (bits, more)) in
        [("3", &[][..]), ("5", &[]), ("4", &["--calibration", str(&text)])].into_iter().enumerate()
    {
        let [int8, packed] =
            ["int8", "packed"].map(|name| work.path().join(format!("{name}{index}")));
        let args = ["quantize", str(model.path()), str(&int8), "--granularity", "channel"];
        let args = [&args[..], &["--target-bits", bits, "--json"], more].concat();
        let report = run_json(0, &args);
        let outputs = !more.is_empty();
        assert_eq!(report["minimised"], if outputs { "outputs" } else { "weights" });
        assert_eq!(run(&["pack", str(&int8), str(&packed)]).0, 0);
        let inspected = run_json(0, &["inspect", str(&packed), "--json"]);
        for tensor in report["tensors"].as_array().unwrap() {
            let rate = &tensor["rate"];
            let number = |name: &str| rate[name].as_f64().unwrap();
            assert!(number("error") < number("baseline_error"), "{tensor}");
            assert!(number("bits") <= bits.parse().unwrap(), "{tensor}");
            let stored = (inspected["tensors"].as_array().unwrap().iter())
                .find(|stored| stored["name"] == tensor["name"])
                .unwrap();
            let found = stored["bits_per_weight"].as_f64().unwrap();
            assert!((found - number("bits")).abs() < 1e-9, "{tensor} {stored}");
        }
        let args = ["run", str(&packed), "--prompt", "a", "--max-tokens", "4", "--ignore-eos"];
        assert_eq!(run(&args).0, 0);
    }
}

#[test]
fn include_and_skip_select_linear_layers_only() {
    let (model, work) = (tiny_model(1), tempfile::tempdir().unwrap());
    let names = |index: &str, more: &[&str]| -> Vec<String> {
        let target = work.path().join(index);
        let args = ["quantize", str(model.path()), str(&target), "--granularity", "tensor"];
        let report = run_json(0, &[&args[..], &["--json"], more].concat());
        let tensors = report["tensors"].as_array().unwrap().iter();
        tensors.map(|tensor| tensor["name"].as_str().unwrap().to_owned()).collect()
    };
    let usual = names("a", &[]);
    assert_eq!(usual.len(), 28);
    assert!(usual.iter().all(|name| name.starts_with("model.layers.")));
    let all = names("b", &["--include", "."]);
    assert_eq!(all.len(), 29);
    assert!(all.contains(&"lm_head.weight".to_owned()));
    assert_eq!(names("c", &["--include", "mlp", "--skip", "layers.[01]"]).len(), 6);
    let target = work.path().join("d");
    let args = ["quantize", str(model.path()), str(&target), "--granularity", "tensor"];
    let (code, _, stderr) = run(&[&args[..], &["--include", "embed_tokens"]].concat());
    assert_eq!(code, 2);
    assert!(stderr.contains("no linear layer is selected"), "{stderr}");
    assert!(!target.exists());
    for bad in [["--target-bits", "2.9"], ["--target-bits", "8"], ["--include", "("]] {
        assert_eq!(run(&[&args[..], &bad].concat()).0, 2);
    }
    let (code, _, stderr) = run(&[&args[..], &["--calibration", "x"]].concat());
    assert!(code == 2 && stderr.contains("--target-bits"), "{stderr}");
}
