//! The code of an exponent or of an integer, and how the fields of 64 elements
//! are packed.
//!
//! Field `j` of 64 lies in byte `j % (64 / f)`, where `f` is the number of fields
//! a byte holds, at bit `j / (64 / f)` times the width: one load, a shift that
//! differs from lane to lane and a mask give 64 fields in order.

use crate::layout::WeightType;

/// Elements whose fields are stored together.
pub(crate) const GROUP: usize = 64;
/// Bits that an escape takes: position and exponent.
const ESCAPE_BITS: f64 = 24.0;

/// How the high byte of an element is coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Coding {
    /// BF16: the exponent is one of eight.
    Exponent3,
    /// BF16: the exponent is one of sixteen.
    Exponent4,
    /// FP16: the five-bit exponent is one of eight; sign and two bits beside it.
    Half3,
    /// INT8: the distance from the least of 16 consecutive values.
    Window4,
    /// Of 32 values.
    Window5,
    /// Of 64 values.
    Window6,
    /// Of 128 values.
    Window7,
}

impl Coding {
    /// The variant of fewest bits for elements with these counts of high
    /// bytes, `None` if none is smaller than dense.
    pub(super) fn smallest(weight: WeightType, counts: &[u64; 256]) -> Option<Self> {
        let size = |coding: &Self| {
            let fields = coding.group_bytes() as f64 * 8.0 / GROUP as f64;
            let low = 8.0 * coding.low_bytes(1) as f64;
            fields + low + ESCAPE_BITS * coding.escape_rate(counts)
        };
        (Self::candidates(weight).iter().copied())
            .min_by(|a, b| size(a).total_cmp(&size(b)))
            .filter(|coding| size(coding) < 8.0 * weight.elem_bytes() as f64)
    }

