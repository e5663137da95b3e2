//! A small trained model writes the story it is known to write.

use serde_json::Value;
use transom::layout::Layout;
use transom_runtime::compare::{CompareOptions, compare};
use transom_runtime::tokenizer::StreamDecoder;

use crate::{bits, greedy, load, packed, shared};

#[test]
fn the_stories_are_the_expected_ones_in_every_layout_original_and_packed() {
    let Some(dir) = shared("models/stories260k") else { return };
    let expected: Value =
        serde_json::from_slice(&std::fs::read(dir.join("expected.json")).unwrap()).unwrap();
    let packed = packed(&dir);
    let packed_dir = packed.path().join("packed");
    let models: Vec<_> = [&dir, &packed_dir]
        .into_iter()
        .flat_map(|dir| Layout::ALL.map(|layout| load(dir, layout)))
        .collect();
    for run in expected["runs"].as_array().unwrap() {
        let ids = |field: &str| -> Vec<u32> { serde_json::from_value(run[field].clone()).unwrap() };
        let prompt = run["prompt"].as_str().unwrap();
        let mut logits = Vec::new();
        for model in &models {
            let prompt_ids = model.tokenizer().encode(prompt, true).unwrap();
            assert_eq!(prompt_ids, ids("prompt_ids"));
            let generation = greedy(model, &prompt_ids, 60, true);
            assert_eq!(generation.ids, ids("generated_ids"), "{prompt}");
            logits.push(bits(generation.logits.as_ref().unwrap()));

            let text = model.tokenizer().decode_continuation(&prompt_ids, &generation.ids).unwrap();
            assert_eq!(text, run["generated_text"].as_str().unwrap());
            let mut stream = StreamDecoder::new(model.tokenizer(), &prompt_ids);
            let mut streamed = String::new();
            for &id in &generation.ids {
                streamed += &stream.push(id).unwrap();
            }
            streamed += &stream.finish().unwrap();
            assert_eq!(streamed, text);
        }
        assert!(logits.iter().all(|of_layout| *of_layout == logits[0]), "{prompt}");
    }
}

#[test]
fn a_trained_model_finds_its_own_story_likely() {
    let Some(dir) = shared("models/stories260k") else { return };
    let (dense, rans) = (load(&dir, Layout::Dense), load(&dir, Layout::Rans));
    let prompts = ["Once upon a time".to_owned()];
    let text = "Once upon a time, there was a little girl named Lily. She loved to play outside.";
    let options =
        CompareOptions { prompts: &prompts, max_tokens: 20, text: Some(text), window: 512 };
    let comparison = compare(&dense, &rans, &options, &mut |_| ()).unwrap();
    assert!(comparison.identical);
    assert_eq!(comparison.perplexity_base, comparison.perplexity_other);
    let perplexity = comparison.perplexity_base.unwrap();
    assert!(perplexity > 1.0 && perplexity < 5.0, "{perplexity}");
}
