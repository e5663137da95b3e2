//! Models whose weights are not BF16.

use std::path::Path;

use serde_json::{Map, Value, json};
use tempfile::TempDir;
use transom::layout::Layout;
use transom_runtime::store::Poison;
use transom_runtime::tiny::SyntheticCheckpoint;
use transom_runtime::{Model, RuntimeError, StoreOptions};

use crate::{bits, greedy, load, packed, written};

const PROMPT: [u32; 3] = [7, 100, 41];

/// The generated model with its weights in another type.
fn converted(dtype: &str, convert: impl Fn(half::bf16) -> Vec<u8>) -> TempDir {
    let dir = written(&SyntheticCheckpoint::tiny());
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    let (mut entries, mut data) = (Map::new(), Vec::new());
    for (name, info) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
        let offset = |i: usize| 8 + n + info["data_offsets"][i].as_u64().unwrap() as usize;
        let start = data.len();
        for word in bytes[offset(0)..offset(1)].as_chunks::<2>().0 {
            data.extend(convert(half::bf16::from_le_bytes(*word)));
        }
        let offsets = [start, data.len()];
        let info = json!({ "dtype": dtype, "shape": info["shape"], "data_offsets": offsets });
        entries.insert(name, info);
    }
    let header = serde_json::to_vec(&entries).unwrap();
    let prefix = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&prefix[..], &header, &data].concat()).unwrap();
    dir
}

fn check(original: &Path) {
    let expected = greedy(&load(original, Layout::Dense), &PROMPT, 40, true);
    let (ids, logits) = (expected.ids, bits(&expected.logits.unwrap()));
    let same = |model: &Model, context: &str| {
        let found = greedy(model, &PROMPT, 40, true);
        assert_eq!(found.ids, ids, "{context}");
        assert!(bits(&found.logits.unwrap()) == logits, "{context}");
    };
    let target = packed(original);
    for path in [original, &target.path().join("packed")] {
        for layout in Layout::ALL {
            same(&load(path, layout), &format!("{layout:?}"));
            let bounded = |memory| StoreOptions {
                memory: Some(memory),
                poison: Poison::On,
                ..StoreOptions::new(layout)
            };
            let Err(RuntimeError::Memory { expected, .. }) =
                Model::load(path, bounded(0), &mut |_| ())
            else {
                panic!("no memory is enough");
            };
            let model = Model::load(path, bounded(expected), &mut |_| ()).unwrap();
            same(&model, &format!("{layout:?} from the file"));
        }
    }
}

#[test]
fn a_model_in_f16_gives_the_same_logits_however_it_is_held() {
    check(converted("F16", |w| half::f16::from_f32(w.to_f32()).to_le_bytes().to_vec()).path());
}

#[test]
fn a_model_in_f32_gives_the_same_logits_however_it_is_held_and_those_of_bf16() {
    let wide = converted("F32", |w| w.to_f32().to_le_bytes().to_vec());
    check(wide.path());
    // Widening loses nothing.
    let narrow = written(&SyntheticCheckpoint::tiny());
    let run = |path| greedy(&load(path, Layout::Dense), &PROMPT, 40, true);
    let (wide, narrow) = (run(wide.path()), run(narrow.path()));
    assert_eq!(wide.ids, narrow.ids);
    assert!(bits(&wide.logits.unwrap()) == bits(&narrow.logits.unwrap()));
}
