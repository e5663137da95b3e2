//! Fused products against their dense twins, bit for bit.

use transom_cuda::fixed::{FixedMatrix, WeightFormat};
use transom_cuda::product::Product;
use transom_cuda::{DeviceBuffer, Error};

use crate::{Gpu, Random};

const SHAPES: [(usize, usize); 8] =
    [(16, 128), (1, 1), (15, 17), (17, 129), (129, 127), (127, 4097), (4097, 129), (272, 2000)];

pub(crate) fn elem_bytes(format: WeightFormat) -> usize {
    if matches!(format.twin(), WeightFormat::DenseInt8) { 1 } else { 2 }
}

/// Weights: `spread` of 100 elements have random bits, NaN and infinity among
/// them; the others eight exponents.
pub(crate) fn weights(format: WeightFormat, n: usize, spread: u64, random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(n * elem_bytes(format));
    for _ in 0..n {
        let r = random.bits();
        let x = r as u16;
        let narrow = r >> 32 & 127 >= spread * 128 / 100 || spread == 0;
        match format.twin() {
            WeightFormat::DenseInt8 => {
                bytes.push(if narrow { ((r >> 8) as i8 >> 4) as u8 } else { x as u8 });
            }
            WeightFormat::DenseF16 => {
                let y = if narrow { x & 0x83FF | (6 + (x >> 10 & 7)) << 10 } else { x };
                bytes.extend(y.to_le_bytes());
            }
            _ => {
                let y = if narrow { x & 0x807F | (115 + (x >> 7 & 7)) << 7 } else { x };
                bytes.extend(y.to_le_bytes());
            }
        }
    }
    bytes
}

/// Some scale of INT8 weights, for tests that do not multiply.
pub(crate) fn one_scale(format: WeightFormat) -> &'static [f32] {
    if elem_bytes(format) == 1 { &[0.001] } else { &[] }
}

/// Activations between -2 and 2.
pub(crate) fn activations(format: WeightFormat, n: usize, random: &mut Random) -> Vec<u16> {
    let bf16 = format.twin() == WeightFormat::DenseBf16;
    (0..n)
        .map(|_| {
            let x = random.bits() as u16;
            if bf16 { x & 0x80FF | 0x3F00 } else { x & 0x87FF | 0x3800 }
        })
        .collect()
}

/// A product with the matrix cut into two segments where it can be.
pub(crate) fn product(
    gpu: &Gpu,
    format: WeightFormat,
    (rows, cols): (usize, usize),
    bytes: &[u8],
    scales: &[f32],
    bias: Option<&[u16]>,
) -> Product {
    let cut = rows / 2 / 16 * 16;
    let mut borders = vec![0, cut, rows];
    borders.dedup();
    let row_bytes = cols * elem_bytes(format);
    let mut matrices = Vec::new();
    for pair in borders.windows(2) {
        let bytes = &bytes[pair[0] * row_bytes..pair[1] * row_bytes];
        let scales = if elem_bytes(format) == 1 { &scales[pair[0]..pair[1]] } else { &[] };
        matrices.push(FixedMatrix::encode(format, 32, pair[1] - pair[0], cols, bytes, scales));
    }
    Product::new(&gpu.device, &gpu.stream, &matrices, bias).unwrap()
}

pub(crate) fn run(gpu: &Gpu, product: &Product, x: &[u16]) -> Vec<u16> {
    let n_tokens = x.len() / product.cols();
    let mut scratch = product.scratch(&gpu.device, n_tokens).unwrap();
    let x = gpu.stream.upload(x).unwrap();
    let mut y = DeviceBuffer::filled(&gpu.device, n_tokens * product.rows(), 0xFF).unwrap();
    product.run(&gpu.stream, &x, &mut y, n_tokens, &mut scratch).unwrap();
    gpu.stream.download(&y).unwrap()
}

