//! Properties of any tensor and of any bytes.

use proptest::collection::vec;
use proptest::prelude::*;

use super::naive;
use crate::coder::rans::{DecodeTable, EncodeTable, decode_with, encode_with};
use crate::model::{FreqTable, Histogram, MAX_CODED_ENTROPY, MAX_PROB_BITS, MIN_PROB_BITS};
use crate::{Dtype, Isa, Record, encode_record};

/// Bits an element that a record may take above the order-0 entropy ...
const MAX_LOSS_BITS: f64 = 0.03;
/// ... and bytes besides: the header, ...
const HEADER_BYTES: usize = 64;
/// ... for each plane that may be coded its frequencies, or what coding would
/// save if that is less, ...
const TABLE_BYTES: usize = 400;
/// ... and for each tile its entry in the directory, and states.
const TILE_BYTES: usize = 12 + 80;

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

fn dtypes() -> impl Strategy<Value = Dtype> {
    (0..Dtype::ALL.len()).prop_map(|i| Dtype::ALL[i])
}

fn shapes() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        vec(0..8usize, 0..5),
        vec(0..3000usize, 1),
        vec(0..60usize, 2),
        (1..10usize, 1..36usize).prop_map(|(r, c)| vec![16 * r, 16 * c]),
    ]
}

/// Bytes from an alphabet of 1 to 256, the first ones the likelier the higher
/// `skew` is.
fn symbols(n: usize) -> impl Strategy<Value = Vec<u8>> {
    (vec(any::<u8>(), 1..=256), 0..6u32, any::<u64>()).prop_map(move |(alphabet, skew, seed)| {
        let mut random = super::data::Random::new(seed);
        let mut draw = || {
            let unit = (random.next() >> 11) as f64 / (1u64 << 53) as f64;
            (unit.powi(1 + skew as i32) * alphabet.len() as f64) as usize
        };
        (0..n).map(|_| alphabet[draw()]).collect()
    })
}

