//! Against a naive implementation: plain loops over f64, the whole sequence
//! anew for every token, nothing shared with the runtime.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Value, json};
use transom::layout::Layout;
use transom_runtime::Session;
use transom_runtime::tiny::SyntheticCheckpoint;

use crate::{load, written};

/// Largest error of a logit, relative to the largest logit: f32 rounding over
/// a few layers of width 64.
const TOLERANCE: f64 = 1e-5;

type Tensors = HashMap<String, (Vec<usize>, Vec<f64>)>;

fn read(dir: &Path) -> Tensors {
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let data = &bytes[8 + length..];
    let tensors = header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__");
    tensors
        .map(|(name, entry)| {
            let shape: Vec<usize> = serde_json::from_value(entry["shape"].clone()).unwrap();
            let [start, end]: [usize; 2] =
                serde_json::from_value(entry["data_offsets"].clone()).unwrap();
            let widen = |b: &[u8]| {
                f64::from(f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16))
            };
            (name.clone(), (shape, data[start..end].chunks(2).map(widen).collect()))
        })
        .collect()
}

/// What differs between the families, spelled out by each test.
struct Spec {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    eps: f64,
    /// Angle per position of pair `i`.
    frequency: Box<dyn Fn(usize) -> f64>,
    /// Positions that a token sees in a layer.
    window: Box<dyn Fn(usize) -> usize>,
}

fn product(tensors: &Tensors, stem: &str, x: &[f64]) -> Vec<f64> {
    let (shape, weight) = &tensors[&format!("{stem}.weight")];
    assert_eq!(shape[1], x.len());
    let bias = tensors.get(&format!("{stem}.bias"));
    (0..shape[0])
        .map(|row| {
            let sum: f64 = (0..x.len()).map(|col| weight[row * x.len() + col] * x[col]).sum();
            sum + bias.map_or(0.0, |(_, bias)| bias[row])
        })
        .collect()
}

fn norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let mean_square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().zip(weight).map(|(x, w)| w * x / (mean_square + eps).sqrt()).collect()
}

impl Spec {
    fn head(&self, tensors: &Tensors, norm_name: &str, x: &[f64], position: usize) -> Vec<f64> {
        let x = match tensors.get(norm_name) {
            Some((_, weight)) => norm(x, weight, self.eps),
            None => x.to_vec(),
        };
        let half = self.head_dim / 2;
        let mut out = x.clone();
        for i in 0..half {
            let (sin, cos) = (position as f64 * (self.frequency)(i)).sin_cos();
            out[i] = x[i] * cos - x[i + half] * sin;
            out[i + half] = x[i + half] * cos + x[i] * sin;
        }
        out
    }

    fn logits(&self, tensors: &Tensors, tokens: &[u32]) -> Vec<f64> {
        let embedding = &tensors["model.embed_tokens.weight"];
        let hidden = embedding.0[1];
        let row = |token: u32| embedding.1[token as usize * hidden..][..hidden].to_vec();
        let mut xs: Vec<Vec<f64>> = tokens.iter().map(|&token| row(token)).collect();
        let n_layers = (0..)
            .find(|l| !tensors.contains_key(&format!("model.layers.{l}.input_layernorm.weight")));
        for layer in 0..n_layers.unwrap() {
            self.layer(tensors, layer, &mut xs);
        }
        let last = norm(xs.last().unwrap(), &tensors["model.norm.weight"].1, self.eps);
        let head =
            if tensors.contains_key("lm_head.weight") { "lm_head" } else { "model.embed_tokens" };
        product(tensors, head, &last)
    }

