//! One file a subcommand.

pub(crate) mod bench_codec;
pub(crate) mod bench_matmul;
pub(crate) mod doctor;
