//! Fixed-rate weights decoded to dense ones are the original elements.

use half::f16;
use transom::Dtype;
use transom_cuda::fixed::{Decoder, DeviceMatrix, FixedMatrix, Part, WeightFormat};
use transom_cuda::{DeviceBuffer, Error};

use crate::product::{elem_bytes, one_scale, weights};
use crate::{Gpu, Random};

/// Elements of a part, in the bytes of the original.
fn expected(bytes: &[u8], size: usize, cols: usize, part: &Part<'_>, ids: &[u32]) -> Vec<u8> {
    let rows = bytes.len() / size / cols;
    let row = |row: usize, from: usize, to: usize| {
        bytes[(row * cols + from) * size..(row * cols + to) * size].to_vec()
    };
    match part {
        Part::All => bytes.to_vec(),
        Part::Range(rows, cols) => {
            rows.clone().flat_map(|r| row(r, cols.start, cols.end)).collect()
        }
        // What is not there keeps the poison.
        Part::Rows(_) => ids
            .iter()
            .flat_map(|&id| match id as usize {
                id if id < rows => row(id, 0, cols),
                _ => vec![0xA5; cols * size],
            })
            .collect(),
    }
}

fn check(gpu: &Gpu, shapes: &[(usize, usize)]) {
    let mut random = Random::fresh();
    let decoder = Decoder::new(&gpu.device).unwrap();
    for format in WeightFormat::ALL {
        for (&(rows, cols), spread) in shapes.iter().zip([2, 0, 40, 100].into_iter().cycle()) {
            let size = elem_bytes(format);
            let bytes = weights(format, rows * cols, spread, &mut random);
            let encoded = FixedMatrix::encode(format, 32, rows, cols, &bytes, one_scale(format));
            let matrix = DeviceMatrix::new(&gpu.stream, &encoded).unwrap();
            let mut ids: Vec<u32> = (0..9).map(|_| (random.bits() % rows as u64) as u32).collect();
            ids.extend([rows as u32, u32::MAX, 0]);
            let ids_buffer = gpu.stream.upload(&ids).unwrap();
            let parts = [
                Part::All,
                Part::Range(rows / 3..rows - rows / 4, cols / 5..cols - cols / 7),
                Part::Range(rows.min(16)..rows, cols.min(128)..cols),
                Part::Rows(&ids_buffer),
            ];
            for part in &parts {
                let expected = expected(&bytes, size, cols, part, &ids);
                let n = expected.len() / size;
                let what = format!("{format:?} {rows}x{cols}, {spread} % escapes, {part:?}");
                if size == 2 {
                    let mut out = DeviceBuffer::<u16>::filled(&gpu.device, n, 0xA5).unwrap();
                    decoder.decode(&gpu.stream, &matrix, part, &mut out).unwrap();
                    let found = gpu.stream.download(&out).unwrap();
                    let found: Vec<u8> = found.into_iter().flat_map(u16::to_le_bytes).collect();
                    assert!(found == expected, "{what}");
                    continue;
                }
                let mut out = DeviceBuffer::<u8>::filled(&gpu.device, n, 0xA5).unwrap();
                decoder.decode_int8(&gpu.stream, &matrix, part, &mut out).unwrap();
                assert!(gpu.stream.download(&out).unwrap() == expected, "{what}");
                if !matches!(part, Part::All) {
                    continue;
                }
                for n_scales in [1, rows] {
                    let scales: Vec<f32> =
                        (0..n_scales).map(|_| 1e-4 + (random.bits() % 999) as f32 * 1e-4).collect();
                    let buffer = gpu.stream.upload(&scales).unwrap();
                    let mut out = DeviceBuffer::<u16>::filled(&gpu.device, n, 0xA5).unwrap();
                    decoder.dequantise(&gpu.stream, &matrix, &buffer, part, &mut out).unwrap();
                    let scale = |i: usize| scales[if n_scales == 1 { 0 } else { i / cols }];
                    let value = |(i, &q): (usize, &u8)| f32::from(q as i8) * scale(i);
                    let expected: Vec<u16> = bytes
                        .iter()
                        .enumerate()
                        .map(value)
                        .map(|w| f16::from_f32(w).to_bits())
                        .collect();
                    assert!(gpu.stream.download(&out).unwrap() == expected, "{what}, dequantised");
                }
            }
        }
    }
}

