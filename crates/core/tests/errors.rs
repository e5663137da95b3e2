//! Every error of the decoder, from a file of its name in `testdata/invalid`,
//! and what comes of the attempts to break it in `testdata/hostile`.
//!
//! The files are built here, with checksums that are right unless they are the
//! point. `cargo test -p transom --test errors -- --ignored regenerate` writes
//! them anew.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::PathBuf;

use transom::coder::rans::{DecodeTable, EncodeTable, decode_with, encode_with};
use transom::model::{FreqTable, Histogram};
use transom::{DecodeError, Dtype, Isa, Record, TileError, encode_record};
use xxhash_rust::xxh3::xxh3_64;

fn directory(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(name)
}

// ---------------------------------------------------------------------------
// Building records

/// The parts of a record, to be changed one at a time.
#[derive(Clone)]
struct Parts {
    /// Magic, versions, dtype, coded planes.
    head: [u8; 8],
    content_hash: [u8; 32],
    shape: Vec<u8>,
    /// Tables, and whatever stands between them and the directory.
    tables: Vec<u8>,
    tiles: Vec<Vec<u8>>,
}

impl Parts {
    /// 200 symbols in one coded tile.
    fn base() -> Self {
        let data: Vec<u8> = (0..200u32).map(|i| (i * i % 29 % 4) as u8).collect();
        let record = encode_record(Isa::Scalar, Dtype::I8, &[200], &data).unwrap();
        let header_bytes = u32::from_le_bytes(record[48..52].try_into().unwrap()) as usize;
        Self {
            head: record[..8].try_into().unwrap(),
            content_hash: record[16..48].try_into().unwrap(),
            shape: record[52..55].to_vec(),
            tables: record[55..header_bytes - 12].to_vec(),
            tiles: vec![record[header_bytes..].to_vec()],
        }
    }

    /// No elements, so no directory, and these tables.
    fn tables_only(tables: &[u8]) -> Self {
        Self { shape: vec![1, 0], tables: tables.to_vec(), tiles: vec![], ..Self::base() }
    }

    /// Raw bytes of this shape, in LEB128, without tiles.
    fn opaque(shape: &[u8]) -> Self {
        let head = *b"TRSM\x01\x00\x00\x00";
        Self { head, shape: shape.to_vec(), tables: vec![], tiles: vec![], ..Self::base() }
    }

    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn record(&self) -> Vec<u8> {
        let mut header = [&self.head[..], &[0; 8], &self.content_hash, &[0; 4]].concat();
        header.extend([&self.shape[..], &self.tables].concat());
        for tile in &self.tiles {
            header.extend((tile.len() as u32).to_le_bytes());
            header.extend(xxh3_64(tile).to_le_bytes());
        }
        let header_bytes = header.len() as u32;
        header[48..52].copy_from_slice(&header_bytes.to_le_bytes());
        let checksum = xxh3_64(&[&header[..8], &header[16..]].concat());
        header[8..16].copy_from_slice(&checksum.to_le_bytes());
        header.extend(self.tiles.concat());
        header
    }
}

/// The base record with its tile changed.
fn tile(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    Parts::base().with(|parts| change(&mut parts.tiles[0])).record()
}

/// The base record with one bit of its tile flipped: the first bit that gives this error.
fn flipped(error: &str) -> Vec<u8> {
    let n_bits = 8 * Parts::base().tiles[0].len();
    (0..n_bits)
        .map(|bit| tile(|tile| tile[bit / 8] ^= 1 << (bit % 8)))
        .find(|record| outcome(record) == error)
        .unwrap_or_else(|| panic!("no bit gives {error}"))
}

/// Reads and verifies; the name of the error, or "valid".
fn outcome(record: &[u8]) -> String {
    let n_bytes = record.len() as u64;
    let found: Vec<String> = (Isa::ALL.into_iter().filter(|isa| isa.is_available()))
        .map(|isa| {
            let result = Record::read(record, 0, n_bytes).and_then(|r| r.verify_with(record, isa));
            result.map_or_else(|error| name(&error), |()| "valid".to_owned())
        })
        .collect();
    assert!(found.iter().all(|name| *name == found[0]), "{found:?}");
    found[0].clone()
}

/// The variant's name, with that of the error inside it.
fn name(error: &DecodeError) -> String {
    let variant =
        |debug: String| debug.split([' ', '(', '{']).next().unwrap_or_default().to_owned();
    match error {
        DecodeError::Table { source, .. } => format!("Table-{}", variant(format!("{source:?}"))),
        DecodeError::Tile { source, .. } => format!("Tile-{}", variant(format!("{source:?}"))),
        _ => variant(format!("{error:?}")),
    }
}

struct Case {
    name: &'static str,
    what: &'static str,
    bytes: Vec<u8>,
}

