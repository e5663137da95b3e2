//! The independent decoder, `reference/decoder.py`, restores what the encoder
//! writes: every dtype, every degenerate shape, every size of table.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use transom::checkpoint::{Options, pack};
use transom::{Dtype, Isa, Record, encode_record};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn decoder(arguments: &[&Path]) -> std::io::Result<Output> {
    Command::new("python3").arg(root().join("reference/decoder.py")).args(arguments).output()
}

/// Whether there is a Python; on CI there has to be one.
fn has_python() -> bool {
    let found = Command::new("python3").arg("--version").output().is_ok();
    assert!(found || std::env::var_os("CI").is_none(), "CI needs python3 for this test");
    if !found {
        eprintln!("SKIPPED: python3 is missing");
    }
    found
}

/// A fixed sequence of numbers, the same on every machine.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    /// Small values are likely, large ones rare.
    fn skewed(&mut self) -> u8 {
        (self.next() & self.next() & self.next()) as u8
    }
}

/// Bytes of a tensor whose coded planes are uneven.
fn skewed(dtype: Dtype, n_elems: usize) -> Vec<u8> {
    let mut numbers = Numbers(n_elems as u64);
    let mut out = Vec::new();
    for _ in 0..n_elems {
        let (rare, any) = (numbers.skewed(), numbers.next() as u8);
        match dtype {
            Dtype::Bf16 => out.extend(
                (u16::from(rare) << 7 | u16::from(any) << 8 & 0x8000 | u16::from(any & 0x7F))
                    .to_le_bytes(),
            ),
            Dtype::F16 => out.extend([any, rare]),
            _ => out.push(rare),
        }
    }
    out
}

/// Encodes, has the reference decode, and compares.
fn check(name: &str, dtype: Dtype, shape: &[usize], data: &[u8]) {
    let directory = tempfile::tempdir().unwrap();
    let (packed, restored) = (directory.path().join("record"), directory.path().join("tensor"));
    let record = encode_record(Isa::best(), dtype, shape, data).unwrap();
    std::fs::write(&packed, &record).unwrap();
    let output = decoder(&[Path::new("record"), &packed, &restored]).unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {dtype:?} {shape:?}: {stderr}");
    assert!(std::fs::read(&restored).unwrap() == data, "{name} {dtype:?} {shape:?}");
}

#[test]
fn bytes_without_structure_are_restored() {
    if !has_python() {
        return;
    }
    for n in [0, 1, 100, 65_537] {
        check("opaque", Dtype::Opaque, &[n], &skewed(Dtype::Opaque, n));
    }
}

#[test]
fn degenerate_content_is_restored() {
    if !has_python() {
        return;
    }
    for dtype in Dtype::ALL {
        let n = 4096;
        let one: Vec<u8> = vec![0x3C; n * dtype.elem_bytes()];
        check("one symbol", dtype, &[n], &one);
        let equal: Vec<u8> =
            (0..n * dtype.elem_bytes()).map(|i| (i / dtype.elem_bytes()) as u8).collect();
        check("256 equal symbols", dtype, &[64, 64], &equal);
    }
    // Values that come from BF16: both planes of F16 are uneven.
    let mut numbers = Numbers(1);
    let two: Vec<u8> =
        (0..70_000).flat_map(|_| [numbers.skewed() << 3, numbers.skewed()]).collect();
    check("two coded planes", Dtype::F16, &[70_000], &two);
    check("two coded planes", Dtype::F16, &[112, 624], &two[..112 * 624 * 2]);
    // Only the low plane is uneven.
    let low: Vec<u8> = (0..5000).flat_map(|_| [numbers.skewed(), numbers.next() as u8]).collect();
    check("low plane coded", Dtype::F16, &[5000], &low);
}

/// `prob_bits` of the table in a record of one dimension of three bytes of LEB128.
fn prob_bits(record: &[u8]) -> u8 {
    (record[52 + 1 + 3] & 0xF).max(12)
}

#[test]
fn every_size_of_table_is_restored() {
    if !has_python() {
        return;
    }
    // The more rare symbols there are, the finer the table has to be.
    let mut seen = Vec::new();
    for n_rare in [0usize, 6, 10, 13, 16, 20, 30, 40] {
        let mut numbers = Numbers(n_rare as u64);
        let data: Vec<u8> = (0..400_000)
            .map(|_| match numbers.next() % 8192 {
                k if (k as usize) < 16 * n_rare => 40 + (numbers.next() % 200) as u8,
                k => (k % 16) as u8 & numbers.next() as u8,
            })
            .collect();
        let record = encode_record(Isa::best(), Dtype::I8, &[data.len()], &data).unwrap();
        if !seen.contains(&prob_bits(&record)) {
            seen.push(prob_bits(&record));
            check("table", Dtype::I8, &[data.len()], &data);
        }
    }
    seen.sort_unstable();
    assert!(seen.len() >= 3, "tables of {seen:?} bits only");
}