#[test]
fn fused_products_equal_their_twins() {
    let Some(gpu) = Gpu::open() else { return };
    let mut random = Random::fresh();
    for format in WeightFormat::ALL.into_iter().filter(|format| !format.is_dense()) {
        for shape in SHAPES {
            for spread in [0, 2, 40, 100] {
                let (rows, cols) = shape;
                let bytes = weights(format, rows * cols, spread, &mut random);
                // From those that give denormal weights to those that are nearly too large.
                let scale = |bits: u64| {
                    (1.0 + (bits >> 40) as f32 / 2.0_f32.powi(24))
                        * 2.0_f32.powi((bits % 30) as i32 - 22)
                };
                let scales: Vec<f32> = (0..rows).map(|_| scale(random.bits())).collect();
                let bias = activations(format, rows, &mut random);
                let bias = (spread == 2).then_some(&bias[..]);
                let fused = product(&gpu, format, shape, &bytes, &scales, bias);
                let twin = product(&gpu, format.twin(), shape, &bytes, &scales, bias);
                let x = activations(format, 64 * cols, &mut random);
                let expected = run(&gpu, &twin, &x);
                for n_tokens in [1, 3, 8, 9, 16, 17, 32, 33, 64] {
                    for product in [&fused, &twin] {
                        // The last tokens of the batch, alone or with fewer others.
                        let first = 64 - n_tokens;
                        let found = run(&gpu, product, &x[first * cols..]);
                        assert!(
                            found == expected[first * rows..],
                            "{:?} {rows}x{cols}, {spread} % escapes, {n_tokens} tokens",
                            product.format()
                        );
                    }
                }
            }
        }
    }
}

/// Shapes and numbers of tokens that are multiplied 128 or 256 at a time: fused products give what their twins give, again and
/// again.
fn many_tokens(gpu: &Gpu, cases: &[(usize, usize, &[usize])]) {
    let mut random = Random::fresh();
    for &(rows, cols, batches) in cases {
        for format in WeightFormat::ALL.into_iter().filter(|format| !format.is_dense()) {
            for spread in [0, 2, 40, 100] {
                let bytes = weights(format, rows * cols, spread, &mut random);
                let scale = |row: usize| [0.003, 0.04, 0.5, 0.0007][row % 4];
                let scales: Vec<f32> = (0..rows).map(scale).collect();
                let bias = activations(format, rows, &mut random);
                let bias = (spread == 2).then_some(&bias[..]);
                let new = |format| product(gpu, format, (rows, cols), &bytes, &scales, bias);
                let (fused, twin) = (new(format), new(format.twin()));
                for &n_tokens in batches {
                    let x = activations(format, n_tokens * cols, &mut random);
                    let expected = run(gpu, &twin, &x);
                    for product in [&fused, &twin, &fused] {
                        assert!(
                            run(gpu, product, &x) == expected,
                            "{:?} {rows}x{cols}, {spread} % escapes, {n_tokens} tokens",
                            product.format()
                        );
                    }
                }
            }
        }
    }
}

/// A matrix that repeats itself below repeats its results, whichever blocks share them.
#[test]
fn rows_that_are_equal_have_equal_results_where_no_piece_is_shared() {
    let Some(gpu) = Gpu::open() else { return };
    let mut random = Random::fresh();
    // As many pieces of work as there are pairs of multiprocessors.
    let (rows, cols, times) = (256, 1000, gpu.device.info().n_sms as usize / 2);
    for format in [WeightFormat::Bf16x3, WeightFormat::DenseF16] {
        let bytes = weights(format, rows * cols, 2, &mut random).repeat(times);
        let product = product(&gpu, format, (times * rows, cols), &bytes, &[], None);
        let n_tokens = 256;
        let x = activations(format, n_tokens * cols, &mut random);
        let found = run(&gpu, &product, &x);
        for token in found.chunks(times * rows) {
            let first = &token[..rows];
            assert!(token.chunks(rows).all(|rows| rows == first), "{format:?}");
        }
    }
}

