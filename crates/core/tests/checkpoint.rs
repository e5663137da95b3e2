//! Packing, unpacking and verifying files and directories.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use transom::checkpoint::{Options, inspect, pack, unpack, verify};
use transom::{Checkpoint, CheckpointError};

/// xorshift.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Bytes of BF16 values with the exponents of trained weights.
    fn weights(&mut self, n: usize) -> Vec<u8> {
        (0..n)
            .flat_map(|_| {
                let r = self.next();
                let exponent = 121 - (r >> 8).trailing_zeros().min(20) as u16;
                (r as u16 & 0x807F | exponent << 7).to_le_bytes()
            })
            .collect()
    }
}

/// A safetensors file of these tensors: name, dtype, shape, data.
fn safetensors(tensors: &[(&str, &str, &str, Vec<u8>)]) -> Vec<u8> {
    let mut json = String::from(r#"{ "__metadata__" : {"format":"pt","note":"ä"}"#);
    let mut data: Vec<u8> = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend(bytes);
        json += &format!(
            r#", "{name}":{{"shape":{shape},"dtype":"{dtype}","data_offsets":[{start},{}]}}"#,
            data.len()
        );
    }
    json += "}   ";
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend(json.as_bytes());
    file.extend(data);
    file
}

fn odd_tensors(seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut any = |n: usize| -> Vec<u8> { (0..n).map(|_| random.next() as u8).collect() };
    let small: Vec<u8> = any(4000).iter().map(|b| b % 7).collect();
    let raw = [any(12), any(3), any(40), any(10), any(8), any(5000), any(1)];
    let [f32s, bools, f64s, unknown, scalar, noise, one] = raw;
    safetensors(&[
        ("matrix", "BF16", "[160,528]", random.weights(160 * 528)),
        ("half", "F16", "[48,80]", random.weights(48 * 80)),
        ("linear", "BF16", "[3,5,7]", random.weights(105)),
        ("f32", "F32", "[3]", f32s),
        ("bool", "BOOL", "[3]", bools),
        ("f64", "F64", "[5]", f64s),
        ("new", "Q9_ODD", "[4]", unknown),
        ("empty", "BF16", "[0,16]", Vec::new()),
        ("scalar", "I64", "[]", scalar),
        ("int8", "I8", "[40,100]", small),
        ("noise", "U8", "[5000]", noise),
        ("one", "F8_E4M3", "[1]", one),
    ])
}

fn write_checkpoint(root: &Path, n_shards: usize) {
    fs::create_dir_all(root.join("extra")).unwrap();
    let mut map = BTreeMap::new();
    for shard in 0..n_shards {
        let name = match n_shards {
            1 => "model.safetensors".to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", shard + 1),
        };
        let mut random = Random(99 + shard as u64);
        let tensor = format!("layers.{shard}.weight");
        let file = safetensors(&[
            (&tensor, "BF16", "[256,1040]", random.weights(256 * 1040)),
            (&format!("{tensor}.bias"), "BF16", "[77]", random.weights(77)),
        ]);
        fs::write(root.join(&name), file).unwrap();
        map.insert(tensor.clone(), name.clone());
        map.insert(format!("{tensor}.bias"), name);
    }
    if n_shards > 1 {
        let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map});
        fs::write(root.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
    fs::write(root.join("config.json"), "{\n \"model_type\": \"llama\",\n \"x\": 1.0e-5\n}")
        .unwrap();
    fs::write(root.join("tokenizer.json"), "{\"a\": [1, 2]}").unwrap();
    fs::write(root.join("empty.txt"), "").unwrap();
    fs::write(root.join("extra/notes.md"), "notes").unwrap();
}

fn files(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                todo.push(path);
            } else {
                let name = path.strip_prefix(root).unwrap().to_owned();
                found.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    found
}

fn options() -> Options {
    Options { threads: 2, ..Options::default() }
}

