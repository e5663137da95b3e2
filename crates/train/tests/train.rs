//! Training of tiny models on the processor.

use std::fs;
use std::path::Path;

use burn_tensor::{Tensor, TensorData};
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};
use tempfile::TempDir;
use transom::layout::Layout;
use transom::quantize::{dequantise, quantise};
use transom_runtime::{Model, Session, StoreOptions};
use transom_train::data::{BEGIN, Books, END, MIN_VOCABULARY, Tokenizer};
use transom_train::export::export;
use transom_train::model::{LlamaConfig, Tables, forward};
use transom_train::quantize::{
    Granularity, entropy, fake_quantize, levels, rate, scales, stretched,
};
use transom_train::train::{
    Corpus, LOG_NAME, LogLine, Quantization, STATE_NAME, TrainOptions, Trainer, read_log,
};
use transom_train::{Cpu, Stored, Values};

type Plain = burn_flex::Flex;

fn matrix<B: burn_tensor::backend::Backend>(rows: &[&[f32]]) -> Tensor<B, 2> {
    let data = TensorData::new(rows.concat(), [rows.len(), rows[0].len()]);
    Tensor::from_data(data, &B::Device::default())
}

fn values<B: burn_tensor::backend::Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().to_vec().unwrap()
}

fn quantization(rate: f64) -> Quantization {
    Quantization { granularity: Granularity::Channel, rate }
}

/// Two layers of width 32 with grouped queries.
fn tiny(quantization: Option<Quantization>) -> TrainOptions {
    TrainOptions {
        model: LlamaConfig {
            hidden_size: 32,
            intermediate_size: 48,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 8,
            vocab_size: 288,
            max_position_embeddings: 64,
            tie_word_embeddings: false,
            ..LlamaConfig::default()
        },
        quantization,
        steps: 24,
        batch_size: 4,
        passes: 2,
        sequence_length: 32,
        learning_rate: 1e-2,
        warmup: 4,
        log_every: 1,
        save_every: 12,
        validation_sequences: 4,
        ..TrainOptions::default()
    }
}

fn books() -> Books {
    let mut books = Books::default();
    for index in 0..20 {
        let line =
            format!("Book {index}. The quick brown fox jumps over the lazy dog. Ünïcödé too.\n");
        books.push(line.repeat(20));
    }
    books
}

fn prepare(dir: &Path) -> (Corpus, Tokenizer) {
    Corpus::prepare(&books(), 288, dir).unwrap()
}

/// Trains in `dir`, and returns the trainer and the lines of the log.
fn run(dir: &Path, options: TrainOptions) -> (Trainer<Cpu>, Vec<LogLine>) {
    let (corpus, _) = prepare(dir);
    let mut trainer = Trainer::new(options, Default::default()).unwrap();
    let mut lines = Vec::new();
    trainer.run(&corpus, dir, None, &mut |line| lines.push(line.clone())).unwrap();
    (trainer, lines)
}

fn losses(lines: &[LogLine]) -> Vec<f64> {
    lines.iter().map(|line| line.loss).collect()
}

// ---------------------------------------------------------------------------
// Quantisation

#[test]
fn weights_are_rounded_and_gradients_are_not() {
    let rows: [&[f32]; 3] =
        [&[127.0, 0.5, 1.5, -2.5], &[0.0, 0.0, 0.0, 0.0], &[2.54, -1.0, 0.03, 0.01]];
    let weights: Tensor<Cpu, 2> = matrix(&rows).require_grad();
    let scale = scales(weights.clone().detach(), Granularity::Channel);
    let quantised = fake_quantize(weights.clone(), scale);
    let upstream = matrix(&[&[1.0, -2.0, 3.0, -4.0][..]; 3]);
    let gradients = (quantised.clone() * upstream.clone()).sum().backward();
    let scale = 2.54_f32 / 127.0;
    let expected = [
        [127.0, 0.0, 2.0, -2.0],
        [0.0; 4],
        [127, -50, (0.03 / scale).round_ties_even() as i8, 0].map(|q| dequantise(q, scale)),
    ];
    assert_eq!(values(quantised), expected.concat());
    // Through the division by the scale and the product with it, exact but for rounding.
    for (found, expected) in values(weights.grad(&gradients).unwrap()).iter().zip(values(upstream))
    {
        assert!((found - expected).abs() <= 1e-6 * expected.abs(), "{found} {expected}");
    }
    assert_eq!(values(scales(matrix::<Plain>(&rows), Granularity::Channel)), [1.0, 1.0, scale]);
    assert_eq!(values(scales(matrix::<Plain>(&rows), Granularity::Tensor)), [1.0]);
}

