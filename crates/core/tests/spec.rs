//! Every number of `docs/format.md`: constants, tables and the worked example.
//!
//! The blocks of the worked example are recomputed here and compared with the
//! document. After a change of the format, `cargo test -p transom --test spec
//! -- --ignored regenerate` writes them anew.

use std::fmt::Write as _;
use std::path::PathBuf;

use transom::coder::rans::{
    DecodeTable, EncodeTable, LANES, MIN_STATES_BYTES, STATE_LOWER_BOUND, TAIL_BYTES, WORD_BYTES,
    decode_with, encode_with, tail_symbols,
};
use transom::model::{
    FreqTable, Histogram, MAX_CODED_ENTROPY, MAX_PROB_BITS, MIN_PROB_BITS, MIN_TABLE_BITS,
};
use transom::record::{MAGIC, VERSION_MAJOR, VERSION_MINOR};
use transom::tile::{BLOCK, TILE_COLS, TILE_ELEMS, TILE_ROWS, fragment_position};
use transom::{Dtype, Isa, Record, encode_record};

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/format.md")
}

fn document() -> String {
    std::fs::read_to_string(path()).expect("the specification is part of the repository")
}

/// Where the block with this label begins and ends in the document.
fn block_range(document: &str, label: &str) -> std::ops::Range<usize> {
    let opening = format!("```text {label}\n");
    let start = document.find(&opening).unwrap_or_else(|| panic!("no block {label}"));
    let start = start + opening.len();
    let end = document[start..].find("```").expect("the block ends");
    start..start + end
}

fn block<'a>(document: &'a str, label: &str) -> &'a str {
    &document[block_range(document, label)]
}

/// Rows of the table behind the comment `marker`, without its head.
fn table(document: &str, marker: &str) -> Vec<Vec<String>> {
    let (_, after) = document.split_once(&format!("<!-- {marker} -->")).expect("the marker");
    let rows = after.lines().skip_while(|line| !line.starts_with('|'));
    (rows.take_while(|line| line.starts_with('|')).skip(2))
        .map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect())
        .collect()
}

fn hex_bytes(text: &str) -> Vec<u8> {
    let digits = |word| u8::from_str_radix(word, 16).expect("two hexadecimal digits");
    text.split_whitespace().map(digits).collect()
}

fn lines_of<T>(items: &[T], a_line: usize, show: impl Fn(&T) -> String) -> String {
    let line = |items: &[T]| items.iter().map(&show).collect::<Vec<_>>().join(" ") + "\n";
    items.chunks(a_line).map(line).collect()
}

fn hex(bytes: &[u8]) -> String {
    lines_of(bytes, 32, |byte| format!("{byte:02x}"))
}

/// The worked example, computed.
struct Example {
    symbols: Vec<u8>,
    freqs: FreqTable,
    counts: [u64; 256],
    record: Vec<u8>,
    stream: Vec<u8>,
}

/// What the encoder did with one symbol.
struct Coded {
    step: usize,
    lane: usize,
    symbol: u8,
    limit: u64,
    before: u32,
    word: Option<u16>,
    after: u32,
}

impl Example {
    fn new(document: &str) -> Self {
        let symbols = hex_bytes(block(document, "example-symbols"));
        assert_eq!(symbols.len(), 200);
        let mut histogram = Histogram::default();
        histogram.add(&symbols);
        let freqs = FreqTable::choose(&histogram).expect("the example is coded");
        let record = encode_record(Isa::Scalar, Dtype::I8, &[200], &symbols).unwrap();
        let mut stream = Vec::new();
        encode_with(Isa::Scalar, &[&symbols], &[&EncodeTable::new(&freqs)], &mut stream).unwrap();
        Self { symbols, freqs, counts: histogram.counts, record, stream }
    }

    fn n_coded(&self) -> usize {
        self.symbols.len() - tail_symbols(self.symbols.len(), 1)
    }

    /// States in which the encoder begins.
    fn final_states(&self) -> Vec<u32> {
        let tail = &self.symbols[self.n_coded()..];
        let pair = |pair: &[u8]| 0x1_0000 | u32::from(pair[0]) | u32::from(pair[1]) << 8;
        tail.chunks(2).map(pair).collect()
    }

