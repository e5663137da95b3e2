//! Matrices for the interpreter in `crates/cuda/interpreter`, as they lie in device
//! memory: `cargo run -p transom-cuda --example interpreter_matrices -- FOLDER`.
//!
//! Each file is a line of JSON, then the arrays that it lists, one after another.

// The arguments of this program are for people at a terminal.
#![allow(clippy::print_stderr)]

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;

use transom::{Dtype, Isa, Record, encode_record};
use transom_cuda::fixed::{FixedMatrix, WeightFormat};
use transom_cuda::rans::RansTable;

/// Entries of the dictionary of a fixed-rate matrix, as for models.
const CAPACITY: usize = 32;

fn main() -> Result<(), Box<dyn Error>> {
    let Some(folder) = std::env::args().nth(1) else {
        return Err("usage: interpreter_matrices FOLDER".into());
    };
    let folder = Path::new(&folder);
    std::fs::create_dir_all(folder)?;
    let mut random = Random(20_260_101);
    for format in WeightFormat::ALL {
        // Per cent of elements that are far from the others.
        for spread in [0, 3, 40, 100] {
            write_fixed(folder, &mut random, format, 47, 391, spread)?;
        }
        write_fixed(folder, &mut random, format, 1, 1, 100)?;
        write_fixed(folder, &mut random, format, 64, 4096, 3)?;
        for (rows, spread) in [(48, 3), (32, 40), (16, 0)] {
            write_fixed(folder, &mut random, format, rows, 1536, spread)?;
        }
    }
    for (dtype, kind, rows, cols) in [
        (Dtype::Bf16, Kind::Usual, 16, 16),
        (Dtype::Bf16, Kind::Usual, 48, 528),
        (Dtype::Bf16, Kind::Usual, 16, 4400),
        (Dtype::Bf16, Kind::Places, 144, 528),
        (Dtype::Bf16, Kind::Constant, 32, 272),
        (Dtype::F16, Kind::Usual, 48, 528),
        (Dtype::F16, Kind::Constant, 32, 272),
        (Dtype::F16, Kind::ZeroBits, 48, 528),
        (Dtype::I8, Kind::Usual, 48, 784),
        (Dtype::I8, Kind::Constant, 32, 272),
    ] {
        write_rans(folder, &mut random, dtype, kind, rows, cols)?;
    }
    Ok(())
}

struct Random(u64);

impl Random {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) as u32
    }

    /// Of about a normal distribution.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| (self.bits() >> 7) as f32 / (1 << 24) as f32).sum::<f32>() - 6.0
    }
}

fn write_fixed(
    folder: &Path,
    random: &mut Random,
    format: WeightFormat,
    rows: usize,
    cols: usize,
    spread: u32,
) -> Result<(), Box<dyn Error>> {
    let mut elements = Vec::new();
    for _ in 0..rows * cols {
        let (bits, far) = (random.bits() as u16, random.bits() % 100 < spread);
        // Near elements have one of eight exponents, or are small.
        let near = match format.dtype() {
            Dtype::I8 => {
                elements.push(if far { bits as u8 } else { ((bits as i8) >> 4) as u8 });
                continue;
            }
            Dtype::F16 => bits & 0x83FF | (6 + (bits >> 10 & 7)) << 10,
            _ => bits & 0x807F | (115 + (bits >> 7 & 7)) << 7,
        };
        elements.extend((if far { bits } else { near }).to_le_bytes());
    }
    // Over many powers of two; one for all rows of some matrices.
    let n_scales = match (format.dtype(), spread) {
        (Dtype::I8, 40) => 1,
        (Dtype::I8, _) => rows,
        _ => 0,
    };
    let scales: Vec<f32> = (0..n_scales).map(|_| 0.001 * (2.5 * random.normal()).exp()).collect();
    let matrix = FixedMatrix::encode(format, CAPACITY, rows, cols, &elements, &scales);
    let row_scales: Vec<u8> =
        (matrix.scales.iter()).flat_map(|s| s.words()).flat_map(u32::to_le_bytes).collect();
    let scales: Vec<u8> = scales.into_iter().flat_map(f32::to_le_bytes).collect();
    let overflow: Vec<u8> = matrix.overflow.iter().flat_map(|word| word.to_le_bytes()).collect();
    let name = format.name();
    let header = format!(
        r#""format": "{name}", "rows": {rows}, "cols": {cols}, "spread": {spread}, "chunk_bytes": {}"#,
        matrix.chunk_bytes
    );
    let arrays: [(&str, &[u8]); 6] = [
        ("chunks", &matrix.chunks),
        ("scales", &scales),
        ("row_scales", &row_scales),
        ("overflow", &overflow),
        ("symbols", &matrix.symbols),
        ("elements", &elements),
    ];
    write(&folder.join(format!("fixed-{name}-{rows}x{cols}-{spread}.matrix")), &header, &arrays)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Normally distributed.
    Usual,
    /// So, with every bit pattern in some places.
    Places,
    /// One symbol in the coded plane.
    Constant,
    /// Low bits that are mostly zero: two planes are coded.
    ZeroBits,
}

