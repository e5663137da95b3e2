//! The seeds of the corpus, made anew.
//!
//! Records small enough to commit, one for each way a tensor can be stored,
//! and for the other targets inputs that reach each kind of case.

use transom::{Dtype, Isa, encode_record};

/// Bytes of an input for a target that reads parameters from it.
const INPUT_BYTES: usize = 48;

/// Headers: name, bytes of data, JSON.
const HEADERS: [(&str, u64, &str); 8] = [
    ("empty", 0, "{}"),
    ("metadata", 0, r#"{"__metadata__":{"format":"pt","note":"\u00e9"}}   "#),
    ("one", 8, r#"{"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}"#),
    (
        "two-unordered",
        12,
        r#"{"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]},"a":{"dtype":"I8","shape":[8],"data_offsets":[0,8]}}"#,
    ),
    (
        "scalar-and-empty",
        8,
        r#"{"e":{"dtype":"F16","shape":[0,3],"data_offsets":[0,0]},"s":{"dtype":"I64","shape":[],"data_offsets":[0,8]}}"#,
    ),
    ("unknown-dtype", 3, r#"{"x":{"dtype":"F6_NEW","shape":[4],"data_offsets":[0,3]}}"#),
    (
        "overflow",
        4,
        r#"{"x":{"dtype":"U8","shape":[4294967296,4294967296,4],"data_offsets":[0,4]}}"#,
    ),
    (
        "overlap",
        8,
        r#"{"a":{"dtype":"U8","shape":[6],"data_offsets":[0,6]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#,
    ),
];

/// A file of the corpus.
#[derive(Debug, Clone)]
pub struct Seed {
    /// Its folder.
    pub target: &'static str,
    /// Its name.
    pub name: String,
    /// What it holds.
    pub bytes: Vec<u8>,
}

/// Every generated seed. The corpus may hold others: inputs that once failed.
///
/// # Panics
///
/// If the encoder refuses a tensor, which would be a mistake here.
#[must_use]
pub fn all() -> Vec<Seed> {
    let records = tensors().into_iter().map(|(name, dtype, shape, data)| {
        let bytes = encode_record(Isa::Scalar, dtype, &shape, &data).expect("shape and data agree");
        Seed { target: "record", name: name.to_owned(), bytes }
    });
    let inputs = ["round_trip", "isa_agree"].into_iter().flat_map(|target| {
        (0..16).map(move |seed| {
            let bytes = noise(seed, INPUT_BYTES);
            Seed { target, name: format!("{seed:02}"), bytes }
        })
    });
    let headers = HEADERS.into_iter().map(|(name, data_bytes, json)| {
        let bytes = [&data_bytes.to_le_bytes(), json.as_bytes()].concat();
        Seed { target: "safetensors_header", name: name.to_owned(), bytes }
    });
    records.chain(inputs).chain(headers).collect()
}

/// `n` bytes that look random, the same in every run.
fn noise(seed: u32, n: usize) -> Vec<u8> {
    let mut state = u64::from(seed) + 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(seed.into());
            (state >> 56) as u8
        })
        .collect()
}

/// `n` symbols around `centre`, each step away half as likely.
fn peak(seed: u32, centre: u8, n: usize) -> Vec<u8> {
    noise(seed, n).into_iter().map(|b| centre.wrapping_sub(b.trailing_ones() as u8)).collect()
}

/// BF16 words with exponents around 120.
fn bf16(seed: u32, n: usize) -> Vec<u8> {
    let exponents = peak(seed, 120, n);
    let words = exponents.iter().zip(noise(seed + 1, n)).map(|(&exponent, rest)| {
        (u16::from(exponent) << 8 | u16::from(rest)).rotate_right(1).to_le_bytes()
    });
    words.flatten().collect()
}

fn tensors() -> Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)> {
    // FP16 values that came from BF16: the low mantissa bits are zero.
    let f16_from_bf16 = |n: usize| -> Vec<u8> {
        let words = peak(7, 0x2C, n).into_iter().zip(noise(8, n));
        words.flat_map(|(high, low)| [low & 0xE0, high]).collect()
    };
    let f16: Vec<u8> =
        peak(5, 0x2C, 1024).into_iter().zip(noise(6, 1024)).flat_map(|(h, l)| [l, h]).collect();
    vec![
        ("bf16-matrix", Dtype::Bf16, vec![32, 48], bf16(1, 32 * 48)),
        ("bf16-two-tiles", Dtype::Bf16, vec![144, 16], bf16(2, 144 * 16)),
        ("bf16-vector", Dtype::Bf16, vec![1000], bf16(3, 1000)),
        ("bf16-odd-matrix", Dtype::Bf16, vec![7, 131], bf16(4, 7 * 131)),
        ("f16-one-plane", Dtype::F16, vec![1024], f16),
        ("f16-two-planes", Dtype::F16, vec![32, 32], f16_from_bf16(1024)),
        ("f8-e4m3", Dtype::F8E4M3, vec![16, 80], peak(9, 0x30, 16 * 80)),
        ("f8-e5m2", Dtype::F8E5M2, vec![900], peak(10, 0x3C, 900)),
        ("i8-raw", Dtype::I8, vec![300], noise(11, 300)),
        ("i8-coded", Dtype::I8, vec![64, 64], peak(12, 0, 64 * 64)),
        ("u8-one-symbol", Dtype::U8, vec![70_000], vec![9; 70_000]),
        ("opaque", Dtype::Opaque, vec![100], noise(13, 100)),
        ("scalar", Dtype::Bf16, vec![], vec![0x80, 0x3F]),
        ("empty", Dtype::F16, vec![0, 5], vec![]),
    ]
}