proptest! {
    /// Against the library that runs the weights.
    #[test]
    fn weights_are_those_that_the_library_runs(
        rows in prop::collection::vec(prop::collection::vec(-300.0_f32..300.0, 17), 1..9),
        exponents in prop::collection::vec(-30_i32..2, 9),
        stretch in -3.0_f32..3.0,
        learned in any::<bool>(),
    ) {
        let rows: Vec<Vec<f32>> = rows.iter().zip(&exponents)
            .map(|(row, exponent)| row.iter().map(|x| x * 2_f32.powi(*exponent)).collect())
            .collect();
        let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
        let weights = matrix::<Plain>(&rows);
        for granularity in [Granularity::Tensor, Granularity::Channel] {
            let mut scale = scales(weights.clone(), granularity);
            if learned {
                scale = stretched(scale, Tensor::full([1, 1], stretch, &Default::default()));
            }
            let found = values(fake_quantize(weights.clone(), scale.clone()));
            let scale = values(scale);
            let expected = rows.iter().enumerate().flat_map(|(r, row)| {
                let scale = scale[r % scale.len()];
                row.iter().map(move |w| dequantise(quantise(*w, scale), scale))
            });
            let expected: Vec<f32> = expected.collect();
            // Zeros of either sign are the same weight.
            prop_assert_eq!(found, expected);
        }
    }
}

#[test]
fn a_learned_scale_has_the_gradient_of_its_roundings() {
    // Of w' = q * s: q - w/s, and nothing for weights on the grid; times s' of the stretch.
    let weights: Tensor<Cpu, 2> = matrix(&[&[127.0, 1.3, -2.6]]);
    let stretch: Tensor<Cpu, 2> = matrix(&[&[0.0]]).require_grad();
    // exp(0) + 1 = 2: integers 64 (63.5 to even), 1 and -1.
    let scale = stretched(scales(weights.clone(), Granularity::Channel), stretch.clone());
    let quantised = fake_quantize(weights, scale);
    assert_eq!(values(quantised.clone()), [128.0, 2.0, -2.0]);
    let gradients = (quantised * matrix(&[&[1.0, 10.0, 100.0]])).sum().backward();
    let expected = (64.0 - 63.5) + 10.0 * (1.0 - 0.65) + 100.0 * (-1.0 + 1.3);
    let found = values(stretch.grad(&gradients).unwrap())[0];
    assert!((found - expected).abs() < 1e-4, "{found} {expected}");
}

/// Integers with a two-sided geometric distribution and one outlier.
fn geometric() -> Vec<f32> {
    let mut row = vec![127.0];
    for (level, n) in [(0, 200), (1, 200), (2, 100), (3, 50), (4, 25), (5, 12), (6, 6)] {
        for sign in [1.0, -1.0] {
            row.extend(std::iter::repeat_n(sign * level as f32 * 1.0001, n));
        }
    }
    row
}

#[test]
fn the_entropy_is_that_of_the_integers() {
    // One of 4 and two of 3 each: 4 * 1/8 * 3 + 2/8 * 2 + 2/8 * 2 bits.
    let integers = matrix::<Plain>(&[&[-127.0, 0.0, 127.0, -1.0, 3.0, 3.0, -3.0, -3.0]]);
    assert!((entropy(integers) - 2.5).abs() < 1e-12);
    assert_eq!(entropy(matrix::<Plain>(&[&[5.0; 4]])), 0.0);
}

