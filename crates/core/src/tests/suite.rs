//! What every instruction set has to do; `mod.rs` runs it for each.

use super::data::{self, Random};
use super::naive;
use crate::coder::rans::{
    Cursor, DecodeTable, EncodeTable, MAX_STREAMS, Stream, decode_with, encode_with,
    run_streams_with, tail_symbols,
};
use crate::error::{DecodeError, TileError};
use crate::model::{FreqTable, Histogram, MAX_PROB_BITS, MIN_PROB_BITS};
use crate::split::{join_tile_with, split_tile_with};
use crate::tile::{Order, Tile};
use crate::{Dtype, Isa, Record, encode_record};

/// Sides below, at and above those of blocks and tiles.
const SIDES: [usize; 7] = [16, 112, 128, 144, 496, 512, 528];
/// What output buffers hold beforehand.
const PATTERNS: [u8; 2] = [0xA5, 0x5A];

/// Frequencies of a plane that use exactly these `prob_bits`.
fn freqs_of(plane: &[u8], prob_bits: u32) -> FreqTable {
    let mut histogram = Histogram::default();
    histogram.add(plane);
    FreqTable::quantise(&histogram, prob_bits)
}

fn encode(isa: Isa, planes: &[Vec<u8>], freqs: &[FreqTable]) -> Vec<u8> {
    let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
    let tables: Vec<EncodeTable> = freqs.iter().map(EncodeTable::new).collect();
    let tables: Vec<&EncodeTable> = tables.iter().collect();
    let mut stream = Vec::new();
    encode_with(isa, &planes, &tables, &mut stream).expect("every symbol has a frequency");
    stream
}

fn decode(
    isa: Isa,
    stream: &[u8],
    n_elems: usize,
    freqs: &[FreqTable],
    pattern: u8,
) -> Result<Vec<Vec<u8>>, TileError> {
    let tables: Vec<DecodeTable> = freqs.iter().map(DecodeTable::new).collect();
    let tables: Vec<&DecodeTable> = tables.iter().collect();
    let mut planes = vec![vec![pattern; n_elems]; freqs.len()];
    let mut outs: Vec<&mut [u8]> = planes.iter_mut().map(Vec::as_mut_slice).collect();
    decode_with(isa, stream, &tables, &mut outs)?;
    Ok(planes)
}

/// Encodes, compares with the naive coder, decodes.
fn check_stream(isa: Isa, planes: &[Vec<u8>], prob_bits: u32) {
    let freqs: Vec<FreqTable> = planes.iter().map(|plane| freqs_of(plane, prob_bits)).collect();
    let n = planes[0].len();
    let stream = encode(isa, planes, &freqs);
    assert!(stream == naive::encode(planes, &freqs), "{n} elements, {prob_bits} bits: encoder");
    assert_eq!(naive::decode(&stream, n, &freqs), planes);
    for pattern in PATTERNS {
        let decoded = decode(isa, &stream, n, &freqs, pattern);
        assert!(decoded.as_deref() == Ok(planes), "{n} elements, {prob_bits} bits: decoder");
    }
}

/// Encodes a tensor, compares with the scalar bytes, decodes in every way.
/// Returns the record.
fn check_tensor(isa: Isa, dtype: Dtype, shape: &[usize], data: &[u8]) -> Vec<u8> {
    let bytes = encode_record(isa, dtype, shape, data).unwrap();
    let scalar = encode_record(Isa::Scalar, dtype, shape, data).unwrap();
    assert!(bytes == scalar, "{dtype:?} {shape:?}: differs from scalar");
    let record = Record::read(&bytes, 0, bytes.len() as u64).unwrap();
    assert!(record.to_vec(&bytes, isa).unwrap() == data, "{dtype:?} {shape:?}: streamed");
    for pattern in PATTERNS {
        let mut out = vec![pattern; data.len()];
        record.decode_to_slice_with(&bytes, isa, &mut out).unwrap();
        assert!(out == data, "{dtype:?} {shape:?}: into a slice");
    }
    record.verify_with(&bytes, isa).unwrap();
    bytes
}

fn is_coded(bytes: &[u8]) -> Vec<bool> {
    let record = Record::read(bytes, 0, bytes.len() as u64).unwrap();
    (0..record.header().tiles().len()).map(|index| record.header().is_coded(index)).collect()
}

// === Coder ==================================================================