fn case(name: &'static str, what: &'static str, bytes: Vec<u8>) -> Case {
    Case { name, what, bytes }
}

/// One file for each error, named after it.
fn invalid() -> Vec<Case> {
    let base = Parts::base;
    vec![
        case("WrongMagic", "begins with TRSX", base().with(|p| p.head[3] = b'X').record()),
        case("Version", "major version 2", base().with(|p| p.head[4] = 2).record()),
        case("RecordTruncated", "the first 40 bytes of a record", base().record()[..40].to_vec()),
        case("RecordBytes", "a byte after the last tile", [base().record(), vec![0]].concat()),
        case("HeaderChecksum", "one bit of the content hash flipped", {
            let mut record = base().record();
            record[20] ^= 1;
            record
        }),
        case("Dtype", "dtype code 7", base().with(|p| p.head[6] = 7).record()),
        case("CodedPlanes", "plane 1 of I8 is coded", base().with(|p| p.head[7] = 3).record()),
        case(
            "Shape",
            "a dimension with a byte too many",
            base().with(|p| p.shape = vec![1, 0xC8, 0x81, 0]).record(),
        ),
        case(
            "HeaderBytes",
            "a byte between tables and directory",
            base().with(|p| p.tables.push(0)).record(),
        ),
        case(
            "Table-Truncated",
            "the header ends in the table",
            Parts::tables_only(&[0x14, 0]).record(),
        ),
        case(
            "Table-TableBits",
            "table_bits 0",
            Parts::tables_only(&[0x10, 0, 3, 0x9C, 0x3F]).record(),
        ),
        case("Table-GolombOrder", "order 13", Parts::tables_only(&[0xDC, 0, 0, 0, 0]).record()),
        case(
            "Table-SymbolRange",
            "first symbol 5, last 4",
            Parts::tables_only(&[0x01, 5, 4, 6]).record(),
        ),
        case(
            "Table-Frequency",
            "a frequency that begins with 40 zeros",
            Parts::tables_only(&[0x0C, 0, 0, 0, 0, 0, 0, 0]).record(),
        ),
        case(
            "Table-Sum",
            "one unit, expected two",
            Parts::tables_only(&[0x01, 0, 0, 0b010]).record(),
        ),
        case(
            "Table-Padding",
            "an unused bit is set",
            Parts::tables_only(&[0x01, 0, 0, 0b1000_0110]).record(),
        ),
        case("TileBytes", "a coded tile of 79 bytes", tile(|tile| tile.truncate(79))),
        case("TileChecksum", "one bit of the tile flipped, checksum as it was", {
            let mut record = base().record();
            *record.last_mut().unwrap() ^= 1;
            record
        }),
        case("Tile-StreamBytes", "half a word at the end", tile(|tile| tile.push(0))),
        case(
            "Tile-StatesPadding",
            "an unused bit behind the states is set",
            flipped("Tile-StatesPadding"),
        ),
        case("Tile-OutOfWords", "a state too small to last", flipped("Tile-OutOfWords")),
        case("Tile-WordsLeft", "a word too many", tile(|tile| tile.extend([0, 0]))),
        case("Tile-FinalState", "a state that ends elsewhere", flipped("Tile-FinalState")),
        case(
            "ContentHash",
            "another content hash, checksum right",
            base().with(|p| p.content_hash[0] ^= 1).record(),
        ),
    ]
}

/// Variants without a file, and why.
const WITHOUT_FILE: [(&str, &str); 8] = [
    (
        "Tile-TailPadding",
        "a tile so short that its tail has padding is never shorter than its elements, so it is raw",
    ),
    ("Tile-UnknownSymbol", "an error of the encoder"),
    ("Slice", "an error of the caller"),
    ("Io", "an error of the source"),
    ("InTensor", "adds the name of a tensor to another error"),
    ("Table", "the errors inside it have files"),
    ("Tile", "the errors inside it have files"),
    ("Overflow", "an error of the scales, which are another tensor"),
];