fn tensors() -> impl Strategy<Value = (Dtype, Vec<usize>, Vec<u8>)> {
    (dtypes(), shapes()).prop_flat_map(|(dtype, shape)| {
        let n = shape.iter().product::<usize>();
        let data = (symbols(n), symbols(n)).prop_map(move |(a, b)| match dtype.elem_bytes() {
            1 => a,
            _ => super::data::f16(&a, &b),
        });
        (Just(dtype), Just(shape), data)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..Default::default() })]

    #[test]
    fn tensors_round_trip_and_all_instruction_sets_agree((dtype, shape, data) in tensors()) {
        let expected = encode_record(Isa::Scalar, dtype, &shape, &data).unwrap();
        for isa in isas() {
            let bytes = encode_record(isa, dtype, &shape, &data).unwrap();
            prop_assert!(bytes == expected, "{isa:?} encodes differently");
            let record = Record::read(&bytes, 0, bytes.len() as u64).unwrap();
            prop_assert!(record.to_vec(&bytes, isa).unwrap() == data, "{isa:?}");
        }
    }

    #[test]
    fn records_are_hardly_larger_than_the_entropy((dtype, shape, data) in tensors()) {
        let bytes = encode_record(Isa::best(), dtype, &shape, &data).unwrap();
        let record = Record::read(&bytes, 0, bytes.len() as u64).unwrap();
        let n = data.len() / dtype.elem_bytes();
        let elements: Vec<Vec<u8>> = data.chunks(dtype.elem_bytes()).map(<[u8]>::to_vec).collect();
        let bits = |(p, plane): (usize, &Vec<u8>)| match naive::entropy_bits(plane) {
            bits if dtype.is_codable(p) && bits < MAX_CODED_ENTROPY * n as f64 => bits,
            _ => 8.0 * n as f64,
        };
        let floor: f64 = naive::split(dtype, &elements).iter().enumerate().map(bits).sum();
        let n_codable = (0..dtype.elem_bytes()).filter(|&p| dtype.is_codable(p)).count();
        let bound = (floor + MAX_LOSS_BITS * n as f64) / 8.0
            + (HEADER_BYTES
                + 10 * shape.len()
                + TABLE_BYTES * n_codable
                + TILE_BYTES * record.header().tiles().len()) as f64;
        prop_assert!(bytes.len() as f64 <= bound, "{} bytes, at most {bound:.0}", bytes.len());
        let raw = data.len() + HEADER_BYTES + 10 * shape.len() + 12 * record.header().tiles().len();
        let tables = TABLE_BYTES * record.header().n_coded();
        prop_assert!(bytes.len() <= raw + tables, "{} bytes for {raw}", bytes.len());
    }

    /// What decodes is exactly what the encoder writes for those symbols; the
    /// rest is an error, for every instruction set the same bytes.
    #[test]
    fn any_stream_is_an_error_or_the_encoders(
        plane in symbols(300),
        prob_bits in MIN_PROB_BITS..=MAX_PROB_BITS,
        garbage in vec(any::<u8>(), 0..400),
        n_elems in 1..300usize,
        keep in 0..200usize,
    ) {
        let mut histogram = Histogram::default();
        histogram.add(&plane);
        let freqs = FreqTable::quantise(&histogram, prob_bits);
        let (encode, table) = (EncodeTable::new(&freqs), DecodeTable::new(&freqs));
        let mut valid = Vec::new();
        encode_with(Isa::Scalar, &[&plane[..n_elems]], &[&encode], &mut valid).unwrap();
        let spliced: Vec<u8> =
            valid.iter().copied().take(keep).chain(garbage.iter().copied()).collect();
        for stream in [&garbage, &spliced, &valid] {
            for isa in isas() {
                let mut out = vec![0xA5; n_elems];
                if decode_with(isa, stream, &[&table], &mut [&mut out]).is_ok() {
                    let mut again = Vec::new();
                    encode_with(isa, &[&out], &[&encode], &mut again).unwrap();
                    prop_assert_eq!(&again, stream);
                } else {
                    prop_assert!(stream != &valid);
                }
            }
        }
    }

    #[test]
    fn any_bytes_are_an_error_or_a_tensor(bytes in vec(any::<u8>(), 0..600)) {
        let with_magic = [b"TRSM\x01\0".as_slice(), &bytes].concat();
        for bytes in [&bytes, &with_magic] {
            if let Ok(record) = Record::read(bytes, 0, bytes.len() as u64) {
                let _ = record.to_vec(bytes, Isa::best());
            }
        }
    }

    #[test]
    fn any_bytes_are_an_error_or_a_table(bytes in vec(any::<u8>(), 0..400), bits in 1..=15u8) {
        let mut bytes = bytes;
        if let Some(first) = bytes.first_mut() {
            *first = *first & 0xF0 | bits;
        }
        if let Ok((table, n_bytes)) = FreqTable::read(&bytes) {
            prop_assert!(n_bytes <= bytes.len());
            let sum: u32 = table.freqs().iter().map(|&f| u32::from(f)).sum();
            prop_assert_eq!(sum, 1 << table.prob_bits());
            let mut written = Vec::new();
            table.write(&mut written);
            prop_assert_eq!(FreqTable::read(&written).unwrap(), (table, written.len()));
        }
    }

    #[test]
    fn any_histogram_has_frequencies(
        counts in vec(prop_oneof![Just(0u64), 1..20u64, any::<u32>().prop_map(u64::from)], 256),
        table_bits in 8..=MAX_PROB_BITS,
    ) {
        let histogram = Histogram { counts: counts.try_into().unwrap() };
        prop_assume!(histogram.total() > 0);
        let table = FreqTable::quantise(&histogram, table_bits);
        let sum: u32 = table.freqs().iter().map(|&f| u32::from(f)).sum();
        prop_assert_eq!(sum, 1 << table.prob_bits());
        for (&count, &freq) in histogram.counts.iter().zip(table.freqs()) {
            prop_assert_eq!(count > 0, freq > 0);
        }
    }
}