pub fn streams_are_those_of_the_naive_coder(isa: Isa) {
    for n in (1..=200).chain([1000, 1023, 1024, 4099]) {
        let planes = [data::peak(1, 120, n), data::wide(2, n), data::noise(3, n)];
        let prob_bits = MIN_PROB_BITS + (n as u32 % (MAX_PROB_BITS - MIN_PROB_BITS + 1));
        for plane in &planes {
            check_stream(isa, std::slice::from_ref(plane), prob_bits);
        }
        check_stream(isa, &planes[..2], prob_bits);
        check_stream(isa, &planes[1..], prob_bits);
    }
}

pub fn every_prob_bits_works(isa: Isa) {
    for prob_bits in MIN_PROB_BITS..=MAX_PROB_BITS {
        for plane in [data::peak(4, 0, 5000), data::wide(5, 5000), vec![7; 5000]] {
            check_stream(isa, std::slice::from_ref(&plane), prob_bits);
            check_stream(isa, &[plane.clone(), data::peak(6, 9, 5000)], prob_bits);
        }
    }
}

pub fn a_single_symbol_takes_no_words(isa: Isa) {
    let plane = vec![vec![42; 65_536]];
    let freqs = [freqs_of(&plane[0], MIN_PROB_BITS)];
    let stream = encode(isa, &plane, &freqs);
    assert!(stream.len() <= 128, "{} bytes", stream.len());
    assert_eq!(decode(isa, &stream, 65_536, &freqs, 0xA5).as_deref(), Ok(&plane[..]));
}

pub fn truncated_streams_are_errors(isa: Isa) {
    for planes in [vec![data::peak(7, 120, 700)], vec![data::wide(8, 500), data::peak(9, 3, 500)]] {
        let freqs: Vec<FreqTable> = planes.iter().map(|plane| freqs_of(plane, 13)).collect();
        let stream = encode(isa, &planes, &freqs);
        for cut in 0..stream.len() {
            let result = decode(isa, &stream[..cut], planes[0].len(), &freqs, 0xA5);
            assert!(result.is_err(), "cut to {cut} of {}", stream.len());
        }
        let longer = [&stream[..], &[0, 0]].concat();
        let result = decode(isa, &longer, planes[0].len(), &freqs, 0xA5);
        assert_eq!(result, Err(TileError::WordsLeft { found: 1 }));
    }
}

pub fn streams_of_other_lengths_are_errors(isa: Isa) {
    // Each symbol takes one bit, so that 16 of them fill no lane's state.
    let plane: Vec<u8> = (0..80).map(|i| i % 2).collect();
    let freqs = [freqs_of(&plane, MIN_PROB_BITS)];
    let stream = encode(isa, &[plane], &freqs);
    let result = decode(isa, &stream, 64, &freqs, 0xA5);
    assert!(matches!(result, Err(TileError::FinalState { lane: 0, .. })), "{result:?}");
    // All of these travel in the final states.
    let stream = encode(isa, &[vec![1; 10]], &freqs);
    assert_eq!(decode(isa, &stream, 9, &freqs, 0xA5), Err(TileError::TailPadding));
}

pub fn unknown_symbols_are_errors(isa: Isa) {
    let known = data::peak(10, 120, 1000);
    let table = EncodeTable::new(&freqs_of(&known, MIN_PROB_BITS));
    for at in [0, 31, 32, 500, 900, 935] {
        let mut plane = known.clone();
        plane[at] = 3;
        let result = encode_with(isa, &[&plane], &[&table], &mut Vec::new());
        assert_eq!(result, Err(TileError::UnknownSymbol { symbol: 3 }), "at {at}");
    }
}

