//! The shape of a model, read from `config.json`.
//!
//! Everything that would change the result is either understood or refused
//! with the name of the field; nothing is guessed.

use serde_json::{Map, Value};

use crate::error::RuntimeError;
use crate::rope::{RopeConfig, RopeScaling};

const FILE: &str = "config.json";

/// The families this runtime runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// Llama 1 to 3.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: q and k are normalised per head.
    Qwen3,
}

impl Family {
    const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// The value of `model_type`.
    #[must_use]
    pub const fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// The value of `architectures`.
    #[must_use]
    pub const fn architecture(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }
}

/// Shape and constants of a decoder. Fields have the names of `config.json`
/// where there is one.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The family.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Number of layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head, even.
    pub head_dim: usize,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Positions the model was made for.
    pub max_position_embeddings: usize,
    /// Added to the mean square before the root.
    pub rms_norm_eps: f32,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// o has a bias.
    pub o_bias: bool,
    /// gate, up and down have biases.
    pub mlp_bias: bool,
    /// q and k are normalised per head.
    pub qk_norm: bool,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Per layer: how many positions a token sees, itself included; `None` for all.
    pub windows: Vec<Option<usize>>,
    /// Tokens that end a text, from `config.json` and `generation_config.json`.
    pub eos_token_ids: Vec<u32>,
    /// First token of a text, if there is one.
    pub bos_token_id: Option<u32>,
    /// `dtype` or `torch_dtype`: what the weights were meant to be stored as.
    /// The tensors themselves say what they are.
    pub dtype: Option<String>,
}

impl Config {
    /// Reads `config.json` and, where there is one, `generation_config.json`.
    ///
    /// # Errors
    ///
    /// [`RuntimeError::Field`] if a field is missing or impossible,
    /// [`RuntimeError::Unsupported`] if it is more than this runtime can do.
    pub fn parse(config: &[u8], generation_config: Option<&[u8]>) -> Result<Self, RuntimeError> {
        let config = Object::parse(FILE, config)?;
        let mut parsed = Self::from_object(&config)?;
        if let Some(bytes) = generation_config {
            let generation = Object::parse("generation_config.json", bytes)?;
            for id in generation.token_ids("eos_token_id")? {
                if !parsed.eos_token_ids.contains(&id) {
                    parsed.eos_token_ids.push(id);
                }
            }
        }
        Ok(parsed)
    }

    fn from_object(config: &Object) -> Result<Self, RuntimeError> {
        let family = family(config)?;
        refuse_other_quantization(config)?;
        refuse_other_activations(config)?;
        let hidden_size = config.count("hidden_size")?;
        let n_heads = config.count("num_attention_heads")?;
        let n_kv_heads = config.optional_count("num_key_value_heads")?.unwrap_or(n_heads);
        if !n_heads.is_multiple_of(n_kv_heads) {
            return Err(config.wrong(
                "num_key_value_heads",
                format!("a divisor of num_attention_heads ({n_heads})"),
            ));
        }
        let n_layers = config.count("num_hidden_layers")?;
        let attention_bias = config.flag("attention_bias")?.unwrap_or(false);
        Ok(Self {
            family,
            hidden_size,
            intermediate_size: config.count("intermediate_size")?,
            n_layers,
            n_heads,
            n_kv_heads,
            head_dim: head_dim(config, family, hidden_size, n_heads)?,
            vocab_size: config.count("vocab_size")?,
            max_position_embeddings: config.count("max_position_embeddings")?,
            rms_norm_eps: config.positive("rms_norm_eps")? as f32,
            tie_word_embeddings: config.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: match family {
                Family::Llama | Family::Qwen3 => attention_bias,
                Family::Mistral => false,
                Family::Qwen2 => true,
            },
            o_bias: matches!(family, Family::Llama | Family::Qwen3) && attention_bias,
            mlp_bias: family == Family::Llama && config.flag("mlp_bias")?.unwrap_or(false),
            qk_norm: family == Family::Qwen3,
            rope: rope(config)?,
            windows: windows(config, family, n_layers)?,
            eos_token_ids: config.token_ids("eos_token_id")?,
            bos_token_id: config.token_ids("bos_token_id")?.first().copied(),
            dtype: match config.text("dtype")? {
                Some(dtype) => Some(dtype),
                None => config.text("torch_dtype")?,
            },
        })
    }

