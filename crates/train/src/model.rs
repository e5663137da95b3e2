//! A Llama decoder as a function of its parameters.
//!
//! Parameters are a list of matrices in the order of [`LlamaConfig::tensors`], a norm's
//! weights being a matrix of one row: that is all an optimiser, a state file and
//! a checkpoint need to know of a model.

use burn_tensor::activation::{log_softmax, silu, softmax};
use burn_tensor::backend::{AutodiffBackend, Backend};
use burn_tensor::{Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::random::SplitMix64;

/// Shape and constants of a decoder, with the names of Hugging Face's `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LlamaConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the number of query heads.
    pub num_key_value_heads: usize,
    /// Width of a head, even.
    pub head_dim: usize,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Positions the model is made for.
    pub max_position_embeddings: usize,
    /// Added to the mean square before the root.
    pub rms_norm_eps: f64,
    /// Base of the rotary position embedding.
    pub rope_theta: f64,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// Deviation of the weights before training.
    pub initializer_range: f64,
}

impl Default for LlamaConfig {
    /// 6 layers of width 192: three million weights.
    fn default() -> Self {
        Self {
            hidden_size: 192,
            intermediate_size: 512,
            num_hidden_layers: 6,
            num_attention_heads: 6,
            num_key_value_heads: 3,
            head_dim: 32,
            vocab_size: 2048,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            tie_word_embeddings: true,
            initializer_range: 0.02,
        }
    }
}

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The embedding.
    Embedding,
    /// A norm's weights.
    Norm,
    /// The matrix of a linear layer within a decoder layer.
    Linear,
    /// The matrix of a linear layer that adds to the residual stream.
    Output,
    /// The head.
    Head,
    /// What scales are widened by; not a part of the model.
    Stretch,
}

impl Role {
    /// Whether it is the matrix of a linear layer other than the head.
    #[must_use]
    pub const fn is_linear(self) -> bool {
        matches!(self, Self::Linear | Self::Output)
    }
}

/// Name, shape and role of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in a checkpoint.
    pub name: String,
    /// Rows; 1 for a norm, which has one dimension in a checkpoint.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// What it is for.
    pub role: Role,
}

impl TensorSpec {
    /// Its shape in a checkpoint.
    #[must_use]
    pub fn shape(&self) -> Vec<usize> {
        match self.role {
            Role::Norm => vec![self.cols],
            _ => vec![self.rows, self.cols],
        }
    }
}

/// Tensors of a layer.
const PER_LAYER: usize = 9;

impl LlamaConfig {
    /// Checks that there is such a model.
    ///
    /// # Errors
    ///
    /// [`TrainError::Field`] with the first field that is out of range.
    pub fn check(&self) -> Result<(), TrainError> {
        let counts = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        let wrong = |field, found: String, expected: &str| {
            Err(TrainError::Field { field, found, expected: expected.to_owned() })
        };
        for (field, count) in counts {
            if count == 0 || count > 1 << 24 {
                return wrong(field, count.to_string(), "a number from 1 to 16777216");
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let expected =
                format!("a divisor of num_attention_heads ({})", self.num_attention_heads);
            return wrong("num_key_value_heads", self.num_key_value_heads.to_string(), &expected);
        }
        if !self.head_dim.is_multiple_of(2) {
            return wrong("head_dim", self.head_dim.to_string(), "an even number");
        }
        let numbers = [
            ("rms_norm_eps", self.rms_norm_eps),
            ("rope_theta", self.rope_theta),
            ("initializer_range", self.initializer_range),
        ];
        for (field, number) in numbers {
            if !(number.is_finite() && number > 0.0) {
                return wrong(field, number.to_string(), "a positive number");
            }
        }
        Ok(())
    }

    /// Every tensor, in the order of the parameters.
    #[must_use]
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let (hidden, intermediate) = (self.hidden_size, self.intermediate_size);
        let q_dim = self.num_attention_heads * self.head_dim;
        let kv_dim = self.num_key_value_heads * self.head_dim;
        let spec =
            |name: &str, rows, cols, role| TensorSpec { name: name.to_owned(), rows, cols, role };
        let mut specs =
            vec![spec("model.embed_tokens.weight", self.vocab_size, hidden, Role::Embedding)];
        for layer in 0..self.num_hidden_layers {
            let tensors: [(&str, usize, usize, Role); PER_LAYER] = [
                ("input_layernorm", 1, hidden, Role::Norm),
                ("post_attention_layernorm", 1, hidden, Role::Norm),
                ("self_attn.q_proj", q_dim, hidden, Role::Linear),
                ("self_attn.k_proj", kv_dim, hidden, Role::Linear),
                ("self_attn.v_proj", kv_dim, hidden, Role::Linear),
                ("self_attn.o_proj", hidden, q_dim, Role::Output),
                ("mlp.gate_proj", intermediate, hidden, Role::Linear),
                ("mlp.up_proj", intermediate, hidden, Role::Linear),
                ("mlp.down_proj", hidden, intermediate, Role::Output),
            ];
            for (name, rows, cols, role) in tensors {
                specs.push(spec(&format!("model.layers.{layer}.{name}.weight"), rows, cols, role));
            }
        }
        specs.push(spec("model.norm.weight", 1, hidden, Role::Norm));
        if !self.tie_word_embeddings {
            specs.push(spec("lm_head.weight", self.vocab_size, hidden, Role::Head));
        }
        specs
    }

