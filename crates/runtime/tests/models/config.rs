//! What cannot be run is refused with the name of the field or tensor.

use serde_json::{Value, json};
use transom::layout::Layout;
use transom_runtime::config::Config;
use transom_runtime::tiny::{SyntheticCheckpoint, llama_config};
use transom_runtime::{Model, RuntimeError, StoreOptions};

use crate::written;

fn parse(changes: Value) -> Result<Config, RuntimeError> {
    let mut config = llama_config(64, 176, 2, 8, 4);
    for (field, value) in changes.as_object().unwrap() {
        if value == "(remove)" {
            config.as_object_mut().unwrap().remove(field);
        } else {
            config[field] = value.clone();
        }
    }
    Config::parse(config.to_string().as_bytes(), None)
}

#[test]
fn unsupported_fields_are_named() {
    for (changes, field) in [
        (json!({ "model_type": "gemma3" }), "model_type"),
        (json!({ "architectures": ["LlamaForSequenceClassification"] }), "architectures"),
        (json!({ "hidden_act": "gelu" }), "hidden_act"),
        (
            json!({ "quantization_config": { "quant_method": "gptq" } }),
            "quantization_config.quant_method",
        ),
        (
            json!({ "quantization_config": { "quant_method": "transom", "inner": { "quant_method": "awq" } } }),
            "quantization_config.inner.quant_method",
        ),
        (json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor"),
        (
            json!({ "rope_scaling": { "rope_type": "yarn", "factor": 4.0 } }),
            "rope_scaling.rope_type",
        ),
        (json!({ "rope_scaling": { "type": "dynamic", "factor": 4.0 } }), "rope_scaling.type"),
        (
            json!({ "rope_parameters": { "rope_theta": 1e4, "rope_type": "longrope" } }),
            "rope_parameters.rope_type",
        ),
        (
            json!({
                "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"],
                "layer_types": ["full_attention", "chunked_attention"],
            }),
            "layer_types",
        ),
    ] {
        match parse(changes.clone()) {
            Err(RuntimeError::Unsupported { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{changes}: {other:?}"),
        }
    }
    let error = parse(json!({ "rope_scaling": { "type": "yarn" } })).unwrap_err();
    assert_eq!(
        error.to_string(),
        "model not supported: `rope_scaling.type` in config.json is \"yarn\", supported is default, linear and llama3"
    );
}

#[test]
fn missing_and_impossible_fields_are_named() {
    let remove = json!("(remove)");
    for (changes, field) in [
        (json!({ "model_type": remove }), "model_type"),
        (json!({ "hidden_size": remove }), "hidden_size"),
        (json!({ "hidden_size": 0 }), "hidden_size"),
        (json!({ "hidden_size": 4294967296_u64 }), "hidden_size"),
        (json!({ "num_hidden_layers": "4" }), "num_hidden_layers"),
        (json!({ "num_attention_heads": 7, "num_key_value_heads": 7 }), "num_attention_heads"),
        (json!({ "num_key_value_heads": 3 }), "num_key_value_heads"),
        (json!({ "head_dim": 7 }), "head_dim"),
        (json!({ "vocab_size": null }), "vocab_size"),
        (json!({ "max_position_embeddings": -1 }), "max_position_embeddings"),
        (json!({ "rms_norm_eps": 0 }), "rms_norm_eps"),
        (json!({ "tie_word_embeddings": 1 }), "tie_word_embeddings"),
        (json!({ "eos_token_id": [1, -1] }), "eos_token_id"),
        (json!({ "rope_theta": remove }), "rope_theta"),
        (json!({ "rope_theta": remove, "rope_parameters": {} }), "rope_parameters.rope_theta"),
        (json!({ "rope_scaling": { "rope_type": "linear" } }), "rope_scaling.factor"),
        (json!({ "rope_scaling": 2 }), "rope_scaling"),
        (
            json!({
                "rope_scaling": { "rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
                "high_freq_factor": 4, "original_max_position_embeddings": 64 },
            }),
            "rope_scaling.high_freq_factor",
        ),
        (
            json!({
                "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
                "layer_types": ["full_attention"],
            }),
            "layer_types",
        ),
        (
            json!({
                "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
                "layer_types": ["full_attention", "sliding_attention"],
            }),
            "sliding_window",
        ),
    ] {
        match parse(changes.clone()) {
            Err(RuntimeError::Field { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{changes}: {other:?}"),
        }
    }
    assert!(matches!(Config::parse(b"{", None), Err(RuntimeError::Json { .. })));
    assert!(matches!(Config::parse(b"[]", None), Err(RuntimeError::Field { .. })));
}

#[test]
fn both_generations_of_keys_say_the_same() {
    let old = parse(json!({})).unwrap();
    let new = parse(json!({
        "rope_theta": "(remove)", "rope_scaling": "(remove)", "torch_dtype": "(remove)",
        "rope_parameters": { "rope_theta": 10000, "rope_type": "default" }, "dtype": "bfloat16",
        "eos_token_id": [0xc1], "quantization_config": { "quant_method": "transom", "inner": null },
    }));
    assert_eq!(old, new.unwrap());
}

#[test]
fn the_end_tokens_of_both_files_count() {
    let config = llama_config(64, 176, 2, 8, 4).to_string();
    let parsed = Config::parse(config.as_bytes(), Some(br#"{"eos_token_id": [5, 193]}"#)).unwrap();
    assert_eq!(parsed.eos_token_ids, [193, 5]);
}

fn load_error(change: impl FnOnce(&std::path::Path)) -> RuntimeError {
    let dir = written(&SyntheticCheckpoint::tiny());
    change(dir.path());
    Model::load(dir.path(), StoreOptions::new(Layout::Dense), &mut |_| ()).unwrap_err()
}

/// Replaces text of equal length in the header of the weights.
fn rename(dir: &std::path::Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let path = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn missing_misshapen_and_mistyped_tensors_are_named() {
    let error = load_error(|dir| rename(dir, "layers.3.mlp.up_proj", "layers.3.mlp.no_proj"));
    match error {
        RuntimeError::MissingTensor { tensor, .. } => {
            assert_eq!(tensor, "model.layers.3.mlp.up_proj.weight");
        }
        other => panic!("{other}"),
    }
    let error = load_error(|dir| rename(dir, "[176,64]", "[64,176]"));
    match error {
        RuntimeError::TensorShape { tensor, found, expected, .. } => {
            assert_eq!(tensor, "model.layers.0.mlp.gate_proj.weight");
            assert_eq!((found, expected), (vec![64, 176], vec![176, 64]));
        }
        other => panic!("{other}"),
    }
    let error = load_error(|dir| rename(dir, r#""dtype":"BF16""#, r#""dtype":"I16" "#));
    assert!(matches!(error, RuntimeError::TensorDtype { found, .. } if found == "I16"));
}

#[test]
fn missing_files_are_named() {
    for file in ["config.json", "tokenizer.json"] {
        let error = load_error(|dir| std::fs::remove_file(dir.join(file)).unwrap());
        assert_eq!(error.to_string(), format!("the checkpoint has no {file}"));
    }
}