    fn layer(&self, tensors: &Tensors, layer: usize, xs: &mut [Vec<f64>]) {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let weight = |part: &str| tensors[&name(part)].1.as_slice();
        let d = self.head_dim;
        let normed: Vec<Vec<f64>> =
            xs.iter().map(|x| norm(x, weight("input_layernorm.weight"), self.eps)).collect();
        let project = |part: &str, x: &[f64]| product(tensors, &name(part), x);
        let keys: Vec<_> = normed.iter().map(|x| project("self_attn.k_proj", x)).collect();
        let values: Vec<_> = normed.iter().map(|x| project("self_attn.v_proj", x)).collect();
        for (position, x) in xs.iter_mut().enumerate() {
            let queries = project("self_attn.q_proj", &normed[position]);
            let mut attended = vec![0.0; self.heads * d];
            for head in 0..self.heads {
                let kv = head / (self.heads / self.kv_heads) * d;
                let query = &queries[head * d..][..d];
                let query = self.head(tensors, &name("self_attn.q_norm.weight"), query, position);
                let seen: Vec<usize> =
                    (0..=position).filter(|j| position - j < (self.window)(layer)).collect();
                let weights: Vec<f64> = seen
                    .iter()
                    .map(|&j| {
                        let key = &keys[j][kv..kv + d];
                        let key = self.head(tensors, &name("self_attn.k_norm.weight"), key, j);
                        let score: f64 = query.iter().zip(&key).map(|(q, k)| q * k).sum();
                        (score / (d as f64).sqrt()).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                for (&j, weight) in seen.iter().zip(&weights) {
                    for i in 0..d {
                        attended[head * d + i] += weight / total * values[j][kv + i];
                    }
                }
            }
            add(x, &project("self_attn.o_proj", &attended));
            let normed = norm(x, weight("post_attention_layernorm.weight"), self.eps);
            let gate = project("mlp.gate_proj", &normed);
            let up = project("mlp.up_proj", &normed);
            let active: Vec<f64> =
                gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            add(x, &project("mlp.down_proj", &active));
        }
    }
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn spec() -> Spec {
    Spec {
        heads: 8,
        kv_heads: 4,
        head_dim: 8,
        eps: 1e-5,
        frequency: Box::new(|i| 10_000_f64.powf(-(i as f64) / 4.0)),
        window: Box::new(|_| usize::MAX),
    }
}

/// Compares the logits after every one of 40 tokens; returns those of the last.
fn check(changes: Value, spec: &Spec) -> Vec<f64> {
    let mut checkpoint = SyntheticCheckpoint::tiny();
    checkpoint.config["num_hidden_layers"] = json!(3);
    for (field, value) in changes.as_object().unwrap() {
        checkpoint.config[field] = value.clone();
    }
    let dir = written(&checkpoint);
    let tensors = read(dir.path());
    let model = load(dir.path(), Layout::Rans);
    let tokens: Vec<u32> = (0..40).map(|i| (i * i * 11 + i * 3) % 256).collect();
    let mut session = Session::new(&model, tokens.len(), 16).unwrap();
    let found = session.forward(&tokens, tokens.len()).unwrap();
    let mut expected = Vec::new();
    for (n, found) in (1..).zip(found.chunks(256)) {
        expected = spec.logits(&tensors, &tokens[..n]);
        let largest = expected.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
        for (found, expected) in found.iter().zip(&expected) {
            let error = (f64::from(*found) - expected).abs() / largest;
            assert!(error < TOLERANCE, "token {n}: {found} is not {expected}");
        }
    }
    expected
}

#[test]
fn llama() {
    check(json!({}), &spec());
    check(json!({ "attention_bias": true, "mlp_bias": true }), &spec());
}

#[test]
fn llama_with_a_tied_head_and_heads_wider_than_the_stream() {
    let wide = Spec {
        head_dim: 16,
        frequency: Box::new(|i| 10_000_f64.powf(-(i as f64) / 8.0)),
        ..spec()
    };
    check(json!({ "tie_word_embeddings": true, "head_dim": 16 }), &wide);
}

#[test]
fn llama_with_scaled_rope() {
    let scaled = |i: usize| {
        let frequency = 10_000_f64.powf(-(i as f64) / 4.0);
        let turns = 64.0 * frequency / (2.0 * std::f64::consts::PI);
        let kept = ((turns - 0.5) / (4.0 - 0.5)).clamp(0.0, 1.0);
        frequency * kept + frequency / 8.0 * (1.0 - kept)
    };
    let parameters = json!({
        "rope_theta": 10_000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.5,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    });
    let spec_with = |frequency| Spec { frequency, ..spec() };
    let a = check(json!({ "rope_scaling": parameters }), &spec_with(Box::new(scaled)));
    let b = check(
        json!({ "rope_theta": null, "rope_parameters": parameters }),
        &spec_with(Box::new(scaled)),
    );
    assert_eq!(a, b);
    let linear = |i: usize| 10_000_f64.powf(-(i as f64) / 4.0) / 2.0;
    let scaling = json!({ "type": "linear", "factor": 2.0 });
    check(json!({ "rope_scaling": scaling }), &spec_with(Box::new(linear)));
}

#[test]
fn mistral_with_a_sliding_window() {
    let windowed = Spec { window: Box::new(|_| 7), ..spec() };
    check(mistral(json!(7)), &windowed);
    let far = check(mistral(json!(null)), &spec());
    assert_ne!(far, check(mistral(json!(7)), &windowed));
}

fn mistral(window: Value) -> Value {
    json!({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window,
    })
}

#[test]
fn qwen2_with_biases_and_a_window_in_its_upper_layers() {
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": true,
        "sliding_window": 5, "max_window_layers": 1,
    });
    let upper = |layer| if layer >= 1 { 5 } else { usize::MAX };
    check(config, &Spec { window: Box::new(upper), ..spec() });
    check(
        json!({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
            "use_sliding_window": false, "sliding_window": 5, "max_window_layers": 0,
        }),
        &spec(),
    );
}

#[test]
fn qwen3_with_normalised_heads_and_listed_layer_types() {
    let config = json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8,
        "use_sliding_window": true, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    });
    let listed = |layer| if layer == 1 { usize::MAX } else { 6 };
    check(config, &Spec { window: Box::new(listed), ..spec() });
}
