//! Chores of this repository: `cargo xtask <verb>`.

fn main() {}
