//! Portable code. It defines the result; every other module must agree with
//! it bit for bit.

#![forbid(unsafe_code)]

pub mod product;
pub mod rans;
pub mod split;
