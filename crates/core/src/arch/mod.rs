//! Implementations by instruction set, and the choice between them.
//!
//! `all` defines the result. The functions here hand the bulk of the work to
//! the chosen instruction set and leave the rest to the caller.

pub mod all;
#[cfg(target_arch = "x86_64")]
mod x86_64;

mod rank_table;

pub(crate) use rank_table::RankTable;

use crate::coder::rans::{Cursor, DecodeTable, EncodeTable, LANES};
use crate::dtype::Dtype;
use crate::isa::Isa;
use crate::tile::{Order, Tile};

/// Encodes planes whose length is a multiple of 32, backwards.
pub(crate) fn encode_whole_steps(
    isa: Isa,
    states: &mut [u32; LANES],
    planes: &[&[u8]],
    tables: &[&EncodeTable],
    words: &mut [u16],
    next: &mut usize,
) {
    match isa {
        _ => {
            for end in (1..=planes[0].len() / LANES).rev().map(|step| step * LANES) {
                for (plane, table) in planes.iter().zip(tables).rev() {
                    all::rans::encode_step(states, &plane[end - LANES..end], table, words, next);
                }
            }
        }
    }
}

/// Decodes as many whole steps as the instruction set can without reading past
/// the words; returns the number of symbols of each plane.
pub(crate) fn decode_whole_steps(
    isa: Isa,
    cursor: &mut Cursor<'_>,
    tables: &[&DecodeTable],
    outs: &mut [&mut [u8]],
) -> usize {
    let _ = (isa, cursor, tables, outs);
    0
}

/// See [`crate::split::split_tile_with`].
pub(crate) fn split_tile(
    isa: Isa,
    dtype: Dtype,
    order: Order,
    tile: &Tile,
    source: &[u8],
    row_stride_bytes: usize,
    planes: &mut [u8],
) {
    let _ = isa;
    all::split::split_from(0, dtype, order, tile, source, row_stride_bytes, planes);
}

/// See [`crate::split::join_tile_with`].
pub(crate) fn join_tile(
    isa: Isa,
    dtype: Dtype,
    order: Order,
    tile: &Tile,
    planes: &[u8],
    target: &mut [u8],
    row_stride_bytes: usize,
) {
    let _ = isa;
    all::split::join_from(0, dtype, order, tile, planes, target, row_stride_bytes);
}
