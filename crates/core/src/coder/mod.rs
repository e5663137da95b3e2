//! The entropy coder: symbols of a tile <-> lane states and words.

pub mod rans;
