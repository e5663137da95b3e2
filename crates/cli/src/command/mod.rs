//! One file a subcommand.

pub(crate) mod bench_codec;
pub(crate) mod bench_cuda;
pub(crate) mod bench_matmul;
pub(crate) mod bench_stream;
pub(crate) mod compare;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod inspect;
pub(crate) mod pack;
pub(crate) mod quantize;
pub(crate) mod run;
#[cfg(feature = "train")]
pub(crate) mod train;
pub(crate) mod unpack;
pub(crate) mod verify;
