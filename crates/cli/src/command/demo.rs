//! `transom demo`: the whole way, from packed weights to the original and back,
//! and the same text from all of them.

use std::fs::{self, File};
use std::io::Read as _;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use transom::checkpoint::{self, Options};
use transom::layout::Layout;
use transom_runtime::generate::{GenerateOptions, Generation, generate};
use transom_runtime::sampler::Sampling;
use transom_runtime::tiny::SyntheticCheckpoint;
use transom_runtime::{DEFAULT_CHUNK, Model, Session, StoreOptions};

use crate::args::Demo;
use crate::command::verify::describe;
use crate::output::{self, Style, bytes, flatten, keep_start, seconds};
use crate::table::{Align, Table};
use crate::{Outcome, machine, model, threads};

/// Models that come with the source, packed.
const SHIPPED: [&str; 2] = ["models/demo", "models/demo-int8"];
const PROMPT: &str = "It was a dark and stormy night";
const MAX_TOKENS: usize = 64;
/// Why the numbers of a small model say little.
const TOO_SMALL: &str = "Models this small fit the caches, where the bytes that are read hardly \
matter.\nSpeeds that mean something: transom demo MODEL";
/// Characters of generated text that are shown.
const TEXT_CHARS: usize = 200;
/// Bytes compared at a time.
const CHUNK_BYTES: u64 = 1 << 20;

/// Runs the steps; the first that finds a difference decides the exit code.
pub(crate) fn run(args: &Demo) -> anyhow::Result<Outcome> {
    threads::with(machine::n_cores(), || {
        let style = Style::stdout();
        let identical = match (&args.model, shipped()) {
            (Some(path), _) => show(path, &path.display().to_string(), style)?,
            (None, Some(models)) => show_shipped(&models, style)?,
            (None, None) => show_generated(style)?,
        };
        if args.model.is_none() {
            output::print(&format!("{}\n\n", style.dim(TOO_SMALL)))?;
        }
        let verdict = match identical {
            true => style.good("Everything is identical, to the bit."),
            false => style.bad("Something differs; see above."),
        };
        output::print(&format!("{verdict}\n"))?;
        Ok(if identical { Outcome::Done } else { Outcome::Differ })
    })
}

/// The models of the source: below the working directory, or where the program was built.
fn shipped() -> Option<[PathBuf; 2]> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    [PathBuf::new(), built]
        .iter()
        .map(|root| SHIPPED.map(|name| root.join(name)))
        .find(|models| models.iter().all(|path| path.is_dir()))
}

fn show_shipped(models: &[PathBuf; 2], style: Style) -> anyhow::Result<bool> {
    let mut identical = true;
    for (path, name) in models.iter().zip(SHIPPED) {
        identical &= show(path, name, style)?;
    }
    Ok(identical)
}

fn show_generated(style: Style) -> anyhow::Result<bool> {
    let work = tempfile::tempdir().context("temporary directory")?;
    let original = work.path().join("model");
    SyntheticCheckpoint::tiny().write(&original)?;
    show(&original, "a tiny generated Llama, with the statistics of trained weights", style)
}

/// Packs and unpacks a checkpoint, which may be packed already, and generates
/// from the original and the packed one.
fn show(path: &Path, what: &str, style: Style) -> anyhow::Result<bool> {
    let work = tempfile::tempdir().context("temporary directory")?;
    output::print(&format!("{}: {what}\n\n", style.bold("transom demo")))?;
    let (packed, unpacked) = (work.path().join("packed"), work.path().join("unpacked"));
    let (original, mut identical);
    if checkpoint::is_packed_directory(path) {
        original = unpacked.as_path();
        unpack(path, original, style)?;
        pack(original, &packed, style)?;
        identical = compare("the files that were unpacked", path, &packed, style)?;
    } else {
        original = path;
        pack(original, &packed, style)?;
        unpack(&packed, &unpacked, style)?;
        identical = compare("the original", original, &unpacked, style)?;
    }
    identical &= verify(&packed, style)?;
    identical &= generate_everywhere(original, &packed, style)?;
    Ok(identical)
}

/// Prints the result of a step.
fn step(style: Style, name: &str, started: Instant, result: &str) -> anyhow::Result<()> {
    let took = style.dim(&format!("{:>8}", seconds(started.elapsed().as_secs_f64())));
    output::print(&format!("{} {took}  {result}\n", style.bold(&format!("{name:<8}"))))
}

fn pack(original: &Path, packed: &Path, style: Style) -> anyhow::Result<()> {
    let started = Instant::now();
    checkpoint::pack(original, packed, &Options::default(), &())?;
    let report = checkpoint::inspect(packed, &Options::default(), &())?;
    let (before, after) = (report.original_bytes, report.packed_bytes.unwrap_or_default());
    let result = format!(
        "{} -> {} ({:.1} %), {:.3} bits a weight, {:.3} at the entropy floor",
        bytes(before),
        bytes(after),
        100.0 * after as f64 / before.max(1) as f64,
        report.bits_per_weight,
        report.entropy_bits,
    );
    step(style, "pack", started, &result)
}

fn verify(packed: &Path, style: Style) -> anyhow::Result<bool> {
    let started = Instant::now();
    let report = checkpoint::verify(packed, None, &Options::default(), &())?;
    let result = match report.differences.first() {
        None => "every tile, tensor and file is whole".to_owned(),
        Some(difference) => style.bad(&describe(difference)),
    };
    step(style, "verify", started, &result)?;
    Ok(report.differences.is_empty())
}

