//! Names and shapes of the tensors a configuration calls for.

use crate::config::Config;

/// Name and shape of the embedding.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
/// Weight of the norm after the last layer.
pub(crate) const FINAL_NORM: &str = "model.norm.weight";
/// The head, where it is not the embedding.
pub(crate) const HEAD: &str = "lm_head.weight";

/// Full name of a layer's tensor.
pub(crate) fn in_layer(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.{name}")
}

/// The matrices of a layer: name without `.weight`, rows, columns, has a bias.
pub(crate) fn linears(config: &Config) -> [(&'static str, usize, usize, bool); 7] {
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    [
        ("self_attn.q_proj", config.q_dim(), hidden, config.qkv_bias),
        ("self_attn.k_proj", config.kv_dim(), hidden, config.qkv_bias),
        ("self_attn.v_proj", config.kv_dim(), hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, config.q_dim(), config.o_bias),
        ("mlp.gate_proj", intermediate, hidden, config.mlp_bias),
        ("mlp.up_proj", intermediate, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, intermediate, config.mlp_bias),
    ]
}

/// The norm weights of a layer: name and length.
pub(crate) fn norms(config: &Config) -> Vec<(&'static str, usize)> {
    let mut norms = vec![
        ("input_layernorm.weight", config.hidden_size),
        ("post_attention_layernorm.weight", config.hidden_size),
    ];
    if config.qk_norm {
        norms.push(("self_attn.q_norm.weight", config.head_dim));
        norms.push(("self_attn.k_norm.weight", config.head_dim));
    }
    norms
}

/// Every tensor, in the order of the computation.
pub(crate) fn all(config: &Config) -> Vec<(String, Vec<usize>)> {
    let mut tensors = vec![(EMBEDDING.to_owned(), vec![config.vocab_size, config.hidden_size])];
    for layer in 0..config.n_layers {
        for (name, length) in norms(config) {
            tensors.push((in_layer(layer, name), vec![length]));
        }
        for (name, rows, cols, bias) in linears(config) {
            tensors.push((in_layer(layer, &format!("{name}.weight")), vec![rows, cols]));
            if bias {
                tensors.push((in_layer(layer, &format!("{name}.bias")), vec![rows]));
            }
        }
    }
    tensors.push((FINAL_NORM.to_owned(), vec![config.hidden_size]));
    if !config.tie_word_embeddings {
        tensors.push((HEAD.to_owned(), vec![config.vocab_size, config.hidden_size]));
    }
    tensors
}
