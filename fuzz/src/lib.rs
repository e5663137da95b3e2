//! What the fuzz targets check, one module each.
//!
//! A `check` takes any bytes and panics if a promise of the library is broken.
//! The fuzzer calls it with bytes of its own making, `tests/corpus.rs` with
//! those of the committed seeds.

#![forbid(unsafe_code)]

pub mod isa_agree;
pub mod record;
pub mod round_trip;
pub mod safetensors_header;
pub mod seeds;

use arbitrary::{Result, Unstructured};
use transom::Isa;

/// The instruction sets of this machine, scalar first.
#[must_use]
pub fn available_isas() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
}

/// `n_bytes` bytes in one of a few shapes: what is left of the input over and
/// over, or draws from a short list of bytes, rarer ones less often.
///
/// # Errors
///
/// Those of [`Unstructured`].
pub fn content(input: &mut Unstructured<'_>, n_bytes: usize) -> Result<Vec<u8>> {
    let (kind, seed) = (input.int_in_range(0..=2u8)?, u64::from(input.arbitrary::<u32>()?) | 1);
    let bytes = match input.bytes(input.len())? {
        [] => &[0],
        bytes => bytes,
    };
    let mut state = seed;
    let mut draw = || {
        // Knuth's multiplier; the high bits are good enough to pick symbols.
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    Ok((0..n_bytes)
        .map(|i| match kind {
            0 => bytes[i % bytes.len()],
            // The index has a geometric distribution: half the draws are the first byte.
            1 => bytes[draw().trailing_ones() as usize % bytes.len()],
            _ => bytes[draw() as usize % bytes.len()],
        })
        .collect())
}