fn write_rans(
    folder: &Path,
    random: &mut Random,
    dtype: Dtype,
    kind: Kind,
    rows: usize,
    cols: usize,
) -> Result<(), Box<dyn Error>> {
    let mut elements = Vec::new();
    for index in 0..rows * cols {
        let (normal, any) = (random.normal(), random.bits() as u16);
        let in_place = index / cols < rows / 2 && index % cols < cols / 3;
        let bits = match dtype {
            Dtype::I8 => {
                elements.push(if kind == Kind::Constant { 5 } else { (13.0 * normal) as i8 as u8 });
                continue;
            }
            Dtype::F16 => half::f16::from_f32(0.02 * normal).to_bits(),
            _ => half::bf16::from_f32(0.02 * normal).to_bits(),
        };
        let bits = match kind {
            Kind::Places if in_place => any,
            Kind::Constant if dtype == Dtype::F16 => bits & 0xFF | 0x3C00,
            Kind::Constant => bits & 0x807F | 0x3F80,
            Kind::ZeroBits => bits & 0xFFE0,
            _ => bits,
        };
        elements.extend(bits.to_le_bytes());
    }
    let bytes = encode_record(Isa::best(), dtype, &[rows, cols], &elements)?;
    let record = Record::read(&bytes, 0, bytes.len() as u64)?;
    let table = RansTable::new(record.header())?;
    let (mut tiles, mut starts, mut buffer) = (Vec::new(), vec![0; 8], Vec::new());
    for index in 0..record.header().tiling().n_tiles() {
        record.read_tile(&bytes, index, &mut buffer)?;
        tiles.extend_from_slice(&buffer);
        starts.extend((tiles.len() as u64).to_le_bytes());
    }
    let words: Vec<u8> = table.words().iter().flat_map(|word| word.to_le_bytes()).collect();
    let name = match dtype {
        Dtype::I8 => "int8",
        Dtype::F16 => "f16",
        _ => "bf16",
    };
    let suffix = table.kernel_suffix();
    let header = format!(
        r#""dtype": "{name}", "kind": "{kind:?}", "rows": {rows}, "cols": {cols}, "prob_bits": {}, "suffix": "{suffix}""#,
        table.prob_bits()
    );
    let arrays: [(&str, &[u8]); 4] =
        [("table", &words), ("tiles", &tiles), ("starts", &starts), ("elements", &elements)];
    let file = format!("rans-{name}-{kind:?}-{rows}x{cols}{suffix}.matrix");
    write(&folder.join(file), &header, &arrays)
}

/// `header`: members of the JSON object besides the list of arrays.
fn write(path: &Path, header: &str, arrays: &[(&str, &[u8])]) -> Result<(), Box<dyn Error>> {
    let mut list = String::new();
    for (name, bytes) in arrays {
        let comma = if list.is_empty() { "" } else { ", " };
        write!(list, r#"{comma}["{name}", {}]"#, bytes.len())?;
    }
    let mut file = format!("{{{header}, \"arrays\": [{list}]}}\n").into_bytes();
    for (_, bytes) in arrays {
        file.extend_from_slice(bytes);
    }
    std::fs::write(path, file).map_err(|error| format!("{}: {error}", path.display()).into())
}
