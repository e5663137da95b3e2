//! Products from every layout and instruction set: the same bits as a plain loop.

use std::sync::Arc;

use transom::layout::{Layout, Matrix, WeightType};
use transom::{DecodeError, Dtype, Isa, Record, encode_record};

/// A small generator: xorshift, and from it roughly normal numbers.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn normal(&mut self) -> f32 {
        let sum: f64 = (0..12).map(|_| (self.next() >> 11) as f64 / (1u64 << 53) as f64).sum();
        (sum - 6.0) as f32
    }
}

fn to_bytes(weight: WeightType, values: &[f32]) -> Vec<u8> {
    match weight {
        WeightType::Bf16 => {
            values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect()
        }
        WeightType::F16 => {
            values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect()
        }
        WeightType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        // As if 0.02 were a standard deviation of 20 steps.
        WeightType::I8 => {
            values.iter().map(|v| (v * 1000.0).round().clamp(-128.0, 127.0) as i8 as u8).collect()
        }
    }
}

/// A scale for each row if elements are integers; some make FP16 denormals.
fn scales(weight: WeightType, rows: usize) -> Arc<[f32]> {
    let n = if weight == WeightType::I8 { rows } else { 0 };
    (0..n).map(|row| 1.37e-3 * 0.71f32.powi(row as i32 % 40)).collect()
}

/// The matrix with the scales of its rows, if it has any.
fn scaled(matrix: Matrix) -> Matrix {
    match matrix.weight_type() {
        WeightType::I8 => {
            let scales = scales(WeightType::I8, matrix.rows());
            matrix.with_scales(scales)
        }
        _ => matrix,
    }
}

fn widen(weight: WeightType, bytes: &[u8], cols: usize, index: usize) -> f32 {
    let pair = |i: usize| [bytes[2 * i], bytes[2 * i + 1]];
    match weight {
        WeightType::Bf16 => half::bf16::from_le_bytes(pair(index)).to_f32(),
        WeightType::F16 => half::f16::from_le_bytes(pair(index)).to_f32(),
        WeightType::F32 => f32::from_le_bytes(bytes[4 * index..][..4].try_into().unwrap()),
        WeightType::I8 => {
            let scale = scales(weight, index / cols + 1)[index / cols];
            half::f16::from_f32(f32::from(bytes[index] as i8) * scale).to_f32()
        }
    }
}

/// The definition, written down once more.
fn reference(weight: WeightType, bytes: &[u8], [rows, cols]: [usize; 2], x: &[f32]) -> Vec<f32> {
    let mut y = Vec::new();
    let wide: Vec<f32> = (0..rows * cols).map(|i| widen(weight, bytes, cols, i)).collect();
    for x in x.chunks(cols) {
        for row in 0..rows {
            let mut sums = [0f32; 16];
            for (col, x) in x.iter().enumerate() {
                sums[col % 16] = wide[row * cols + col].mul_add(*x, sums[col % 16]);
            }
            let eight: [f32; 8] = std::array::from_fn(|j| sums[j] + sums[j + 8]);
            let four: [f32; 4] = std::array::from_fn(|j| eight[j] + eight[j + 4]);
            y.push((four[0] + four[2]) + (four[1] + four[3]));
        }
    }
    y
}

const WEIGHTS: [WeightType; 4] =
    [WeightType::Bf16, WeightType::F16, WeightType::F32, WeightType::I8];

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

