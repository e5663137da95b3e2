//! The layout, read back element by element by the rules of `docs/kernels.md`.

use super::*;

/// Element at a place of a lane in an encoded matrix.
fn decode(matrix: &FixedMatrix, chunk: &[u8], lane: usize, at: usize) -> u16 {
    let format = matrix.format;
    let header = format.header_offset();
    let row = fragment(lane, register(at)).0;
    let (half, step, word) = (at / 32, at / 8 % 4, at % 32 / 4);
    let bits3 = |offset: usize| -> u8 {
        (0..3).fold(0, |sum, bit| {
            let (word, place) = if step < 3 { (step, bit) } else { (bit, 3) };
            let index = match (half, word) {
                (0, 2) => 64 + lane,
                (0, _) => 2 * lane + word,
                (_, 0) => 96 + lane,
                _ => 127 + 2 * lane + word,
            };
            let shift = 4 * (at % 8) + place;
            sum | (chunk[offset + 4 * index + shift / 8] >> (shift % 8) & 1) << bit
        })
    };
    let bits4 = |offset: usize| {
        chunk[offset + (half * 32 + lane) * 16 + word / 2 * 4 + at % 4] >> (4 * (word % 2)) & 15
    };
    let code = match format {
        WeightFormat::Bf16x3 | WeightFormat::F16x3 => bits3(2048),
        WeightFormat::Bf16x4 => bits4(2048),
        _ => int8_code(chunk, format.code_bits(), lane, at),
    };
    let mut key = match format.dtype() {
        Dtype::I8 => {
            let sign = 1 << (format.code_bits() - 1);
            let magnitude = code % sign;
            if code >= sign { 128 - magnitude } else { 128 + magnitude }
        }
        _ => chunk[header + row] + code * format.unit() as u8,
    };
    let field = |at: usize| usize::from(u16::from_le_bytes([chunk[at], chunk[at + 1]]));
    // Plane of bytes, or of the halves of A fragments.
    let position = match format.dtype() {
        Dtype::I8 => (at / 8 * 32 + lane) * 8 + register(at),
        _ => byte_place(lane, at),
    };
    let counts = if format.dtype() == Dtype::I8 { header } else { header + 16 };
    for i in 0..field(counts) {
        let escape = field(counts + 8 + 2 * i);
        if escape & 2047 == position {
            key = matrix.symbols[escape >> 11];
        }
    }
    let start = field(counts + 4) + (field(counts + 6) << 16);
    for &escape in &matrix.overflow[start..start + field(counts + 2)] {
        if escape as usize & 2047 == position {
            key = (escape >> 16) as u8;
        }
    }
    let raw = |at| chunk[byte_place(lane, at)];
    match format.dtype() {
        Dtype::Bf16 => {
            u16::from(raw(at ^ 1) & 1) << 15 | u16::from(key) << 7 | u16::from(raw(at) >> 1)
        }
        Dtype::F16 => {
            let more = u16::from(bits3(2048 + 768));
            (more >> 2) << 15 | u16::from(key) << 8 | (more & 3) << 8 | u16::from(raw(at))
        }
        _ => u16::from(key ^ 0x80),
    }
}