    /// Section 5.4, written down plainly: every symbol the encoder codes, in
    /// its order, and the states it ends in.
    fn encode(&self) -> (Vec<Coded>, Vec<u32>) {
        let mut states = self.final_states();
        let (starts, p) = (self.freqs.starts(), self.freqs.prob_bits());
        let mut trace = Vec::new();
        for index in (0..self.n_coded()).rev() {
            let (step, lane, symbol) = (index / LANES, index % LANES, self.symbols[index]);
            let freq = u32::from(self.freqs.freqs()[usize::from(symbol)]);
            let start = u32::from(starts[usize::from(symbol)]);
            let (before, limit) = (states[lane], u64::from(freq) << (32 - p));
            let word = (u64::from(before) >= limit).then_some(before as u16);
            let x = if word.is_some() { before >> 16 } else { before };
            let after = ((x / freq) << p) + start + x % freq;
            states[lane] = after;
            trace.push(Coded { step, lane, symbol, limit, before, word, after });
        }
        (trace, states)
    }

    /// Bytes of the table in the record: behind the fixed fields and the shape.
    fn table_bytes(&self) -> &[u8] {
        let header_bytes = u32::from_le_bytes(self.record[48..52].try_into().unwrap()) as usize;
        // One dimension, 200 = two bytes of LEB128; one tile.
        &self.record[52 + 3..header_bytes - 12]
    }

    fn table_fields(&self) -> String {
        let bytes = self.table_bytes();
        let bit = |i: usize| bytes[i / 8] >> (i % 8) & 1;
        let number = |at: usize, n: usize| (0..n).map(|i| usize::from(bit(at + i)) << i).sum();
        let (table_bits, order): (usize, usize) = (number(0, 4), number(4, 4));
        let (first, last): (usize, usize) = (number(8, 8), number(16, 8));
        assert_eq!(table_bits, self.freqs.table_bits() as usize);
        let mut text = format!(
            "Table_Bits {table_bits}  Order {order}  First {first:#04x}  Last {last:#04x}\n"
        );
        let shift = self.freqs.prob_bits() - self.freqs.table_bits();
        let (mut at, mut absent) = (24, 0);
        for symbol in first..=last {
            let units = usize::from(self.freqs.freqs()[symbol] >> shift);
            let v = units + (1 << order);
            let b = v.ilog2() as usize;
            let n_bits = b - order + 1 + b;
            let code: String = (at..at + n_bits).map(|i| char::from(b'0' + bit(i))).collect();
            let zeros = "0".repeat(b - order);
            let low: String = (0..b).map(|i| char::from(b'0' + (v >> i & 1) as u8)).collect();
            assert_eq!(code, format!("{zeros}1{low}"), "symbol {symbol}");
            at += n_bits;
            if units == 0 {
                absent += 1;
            } else {
                writeln!(text, "symbol {symbol:#04x}  units {units:2}  v {v:2}  code {code}")
                    .unwrap();
            }
        }
        let padding = 8 * bytes.len() - at;
        writeln!(text, "{absent} symbols between them have 0 units, v {}", 1 << order).unwrap();
        writeln!(text, "{at} bits, {padding} of padding, {} bytes", bytes.len()).unwrap();
        text
    }