#[test]
fn every_kind_of_tensor_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let original = odd_tensors(3);
    fs::write(at("a.safetensors"), &original).unwrap();
    let report = pack(&at("a.safetensors"), &at("b.safetensors"), &options(), &()).unwrap();
    let packed = fs::read(at("b.safetensors")).unwrap();
    assert_eq!(report.original_bytes, original.len() as u64);
    assert_eq!(report.packed_bytes, packed.len() as u64);
    assert!(packed.len() < original.len());

    // Any other reader lists it.
    let list = safetensors::SafeTensors::deserialize(&packed).unwrap();
    assert_eq!(list.len(), 13);
    assert_eq!(list.tensor("matrix").unwrap().dtype(), safetensors::Dtype::U8);
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&packed).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["note"], "ä");

    let clean = verify(&at("b.safetensors"), Some(&at("a.safetensors")), &options(), &()).unwrap();
    assert_eq!((clean.differences.len(), clean.tensors), (0, 12));
    unpack(&at("b.safetensors"), &at("c.safetensors"), &options(), &()).unwrap();
    assert!(fs::read(at("c.safetensors")).unwrap() == original);

    let other = odd_tensors(4);
    fs::write(at("d.safetensors"), other).unwrap();
    let report = verify(&at("b.safetensors"), Some(&at("d.safetensors")), &options(), &()).unwrap();
    assert_eq!(report.differences.len(), 1, "{report:?}");
}

#[test]
fn directories_come_back_file_by_file() {
    for n_shards in [1, 3] {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        write_checkpoint(&at("a"), n_shards);
        let report = pack(&at("a"), &at("b"), &options(), &()).unwrap();
        assert!(report.complete && report.files_packed == n_shards);
        assert!(!at("b/.transom-job").exists());
        let config = fs::read_to_string(at("b/config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        assert_eq!(config["quantization_config"]["quant_method"], "transom");
        assert_eq!(config["quantization_config"]["inner"], serde_json::Value::Null);
        let clean = verify(&at("b"), Some(&at("a")), &options(), &()).unwrap();
        assert_eq!(clean.differences, []);
        unpack(&at("b"), &at("c"), &options(), &()).unwrap();
        assert!(files(&at("a")) == files(&at("c")));

        let [original, packed] = ["a", "b"].map(|name| Checkpoint::open(&at(name)).unwrap());
        assert!(packed.is_packed() && !original.is_packed());
        let info = |c: &Checkpoint| -> Vec<_> {
            c.tensors().map(|t| (t.name.clone(), t.dtype.clone(), t.shape.clone())).collect()
        };
        assert_eq!(info(&original), info(&packed));
        let bytes = |c: &Checkpoint| c.file_bytes("config.json").unwrap().unwrap();
        assert_eq!(bytes(&original), bytes(&packed));
        let [a, b] = ["a", "b"].map(|name| inspect(&at(name), &options(), &()).unwrap());
        assert_eq!(a.entropy_bits, b.entropy_bits);
        assert_eq!(a.bits_per_weight, 16.0);
        assert!(b.bits_per_weight < a.entropy_bits + 0.1);
    }
}

#[test]
fn every_flipped_bit_and_every_truncation_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_checkpoint(&at("a"), 2);
    pack(&at("a"), &at("b"), &options(), &()).unwrap();
    let all = files(&at("b"));
    assert!(all.keys().any(|name| name.ends_with("transom.json")));
    let mut random = Random(12345);
    let notices = |name: &Path, damaged: &[u8], what: String| {
        let path = at("b").join(name);
        let original = fs::read(&path).unwrap();
        fs::write(&path, damaged).unwrap();
        let noticed = match verify(&at("b"), None, &options(), &()) {
            Err(_) => true,
            Ok(report) => !report.differences.is_empty(),
        };
        fs::write(&path, original).unwrap();
        assert!(noticed, "{what} of {}", name.display());
    };
    for (name, bytes) in &all {
        // Small files get as many as large ones: every part counts.
        for _ in 0..40 {
            if bytes.is_empty() {
                continue;
            }
            // Half of them where the bookkeeping is.
            let near =
                if random.next().is_multiple_of(2) { bytes.len() } else { bytes.len().min(4096) };
            let bit = random.next() as usize % (8 * near);
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            notices(name, &damaged, format!("bit {bit}"));
        }
        for _ in 0..5 {
            let n = random.next() as usize % bytes.len().max(1);
            if n < bytes.len() {
                notices(name, &bytes[..n], format!("truncation to {n}"));
            }
        }
        let path = at("b").join(name);
        fs::remove_file(&path).unwrap();
        let gone = verify(&at("b"), None, &options(), &());
        assert!(gone.is_err() || !gone.unwrap().differences.is_empty());
        fs::write(path, bytes).unwrap();
    }
    assert_eq!(verify(&at("b"), None, &options(), &()).unwrap().differences, []);
}

#[test]
fn trailer_bits_are_all_covered() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("a.safetensors"), odd_tensors(8)).unwrap();
    pack(&at("a.safetensors"), &at("b.safetensors"), &options(), &()).unwrap();
    let packed = fs::read(at("b.safetensors")).unwrap();
    let end = packed.len();
    for byte in (end - 700..end).step_by(3).chain(0..40) {
        let mut damaged = packed.clone();
        damaged[byte] ^= 1 << (byte % 8);
        fs::write(at("b.safetensors"), &damaged).unwrap();
        let result = verify(&at("b.safetensors"), None, &options(), &());
        assert!(result.is_err() || !result.unwrap().differences.is_empty(), "byte {byte}");
    }
}

