//! The coder and the transform alone, without the record around them: every
//! instruction set gives the scalar version's bytes, and its verdict on
//! streams that are not valid.

use arbitrary::{Result, Unstructured};
use transom::coder::rans::{
    Cursor, DecodeTable, EncodeTable, MAX_STREAMS, Stream, decode_with, encode_with,
    run_streams_with,
};
use transom::model::{FreqTable, Histogram, MAX_PROB_BITS, MIN_PROB_BITS};
use transom::{Isa, TileError};

use crate::{available_isas, content};

/// See the module.
pub fn check(data: &[u8]) {
    if let Ok(case) = Case::read(&mut Unstructured::new(data)) {
        case.check_valid();
        case.check_damaged();
        case.check_together();
    }
}

/// One or two planes, and what to change in their stream.
struct Case {
    planes: Vec<Vec<u8>>,
    freqs: Vec<FreqTable>,
    flip: (u32, u8),
    n_cut: u8,
}

impl Case {
    fn read(input: &mut Unstructured<'_>) -> Result<Self> {
        let n_planes = input.int_in_range(1..=2)?;
        let n_elems = match input.int_in_range(0..=15u8)? {
            0..10 => input.int_in_range(1..=200)?,
            10..15 => input.int_in_range(200..=5000)?,
            _ => input.int_in_range(65_000..=65_536)?,
        };
        let prob_bits = input.int_in_range(MIN_PROB_BITS..=MAX_PROB_BITS)?;
        let (flip, n_cut) = (input.arbitrary()?, input.arbitrary()?);
        let bytes = content(input, n_planes * n_elems)?;
        let planes: Vec<Vec<u8>> = bytes.chunks(n_elems).map(<[u8]>::to_vec).collect();
        let freqs = (planes.iter())
            .map(|plane| {
                let mut histogram = Histogram::default();
                histogram.add(plane);
                FreqTable::quantise(&histogram, prob_bits)
            })
            .collect();
        Ok(Self { planes, freqs, flip, n_cut })
    }

    fn n_elems(&self) -> usize {
        self.planes[0].len()
    }

    fn encode(&self, isa: Isa) -> Vec<u8> {
        let planes: Vec<&[u8]> = self.planes.iter().map(Vec::as_slice).collect();
        let tables: Vec<EncodeTable> = self.freqs.iter().map(EncodeTable::new).collect();
        let tables: Vec<&EncodeTable> = tables.iter().collect();
        let mut stream = Vec::new();
        encode_with(isa, &planes, &tables, &mut stream).expect("every symbol has a frequency");
        stream
    }

    fn decode(&self, isa: Isa, stream: &[u8]) -> Result<Vec<Vec<u8>>, TileError> {
        let tables: Vec<DecodeTable> = self.freqs.iter().map(DecodeTable::new).collect();
        let tables: Vec<&DecodeTable> = tables.iter().collect();
        let mut outs = vec![vec![0xA5; self.n_elems()]; self.planes.len()];
        let mut slices: Vec<&mut [u8]> = outs.iter_mut().map(Vec::as_mut_slice).collect();
        decode_with(isa, stream, &tables, &mut slices)?;
        Ok(outs)
    }

    fn check_valid(&self) {
        let stream = self.encode(Isa::Scalar);
        for isa in available_isas() {
            assert_eq!(self.encode(isa), stream, "{isa:?}");
            assert_eq!(self.decode(isa, &stream).as_ref(), Ok(&self.planes), "{isa:?}");
        }
    }

    fn check_damaged(&self) {
        let mut stream = self.encode(Isa::Scalar);
        let at = self.flip.0 as usize % stream.len();
        stream[at] ^= self.flip.1;
        stream.truncate(stream.len() - usize::from(self.n_cut) % stream.len());
        let expected = self.decode(Isa::Scalar, &stream);
        for isa in available_isas() {
            assert_eq!(self.decode(isa, &stream).ok(), expected.clone().ok(), "{isa:?}");
        }
    }

    /// Several tiles at the same time, of different lengths.
    fn check_together(&self) {
        let tables: Vec<DecodeTable> = self.freqs.iter().map(DecodeTable::new).collect();
        let tables: Vec<&DecodeTable> = tables.iter().collect();
        let stream = self.encode(Isa::Scalar);
        let n_tail = transom::coder::rans::tail_symbols(self.n_elems(), self.planes.len());
        let n_coded = self.n_elems() - n_tail;
        for isa in available_isas() {
            let mut cursors = vec![Cursor::start(&stream).expect("a stream"); MAX_STREAMS + 1];
            let lengths: Vec<usize> =
                (0..cursors.len()).map(|i| n_coded * (cursors.len() - i) / cursors.len()).collect();
            let mut outs: Vec<Vec<Vec<u8>>> =
                lengths.iter().map(|&n| vec![vec![0xA5; n]; self.planes.len()]).collect();
            let mut slices: Vec<Vec<&mut [u8]>> = (outs.iter_mut())
                .map(|planes| planes.iter_mut().map(Vec::as_mut_slice).collect())
                .collect();
            let mut streams: Vec<Stream<'_, '_, '_>> = (cursors.iter_mut().zip(&mut slices))
                .map(|(cursor, outs)| Stream { cursor, outs })
                .collect();
            run_streams_with(isa, &tables, &mut streams).expect("the words suffice");
            for (planes, n) in outs.iter().zip(lengths) {
                for (out, plane) in planes.iter().zip(&self.planes) {
                    assert_eq!(out[..], plane[..n], "{isa:?}");
                }
            }
        }
    }
}