fn check(weight: WeightType, shape: [usize; 2], bytes: &[u8], n_tokens: usize) {
    let [rows, cols] = shape;
    let mut random = Random(0x9E37_79B9_7F4A_7C15 ^ (rows * 31 + cols) as u64);
    let x: Vec<f32> = (0..n_tokens * cols).map(|_| random.normal()).collect();
    let expected = reference(weight, bytes, shape, &x);
    let dtype = weight.dtype();
    let record_shape = if dtype == Dtype::Opaque { vec![bytes.len()] } else { shape.to_vec() };
    let record_bytes = encode_record(Isa::best(), dtype, &record_shape, bytes).unwrap();
    let record = Record::read(&record_bytes, 0, record_bytes.len() as u64).unwrap();
    for layout in Layout::ALL {
        for isa in isas() {
            let context = format!("{weight:?} {shape:?} {layout:?} {isa:?} {n_tokens} tokens");
            let packed =
                Matrix::from_record(&record, &record_bytes, shape, weight, layout, isa).unwrap();
            let original = Matrix::from_dense(bytes, 0, shape, weight, layout, isa).unwrap();
            for matrix in [packed, original].map(scaled) {
                let mut y = vec![f32::NAN; expected.len()];
                matrix.multiply_with(isa, &x, &mut y).unwrap();
                assert_eq!(bits(&y), bits(&expected), "{context}");
                for row in [0, rows / 2, rows - 1] {
                    let mut out = vec![f32::NAN; cols];
                    matrix.row_with(isa, row, &mut out).unwrap();
                    let expected: Vec<f32> =
                        (0..cols).map(|c| widen(weight, bytes, cols, row * cols + c)).collect();
                    assert_eq!(bits(&out), bits(&expected), "row {row} of {context}");
                }
            }
        }
    }
}

fn gaussian(weight: WeightType, [rows, cols]: [usize; 2]) -> Vec<u8> {
    let mut random = Random(88_172_645_463_325_252);
    let mut values = Vec::new();
    for _ in 0..rows {
        let sigma = 0.02 * (0.25 * random.normal()).exp();
        values.extend((0..cols).map(|_| sigma * random.normal()));
    }
    to_bytes(weight, &values)
}

#[test]
fn every_layout_and_instruction_set_gives_the_bits_of_the_definition() {
    let shapes = [
        [1, 1],
        [1, 15],
        [15, 16],
        [16, 16],
        [16, 17],
        [17, 127],
        [127, 129],
        [172, 64],
        [64, 172],
        [128, 512],
        [144, 528],
        [256, 1040],
        [33, 4097],
        [4097, 33],
        [16, 9008],
        [272, 2064],
    ];
    for shape in shapes {
        for weight in WEIGHTS {
            check(weight, shape, &gaussian(weight, shape), 3);
        }
    }
}

#[test]
fn tokens_do_not_see_each_other() {
    let shape = [144, 528];
    let bytes = gaussian(WeightType::Bf16, shape);
    for n_tokens in [1, 2, 63, 64, 65, 130] {
        check(WeightType::Bf16, shape, &bytes, n_tokens);
    }
}

#[test]
fn unusual_weights_are_multiplied_like_any_others() {
    let shape = [128, 528];
    let mut random = Random(7);
    // Every finite pattern is possible: many escapes, denormals, both zeros.
    let any: Vec<u8> = (0..shape[0] * shape[1])
        .flat_map(|_| {
            let word = random.next() as u16;
            let word = if word >> 7 & 0xFF == 0xFF { word & 0x807F } else { word };
            word.to_le_bytes()
        })
        .collect();
    check(WeightType::Bf16, shape, &any, 2);
    let halves: Vec<u8> = (0..shape[0] * shape[1])
        .flat_map(|_| {
            let word = random.next() as u16;
            let word = if word >> 10 & 31 == 31 { word & 0x83FF } else { word };
            word.to_le_bytes()
        })
        .collect();
    check(WeightType::F16, shape, &halves, 2);
    for value in [0.0, -0.0, 1.0, -3.5e-40] {
        for weight in [WeightType::Bf16, WeightType::F16] {
            check(weight, shape, &to_bytes(weight, &vec![value; shape[0] * shape[1]]), 2);
        }
    }
    // 4 % and 40 % of the weights far away from the others, and all of them.
    for share in [50, 5, 2] {
        let values: Vec<f32> = (0..shape[0] * shape[1])
            .map(|i| random.normal() * if i % share < 2 { 1e-6 } else { 0.02 })
            .collect();
        check(WeightType::Bf16, shape, &to_bytes(WeightType::Bf16, &values), 1);
    }
}

