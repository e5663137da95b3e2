//! AVX2.

use crate::coder::rans::{DecodeTable, Stream};
use crate::dtype::Dtype;
use crate::tile::{Order, Tile};

pub(crate) unsafe fn decode_whole_steps(_: &[&DecodeTable], _: &mut [Stream<'_, '_, '_>]) -> usize {
    0
}
pub(crate) unsafe fn split_tile(
    _: Dtype,
    _: Order,
    _: &Tile,
    _: &[u8],
    _: usize,
    _: &mut [u8],
) -> usize {
    0
}
pub(crate) unsafe fn join_tile(
    _: Dtype,
    _: Order,
    _: &Tile,
    _: [&[u8]; 2],
    _: &mut [u8],
    _: usize,
) -> usize {
    0
}