    /// Label and content of every block that is computed.
    fn blocks(&self) -> Vec<(&'static str, String)> {
        let (trace, initial) = self.encode();
        let starts = self.freqs.starts();
        let shift = self.freqs.prob_bits() - self.freqs.table_bits();
        let row = |symbol: u8| {
            let s = usize::from(symbol);
            let (count, freq, start) = (self.counts[s], self.freqs.freqs()[s], starts[s]);
            let units = freq >> shift;
            format!(
                "symbol {symbol:#04x}  count {count:3}  units {units:2}  freq {freq:4}  start {start:4}\n"
            )
        };
        let with_word = |c: &Coded| {
            let word = c.word?;
            Some(format!(
                "step {}  lane {:2}  symbol {:#04x}  limit {:#010x}  state {:#010x}  word {word:#06x}  after {:#010x}\n",
                c.step, c.lane, c.symbol, c.limit, c.before, c.after
            ))
        };
        let of_lane_7 = |c: &Coded| {
            (c.lane == 7).then(|| {
                format!(
                    "step {}  symbol {:#04x}  {:#010x} -> {:#010x}\n",
                    c.step, c.symbol, c.before, c.after
                )
            })
        };
        let states = |states: &[u32]| lines_of(states, 8, |state| format!("{state:#010x}"));
        let mut fragment = [[0; BLOCK]; BLOCK];
        for index in 0..BLOCK * BLOCK {
            let (row, col) = fragment_position(index);
            fragment[row][col] = index;
        }
        let mut record = String::new();
        for (i, line) in self.record.chunks(16).enumerate() {
            let line: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
            writeln!(record, "{:3}  {}", 16 * i, line.join(" ")).unwrap();
        }
        vec![
            ("fragment", lines_of(&fragment.concat(), BLOCK, |i| format!("{i:3}"))),
            ("example-table", self.freqs.ranked().into_iter().map(row).collect()),
            ("example-table-bytes", hex(self.table_bytes())),
            ("example-table-fields", self.table_fields()),
            ("example-final-states", states(&self.final_states())),
            ("example-words", trace.iter().filter_map(with_word).collect()),
            ("example-lane-7", trace.iter().filter_map(of_lane_7).collect()),
            ("example-initial-states", states(&initial)),
            ("example-lengths", lines_of(&initial, 32, |s| format!("{}", s.ilog2() - 16))),
            ("example-stream", hex(&self.stream)),
            ("example-record", record),
        ]
    }
}

#[test]
fn every_block_of_the_document_is_what_the_code_computes() {
    let document = document();
    for (label, expected) in Example::new(&document).blocks() {
        assert!(!expected.is_empty(), "{label}");
        assert_eq!(block(&document, label), expected, "block {label}; see the head of this file");
    }
}

#[test]
#[ignore = "writes the document"]
fn regenerate() {
    let mut document = document();
    for (label, content) in Example::new(&document).blocks() {
        let range = block_range(&document, label);
        document.replace_range(range, &content);
    }
    std::fs::write(path(), document).unwrap();
}

#[test]
fn the_plain_coder_of_this_file_agrees_with_the_library() {
    let example = Example::new(&document());
    let (trace, initial) = example.encode();
    // The stream is lengths, states and words, from the trace alone.
    let mut expected: Vec<u8> = initial
        .chunks(2)
        .map(|s| ((s[0].ilog2() - 16) | ((s[1].ilog2() - 16) << 4)) as u8)
        .collect();
    let bits = initial.iter().flat_map(|&state| (0..state.ilog2()).map(move |i| state >> i & 1));
    for byte in bits.collect::<Vec<_>>().chunks(8) {
        expected.push(byte.iter().rev().fold(0, |byte, bit| byte << 1 | *bit as u8));
    }
    let words = trace.iter().rev().filter_map(|c| c.word);
    expected.extend(words.clone().flat_map(u16::to_le_bytes));
    assert_eq!(example.stream, expected);
    assert!(words.count() >= 2, "the example shows words");
    let header_bytes = example.record.len() - example.stream.len();
    assert_eq!(example.record[header_bytes..], example.stream);
    // And it decodes, on every instruction set.
    let table = DecodeTable::new(&example.freqs);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let mut out = vec![0xA5; example.symbols.len()];
        decode_with(isa, &example.stream, &[&table], &mut [&mut out]).unwrap();
        assert_eq!(out, example.symbols);
    }
}