#[test]
fn decoding_of_small_matrices() {
    let Some(gpu) = Gpu::open() else { return };
    check(&gpu, &[(17, 129), (1, 1), (33, 256)]);
}

#[test]
fn decoding_gives_every_element_back() {
    let Some(gpu) = Gpu::open() else { return };
    check(&gpu, &[(1000, 4104), (15, 4097), (4097, 15), (127, 127), (512, 1024), (4097, 1032)]);
}

#[test]
fn all_bit_patterns_come_back() {
    let Some(gpu) = Gpu::open() else { return };
    let decoder = Decoder::new(&gpu.device).unwrap();
    let words: Vec<u16> = (0..=u16::MAX).collect();
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    for format in WeightFormat::ALL.into_iter().filter(|format| format.dtype() != Dtype::I8) {
        for places in [0, 16, 1000] {
            let encoded = FixedMatrix::encode(format, places, 256, 256, &bytes, one_scale(format));
            let matrix = DeviceMatrix::new(&gpu.stream, &encoded).unwrap();
            let mut out = DeviceBuffer::filled(&gpu.device, words.len(), 0xA5).unwrap();
            decoder.decode(&gpu.stream, &matrix, &Part::All, &mut out).unwrap();
            assert!(gpu.stream.download(&out).unwrap() == words, "{format:?}, {places} places");
        }
    }
}

#[test]
fn parts_outside_of_a_small_matrix_are_errors() {
    let Some(gpu) = Gpu::open() else { return };
    let decoder = Decoder::new(&gpu.device).unwrap();
    let encoded = FixedMatrix::encode(WeightFormat::Bf16x3, 8, 16, 128, &[0; 4096], &[]);
    let matrix = DeviceMatrix::new(&gpu.stream, &encoded).unwrap();
    let mut out = DeviceBuffer::new(&gpu.device, 2048).unwrap();
    let mut decode = |part: &Part<'_>| decoder.decode(&gpu.stream, &matrix, part, &mut out);
    assert!(decode(&Part::All).is_ok());
    #[allow(clippy::reversed_empty_ranges)]
    let bad = [
        Part::Range(0..17, 0..128),
        Part::Range(0..16, 0..129),
        Part::Range(9..8, 0..128),
        Part::Range(0..15, 0..128),
    ];
    for part in &bad {
        assert!(matches!(decode(part), Err(Error::Length { .. })), "{part:?}");
    }
    let mut bytes = DeviceBuffer::new(&gpu.device, 2048).unwrap();
    assert!(decoder.decode_int8(&gpu.stream, &matrix, &Part::All, &mut bytes).is_err());
}

#[test]
fn damaged_chunks_are_named() {
    let Some(gpu) = Gpu::open() else { return };
    let mut matrix = FixedMatrix::encode(WeightFormat::Bf16x3, 8, 32, 256, &[0; 2 * 32 * 256], &[]);
    // The number of escapes of chunk 2.
    let at = 2 * matrix.chunk_bytes + 2048 + 768 + 17;
    matrix.chunks[at] = 0xFF;
    let is_named = |error| matches!(error, Error::BadChunk { chunk: 2, .. });
    assert!(is_named(DeviceMatrix::new(&gpu.stream, &matrix).unwrap_err()));
    let product = transom_cuda::product::Product::new(&gpu.device, &gpu.stream, &[matrix], None);
    assert!(is_named(product.unwrap_err()));
}
