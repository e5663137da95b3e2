//! Logits are the same to the bit however a model is held and run.

use serde_json::json;
use transom::Isa;
use transom::layout::Layout;
use transom_runtime::compare::{CompareOptions, compare};
use transom_runtime::generate::StopReason;
use transom_runtime::tiny::SyntheticCheckpoint;
use transom_runtime::{Model, RuntimeError, Session, StoreOptions};

use crate::{bits, greedy, load, packed, written};

const N_TOKENS: usize = 70;

fn tokens() -> Vec<u32> {
    (0..N_TOKENS as u32).map(|i| (i * i * 7 + i * 31) % 256).collect()
}

fn logits(model: &Model, chunk: usize, n_threads: usize) -> Vec<u32> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
    pool.install(|| {
        let mut session = Session::new(model, N_TOKENS, chunk).unwrap();
        bits(session.forward(&tokens(), N_TOKENS).unwrap())
    })
}

#[test]
fn layout_threads_instruction_set_and_chunks_do_not_change_a_bit() {
    let mut checkpoint = SyntheticCheckpoint::tiny();
    // Wide enough for several tiles a row, and for attention on several threads.
    checkpoint.config["intermediate_size"] = json!(600);
    checkpoint.config["num_hidden_layers"] = json!(2);
    let dir = written(&checkpoint);
    let reference = logits(&load(dir.path(), Layout::Dense), N_TOKENS, 1);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        for layout in Layout::ALL {
            let model = Model::load(
                dir.path(),
                StoreOptions { isa, ..StoreOptions::new(layout) },
                &mut |_| (),
            )
            .unwrap();
            for chunk in [1, 3, 7, N_TOKENS] {
                for n_threads in [1, 2] {
                    let found = logits(&model, chunk, n_threads);
                    assert!(
                        found == reference,
                        "{isa:?} {layout:?}, chunks of {chunk}, {n_threads} threads"
                    );
                }
            }
        }
    }
}

#[test]
fn other_weights_give_other_logits() {
    let base = written(&SyntheticCheckpoint::tiny());
    let other = written(&SyntheticCheckpoint { seed: 2, ..SyntheticCheckpoint::tiny() });
    let (base, other) = (load(base.path(), Layout::Dense), load(other.path(), Layout::Dense));
    let prompts = ["a rose".to_owned(), "is a".to_owned()];
    let options = CompareOptions {
        prompts: &prompts,
        max_tokens: 8,
        text: Some("a rose is a rose"),
        window: 512,
    };
    let same = compare(&base, &base, &options, &mut |_| ()).unwrap();
    assert!(same.identical && same.max_abs_logit_diff == 0.0 && same.mean_kl == 0.0);
    let different = compare(&base, &other, &options, &mut |_| ()).unwrap();
    assert!(!different.identical);
    assert!(different.max_abs_logit_diff > 0.1 && different.mean_kl > 0.01);
    assert_ne!(different.perplexity_base, different.perplexity_other);
    for prompt in &different.prompts {
        let first = prompt.first_divergence.unwrap();
        assert_eq!(prompt.base_ids[..first], prompt.other_ids[..first]);
        assert_ne!(prompt.base_ids[first], prompt.other_ids[first]);
    }
}

#[test]
fn shards_and_records_hold_the_same_weights_and_bytes_repeat() {
    let one = SyntheticCheckpoint::tiny();
    let sharded = SyntheticCheckpoint { n_shards: 3, ..one.clone() };
    let (a, b, c) = (written(&one), written(&one), written(&sharded));
    let weights = |dir: &tempfile::TempDir| std::fs::read(dir.path().join("model.safetensors"));
    assert_eq!(weights(&a).unwrap(), weights(&b).unwrap());
    assert!(c.path().join("model-00003-of-00003.safetensors").exists());
    let packed = packed(c.path());
    for layout in Layout::ALL {
        let original = logits(&load(a.path(), layout), 16, 1);
        assert!(original == logits(&load(&packed.path().join("packed"), layout), 16, 1));
    }
    let (a, c) = (load(a.path(), Layout::Rans), load(c.path(), Layout::Rans));
    assert_eq!(logits(&a, 16, 1), logits(&c, 16, 1));
    assert_eq!(a.weights_bytes(), c.weights_bytes());
}

#[test]
fn a_large_checkpoint_has_the_size_asked_for() {
    let dir = written(&SyntheticCheckpoint::of_bytes(3_000_000, 2));
    let n_bytes: u64 = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        .map(|file| std::fs::metadata(dir.path().join(file)).unwrap().len())
        .iter()
        .sum();
    assert!((3_000_000..3_400_000).contains(&n_bytes), "{n_bytes}");
    let weights_bytes = |layout| load(dir.path(), layout).weights_bytes() as f64;
    assert!(weights_bytes(Layout::Fixed) < 0.8 * weights_bytes(Layout::Dense));
}

#[test]
fn the_context_is_a_limit_and_an_end() {
    let mut checkpoint = SyntheticCheckpoint::tiny();
    checkpoint.config["max_position_embeddings"] = json!(12);
    let dir = written(&checkpoint);
    let model = load(dir.path(), Layout::Dense);
    let generation = greedy(&model, &[1, 2, 3, 4], 100, true);
    assert_eq!((generation.stop, generation.ids.len()), (StopReason::ContextFull, 9));
    assert_eq!(greedy(&model, &[1, 2], 3, true).stop, StopReason::MaxTokens);
    let error = Session::new(&model, 13, 1).unwrap_err();
    assert!(matches!(error, RuntimeError::ContextLength { found: 13, capacity: 12 }));
    let mut session = Session::new(&model, 12, 4).unwrap();
    let error = session.forward(&[0; 13], 1).unwrap_err();
    assert!(matches!(error, RuntimeError::ContextLength { found: 13, capacity: 12 }));
    let error = session.forward(&[256], 1).unwrap_err();
    assert!(matches!(error, RuntimeError::TokenId { found: 256, vocabulary: 256 }));
}

#[test]
fn text_survives_the_byte_tokenizer_and_the_template_renders() {
    use transom_runtime::chat::Message;
    let dir = written(&SyntheticCheckpoint::tiny());
    let model = load(dir.path(), Layout::Dense);
    let text = "Grüße, 世界 \u{1f980}\n";
    let ids = model.tokenizer().encode(text, true).unwrap();
    assert_eq!(ids[0], 0xc0);
    assert!(ids[1..].iter().map(|&id| id as u8).eq(text.bytes()));
    assert_eq!(model.tokenizer().decode(&ids).unwrap(), text);
    let chat = model.chat_template().unwrap().render(&[Message::user("Hi")]).unwrap();
    assert_eq!(chat, "<|begin|>user: Hi\nassistant: ");
    assert_eq!(model.tokenizer().encode(&chat, false).unwrap()[0], 0xc0);
}
