//! The code of an exponent, and how the fields of 64 elements are packed.
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
}

impl Coding {
    /// The variant of fewest bits for elements with these counts of high
    /// bytes, `None` if none is smaller than dense.
    pub(super) fn smallest(weight: WeightType, counts: &[u64; 256]) -> Option<Self> {
        let size = |coding: &Self| {
            let fields = coding.group_bytes() as f64 * 8.0 / GROUP as f64;
            fields + 8.0 + ESCAPE_BITS * coding.escape_rate(counts)
        };
        (Self::candidates(weight).iter().copied())
            .min_by(|a, b| size(a).total_cmp(&size(b)))
            .filter(|coding| size(coding) < 16.0)
    }

    const fn candidates(weight: WeightType) -> &'static [Self] {
        match weight {
            WeightType::Bf16 => &[Self::Exponent3, Self::Exponent4],
            WeightType::F16 => &[Self::Half3],
            WeightType::F32 => &[],
        }
    }

    /// Exponents that have a code.
    pub(super) const fn n_codes(self) -> usize {
        match self {
            Self::Exponent3 | Self::Half3 => 8,
            Self::Exponent4 => 16,
        }
    }

    /// Bytes that the fields of a group take.
    pub(crate) const fn group_bytes(self) -> usize {
        match self {
            Self::Exponent3 => 24,
            Self::Exponent4 => 32,
            Self::Half3 => 48,
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
            _ => palette[field as usize],
        }
    }

    /// The code of each exponent of a palette.
    pub(super) fn codes(self, palette: &[u8; 16]) -> [Option<u8>; 256] {
        let mut codes = [None; 256];
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
            Self::Exponent4 => pack_fields(*fields, 4, &mut out[..32]),
            Self::Half3 => {
                pack_fields(fields.map(|f| f & 15), 4, &mut out[..32]);
                pack_fields(fields.map(|f| f >> 4), 2, &mut out[32..48]);
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

    /// The most frequent exponents, in ascending order; unused places repeat the last.
    pub(super) fn choose_palette(self, counts: &[u64; 256]) -> [u8; 16] {
        let counts = self.exponent_counts(counts);
        let mut exponents: Vec<u8> = (0..=255).collect();
        exponents.sort_by_key(|&e| std::cmp::Reverse(counts[usize::from(e)]));
        exponents.truncate(self.n_codes());
        exponents.sort_unstable();
        let last = exponents[exponents.len() - 1];
        std::array::from_fn(|code| exponents.get(code).copied().unwrap_or(last))
    }

    pub(super) fn escape_rate(self, counts: &[u64; 256]) -> f64 {
        let palette = self.choose_palette(counts);
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
            Self::Exponent4 => unpack_fields(&bytes[..32], 4),
            Self::Half3 => {
                join(unpack_fields(&bytes[..32], 4), unpack_fields(&bytes[32..48], 2), 4)
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
