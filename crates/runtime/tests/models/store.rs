//! Weights that are read from the file while the model runs: the same logits
//! as from memory, and no weights but the right ones.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::json;
use transom::layout::Layout;
use transom_runtime::store::{Eviction, Poison};
use transom_runtime::tiny::SyntheticCheckpoint;
use transom_runtime::{Model, RuntimeError, Session, StoreOptions};

use crate::{bits, greedy, load, packed, shared, written};

const PROMPT: [u32; 3] = [7, 100, 41];

fn bounded(layout: Layout, memory: u64, prefetch: usize) -> StoreOptions {
    StoreOptions { memory: Some(memory), prefetch, poison: Poison::On, ..StoreOptions::new(layout) }
}

fn open(path: &Path, options: StoreOptions) -> Model {
    Model::load(path, options, &mut |_| ()).unwrap()
}

/// The least memory a model runs in.
fn least_memory(path: &Path, layout: Layout) -> u64 {
    match Model::load(path, bounded(layout, 0, 0), &mut |_| ()) {
        Err(RuntimeError::Memory { found: 0, expected }) => expected,
        other => panic!("{other:?}"),
    }
}

/// Ten budgets from one matrix to everything.
fn budgets(path: &Path, layout: Layout) -> [u64; 10] {
    let least = least_memory(path, layout);
    let most = Model::expected_bytes(path, layout).unwrap();
    std::array::from_fn(|step| least + (most - least) * step as u64 / 9)
}

/// Tokens and logits of a greedy continuation.
fn continuation(model: &Model, prompt: &[u32], n: usize) -> (Vec<u32>, Vec<u32>) {
    let generation = greedy(model, prompt, n, true);
    assert_eq!(generation.ids.len(), n);
    (generation.ids, bits(&generation.logits.unwrap()))
}

/// How many tokens a combination runs for.
#[derive(Clone, Copy)]
struct Effort {
    /// At one depth of each budget, on packed weights.
    long: usize,
    /// In all other cases.
    short: usize,
}

const EVERYTHING: Effort = Effort { long: 450, short: 450 };
const USUAL: Effort = Effort { long: 450, short: 8 };

fn check_every_budget(original: &Path, prompt: &[u32], effort: Effort) {
    let target = packed(original);
    let packed = target.path().join("packed");
    let expected = continuation(&load(original, Layout::Dense), prompt, effort.long);
    for path in [original, &packed] {
        for layout in Layout::ALL {
            let mut streamed = Vec::new();
            for (step, memory) in budgets(path, layout).into_iter().enumerate() {
                for prefetch in 0..4 {
                    let model = open(path, bounded(layout, memory, prefetch));
                    let residency = model.residency().unwrap();
                    let context = format!("{layout:?}, {memory} bytes, {prefetch} ahead");
                    assert!(model.weights_bytes() as u64 <= memory, "{context}");
                    assert!(residency.n_buffers <= prefetch + 1, "{context}");
                    streamed.push(residency.n_streamed);
                    let is_long = path == packed && prefetch == step % 4;
                    let n = if is_long { effort.long } else { effort.short };
                    let (ids, logits) = continuation(&model, prompt, n);
                    assert_eq!(ids, expected.0[..n], "{context}");
                    assert!(logits == expected.1[..logits.len()], "{context}");
                }
            }
            assert!(streamed[0] > streamed[20] && streamed.last() == Some(&0), "{streamed:?}");
        }
    }
}

fn tiny(tied: bool) -> tempfile::TempDir {
    let mut checkpoint = SyntheticCheckpoint::tiny();
    checkpoint.config["tie_word_embeddings"] = json!(tied);
    written(&checkpoint)
}

#[test]
fn every_budget_and_depth_gives_the_tokens_and_logits_of_the_static_run() {
    check_every_budget(tiny(false).path(), &PROMPT, USUAL);
    check_every_budget(tiny(true).path(), &PROMPT, Effort { long: 20, ..USUAL });
}

#[test]
fn a_trained_model_in_every_budget_gives_the_tokens_and_logits_of_the_static_run() {
    let Some(original) = shared("models/stories260k") else { return };
    check_every_budget(&original, &[1, 403, 407], USUAL);
}

/// Minutes: every combination in full.
#[test]
#[ignore = "takes minutes; the tests above are a part of it"]
fn every_combination_in_full() {
    check_every_budget(tiny(false).path(), &PROMPT, EVERYTHING);
    check_every_budget(tiny(true).path(), &PROMPT, EVERYTHING);
    if let Some(original) = shared("models/stories260k") {
        check_every_budget(&original, &[1, 403, 407], EVERYTHING);
    }
}