#[test]
fn the_rate_bounds_the_entropy_and_has_a_gradient() {
    let row = geometric();
    let scale = || matrix::<Cpu>(&[&[1.0]]);
    let entropy = entropy(levels(matrix::<Plain>(&[&row]), matrix(&[&[1.0]])));
    let weights: Tensor<Cpu, 2> = matrix(&[&row]).require_grad();
    let bits = rate(weights.clone(), scale());
    let gradients = bits.backward();
    let bits = f64::from(values(bits)[0]);
    assert!(bits > entropy && bits < entropy + 0.2, "{bits} against {entropy}");
    let gradient = values(weights.grad(&gradients).unwrap());
    assert!(row.iter().zip(&gradient).all(|(w, g)| w * g >= 0.0));
    assert!(gradient.iter().skip(500).any(|g| *g != 0.0));
    let learned = scale().require_grad();
    let gradients = rate(matrix(&[&row]), learned.clone()).backward();
    assert!(values(learned.grad(&gradients).unwrap())[0] < 0.0, "coarser is cheaper");
    let zeros: Tensor<Cpu, 2> = matrix::<Cpu>(&[&[0.0; 4]]).require_grad();
    let bits = rate(zeros.clone(), scale());
    let gradients = bits.backward();
    assert!(values(bits)[0].abs() < 1e-3);
    assert!(values(zeros.grad(&gradients).unwrap()).iter().all(|g| g.is_finite()));
}

// ---------------------------------------------------------------------------
// Texts

#[test]
fn books_come_from_every_kind_of_file() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("a.txt"), "first").unwrap();
    fs::write(path("b.jsonl"), "{\"text\":\"second\",\"id\":1}\n\n{\"text\":\"third\"}\n").unwrap();
    fs::write(path("c.txt.zst"), zstd::encode_all(&b"fourth"[..], 1).unwrap()).unwrap();
    let lines: String = (5..12).map(|i| format!("{{\"text\":\"{i}th\"}}\n")).collect();
    fs::write(path("d.jsonl.zst"), zstd::encode_all(lines.as_bytes(), 1).unwrap()).unwrap();
    fs::write(path("e.bin"), "ignored").unwrap();
    let books = Books::read(&[dir.path().to_owned()]).unwrap();
    let training =
        ["first", "second", "third", "fourth", "5th", "6th", "7th", "8th", "9th", "11th"];
    assert_eq!(books.training, training);
    assert_eq!(books.validation, ["10th"]);
    assert!(Books::read(&[path("e.bin")]).unwrap_err().to_string().contains("expected .txt"));
    fs::write(path("f.jsonl"), "{\"title\":1}\n").unwrap();
    assert!(Books::read(&[path("f.jsonl")]).unwrap_err().to_string().contains("line 1"));
    fs::write(path("g.txt"), "Fünf Wörter, ün".repeat(10)).unwrap();
    let books = Books::read(&[path("a.txt"), path("g.txt")]).unwrap();
    assert_eq!(books.training[1].clone() + &books.validation[0], "Fünf Wörter, ün".repeat(10));
    let share = books.validation[0].len() as f64 / 180.0;
    assert!((0.09..0.12).contains(&share), "{share}");
}

#[test]
fn the_tokenizer_keeps_every_byte() {
    let tokenizer = Tokenizer::train(&books().training, 300).unwrap();
    assert!((MIN_VOCABULARY + 1..=300).contains(&tokenizer.n_tokens()));
    let again = Tokenizer::train(&books().training, 300).unwrap();
    assert_eq!(again.json(), tokenizer.json());
    let text = "fox \u{1f98a}\t\n  über".to_owned();
    let ids = tokenizer.encode(std::slice::from_ref(&text)).unwrap();
    assert_eq!((ids[0], ids[ids.len() - 1]), (BEGIN.1, END.1));
    let runtime =
        transom_runtime::tokenizer::Tokenizer::parse(tokenizer.json().as_bytes()).unwrap();
    assert_eq!(runtime.decode(&ids).unwrap(), text);
    assert_eq!(runtime.encode(&text, true).unwrap(), ids[..ids.len() - 1]);
    assert!(Tokenizer::train(&books().training, 257).is_err());
}

