//! Every layout, batch and launch gives the same bits.

use std::rc::Rc;

use half::{bf16, f16};
use transom::{Dtype, Isa, Record, encode_record};
use transom_cuda::DeviceBuffer;
use transom_cuda::cublas::{Cublas, Half, Shape};
use transom_cuda::fixed::{FixedMatrix, WeightFormat};
use transom_cuda::product::Product;
use transom_cuda::rans::Rans;

use crate::product::{activations, elem_bytes, product, run, weights};
use crate::{Gpu, Random};

/// Fused products and twins of up to 64 tokens, with any number of them, give
/// what the twin gives for the same tokens in its batch of 64.
fn every_batch(gpu: &Gpu, shapes: &[(usize, usize)], batches: &[usize]) {
    let mut random = Random::fresh();
    for &(rows, cols) in shapes {
        // Of BF16 and of FP16 products.
        let all = [WeightFormat::DenseBf16, WeightFormat::DenseF16]
            .map(|twin| activations(twin, 64 * cols, &mut random));
        let mut cases = Vec::new();
        for format in WeightFormat::ALL.into_iter().filter(|format| !format.is_dense()) {
            let bytes = weights(format, rows * cols, 2, &mut random);
            let kind = usize::from(format.twin() != WeightFormat::DenseBf16);
            for per_row in [false, true] {
                // Scales on both sides of 2^-5, from which the kernels take a factor apart.
                let scale = |i: usize| [0.003, 0.04, 0.5, 0.0007][i % 4];
                let scales: Vec<f32> =
                    (0..rows).map(|row| scale(if per_row { row } else { 1 })).collect();
                let new = |format| product(gpu, format, (rows, cols), &bytes, &scales, None);
                let twin = new(format.twin());
                let expected = Rc::new(run(gpu, &twin, &all[kind]));
                for product in [new(format), twin] {
                    let scratch = product.scratch(&gpu.device, 64).unwrap();
                    cases.push((product, scratch, kind, Rc::clone(&expected)));
                }
                if elem_bytes(format) == 2 {
                    break;
                }
            }
        }
        for &n_tokens in batches {
            let x = all.each_ref().map(|x| gpu.stream.upload(&x[..n_tokens * cols]).unwrap());
            let mut y = DeviceBuffer::new(&gpu.device, n_tokens * rows).unwrap();
            for (product, scratch, kind, expected) in &mut cases {
                gpu.stream.fill(&mut y, 0xFF).unwrap();
                product.run(&gpu.stream, &x[*kind], &mut y, n_tokens, scratch).unwrap();
                let found = gpu.stream.download(&y).unwrap();
                let what = product.format();
                assert!(
                    found == expected[..n_tokens * rows],
                    "{what:?} {rows}x{cols}, {n_tokens} tokens"
                );
            }
        }
    }
}

#[test]
fn every_number_of_tokens_of_small_products() {
    let Some(gpu) = Gpu::open() else { return };
    every_batch(&gpu, &[(17, 129), (33, 600)], &[1, 9, 17, 33, 64]);
}

#[test]
fn every_number_of_tokens_and_odd_sides() {
    let Some(gpu) = Gpu::open() else { return };
    let all: Vec<usize> = (1..=64).collect();
    let sides = [1, 15, 17, 127, 129, 4097];
    let shapes: Vec<(usize, usize)> =
        sides.iter().flat_map(|&rows| sides.map(|cols| (rows, cols))).collect();
    // The last is large enough by itself.
    let (large, others) = shapes.split_last().expect("there are shapes");
    every_batch(&gpu, others, &all);
    every_batch(&gpu, &[*large], &[1, 8, 9, 16, 17, 33, 64]);
}

