//! Golden records: encoding gives exactly the committed files of
//! `testdata/valid`, on every instruction set, and they decode.
//!
//! A difference is a change of the format or of the encoder's choices: see
//! RELEASE.md. `cargo test -p transom --test golden -- --ignored regenerate`
//! writes the files anew.

use std::fmt::Write as _;
use std::path::PathBuf;

use transom::{Dtype, Isa, Record, encode_record};

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata/valid")
}

struct Case {
    name: &'static str,
    covers: &'static str,
    dtype: Dtype,
    shape: &'static [usize],
    data: Vec<u8>,
}

/// A fixed sequence of bytes, the same on every machine: `any` has all values
/// equally often, `rare` small ones most often.
struct Bytes(u64);

impl Bytes {
    fn any(&mut self) -> u8 {
        let (a, c) = (6_364_136_223_846_793_005, 1_442_695_040_888_963_407);
        self.0 = self.0.wrapping_mul(a).wrapping_add(c);
        (self.0 >> 56) as u8
    }

    fn rare(&mut self) -> u8 {
        self.any() & self.any() & self.any()
    }
}

/// `n` elements, each of them from `element`.
fn fill<const N: usize>(n: usize, element: impl Fn(&mut Bytes) -> [u8; N]) -> Vec<u8> {
    let mut bytes = Bytes(n as u64);
    (0..n).flat_map(|_| element(&mut bytes)).collect()
}

/// A BF16 number with an exponent around 120, as weights have.
fn bf16(bytes: &mut Bytes) -> [u8; 2] {
    let exponent = u16::from(124 - bytes.rare() % 16);
    let rest = u16::from(bytes.any());
    (exponent << 7 | (rest & 0x80) << 8 | rest & 0x7F).to_le_bytes()
}

fn case(
    name: &'static str,
    covers: &'static str,
    dtype: Dtype,
    shape: &'static [usize],
    data: Vec<u8>,
) -> Case {
    Case { name, covers, dtype, shape, data }
}

fn cases() -> Vec<Case> {
    use Dtype::{Bf16, F8E4M3, F8E5M2, F16, I8, Opaque, U8};
    let f16 = |bytes: &mut Bytes| [bytes.any(), 0x38 | bytes.rare() & 7];
    let both = |bytes: &mut Bytes| [bytes.rare() << 4, bytes.rare()];
    let low = |bytes: &mut Bytes| [bytes.rare(), bytes.any()];
    let byte = |bytes: &mut Bytes| [bytes.rare()];
    let every = || (0..=u16::MAX).step_by(17).flat_map(u16::to_le_bytes).collect();
    vec![
        case("empty", "no elements, no tiles", Bf16, &[0], vec![]),
        case("empty-matrix", "a side of zero", I8, &[0, 16], vec![]),
        case("scalar", "no dimensions, one element", F16, &[], vec![0x34, 0x12]),
        case("one-element", "too small to code", Bf16, &[1], vec![0x80, 0x3F]),
        case(
            "bf16-vector",
            "linear order, a last step of fewer lanes",
            Bf16,
            &[1003],
            fill(1003, bf16),
        ),
        case(
            "bf16-matrix",
            "fragment order, a narrow second tile",
            Bf16,
            &[48, 528],
            fill(48 * 528, bf16),
        ),
        case(
            "bf16-odd-matrix",
            "sides that are no multiples of 16",
            Bf16,
            &[33, 50],
            fill(1650, bf16),
        ),
        case(
            "bf16-wide",
            "every 17th of the 65,536 words, NaN payloads included; exponents too even to code",
            Bf16,
            &[3856],
            every(),
        ),
        case(
            "i8-matrix",
            "fragment order, four tiles, cut on both sides",
            I8,
            &[144, 528],
            fill(144 * 528, |b| [b.rare() & 0x3F]),
        ),
        case("f16-one-plane", "low plane raw behind the stream", F16, &[48, 32], fill(1536, f16)),
        case("f16-two-planes", "two coded planes in one stream", F16, &[32, 48], fill(1536, both)),
        case(
            "f16-two-planes-linear",
            "two planes, a last step of fewer lanes",
            F16,
            &[701],
            fill(701, both),
        ),
        case("f16-low-plane", "plane 1 coded, plane 0 raw", F16, &[1000], fill(1000, low)),
        case("f8-e4m3", "an 8-bit float", F8E4M3, &[64, 32], fill(2048, byte)),
        case("f8-e5m2", "three dimensions", F8E5M2, &[3, 16, 16], fill(768, byte)),
        case(
            "i8",
            "two tiles in linear order, the last of one element",
            I8,
            &[65_537],
            fill(65_537, |b| [b.rare() & 0x0F]),
        ),
        case(
            "u8-one-symbol",
            "a frequency of 1 << prob_bits: no words",
            U8,
            &[4000],
            vec![7; 4000],
        ),
        case(
            "u8-equal",
            "256 equally likely symbols: stored raw",
            U8,
            &[16, 48],
            fill(768, |b| [b.any()]),
        ),
        case("opaque", "bytes without structure", Opaque, &[100], fill(100, |b| [b.any()])),
    ]
}

fn path(case: &Case) -> PathBuf {
    directory().join(format!("{}.record", case.name))
}

#[test]
fn encoding_gives_the_committed_bytes_on_every_instruction_set() {
    for case in cases() {
        let golden = std::fs::read(path(&case)).expect(case.name);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let record = encode_record(isa, case.dtype, case.shape, &case.data).unwrap();
            assert!(record == golden, "{} {isa:?}", case.name);
        }
    }
}

#[test]
fn committed_records_decode_on_every_instruction_set() {
    for case in cases() {
        let golden = std::fs::read(path(&case)).expect(case.name);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let record = Record::read(&golden, 0, golden.len() as u64).expect(case.name);
            record.verify_with(&golden, isa).expect(case.name);
            assert!(record.to_vec(&golden, isa).unwrap() == case.data, "{} {isa:?}", case.name);
            assert_eq!(record.header().shape(), case.shape);
        }
    }
}

#[test]
fn every_committed_file_has_a_case() {
    let mut names: Vec<String> = cases().iter().map(|c| format!("{}.record", c.name)).collect();
    names.push("README.md".to_owned());
    for entry in std::fs::read_dir(directory()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(names.contains(&name), "{name}");
    }
    assert_eq!(std::fs::read_to_string(directory().join("README.md")).unwrap(), readme());
}

fn readme() -> String {
    let mut text = String::from(
        "# Valid records\n\n<!-- Written by crates/core/tests/golden.rs. -->\n\n\
         Every decoder restores them, and the encoder reproduces them byte for byte (`crates/core/tests/golden.rs`,\n\
         which also makes their content).\n\n| file | dtype | shape | bytes | covers |\n|---|---|---|---|---|\n",
    );
    for case in cases() {
        let n = encode_record(Isa::Scalar, case.dtype, case.shape, &case.data).unwrap().len();
        let (name, dtype, shape) = (case.name, case.dtype.name(), case.shape);
        writeln!(text, "| {name}.record | {dtype} | {shape:?} | {n} | {} |", case.covers).unwrap();
    }
    text
}

#[test]
#[ignore = "writes testdata/valid"]
fn regenerate() {
    for case in cases() {
        let record = encode_record(Isa::Scalar, case.dtype, case.shape, &case.data).unwrap();
        std::fs::write(path(&case), record).unwrap();
    }
    std::fs::write(directory().join("README.md"), readme()).unwrap();
}
