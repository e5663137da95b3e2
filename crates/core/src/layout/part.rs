//! Bytes somewhere in a buffer.

use std::ops::{Deref, Range};

/// The part of a buffer that counts. What is read into memory used before, or
/// at an address that a device wants, does not fill it exactly.
#[derive(Debug)]
pub(crate) struct Part {
    buffer: Vec<u8>,
    range: Range<usize>,
}

impl Part {
    /// # Panics
    ///
    /// If `range` is not inside `buffer`.
    pub(crate) fn new(buffer: Vec<u8>, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= buffer.len(), "outside the buffer");
        Self { buffer, range }
    }

    pub(crate) fn into_buffer(self) -> Vec<u8> {
        self.buffer
    }

    pub(crate) fn fill(&mut self, byte: u8) {
        self.buffer[self.range.clone()].fill(byte);
    }
}

impl From<Vec<u8>> for Part {
    fn from(buffer: Vec<u8>) -> Self {
        let range = 0..buffer.len();
        Self { buffer, range }
    }
}

impl Deref for Part {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[self.range.clone()]
    }
}
