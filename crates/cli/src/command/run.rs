//! `transom run`: text from a model.

use std::ops::ControlFlow;

use serde::Serialize;
use transom_runtime::chat::Message;
use transom_runtime::generate::{GenerateOptions, Generation, StopReason, generate};
use transom_runtime::sampler::Sampling;
use transom_runtime::tokenizer::StreamDecoder;
use transom_runtime::{DEFAULT_CHUNK, Model, Session, StoreOptions};

use crate::args::Run;
use crate::output::{self, bytes};
use crate::{Outcome, logits, machine, model, threads};

#[derive(Serialize)]
struct Report {
    model: String,
    layout: &'static str,
    threads: usize,
    prompt_ids: Vec<u32>,
    /// Generated ones only.
    ids: Vec<u32>,
    text: String,
    /// `end_of_text`, `max_tokens` or `context_full`.
    stop: &'static str,
    prompt_tokens_per_second: f64,
    tokens_per_second: f64,
    /// Resident, buffers included.
    weights_bytes: u64,
    matrices_resident: usize,
    /// Read from the file for every token.
    matrices_streamed: usize,
    /// `VmHWM`; 0 on systems that do not tell.
    peak_rss_bytes: u64,
}

/// Loads the model, generates, and reports.
pub(crate) fn run(args: &Run) -> anyhow::Result<Outcome> {
    threads::with(args.threads.count(), || {
        let layout = model::layout(&args.model, args.layout)?;
        let memory = model::memory(&args.model, layout, args.memory)?;
        let options = StoreOptions {
            memory,
            prefetch: args.prefetch,
            direct: model::exceeds_memory(&args.model)?,
            ..StoreOptions::new(layout)
        };
        let model = model::load(&args.model, options, args.json.wanted)?;
        output::note(&model::residency(&model, layout, memory));
        let prompt_ids = prompt_ids(&model, args)?;
        let generation = continue_prompt(&model, &prompt_ids, args)?;
        if let Some(file) = &args.logits {
            let kept = generation.logits.as_deref().unwrap_or_default();
            logits::write(file, &generation.ids, kept, model.config().vocab_size)?;
        }
        let report = Report {
            model: args.model.display().to_string(),
            layout: layout.name(),
            threads: args.threads.count(),
            text: model.tokenizer().decode_continuation(&prompt_ids, &generation.ids)?,
            prompt_ids,
            stop: stop_name(generation.stop),
            prompt_tokens_per_second: generation.prompt_tokens_per_second(),
            tokens_per_second: generation.tokens_per_second(),
            ids: generation.ids,
            weights_bytes: model.weights_bytes() as u64,
            matrices_resident: model.residency().map_or(0, |r| r.n_resident),
            matrices_streamed: model.residency().map_or(0, |r| r.n_streamed),
            peak_rss_bytes: machine::peak_rss_bytes().unwrap_or(0),
        };
        if args.json.wanted {
            output::print_json(&report)?;
        } else {
            output::print("\n")?;
            output::note(&summary(&report));
        }
        Ok(Outcome::Done)
    })
}

fn prompt_ids(model: &Model, args: &Run) -> anyhow::Result<Vec<u32>> {
    if !args.chat {
        return Ok(model.tokenizer().encode(&args.prompt, true)?);
    }
    let messages = [Message::user(args.prompt.as_str())];
    let text = model.chat_template()?.render(&messages)?;
    // The template has put the special tokens into the text.
    Ok(model.tokenizer().encode(&text, false)?)
}

/// Generates; unless JSON is wanted, text goes to stdout as it comes.
fn continue_prompt(model: &Model, prompt_ids: &[u32], args: &Run) -> anyhow::Result<Generation> {
    let options = GenerateOptions {
        max_tokens: args.max_tokens,
        sampling: Sampling { temperature: args.temperature, top_p: args.top_p, seed: args.seed },
        ignore_eos: args.ignore_eos,
        keep_logits: args.logits.is_some(),
    };
    let limit = model.config().max_position_embeddings;
    let n_tokens = prompt_ids.len().saturating_add(args.max_tokens);
    let mut session = Session::new(model, n_tokens.min(limit), DEFAULT_CHUNK)?;
    let mut decoder = StreamDecoder::new(model.tokenizer(), prompt_ids);
    let mut failure = None;
    let generation = generate(&mut session, prompt_ids, &options, |id| {
        if args.json.wanted {
            return ControlFlow::Continue(());
        }
        let text = decoder.push(id).map_err(anyhow::Error::new);
        match text.and_then(|text| output::print(&text)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        }
    })?;
    if let Some(error) = failure {
        return Err(error);
    }
    if !args.json.wanted {
        output::print(&decoder.finish()?)?;
    }
    Ok(generation)
}

fn stop_name(stop: StopReason) -> &'static str {
    match stop {
        StopReason::EndOfText => "end_of_text",
        StopReason::MaxTokens => "max_tokens",
        StopReason::ContextFull => "context_full",
        _ => "stopped",
    }
}

fn summary(report: &Report) -> String {
    format!(
        "prompt: {} tokens, {:.1} tokens/s; generated: {} tokens, {:.1} tokens/s; \
         weights: {} ({}); peak memory: {}",
        report.prompt_ids.len(),
        report.prompt_tokens_per_second,
        report.ids.len(),
        report.tokens_per_second,
        bytes(report.weights_bytes),
        report.layout,
        bytes(report.peak_rss_bytes),
    )
}