pub fn several_streams_decode_as_one_does(isa: Isa) {
    for n_planes in 1..=2 {
        let planes: Vec<Vec<u8>> = (0..n_planes).map(|p| data::peak(11 + p, 120, 9000)).collect();
        let freqs: Vec<FreqTable> =
            planes.iter().map(|plane| freqs_of(plane, MIN_PROB_BITS)).collect();
        let stream = encode(isa, &planes, &freqs);
        let tables: Vec<DecodeTable> = freqs.iter().map(DecodeTable::new).collect();
        let tables: Vec<&DecodeTable> = tables.iter().collect();
        let n_coded = 9000 - tail_symbols(9000, planes.len());
        for lengths in [vec![n_coded; MAX_STREAMS + 1], vec![0, 31, 32, 4000, n_coded, 1, 8000]] {
            let mut cursors = vec![Cursor::start(&stream).unwrap(); lengths.len()];
            let mut decoded: Vec<Vec<Vec<u8>>> =
                lengths.iter().map(|&n| vec![vec![0xA5; n]; planes.len()]).collect();
            let mut outs: Vec<Vec<&mut [u8]>> = (decoded.iter_mut())
                .map(|planes| planes.iter_mut().map(Vec::as_mut_slice).collect())
                .collect();
            let mut streams: Vec<Stream<'_, '_, '_>> = (cursors.iter_mut().zip(&mut outs))
                .map(|(cursor, outs)| Stream { cursor, outs })
                .collect();
            run_streams_with(isa, &tables, &mut streams).unwrap();
            for (decoded, &n) in decoded.iter().zip(&lengths) {
                for (out, plane) in decoded.iter().zip(&planes) {
                    assert!(out[..] == plane[..n], "{n} symbols of {lengths:?}");
                }
            }
        }
    }
}

pub fn a_tile_can_be_decoded_in_pieces(isa: Isa) {
    let plane = data::peak(14, 120, 3000);
    let freqs = freqs_of(&plane, MIN_PROB_BITS);
    let stream = encode(isa, std::slice::from_ref(&plane), std::slice::from_ref(&freqs));
    let table = DecodeTable::new(&freqs);
    let (n_coded, mut done) = (3000 - tail_symbols(3000, 1), 0);
    let mut out = vec![0xA5; 3000];
    let mut cursor = Cursor::start(&stream).unwrap();
    for piece in [0, 32, 64, 32 * 17, 32 * 3].into_iter().cycle() {
        let end = n_coded.min(done + piece);
        cursor.run_with(isa, &[&table], &mut [&mut out[done..end]]).unwrap();
        done = end;
        if done == n_coded {
            break;
        }
    }
    cursor.finish(&mut [&mut out[n_coded..]]).unwrap();
    assert_eq!(out, plane);
}

// === Transform ==============================================================

pub fn planes_are_those_of_the_naive_split(isa: Isa) {
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::U8] {
        let size = dtype.elem_bytes();
        for (rows, cols) in SIDES.iter().flat_map(|&r| SIDES.map(|c| (r.min(128), c.min(512)))) {
            // Three elements more than a row, so that rows have a distance.
            let stride = (cols + 3) * size;
            let source = data::noise(15, rows * stride);
            let at =
                |(row, col): (usize, usize)| source[row * stride + col * size..][..size].to_vec();
            let elements: Vec<Vec<u8>> =
                naive::fragment_order(rows, cols).into_iter().map(at).collect();
            let tile = Tile { row_start: 0, col_start: 0, rows, cols };
            check_transform(isa, dtype, Order::Fragment, &tile, &source, stride, &elements);
        }
        for n in (1..=200).chain([65_535, 65_536]) {
            let source = data::noise(16, n * size);
            let elements: Vec<Vec<u8>> = source.chunks(size).map(<[u8]>::to_vec).collect();
            let tile = Tile { row_start: 0, col_start: 0, rows: 1, cols: n };
            check_transform(isa, dtype, Order::Linear, &tile, &source, 0, &elements);
        }
    }
}

fn check_transform(
    isa: Isa,
    dtype: Dtype,
    order: Order,
    tile: &Tile,
    source: &[u8],
    stride: usize,
    elements: &[Vec<u8>],
) {
    let size = dtype.elem_bytes();
    let context = format!("{dtype:?} {order:?} {}x{}", tile.rows, tile.cols);
    let expected = naive::split(dtype, elements).concat();
    for pattern in PATTERNS {
        let mut planes = vec![pattern; expected.len()];
        split_tile_with(isa, dtype, order, tile, source, stride, &mut planes);
        assert!(planes == expected, "{context}: split");
        let mut joined = vec![pattern; source.len()];
        let slices = [&planes[..elements.len()], &planes[elements.len()..]];
        join_tile_with(isa, dtype, order, tile, slices, &mut joined, stride);
        // What lies between the rows of the tile stays as it was.
        for (i, (&found, &source)) in joined.iter().zip(source).enumerate() {
            let inside = order == Order::Linear || i % stride < tile.cols * size;
            assert_eq!(found, if inside { source } else { pattern }, "{context}: byte {i} joined");
        }
    }
}

// === Records ================================================================