// ---------------------------------------------------------------------------
// The loop

#[test]
fn the_loss_falls_and_is_the_same_again() {
    let dirs = [TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap()];
    let (_, first) = run(dirs[0].path(), tiny(None));
    let (_, second) = run(dirs[1].path(), tiny(None));
    let (_, other) = run(dirs[2].path(), TrainOptions { seed: 1, ..tiny(None) });
    assert_eq!(losses(&first), losses(&second));
    assert_ne!(losses(&first), losses(&other));
    assert!((first[0].loss - 288_f64.ln()).abs() < 0.3, "{}", first[0].loss);
    assert!(first[23].loss < first[0].loss - 2.0, "{:?}", losses(&first));
    let perplexity = first[23].validation_perplexity.unwrap();
    assert!(perplexity < 60.0, "{perplexity}");
    let log = fs::read_to_string(dirs[0].path().join(LOG_NAME)).unwrap();
    let lines: Vec<LogLine> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // But for the last bit of decimal numbers.
    let pairs = losses(&lines).into_iter().zip(losses(&first));
    assert!(lines.len() == first.len() && pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-12));
}

#[test]
fn an_interrupted_run_ends_as_if_it_had_not_been() {
    let options = tiny(Some(quantization(0.05)));
    let whole = TempDir::new().unwrap();
    let (trainer, lines) = run(whole.path(), options.clone());
    let dir = TempDir::new().unwrap();
    let (corpus, _) = prepare(dir.path());
    let mut half = Trainer::<Cpu>::new(options.clone(), Default::default()).unwrap();
    half.run(&corpus, dir.path(), Some(12), &mut |_| ()).unwrap();
    let state = dir.path().join(STATE_NAME);
    let options = TrainOptions { threads: 2, ..options };
    let resume = |options: &TrainOptions, corpus: &Corpus| {
        Trainer::<Cpu>::resume(options.clone(), Default::default(), corpus, &state)
    };
    let mut rest = resume(&options, &corpus).unwrap();
    assert_eq!(rest.step(), 12);
    let mut tail = Vec::new();
    rest.run(&corpus, dir.path(), None, &mut |line| tail.push(line.clone())).unwrap();
    assert_eq!(losses(&tail), losses(&lines[12..]));
    let all = |trainer: &Trainer<Cpu>| -> Vec<f32> {
        trainer.stored().iter().flat_map(|tensor| values(tensor.weights())).collect()
    };
    assert_eq!(all(&rest), all(&trainer));
    let log = fs::read_to_string(dir.path().join(LOG_NAME)).unwrap();
    assert_eq!(log.lines().count(), 24);
    let other = TrainOptions { learning_rate: 1e-3, ..options.clone() };
    let mut other_texts = corpus.clone();
    other_texts.training[7] ^= 1;
    for refused in [resume(&other, &corpus), resume(&options, &other_texts)] {
        let message = refused.unwrap_err().to_string();
        assert!(message.contains("other options or texts"), "{message}");
    }
}

#[test]
fn a_run_that_was_killed_between_log_and_state_logs_every_step_once() {
    let dir = TempDir::new().unwrap();
    let (corpus, _) = prepare(dir.path());
    let mut trainer = Trainer::<Cpu>::new(tiny(None), Default::default()).unwrap();
    trainer.run(&corpus, dir.path(), Some(12), &mut |_| ()).unwrap();
    let (state, log) = (dir.path().join(STATE_NAME), dir.path().join(LOG_NAME));
    let kept = fs::read(&state).unwrap();
    trainer.run(&corpus, dir.path(), Some(20), &mut |_| ()).unwrap();
    fs::write(&state, kept).unwrap();
    // The last line is cut, too.
    let text = fs::read_to_string(&log).unwrap();
    fs::write(&log, &text[..text.len() - 9]).unwrap();
    let mut trainer =
        Trainer::<Cpu>::resume(tiny(None), Default::default(), &corpus, &state).unwrap();
    trainer.run(&corpus, dir.path(), None, &mut |_| ()).unwrap();
    let steps: Vec<usize> = read_log(dir.path()).unwrap().iter().map(|line| line.step).collect();
    assert_eq!(steps, (1..=24).collect::<Vec<_>>());
}

