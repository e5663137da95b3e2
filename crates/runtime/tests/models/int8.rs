//! Models with INT8 weights: the same bits as those of FP16 weights that have
//! the numbers the integers stand for.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value, json};
use tempfile::TempDir;
use transom::checkpoint::{Options, QuantizeOptions, quantize};
use transom::layout::Layout;
use transom::quantize::Granularity;
use transom_runtime::calibrate::input_squares;
use transom_runtime::compare::{CompareOptions, compare};
use transom_runtime::store::Poison;
use transom_runtime::tiny::SyntheticCheckpoint;
use transom_runtime::{Model, RuntimeError, StoreOptions};

use crate::{bits, greedy, load, packed, shared, written};

const PROMPT: [u32; 3] = [7, 100, 41];

/// A checkpoint quantised, in `int8` of the folder returned.
fn quantised(dir: &Path, granularity: Granularity, selects: fn(&str) -> bool) -> TempDir {
    let target = TempDir::new().unwrap();
    let options = QuantizeOptions {
        granularity,
        selects: &selects,
        target_bits: None,
        input_squares: &HashMap::new(),
        baseline: false,
    };
    let int8 = target.path().join("int8");
    quantize(dir, &int8, &options, &Options::default(), &()).unwrap();
    target
}

/// Name, dtype, shape and bytes of a tensor.
type Tensor = (String, String, Vec<usize>, Vec<u8>);
type Tensors = Vec<Tensor>;

fn read(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    let tensors = header.into_iter().filter(|(name, _)| name != "__metadata__");
    tensors
        .map(|(name, info)| {
            let offset = |i: usize| 8 + n + info["data_offsets"][i].as_u64().unwrap() as usize;
            let shape = serde_json::from_value(info["shape"].clone()).unwrap();
            let dtype = info["dtype"].as_str().unwrap().to_owned();
            (name, dtype, shape, bytes[offset(0)..offset(1)].to_vec())
        })
        .collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        data.extend(bytes);
        let info = json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets });
        header.insert(name.clone(), info);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let prefix = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&prefix[..], &header, &data].concat()).unwrap();
}

/// The checkpoint with FP16 numbers instead of integers and scales.
fn dequantised(int8: &Path) -> TempDir {
    let dir = TempDir::new().unwrap();
    for file in ["config.json", "generation_config.json", "tokenizer.json"] {
        let _ = std::fs::copy(int8.join(file), dir.path().join(file));
    }
    let path = dir.path().join("config.json");
    let mut config: Map<String, Value> =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config.remove("quantization_config").unwrap();
    std::fs::write(path, serde_json::to_vec(&config).unwrap()).unwrap();
    let tensors = read(&int8.join("model.safetensors"));
    let scales: HashMap<&str, Vec<f32>> = (tensors.iter())
        .filter_map(|(name, _, _, bytes)| {
            let scales = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
            Some((name.strip_suffix("_scale")?, scales.collect()))
        })
        .collect();
    let floats = tensors.iter().filter(|(name, ..)| !name.ends_with("_scale"));
    let floats = floats.map(|(name, dtype, shape, bytes)| match scales.get(name.as_str()) {
        None => (name.clone(), dtype.clone(), shape.clone(), bytes.clone()),
        Some(scales) => {
            assert_eq!(dtype, "I8");
            let rows = bytes.chunks(shape[1]).enumerate();
            let halves = rows.flat_map(|(row, integers)| {
                let scale = scales[row % scales.len()];
                integers.iter().flat_map(move |&q| {
                    half::f16::from_f32(f32::from(q as i8) * scale).to_le_bytes()
                })
            });
            (name.clone(), "F16".to_owned(), shape.clone(), halves.collect())
        }
    });
    write(&dir.path().join("model.safetensors"), &floats.collect());
    dir
}

