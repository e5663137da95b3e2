//! Keys and values of the tokens so far, and attention over them.
//!
//! The result for a token is computed from its own position: blocks of keys
//! from the first one it sees to itself, ascending. So it is the same whether
//! the prompt came at once or token by token, on one thread or many.

use rayon::prelude::*;

use crate::config::Config;
use crate::math::{add_scaled, dot};

/// Keys of a layer that are weighed together.
const BLOCK: usize = 64;

/// Below this many multiplications threads cost more than they save.
const PARALLEL_FROM: usize = 1 << 16;

/// Keys and values of one layer, f32, `[kv head][position][head_dim]`.
#[derive(Debug)]
pub(crate) struct LayerCache {
    keys: Vec<f32>,
    values: Vec<f32>,
    capacity: usize,
    head_dim: usize,
}

impl LayerCache {
    /// Room for `capacity` positions. Memory is taken as it is used.
    pub(crate) fn new(config: &Config, capacity: usize) -> Self {
        let elems = config.kv_dim() * capacity;
        Self {
            keys: vec![0.0; elems],
            values: vec![0.0; elems],
            capacity,
            head_dim: config.head_dim,
        }
    }

    /// Stores a token's keys and values (`kv_dim` each, head after head).
    pub(crate) fn store(&mut self, position: usize, keys: &[f32], values: &[f32]) {
        let head_dim = self.head_dim;
        let heads = keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim));
        for (head, (key, value)) in heads.enumerate() {
            let start = (head * self.capacity + position) * head_dim;
            self.keys[start..start + head_dim].copy_from_slice(key);
            self.values[start..start + head_dim].copy_from_slice(value);
        }
    }

    /// Attention of consecutive tokens, the first one at `position`, whose
    /// keys and values are stored. `queries` and `out`: `[token][query head][head_dim]`.
    pub(crate) fn attend(
        &self,
        config: &Config,
        window: Option<usize>,
        position: usize,
        queries: &[f32],
        out: &mut [f32],
    ) {
        let head_dim = self.head_dim;
        let group = config.n_heads / config.n_kv_heads;
        let head = |(index, (query, out)): (usize, (&[f32], &mut [f32]))| {
            let position = position + index / config.n_heads;
            let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
            let kv_head = index % config.n_heads / group;
            self.attend_head(kv_head, first..position + 1, query, out);
        };
        let work = queries.len() * (position + queries.len() / config.q_dim());
        if work < PARALLEL_FROM {
            queries
                .chunks_exact(head_dim)
                .zip(out.chunks_exact_mut(head_dim))
                .enumerate()
                .for_each(head);
        } else {
            queries
                .par_chunks_exact(head_dim)
                .zip(out.par_chunks_exact_mut(head_dim))
                .enumerate()
                .for_each(head);
        }
    }

    /// Softmax of the scores times the values, in one pass: when a block has
    /// a higher score than all before it, what is summed so far is scaled.
    fn attend_head(
        &self,
        kv_head: usize,
        positions: std::ops::Range<usize>,
        query: &[f32],
        out: &mut [f32],
    ) {
        let head_dim = self.head_dim;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let row = |position: usize| {
            let start = (kv_head * self.capacity + position) * head_dim;
            start..start + head_dim
        };
        out.fill(0.0);
        let (mut max, mut total) = (f32::NEG_INFINITY, 0.0_f32);
        let mut weights = [0.0_f32; BLOCK];
        for start in positions.clone().step_by(BLOCK) {
            let block = start..positions.end.min(start + BLOCK);
            let weights = &mut weights[..block.len()];
            let mut block_max = max;
            for (weight, position) in weights.iter_mut().zip(block.clone()) {
                *weight = scale * dot(query, &self.keys[row(position)]);
                block_max = block_max.max(*weight);
            }
            let rescale = (max - block_max).exp();
            max = block_max;
            total *= rescale;
            out.iter_mut().for_each(|x| *x *= rescale);
            for (weight, position) in weights.iter_mut().zip(block) {
                *weight = (*weight - max).exp();
                total += *weight;
                add_scaled(out, *weight, &self.values[row(position)]);
            }
        }
        out.iter_mut().for_each(|x| *x /= total);
    }
}
