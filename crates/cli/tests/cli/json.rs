//! Keys that other programs rely on, and their types.

use serde_json::Value;

use crate::{run, run_json, str, tiny_model};

/// Asserts the type of each key: `number`, `string`, `array`, `bool`, or any
/// of several: `number|null`.
fn assert_keys(document: &Value, keys: &[(&str, &str)]) {
    for (key, types) in keys {
        let value = document.get(key).unwrap_or_else(|| panic!("no key {key} in {document}"));
        let found = match value {
            Value::Null => "null",
            Value::Bool(_) => "bool",
            Value::Number(_) => "number",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        assert!(types.split('|').any(|t| t == found), "{key} is {found}, expected {types}");
    }
}

#[test]
fn inspect() {
    let work = tempfile::tempdir().unwrap();
    let model = tiny_model(2);
    let (packed, page) = (work.path().join("packed"), work.path().join("page.html"));
    assert_eq!(run(&["pack", str(model.path()), str(&packed)]).0, 0);
    for path in [model.path(), &packed] {
        let report = run_json(0, &["inspect", str(path), "--json", "--html", str(&page)]);
        let is_packed = report["packed"] == true;
        let sizes = [
            ("original_bytes", "number"),
            ("packed_bytes", if is_packed { "number" } else { "null" }),
            ("bits_per_weight", "number"),
            ("entropy_bits", "number"),
        ];
        assert_keys(&report, &sizes);
        assert_eq!(is_packed, *path == packed);
        assert_keys(&report, &[("tensors", "array")]);
        for tensor in report["tensors"].as_array().unwrap() {
            assert_keys(tensor, &sizes);
            assert_keys(tensor, &[("name", "string"), ("dtype", "string"), ("shape", "array")]);
        }
        let page = std::fs::read_to_string(&page).unwrap();
        assert!(page.contains("<svg") && !page.contains("<script") && !page.contains("http"));
    }
    let (original, packed) = (
        run_json(0, &["inspect", str(model.path()), "--json"]),
        run_json(0, &["inspect", str(&packed), "--json"]),
    );
    let floor = |report: &Value| report["entropy_bits"].as_f64().unwrap();
    assert!((floor(&original) - floor(&packed)).abs() < 1e-9, "the floor is that of the weights");
    assert_eq!(original["original_bytes"], packed["original_bytes"]);
}

#[test]
fn run_and_its_logits() {
    let work = tempfile::tempdir().unwrap();
    let model = tiny_model(1);
    let logits = work.path().join("logits.safetensors");
    let args = ["run", str(model.path()), "--prompt", "Hello", "--max-tokens", "5", "--ignore-eos"];
    let report = run_json(0, &[&args[..], &["--json", "--logits", str(&logits)]].concat());
    assert_keys(
        &report,
        &[
            ("prompt_ids", "array"),
            ("ids", "array"),
            ("text", "string"),
            ("prompt_tokens_per_second", "number"),
            ("tokens_per_second", "number"),
            ("weights_bytes", "number"),
            ("peak_rss_bytes", "number"),
        ],
    );
    assert_eq!(report["ids"].as_array().unwrap().len(), 5);
    let bytes = std::fs::read(&logits).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (ids, rows) = (tensors.tensor("ids").unwrap(), tensors.tensor("logits").unwrap());
    assert_eq!((ids.dtype(), ids.shape()), (safetensors::Dtype::I64, &[5][..]));
    assert_eq!((rows.dtype(), rows.shape()), (safetensors::Dtype::F32, &[5, 256][..]));
    // Greedy: every id is where its row is largest.
    for (id, row) in report["ids"].as_array().unwrap().iter().zip(rows.data().chunks(256 * 4)) {
        let row: Vec<f32> =
            row.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let chosen = row[id.as_u64().unwrap() as usize];
        assert!(row.iter().all(|&logit| logit <= chosen));
    }
    // Text for people is the same text.
    let (code, stdout, stderr) = run(&args);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains(report["text"].as_str().unwrap().trim_end()), "{stdout}");
}