#[test]
fn compressed_layouts_are_smaller() {
    let shape = [1024, 1024];
    let bytes = gaussian(WeightType::Bf16, shape);
    let bits = |layout| {
        Matrix::from_dense(&bytes, 0, shape, WeightType::Bf16, layout, Isa::best())
            .unwrap()
            .bits_per_weight()
    };
    assert_eq!(bits(Layout::Dense), 16.0);
    assert!(bits(Layout::Fixed) < 11.7, "{}", bits(Layout::Fixed));
    assert!(bits(Layout::Rans) < 11.0, "{}", bits(Layout::Rans));
}

#[test]
fn infinite_weights_give_infinite_outputs_of_their_sign() {
    for (weight, infinity) in [(WeightType::Bf16, 0x7F80u16), (WeightType::F16, 0x7C00)] {
        for shape in [[32, 64], [31, 63]] {
            let mut bytes = gaussian(weight, shape);
            let at = (5 * shape[1] + 7) * 2;
            bytes[at..at + 2].copy_from_slice(&(infinity | 0x8000).to_le_bytes());
            let x = vec![1.0; 2 * shape[1]];
            let expected = reference(weight, &bytes, shape, &x);
            assert_eq!(expected[5], f32::NEG_INFINITY);
            for layout in Layout::ALL {
                for isa in isas() {
                    let matrix = Matrix::from_dense(&bytes, 0, shape, weight, layout, isa).unwrap();
                    let mut y = vec![0.0; 2 * shape[0]];
                    matrix.multiply_with(isa, &x, &mut y).unwrap();
                    assert_eq!(bits(&y), bits(&expected), "{weight:?} {layout:?} {isa:?}");
                }
            }
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    for shape in [[1024, 256], [3001, 77]] {
        let bytes = gaussian(WeightType::Bf16, shape);
        let mut random = Random(3);
        let x: Vec<f32> = (0..2 * shape[1]).map(|_| random.normal()).collect();
        let expected = bits(&reference(WeightType::Bf16, &bytes, shape, &x));
        for layout in Layout::ALL {
            let isa = Isa::best();
            let matrix =
                Matrix::from_dense(&bytes, 0, shape, WeightType::Bf16, layout, isa).unwrap();
            for threads in [1, 2, 5] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut y = vec![0.0; 2 * shape[0]];
                pool.install(|| matrix.multiply_with(isa, &x, &mut y)).unwrap();
                assert_eq!(bits(&y), expected, "{shape:?} {layout:?} {threads} threads");
            }
        }
    }
}

#[test]
fn an_empty_matrix_multiplies_to_zeros() {
    for shape in [[0, 16], [16, 0], [0, 0]] {
        for layout in Layout::ALL {
            let isa = Isa::best();
            let matrix =
                Matrix::from_dense(&[][..], 0, shape, WeightType::Bf16, layout, isa).unwrap();
            let mut y = vec![1.0; shape[0]];
            matrix.multiply_with(isa, &vec![1.0; shape[1]], &mut y).unwrap();
            assert_eq!(y, vec![0.0; shape[0]]);
        }
    }
}

#[test]
fn a_matrix_that_no_code_makes_smaller_is_dense() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for weight in [WeightType::Bf16, WeightType::F16] {
        let matrix =
            Matrix::from_dense(&bytes, 0, [256, 256], weight, Layout::Fixed, Isa::best()).unwrap();
        assert_eq!(matrix.layout(), Layout::Dense);
        assert_eq!(matrix.bits_per_weight(), 16.0);
    }
}

#[test]
fn a_record_of_another_type_or_shape_is_an_error() {
    let packed = encode_record(Isa::best(), Dtype::Bf16, &[4, 8], &[0; 64]).unwrap();
    let record = Record::read(&packed, 0, packed.len() as u64).unwrap();
    let wrong = [
        (WeightType::F16, [4, 8]),
        (WeightType::F32, [4, 4]),
        (WeightType::Bf16, [8, 4]),
        (WeightType::Bf16, [usize::MAX, 2]),
    ];
    for (weight, shape) in wrong {
        for layout in Layout::ALL {
            let error = Matrix::from_record(&record, &packed, shape, weight, layout, Isa::best())
                .unwrap_err()
                .to_string();
            assert!(error.contains("BF16 [4, 8]"), "{error}");
        }
    }
}