#[test]
fn an_interrupted_job_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_checkpoint(&at("a"), 3);
    pack(&at("a"), &at("whole"), &options(), &()).unwrap();
    let shard = |i, n| Options { shard: Some((i, n)), ..options() };
    let first = pack(&at("a"), &at("b"), &shard(1, 3), &()).unwrap();
    assert!(!first.complete && first.files_packed == 1);
    assert!(Checkpoint::open(&at("b")).is_err(), "an unfinished job opens");
    // What a killed run leaves: an unfinished file.
    fs::write(at("b/.transom-job/.model-00001-of-00003.safetensors.7.partial"), "half").unwrap();
    let second = pack(&at("a"), &at("b"), &options(), &()).unwrap();
    assert!(second.complete);
    assert_eq!((second.files_packed, second.files_resumed), (2, 1));
    assert!(files(&at("b")) == files(&at("whole")));
}

#[test]
fn processes_that_share_a_job_give_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_checkpoint(&at("a"), 4);
    pack(&at("a"), &at("whole"), &options(), &()).unwrap();
    std::thread::scope(|scope| {
        for i in 0..2 {
            let (a, b) = (at("a"), at("b"));
            scope.spawn(move || {
                pack(&a, &b, &Options { shard: Some((i, 2)), ..options() }, &()).unwrap()
            });
        }
    });
    assert!(files(&at("b")) == files(&at("whole")));
}

#[test]
fn destinations_are_not_overwritten_unasked() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_checkpoint(&at("a"), 2);
    write_checkpoint(&at("other"), 3);
    let run = |source: &str, target: &str, force| {
        pack(&at(source), &at(target), &Options { force, ..options() }, &())
    };
    use CheckpointError as E;
    assert!(matches!(run("a", "a", false), Err(E::DestinationInSource { .. })));
    assert!(matches!(run("a", "a/b/c", true), Err(E::DestinationInSource { .. })));
    fs::create_dir(at("mine")).unwrap();
    fs::write(at("mine/thesis.txt"), "years of work").unwrap();
    assert!(matches!(run("a", "mine", false), Err(E::DestinationExists { .. })));
    run("a", "mine", true).unwrap();
    assert_eq!(fs::read_to_string(at("mine/thesis.txt")).unwrap(), "years of work");
    assert_eq!(verify(&at("mine"), None, &options(), &()).unwrap().differences, []);
    // A finished job of another source is no unfinished one of this.
    assert!(matches!(run("other", "mine", false), Err(E::DestinationExists { .. })));
    run("other", "mine", true).unwrap();
    assert!(!at("mine/model-00001-of-00002.safetensors").exists());
    assert_eq!(fs::read_to_string(at("mine/thesis.txt")).unwrap(), "years of work");
    assert!(matches!(
        unpack(&at("mine"), &at("a"), &options(), &()),
        Err(E::DestinationExists { .. })
    ));
}