    const fn candidates(weight: WeightType) -> &'static [Self] {
        match weight {
            WeightType::Bf16 => &[Self::Exponent3, Self::Exponent4],
            WeightType::F16 => &[Self::Half3],
            WeightType::F32 => &[],
            WeightType::I8 => &[Self::Window4, Self::Window5, Self::Window6, Self::Window7],
        }
    }

    /// Exponents or integers that have a code.
    pub(super) const fn n_codes(self) -> usize {
        match self {
            Self::Exponent3 | Self::Half3 => 8,
            Self::Exponent4 | Self::Window4 => 16,
            Self::Window5 => 32,
            Self::Window6 => 64,
            Self::Window7 => 128,
        }
    }

    /// Whether the codes are those of consecutive integers.
    const fn is_window(self) -> bool {
        matches!(self, Self::Window4 | Self::Window5 | Self::Window6 | Self::Window7)
    }

    /// Bytes that are stored as they are, of `n` elements.
    pub(crate) const fn low_bytes(self, n: usize) -> usize {
        if self.is_window() { 0 } else { n }
    }

    /// Bytes that the fields of a group take.
    pub(crate) const fn group_bytes(self) -> usize {
        match self {
            Self::Exponent3 => 24,
            Self::Exponent4 | Self::Window4 => 32,
            Self::Window5 => 40,
            Self::Half3 | Self::Window6 => 48,
            Self::Window7 => 56,
        }
    }

    /// Bytes that the fields of `n` elements take.
    pub(crate) const fn field_bytes(self, n: usize) -> usize {
        n.div_ceil(GROUP) * self.group_bytes()
    }

    /// The exponent of a high byte.
    const fn exponent(self, high: u8) -> u8 {
        match self {
            Self::Half3 => high >> 2 & 31,
            _ => high,
        }
    }

    /// The fields of an element whose exponent has this code.
    const fn field(self, high: u8, code: u8) -> u8 {
        match self {
            Self::Half3 => code | (high & 3) << 3 | (high >> 7) << 5,
            _ => code,
        }
    }

    /// The opposite of [`Coding::field`].
    const fn high(self, field: u8, palette: &[u8; 16]) -> u8 {
        match self {
            Self::Half3 => palette[(field & 7) as usize] << 2 | field >> 3 & 3 | field >> 5 << 7,
            Self::Exponent3 | Self::Exponent4 => palette[field as usize],
            // The palette is the least value.
            _ => palette[0].wrapping_add(field),
        }
    }

    /// The code of each exponent of a palette, or of each integer of a window.
    pub(super) fn codes(self, palette: &[u8; 16]) -> [Option<u8>; 256] {
        let mut codes = [None; 256];
        if self.is_window() {
            for code in 0..self.n_codes() as u8 {
                codes[usize::from(palette[0].wrapping_add(code))] = Some(code);
            }
            return codes;
        }
        for (code, &exponent) in palette[..self.n_codes()].iter().enumerate().rev() {
            codes[usize::from(exponent)] = Some(code as u8);
        }
        codes
    }

    /// Writes the fields of high bytes, whole groups, and names the elements
    /// whose exponent has no code.
    pub(super) fn encode(
        self,
        codes: &[Option<u8>; 256],
        high: &[u8],
        fields: &mut [u8],
        mut escape: impl FnMut(usize, u8),
    ) {
        let groups = fields.chunks_exact_mut(self.group_bytes()).zip(high.chunks(GROUP));
        for (group, (packed, high)) in groups.enumerate() {
            let mut fields = [0; GROUP];
            for (j, (field, &high)) in fields.iter_mut().zip(high).enumerate() {
                let code = codes[usize::from(self.exponent(high))];
                *field = self.field(high, code.unwrap_or(0));
                if code.is_none() {
                    escape(group * GROUP + j, high);
                }
            }
            self.pack(&fields, packed);
        }
    }

    /// Writes the fields of a group.
    fn pack(self, fields: &[u8; GROUP], out: &mut [u8]) {
        match self {
            Self::Exponent3 => {
                pack_fields(fields.map(|f| f & 3), 2, &mut out[..16]);
                pack_ones(fields.map(|f| f >> 2), &mut out[16..24]);
            }
            Self::Exponent4 | Self::Window4 => pack_fields(*fields, 4, &mut out[..32]),
            Self::Window5 => {
                pack_fields(fields.map(|f| f & 15), 4, &mut out[..32]);
                pack_ones(fields.map(|f| f >> 4), &mut out[32..40]);
            }
            Self::Half3 | Self::Window6 => {
                pack_fields(fields.map(|f| f & 15), 4, &mut out[..32]);
                pack_fields(fields.map(|f| f >> 4), 2, &mut out[32..48]);
            }
            Self::Window7 => {
                pack_fields(fields.map(|f| f & 15), 4, &mut out[..32]);
                pack_fields(fields.map(|f| f >> 4 & 3), 2, &mut out[32..48]);
                pack_ones(fields.map(|f| f >> 6), &mut out[48..56]);
            }
        }
    }

    fn exponent_counts(self, counts: &[u64; 256]) -> [u64; 256] {
        let mut exponents = [0; 256];
        for (high, count) in (0..=255).zip(counts) {
            exponents[usize::from(self.exponent(high))] += count;
        }
        exponents
    }

    /// The most frequent exponents, in ascending order; unused places repeat
    /// the last. Of integers, the least of the most frequent window.
    pub(super) fn choose_palette(self, counts: &[u64; 256]) -> [u8; 16] {
        if self.is_window() {
            let first = (i8::MIN..=i8::MAX).take(257 - self.n_codes());
            // The one nearest to the middle among equals.
            let middle = -(self.n_codes() as i32) / 2;
            let best = first.max_by_key(|&first| {
                (self.inside(first as u8, counts), -(i32::from(first) - middle).abs())
            });
            return [best.unwrap_or_default() as u8; 16];
        }
        let counts = self.exponent_counts(counts);
        let mut exponents: Vec<u8> = (0..=255).collect();
        exponents.sort_by_key(|&e| std::cmp::Reverse(counts[usize::from(e)]));
        exponents.truncate(self.n_codes());
        exponents.sort_unstable();
        let last = exponents[exponents.len() - 1];
        std::array::from_fn(|code| exponents.get(code).copied().unwrap_or(last))
    }

    /// How many elements a window that starts at `first` holds.
    fn inside(self, first: u8, counts: &[u64; 256]) -> u64 {
        (0..self.n_codes()).map(|code| counts[usize::from(first.wrapping_add(code as u8))]).sum()
    }

    pub(super) fn escape_rate(self, counts: &[u64; 256]) -> f64 {
        let palette = self.choose_palette(counts);
        if self.is_window() {
            let total: u64 = counts.iter().sum();
            return (total - self.inside(palette[0], counts)) as f64 / total.max(1) as f64;
        }
        let exponents = self.exponent_counts(counts);
        let total: u64 = exponents.iter().sum();
        let coded = palette[..self.n_codes()].iter();
        let inside: u64 = coded.map(|&e| exponents[usize::from(e)]).sum();
        (total - inside) as f64 / total.max(1) as f64
    }

    /// Reads the fields of a group.
    fn unpack(self, bytes: &[u8]) -> [u8; GROUP] {
        let join = |a: [u8; GROUP], b: [u8; GROUP], shift: u32| {
            std::array::from_fn(|j| a[j] | b[j] << shift)
        };
        match self {
            Self::Exponent3 => join(unpack_fields(&bytes[..16], 2), unpack_ones(&bytes[16..24]), 2),
            Self::Exponent4 | Self::Window4 => unpack_fields(&bytes[..32], 4),
            Self::Window5 => join(unpack_fields(&bytes[..32], 4), unpack_ones(&bytes[32..40]), 4),
            Self::Half3 | Self::Window6 => {
                join(unpack_fields(&bytes[..32], 4), unpack_fields(&bytes[32..48], 2), 4)
            }
            Self::Window7 => {
                let six = join(unpack_fields(&bytes[..32], 4), unpack_fields(&bytes[32..48], 2), 4);
                join(six, unpack_ones(&bytes[48..56]), 6)
            }
        }
    }
}