#[test]
fn a_loss_that_is_no_number_ends_the_run_and_is_not_saved() {
    let dir = TempDir::new().unwrap();
    let (corpus, _) = prepare(dir.path());
    let options = TrainOptions { learning_rate: 1e30, warmup: 0, save_every: 1, ..tiny(None) };
    let mut trainer = Trainer::<Cpu>::new(options.clone(), Default::default()).unwrap();
    let error = trainer.run(&corpus, dir.path(), None, &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("learning rate"), "{error}");
    let state = dir.path().join(STATE_NAME);
    if state.exists() {
        let trainer = Trainer::<Cpu>::resume(options, Default::default(), &corpus, &state).unwrap();
        let finite =
            |tensor: &Stored<Plain>| values(tensor.weights()).iter().all(|w| w.is_finite());
        assert!(trainer.stored().iter().all(finite));
    }
}

#[test]
fn the_rate_term_lowers_the_entropy_of_the_integers() {
    let dirs = [TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap()];
    let bits = |dir: &TempDir, rate| {
        let (trainer, lines) = run(dir.path(), tiny(Some(quantization(rate))));
        let logged = lines[23].bits_per_weight.unwrap();
        let (mut bits, mut n_weights) = (0.0, 0);
        for tensor in trainer.stored() {
            let Values::Int8 { integers, .. } = tensor.values else { continue };
            let mut counts = [0_u32; 255];
            let integers = values(integers);
            integers.iter().for_each(|q| counts[(q + 127.0) as usize] += 1);
            let share = |count: &u32| f64::from(*count) / integers.len() as f64;
            let used = counts.iter().filter(|count| **count > 0);
            bits -= used.map(|c| f64::from(*c) * share(c).log2()).sum::<f64>();
            n_weights += integers.len();
        }
        let measured = bits / n_weights as f64;
        assert!((measured - logged).abs() < 1e-9, "{measured} {logged}");
        measured
    };
    let (without, little, much) = (bits(&dirs[0], 0.0), bits(&dirs[1], 1e-9), bits(&dirs[2], 3.0));
    assert!(much < little - 0.3 && much < without - 0.3, "{much} {little} {without}");
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let model = tiny(None).model;
    for model in [
        LlamaConfig { hidden_size: 0, ..model.clone() },
        LlamaConfig { num_key_value_heads: 3, ..model.clone() },
        LlamaConfig { head_dim: 7, ..model.clone() },
        LlamaConfig { rope_theta: f64::NAN, ..model },
    ] {
        assert!(TrainOptions { model, ..tiny(None) }.check().is_err());
    }
    for options in [
        TrainOptions { steps: 0, ..tiny(None) },
        TrainOptions { passes: 3, ..tiny(None) },
        tiny(Some(quantization(-1.0))),
        TrainOptions { sequence_length: 65, ..tiny(None) },
        TrainOptions { learning_rate: f64::INFINITY, ..tiny(None) },
        TrainOptions { betas: [0.9, 1.0], ..tiny(None) },
    ] {
        assert!(options.check().is_err());
    }
}

// ---------------------------------------------------------------------------
// Checkpoints