    /// Elements of all query heads of a token.
    #[must_use]
    pub const fn q_dim(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Elements of all key heads of a token; also of all value heads.
    #[must_use]
    pub const fn kv_dim(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }
}

fn family(config: &Object) -> Result<Family, RuntimeError> {
    let model_type = config.text("model_type")?;
    let model_type = model_type.ok_or_else(|| config.wrong("model_type", "a string"))?;
    let family = Family::ALL.into_iter().find(|f| f.model_type() == model_type);
    let family = family
        .ok_or_else(|| config.unsupported("model_type", "llama, mistral, qwen2 and qwen3"))?;
    match config.get("architectures") {
        None => Ok(family),
        Some(Value::Array(names)) if names.iter().any(|name| name == family.architecture()) => {
            Ok(family)
        }
        Some(_) => Err(config.unsupported("architectures", family.architecture())),
    }
}

/// INT8 weights of `compressed-tensors` are what the runtime knows; which
/// matrices have them, the tensors say.
fn refuse_other_quantization(config: &Object) -> Result<(), RuntimeError> {
    let Some(quantization) = config.object("quantization_config")? else { return Ok(()) };
    // A packed checkpoint names transom here and keeps what was there before.
    let ours = quantization.text("quant_method")?.as_deref() == Some("transom");
    let inner = if ours { quantization.object("inner")? } else { Some(quantization) };
    let Some(inner) = inner else { return Ok(()) };
    expect(&inner, "quant_method", &"compressed-tensors".into())?;
    if inner.has("quantization_status") {
        expect(&inner, "quantization_status", &"compressed".into())?;
    }
    if inner.get("kv_cache_scheme").is_some() {
        return Err(inner.unsupported("kv_cache_scheme", "null"));
    }
    if inner.object("transform_config")?.is_some_and(|transforms| !transforms.fields.is_empty()) {
        return Err(inner.unsupported("transform_config", "null"));
    }
    let Some(groups) = inner.object("config_groups")? else {
        return Err(inner.wrong("config_groups", "an object"));
    };
    for name in groups.fields.keys() {
        let Some(group) = groups.object(name)? else { continue };
        // Older writers have it for all groups at once.
        let format = if group.has("format") { &group } else { &inner };
        expect(format, "format", &"int-quantized".into())?;
        for activations in ["input_activations", "output_activations"] {
            if group.get(activations).is_some() {
                return Err(group.unsupported(activations, "null: weights only"));
            }
        }
        let Some(weights) = group.object("weights")? else {
            return Err(group.wrong("weights", "an object"));
        };
        expect(&weights, "num_bits", &8.into())?;
        expect(&weights, "type", &"int".into())?;
        expect(&weights, "symmetric", &true.into())?;
        match weights.text("strategy")?.as_deref() {
            Some("tensor" | "channel") => {}
            _ => return Err(weights.unsupported("strategy", "tensor and channel")),
        }
    }
    Ok(())
}

/// Refuses any other value of a field.
fn expect(object: &Object, field: &str, value: &Value) -> Result<(), RuntimeError> {
    match object.get(field) {
        Some(found) if found == value => Ok(()),
        _ => Err(object.unsupported(field, &value.to_string())),
    }
}

fn refuse_other_activations(config: &Object) -> Result<(), RuntimeError> {
    match config.text("hidden_act")?.as_deref() {
        None | Some("silu" | "swish") => Ok(()),
        Some(_) => Err(config.unsupported("hidden_act", "silu")),
    }
}

fn head_dim(
    config: &Object,
    family: Family,
    hidden_size: usize,
    n_heads: usize,
) -> Result<usize, RuntimeError> {
    let head_dim = match (config.optional_count("head_dim")?, family) {
        (Some(head_dim), _) => head_dim,
        (None, Family::Qwen3) => 128,
        (None, _) if hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
        (None, _) => {
            return Err(config.wrong("num_attention_heads", format!("a divisor of {hidden_size}")));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(config.wrong("head_dim", "an even number"));
    }
    Ok(head_dim)
}

/// Both generations of keys: `rope_parameters`, or `rope_theta` with `rope_scaling`.
fn rope(config: &Object) -> Result<RopeConfig, RuntimeError> {
    let factor = config.get("partial_rotary_factor").and_then(Value::as_f64);
    if factor.is_some_and(|factor| factor != 1.0) {
        return Err(config.unsupported("partial_rotary_factor", "1"));
    }
    if let Some(parameters) = config.object("rope_parameters")? {
        // Some writers left the base where it was.
        let theta = if parameters.get("rope_theta").is_some() { &parameters } else { config };
        if parameters.get("partial_rotary_factor").is_some_and(|f| f.as_f64() != Some(1.0)) {
            return Err(parameters.unsupported("partial_rotary_factor", "1"));
        }
        if theta.get("rope_theta").is_none() {
            return Err(parameters.wrong("rope_theta", "a positive number"));
        }
        return Ok(RopeConfig {
            theta: theta.positive("rope_theta")?,
            scaling: rope_scaling(&parameters)?,
        });
    }
    if config.get("rope_theta").is_none() {
        return Err(config.wrong("rope_theta", "a positive number (or `rope_parameters`)"));
    }
    let scaling = config.object("rope_scaling")?;
    Ok(RopeConfig {
        theta: config.positive("rope_theta")?,
        scaling: scaling.as_ref().map_or(Ok(RopeScaling::None), rope_scaling)?,
    })
}

fn rope_scaling(parameters: &Object) -> Result<RopeScaling, RuntimeError> {
    let key = if parameters.get("rope_type").is_some() { "rope_type" } else { "type" };
    match parameters.text(key)?.as_deref() {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: parameters.positive("factor")? }),
        Some("llama3") => {
            let low = parameters.positive("low_freq_factor")?;
            let high = parameters.positive("high_freq_factor")?;
            if high <= low {
                return Err(parameters
                    .wrong("high_freq_factor", format!("more than low_freq_factor ({low})")));
            }
            Ok(RopeScaling::Llama3 {
                factor: parameters.positive("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: parameters
                    .count("original_max_position_embeddings")?,
            })
        }
        Some(_) => Err(parameters.unsupported(key, "default, linear and llama3")),
    }
}

/// How far each layer sees, by the rules of each family's configuration class.
fn windows(
    config: &Object,
    family: Family,
    n_layers: usize,
) -> Result<Vec<Option<usize>>, RuntimeError> {
    let window = match family {
        Family::Llama => return Ok(vec![None; n_layers]),
        // Without the key, Mistral 7B 0.1 is meant; later ones say null.
        Family::Mistral if !config.has("sliding_window") => Some(4096),
        Family::Mistral => config.optional_count("sliding_window")?,
        Family::Qwen2 | Family::Qwen3 => {
            let used = config.flag("use_sliding_window")?.unwrap_or(false);
            if used { Some(config.optional_count("sliding_window")?.unwrap_or(4096)) } else { None }
        }
    };
    match config.get("layer_types") {
        Some(Value::Array(types)) => listed_windows(config, types, window, n_layers),
        Some(_) => Err(config.wrong("layer_types", "a list of strings")),
        None if family == Family::Mistral => Ok(vec![window; n_layers]),
        None => {
            let first = match window {
                Some(_) if config.has("max_window_layers") => config.size("max_window_layers")?,
                Some(_) => 28,
                None => n_layers,
            };
            Ok((0..n_layers).map(|layer| window.filter(|_| layer >= first)).collect())
        }
    }
}

fn listed_windows(
    config: &Object,
    types: &[Value],
    window: Option<usize>,
    n_layers: usize,
) -> Result<Vec<Option<usize>>, RuntimeError> {
    if types.len() != n_layers {
        return Err(config.wrong("layer_types", format!("a list of {n_layers} strings")));
    }
    let window_of = |kind: &Value| match (kind.as_str(), window) {
        (Some("full_attention"), _) => Ok(None),
        (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
        (Some("sliding_attention"), None) => Err(config
            .wrong("sliding_window", "a number, because `layer_types` names sliding_attention")),
        _ => Err(RuntimeError::Unsupported {
            field: "layer_types".into(),
            found: kind.to_string(),
            supported: "full_attention and sliding_attention".into(),
        }),
    };
    types.iter().map(window_of).collect()
}

/// A JSON object that knows where it came from. A null value counts as absent.
struct Object {
    file: &'static str,
    /// Prefix of its fields' names.
    prefix: String,
    fields: Map<String, Value>,
}

impl Object {
    fn parse(file: &'static str, bytes: &[u8]) -> Result<Self, RuntimeError> {
        let value: Value =
            serde_json::from_slice(bytes).map_err(|source| RuntimeError::Json { file, source })?;
        match value {
            Value::Object(fields) => Ok(Self { file, prefix: String::new(), fields }),
            other => Err(RuntimeError::Field {
                file,
                field: "(all)".into(),
                found: other.to_string(),
                expected: "an object".into(),
            }),
        }
    }

    fn has(&self, field: &str) -> bool {
        self.fields.contains_key(field)
    }

    fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    fn found(&self, field: &str) -> String {
        self.fields.get(field).map_or_else(|| "missing".into(), Value::to_string)
    }

    fn wrong(&self, field: &str, expected: impl Into<String>) -> RuntimeError {
        RuntimeError::Field {
            file: self.file,
            field: format!("{}{field}", self.prefix),
            found: self.found(field),
            expected: expected.into(),
        }
    }

    fn unsupported(&self, field: &str, supported: &str) -> RuntimeError {
        RuntimeError::Unsupported {
            field: format!("{}{field}", self.prefix),
            found: self.found(field),
            supported: supported.into(),
        }
    }

    fn object(&self, field: &str) -> Result<Option<Self>, RuntimeError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(Self {
                file: self.file,
                prefix: format!("{}{field}.", self.prefix),
                fields: fields.clone(),
            })),
            Some(_) => Err(self.wrong(field, "an object")),
        }
    }

    fn text(&self, field: &str) -> Result<Option<String>, RuntimeError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(self.wrong(field, "a string")),
        }
    }

    fn flag(&self, field: &str) -> Result<Option<bool>, RuntimeError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.wrong(field, "true or false")),
        }
    }

    /// A number of things, zero included. Bounded, so that products of two
    /// counts cannot overflow.
    fn size(&self, field: &str) -> Result<usize, RuntimeError> {
        let value = self.get(field).and_then(Value::as_u64).filter(|&n| n < 1 << 31);
        value.map(|n| n as usize).ok_or_else(|| self.wrong(field, "an integer from 0 to 2^31 - 1"))
    }

    fn count(&self, field: &str) -> Result<usize, RuntimeError> {
        match self.size(field) {
            Ok(n) if n > 0 => Ok(n),
            _ => Err(self.wrong(field, "an integer from 1 to 2^31 - 1")),
        }
    }

    fn optional_count(&self, field: &str) -> Result<Option<usize>, RuntimeError> {
        self.get(field).map(|_| self.count(field)).transpose()
    }

    fn positive(&self, field: &str) -> Result<f64, RuntimeError> {
        let value = self.get(field).and_then(Value::as_f64);
        value.filter(|x| *x > 0.0).ok_or_else(|| self.wrong(field, "a positive number"))
    }

    /// One id, a list of ids, or none.
    fn token_ids(&self, field: &str) -> Result<Vec<u32>, RuntimeError> {
        let id = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| self.wrong(field, "a token id or a list of them"))
        };
        match self.get(field) {
            None => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(value) => Ok(vec![id(value)?]),
        }
    }
}
