//! Two models side by side: where they part, and by how much.

use std::ops::ControlFlow;

use crate::error::RuntimeError;
use crate::generate::{GenerateOptions, generate};
use crate::model::{DEFAULT_CHUNK, Model, Session};
use crate::sampler::{Sampling, argmax};

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompareOptions<'a> {
    /// Prompts that both models continue.
    pub prompts: &'a [String],
    /// At most so many tokens after each prompt.
    pub max_tokens: usize,
    /// A text whose perplexity is measured.
    pub text: Option<&'a str>,
    /// Tokens of a window of the text; see [`perplexity`].
    pub window: usize,
}

/// The continuations of one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptComparison {
    /// Ids of the prompt.
    pub prompt_ids: Vec<u32>,
    /// What the base model says, greedily.
    pub base_ids: Vec<u32>,
    /// What the other says, greedily and on its own.
    pub other_ids: Vec<u32>,
    /// The first generated token that differs.
    pub first_divergence: Option<usize>,
    /// Largest difference of two logits, both models being given the base's tokens.
    pub max_abs_logit_diff: f64,
    /// Mean divergence KL(base || other) of the next token, in nats, likewise.
    pub mean_kl: f64,
    /// KL(base || other) in nats for each token of the base.
    pub kl: Vec<f64>,
    /// All logits are the same to the bit.
    pub logits_identical: bool,
}

/// Two models compared.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Same tokens, and logits the same to the bit, for all prompts.
    pub identical: bool,
    /// One for each prompt.
    pub prompts: Vec<PromptComparison>,
    /// Largest over all prompts.
    pub max_abs_logit_diff: f64,
    /// Mean over all tokens of all prompts, in nats.
    pub mean_kl: f64,
    /// Perplexity of the text under the base model.
    pub perplexity_base: Option<f64>,
    /// Perplexity of the text under the other model.
    pub perplexity_other: Option<f64>,
}

/// Compares two models. Texts are tokenised by the base model's tokenizer.
/// `progress` is called before each prompt with its index.
///
/// # Errors
///
/// [`RuntimeError::Vocabulary`] if they do not share a vocabulary, or as [`generate`].
pub fn compare(
    base: &Model,
    other: &Model,
    options: &CompareOptions<'_>,
    progress: &mut dyn FnMut(usize),
) -> Result<Comparison, RuntimeError> {
    let sizes = (base.config().vocab_size, other.config().vocab_size);
    if sizes.0 != sizes.1 {
        return Err(RuntimeError::Vocabulary { base: sizes.0, other: sizes.1 });
    }
    let mut prompts = Vec::new();
    for (index, prompt) in options.prompts.iter().enumerate() {
        progress(index);
        let ids = base.tokenizer().encode(prompt, true)?;
        prompts.push(compare_prompt(base, other, ids, options.max_tokens)?);
    }
    let text_ids = options.text.map(|text| base.tokenizer().encode(text, true)).transpose()?;
    let perplexity_of =
        |model| text_ids.as_deref().map(|ids| perplexity(model, ids, options.window)).transpose();
    let n_tokens: usize = prompts.iter().map(|p| p.base_ids.len()).sum();
    let total_kl: f64 = prompts.iter().map(|p| p.mean_kl * p.base_ids.len() as f64).sum();
    Ok(Comparison {
        identical: prompts.iter().all(|p| p.logits_identical && p.first_divergence.is_none()),
        max_abs_logit_diff: prompts.iter().map(|p| p.max_abs_logit_diff).fold(0.0, f64::max),
        mean_kl: if n_tokens == 0 { 0.0 } else { total_kl / n_tokens as f64 },
        perplexity_base: perplexity_of(base)?.flatten(),
        perplexity_other: perplexity_of(other)?.flatten(),
        prompts,
    })
}

