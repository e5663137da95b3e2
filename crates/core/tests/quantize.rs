//! Quantising a checkpoint: the numbers against a reference of its own, what is
//! refused, and what is left behind.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;
use transom::checkpoint::{
    CheckpointError, Options, QuantizeOptions, QuantizeReport, is_default, quantize,
};
use transom::quantize::Granularity;

const CONFIG: &str = r#"{ "model_type": "llama", "vocab_size": 8 }"#;

/// A tensor to write.
struct Given {
    name: &'static str,
    dtype: &'static str,
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl Given {
    fn new(name: &'static str, dtype: &'static str, shape: &[usize], values: Vec<f32>) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        Self { name, dtype, shape: shape.to_vec(), values }
    }

    fn bytes(&self) -> Vec<u8> {
        let values = self.values.iter();
        match self.dtype {
            "BF16" => values.flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
            "F16" => values.flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
            _ => values.flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    /// What is in the file.
    fn stored(&self) -> Vec<f32> {
        let values = self.values.iter();
        match self.dtype {
            "BF16" => values.map(|v| half::bf16::from_f32(*v).to_f32()).collect(),
            "F16" => values.map(|v| half::f16::from_f32(*v).to_f32()).collect(),
            _ => self.values.clone(),
        }
    }
}

fn write(path: &Path, tensors: &[Given]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for tensor in tensors {
        let start = data.len();
        data.extend(tensor.bytes());
        let entry = json!({
            "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, data.len()],
        });
        header.insert(tensor.name.to_owned(), entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
    fs::write(path, bytes).unwrap();
}

fn checkpoint(tensors: &[Given]) -> TempDir {
    let dir = TempDir::new().unwrap();
    write(&dir.path().join("model.safetensors"), tensors);
    fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    dir
}

/// The tensors of a file as another library reads them: dtype, shape, bytes.
fn read(path: &Path) -> HashMap<String, (String, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    tensors
        .iter()
        .map(|(name, view)| {
            let dtype = format!("{:?}", view.dtype());
            (name.to_owned(), (dtype, view.shape().to_vec(), view.data().to_vec()))
        })
        .collect()
}

/// Tensors of a quantised file start at multiples of their elements' length.
fn assert_aligned(path: &Path) {
    let bytes = fs::read(path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for (name, view) in tensors.iter() {
        let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        let n_elems = view.shape().iter().product::<usize>().max(1);
        assert_eq!(start % (view.data().len() / n_elems).max(1), 0, "{name}");
    }
}

fn run(
    source: &Path,
    target: &Path,
    granularity: Granularity,
) -> Result<QuantizeReport, CheckpointError> {
    let quantize_options = QuantizeOptions {
        granularity,
        selects: &is_default,
        target_bits: None,
        input_squares: &HashMap::new(),
        baseline: false,
    };
    quantize(source, target, &quantize_options, &Options::default(), &())
}

/// `scale` and `q` of a group by the definition, written down once more: the
/// quotient rounded in f64, whose fraction tells a tie.
fn reference(group: &[f32]) -> (f32, Vec<i8>) {
    let absmax = group.iter().map(|w| w.abs()).fold(0.0, f32::max);
    let scale = if absmax / 127.0 == 0.0 { 1.0 } else { absmax / 127.0 };
    let integers = group.iter().map(|weight| {
        let quotient = f64::from(weight / scale);
        let nearest = (quotient.abs() + 0.5).floor();
        let is_tie = quotient.abs().fract() == 0.5;
        let nearest = if is_tie && nearest % 2.0 == 1.0 { nearest - 1.0 } else { nearest };
        (nearest.min(127.0) * quotient.signum()) as i8
    });
    (scale, integers.collect())
}

fn check(weight: &Given, granularity: Granularity) {
    let others = [
        Given::new("model.embed_tokens.weight", "BF16", &[8, 2], vec![0.5; 16]),
        Given::new("model.layers.0.norm.weight", "F32", &[3], vec![1.0, f32::NAN, 2.0]),
        Given::new("lm_head.weight", "BF16", &[8, 2], vec![0.25; 16]),
    ];
    let (dtype, shape) = (weight.dtype, weight.shape.clone());
    let same = Given::new(weight.name, dtype, &shape, weight.values.clone());
    let [embedding, norm, head] = others;
    let source = checkpoint(&[embedding, same, norm, head]);
    let target = source.path().with_extension("int8");
    let report = run(source.path(), &target, granularity).unwrap();
    let (before, after) =
        (read(&source.path().join("model.safetensors")), read(&target.join("model.safetensors")));
    assert_aligned(&target.join("model.safetensors"));
    for name in ["model.embed_tokens.weight", "model.layers.0.norm.weight", "lm_head.weight"] {
        assert_eq!(before[name], after[name], "{name}");
    }
    let stored = weight.stored();
    let group = if granularity == Granularity::Tensor { stored.len() } else { shape[1] };
    let (mut scales, mut integers) = (Vec::new(), Vec::new());
    for group in stored.chunks(group.max(1)) {
        let (scale, found) = reference(group);
        scales.extend(scale.to_le_bytes());
        integers.extend(found.into_iter().map(|q| q as u8));
    }
    let scale_shape = if granularity == Granularity::Tensor { vec![1] } else { vec![shape[0], 1] };
    assert_eq!(after[weight.name], ("I8".to_owned(), shape, integers));
    let scale_name = format!("{}_scale", weight.name);
    assert_eq!(after[&scale_name], ("F32".to_owned(), scale_shape, scales));
    assert_eq!(after.len(), before.len() + 1);
    assert_eq!(report.tensors.len(), 1);
    fs::remove_dir_all(&target).unwrap();
}

const NAME: &str = "model.layers.0.mlp.up_proj.weight";

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn integers_and_scales_are_those_of_the_reference(
        (rows, cols) in (1usize..20, 1usize..40),
        dtype in prop::sample::select(vec!["BF16", "F16", "F32"]),
        magnitude in prop::sample::select(vec![1e-30f32, 1e-6, 0.02, 1.0, 60_000.0]),
        seed in any::<u64>(),
        zero_row in any::<bool>(),
    ) {
        let mut state = seed | 1;
        let mut values: Vec<f32> = (0..rows * cols)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                ((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * magnitude
            })
            .collect();
        if zero_row {
            values[..cols].fill(0.0);
        }
        let weight = Given::new(NAME, dtype, &[rows, cols], values);
        check(&weight, Granularity::Tensor);
        check(&weight, Granularity::Channel);
    }
}

#[test]
fn ties_go_to_even() {
    // The absolute maximum makes the scale 1.
    let values = vec![127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5];
    check(&Given::new(NAME, "F32", &[1, 8], values), Granularity::Channel);
}

#[test]
fn weights_that_no_integer_stands_for_are_refused_with_their_place() {
    for (bad, granularity) in [
        (f32::NAN, Granularity::Tensor),
        (f32::INFINITY, Granularity::Channel),
        (65_536.0, Granularity::Channel),
    ] {
        let mut values = vec![0.5; 12];
        values[7] = bad;
        let source = checkpoint(&[Given::new(NAME, "BF16", &[3, 4], values)]);
        let target = source.path().with_extension("int8");
        let error = run(source.path(), &target, granularity).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(NAME) && text.contains("row 1, column 3"), "{text}");
        assert!(!target.join("config.json").exists());
        assert!(transom::Checkpoint::open(&target).is_err());
        // The same call starts anew once the source is mended.
        let good = [Given::new(NAME, "BF16", &[3, 4], vec![0.5; 12])];
        write(&source.path().join("model.safetensors"), &good);
        run(source.path(), &target, granularity).unwrap();
        assert!(!target.join(".transom-job").exists());
        fs::remove_dir_all(&target).unwrap();
    }
    let most = Given::new(NAME, "F32", &[1, 2], vec![65_504.0, -65_504.0]);
    check(&most, Granularity::Channel);
}

#[test]
fn a_killed_job_is_begun_again_and_other_files_are_left_alone() {
    let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let source = checkpoint(&[Given::new(NAME, "BF16", &[3, 4], values)]);
    let work = TempDir::new().unwrap();
    let target = work.path().join("int8");
    run(source.path(), &target, Granularity::Channel).unwrap();
    let files = |dir: &Path| -> Vec<(PathBuf, Vec<u8>)> {
        let mut files: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| (path.clone(), fs::read(path).unwrap()))
            .collect();
        files.sort();
        files
    };
    let expected = files(&target);
    // Killed while files are made, and while they are moved out.
    for moved in [vec![], vec!["model.safetensors"]] {
        fs::remove_file(target.join("config.json")).unwrap();
        let job = target.join(".transom-job");
        fs::create_dir_all(job.join("files")).unwrap();
        fs::write(job.join("quantize.json"), r#"["config.json","model.safetensors"]"#).unwrap();
        fs::write(job.join("files/config.json"), "{ half").unwrap();
        if moved.is_empty() {
            fs::remove_file(target.join("model.safetensors")).unwrap();
        }
        run(source.path(), &target, Granularity::Channel).unwrap();
        assert_eq!(files(&target), expected);
    }
    // A finished one, a packing job's, somebody's files.
    let refused = || run(source.path(), &target, Granularity::Channel).unwrap_err().to_string();
    assert!(refused().contains("expected a new or empty directory"));
    fs::remove_dir_all(&target).unwrap();
    fs::create_dir_all(target.join(".transom-job/done")).unwrap();
    assert!(refused().contains("expected a new or empty directory"));
    fs::remove_dir_all(&target).unwrap();
    fs::write(&target, "a file").unwrap();
    assert!(refused().contains("expected a new or empty directory"));
    assert_eq!(fs::read(&target).unwrap(), b"a file");
    let inside = source.path().join("int8");
    let error = run(source.path(), &inside, Granularity::Channel).unwrap_err();
    assert!(matches!(error, CheckpointError::DestinationInSource { .. }));
}

#[test]
fn shards_keep_their_index_and_config_says_what_is_integer() {
    let dir = TempDir::new().unwrap();
    let of = |name| Given::new(name, "BF16", &[2, 4], vec![0.5; 8]);
    write(&dir.path().join("model-00001-of-00002.safetensors"), &[of(NAME), of("lm_head.weight")]);
    write(
        &dir.path().join("model-00002-of-00002.safetensors"),
        &[of("model.layers.0.mlp.down_proj.weight"), of("model.embed_tokens.weight")],
    );
    let map = json!({
        NAME: "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00001-of-00002.safetensors",
        "model.layers.0.mlp.down_proj.weight": "model-00002-of-00002.safetensors",
        "model.embed_tokens.weight": "model-00002-of-00002.safetensors",
    });
    let index = json!({ "metadata": { "total_size": 64 }, "weight_map": map });
    fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    fs::create_dir(dir.path().join("extra")).unwrap();
    fs::write(dir.path().join("extra/notes.txt"), "kept").unwrap();
    let work = TempDir::new().unwrap();
    let target = work.path().join("int8");
    let quantize_options = QuantizeOptions {
        granularity: Granularity::Channel,
        selects: &|name| !name.contains("down_proj") && is_default(name),
        target_bits: None,
        input_squares: &HashMap::new(),
        baseline: false,
    };
    quantize(dir.path(), &target, &quantize_options, &Options::default(), &()).unwrap();
    let json = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(target.join(name)).unwrap()).unwrap()
    };
    let index = json("model.safetensors.index.json");
    let scale = format!("{NAME}_scale");
    assert_eq!(index["weight_map"][&scale], "model-00001-of-00002.safetensors");
    assert_eq!(index["weight_map"].as_object().unwrap().len(), 5);
    // 8 integers and two scales, and three tensors of eight BF16.
    assert_eq!(index["metadata"]["total_size"], 8 + 8 + 48);
    let quantization = &json("config.json")["quantization_config"];
    let ignored = json!(["lm_head", "model.layers.0.mlp.down_proj"]);
    assert_eq!(quantization["ignore"], ignored);
    assert_eq!(quantization["quant_method"], "compressed-tensors");
    let group = &quantization["config_groups"]["group_0"];
    assert_eq!(group["format"], "int-quantized");
    assert_eq!(group["weights"]["strategy"], "channel");
    assert_eq!(fs::read(target.join("extra/notes.txt")).unwrap(), b"kept");
    // What is quantised is not quantised again, and what is packed is no source.
    let again = work.path().join("again");
    let error = run(&target, &again, Granularity::Channel).unwrap_err();
    assert!(matches!(error, CheckpointError::AlreadyQuantised { .. }), "{error}");
    let packed = work.path().join("packed");
    transom::checkpoint::pack(dir.path(), &packed, &Options::default(), &()).unwrap();
    let error = run(&packed, &again, Granularity::Channel).unwrap_err();
    assert!(matches!(error, CheckpointError::AlreadyPacked { .. }), "{error}");
    assert!(!again.exists());
    let nothing = QuantizeOptions { selects: &|_| false, ..quantize_options };
    let error = quantize(dir.path(), &again, &nothing, &Options::default(), &()).unwrap_err();
    assert!(matches!(error, CheckpointError::NothingToQuantise { .. }), "{error}");
}
