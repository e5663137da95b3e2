//! Entropy-coded weights: loaded, decoded, gathered, multiplied.

use std::ops::Range;

use transom::{Dtype, Isa, Record, RecordWriter, TensorStatistics, encode_record};
use transom_cuda::DeviceBuffer;
use transom_cuda::fixed::{FixedMatrix, WeightFormat};
use transom_cuda::product::Product;
use transom_cuda::rans::{Rans, RansError, RansMatrix};

use crate::{Gpu, Random};

/// A value of about a normal distribution.
fn normal(random: &mut Random) -> f32 {
    let sum: f32 = (0..12).map(|_| (random.bits() >> 40) as f32 / (1 << 24) as f32).sum();
    sum - 6.0
}

fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) as u16
}

fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

fn bytes(words: &[u16]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn load(gpu: &Gpu, rans: &Rans, dtype: Dtype, sides: [usize; 2], data: &[u8]) -> RansMatrix {
    let packed = encode_record(Isa::best(), dtype, &sides, data).unwrap();
    let record = Record::read(&packed, 0, packed.len() as u64).unwrap();
    rans.load(&gpu.stream, &record, &packed).unwrap()
}

/// B fragments as `ProductParams.x` in params.h describes them.
fn fragments(x: &[u16], tokens: usize, cols: usize) -> Vec<u32> {
    let pairs = cols.div_ceil(128) * 4;
    let at = |token: usize, col: usize| {
        if token < tokens && col < cols { u32::from(x[token * cols + col]) } else { 0 }
    };
    let mut out = Vec::new();
    for group in 0..tokens.div_ceil(8) {
        for pair in 0..pairs {
            for lane in 0..32 {
                for part in 0..4 {
                    let (token, col) = (group * 8 + lane / 4, pair * 32 + part * 8 + lane % 4 * 2);
                    out.push(at(token, col) | at(token, col + 1) << 16);
                }
            }
        }
    }
    out
}

/// BF16 of every kind of matrix: usual weights, one exponent, every bit pattern,
/// both in places (so that some tiles are raw and some units have many words).
fn matrices(random: &mut Random) -> Vec<(&'static str, [usize; 2], Vec<u16>)> {
    let mut usual =
        |n: usize| -> Vec<u16> { (0..n).map(|_| bf16(0.02 * normal(random))).collect() };
    let mut all = vec![
        ("usual", [16, 16], usual(256)),
        ("usual", [1040, 1168], usual(1040 * 1168)),
        ("usual", [128, 4096], usual(128 * 4096)),
    ];
    let mixed_usual = usual(384 * 1168);
    let one = usual(256 * 528).iter().map(|w| w & 0x807F | 0x3F80).collect();
    let any: Vec<u16> = (0..256 * 528).map(|_| random.bits() as u16).collect();
    let mut mixed = mixed_usual;
    for row in 128..300 {
        for col in 512..1024 {
            mixed[row * 1168 + col] = random.bits() as u16;
        }
    }
    all.push(("one exponent", [256, 528], one));
    all.push(("random in places", [384, 1168], mixed));
    // Exponents of 7 bits of entropy: more words than a warp's buffer takes.
    let wide = any.iter().map(|w| w & 0x807F | (64 + (w >> 7 & 127)) << 7).collect();
    all.push(("wide exponents", [256, 528], wide));
    all
}

#[test]
fn decoding_gives_the_original_back() {
    let Some(gpu) = Gpu::open() else { return };
    let rans = Rans::new(&gpu.device).unwrap();
    for (name, sides, weights) in matrices(&mut Random::fresh()) {
        let matrix = load(&gpu, &rans, Dtype::Bf16, sides, &bytes(&weights));
        let mut out = DeviceBuffer::filled(&gpu.device, weights.len(), 0xFF).unwrap();
        for _ in 0..3 {
            gpu.stream.fill(&mut out, 0xFF).unwrap();
            rans.decode(&gpu.stream, &matrix, &mut out).unwrap();
            assert!(gpu.stream.download(&out).unwrap() == weights, "{name} {sides:?}");
        }
    }
}

#[test]
fn elements_of_one_byte_come_back() {
    let Some(gpu) = Gpu::open() else { return };
    let rans = Rans::new(&gpu.device).unwrap();
    let mut random = Random::fresh();
    for (dtype, sigma) in
        [(Dtype::I8, 13.0), (Dtype::I8, 3.0), (Dtype::U8, 20.0), (Dtype::F8E4M3, 9.0)]
    {
        let data: Vec<u8> =
            (0..400 * 1168).map(|_| (sigma * normal(&mut random)).round() as i32 as u8).collect();
        let matrix = load(&gpu, &rans, dtype, [400, 1168], &data);
        let mut out = DeviceBuffer::filled(&gpu.device, data.len(), 0xFF).unwrap();
        rans.decode_bytes(&gpu.stream, &matrix, &mut out).unwrap();
        assert!(gpu.stream.download(&out).unwrap() == data, "{dtype:?} {sigma}");
    }
}

#[test]
fn gather_gives_the_rows_asked_for() {
    let Some(gpu) = Gpu::open() else { return };
    let rans = Rans::new(&gpu.device).unwrap();
    let mut random = Random::fresh();
    for (name, [rows, cols], weights) in matrices(&mut random) {
        let matrix = load(&gpu, &rans, Dtype::Bf16, [rows, cols], &bytes(&weights));
        let mut ids: Vec<u32> = (0..67).map(|_| (random.bits() % rows as u64) as u32).collect();
        ids[3] = rows as u32;
        ids[5] = u32::MAX;
        let buffer = gpu.stream.upload(&ids).unwrap();
        let mut out = DeviceBuffer::filled(&gpu.device, ids.len() * cols, 0xFF).unwrap();
        rans.gather(&gpu.stream, &matrix, &buffer, &mut out).unwrap();
        let found = gpu.stream.download(&out).unwrap();
        for (row, &id) in found.chunks(cols).zip(&ids) {
            let id = id as usize;
            let untouched = vec![0xFFFF; cols];
            let expected = if id < rows { &weights[id * cols..][..cols] } else { &untouched };
            assert!(row == expected, "{name}, row {id}");
        }
    }
}

#[test]
fn rows_of_one_byte_come_back() {
    let Some(gpu) = Gpu::open() else { return };
    let rans = Rans::new(&gpu.device).unwrap();
    let mut random = Random::fresh();
    let [rows, cols] = [400, 1168];
    for (dtype, sigma) in
        [(Dtype::I8, 13.0), (Dtype::I8, 3.0), (Dtype::U8, 20.0), (Dtype::F8E4M3, 9.0)]
    {
        let data: Vec<u8> =
            (0..rows * cols).map(|_| (sigma * normal(&mut random)).round() as i32 as u8).collect();
        let matrix = load(&gpu, &rans, dtype, [rows, cols], &data);
        let mut ids: Vec<u32> = (0..67).map(|_| (random.bits() % rows as u64) as u32).collect();
        ids[2] = rows as u32;
        let buffer = gpu.stream.upload(&ids).unwrap();
        let mut out = DeviceBuffer::filled(&gpu.device, ids.len() * cols, 0xC3).unwrap();
        rans.gather_bytes(&gpu.stream, &matrix, &buffer, &mut out).unwrap();
        let found = gpu.stream.download(&out).unwrap();
        for (row, &id) in found.chunks(cols).zip(&ids) {
            let id = id as usize;
            let untouched = vec![0xC3; cols];
            let expected = if id < rows { &data[id * cols..][..cols] } else { &untouched };
            assert!(row == expected, "{dtype:?} {sigma}, row {id}");
        }
    }
}

/// Elements of some rows and columns of a matrix with `cols` columns.
fn cut<T: Copy>(all: &[T], cols: usize, rows: &Range<usize>, part: &Range<usize>) -> Vec<T> {
    rows.clone().flat_map(|row| all[row * cols..][part.clone()].iter().copied()).collect()
}

#[test]
fn parts_of_a_matrix_come_back() {
    let Some(gpu) = Gpu::open() else { return };
    let rans = Rans::new(&gpu.device).unwrap();
    let mut random = Random::fresh();
    let [n_rows, n_cols] = [304, 1168];
    let weights: Vec<u16> =
        (0..n_rows * n_cols).map(|_| bf16(0.02 * normal(&mut random))).collect();
    let matrix = load(&gpu, &rans, Dtype::Bf16, [n_rows, n_cols], &bytes(&weights));
    let data: Vec<u8> =
        (0..n_rows * n_cols).map(|_| (13.0 * normal(&mut random)).round() as i8 as u8).collect();
    let int8 = load(&gpu, &rans, Dtype::I8, [n_rows, n_cols], &data);
    let parts = [
        (0..16, 0..16),
        (112..144, 256..1168),
        (288..304, 1024..1168),
        (0..304, 512..528),
        (16..128, 0..1024),
    ];
    for (rows, cols) in parts {
        let n = rows.len() * cols.len();
        let mut out = DeviceBuffer::filled(&gpu.device, n, 0xFF).unwrap();
        rans.decode_part(&gpu.stream, &matrix, rows.clone(), cols.clone(), &mut out).unwrap();
        let expected = cut(&weights, n_cols, &rows, &cols);
        assert!(gpu.stream.download(&out).unwrap() == expected, "{rows:?} {cols:?}");
        let mut out = DeviceBuffer::filled(&gpu.device, n, 0xFF).unwrap();
        rans.decode_bytes_part(&gpu.stream, &int8, rows.clone(), cols.clone(), &mut out).unwrap();
        let expected = cut(&data, n_cols, &rows, &cols);
        assert!(gpu.stream.download(&out).unwrap() == expected, "{rows:?} {cols:?}");
    }
    let mut out = DeviceBuffer::filled(&gpu.device, 256, 0xFF).unwrap();
    for (rows, cols) in [(8..24, 0..16), (0..16, 128..144), (304..320, 0..16), (16..16, 0..16)] {
        let result = rans.decode_part(&gpu.stream, &matrix, rows, cols, &mut out);
        assert!(matches!(result, Err(RansError::Unsupported(_))));
    }
}

#[test]
fn fp16_is_decoded_gathered_and_multiplied() {
    let Some(gpu) = Gpu::open() else { return };
    let rans = Rans::new(&gpu.device).unwrap();
    let mut random = Random::fresh();
    // Of elements without their lowest bits both planes are coded.
    for ([rows, cols], kept) in
        [([16, 272], 0xFFFF), ([144, 1168], 0xFFFF), ([304, 4352], 0xFFFF), ([144, 1168], 0xFFE0)]
    {
        let half = |value: f32| half::f16::from_f32(value).to_bits();
        let weights: Vec<u16> =
            (0..rows * cols).map(|_| half(0.02 * normal(&mut random)) & kept).collect();
        let data = bytes(&weights);
        let matrix = load(&gpu, &rans, Dtype::F16, [rows, cols], &data);
        let mut out = DeviceBuffer::filled(&gpu.device, weights.len(), 0xFF).unwrap();
        rans.decode(&gpu.stream, &matrix, &mut out).unwrap();
        assert!(gpu.stream.download(&out).unwrap() == weights, "{rows} x {cols}");

        let ids = [rows as u32 - 1, 3, 11];
        let buffer = gpu.stream.upload(&ids).unwrap();
        let mut out = DeviceBuffer::filled(&gpu.device, ids.len() * cols, 0xFF).unwrap();
        rans.gather(&gpu.stream, &matrix, &buffer, &mut out).unwrap();
        let found = gpu.stream.download(&out).unwrap();
        for (row, id) in found.chunks(cols).zip(ids) {
            assert!(row == &weights[id as usize * cols..][..cols], "{rows} x {cols}, row {id}");
        }

        let dense = FixedMatrix::encode(WeightFormat::DenseF16, 0, rows, cols, &data, &[]);
        let twin = Product::new(&gpu.device, &gpu.stream, &[dense], None).unwrap();
        let x: Vec<u16> = (0..64 * cols).map(|_| half(normal(&mut random))).collect();
        for tokens in [1, 2, 8, 9, 32, 33, 64] {
            let mut scratch = twin.scratch(&gpu.device, tokens).unwrap();
            let plain = gpu.stream.upload(&x[..tokens * cols]).unwrap();
            let mut expected = DeviceBuffer::filled(&gpu.device, tokens * rows, 0xFF).unwrap();
            twin.run(&gpu.stream, &plain, &mut expected, tokens, &mut scratch).unwrap();
            let words = matrix.fragment_words(tokens);
            let mut scratch = DeviceBuffer::filled(&gpu.device, words + 5, 0xFF).unwrap();
            let mut found = DeviceBuffer::filled(&gpu.device, tokens * rows, 0xAA).unwrap();
            rans.run(&gpu.stream, &matrix, &plain, tokens, None, None, &mut found, &mut scratch)
                .unwrap();
            let (expected, found) =
                (gpu.stream.download(&expected).unwrap(), gpu.stream.download(&found).unwrap());
            assert!(found == expected, "{rows} x {cols}, {tokens} tokens");
        }
    }
}

#[test]
fn product_of_bf16() {
    let Some(gpu) = Gpu::open() else { return };
    let rans = Rans::new(&gpu.device).unwrap();
    let mut random = Random::fresh();
    for [rows, cols] in [[16, 16], [144, 1168], [1040, 4096], [256, 8720]] {
        let weights: Vec<u16> =
            (0..rows * cols).map(|_| bf16(0.02 * normal(&mut random))).collect();
        let x: Vec<u16> = (0..64 * cols).map(|_| bf16(normal(&mut random))).collect();
        let bias: Vec<u16> = (0..rows).map(|_| bf16(normal(&mut random))).collect();
        let matrix = load(&gpu, &rans, Dtype::Bf16, [rows, cols], &bytes(&weights));
        let bias_buffer = gpu.stream.upload(&bias).unwrap();
        let run = |tokens: usize| {
            let fragments = gpu.stream.upload(&fragments(&x, tokens, cols)).unwrap();
            let mut y = DeviceBuffer::filled(&gpu.device, tokens * rows, 0xFF).unwrap();
            rans.product(
                &gpu.stream,
                &matrix,
                &fragments,
                tokens,
                None,
                Some(&bias_buffer),
                &mut y,
            )
            .unwrap();
            gpu.stream.download(&y).unwrap()
        };
        let all = run(64);
        // Row m of a batch is the same row alone, whichever kernel computes it.
        for tokens in [1, 2, 7, 8, 9, 31, 33, 63] {
            assert!(run(tokens) == all[..tokens * rows], "{rows} x {cols}, {tokens} tokens");
        }
        let (mut error, mut norm) = (0.0, 0.0);
        for token in [0, 13, 63] {
            for row in 0..rows {
                let products = (0..cols).map(|col| {
                    f64::from(from_bf16(weights[row * cols + col]))
                        * f64::from(from_bf16(x[token * cols + col]))
                });
                let expected: f64 = products.sum::<f64>() + f64::from(from_bf16(bias[row]));
                let found = f64::from(from_bf16(all[token * rows + row]));
                error += (found - expected).powi(2);
                norm += expected.powi(2);
            }
        }
        let relative = (error / norm).sqrt();
        assert!(relative < 3e-3, "{rows} x {cols}: {relative}");
    }
}

#[test]
fn product_of_int8_with_scales() {
    let Some(gpu) = Gpu::open() else { return };
    let rans = Rans::new(&gpu.device).unwrap();
    let mut random = Random::fresh();
    let (rows, cols, tokens) = (208, 2064, 5);
    for per_row in [false, true] {
        let weights: Vec<i8> =
            (0..rows * cols).map(|_| (13.0 * normal(&mut random)).round() as i8).collect();
        let scales: Vec<f32> = (0..if per_row { rows } else { 1 })
            .map(|_| 0.003 * (0.3 * normal(&mut random)).exp())
            .collect();
        // Small whole numbers are the same in FP16 and make the sums exact in f64.
        let x: Vec<i32> = (0..tokens * cols).map(|_| (random.bits() % 5) as i32 - 2).collect();
        let half = |v: i32| -> u16 { [0xC000_u16, 0xBC00, 0, 0x3C00, 0x4000][(v + 2) as usize] };
        let x16: Vec<u16> = x.iter().map(|&v| half(v)).collect();
        let data: Vec<u8> = weights.iter().map(|&w| w as u8).collect();
        let matrix = load(&gpu, &rans, Dtype::I8, [rows, cols], &data);
        let fragments = gpu.stream.upload(&fragments(&x16, tokens, cols)).unwrap();
        let scales_buffer = gpu.stream.upload(&scales).unwrap();
        let mut y = DeviceBuffer::filled(&gpu.device, tokens * rows, 0xFF).unwrap();
        rans.product(&gpu.stream, &matrix, &fragments, tokens, Some(&scales_buffer), None, &mut y)
            .unwrap();
        let found = gpu.stream.download(&y).unwrap();
        for token in 0..tokens {
            for row in 0..rows {
                let scale = scales[if per_row { row } else { 0 }];
                let expected: f64 = (0..cols)
                    .map(|col| {
                        let w = half::f16::from_f32(f32::from(weights[row * cols + col]) * scale);
                        w.to_f64() * f64::from(x[token * cols + col])
                    })
                    .sum();
                let value = half::f16::from_bits(found[token * rows + row]).to_f64();
                assert!(
                    (value - expected).abs() <= 2e-3 * expected.abs().max(0.1),
                    "row {row}, token {token}: {value}, expected {expected}"
                );
            }
        }
    }
}

#[test]
fn damaged_streams_name_their_tile() {
    let Some(gpu) = Gpu::open() else { return };
    let rans = Rans::new(&gpu.device).unwrap();
    let mut random = Random::fresh();
    let (sides, n) = ([256, 1024], 256 * 1024);
    let narrow: Vec<u16> = (0..n).map(|_| bf16(0.02 * normal(&mut random))).collect();
    let wide: Vec<u16> = narrow.iter().map(|w| w & 0x807F | (100 + (w & 31)) << 7).collect();
    let encode = |weights: &[u16]| {
        let data = bytes(weights);
        let mut statistics = TensorStatistics::new(Dtype::Bf16);
        statistics.add(&data);
        let writer = RecordWriter::new(&sides, &statistics, [0; 32]).unwrap();
        let tiles: Vec<_> = (0..4)
            .map(|index| {
                let tile = writer.tiling().tile(index);
                let first = 2 * (tile.row_start * sides[1] + tile.col_start);
                writer.encode_tile(Isa::best(), index, &data[first..], 2 * sides[1]).unwrap()
            })
            .collect();
        (writer, tiles)
    };
    for bad in 0..4 {
        // Tiles from `bad` on have the streams of another matrix, whose frequencies
        // are others; their checksums are right.
        let (writer, mut tiles) = encode(&narrow);
        let (_, others) = encode(&wide);
        tiles.truncate(bad);
        tiles.extend(others.into_iter().skip(bad));
        let entries: Vec<_> = tiles.iter().map(|t| (t.bytes.len() as u32, t.checksum)).collect();
        let mut packed = writer.finish(entries);
        tiles.iter().for_each(|tile| packed.extend(&tile.bytes));
        let record = Record::read(&packed, 0, packed.len() as u64).unwrap();
        match rans.load(&gpu.stream, &record, &packed) {
            Err(RansError::BadTile { tile, .. }) => assert_eq!(tile, bad),
            other => panic!("{other:?}"),
        }
        // Damage that the checksum notices.
        let at = packed.len() - 70_000;
        packed[at] ^= 0x10;
        assert!(matches!(rans.load(&gpu.stream, &record, &packed), Err(RansError::Record(_))));
    }
}

#[test]
fn what_is_not_for_this_layout_is_an_error() {
    let Some(gpu) = Gpu::open() else { return };
    let rans = Rans::new(&gpu.device).unwrap();
    let weights = vec![0x3F80_u16; 17 * 32];
    let packed = encode_record(Isa::best(), Dtype::Bf16, &[17, 32], &bytes(&weights)).unwrap();
    let record = Record::read(&packed, 0, packed.len() as u64).unwrap();
    assert!(matches!(
        rans.load(&gpu.stream, &record, &packed),
        Err(RansError::Unsupported("a tensor in linear order"))
    ));
    let matrix = load(&gpu, &rans, Dtype::Bf16, [16, 32], &bytes(&weights[..512]));
    let mut out = DeviceBuffer::filled(&gpu.device, 511, 0xFF).unwrap();
    assert!(matches!(rans.decode(&gpu.stream, &matrix, &mut out), Err(RansError::Gpu(_))));
}

#[test]
fn product_equals_the_dense_one_bit_for_bit() {
    let Some(gpu) = Gpu::open() else { return };
    let rans = Rans::new(&gpu.device).unwrap();
    let mut random = Random::fresh();
    for (name, [rows, cols], weights) in matrices(&mut random) {
        let data = bytes(&weights);
        let matrix = load(&gpu, &rans, Dtype::Bf16, [rows, cols], &data);
        let dense = FixedMatrix::encode(WeightFormat::DenseBf16, 0, rows, cols, &data, &[]);
        let twin = Product::new(&gpu.device, &gpu.stream, &[dense], None).unwrap();
        let x: Vec<u16> = (0..64 * cols).map(|_| bf16(normal(&mut random))).collect();
        for tokens in [1, 2, 8, 9, 16, 17, 32, 33, 64] {
            let mut scratch = twin.scratch(&gpu.device, tokens).unwrap();
            let plain = gpu.stream.upload(&x[..tokens * cols]).unwrap();
            let mut expected = DeviceBuffer::filled(&gpu.device, tokens * rows, 0xFF).unwrap();
            twin.run(&gpu.stream, &plain, &mut expected, tokens, &mut scratch).unwrap();
            let fragments = gpu.stream.upload(&fragments(&x, tokens, cols)).unwrap();
            let mut found = DeviceBuffer::filled(&gpu.device, tokens * rows, 0xAA).unwrap();
            rans.product(&gpu.stream, &matrix, &fragments, tokens, None, None, &mut found).unwrap();
            let (expected, found) =
                (gpu.stream.download(&expected).unwrap(), gpu.stream.download(&found).unwrap());
            assert!(found == expected, "{name} {rows} x {cols}, {tokens} tokens");
        }
    }
}

#[test]
fn int8_product_equals_the_dense_one_bit_for_bit() {
    let Some(gpu) = Gpu::open() else { return };
    let rans = Rans::new(&gpu.device).unwrap();
    let mut random = Random::fresh();
    // Entropies of 5.7 bits; of 7.5 bits, more words than a warp's buffer takes; of 2.
    for ([rows, cols], sigma) in
        [([16, 272], 13.0), ([208, 1168], 13.0), ([144, 4352], 50.0), ([128, 528], 1.0)]
    {
        let data: Vec<u8> = (0..rows * cols)
            .map(|_| (sigma * normal(&mut random)).round().clamp(-128.0, 127.0) as i8 as u8)
            .collect();
        let scales: Vec<f32> =
            (0..rows).map(|_| 0.003 * (0.3 * normal(&mut random)).exp()).collect();
        let matrix = load(&gpu, &rans, Dtype::I8, [rows, cols], &data);
        let dense = FixedMatrix::encode(WeightFormat::DenseInt8, 0, rows, cols, &data, &scales);
        let device_scales = gpu.stream.upload(&scales).unwrap();
        let twin = Product::new(&gpu.device, &gpu.stream, &[dense], None).unwrap();
        let x: Vec<u16> =
            (0..64 * cols).map(|_| half::f16::from_f32(normal(&mut random)).to_bits()).collect();
        for tokens in [1, 2, 8, 9, 16, 17, 32, 33, 64] {
            let mut scratch = twin.scratch(&gpu.device, tokens).unwrap();
            let plain = gpu.stream.upload(&x[..tokens * cols]).unwrap();
            let mut expected = DeviceBuffer::filled(&gpu.device, tokens * rows, 0xFF).unwrap();
            twin.run(&gpu.stream, &plain, &mut expected, tokens, &mut scratch).unwrap();
            let fragments = gpu.stream.upload(&fragments(&x, tokens, cols)).unwrap();
            let mut found = DeviceBuffer::filled(&gpu.device, tokens * rows, 0xAA).unwrap();
            let scales = Some(&device_scales);
            rans.product(&gpu.stream, &matrix, &fragments, tokens, scales, None, &mut found)
                .unwrap();
            let (expected, found) =
                (gpu.stream.download(&expected).unwrap(), gpu.stream.download(&found).unwrap());
            assert!(found == expected, "{rows} x {cols}, {tokens} tokens");
        }
    }
}
