//! Checkpoints made up on the spot: models with the statistics of trained
//! weights that say nothing sensible.
//!
//! Weights are Gaussian with a deviation of its own for every row, in BF16,
//! which gives the exponents the entropy of real ones. The same options give
//! the same bytes.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::error::RuntimeError;
use crate::sampler::SplitMix64;
use crate::tensors;

/// Tokens of the made-up models: one for each byte.
pub const VOCABULARY: usize = 256;

/// Tokens that stand for bytes no UTF-8 text contains.
const SPECIAL: [(usize, &str); 2] = [(0xc0, "<|begin|>"), (0xc1, "<|end|>")];

/// A checkpoint to be made up.
#[derive(Debug, Clone, PartialEq)]
pub struct SyntheticCheckpoint {
    /// The content of `config.json`.
    pub config: Value,
    /// Seed of the weights.
    pub seed: u64,
    /// Number of safetensors files.
    pub n_shards: usize,
}

impl SyntheticCheckpoint {
    /// A tiny Llama: hidden size 64, four layers, grouped-query attention.
    #[must_use]
    pub fn tiny() -> Self {
        Self { config: llama_config(64, 176, 4, 8, 4), seed: 1, n_shards: 1 }
    }

    /// A Llama of at least `target_bytes` of weights, in layers of the size
    /// that models of that size have.
    #[must_use]
    pub fn of_bytes(target_bytes: u64, n_shards: usize) -> Self {
        const SHAPES: [(usize, usize, usize, usize); 3] =
            [(2048, 5632, 16, 4), (512, 1408, 8, 4), (64, 176, 8, 4)];
        let layer_bytes = |(hidden, intermediate, heads, kv): (usize, usize, usize, usize)| {
            let kv_dim = hidden / heads * kv;
            2 * hidden as u64 * (2 * hidden + 2 * kv_dim + 3 * intermediate + 2) as u64
        };
        let fits = |shape: &&(usize, usize, usize, usize)| layer_bytes(**shape) * 8 <= target_bytes;
        let shape = *SHAPES.iter().find(fits).unwrap_or(&SHAPES[2]);
        let n_layers = target_bytes.div_ceil(layer_bytes(shape)).max(1) as usize;
        let (hidden, intermediate, heads, kv) = shape;
        let config = llama_config(hidden, intermediate, n_layers, heads, kv);
        Self { config, seed: 1, n_shards }
    }

    /// Writes the checkpoint into `dir`, which is made if need be: weights,
    /// configuration, tokenizer with a chat template. Holds one row at a time.
    ///
    /// # Errors
    ///
    /// If `config` is not one of a supported model, or writing fails.
    pub fn write(&self, dir: &Path) -> Result<(), RuntimeError> {
        let config = Config::parse(self.config.to_string().as_bytes(), None)?;
        fs::create_dir_all(dir)?;
        write_json(&dir.join("config.json"), &self.config)?;
        let (begin, end) = (SPECIAL[0].0, SPECIAL[1].0);
        write_json(
            &dir.join("generation_config.json"),
            &json!({ "bos_token_id": begin, "do_sample": false, "eos_token_id": [end] }),
        )?;
        write_json(&dir.join("tokenizer.json"), &tokenizer())?;
        write_json(&dir.join("tokenizer_config.json"), &tokenizer_config())?;
        self.write_shards(dir, &config)?;
        Ok(())
    }

    fn write_shards(&self, dir: &Path, config: &Config) -> io::Result<()> {
        let tensors = tensors::all(config);
        let n_bytes =
            |(_, shape): &(String, Vec<usize>)| 2 * shape.iter().product::<usize>() as u64;
        let total: u64 = tensors.iter().map(n_bytes).sum();
        let n_shards = self.n_shards.clamp(1, tensors.len());
        let mut shards: Vec<Vec<(String, Vec<usize>)>> = vec![Vec::new(); n_shards];
        let mut before = 0;
        for tensor in tensors {
            let shard = (u128::from(before) * n_shards as u128 / u128::from(total)) as usize;
            before += n_bytes(&tensor);
            shards[shard].push(tensor);
        }
        let mut weight_map = Map::new();
        for (index, tensors) in shards.iter().enumerate() {
            let file = match n_shards {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{n_shards:05}.safetensors", index + 1),
            };
            for (name, _) in tensors {
                weight_map.insert(name.clone(), json!(file));
            }
            self.write_shard(&dir.join(file), tensors)?;
        }
        if n_shards > 1 {
            let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
            write_json(&dir.join("model.safetensors.index.json"), &index)?;
        }
        Ok(())
    }

    fn write_shard(&self, path: &Path, tensors: &[(String, Vec<usize>)]) -> io::Result<()> {
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({ "format": "pt" }));
        let mut start = 0;
        for (name, shape) in tensors {
            let end = start + 2 * shape.iter().product::<usize>();
            let entry = json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] });
            header.insert(name.clone(), entry);
            start = end;
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        let quantiles = gaussian_quantiles();
        for (name, shape) in tensors {
            write_tensor(&mut file, name, shape, &mut self.random(name), &quantiles)?;
        }
        file.into_inner()?.sync_all()
    }

    /// The random numbers of a tensor: they do not depend on the sharding.
    fn random(&self, name: &str) -> SplitMix64 {
        // FNV-1a.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let mut random = SplitMix64(self.seed);
        SplitMix64(random.next() ^ hash)
    }
}