/// Attempts to break the reader: name, what it is, bytes; and the outcome.
fn hostile() -> Vec<(Case, &'static str)> {
    let head = |header_bytes: u32, n: usize| {
        let mut bytes = Parts::base().record();
        bytes[48..52].copy_from_slice(&header_bytes.to_le_bytes());
        bytes.truncate(n);
        bytes
    };
    // 2^k in LEB128.
    let power = |k: usize| [vec![0x80; k / 7], vec![1 << (k % 7)]].concat();
    let shape = |dims: &[Vec<u8>]| [vec![dims.len() as u8], dims.concat()].concat();
    // The shortest states, and words without sense.
    let words = |n: usize, seed: u8| {
        let words = (0..64 + n).map(move |i| seed ^ (i * i) as u8);
        tile(|tile| *tile = [0; 16].into_iter().chain(words).collect())
    };
    let most = [vec![0x0F, 0, 255], [0x00, 0x80, 0xFF, 0xFF].repeat(256)].concat();
    vec![
        (case("zero-length", "nothing", vec![]), "RecordTruncated"),
        (case("all-ff", "1,000 bytes of 0xFF", vec![0xFF; 1000]), "WrongMagic"),
        (case("all-zero", "1,000 bytes of 0", vec![0; 1000]), "WrongMagic"),
        (
            case("magic-only", "the magic number and nothing else", b"TRSM".to_vec()),
            "RecordTruncated",
        ),
        (
            case("header-bytes-max", "a header of 2^32 - 1 bytes", head(u32::MAX, 300)),
            "RecordTruncated",
        ),
        (case("header-bytes-zero", "a header of 0 bytes", head(0, 300)), "RecordTruncated"),
        (
            case("header-bytes-53", "a header that ends in its shape", head(53, 300)),
            "HeaderChecksum",
        ),
        (
            case("dim-2-62", "one dimension of 2^62", Parts::opaque(&shape(&[power(62)])).record()),
            "Shape",
        ),
        (
            case(
                "dims-overflow",
                "2^40 x 2^40, beyond 64 bits",
                Parts::opaque(&shape(&[power(40), power(40)])).record(),
            ),
            "Shape",
        ),
        (
            case(
                "dims-overflow-zero",
                "2^40 x 2^40 x 0",
                Parts::opaque(&shape(&[power(40), power(40), vec![0]])).record(),
            ),
            "Shape",
        ),
        (
            case(
                "tiles-2-32",
                "2^48 elements, 2^32 tiles without a directory",
                Parts::opaque(&shape(&[power(48)])).record(),
            ),
            "HeaderBytes",
        ),
        (case("n-dims-2-62", "2^62 dimensions", Parts::opaque(&power(62)).record()), "Shape"),
        (
            case(
                "n-dims-one-too-many",
                "four dimensions, three are there",
                Parts::opaque(&[4, 1, 1, 1]).record(),
            ),
            "Shape",
        ),
        (
            case(
                "leb128-ten-bytes",
                "a dimension of ten bytes",
                Parts::opaque(&[vec![1], vec![0x80; 9], vec![1]].concat()).record(),
            ),
            "Shape",
        ),
        (
            case(
                "leb128-endless",
                "a dimension of 200 bytes",
                Parts::opaque(&[vec![1], vec![0xFF; 200]].concat()).record(),
            ),
            "Shape",
        ),
        (
            case(
                "table-sum-2-24",
                "256 frequencies of about 2^16",
                Parts::tables_only(&most).record(),
            ),
            "Table-Sum",
        ),
        (
            case(
                "tile-larger-than-elements",
                "a tile of 201 bytes for 200 elements",
                tile(|tile| tile.resize(201, 0)),
            ),
            "TileBytes",
        ),
        (
            case("words-of-nonsense", "16 words without sense, checksums right", words(32, 0x5A)),
            "Tile-OutOfWords",
        ),
        (
            case("words-missing", "states without sense and no words", words(0, 0xC3)),
            "Tile-OutOfWords",
        ),
        (
            case("words-too-many", "59 words without sense, checksums right", words(118, 0x3C)),
            "Tile-WordsLeft",
        ),
        (
            case(
                "states-all-ones",
                "the longest states, and nothing behind them",
                tile(|tile| *tile = vec![0xFF; 140]),
            ),
            "Tile-FinalState",
        ),
        (
            case(
                "states-too-long",
                "the longest states, cut off",
                tile(|tile| *tile = vec![0xFF; 100]),
            ),
            "Tile-StreamBytes",
        ),
        (
            case(
                "minor-255",
                "a later minor version, with 1,000 bytes this one skips",
                Parts::base()
                    .with(|p| {
                        p.head[5] = 255;
                        p.tables.extend([0xAB; 1000]);
                    })
                    .record(),
            ),
            "valid",
        ),
        (
            case(
                "many-dims",
                "a scalar of 2,000 dimensions of 1",
                Parts::opaque(&[vec![0xD0, 0x0F], vec![1; 2000]].concat())
                    .with(|p| {
                        p.tiles = vec![vec![9]];
                        p.content_hash = *blake3::hash(&[9]).as_bytes();
                    })
                    .record(),
            ),
            "valid",
        ),
    ]
}

// ---------------------------------------------------------------------------
// Tests

fn file(folder: &str, case: &Case) -> PathBuf {
    directory(folder).join(format!("{}.record", case.name))
}