    /// Number of weights.
    #[must_use]
    pub fn n_weights(&self) -> usize {
        self.tensors().iter().map(|spec| spec.rows * spec.cols).sum()
    }

    /// Parameters before training: norms 1, all else Gaussian, what adds to the
    /// residual stream less the more layers there are.
    #[must_use]
    pub fn initial<B: Backend>(&self, seed: u64, device: &B::Device) -> Vec<Tensor<B, 2>> {
        let outputs = (2.0 * self.num_hidden_layers as f64).sqrt();
        let tensor = |(index, spec): (usize, &TensorSpec)| {
            let deviation = match spec.role {
                Role::Norm => return Tensor::ones([spec.rows, spec.cols], device),
                Role::Output => self.initializer_range / outputs,
                _ => self.initializer_range,
            };
            let mut random = SplitMix64::new(seed, index as u64);
            let weights = (0..spec.rows * spec.cols).map(|_| deviation as f32 * random.gaussian());
            let data = TensorData::new(weights.collect::<Vec<f32>>(), [spec.rows, spec.cols]);
            Tensor::from_data(data, device)
        };
        self.tensors().iter().enumerate().map(tensor).collect()
    }
}

/// What a forward pass needs besides parameters, for one length of sequences.
#[derive(Debug, Clone)]
pub struct Tables<B: Backend> {
    /// Cosines, `[1, tokens, 1, head_dim / 2]`.
    cos: Tensor<B, 4>,
    /// Sines, likewise.
    sin: Tensor<B, 4>,
    /// 0 where a token sees another and very low where not, `[1, 1, tokens, tokens]`.
    mask: Tensor<B, 4>,
}

impl<B: Backend> Tables<B> {
    /// Tables for sequences of `n_tokens`.
    #[must_use]
    pub fn new(config: &LlamaConfig, n_tokens: usize, device: &B::Device) -> Self {
        let half = config.head_dim / 2;
        let frequency = |i: usize| config.rope_theta.powf(-2.0 * i as f64 / config.head_dim as f64);
        let angles: Vec<f64> = (0..n_tokens)
            .flat_map(|position| (0..half).map(move |i| position as f64 * frequency(i)))
            .collect();
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|angle| f(*angle) as f32).collect();
            Tensor::from_data(TensorData::new(values, [1, n_tokens, 1, half]), device)
        };
        let mask = (0..n_tokens)
            .flat_map(|row| (0..n_tokens).map(move |col| if col <= row { 0.0_f32 } else { -1e9 }));
        let mask = TensorData::new(mask.collect::<Vec<f32>>(), [1, 1, n_tokens, n_tokens]);
        Self { cos: table(f64::cos), sin: table(f64::sin), mask: Tensor::from_data(mask, device) }
    }
}

impl<B: Backend> Tables<B> {
    /// The same tables for a backend with gradients.
    #[must_use]
    pub fn to_autodiff<A: AutodiffBackend<InnerBackend = B>>(&self) -> Tables<A> {
        Tables {
            cos: Tensor::from_inner(self.cos.clone()),
            sin: Tensor::from_inner(self.sin.clone()),
            mask: Tensor::from_inner(self.mask.clone()),
        }
    }
}