#[test]
fn a_flipped_bit_is_reported() {
    if !has_python() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (packed, restored) = (directory.path().join("record"), directory.path().join("tensor"));
    let record =
        encode_record(Isa::best(), Dtype::Bf16, &[32, 48], &skewed(Dtype::Bf16, 1536)).unwrap();
    for bit in (0..8 * record.len()).step_by(8 * record.len() / 24 + 1) {
        let mut flipped = record.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&packed, &flipped).unwrap();
        let output = decoder(&[Path::new("record"), &packed, &restored]).unwrap();
        assert_eq!(output.status.code(), Some(1), "bit {bit}");
    }
    assert!(!restored.exists());
}

/// Around every edge of block, tail, step and tile.
const SHAPES: [&[usize]; 14] = [
    &[0],
    &[],
    &[1],
    &[63],
    &[65],
    &[16, 16],
    &[128, 16],
    &[144, 528],
    &[16, 512],
    &[17, 40],
    &[3, 5, 7],
    &[2, 16, 16],
    &[0, 16],
    &[65_537],
];

/// A safetensors file of these tensors: name, dtype, shape, data.
fn safetensors(tensors: &[(String, &str, Vec<usize>, Vec<u8>)], metadata: &str) -> Vec<u8> {
    let (mut entries, mut data) = (vec![metadata.to_owned()], Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let (start, end) = (data.len(), data.len() + bytes.len());
        entries.push(format!(
            r#""{name}": {{"dtype":"{dtype}","shape":{shape:?}, "data_offsets":[{start},{end}]}}"#
        ));
        data.extend(bytes);
    }
    entries.retain(|entry| !entry.is_empty());
    // Not in the order of the data, as some writers leave it.
    entries.reverse();
    let json = format!("{{{}}}  ", entries.join(",\n "));
    [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &data].concat()
}

/// Packs a file, has the reference unpack it, and compares.
fn check_packed(original: &[u8]) {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (source, packed, restored) = (path("source"), path("packed"), path("restored"));
    std::fs::write(&source, original).unwrap();
    pack(&source, &packed, &Options::default(), &()).unwrap();
    let output = decoder(&[Path::new("unpack"), &packed, &restored]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(std::fs::read(&restored).unwrap() == original);
    // It is not the file name or the length that it accepts.
    let mut damaged = std::fs::read(&packed).unwrap();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    std::fs::write(&packed, damaged).unwrap();
    let output = decoder(&[Path::new("verify"), &packed]).unwrap();
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn every_dtype_and_shape_is_restored_from_packed_files() {
    if !has_python() {
        return;
    }
    let mut tensors = Vec::new();
    for dtype in Dtype::ALL.into_iter().filter(|&dtype| dtype != Dtype::Opaque) {
        for shape in SHAPES {
            let n_elems: usize = shape.iter().product();
            // The dtypes of one byte differ in their code only.
            if n_elems > 10_000 && !matches!(dtype, Dtype::Bf16 | Dtype::F16 | Dtype::I8) {
                continue;
            }
            let data = skewed(dtype, n_elems);
            let name = format!("{}.{shape:?}", dtype.name());
            tensors.push((name, dtype.name(), shape.to_vec(), data));
        }
    }
    tensors.push(("ids".to_owned(), "I64", vec![3], vec![5; 24]));
    tensors.push(("new".to_owned(), "F6_E2M3", vec![4], vec![9; 3]));
    check_packed(&safetensors(&tensors, r#""__metadata__": {"format": "pt"}"#));
    check_packed(&safetensors(&[], ""));
    // A header that is worth compressing.
    let many: Vec<_> =
        (0..300).map(|i| (format!("layers.{i}.weight"), "BF16", vec![1], vec![0, 63])).collect();
    check_packed(&safetensors(&many, ""));
}

#[test]
fn a_real_model_is_restored() {
    let shared =
        std::env::var_os("TRANSOM_SHARED").map_or_else(|| root().join("../shared"), PathBuf::from);
    let Ok(original) = std::fs::read(shared.join("models/stories260k/model.safetensors")) else {
        eprintln!("SKIPPED: no stories260k in {}", shared.display());
        return;
    };
    if has_python() {
        check_packed(&original);
    }
}

#[test]
fn it_agrees_on_all_test_files() {
    if !has_python() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let restored = directory.path().join("tensor");
    let mut n_files = 0;
    for folder in ["valid", "invalid", "hostile"] {
        for entry in std::fs::read_dir(root().join("testdata").join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "record") {
                continue;
            }
            let bytes = std::fs::read(&path).unwrap();
            let expected = Record::read(&bytes, 0, bytes.len() as u64).and_then(|r| {
                r.verify_with(&bytes, Isa::Scalar).and_then(|()| r.to_vec(&bytes, Isa::Scalar))
            });
            let output = decoder(&[Path::new("record"), &path, &restored]).unwrap();
            assert_eq!(output.status.code(), Some(expected.is_err().into()), "{}", path.display());
            if let Ok(expected) = expected {
                assert!(std::fs::read(&restored).unwrap() == expected, "{}", path.display());
            }
            n_files += 1;
        }
    }
    assert!(n_files > 50, "{n_files} files");
}
