//! A prompt continued token by token.

use std::ops::ControlFlow;
use std::time::Instant;

use crate::error::RuntimeError;
use crate::model::Session;
use crate::sampler::{Sampler, Sampling};

/// What is generated, and how.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GenerateOptions {
    /// At most so many tokens.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Goes on after a token that ends the text.
    pub ignore_eos: bool,
    /// Keeps the logits every token was chosen from.
    pub keep_logits: bool,
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// The model ended the text; the token that says so is the last one.
    EndOfText,
    /// As many tokens as asked for.
    MaxTokens,
    /// The session is full.
    ContextFull,
    /// The callback asked for it.
    Stopped,
}

/// What was generated.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The tokens, without the prompt.
    pub ids: Vec<u32>,
    /// The logits each was chosen from, `[token][vocabulary]`, if asked for.
    pub logits: Option<Vec<f32>>,
    /// Why it ended.
    pub stop: StopReason,
    /// Tokens of the prompt.
    pub n_prompt_tokens: usize,
    /// Time for the prompt, in seconds.
    pub prompt_seconds: f64,
    /// Time after the prompt, in seconds. It covers a run of the model for
    /// every token but the first, whose logits the prompt gave.
    pub decode_seconds: f64,
}

impl Generation {
    /// Tokens of the prompt per second.
    #[must_use]
    pub fn prompt_tokens_per_second(&self) -> f64 {
        rate(self.n_prompt_tokens, self.prompt_seconds)
    }

    /// Runs of the model per second after the prompt; 0 if there were none.
    #[must_use]
    pub fn tokens_per_second(&self) -> f64 {
        rate(self.ids.len().saturating_sub(1), self.decode_seconds)
    }
}

fn rate(n: usize, seconds: f64) -> f64 {
    if seconds > 0.0 { n as f64 / seconds } else { 0.0 }
}

/// Runs the prompt after what the session holds and continues it. `on_token`
/// is called with every token as it is chosen.
///
/// # Errors
///
/// [`RuntimeError::EmptyPrompt`], or as [`Session::forward`] and [`Sampler::new`].
pub fn generate(
    session: &mut Session<'_>,
    prompt_ids: &[u32],
    options: &GenerateOptions,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation, RuntimeError> {
    if prompt_ids.is_empty() {
        return Err(RuntimeError::EmptyPrompt);
    }
    let mut sampler = Sampler::new(options.sampling)?;
    let model = session.model();
    let started = Instant::now();
    session.forward(prompt_ids, 1)?;
    let prompt_seconds = started.elapsed().as_secs_f64();

    let started = Instant::now();
    let mut ids: Vec<u32> = Vec::new();
    let mut kept = options.keep_logits.then(Vec::new);
    let stop = loop {
        if ids.len() == options.max_tokens {
            break StopReason::MaxTokens;
        }
        if let Some(&last) = ids.last() {
            if session.n_tokens() == session.capacity() {
                break StopReason::ContextFull;
            }
            session.forward(&[last], 1)?;
        }
        let id = sampler.choose(session.logits());
        if let Some(kept) = &mut kept {
            kept.extend_from_slice(session.logits());
        }
        ids.push(id);
        if on_token(id).is_break() {
            break StopReason::Stopped;
        }
        if !options.ignore_eos && model.config().eos_token_ids.contains(&id) {
            break StopReason::EndOfText;
        }
    };
    Ok(Generation {
        ids,
        logits: kept,
        stop,
        n_prompt_tokens: prompt_ids.len(),
        prompt_seconds,
        decode_seconds: started.elapsed().as_secs_f64(),
    })
}