/// Logits `[sequences × tokens, vocabulary]` after each of `tokens`
/// `[sequences, tokens]`. `tables` are for that number of tokens.
///
/// # Panics
///
/// If `parameters` are not those of `config`.
#[must_use]
pub fn forward<B: Backend>(
    config: &LlamaConfig,
    parameters: &[Tensor<B, 2>],
    tables: &Tables<B>,
    tokens: Tensor<B, 2, Int>,
) -> Tensor<B, 2> {
    let shape = tokens.dims();
    let [n_sequences, n_tokens] = shape;
    let n_layers = config.num_hidden_layers;
    let embedding = &parameters[0];
    let mut stream = embedding.clone().select(0, tokens.reshape([n_sequences * n_tokens]));
    for layer in parameters[1..=PER_LAYER * n_layers].chunks_exact(PER_LAYER) {
        let [input_norm, mlp_norm, q, k, v, o, gate, up, down] = layer else {
            unreachable!("chunks are exact")
        };
        let x = rms_norm(stream.clone(), input_norm, config.rms_norm_eps);
        let heads = attention(config, tables, [&x, q, k, v], shape);
        stream = stream + linear(heads, o);
        let x = rms_norm(stream.clone(), mlp_norm, config.rms_norm_eps);
        let inner = silu(linear(x.clone(), gate)) * linear(x, up);
        stream = stream + linear(inner, down);
    }
    let stream = rms_norm(stream, &parameters[1 + PER_LAYER * n_layers], config.rms_norm_eps);
    let head =
        if config.tie_word_embeddings { embedding } else { &parameters[2 + PER_LAYER * n_layers] };
    linear(stream, head)
}

/// Mean cross-entropy in nats of `targets` `[sequences, tokens]` under `logits`.
#[must_use]
pub fn cross_entropy<B: Backend>(logits: Tensor<B, 2>, targets: Tensor<B, 2, Int>) -> Tensor<B, 1> {
    let [n_sequences, n_tokens] = targets.dims();
    let targets = targets.reshape([n_sequences * n_tokens, 1]);
    log_softmax(logits, 1).gather(1, targets).mean().neg()
}

fn linear<B: Backend>(x: Tensor<B, 2>, weight: &Tensor<B, 2>) -> Tensor<B, 2> {
    x.matmul(weight.clone().transpose())
}

fn rms_norm<B: Backend>(x: Tensor<B, 2>, weight: &Tensor<B, 2>, eps: f64) -> Tensor<B, 2> {
    let root = (x.clone() * x.clone()).mean_dim(1).add_scalar(eps).sqrt();
    x / root * weight.clone()
}

/// The heads' outputs, `[sequences × tokens, heads × head_dim]`. The query heads
/// that share a key are rows of one product.
fn attention<B: Backend>(
    config: &LlamaConfig,
    tables: &Tables<B>,
    [x, q, k, v]: [&Tensor<B, 2>; 4],
    [n_sequences, n_tokens]: [usize; 2],
) -> Tensor<B, 2> {
    let (n_kv, head_dim) = (config.num_key_value_heads, config.head_dim);
    let group = config.num_attention_heads / n_kv;
    let heads = |weight: &Tensor<B, 2>, n_heads: usize| {
        linear(x.clone(), weight).reshape([n_sequences, n_tokens, n_heads, head_dim])
    };
    let q = rotate(heads(q, n_kv * group), tables)
        .reshape([n_sequences, n_tokens, n_kv, group, head_dim])
        .permute([0, 2, 3, 1, 4])
        .reshape([n_sequences * n_kv, group * n_tokens, head_dim]);
    let by_head =
        |x: Tensor<B, 4>| x.permute([0, 2, 1, 3]).reshape([n_sequences * n_kv, n_tokens, head_dim]);
    let k = by_head(rotate(heads(k, n_kv), tables));
    let v = by_head(heads(v, n_kv));
    let scale = 1.0 / (head_dim as f64).sqrt();
    let scores = q.mul_scalar(scale).matmul(k.transpose());
    let scores = scores.reshape([n_sequences * n_kv, group, n_tokens, n_tokens]);
    let shares = softmax(scores + tables.mask.clone(), 3);
    shares
        .reshape([n_sequences * n_kv, group * n_tokens, n_tokens])
        .matmul(v)
        .reshape([n_sequences, n_kv, group, n_tokens, head_dim])
        .permute([0, 3, 1, 2, 4])
        .reshape([n_sequences * n_tokens, n_kv * group * head_dim])
}

/// Turns element i of each head with element i + `head_dim` / 2, as Hugging Face does.
fn rotate<B: Backend>(x: Tensor<B, 4>, tables: &Tables<B>) -> Tensor<B, 4> {
    let half = x.dims()[3] / 2;
    let (low, high) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
    let (cos, sin) = (tables.cos.clone(), tables.sin.clone());
    let turned = [low.clone() * cos.clone() - high.clone() * sin.clone(), high * cos + low * sin];
    Tensor::cat(turned.into(), 3)
}