/// Every way to run it gives the bits of the FP16 model.
fn check(int8: &Path) {
    let floats = dequantised(int8);
    let expected = greedy(&load(floats.path(), Layout::Dense), &PROMPT, 6, true);
    let expected = (expected.ids, bits(&expected.logits.unwrap()));
    let packed = packed(int8);
    let same = |model: &Model, context: &str| {
        let found = greedy(model, &PROMPT, 6, true);
        assert!((found.ids, bits(&found.logits.unwrap())) == expected, "{context}");
    };
    for dir in [int8, &packed.path().join("packed")] {
        for layout in Layout::ALL {
            same(&load(dir, layout), &format!("{layout:?} {}", dir.display()));
            // As little memory as possible, so that nearly all is read again and again.
            let options = StoreOptions {
                memory: Some(1),
                prefetch: 1,
                poison: Poison::On,
                ..StoreOptions::new(layout)
            };
            let error = Model::load(dir, options, &mut |_| ()).unwrap_err();
            let RuntimeError::Memory { expected: least, .. } = error else { panic!("{error}") };
            for memory in [least, least * 5 / 4] {
                let options = StoreOptions { memory: Some(memory), ..options };
                let model = Model::load(dir, options, &mut |_| ()).unwrap();
                assert!(model.residency().unwrap().n_streamed > 0);
                assert!(model.weights_bytes() as u64 <= memory, "{layout:?}");
                same(&model, &format!("{layout:?} in {memory} bytes"));
            }
        }
    }
}

#[test]
fn integers_give_the_bits_of_the_numbers_they_stand_for() {
    let dir = written(&SyntheticCheckpoint::tiny());
    for granularity in [Granularity::Tensor, Granularity::Channel] {
        let int8 = quantised(dir.path(), granularity, |name| !name.contains("lm_head"));
        check(&int8.path().join("int8"));
    }
    let with_head = quantised(dir.path(), Granularity::Channel, |name| !name.contains("mlp"));
    check(&with_head.path().join("int8"));
}

#[test]
fn biases_and_tied_heads_stay_what_they_are() {
    for (family, architecture) in [("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")] {
        let mut checkpoint = SyntheticCheckpoint::tiny();
        checkpoint.config["model_type"] = json!(family);
        checkpoint.config["architectures"] = json!([architecture]);
        checkpoint.config["tie_word_embeddings"] = json!(true);
        checkpoint.config["head_dim"] = json!(8);
        let dir = written(&checkpoint);
        let int8 = quantised(dir.path(), Granularity::Channel, |_| true);
        check(&int8.path().join("int8"));
    }
}

#[test]
fn a_tied_embedding_of_integers_is_looked_up_and_multiplied() {
    let mut checkpoint = SyntheticCheckpoint::tiny();
    checkpoint.config["tie_word_embeddings"] = json!(true);
    let dir = written(&checkpoint);
    let int8 = quantised(dir.path(), Granularity::Channel, |_| true);
    let int8 = int8.path().join("int8");
    // `quantize` leaves embeddings alone; other programs may not.
    let path = int8.join("model.safetensors");
    let mut tensors = read(&path);
    let at = tensors.iter().position(|t| t.0 == "model.embed_tokens.weight").unwrap();
    let integers = tensors[at].3.as_chunks::<2>().0.iter();
    let integers = integers.map(|b| (half::bf16::from_le_bytes(*b).to_f32() * 800.0) as i8 as u8);
    tensors[at].3 = integers.collect();
    tensors[at].1 = "I8".into();
    let rows = tensors[at].2[0];
    let scales = (0..rows).flat_map(|row| (1e-3 + row as f32 * 1e-6).to_le_bytes()).collect();
    let name = "model.embed_tokens.weight_scale".to_owned();
    tensors.push((name, "F32".into(), vec![rows, 1], scales));
    write(&path, &tensors);
    check(&int8);
}