#[test]
fn many_tokens_of_small_products() {
    let Some(gpu) = Gpu::open() else { return };
    many_tokens(&gpu, &[(33, 264, &[600, 300]), (272, 129, &[513])]);
}

#[test]
fn many_tokens_equal_their_twins() {
    let Some(gpu) = Gpu::open() else { return };
    let cases: [(usize, usize, &[usize]); 6] = [
        (1, 1, &[400, 300]),
        (127, 4097, &[1500, 1100]),
        (4097, 129, &[1025, 700, 256]),
        (272, 2000, &[1280, 640]),
        (2100, 520, &[1000, 999]),
        (4096, 1024, &[2048, 512]),
    ];
    many_tokens(&gpu, &cases);
}

/// Fewer than are worth the kernel for many: 64 at a time.
#[test]
fn somewhat_more_than_64_tokens_are_several_products() {
    let Some(gpu) = Gpu::open() else { return };
    let mut random = Random::fresh();
    let (rows, cols) = (272, 2001);
    for format in [WeightFormat::Bf16x3, WeightFormat::Int8x6] {
        let bytes = weights(format, rows * cols, 2, &mut random);
        let product = product(&gpu, format, (rows, cols), &bytes, &vec![0.01; rows], None);
        let x = activations(format, 130 * cols, &mut random);
        let parts = x.chunks(64 * cols).flat_map(|x| run(&gpu, &product, x));
        assert!(run(&gpu, &product, &x) == parts.collect::<Vec<_>>(), "{format:?}");
    }
}

#[test]
fn the_twin_computes_the_product() {
    let Some(gpu) = Gpu::open() else { return };
    let mut random = Random::fresh();
    let (rows, cols) = (272, 2000);
    let format = WeightFormat::DenseBf16;
    let bytes = weights(format, rows * cols, 0, &mut random);
    let x = activations(format, 5 * cols, &mut random);
    let found = run(&gpu, &product(&gpu, format, (rows, cols), &bytes, &[], None), &x);
    let widen = |word: u16| f64::from(f32::from_bits(u32::from(word) << 16));
    let (mut error, mut norm) = (0.0, 0.0);
    for token in 0..5 {
        for row in 0..rows {
            let sum: f64 = (0..cols)
                .map(|col| {
                    let at = 2 * (row * cols + col);
                    let w = u16::from_le_bytes([bytes[at], bytes[at + 1]]);
                    widen(w) * widen(x[token * cols + col])
                })
                .sum();
            error += (widen(found[token * rows + row]) - sum).powi(2);
            norm += sum * sum;
        }
    }
    // Rounding to BF16 alone gives about 0.0017.
    assert!((error / norm).sqrt() < 0.0025, "relative error {}", (error / norm).sqrt());
}

#[test]
fn two_hundred_runs_are_identical() {
    let Some(gpu) = Gpu::open() else { return };
    let mut random = Random::fresh();
    let (rows, cols) = (4096, 4096);
    let bytes = weights(WeightFormat::Bf16x3, rows * cols, 2, &mut random);
    let product = product(&gpu, WeightFormat::Bf16x3, (rows, cols), &bytes, &[], None);
    for n_tokens in [1, 16, 64, 512] {
        let x = activations(WeightFormat::Bf16x3, n_tokens * cols, &mut random);
        let expected = run(&gpu, &product, &x);
        for _ in 0..200 {
            assert!(run(&gpu, &product, &x) == expected);
        }
    }
}

#[test]
fn a_scale_that_overflows_is_refused() {
    let Some(gpu) = Gpu::open() else { return };
    let new = |scale| {
        let bytes = [100; 16 * 128];
        let matrix = FixedMatrix::encode(WeightFormat::Int8x6, 8, 16, 128, &bytes, &[scale]);
        Product::new(&gpu.device, &gpu.stream, &[matrix], None)
    };
    assert!(new(655.0).is_ok());
    let error = new(656.0).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Overflow { value: 100, .. }), "{error}");
}
