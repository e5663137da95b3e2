//! Vector implementations for x86-64.

pub(super) mod avx2;
pub(super) mod avx512;
mod blocks;
pub(super) mod product_avx2;
pub(super) mod product_avx512;
mod streams;