/// A unit vector gives a column of the weights, exactly.
#[test]
fn a_unit_vector_gives_the_small_weights_themselves() {
    let Some(gpu) = Gpu::open() else { return };
    let mut random = Random::fresh();
    let (rows, cols) = (48, 300);
    for format in WeightFormat::ALL {
        let size = elem_bytes(format);
        let bytes: Vec<u8> = match format.twin() {
            // Finite numbers: infinity times zero is none.
            WeightFormat::DenseInt8 => weights(format, rows * cols, 100, &mut random),
            _ => weights(format, rows * cols, 0, &mut random),
        };
        let scale = |row: usize| [1e-6_f32, 0.003, 1.0 / 32.0, 0.04, 0.5, 3.7, 511.0][row % 7];
        let scales: Vec<f32> = (0..rows).map(scale).collect();
        let product = product(&gpu, format, (rows, cols), &bytes, &scales, None);
        let one = match format.twin() {
            WeightFormat::DenseBf16 => bf16::ONE.to_bits(),
            _ => f16::ONE.to_bits(),
        };
        for n_tokens in [1, 8, 16, 64] {
            let columns: Vec<usize> =
                (0..n_tokens).map(|_| (random.bits() % cols as u64) as usize).collect();
            let mut x = vec![0; n_tokens * cols];
            for (token, &col) in columns.iter().enumerate() {
                x[token * cols + col] = one;
            }
            let found = run(&gpu, &product, &x);
            for (token, &col) in columns.iter().enumerate() {
                for row in 0..rows {
                    let at = (row * cols + col) * size;
                    let expected = match size {
                        1 => f16::from_f32(f32::from(bytes[at] as i8) * scales[row]).to_bits(),
                        _ => u16::from_le_bytes([bytes[at], bytes[at + 1]]),
                    };
                    // A sum with zeros of both signs is +0.
                    let expected = if expected == 0x8000 { 0 } else { expected };
                    let what = format!("{format:?}, {n_tokens} tokens, ({row}, {col})");
                    assert_eq!(found[token * rows + row], expected, "{what}");
                }
            }
        }
    }
}

/// The same matrix in every layout: BF16 and FP16 with all kinds of numbers, INT8
/// with scales for all rows or one each.
fn every_layout(gpu: &Gpu, rows: usize, cols: usize) {
    let mut random = Random::fresh();
    let rans = Rans::new(&gpu.device).unwrap();
    let formats = |dtype| WeightFormat::ALL.into_iter().filter(move |f| f.dtype() == dtype);
    for twin in WeightFormat::ALL.into_iter().filter(|format| format.is_dense()) {
        let dtype = twin.dtype();
        let n = rows * cols;
        let mut cases: Vec<(&str, Vec<u8>)> =
            [0, 2, 40, 100].map(|spread| ("random", weights(twin, n, spread, &mut random))).into();
        // One distinct symbol; all 256 equally often; nothing but special numbers.
        cases.push(("one symbol", vec![0x3F; n * elem_bytes(twin)]));
        if dtype == Dtype::I8 {
            cases.push(("all values", (0..n).map(|i| (i * 77) as u8).collect()));
        } else {
            let all = (0..n).flat_map(|i| ((i * 0x9E37) as u16).to_le_bytes()).collect();
            // NaN, infinities, zeros, denormals.
            let special = match twin {
                WeightFormat::DenseBf16 => [0x7FC0_u16, 0x7F80, 0xFF80, 0x8000, 0, 1, 0x807F],
                _ => [0x7E00, 0x7C00, 0xFC00, 0x8000, 0, 1, 0x83FF],
            };
            let special = (0..n).flat_map(|i| special[i * 5 % 7].to_le_bytes()).collect();
            cases.extend([("all patterns", all), ("special numbers", special)]);
        }
        for (name, bytes) in cases {
            for n_scales in if dtype == Dtype::I8 { vec![1, rows] } else { vec![0] } {
                let scales: Vec<f32> =
                    (0..n_scales).map(|_| 1e-3 + (random.bits() % 9) as f32 * 0.01).collect();
                let per_row = match n_scales {
                    1 => vec![scales[0]; rows],
                    _ => scales.clone(),
                };
                let x = activations(twin, 64 * cols, &mut random);
                let dense = product(gpu, twin, (rows, cols), &bytes, &per_row, None);
                let expected = run(gpu, &dense, &x);
                for format in formats(dtype) {
                    let fixed = product(gpu, format, (rows, cols), &bytes, &per_row, None);
                    assert!(run(gpu, &fixed, &x) == expected, "{name}: {format:?}");
                }
                let packed = encode_record(Isa::best(), dtype, &[rows, cols], &bytes).unwrap();
                let record = Record::read(&packed, 0, packed.len() as u64).unwrap();
                let matrix = match rans.load(&gpu.stream, &record, &packed) {
                    // A plane that is not worth coding has no entropy-coded layout.
                    Err(transom_cuda::rans::RansError::Unsupported(_)) => continue,
                    other => other.unwrap(),
                };
                let scales = (n_scales > 0).then(|| gpu.stream.upload(&scales).unwrap());
                for n_tokens in [1, 8, 9, 33, 64] {
                    let x = gpu.stream.upload(&x[..n_tokens * cols]).unwrap();
                    let n = n_tokens * rows;
                    let mut y = DeviceBuffer::filled(&gpu.device, n, 0xAA).unwrap();
                    let n_words = matrix.fragment_words(n_tokens);
                    let mut scratch = DeviceBuffer::filled(&gpu.device, n_words, 0xFF).unwrap();
                    let scales = scales.as_ref();
                    let stream = &gpu.stream;
                    rans.run(stream, &matrix, &x, n_tokens, scales, None, &mut y, &mut scratch)
                        .unwrap();
                    assert!(
                        gpu.stream.download(&y).unwrap() == expected[..n],
                        "{name}: entropy-coded {dtype:?}, {n_tokens} tokens, {n_scales} scales"
                    );
                }
            }
        }
    }
}

