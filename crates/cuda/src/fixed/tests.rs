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
        _ => {
            let pair = || chunk[1024 + (half * 32 + lane) * 8 + word / 4 * 4 + at % 4];
            let one = |plane: usize| chunk[plane + (half * 32 + lane) * 4 + at % 4] >> word & 1;
            bits4(0)
                | match format {
                    WeightFormat::Int8x5 => one(1024) << 4,
                    WeightFormat::Int8x6 => (pair() >> (2 * (word % 4)) & 3) << 4,
                    WeightFormat::Int8x7 => {
                        (pair() >> (2 * (word % 4)) & 3) << 4 | one(1024 + 512) << 6
                    }
                    _ => 0,
                }
        }
    };
    let mut key = chunk[header + row] + code * format.unit() as u8;
    let field = |at: usize| usize::from(u16::from_le_bytes([chunk[at], chunk[at + 1]]));
    let position = byte_place(lane, at);
    for i in 0..field(header + 16) {
        let escape = field(header + HEADER_BYTES + 2 * i);
        if escape & 2047 == position {
            key = matrix.symbols[escape >> 11];
        }
    }
    let start = field(header + 20) + (field(header + 22) << 16);
    for &escape in &matrix.overflow[start..start + field(header + 18)] {
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
                    let matrix = FixedMatrix::encode(format, places, rows, cols, &bytes);
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
    let choose = |bytes: &[u8]| FixedMatrix::choose(Dtype::Bf16, 256, 512, bytes);
    assert_eq!(choose(&words(&mut state, 8)), (WeightFormat::Bf16x3, 8));
    assert_eq!(choose(&words(&mut state, 14)).0, WeightFormat::Bf16x4);
    assert_eq!(choose(&words(&mut state, 140)).0, WeightFormat::DenseBf16);
}