/// Sign and magnitude of an INT8 element.
fn int8_code(chunk: &[u8], bits: usize, lane: usize, at: usize) -> u8 {
    let half = &chunk[at / 32 * 128 * bits..];
    // 16 bytes a lane; of five and more words 8 or 4, of seven both.
    let word = |i: usize| {
        let at = match (bits, i) {
            (_, 0..4) => lane * 16 + i * 4,
            (5, 4) => 512 + lane * 4,
            (_, 4 | 5) => 512 + lane * 8 + (i - 4) * 4,
            _ => 768 + lane * 4,
        };
        u32::from_le_bytes(half[at..at + 4].try_into().unwrap())
    };
    let pair = at % 32 / 8 * 4 + register(at) / 2;
    // Pairs that one word holds, and those of the others: first of their words, how many words, pairs of them.
    let (whole, (first, n_words, n_pairs)) = match bits {
        4 => (4, (0, 1, 1)),
        5 => (3, (0, 5, 1)),
        6 => (2, (if pair < 14 { 0 } else { 3 }, 3, 2)),
        _ => (2, (0, 7, 2)),
    };
    let (joined, turn) = if pair < whole * bits {
        (word(pair / whole), pair % whole)
    } else {
        let left = 16 - whole * bits;
        let take = |sum: u32, i: usize| {
            // The `left` bits below the highest one of each half, to where the i-th of such groups belongs.
            let bits = word(first + i) & ((((1 << left) - 1) << (15 - left)) * 0x0001_0001);
            sum | bits.rotate_left(((i + 1) * left) as u32)
        };
        ((0..n_words).fold(0, take), (pair - whole * bits) % n_pairs)
    };
    let halves = joined.rotate_right((turn * bits) as u32);
    let element = halves >> (16 * (register(at) % 2)) & 0xFFFF;
    ((element >> 15) << (bits - 1) | element & ((1 << (bits - 1)) - 1)) as u8
}

fn random_bytes(n: usize, state: &mut u64) -> Vec<u8> {
    (0..n)
        .map(|_| {
            *state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (*state >> 56) as u8
        })
        .collect()
}

#[test]
fn every_element_comes_back() {
    let mut state = 7;
    for format in WeightFormat::ALL.into_iter().filter(|format| !format.is_dense()) {
        for (rows, cols) in [(1, 1), (16, 128), (17, 129), (33, 300)] {
            for places in [0, 32, 100] {
                // Random bits: every pattern; then a narrow spread with a few exceptions.
                for narrow in [false, true] {
                    let mut bytes = random_bytes(rows * cols * format.elem_bytes(), &mut state);
                    if narrow {
                        for (i, element) in bytes.chunks_mut(format.elem_bytes()).enumerate() {
                            if i % 50 != 0 {
                                let high = element.len() - 1;
                                element[high] = 0x38 | element[high] & 0x83;
                            }
                        }
                    }
                    let scale = |i: usize| 0.001 * 1.5_f32.powi(i as i32 % 40 - 20);
                    let scales: Vec<f32> = match format.dtype() {
                        Dtype::I8 if narrow => vec![0.001],
                        Dtype::I8 => (0..rows).map(scale).collect(),
                        _ => Vec::new(),
                    };
                    let matrix = FixedMatrix::encode(format, places, rows, cols, &bytes, &scales);
                    let across = cols.div_ceil(CHUNK_COLS);
                    for (index, chunk) in matrix.chunks.chunks(matrix.chunk_bytes).enumerate() {
                        for (lane, at) in (0..32).flat_map(|lane| (0..64).map(move |at| (lane, at)))
                        {
                            let (row, col) = fragment(lane, register(at));
                            let row = index / across * CHUNK_ROWS + row;
                            let col = index % across * CHUNK_COLS + at / 8 * 16 + col;
                            if row >= rows || col >= cols {
                                continue;
                            }
                            let i = row * cols + col;
                            let expected = match format.elem_bytes() {
                                1 => u16::from(bytes[i]),
                                _ => u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]),
                            };
                            let found = decode(&matrix, chunk, lane, at);
                            assert_eq!(found, expected, "{format:?} {rows}x{cols} ({row}, {col})");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn the_smallest_format_is_chosen() {
    let mut state = 3;
    let words = |state: &mut u64, exponents: u16| -> Vec<u8> {
        random_bytes(2 * 256 * 512, state)
            .chunks(2)
            .flat_map(|b| {
                let x = u16::from_le_bytes([b[0], b[1]]);
                (x & 0x807F | (110 + (x >> 7 & 255) % exponents) << 7).to_le_bytes()
            })
            .collect()
    };
    let choose = |bytes: &[u8]| FixedMatrix::choose(Dtype::Bf16, 256, 512, bytes, &[]);
    assert_eq!(choose(&words(&mut state, 8)), (WeightFormat::Bf16x3, 8));
    assert_eq!(choose(&words(&mut state, 14)).0, WeightFormat::Bf16x4);
    assert_eq!(choose(&words(&mut state, 140)).0, WeightFormat::DenseBf16);
}