#[test]
fn scales_may_be_halves_and_have_to_be_there() {
    let dir = written(&SyntheticCheckpoint::tiny());
    let int8 = quantised(dir.path(), Granularity::Channel, |name| name.contains("up_proj"));
    let int8 = int8.path().join("int8");
    let path = int8.join("model.safetensors");
    let tensors = read(&path);
    let name = "model.layers.1.mlp.up_proj.weight_scale";
    let load = || Model::load(&int8, StoreOptions::new(Layout::Dense), &mut |_| ());
    let changed = |change: &dyn Fn(&mut Tensor)| {
        let mut tensors = tensors.clone();
        change(tensors.iter_mut().find(|t| t.0 == name).unwrap());
        write(&path, &tensors);
        load()
    };
    let floats = |bytes: &[u8]| -> Vec<f32> {
        bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    let model = changed(&|scale| {
        let halves = floats(&scale.3).into_iter().map(half::bf16::from_f32);
        (scale.1, scale.3) = ("BF16".into(), halves.flat_map(half::bf16::to_le_bytes).collect());
        scale.2 = vec![scale.2[0]];
    });
    model.unwrap();
    let wrong = [
        changed(&|scale| scale.0 = "other".into()),
        changed(&|scale| scale.2 = vec![1, scale.2[0]]),
        changed(&|scale| scale.3[..4].copy_from_slice(&f32::NAN.to_le_bytes())),
        changed(&|scale| scale.3[..4].copy_from_slice(&(-1f32).to_le_bytes())),
        changed(&|scale| (scale.1, scale.2[0]) = ("I8".into(), 4 * scale.2[0])),
    ];
    for model in wrong {
        let error = model.unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    // So large that 127 of it is infinite in FP16.
    let model = changed(&|scale| {
        scale.3 = scale.3.chunks(4).flat_map(|_| 600f32.to_le_bytes()).collect();
    });
    let model = model.unwrap();
    let mut session = transom_runtime::Session::new(&model, 4, 4).unwrap();
    let error = session.forward(&PROMPT, 1).unwrap_err().to_string();
    assert!(error.contains("model.layers.1.mlp.up_proj.weight`"), "{error}");
    assert!(error.contains("overflows FP16"), "{error}");
}

#[test]
fn other_kinds_of_quantisation_are_refused_by_name() {
    let dir = written(&SyntheticCheckpoint::tiny());
    let int8 = quantised(dir.path(), Granularity::Channel, |_| true);
    let int8 = int8.path().join("int8");
    let path = int8.join("config.json");
    let config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let group = "/quantization_config/config_groups/group_0";
    let changes = [
        ("/quantization_config/quant_method".to_owned(), json!("gptq"), "gptq"),
        ("/quantization_config/quantization_status".to_owned(), json!("frozen"), "frozen"),
        (format!("{group}/format"), json!("pack-quantized"), "pack-quantized"),
        (format!("{group}/input_activations"), json!({ "num_bits": 8 }), "input_activations"),
        (format!("{group}/weights/num_bits"), json!(4), "num_bits"),
        (format!("{group}/weights/type"), json!("float"), "float"),
        (format!("{group}/weights/symmetric"), json!(false), "symmetric"),
        (format!("{group}/weights/strategy"), json!("group"), "group"),
    ];
    for (pointer, value, word) in changes {
        let mut config = config.clone();
        *config.pointer_mut(&pointer).unwrap() = value;
        std::fs::write(&path, config.to_string()).unwrap();
        let error = Model::load(&int8, StoreOptions::new(Layout::Dense), &mut |_| ()).unwrap_err();
        assert!(matches!(error, RuntimeError::Unsupported { .. }), "{pointer}: {error}");
        assert!(error.to_string().contains(word), "{pointer}: {error}");
    }
}

#[test]
fn input_squares_are_those_of_a_run() {
    let dir = written(&SyntheticCheckpoint::tiny());
    let text = "Rows of a text, more of them than fit one chunk of sixty-four tokens at a time.";
    let load = || load(dir.path(), Layout::Dense);
    let squares = input_squares(load(), text, |_, _| ()).unwrap();
    // Seven matrices in each of four layers, and the head; no product reads the embedding.
    assert_eq!(squares.len(), 4 * 7 + 1);
    let of = |name: &str| &squares[&format!("model.layers.0.{name}.weight")];
    assert_eq!(of("self_attn.q_proj"), of("self_attn.v_proj"));
    assert_eq!(of("mlp.gate_proj"), of("mlp.up_proj"));
    // What a norm gives has a mean square near 1 before its weight.
    let mean = of("self_attn.q_proj").iter().sum::<f32>() / 64.0;
    assert!((0.5..2.0).contains(&mean), "{mean}");
}

#[test]
fn a_trained_model_differs_a_little_once_quantised() {
    let Some(dir) = shared("models/stories260k") else { return };
    let int8 = quantised(&dir, Granularity::Channel, |_| true);
    check(&int8.path().join("int8"));
    let (base, other) = (load(&dir, Layout::Dense), load(&int8.path().join("int8"), Layout::Fixed));
    let prompts = ["Once upon a time".to_owned()];
    let text = "Once upon a time, there was a little girl named Lily. She loved to play outside.";
    let options =
        CompareOptions { prompts: &prompts, max_tokens: 20, text: Some(text), window: 512 };
    let comparison = compare(&base, &other, &options, &mut |_| ()).unwrap();
    assert!(!comparison.identical && comparison.max_abs_logit_diff > 0.0);
    assert!(comparison.mean_kl > 0.0 && comparison.mean_kl < 0.01, "{}", comparison.mean_kl);
    let [before, after] =
        [comparison.perplexity_base, comparison.perplexity_other].map(Option::unwrap);
    assert!((after / before - 1.0).abs() < 0.02, "{before} {after}");
}