fn pack_fields(fields: [u8; GROUP], width: u32, out: &mut [u8]) {
    for (byte, out) in out.iter_mut().enumerate() {
        let parts = fields.iter().skip(byte).step_by(GROUP * width as usize / 8).enumerate();
        *out = parts.fold(0, |sum, (i, &field)| sum | field << (i as u32 * width));
    }
}

/// One-bit fields are a mask: bit `j` is field `j`.
fn pack_ones(fields: [u8; GROUP], out: &mut [u8]) {
    let mask = fields.iter().rev().fold(0u64, |mask, &field| mask << 1 | u64::from(field));
    out.copy_from_slice(&mask.to_le_bytes());
}

fn unpack_fields(bytes: &[u8], width: u32) -> [u8; GROUP] {
    std::array::from_fn(|j| {
        bytes[j % bytes.len()] >> ((j / bytes.len()) as u32 * width) & ((1 << width) - 1)
    })
}

fn unpack_ones(bytes: &[u8]) -> [u8; GROUP] {
    std::array::from_fn(|j| bytes[j / 8] >> (j % 8) & 1)
}

/// Portable version of [`crate::arch::unpack_highs`]; it defines the result.
pub(crate) fn unpack_highs(coding: Coding, palette: &[u8; 16], fields: &[u8], high: &mut [u8]) {
    let groups = fields.chunks_exact(coding.group_bytes()).zip(high.chunks_mut(GROUP));
    for (fields, high) in groups {
        for (high, field) in high.iter_mut().zip(coding.unpack(fields)) {
            *high = coding.high(field, palette);
        }
    }
}
