//! A Hugging Face checkpoint of what was trained.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use burn_tensor::backend::Backend;
use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::data::{BEGIN, END, Tokenizer};
use crate::error::{At, TrainError};
use crate::model::LlamaConfig;
use crate::parameters::{Stored, Values};
use crate::state::{floats, write_whole};
use crate::train::{Quantization, TrainOptions};

/// Bytes of a tensor of the file.
struct Entry {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Writes a checkpoint of `tensors`, those of a [`Trainer`](crate::train::Trainer) with
/// `options`, into `directory`, which is made if need be.
///
/// Weights that were trained as integers are stored as I8 and, as `weight_scale`, F32; all
/// others as BF16.
///
/// # Errors
///
/// [`TrainError::Io`] if writing fails.
pub fn export<B: Backend>(
    directory: &Path,
    options: &TrainOptions,
    tensors: &[Stored<B>],
    tokenizer: &Tokenizer,
) -> Result<(), TrainError> {
    let entries: Vec<Entry> = tensors.iter().flat_map(entries).collect();
    let mut views = Vec::new();
    for entry in &entries {
        let view = TensorView::new(entry.dtype, entry.shape.clone(), &entry.bytes);
        views.push((entry.name.as_str(), view.map_err(|error| wrong(directory, error))?));
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let weights =
        safetensors::serialize(views, Some(metadata)).map_err(|error| wrong(directory, error))?;
    fs::create_dir_all(directory).at(directory)?;
    let write_json = |name: &str, value: &Value| {
        write_whole(&directory.join(name), format!("{value:#}\n").as_bytes())
    };
    write_whole(&directory.join("model.safetensors"), &weights)?;
    write_whole(&directory.join("tokenizer.json"), tokenizer.json().as_bytes())?;
    write_json("tokenizer_config.json", &tokenizer_config(&options.model))?;
    write_json("generation_config.json", &generation_config())?;
    write_json("config.json", &config(&options.model, options.quantization))
}

/// One entry, or two: integers and their scales.
fn entries<B: Backend>(tensor: &Stored<B>) -> Vec<Entry> {
    let spec = &tensor.spec;
    let entry = |name, dtype, shape, bytes| Entry { name, dtype, shape, bytes };
    match &tensor.values {
        Values::Bf16(weights) => {
            let bytes = floats(weights.clone()).into_iter().map(bf16::from_f32);
            let bytes = bytes.flat_map(bf16::to_le_bytes).collect();
            vec![entry(spec.name.clone(), Dtype::BF16, spec.shape(), bytes)]
        }
        Values::Int8 { integers, scales } => {
            let integers = floats(integers.clone()).into_iter().map(|q| q as i8 as u8).collect();
            let scale_shape = match scales.dims() {
                [1, 1] => vec![1],
                [rows, _] => vec![rows, 1],
            };
            let scales = floats(scales.clone()).into_iter().flat_map(f32::to_le_bytes).collect();
            vec![
                entry(spec.name.clone(), Dtype::I8, spec.shape(), integers),
                entry(format!("{}_scale", spec.name), Dtype::F32, scale_shape, scales),
            ]
        }
    }
}

/// With the keys of `transformers` 5 (`dtype`, `rope_parameters`) and of its predecessors.
fn config(model: &LlamaConfig, quantization: Option<Quantization>) -> Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": BEGIN.1,
        "dtype": "bfloat16",
        "eos_token_id": END.1,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.initializer_range,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_hidden_layers,
        "num_key_value_heads": model.num_key_value_heads,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_parameters": { "rope_theta": model.rope_theta, "rope_type": "default" },
        "rope_scaling": null,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "use_cache": true,
        "vocab_size": model.vocab_size,
    });
    if let Some(quantization) = quantization {
        config["quantization_config"] = quantization_config(quantization);
    }
    config
}

/// As readers of `compressed-tensors` look for it. The format stands in the
/// group too: at the top alone, `transformers` ignores it.
fn quantization_config(quantization: Quantization) -> Value {
    json!({
        "config_groups": {
            "group_0": {
                "format": "int-quantized",
                "input_activations": null,
                "output_activations": null,
                "targets": ["Linear"],
                "weights": {
                    "dynamic": false,
                    "group_size": null,
                    "num_bits": 8,
                    "strategy": quantization.granularity.name(),
                    "symmetric": true,
                    "type": "int",
                },
            },
        },
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    })
}

fn generation_config() -> Value {
    json!({ "bos_token_id": BEGIN.1, "do_sample": false, "eos_token_id": [END.1] })
}

fn tokenizer_config(model: &LlamaConfig) -> Value {
    json!({
        "add_bos_token": true,
        "bos_token": BEGIN.0,
        "clean_up_tokenization_spaces": false,
        "eos_token": END.0,
        "model_max_length": model.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
}

fn wrong(directory: &Path, error: safetensors::SafeTensorError) -> TrainError {
    TrainError::State { path: directory.join("model.safetensors"), reason: error.to_string() }
}