pub fn every_bit_pattern_of_16_bits_round_trips(isa: Isa) {
    let ascending: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for dtype in [Dtype::Bf16, Dtype::F16] {
        for shape in [vec![65_536], vec![256, 256], vec![128, 512], vec![2, 32_768]] {
            check_tensor(isa, dtype, &shape, &ascending);
        }
        // Every pattern among so many ordinary weights that planes are coded.
        let many = [ascending.clone(), data::weights(17, 7 * 65_536)].concat();
        let bytes = check_tensor(isa, dtype, &[1024, 512], &many);
        assert!(is_coded(&bytes).contains(&true), "{dtype:?}");
    }
}

pub fn every_byte_round_trips(isa: Isa) {
    for dtype in [Dtype::F8E4M3, Dtype::F8E5M2, Dtype::I8, Dtype::U8, Dtype::Opaque] {
        let mut bytes: Vec<u8> = (0..=255).collect();
        check_tensor(isa, dtype, &[256], &bytes);
        check_tensor(isa, dtype, &[16, 16], &bytes);
        bytes.extend(data::peak(18, 0, 31 * 256));
        let record = check_tensor(isa, dtype, &[128, 64], &bytes);
        assert_eq!(is_coded(&record), [dtype != Dtype::Opaque]);
    }
}

pub fn every_short_length_round_trips(isa: Isa) {
    for dtype in Dtype::ALL {
        for n in 0..=200 {
            check_tensor(isa, dtype, &[n], &vec![0x3C; n * dtype.elem_bytes()]);
        }
    }
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::U8] {
        for n in 0..=200 {
            let high = data::peak(19, 0x3C, n);
            let data = if dtype == Dtype::U8 { high } else { data::f16(&high, &vec![0x80; n]) };
            check_tensor(isa, dtype, &[n], &data);
        }
    }
}

pub fn lengths_around_a_tile_round_trip(isa: Isa) {
    for n in [8191, 8192, 8193, 65_535, 65_536, 65_537, 131_072 + 8193] {
        check_tensor(isa, Dtype::Bf16, &[n], &data::weights(20, n));
        check_tensor(isa, Dtype::U8, &[n], &data::wide(21, n));
    }
}

pub fn sides_around_a_tile_round_trip(isa: Isa) {
    for rows in SIDES {
        for cols in SIDES {
            check_tensor(isa, Dtype::Bf16, &[rows, cols], &data::weights(22, rows * cols));
        }
    }
    for (rows, cols) in [(144, 528), (528, 144), (128, 512), (16, 16)] {
        let n = rows * cols;
        check_tensor(isa, Dtype::I8, &[rows, cols], &data::wide(23, n));
        let two_planes = data::f16(&data::peak(24, 0x2C, n), &data::peak(25, 0, n));
        check_tensor(isa, Dtype::F16, &[rows, cols], &two_planes);
    }
}

pub fn shapes_of_every_kind_round_trip(isa: Isa) {
    for shape in [
        vec![],
        vec![1],
        vec![1, 1],
        vec![0],
        vec![0, 16],
        vec![16, 0],
        vec![3, 5, 7],
        vec![16, 16, 16],
        vec![17, 16],
        vec![16, 17],
        vec![127, 513],
        vec![2, 40_000],
        vec![40_000, 2],
    ] {
        let n = shape.iter().product();
        for dtype in Dtype::ALL {
            let data =
                if dtype.elem_bytes() == 2 { data::weights(26, n) } else { data::wide(27, n) };
            check_tensor(isa, dtype, &shape, &data);
        }
    }
}

pub fn one_distinct_symbol_costs_next_to_nothing(isa: Isa) {
    let record = check_tensor(isa, Dtype::U8, &[512, 512], &vec![200; 512 * 512]);
    assert!(record.len() < 600, "{} bytes", record.len());
    let record = check_tensor(isa, Dtype::F16, &[512, 512], &vec![0; 2 * 512 * 512]);
    assert!(record.len() < 600, "{} bytes", record.len());
}

pub fn equally_likely_symbols_are_stored_raw(isa: Isa) {
    let data = data::noise(28, 200_000);
    let record = check_tensor(isa, Dtype::I8, &[200_000], &data);
    assert_eq!(is_coded(&record), [false; 4]);
    assert!(record.len() <= data.len() + 64 + 4 * 12, "{} bytes", record.len());
}