#[test]
fn layouts_of_small_matrices_give_the_same_bits() {
    let Some(gpu) = Gpu::open() else { return };
    every_layout(&gpu, 48, 272);
}

#[test]
fn layouts_give_the_same_bits() {
    let Some(gpu) = Gpu::open() else { return };
    every_layout(&gpu, 1040, 2320);
}

#[test]
fn merged_small_segments_are_separate_products() {
    let Some(gpu) = Gpu::open() else { return };
    let mut random = Random::fresh();
    let (sizes, cols) = ([48, 16, 33], 272);
    for format in WeightFormat::ALL {
        let parts: Vec<Vec<u8>> = [0, 40, 2]
            .into_iter()
            .zip(sizes)
            .map(|(s, n)| weights(format, n * cols, s, &mut random))
            .collect();
        let is_int8 = elem_bytes(format) == 1;
        // One scale, and one a row.
        let scales = [vec![0.01], vec![0.003; 16], (0..33).map(|i| 0.001 * i as f32).collect()];
        let matrices: Vec<FixedMatrix> = parts
            .iter()
            .zip(sizes)
            .zip(&scales)
            .map(|((bytes, rows), scales)| {
                let scales = if is_int8 { &scales[..] } else { &[] };
                FixedMatrix::encode(format, 32, rows, cols, bytes, scales)
            })
            .collect();
        let x = activations(format, 20 * cols, &mut random);
        let new = |range: std::ops::Range<usize>| {
            Product::new(&gpu.device, &gpu.stream, &matrices[range], None).unwrap()
        };
        for n_tokens in [1, 9, 20] {
            let x = &x[..n_tokens * cols];
            let merged = run(&gpu, &new(0..3), x);
            let rows = merged.len() / n_tokens;
            let mut first = 0;
            for (i, size) in sizes.into_iter().enumerate() {
                let alone = run(&gpu, &new(i..i + 1), x);
                for token in 0..n_tokens {
                    let found = &merged[token * rows + first..][..size];
                    let expected = &alone[token * size..][..size];
                    assert!(found == expected, "{format:?}, segment {i}, {n_tokens} tokens");
                }
                first += size;
            }
        }
    }
}