/// The `config.json` of a Llama with the vocabulary of this module.
#[must_use]
pub fn llama_config(
    hidden_size: usize,
    intermediate_size: usize,
    n_layers: usize,
    n_heads: usize,
    n_kv_heads: usize,
) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "bos_token_id": SPECIAL[0].0,
        "eos_token_id": SPECIAL[1].0,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 2048,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": n_heads,
        "num_hidden_layers": n_layers,
        "num_key_value_heads": n_kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_scaling": null,
        "rope_theta": 10000.0,
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
    })
}

fn write_tensor(
    out: &mut impl Write,
    name: &str,
    shape: &[usize],
    random: &mut SplitMix64,
    quantiles: &[f32],
) -> io::Result<()> {
    let cols = shape.last().copied().unwrap_or(1);
    let n_rows = shape.iter().product::<usize>() / cols.max(1);
    let mut row_bytes = Vec::with_capacity(2 * cols);
    for row in 0..n_rows {
        let (mean, deviation) = distribution(name, cols, row, random);
        row_bytes.clear();
        let mut bits = 0;
        for col in 0..cols {
            // Four weights from each random number.
            bits = if col % 4 == 0 { random.next() } else { bits >> 16 };
            let weight = mean + deviation * quantiles[(bits & 0xffff) as usize];
            row_bytes.extend_from_slice(&half::bf16::from_f32(weight).to_bits().to_le_bytes());
        }
        out.write_all(&row_bytes)?;
    }
    Ok(())
}

/// Mean and deviation of a row.
fn distribution(name: &str, cols: usize, row: usize, random: &mut SplitMix64) -> (f32, f32) {
    if name.ends_with("norm.weight") {
        return (1.0, 0.1);
    }
    if name.ends_with(".bias") {
        return (0.0, 0.3);
    }
    // From half to twice, as the rows of trained matrices differ.
    let spread = 0.5 + 1.5 * random.unit() as f32;
    // The letters are the likelier bytes, so that most output is legible.
    let letter = row == usize::from(b' ') || (row as u8).is_ascii_lowercase() && row < 128;
    let emphasis = if name == tensors::HEAD && letter { 4.0 } else { 1.0 };
    (0.0, emphasis * spread / (cols as f32).sqrt())
}

/// The value below which (i + 1/2) / 65536 of a standard Gaussian lies, for every i.
fn gaussian_quantiles() -> Vec<f32> {
    (0..1 << 16).map(|i| gaussian_quantile((f64::from(i) + 0.5) / 65_536.0) as f32).collect()
}

/// Acklam's rational approximation, relative error below 1.2e-9.
fn gaussian_quantile(p: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969683028665376e+01,
        2.209460984245205e+02,
        -2.759285104469687e+02,
        1.383_577_518_672_69e2,
        -3.066479806614716e+01,
        2.506628277459239e+00,
    ];
    const B: [f64; 6] = [
        -5.447609879822406e+01,
        1.615858368580409e+02,
        -1.556989798598866e+02,
        6.680131188771972e+01,
        -1.328068155288572e+01,
        1.0,
    ];
    const C: [f64; 6] = [
        -7.784894002430293e-03,
        -3.223964580411365e-01,
        -2.400758277161838e+00,
        -2.549732539343734e+00,
        4.374664141464968e+00,
        2.938163982698783e+00,
    ];
    const D: [f64; 5] = [
        7.784695709041462e-03,
        3.224671290700398e-01,
        2.445134137142996e+00,
        3.754408661907416e+00,
        1.0,
    ];
    const TAIL: f64 = 0.02425;
    let polynomial =
        |coefficients: &[f64], x: f64| coefficients.iter().fold(0.0, |sum, c| sum * x + c);
    if p > 0.5 {
        return -gaussian_quantile(1.0 - p);
    }
    if p < TAIL {
        let q = (-2.0 * p.ln()).sqrt();
        return polynomial(&C, q) / polynomial(&D, q);
    }
    let q = p - 0.5;
    polynomial(&A, q * q) * q / polynomial(&B, q * q)
}

fn write_json(path: &Path, value: &Value) -> io::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    let mut file = File::create(path)?;
    file.write_all(text.as_bytes())
}

/// Byte-level: a token for each byte, no merges.
fn tokenizer() -> Value {
    let special = |id: usize| SPECIAL.iter().find(|(special, _)| *special == id).map(|s| s.1);
    let mut vocabulary = Map::new();
    for (id, name) in byte_names().into_iter().enumerate() {
        let name = special(id).map_or_else(|| name.to_string(), str::to_owned);
        vocabulary.insert(name, json!(id));
    }
    let added: Vec<Value> = SPECIAL
        .iter()
        .map(|(id, content)| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true,
            })
        })
        .collect();
    let (begin_id, begin) = SPECIAL[0];
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                { "SpecialToken": { "id": begin, "type_id": 0 } },
                { "Sequence": { "id": "A", "type_id": 0 } },
            ],
            "pair": [
                { "Sequence": { "id": "A", "type_id": 0 } },
                { "Sequence": { "id": "B", "type_id": 1 } },
            ],
            "special_tokens": {
                begin: { "id": begin, "ids": [begin_id], "tokens": [begin] },
            },
        },
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false,
        },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocabulary, "merges": [],
        },
    })
}

/// The printable characters that byte-level tokenizers write bytes as:
/// themselves where they are printable, else the next from U+0100 on.
fn byte_names() -> Vec<char> {
    let mut next = 0x100;
    (0..=255_u8)
        .map(|byte| match byte {
            0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
            }
        })
        .collect()
}

fn tokenizer_config() -> Value {
    json!({
        "add_bos_token": true,
        "bos_token": SPECIAL[0].1,
        "chat_template": "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        "clean_up_tokenization_spaces": false,
        "eos_token": SPECIAL[1].1,
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
}
