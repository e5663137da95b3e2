//! Any tensor: encoded on one instruction set, decoded on another, whole and
//! in part, equal to the original, and hardly ever larger.

use arbitrary::{Result, Unstructured};
use transom::{Dtype, Isa, Record, encode_record};

use crate::{available_isas, content};

/// Header bytes of a record apart from its directory, shape and tables.
const HEADER_BYTES: usize = 64;

/// A tensor, and a part of it.
#[derive(Debug)]
pub struct Case {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
    /// Encoder and decoder.
    isas: [Isa; 2],
    /// Of rows and columns, as 65,536ths of the sides.
    slice: [(u16, u16); 2],
}

/// See the module.
pub fn check(data: &[u8]) {
    if let Ok(case) = Case::read(&mut Unstructured::new(data)) {
        case.check();
    }
}

impl Case {
    fn read(input: &mut Unstructured<'_>) -> Result<Self> {
        let dtype = *input.choose(&Dtype::ALL)?;
        let isas = available_isas();
        let isas = [*input.choose(&isas)?, *input.choose(&isas)?];
        let slice = input.arbitrary()?;
        let shape = shape(input)?;
        let n_elems: usize = shape.iter().product();
        let data = content(input, n_elems * dtype.elem_bytes())?;
        Ok(Self { dtype, shape, data, isas, slice })
    }

    fn check(&self) {
        let [encoder, decoder] = self.isas;
        let bytes = encode_record(encoder, self.dtype, &self.shape, &self.data)
            .expect("the data are as long as the shape says");
        let record = Record::read(&bytes, 0, bytes.len() as u64).expect("a record");
        let header = record.header();
        assert_eq!((header.dtype(), header.shape()), (self.dtype, self.shape.as_slice()));
        let bound = self.data.len() + HEADER_BYTES + 10 * self.shape.len() + 12 * header.tiles().len()
            // Two tables of 256 frequencies; they are written only where they pay.
            + if header.n_coded() > 0 { 1024 } else { 0 };
        assert!(bytes.len() <= bound, "{} bytes for {}", bytes.len(), self.data.len());
        record.verify_with(&bytes, decoder).expect("the content is that of the header");
        let mut whole = vec![0xA5; self.data.len()];
        record.decode_to_slice_with(&bytes, decoder, &mut whole).expect("it decodes");
        assert_eq!(whole, self.data);
        self.check_slice(&record, &bytes);
    }

    fn check_slice(&self, record: &Record, bytes: &[u8]) {
        let (n_rows, n_cols) = record.matrix_sides();
        let range = |(a, b): (u16, u16), n: usize| {
            let at = |x: u16| (usize::from(x) * (n + 1)) >> 16;
            at(a.min(b))..at(a.max(b))
        };
        let (rows, cols) = (range(self.slice[0], n_rows), range(self.slice[1], n_cols));
        let mut part = vec![0xA5; 7];
        record
            .read_slice_with(bytes, self.isas[1], rows.clone(), cols.clone(), &mut part)
            .expect("the ranges are inside");
        let size = self.dtype.elem_bytes();
        let expected: Vec<u8> = rows
            .flat_map(|row| &self.data[(row * n_cols + cols.start) * size..][..cols.len() * size])
            .copied()
            .collect();
        assert_eq!(part, expected);
    }
}

/// Shapes of up to 200,000 elements: matrices of whole blocks, and others.
fn shape(input: &mut Unstructured<'_>) -> Result<Vec<usize>> {
    Ok(match input.int_in_range(0..=5u8)? {
        0 => vec![16 * input.int_in_range(1..=20)?, 16 * input.int_in_range(1..=36)?],
        1 => vec![16 * input.int_in_range(1..=4)?, 16 * input.int_in_range(1..=4)?],
        2 => vec![input.int_in_range(0..=200)?],
        3 => vec![input.int_in_range(65_000..=140_000)?],
        4 => vec![input.int_in_range(0..=300)?, input.int_in_range(0..=300)?],
        _ => {
            let n_dims = input.int_in_range(0..=5)?;
            (0..n_dims).map(|_| input.int_in_range(0..=9)).collect::<Result<_>>()?
        }
    })
}