pub fn a_tile_that_does_not_shrink_is_raw(isa: Isa) {
    // The tensor as a whole is worth coding, its second tile is not.
    let mut data = data::peak(29, 0, 4 * 65_536);
    data[65_536..2 * 65_536].copy_from_slice(&data::noise(30, 65_536));
    let record = check_tensor(isa, Dtype::U8, &[4 * 65_536], &data);
    assert_eq!(is_coded(&record), [true, false, true, true]);
}

pub fn half_precision_that_was_bfloat16_has_two_coded_planes(isa: Isa) {
    let n = 256 * 512;
    let low: Vec<u8> = data::noise(31, n).into_iter().map(|byte| byte & 0xE0).collect();
    let data = data::f16(&data::peak(32, 0x2C, n), &low);
    let bytes = check_tensor(isa, Dtype::F16, &[256, 512], &data);
    let record = Record::read(&bytes, 0, bytes.len() as u64).unwrap();
    assert_eq!(record.header().n_coded(), 2);
    let genuine = data::f16(&data::peak(33, 0x2C, n), &data::noise(34, n));
    let bytes = check_tensor(isa, Dtype::F16, &[256, 512], &genuine);
    let record = Record::read(&bytes, 0, bytes.len() as u64).unwrap();
    assert!(record.header().table(0).is_some() && record.header().table(1).is_none());
}

pub fn truncated_records_are_errors(isa: Isa) {
    let bytes = encode_record(isa, Dtype::Bf16, &[32, 32], &data::weights(35, 1024)).unwrap();
    for cut in 0..bytes.len() {
        assert!(Record::read(&bytes[..cut], 0, cut as u64).is_err(), "cut to {cut}");
        // The same file, cut off after its length was taken.
        let read = Record::read(&bytes[..cut], 0, bytes.len() as u64);
        let result = read.and_then(|record| record.to_vec(&bytes[..cut], isa));
        assert!(matches!(result, Err(DecodeError::Io(_))), "cut to {cut}: {result:?}");
    }
}

pub fn every_flipped_bit_is_an_error(isa: Isa) {
    let weights = data::weights(36, 1024);
    let bytes = encode_record(isa, Dtype::Bf16, &[32, 32], &weights).unwrap();
    for bit in 0..8 * bytes.len() {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let record = Record::read(&damaged, 0, damaged.len() as u64);
        let result = record.and_then(|record| record.verify_with(&damaged, isa));
        assert!(result.is_err(), "bit {bit}");
    }
}

pub fn slices_are_parts_of_the_whole(isa: Isa) {
    let mut random = Random::new(37);
    for shape in [vec![272, 1040], vec![129, 700], vec![3, 7, 50_001], vec![70_000], vec![0, 16]] {
        let n: usize = shape.iter().product();
        let data = data::weights(38, n);
        let bytes = encode_record(isa, Dtype::Bf16, &shape, &data).unwrap();
        let record = Record::read(&bytes, 0, bytes.len() as u64).unwrap();
        let (n_rows, n_cols) = record.matrix_sides();
        let mut ranges = vec![
            (0..n_rows, 0..n_cols),
            (0..0, 0..n_cols),
            (n_rows..n_rows, n_cols..n_cols),
            (0..n_rows.min(1), n_cols.saturating_sub(1)..n_cols),
            (n_rows.saturating_sub(1)..n_rows, 0..n_cols.min(1)),
            (127.min(n_rows)..129.min(n_rows), 511.min(n_cols)..513.min(n_cols)),
            (16.min(n_rows)..144.min(n_rows), 128.min(n_cols)..640.min(n_cols)),
        ];
        ranges.extend((0..12).map(|_| {
            let mut range = |n: usize| {
                let (a, b) = (random.up_to(n), random.up_to(n));
                a.min(b)..a.max(b)
            };
            (range(n_rows), range(n_cols))
        }));
        for (rows, cols) in ranges {
            let expected: Vec<u8> = (rows.clone())
                .flat_map(|row| &data[2 * (row * n_cols + cols.start)..][..2 * cols.len()])
                .copied()
                .collect();
            let mut part = vec![0xA5; 1000];
            record.read_slice_with(&bytes, isa, rows.clone(), cols.clone(), &mut part).unwrap();
            assert!(part == expected, "{shape:?}: rows {rows:?}, columns {cols:?}");
        }
        for (rows, cols) in [(0..n_rows + 1, 0..0), (0..0, 0..n_cols + 1)] {
            let result = record.read_slice_with(&bytes, isa, rows, cols, &mut Vec::new());
            assert!(matches!(result, Err(DecodeError::Slice { .. })), "{result:?}");
        }
    }
}
