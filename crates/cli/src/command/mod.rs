//! One file a subcommand.

pub(crate) mod bench_codec;
pub(crate) mod doctor;