#[test]
fn bad_sources_are_refused_each_for_its_reason() {
    use CheckpointError as E;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let run = |source: &str| pack(&at(source), &at("out"), &options(), &());
    fs::create_dir(at("nothing")).unwrap();
    assert!(matches!(run("nothing"), Err(E::NoSafetensors { .. })));
    assert!(matches!(run("absent"), Err(E::Io { .. })));

    write_checkpoint(&at("a"), 2);
    fs::rename(at("a/model-00002-of-00002.safetensors"), at("shard")).unwrap();
    assert!(matches!(run("a"), Err(E::MissingShard { shard, .. }) if shard.contains("00002")));
    fs::rename(at("shard"), at("a/model-00002-of-00002.safetensors")).unwrap();

    pack(&at("a"), &at("b"), &options(), &()).unwrap();
    assert!(matches!(run("b"), Err(E::AlreadyPacked { .. })));
    assert!(matches!(run("b/model-00001-of-00002.safetensors"), Err(E::AlreadyPacked { .. })));
    assert!(matches!(unpack(&at("a"), &at("out"), &options(), &()), Err(E::NotPacked { .. })));
    assert!(matches!(verify(&at("a"), None, &options(), &()), Err(E::NotPacked { .. })));

    let clash = safetensors(&[("__transom__", "U8", "[4]", vec![1, 2, 3, 4])]);
    fs::write(at("clash.safetensors"), clash).unwrap();
    assert!(matches!(run("clash.safetensors"), Err(E::NameClash { .. })));

    fs::create_dir(at("twice")).unwrap();
    for name in ["x", "y"] {
        let file = safetensors(&[("same", "U8", "[1]", vec![1])]);
        fs::write(at(&format!("twice/{name}.safetensors")), file).unwrap();
    }
    assert!(matches!(run("twice"), Err(E::DuplicateTensor { .. })));
    assert!(!at("out").exists(), "a refused source leaves a destination");
}

#[test]
fn a_hostile_manifest_stays_in_its_directory() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_checkpoint(&at("a"), 1);
    pack(&at("a"), &at("b"), &options(), &()).unwrap();
    let manifest = fs::read_to_string(at("b/transom.json")).unwrap();
    for name in ["../evil.txt", "/tmp/evil.txt", "x/../../evil.txt", "./x", ""] {
        let text = manifest.replace("\"empty.txt\"", &format!("{name:?}"));
        let body = &text[..text.rfind("  \"blake3\"").unwrap()];
        let hash = blake3::hash(body.as_bytes()).to_hex();
        fs::write(at("b/transom.json"), format!("{body}  \"blake3\": \"{hash}\"\n}}\n")).unwrap();
        let result = unpack(&at("b"), &at("c"), &Options { force: true, ..options() }, &());
        let error = result.unwrap_err().to_string();
        assert!(error.contains("name of a file"), "{error}");
        assert!(!at("evil.txt").exists());
    }
}

#[test]
fn the_real_checkpoints_come_back() {
    let shared = std::env::var_os("TRANSOM_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    for name in ["stories260k", "coral-int8"] {
        let source = shared.join("models").join(name);
        if !source.is_dir() {
            println!("SKIPPED: {} is not there", source.display());
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        pack(&source, &at("b"), &options(), &()).unwrap();
        assert_eq!(verify(&at("b"), Some(&source), &options(), &()).unwrap().differences, []);
        unpack(&at("b"), &at("c"), &options(), &()).unwrap();
        assert!(files(&source) == files(&at("c")), "{name}");
    }
}