#[test]
fn compare() {
    let work = tempfile::tempdir().unwrap();
    let (model, packed) = (tiny_model(1), work.path().join("packed"));
    let (text, prompts) = (work.path().join("text.txt"), work.path().join("prompts.txt"));
    let page = work.path().join("page.html");
    std::fs::write(&text, "a short text to be predicted ".repeat(4)).unwrap();
    std::fs::write(&prompts, "one\n\ntwo\n").unwrap();
    assert_eq!(run(&["pack", str(model.path()), str(&packed)]).0, 0);
    let args = ["compare", str(model.path()), str(&packed), "--max-tokens", "4", "--json"];
    let keys = [
        ("identical", "bool"),
        ("first_divergence", "array"),
        ("max_abs_logit_diff", "number"),
        ("mean_kl", "number"),
    ];
    let report = run_json(0, &args);
    assert_keys(&report, &keys);
    assert_keys(&report, &[("perplexity_base", "null"), ("perplexity_other", "null")]);
    assert_eq!(report["identical"], true);
    assert_eq!(report["first_divergence"], serde_json::json!(vec![Value::Null; 8]));
    let more = ["--prompts", str(&prompts), "--text", str(&text), "--html", str(&page)];
    let report = run_json(0, &[&args[..], &more].concat());
    assert_keys(&report, &keys);
    assert_keys(&report, &[("perplexity_base", "number"), ("perplexity_other", "number")]);
    assert_eq!(report["perplexity_base"], report["perplexity_other"]);
    assert_eq!(report["first_divergence"].as_array().unwrap().len(), 2);
    assert!(std::fs::read_to_string(&page).unwrap().contains("<svg"));
}

#[test]
fn compare_of_different_models_exits_with_1() {
    let (a, b) = (tiny_model(1), tiny_model(1));
    let file = b.path().join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    // The exponents of the last few hundred weights.
    let n = bytes.len();
    bytes[n - 1024..].iter_mut().skip(1).step_by(2).for_each(|byte| *byte ^= 0x02);
    std::fs::write(&file, bytes).unwrap();
    let args = ["compare", str(a.path()), str(b.path()), "--max-tokens", "4", "--json"];
    let report = run_json(1, &args);
    assert_eq!(report["identical"], false);
    assert!(report["max_abs_logit_diff"].as_f64().unwrap() > 0.0);
}

#[test]
fn bench_codec() {
    let model = tiny_model(1);
    let file = model.path().join("model.safetensors");
    let report = run_json(0, &["bench", "codec", "--input", str(&file), "--json"]);
    let results = report["results"].as_array().unwrap();
    let engines: Vec<_> = results.iter().map(|r| r["engine"].as_str().unwrap()).collect();
    for engine in ["transom/scalar", "zstd-1", "zstd-3", "lz4", "memcpy"] {
        assert!(engines.contains(&engine), "{engines:?}");
    }
    for result in results {
        assert_keys(
            result,
            &[
                ("threads", "number"),
                ("ratio", "number"),
                ("encode_gbps", "number"),
                ("decode_gbps", "number"),
            ],
        );
        assert_eq!(result["identical"], true);
    }
}

#[test]
fn bench_matmul() {
    let args = ["bench", "matmul", "--shapes", "64x48,16x512", "--batch", "1,3", "--json"];
    let report = run_json(0, &[&args[..], &["--dtype", "bf16,f16", "--threads", "1"]].concat());
    let results = report["results"].as_array().unwrap();
    assert_eq!(results.len(), 2 * 2 * 2 * 3);
    for result in results {
        assert_keys(
            result,
            &[
                ("device", "string"),
                ("dtype", "string"),
                ("layout", "string"),
                ("rows", "number"),
                ("cols", "number"),
                ("batch", "number"),
                ("us", "number"),
                ("weight_gbps", "number"),
                ("bits_per_weight", "number"),
                ("speedup_vs_dense", "number"),
            ],
        );
        assert_eq!(result["identical"], true);
    }
}

#[test]
fn pack_unpack_verify() {
    let work = tempfile::tempdir().unwrap();
    let model = tiny_model(1);
    let (packed, back) = (work.path().join("packed"), work.path().join("back"));
    let sizes = [("original_bytes", "number"), ("packed_bytes", "number")];
    assert_keys(&run_json(0, &["pack", str(model.path()), str(&packed), "--json"]), &sizes);
    assert_keys(&run_json(0, &["verify", str(&packed), "--json"]), &[("ok", "bool")]);
    assert_keys(&run_json(0, &["unpack", str(&packed), str(&back), "--json"]), &sizes[..1]);
}