/// Runs both models over the base's greedy continuation. Up to the first
/// token on which they differ, that is the other's continuation as well.
fn compare_prompt(
    base: &Model,
    other: &Model,
    prompt_ids: Vec<u32>,
    max_tokens: usize,
) -> Result<PromptComparison, RuntimeError> {
    if prompt_ids.is_empty() {
        return Err(RuntimeError::EmptyPrompt);
    }
    let mut base_session = session_for(base, prompt_ids.len() + max_tokens)?;
    let mut other_session = session_for(other, prompt_ids.len() + max_tokens)?;
    let mut ids: Vec<u32> = Vec::new();
    let (mut first_divergence, mut max_diff, mut identical) = (None, 0.0, true);
    let mut kl = Vec::new();
    let mut input = prompt_ids.clone();
    let room = base_session.capacity().min(other_session.capacity());
    while ids.len() < max_tokens && prompt_ids.len() + ids.len() <= room {
        let a = base_session.forward(&input, 1)?;
        let b = other_session.forward(&input, 1)?;
        let (a_id, b_id) = (argmax(a), argmax(b));
        if a_id != b_id {
            first_divergence = first_divergence.or(Some(ids.len()));
        }
        identical &= a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
        let diff = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).abs();
        max_diff = a.iter().zip(b).map(diff).fold(max_diff, f64::max);
        kl.push(kl_divergence(a, b));
        ids.push(a_id);
        if base.config().eos_token_ids.contains(&a_id) {
            break;
        }
        input = vec![a_id];
    }
    let other_ids = match first_divergence {
        None => ids.clone(),
        Some(_) => greedy(other, &prompt_ids, max_tokens)?,
    };
    Ok(PromptComparison {
        mean_kl: kl.iter().sum::<f64>() / kl.len().max(1) as f64,
        kl,
        prompt_ids,
        base_ids: ids,
        other_ids,
        first_divergence,
        max_abs_logit_diff: max_diff,
        logits_identical: identical,
    })
}

fn session_for(model: &Model, n_tokens: usize) -> Result<Session<'_>, RuntimeError> {
    Session::new(model, n_tokens.min(model.config().max_position_embeddings), DEFAULT_CHUNK)
}

fn greedy(model: &Model, prompt_ids: &[u32], max_tokens: usize) -> Result<Vec<u32>, RuntimeError> {
    let options = GenerateOptions {
        max_tokens,
        sampling: Sampling::GREEDY,
        ignore_eos: false,
        keep_logits: false,
    };
    let mut session = session_for(model, prompt_ids.len() + max_tokens)?;
    Ok(generate(&mut session, prompt_ids, &options, |_| ControlFlow::Continue(()))?.ids)
}

/// KL(softmax(base) || softmax(other)) in nats; exactly 0 for equal logits.
fn kl_divergence(base: &[f32], other: &[f32]) -> f64 {
    let (base_total, other_total) = (log_sum_exp(base), log_sum_exp(other));
    let terms = base.iter().zip(other).map(|(&a, &b)| {
        let log_p = f64::from(a) - base_total;
        let log_q = f64::from(b) - other_total;
        log_p.exp() * (log_p - log_q)
    });
    terms.sum::<f64>().max(0.0)
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits[argmax(logits) as usize]);
    max + logits.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln()
}

/// exp of the mean negative log-likelihood of every token that has one before
/// it in its window of so many tokens (or the model's context, if shorter).
/// Windows do not overlap. `None` if there is no such token.
///
/// # Errors
///
/// As [`Session::forward`].
pub fn perplexity(model: &Model, ids: &[u32], window: usize) -> Result<Option<f64>, RuntimeError> {
    let vocabulary = model.config().vocab_size;
    let window = window.clamp(1, model.config().max_position_embeddings);
    let mut session = Session::new(model, window, DEFAULT_CHUNK)?;
    let (mut total, mut n) = (0.0, 0_usize);
    for window in ids.chunks(window) {
        session.clear();
        // One chunk of logits at a time: those of a window can be large.
        let targets = &window[1..];
        for (inputs, targets) in
            window[..targets.len()].chunks(DEFAULT_CHUNK).zip(targets.chunks(DEFAULT_CHUNK))
        {
            let logits = session.forward(inputs, inputs.len())?;
            for (row, &target) in logits.chunks_exact(vocabulary).zip(targets) {
                let logit = row.get(target as usize).copied();
                let logit = logit.ok_or(RuntimeError::TokenId { found: target, vocabulary })?;
                total += log_sum_exp(row) - f64::from(logit);
                n += 1;
            }
        }
    }
    Ok((n > 0).then(|| (total / n as f64).exp()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_zero_for_equal_and_that_of_the_definition_otherwise() {
        let base = [1.0, -2.0, 0.5];
        assert_eq!(kl_divergence(&base, &base), 0.0);
        let other = [0.75_f32.ln(), 0.25_f32.ln()];
        let expected = 0.5 * (0.5_f64 / 0.75).ln() + 0.5 * (0.5_f64 / 0.25).ln();
        assert!((kl_divergence(&[3.0, 3.0], &other) - expected).abs() < 1e-6);
    }
}
