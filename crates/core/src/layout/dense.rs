//! The original elements, row-major.

use std::io;

use rayon::prelude::*;

use crate::error::DecodeError;
use crate::io::ReadAt;
use crate::isa::Isa;
use crate::layout::{Part, WeightType};
use crate::record::Record;

/// Bytes read at a time by one thread.
const CHUNK_BYTES: usize = 4 << 20;

#[derive(Debug)]
pub(crate) struct DenseMatrix {
    pub(crate) bytes: Part,
}

impl DenseMatrix {
    pub(super) fn read(
        source: &(impl ReadAt + ?Sized),
        start: u64,
        shape: [usize; 2],
        weight: WeightType,
    ) -> io::Result<Self> {
        let mut bytes = vec![0; shape[0] * shape[1] * weight.elem_bytes()];
        bytes.par_chunks_mut(CHUNK_BYTES).enumerate().try_for_each(|(i, chunk)| {
            source.read_exact_at(chunk, start + (i * CHUNK_BYTES) as u64)
        })?;
        Ok(Self { bytes: bytes.into() })
    }

    pub(super) fn from_record(
        record: &Record,
        source: &(impl ReadAt + ?Sized),
        isa: Isa,
    ) -> Result<Self, DecodeError> {
        let mut bytes = Vec::with_capacity(record.header().content_bytes() as usize);
        record.stream_with(source, isa, |chunk| {
            bytes.extend_from_slice(chunk);
            Ok(())
        })?;
        Ok(Self { bytes: bytes.into() })
    }

    pub(super) fn resident_bytes(&self) -> usize {
        self.bytes.len()
    }
}