/// What the runtime computes from the checkpoint is what the trainer validates.
fn check_logits(options: &TrainOptions) {
    let dir = TempDir::new().unwrap();
    let (trainer, _) = run(dir.path(), options.clone());
    let (_, tokenizer) = prepare(dir.path());
    let checkpoint = dir.path().join("checkpoint");
    export(&checkpoint, options, &trainer.stored(), &tokenizer).unwrap();
    let text = "The quick brown fox jumps";
    let tokens = transom_runtime::tokenizer::Tokenizer::parse(tokenizer.json().as_bytes())
        .unwrap()
        .encode(text, true)
        .unwrap();
    let device = Default::default();
    let ids: Vec<i32> = tokens.iter().map(|id| *id as i32).collect();
    let ids = Tensor::from_data(TensorData::new(ids, [1, tokens.len()]), &device);
    let tables = Tables::<Plain>::new(&options.model, tokens.len(), &device);
    let weights: Vec<_> = trainer.stored().iter().map(Stored::weights).collect();
    let expected = values(forward(&options.model, &weights, &tables, ids));
    let largest = expected.iter().fold(0.0_f32, |largest, logit| largest.max(logit.abs()));
    for layout in [Layout::Dense, Layout::Fixed, Layout::Rans] {
        let model = Model::load(&checkpoint, StoreOptions::new(layout), &mut |_| ()).unwrap();
        let mut session =
            Session::new(&model, tokens.len(), transom_runtime::DEFAULT_CHUNK).unwrap();
        let found = session.forward(&tokens, tokens.len()).unwrap();
        assert_eq!(found.len(), expected.len());
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // The same weights: only the order of sums differs.
        assert!(largest > 1.0 && worst < 1e-4 * largest, "{worst} of {largest}");
    }
}

#[test]
fn the_runtime_agrees_with_the_trainer() {
    check_logits(&tiny(None));
    for granularity in [Granularity::Channel, Granularity::Tensor] {
        for rate in [0.0, 0.1] {
            check_logits(&tiny(Some(Quantization { granularity, rate })));
        }
    }
}

#[test]
fn the_runtime_agrees_with_a_tied_head() {
    for quantization in [None, Some(quantization(0.0))] {
        let mut options = tiny(quantization);
        options.model.tie_word_embeddings = true;
        check_logits(&options);
    }
}

#[test]
fn int8_checkpoints_hold_the_trained_weights_exactly() {
    for granularity in [Granularity::Channel, Granularity::Tensor] {
        let dir = TempDir::new().unwrap();
        let options =
            TrainOptions { steps: 2, ..tiny(Some(Quantization { granularity, rate: 0.1 })) };
        let (trainer, _) = run(dir.path(), options.clone());
        let (_, tokenizer) = prepare(dir.path());
        let out = dir.path().join("int8");
        export(&out, &options, &trainer.stored(), &tokenizer).unwrap();
        let bytes = fs::read(out.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut n_quantised = 0;
        for tensor in trainer.stored() {
            let spec = &tensor.spec;
            let view = file.tensor(&spec.name).unwrap();
            assert_eq!(view.shape(), spec.shape());
            if !spec.role.is_linear() {
                assert_eq!(view.dtype(), Dtype::BF16);
                continue;
            }
            n_quantised += 1;
            assert_eq!(view.dtype(), Dtype::I8);
            let scale = file.tensor(&format!("{}_scale", spec.name)).unwrap();
            assert_eq!(scale.dtype(), Dtype::F32);
            let scales: Vec<f32> = bytemuck::pod_collect_to_vec(scale.data());
            match granularity {
                Granularity::Channel => assert_eq!(scale.shape(), [spec.rows, 1]),
                Granularity::Tensor => assert_eq!(scale.shape(), [1]),
            }
            let product = |(index, byte): (usize, &u8)| {
                dequantise(*byte as i8, scales[index / spec.cols % scales.len()])
            };
            let dense: Vec<f32> = view.data().iter().enumerate().map(product).collect();
            assert_eq!(dense, values(tensor.weights()), "{}", spec.name);
        }
        assert_eq!(n_quantised, 14);
        let config: serde_json::Value =
            serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
        let quantization = &config["quantization_config"];
        assert_eq!(quantization["config_groups"]["group_0"]["format"], "int-quantized");
        assert_eq!(quantization["ignore"], serde_json::json!(["lm_head"]));
        for (key, value) in [("torch_dtype", "bfloat16"), ("dtype", "bfloat16")] {
            assert_eq!(config[key], value);
        }
        assert_eq!(config["rope_theta"], config["rope_parameters"]["rope_theta"]);
    }
}