#[test]
fn a_thousand_orders_of_eviction_change_nothing() {
    let original = written(&SyntheticCheckpoint::tiny());
    let packed = packed(original.path());
    let path = packed.path().join("packed");
    let expected = continuation(&load(original.path(), Layout::Dense), &PROMPT, 8);
    let budgets = Layout::ALL.map(|layout| budgets(&path, layout));
    for seed in 0..1000 {
        let index = seed as usize % 3;
        let memory = budgets[index][seed as usize / 3 % 10];
        let options = StoreOptions {
            eviction: Eviction::Random(seed),
            ..bounded(Layout::ALL[index], memory, seed as usize / 30 % 4)
        };
        let found = continuation(&open(&path, options), &PROMPT, 8);
        assert!(found == expected, "seed {seed}");
    }
}

#[test]
fn sessions_on_several_threads_share_a_store() {
    let original = written(&SyntheticCheckpoint::tiny());
    let expected = continuation(&load(original.path(), Layout::Dense), &PROMPT, 40);
    for memory in budgets(original.path(), Layout::Dense)[..3].iter().copied() {
        let model = open(original.path(), bounded(Layout::Dense, memory, 1));
        std::thread::scope(|scope| {
            let run = || continuation(&model, &PROMPT, 40);
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(run)).collect();
            for thread in threads {
                assert!(thread.join().unwrap() == expected, "{memory}");
            }
        });
    }
}

#[test]
fn reading_without_the_file_cache_changes_nothing() {
    let original = written(&SyntheticCheckpoint::tiny());
    let packed = packed(original.path());
    let expected = continuation(&load(original.path(), Layout::Dense), &PROMPT, 30);
    for path in [original.path(), &packed.path().join("packed")] {
        let memory = least_memory(path, Layout::Rans);
        let options = StoreOptions { direct: true, ..bounded(Layout::Rans, memory, 2) };
        assert!(continuation(&open(path, options), &PROMPT, 30) == expected);
    }
}

/// Runs until the file is damaged after `n` tokens; returns what then happens.
fn damaged_after(path: &Path, n: usize, damage: impl Fn(&File)) -> RuntimeError {
    let model = open(path, bounded(Layout::Rans, least_memory(path, Layout::Rans), 1));
    let mut session = Session::new(&model, 100, 16).unwrap();
    session.forward(&PROMPT, 1).unwrap();
    for token in 0..n as u32 {
        session.forward(&[token], 1).unwrap();
    }
    damage(&OpenOptions::new().write(true).open(path.join("model.safetensors")).unwrap());
    // What has been read ahead is still right.
    let mut after = (0..3).map(|token| session.forward(&[token], 1).map(|_| ()));
    after.find_map(Result::err).expect("no error after the damage")
}

#[test]
fn a_file_damaged_in_mid_generation_ends_the_run_with_an_error_that_names_it() {
    let original = written(&SyntheticCheckpoint::tiny());
    let packed = packed(original.path());
    let packed = packed.path().join("packed");
    let names = |error: RuntimeError| {
        let text = error.to_string();
        let RuntimeError::Tensor { path, tensor, reason } = error else { panic!("{error:?}") };
        assert!(path.ends_with("model.safetensors"));
        assert!(tensor.ends_with(".weight"), "{text}");
        assert!(text.contains(&tensor) && text.contains("model.safetensors"), "{text}");
        reason
    };
    let overwrite = |file: &File| {
        let bytes = file.metadata().unwrap().len();
        // Everything after the headers of the first records.
        file.write_all_at(&vec![0x5A; (bytes - bytes / 4) as usize], bytes / 4).unwrap();
    };
    let reason = names(damaged_after(&packed, 5, overwrite));
    assert!(reason.contains("tile"), "{reason}");
    for path in [original.path().to_owned(), self::packed(original.path()).path().join("packed")] {
        let truncate = |file: &File| file.set_len(file.metadata().unwrap().len() / 3).unwrap();
        let reason = names(damaged_after(&path, 5, truncate));
        assert!(reason.contains("fill whole buffer") || reason.contains("end of file"), "{reason}");
    }
}

#[test]
fn memory_that_is_not_enough_is_an_error_that_says_what_would_be() {
    let original = written(&SyntheticCheckpoint::tiny());
    for layout in Layout::ALL {
        let expected = least_memory(original.path(), layout);
        let error = Model::load(original.path(), bounded(layout, expected - 1, 3), &mut |_| ());
        let text = error.unwrap_err().to_string();
        assert!(text.contains(&expected.to_string()), "{text}");
        assert!(
            open(original.path(), bounded(layout, expected, 3)).residency().unwrap().n_streamed > 0
        );
    }
}