#[test]
fn graphs_and_streams_give_the_same_bits() {
    let Some(gpu) = Gpu::open() else { return };
    let mut random = Random::fresh();
    let (rows, cols) = (1040, 2320);
    for format in [WeightFormat::Bf16x3, WeightFormat::F16x3, WeightFormat::Int8x6] {
        let bytes = weights(format, rows * cols, 2, &mut random);
        let product = product(&gpu, format, (rows, cols), &bytes, &vec![0.01; rows], None);
        for n_tokens in [1, 16, 33, 64] {
            let x = activations(format, n_tokens * cols, &mut random);
            let expected = run(&gpu, &product, &x);
            let x = gpu.stream.upload(&x).unwrap();
            let place = || {
                let y = DeviceBuffer::<u16>::filled(&gpu.device, expected.len(), 0xFF).unwrap();
                (y, product.scratch(&gpu.device, n_tokens).unwrap())
            };
            // Replays, among products of other results that may overlap.
            let (mut y, mut scratch) = place();
            // SAFETY: everything lives until the graph is dropped.
            let graph = unsafe {
                gpu.stream.capture(|stream| {
                    (0..5).try_for_each(|_| product.run(stream, &x, &mut y, n_tokens, &mut scratch))
                })
            }
            .unwrap();
            for _ in 0..5 {
                gpu.stream.fill(&mut y, 0xFF).unwrap();
                graph.launch(&gpu.stream).unwrap();
                assert!(gpu.stream.download(&y).unwrap() == expected, "{format:?}, replayed");
            }
            // Two streams at once.
            let streams = [gpu.device.stream().unwrap(), gpu.device.stream().unwrap()];
            let mut places = [place(), place()];
            for _ in 0..20 {
                for (stream, (y, scratch)) in streams.iter().zip(&mut places) {
                    stream.fill(y, 0xFF).unwrap();
                    product.run(stream, &x, y, n_tokens, scratch).unwrap();
                }
            }
            for (stream, (y, _)) in streams.iter().zip(&places) {
                assert!(stream.download(y).unwrap() == expected, "{format:?}, two streams");
            }
        }
    }
}

type Widen = fn(u16) -> f64;

/// Root of the mean squared error against FP64.
fn rms(found: &[u16], expected: &[f64], value: Widen) -> f64 {
    let square = |(&y, e): (&u16, &f64)| (value(y) - e).powi(2);
    (found.iter().zip(expected).map(square).sum::<f64>() / found.len() as f64).sqrt()
}

#[test]
fn errors_are_no_larger_than_those_of_cublas() {
    let Some(gpu) = Gpu::open() else { return };
    let mut random = Random::fresh();
    let (rows, cols) = (512, 4096);
    let cublas = Cublas::new(&gpu.stream).unwrap();
    let cases: [(WeightFormat, Half, Widen); 2] = [
        (WeightFormat::Bf16x3, Half::Bf16, |bits| bf16::from_bits(bits).to_f64()),
        (WeightFormat::F16x3, Half::F16, |bits| f16::from_bits(bits).to_f64()),
    ];
    for (format, half, value) in cases {
        let bytes = weights(format, rows * cols, 0, &mut random);
        let words: Vec<u16> =
            bytes.as_chunks::<2>().0.iter().map(|&pair| u16::from_le_bytes(pair)).collect();
        let dense = gpu.stream.upload(&words).unwrap();
        let ours = product(&gpu, format, (rows, cols), &bytes, &[], None);
        for m in [1, 16, 64, 640] {
            let x = activations(format, m * cols, &mut random);
            let dot = |(token, row): (usize, usize)| -> f64 {
                let pairs = words[row * cols..].iter().zip(&x[token * cols..][..cols]);
                pairs.map(|(&w, &x)| value(w) * value(x)).sum()
            };
            let places = (0..m).flat_map(|token| (0..rows).map(move |row| (token, row)));
            let expected: Vec<f64> = places.map(dot).collect();
            let found = rms(&run(&gpu, &ours, &x), &expected, value);
            let library = cublas.product(Shape { m, n: rows, k: cols }, half).unwrap();
            let mut y = DeviceBuffer::filled(&gpu.device, m * rows, 0xFF).unwrap();
            let x = gpu.stream.upload(&x).unwrap();
            library.multiply(&library.algorithms()[0], &dense, &x, &mut y).unwrap();
            let theirs = rms(&gpu.stream.download(&y).unwrap(), &expected, value);
            assert!(found <= 1.05 * theirs, "{format:?}, {m} tokens: {found}, cuBLAS {theirs}");
        }
    }
}
