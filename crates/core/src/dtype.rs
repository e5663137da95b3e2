//! Element types and how each one splits into byte planes.

/// The type of a tensor's elements, as far as the codec distinguishes it.
///
/// Everything the codec has no scheme for (F32, F64, wide integers, booleans,
/// types this build has never heard of) is [`Dtype::Opaque`]: a sequence of
/// bytes that is stored as it is and checksummed. (Spec section 4.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// Bytes without further structure; one element is one byte.
    Opaque,
    /// bfloat16.
    Bf16,
    /// IEEE 754 half precision.
    F16,
    /// 8-bit float, 4 exponent and 3 mantissa bits, no infinities.
    F8E4M3,
    /// 8-bit float, 5 exponent and 2 mantissa bits.
    F8E5M2,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 8-bit integer.
    U8,
}

impl Dtype {
    /// Every type, in the order of the codes.
    pub const ALL: [Self; 7] =
        [Self::Opaque, Self::Bf16, Self::F16, Self::F8E4M3, Self::F8E5M2, Self::I8, Self::U8];

    /// The type a safetensors header names. Unknown names are [`Dtype::Opaque`].
    #[must_use]
    pub fn from_safetensors(name: &str) -> Self {
        Self::ALL.into_iter().find(|d| d.name() == name).unwrap_or(Self::Opaque)
    }

    /// The name in a safetensors header, `"opaque"` for [`Dtype::Opaque`].
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Opaque => "opaque",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
            Self::I8 => "I8",
            Self::U8 => "U8",
        }
    }

    /// The code in a record header (spec section 3.3).
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The type with this code, if there is one.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// Bytes of one element; also the number of byte planes it splits into.
    #[must_use]
    pub const fn elem_bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            _ => 1,
        }
    }

    /// Whether plane `plane` may be entropy-coded (spec section 4).
    ///
    /// Plane 0 holds the high byte. A BF16 element is rotated left by one bit
    /// first, so that its high byte is the exponent; what is left, mantissa
    /// and sign, has nothing to gain and is always stored as it is.
    #[must_use]
    pub const fn is_codable(self, plane: usize) -> bool {
        match self {
            Self::Opaque => false,
            Self::Bf16 => plane == 0,
            Self::F16 => plane < 2,
            _ => plane == 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_stable_and_names_round_trip() {
        for (code, dtype) in Dtype::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(dtype.code()), code);
            assert_eq!(Dtype::from_code(dtype.code()), Some(dtype));
            assert_eq!(Dtype::from_safetensors(dtype.name()), dtype);
        }
        assert_eq!(Dtype::from_code(7), None);
        assert_eq!(Dtype::from_safetensors("F32"), Dtype::Opaque);
        assert_eq!(Dtype::from_safetensors("F6_E3M2"), Dtype::Opaque);
    }
}