fn check_files(folder: &str, cases: &[Case], readme: &str) {
    let mut names: BTreeSet<String> = cases.iter().map(|c| format!("{}.record", c.name)).collect();
    names.insert("README.md".to_owned());
    let found = std::fs::read_dir(directory(folder)).unwrap();
    let found: BTreeSet<String> =
        found.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(found, names);
    assert_eq!(std::fs::read_to_string(directory(folder).join("README.md")).unwrap(), readme);
    for case in cases {
        assert!(std::fs::read(file(folder, case)).unwrap() == case.bytes, "{}", case.name);
    }
}

#[test]
fn every_invalid_file_gives_the_error_it_is_named_after() {
    let cases = invalid();
    for case in &cases {
        assert_eq!(outcome(&case.bytes), case.name);
    }
    check_files("invalid", &cases, &invalid_readme());
}

#[test]
fn every_hostile_file_has_its_outcome() {
    for (case, expected) in hostile() {
        assert_eq!(outcome(&case.bytes), expected, "{}", case.name);
    }
    let cases: Vec<Case> = hostile().into_iter().map(|(case, _)| case).collect();
    check_files("hostile", &cases, &hostile_readme());
}

#[test]
fn every_variant_has_a_file_or_a_reason() {
    let source = include_str!("../src/error.rs");
    let mut names: BTreeSet<String> = invalid().iter().map(|case| case.name.to_owned()).collect();
    names.extend(WITHOUT_FILE.map(|(name, _)| name.to_owned()));
    let mut variants = BTreeSet::new();
    for (prefix, declaration) in [
        ("", "pub enum DecodeError {"),
        ("Table-", "pub enum TableError {"),
        ("Tile-", "pub enum TileError {"),
    ] {
        let (_, body) = source.split_once(declaration).unwrap();
        let (body, _) = body.split_once("\n}").unwrap();
        // Variants stand four spaces deep and begin with a capital.
        let lines = body.lines().filter_map(|line| line.strip_prefix("    "));
        for line in lines.filter(|line| line.starts_with(|c: char| c.is_ascii_uppercase())) {
            let name = line.split([' ', '(', '{', ',']).next().unwrap();
            variants.insert(format!("{prefix}{name}"));
        }
    }
    assert_eq!(names, variants);
}

#[test]
fn padding_of_a_short_tail_is_checked() {
    let symbols: Vec<u8> = (0..40).map(|i| i % 3).collect();
    let mut histogram = Histogram::default();
    histogram.add(&symbols);
    let freqs = FreqTable::quantise(&histogram, 12);
    let mut stream = Vec::new();
    encode_with(Isa::Scalar, &[&symbols], &[&EncodeTable::new(&freqs)], &mut stream).unwrap();
    let table = DecodeTable::new(&freqs);
    let decode = |stream: &[u8]| decode_with(Isa::Scalar, stream, &[&table], &mut [&mut [0; 40]]);
    assert_eq!(decode(&stream), Ok(()));
    *stream.last_mut().unwrap() ^= 1;
    assert_eq!(decode(&stream), Err(TileError::TailPadding));
}

fn invalid_readme() -> String {
    let mut text = String::from(
        "# Invalid records\n\n<!-- Written by crates/core/tests/errors.rs. -->\n\n\
         Each gives the error it is named after; what `Table` or `Tile` wraps stands behind the dash. Checksums are right\n\
         unless they are the point.\n\n| file | bytes | what is wrong |\n|---|---|---|\n",
    );
    for case in invalid() {
        writeln!(text, "| {}.record | {} | {} |", case.name, case.bytes.len(), case.what).unwrap();
    }
    text += "\nErrors without a file:\n\n| error | why |\n|---|---|\n";
    for (name, why) in WITHOUT_FILE {
        writeln!(text, "| {name} | {why} |").unwrap();
    }
    text
}

fn hostile_readme() -> String {
    let mut text = String::from(
        "# Hostile records\n\n<!-- Written by crates/core/tests/errors.rs. -->\n\n\
         Attempts to break the reader, and what comes of them.\n\n| file | bytes | what it is | outcome |\n|---|---|---|---|\n",
    );
    for (case, outcome) in hostile() {
        let (name, n_bytes, what) = (case.name, case.bytes.len(), case.what);
        writeln!(text, "| {name}.record | {n_bytes} | {what} | {outcome} |").unwrap();
    }
    text
}

#[test]
#[ignore = "writes testdata/invalid and testdata/hostile"]
fn regenerate() {
    for case in invalid() {
        std::fs::write(file("invalid", &case), &case.bytes).unwrap();
    }
    for (case, _) in hostile() {
        std::fs::write(file("hostile", &case), &case.bytes).unwrap();
    }
    std::fs::write(directory("invalid").join("README.md"), invalid_readme()).unwrap();
    std::fs::write(directory("hostile").join("README.md"), hostile_readme()).unwrap();
}