fn unpack(packed: &Path, to: &Path, style: Style) -> anyhow::Result<()> {
    let started = Instant::now();
    let report = checkpoint::unpack(packed, to, &Options::default(), &())?;
    let result =
        format!("{}, each file with the BLAKE3 of its original", bytes(report.original_bytes));
    step(style, "unpack", started, &result)
}

/// Whether two directories hold the same files.
fn compare(what: &str, a: &Path, b: &Path, style: Style) -> anyhow::Result<bool> {
    let started = Instant::now();
    let different = different_files(a, b)?;
    let result = match different.first() {
        None => format!("every file is identical to {what}, byte for byte"),
        Some(name) => style.bad(&format!("{} differs", name.display())),
    };
    step(style, "compare", started, &result)?;
    Ok(different.is_empty())
}

/// Names of the files that are not the same in both directories.
fn different_files(a: &Path, b: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut names = file_names(a, Path::new(""))?;
    names.extend(file_names(b, Path::new(""))?);
    names.sort();
    names.dedup();
    let mut different = Vec::new();
    for name in names {
        if !same_bytes(&a.join(&name), &b.join(&name))? {
            different.push(name);
        }
    }
    Ok(different)
}

/// Files below `root/inner`, relative to `root`.
fn file_names(root: &Path, inner: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let folder = root.join(inner);
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        let name = inner.join(entry.file_name());
        // Follows links, as pack does.
        if fs::metadata(entry.path())?.is_dir() {
            names.extend(file_names(root, &name)?);
        } else {
            names.push(name);
        }
    }
    Ok(names)
}

fn same_bytes(a: &Path, b: &Path) -> anyhow::Result<bool> {
    if !a.exists() || !b.exists() {
        return Ok(false);
    }
    let open = |path: &Path| File::open(path).with_context(|| path.display().to_string());
    let (mut a, mut b) = (open(a)?, open(b)?);
    if a.metadata()?.len() != b.metadata()?.len() {
        return Ok(false);
    }
    let (mut left, mut right) = (Vec::new(), Vec::new());
    loop {
        left.clear();
        right.clear();
        a.by_ref().take(CHUNK_BYTES).read_to_end(&mut left)?;
        b.by_ref().take(CHUNK_BYTES).read_to_end(&mut right)?;
        if left != right {
            return Ok(false);
        }
        if left.is_empty() {
            return Ok(true);
        }
    }
}

/// Runs the model from the original and from the packed weights, and compares
/// tokens and logits with those of the first run.
fn generate_everywhere(original: &Path, packed: &Path, style: Style) -> anyhow::Result<bool> {
    let runs = [
        ("original", original, Layout::Dense),
        ("packed", packed, Layout::Dense),
        ("packed", packed, Layout::Fixed),
        ("packed", packed, Layout::Rans),
    ];
    let mut table = Table::new(&[
        ("weights", Align::Left),
        ("layout", Align::Left),
        ("in memory", Align::Right),
        ("prompt tokens/s", Align::Right),
        ("tokens/s", Align::Right),
        ("tokens", Align::Left),
        ("logits", Align::Left),
    ]);
    let mut first: Option<Generation> = None;
    let (mut identical, mut text) = (true, String::new());
    for (name, path, layout) in runs {
        let model = model::load(path, StoreOptions::new(layout), false)?;
        let (found, words) = generate_once(&model)?;
        let expected = first.get_or_insert_with(|| found.clone());
        let same_ids = found.ids == expected.ids;
        let same_logits = bits(&found) == bits(expected);
        identical &= same_ids && same_logits;
        let word = |same: bool| if same { "identical" } else { "DIFFER" }.to_owned();
        table.row([
            name.to_owned(),
            layout.name().to_owned(),
            bytes(model.weights_bytes() as u64),
            format!("{:.1}", found.prompt_tokens_per_second()),
            format!("{:.1}", found.tokens_per_second()),
            word(same_ids),
            word(same_logits),
        ]);
        text = words;
    }
    let shown = keep_start(&flatten(&text), TEXT_CHARS);
    output::print(&format!("\n{}\n{}{shown}\n\n", table.render(style), style.dim(PROMPT)))?;
    Ok(identical)
}

fn generate_once(model: &Model) -> anyhow::Result<(Generation, String)> {
    let prompt_ids = model.tokenizer().encode(PROMPT, true)?;
    let options = GenerateOptions {
        max_tokens: MAX_TOKENS,
        sampling: Sampling::GREEDY,
        ignore_eos: true,
        keep_logits: true,
    };
    let limit = model.config().max_position_embeddings;
    let capacity = limit.min(prompt_ids.len() + MAX_TOKENS);
    let mut session = Session::new(model, capacity, DEFAULT_CHUNK)?;
    let found = generate(&mut session, &prompt_ids, &options, |_| ControlFlow::Continue(()))?;
    let text = model.tokenizer().decode_continuation(&prompt_ids, &found.ids)?;
    Ok((found, text))
}

fn bits(generation: &Generation) -> Vec<u32> {
    generation.logits.iter().flatten().map(|logit| logit.to_bits()).collect()
}