#[test]
fn a_damaged_tile_is_an_error_in_every_layout() {
    let shape = [256, 64];
    let mut packed =
        encode_record(Isa::best(), Dtype::Bf16, &shape, &gaussian(WeightType::Bf16, shape))
            .unwrap();
    *packed.last_mut().unwrap() ^= 1;
    let record = Record::read(&packed, 0, packed.len() as u64).unwrap();
    for layout in Layout::ALL {
        let weight = WeightType::Bf16;
        let error = Matrix::from_record(&record, &packed, shape, weight, layout, Isa::best())
            .unwrap_err()
            .to_string();
        assert!(error.contains("tile 1") && error.contains("checksum"), "{error}");
    }
}

#[test]
fn a_source_that_ends_early_is_an_error_in_every_layout() {
    let short = vec![0; 2 * 64 * 64 - 1];
    for layout in Layout::ALL {
        for shape in [[64, 64], [67, 63]] {
            let weight = WeightType::Bf16;
            let matrix = Matrix::from_dense(&short, 0, shape, weight, layout, Isa::best());
            assert!(matrix.is_err(), "{layout:?} {shape:?}");
        }
    }
}

#[test]
fn a_poisoned_matrix_gives_no_plausible_number_in_any_layout() {
    for weight in WEIGHTS {
        for shape in [[144, 528], [33, 65]] {
            let bytes = gaussian(weight, shape);
            for layout in Layout::ALL {
                for isa in isas() {
                    let context = format!("{weight:?} {shape:?} {layout:?} {isa:?}");
                    let mut matrix = scaled(
                        Matrix::from_dense(&bytes[..], 0, shape, weight, layout, isa).unwrap(),
                    );
                    matrix.poison();
                    let mut y = vec![0.0; shape[0]];
                    match matrix.multiply_with(isa, &vec![1.0; shape[1]], &mut y) {
                        Ok(()) => assert!(y.iter().all(|y| !y.is_finite()), "{context}"),
                        Err(error) => {
                            assert!(
                                matches!(error, DecodeError::Tile { .. }),
                                "{context}: {error}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn tiles_anywhere_in_a_buffer_make_the_matrix_and_damaged_ones_do_not() {
    for weight in WEIGHTS {
        let shape = [144, 528];
        let bytes = gaussian(weight, shape);
        let dtype = weight.dtype();
        let record_shape = if dtype == Dtype::Opaque { vec![bytes.len()] } else { shape.to_vec() };
        let packed = encode_record(Isa::best(), dtype, &record_shape, &bytes).unwrap();
        let record = Record::read(&packed, 0, packed.len() as u64).unwrap();
        let range = record.place().tiles_range();
        let tiles = &packed[range.start as usize..range.end as usize];
        let buffer = [&[0xA5; 77][..], tiles, &[0xA5; 13]].concat();
        let inside = 77..77 + tiles.len();
        let make = |buffer: &[u8], range| {
            Matrix::from_tiles(record.place().record(), buffer.to_vec(), range, shape, weight)
        };
        let x: Vec<f32> = (0..528).map(|i| (i % 13) as f32 - 6.0).collect();
        let mut y = vec![f32::NAN; shape[0]];
        let matrix = scaled(make(&buffer, inside.clone()).unwrap());
        matrix.multiply_with(Isa::best(), &x, &mut y).unwrap();
        assert_eq!(bits(&y), bits(&reference(weight, &bytes, shape, &x)), "{weight:?}");
        assert_eq!(matrix.into_buffer(), buffer);
        let short = make(&buffer, inside.start..inside.end - 1);
        assert!(matches!(short, Err(DecodeError::RecordTruncated { .. })));
        for at in [inside.start, inside.start + tiles.len() / 2, inside.end - 1] {
            let mut damaged = buffer.clone();
            damaged[at] ^= 4;
            let error = make(&damaged, inside.clone());
            assert!(matches!(error, Err(DecodeError::TileChecksum { .. })), "{weight:?} {at}");
        }
        let other = Matrix::from_tiles(record, buffer, inside, [528, 144], weight);
        assert!(weight == WeightType::F32 || matches!(other, Err(DecodeError::Slice { .. })));
    }
}

#[test]
fn the_expected_size_is_the_size() {
    for weight in WEIGHTS {
        for shape in [[1024, 1024], [33, 4097]] {
            let bytes = gaussian(weight, shape);
            let dtype = weight.dtype();
            let flat = if dtype == Dtype::Opaque { vec![bytes.len()] } else { shape.to_vec() };
            let packed = encode_record(Isa::best(), dtype, &flat, &bytes).unwrap();
            let record = Record::read(&packed, 0, packed.len() as u64).unwrap();
            for layout in Layout::ALL {
                let isa = Isa::best();
                let matrix = Matrix::from_record(&record, &packed, shape, weight, layout, isa);
                let found = matrix.unwrap().resident_bytes() as f64;
                let expected = Matrix::expected_bytes(&record, weight, layout) as f64;
                let exact = layout != Layout::Fixed;
                let ratio = found / expected;
                assert!(
                    // Rare integers have a frequency in the table that is too large.
                    if exact { ratio == 1.0 } else { (0.97..1.03).contains(&ratio) },
                    "{ratio}"
                );
            }
        }
    }
}

#[test]
fn integers_of_every_width_are_multiplied_alike() {
    let mut random = Random(11);
    for deviation in [0.1, 2.0, 4.0, 9.0, 20.0, 50.0, 1000.0] {
        for (shape, n_tokens) in [([144, 528], 1), ([144, 528], 5), ([33, 129], 1), ([48, 16], 2)] {
            let bytes: Vec<u8> = (0..shape[0] * shape[1])
                .map(|_| (deviation * random.normal()).clamp(-128.0, 127.0) as i8 as u8)
                .collect();
            check(WeightType::I8, shape, &bytes, n_tokens);
        }
    }
    for n_tokens in [1, 63, 65] {
        check(WeightType::I8, [80, 528], &gaussian(WeightType::I8, [80, 528]), n_tokens);
    }
}

#[test]
fn narrow_integers_take_few_bits() {
    for (spread, most) in [(2.2, 4.4), (4.5, 5.4), (9.5, 6.4), (20.0, 7.5)] {
        let mut random = Random(12);
        let bytes: Vec<u8> =
            (0..1 << 18).map(|_| (spread * random.normal()).round() as i8 as u8).collect();
        let of = |layout| {
            Matrix::from_dense(&bytes, 0, [512, 512], WeightType::I8, layout, Isa::best()).unwrap()
        };
        let fixed = of(Layout::Fixed);
        assert_eq!(fixed.layout(), Layout::Fixed);
        assert!(fixed.bits_per_weight() < most, "{}", fixed.bits_per_weight());
        // 32 bits a row beside the integers.
        assert_eq!(of(Layout::Dense).bits_per_weight(), 8.0 + 32.0 / 512.0);
    }
}

#[test]
fn a_weight_beyond_half_precision_is_an_error_that_says_where() {
    for shape in [[32, 64], [31, 63]] {
        let mut bytes = vec![1; shape[0] * shape[1]];
        bytes[5 * shape[1] + 7] = 127;
        // 127 * 515.9 is the last product below 65,520.
        for (scale, overflows) in [(515.9, false), (515.91, true)] {
            for layout in Layout::ALL {
                for isa in isas() {
                    for (n_tokens, input) in [(1, 0.0), (3, 1.0)] {
                        let matrix =
                            Matrix::from_dense(&bytes, 0, shape, WeightType::I8, layout, isa)
                                .unwrap()
                                .with_scales(vec![scale; shape[0]].into());
                        let mut y = vec![0.0; n_tokens * shape[0]];
                        let x = vec![input; n_tokens * shape[1]];
                        let result = matrix.multiply_with(isa, &x, &mut y);
                        let row = matrix.row_with(isa, 5, &mut vec![0.0; shape[1]]);
                        for result in [result, row] {
                            let found =
                                matches!(result, Err(DecodeError::Overflow { row: 5, col: 7 }));
                            assert_eq!(found, overflows, "{layout:?} {isa:?} {scale}");
                            assert_eq!(result.is_err(), overflows);
                        }
                    }
                }
            }
        }
    }
}