#[test]
fn constants_are_those_of_the_code() {
    let expected: Vec<(&str, String)> = vec![
        ("MAGIC", String::from_utf8(MAGIC.to_vec()).unwrap()),
        ("VERSION_MAJOR", VERSION_MAJOR.to_string()),
        ("VERSION_MINOR", VERSION_MINOR.to_string()),
        ("FIXED_BYTES", fixed_bytes().to_string()),
        ("ENTRY_BYTES", entry_bytes().to_string()),
        ("MAX_ELEMS", max_elems().to_string()),
        ("TILE_ROWS", TILE_ROWS.to_string()),
        ("TILE_COLS", TILE_COLS.to_string()),
        ("TILE_ELEMS", TILE_ELEMS.to_string()),
        ("BLOCK", BLOCK.to_string()),
        ("MIN_TABLE_BITS", MIN_TABLE_BITS.to_string()),
        ("MIN_PROB_BITS", MIN_PROB_BITS.to_string()),
        ("MAX_PROB_BITS", MAX_PROB_BITS.to_string()),
        ("MAX_GOLOMB_ORDER", max_golomb_order().to_string()),
        ("MAX_CODED_ENTROPY", MAX_CODED_ENTROPY.to_string()),
        ("LANES", LANES.to_string()),
        ("STATE_LOWER_BOUND", STATE_LOWER_BOUND.to_string()),
        ("MIN_STATES_BYTES", MIN_STATES_BYTES.to_string()),
        ("WORD_BYTES", WORD_BYTES.to_string()),
        ("TAIL_BYTES", TAIL_BYTES.to_string()),
    ];
    let rows = table(&document(), "constants");
    let found: Vec<(&str, String)> =
        rows.iter().map(|row| (row[0].as_str(), row[1].clone())).collect();
    assert_eq!(found, expected);
}

#[test]
fn dtypes_are_those_of_the_code() {
    let expected: Vec<Vec<String>> = (Dtype::ALL.into_iter())
        .map(|dtype| {
            let codable: Vec<String> =
                (0..2).filter(|&p| dtype.is_codable(p)).map(|p| p.to_string()).collect();
            let codable = if codable.is_empty() { "-".to_owned() } else { codable.join(" ") };
            let elem_bytes = dtype.elem_bytes().to_string();
            let stored = if dtype == Dtype::Opaque { "every other dtype" } else { dtype.name() };
            let code = dtype.code().to_string();
            vec![code, dtype.name().to_owned(), elem_bytes, codable, stored.to_owned()]
        })
        .collect();
    assert_eq!(table(&document(), "dtypes"), expected);
}

/// Header of an opaque record of `n_elems` bytes, up to the directory, without
/// a valid directory; for constants that only a decoder shows.
fn header(dtype: u8, coded: u8, rest: &[u8]) -> Vec<u8> {
    let mut bytes = [MAGIC.as_slice(), &[1, 0, dtype, coded], &[0; 40], &[0; 4], rest].concat();
    let n_bytes = bytes.len() as u32;
    bytes[48..52].copy_from_slice(&n_bytes.to_le_bytes());
    let checksum = xxhash_rust::xxh3::xxh3_64(&[&bytes[..8], &bytes[16..]].concat());
    bytes[8..16].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

fn error(record: &[u8]) -> transom::DecodeError {
    Record::read(record, 0, record.len() as u64).expect_err("it is not valid")
}

fn fixed_bytes() -> usize {
    // An empty tensor of one dimension has two bytes of shape and no tile.
    encode_record(Isa::Scalar, Dtype::Opaque, &[0], &[]).unwrap().len() - 2
}

fn entry_bytes() -> usize {
    // One byte of tensor more: one of tile, and the directory.
    let one = encode_record(Isa::Scalar, Dtype::Opaque, &[1], &[7]).unwrap().len();
    one - 1 - fixed_bytes() - 2
}

fn leb128(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

/// The largest power of two that is not refused as a shape; one more is.
fn max_elems() -> u64 {
    let is_shape = |n: u64| {
        let record = header(0, 0, &[vec![1], leb128(n)].concat());
        !matches!(error(&record), transom::DecodeError::Shape)
    };
    let largest = (0..63).map(|bits| 1 << bits).filter(|&n| is_shape(n)).max().unwrap();
    assert!(!is_shape(largest + 1));
    largest
}

/// The largest order that is not refused.
fn max_golomb_order() -> u8 {
    let is_order = |order: u8| {
        let record = header(5, 1, &[1, 1, 12 | order << 4, 0, 0]);
        let refused = transom::TableError::GolombOrder { found: order.into() };
        !matches!(error(&record), transom::DecodeError::Table { source, .. } if source == refused)
    };
    (0..16).filter(|&order| is_order(order)).max().unwrap()
}
