//! Bit fields, least significant bit first, in the manner of RFC 1951.

/// Appends bit fields to a byte vector.
pub(crate) struct BitWriter<'a> {
    out: &'a mut Vec<u8>,
    pending: u64,
    n_pending: u32,
}

impl<'a> BitWriter<'a> {
    pub(crate) fn new(out: &'a mut Vec<u8>) -> Self {
        Self { out, pending: 0, n_pending: 0 }
    }

    /// Appends the low `n_bits` (at most 32) of `value`, which has no others.
    pub(crate) fn put(&mut self, value: u32, n_bits: u32) {
        debug_assert!(n_bits <= 32 && u64::from(value) >> n_bits == 0);
        self.pending |= u64::from(value) << self.n_pending;
        self.n_pending += n_bits;
        while self.n_pending >= 8 {
            self.out.push(self.pending as u8);
            self.pending >>= 8;
            self.n_pending -= 8;
        }
    }

    /// Fills the last byte up with zeros.
    pub(crate) fn finish(self) {
        if self.n_pending > 0 {
            self.out.push(self.pending as u8);
        }
    }
}

/// Takes bit fields from a byte slice.
pub(crate) struct BitReader<'a> {
    bytes: &'a [u8],
    /// Bits taken so far.
    position: usize,
}

impl<'a> BitReader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    /// The next `n_bits` (at most 32), or `None` if fewer are left.
    pub(crate) fn take(&mut self, n_bits: u32) -> Option<u32> {
        let end = self.position + n_bits as usize;
        if end > 8 * self.bytes.len() {
            return None;
        }
        // At most 32 bits from bit 7 of a byte on: five bytes.
        let first = self.position / 8;
        let bytes = &self.bytes[first..self.bytes.len().min(first + 5)];
        let field = bytes.iter().rev().fold(0u64, |field, &byte| field << 8 | u64::from(byte));
        let value = field >> (self.position % 8) & ((1 << n_bits) - 1);
        self.position = end;
        Some(value as u32)
    }

    /// Bytes taken in all, or `None` if the unused bits of the last are not zero.
    pub(crate) fn finish(self) -> Option<usize> {
        let used = self.position % 8;
        let clean = used == 0 || self.bytes[self.position / 8] >> used == 0;
        clean.then_some(self.position.div_ceil(8))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_back_in_order() {
        let fields = [(5, 3), (0, 0), (0xFFFF_FFFF, 32), (1, 1), (0x1234, 14)];
        let mut bytes = Vec::new();
        let mut writer = BitWriter::new(&mut bytes);
        fields.iter().for_each(|&(value, n)| writer.put(value, n));
        writer.finish();
        let mut reader = BitReader::new(&bytes);
        for (value, n) in fields {
            assert_eq!(reader.take(n), Some(value));
        }
        assert_eq!(reader.finish(), Some(bytes.len()));
        assert_eq!(bytes.len(), 7);
    }

    #[test]
    fn dirty_padding_and_missing_bits_are_noticed() {
        let mut reader = BitReader::new(&[0b1000_0001]);
        assert_eq!(reader.take(1), Some(1));
        assert_eq!(reader.finish(), None);
        let mut reader = BitReader::new(&[0]);
        assert_eq!(reader.take(9), None);
    }
}
