//! Where the codes of INT8 weights lie in a chunk; docs/kernels.md draws it.
//!
//! In a lane's half of a chunk two elements, neighbours in a row, are a pair of
//! 16-bit halves, and 16 pairs are `bits` words of 32 bits. A kernel takes a
//! pair out of a word with a rotation and a mask.

/// Shape of a half of a lane.
#[derive(Debug, Clone, Copy)]
struct Words {
    /// Of a code.
    bits: usize,
    /// Pairs that a word holds.
    fields: usize,
    /// Bits of each half of a word that are left over.
    left: usize,
    /// Pairs that are put together from what is left over in `joined` words.
    together: usize,
    joined: usize,
}

impl Words {
    const fn new(bits: usize) -> Self {
        let fields = 16 / bits;
        let left = 16 - fields * bits;
        let together = if left < fields { left } else { fields };
        let joined = match (together * bits).checked_div(left) {
            Some(n) => n,
            None => 0,
        };
        Self { bits, fields, left, together, joined }
    }

    /// Word and bit of bit `at` (0 to 15: of the first element, from 16: of the
    /// second) of a pair.
    const fn place(self, pair: usize, at: usize) -> (usize, usize) {
        let n_direct = self.fields * self.bits;
        if pair < n_direct {
            return (pair / self.fields, (at + self.bits * (pair % self.fields)) % 32);
        }
        let extra = pair - n_direct;
        let at = (at + self.bits * (extra % self.together)) % 32;
        // Bits of a half, from the highest, which is below the lowest.
        let piece = (at + 1) % 16 / self.left;
        let word = extra / self.together * self.joined + piece;
        (word, (at + 32 - (piece + 1) * self.left) % 32)
    }

    /// Byte of a lane's word in the half of a chunk: words 0 to 3 are 16 bytes, then come two or none, then one or none.
    const fn byte(self, word: usize, lane: usize) -> usize {
        let two = self.bits & 2 != 0;
        match word {
            0..4 => lane * 16 + 4 * word,
            4 | 5 if two => 512 + lane * 8 + 4 * (word - 4),
            _ => 512 + if two { 256 } else { 0 } + lane * 4,
        }
    }
}

/// Number of an element in a chunk: k16 step, lane, and in the order of the A fragment's registers.
pub(super) const fn element_place(lane: usize, step: usize, register: usize) -> usize {
    (step * 32 + lane) * 8 + register
}

/// Puts a code of `bits` bits, a sign and a magnitude, into a chunk that has zeros there.
pub(super) fn put_code(chunk: &mut [u8], bits: usize, place: usize, code: u8) {
    let (step, lane, register) = (place / 256, place / 8 % 32, place % 8);
    let words = Words::new(bits);
    let (half, pair) = (step / 4, step % 4 * 4 + register / 2);
    for bit in 0..bits {
        // The sign is a half's highest bit.
        let at = register % 2 * 16 + if bit + 1 < bits { bit } else { 15 };
        let (word, shift) = words.place(pair, at);
        let byte = half * 128 * bits + words.byte(word, lane) + shift / 8;
        chunk[byte] |= (code >> bit & 1) << (shift % 8);
    }
}
