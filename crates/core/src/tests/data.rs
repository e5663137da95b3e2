//! Tensors to test with, the same in every run.

/// Numbers that look random (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// At most `max`.
    pub fn up_to(&mut self, max: usize) -> usize {
        (self.next() % (max as u64 + 1)) as usize
    }
}

/// Every byte equally likely.
pub fn noise(seed: u64, n: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    (0..n).map(|_| (random.next() >> 56) as u8).collect()
}

/// Bytes around `centre`, each further away half as likely, as exponents are.
pub fn peak(seed: u64, centre: u8, n: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    (0..n)
        .map(|_| {
            let bits = random.next();
            let distance = (bits >> 8).trailing_ones() as u8;
            if bits & 1 == 1 {
                centre.wrapping_sub(distance)
            } else {
                centre.wrapping_add(distance)
            }
        })
        .collect()
}

/// Bytes whose entropy is around 6 bits, all 256 of them used: too many for
/// the tables that fit vector registers.
pub fn wide(seed: u64, n: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    // The product of two uniform numbers is uneven over the whole range.
    (0..n).map(|_| (((random.next() >> 56) * (random.next() >> 56)) >> 8) as u8).collect()
}

/// BF16 or FP16 elements of these high and low bytes.
pub fn f16(high: &[u8], low: &[u8]) -> Vec<u8> {
    high.iter().zip(low).flat_map(|(&high, &low)| [low, high]).collect()
}

/// BF16 elements with these exponents and any sign and mantissa.
pub fn bf16(seed: u64, exponents: &[u8]) -> Vec<u8> {
    let rest = noise(seed, exponents.len());
    (exponents.iter().zip(rest))
        .flat_map(|(&exponent, rest)| [exponent << 7 | rest >> 1, exponent >> 1 | rest << 7])
        .collect()
}

/// BF16 elements like those of trained weights.
pub fn weights(seed: u64, n: usize) -> Vec<u8> {
    bf16(seed, &peak(seed + 1, 120, n))
}
