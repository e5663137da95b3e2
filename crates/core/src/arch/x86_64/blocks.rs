//! What the vector versions of split and join have in common: the walk over
//! blocks, and the loops over linear runs, which the compiler vectorises.

/// Defines `split_tile` and `join_tile` of an instruction set, which has
/// `split_blocks`, `join_blocks`, `split_byte_blocks` and `join_byte_blocks`.
macro_rules! split_and_join {
    ($features:literal) => {
        /// Splits the first elements of a tile; returns how many.
        ///
        /// # Safety
        ///
        /// The instruction set is available.
        #[target_feature(enable = $features)]
        pub(crate) unsafe fn split_tile(
            dtype: Dtype,
            order: Order,
            tile: &Tile,
            source: &[u8],
            row_stride_bytes: usize,
            planes: &mut [u8],
        ) -> usize {
            match (dtype, order) {
                (Dtype::Bf16, Order::Fragment) => {
                    split_blocks::<true>(tile, source, row_stride_bytes, planes)
                }
                (Dtype::F16, Order::Fragment) => {
                    split_blocks::<false>(tile, source, row_stride_bytes, planes)
                }
                (_, Order::Fragment) => split_byte_blocks(tile, source, row_stride_bytes, planes),
                (Dtype::Bf16, Order::Linear) => split_run::<true>(tile.n_elems(), source, planes),
                (Dtype::F16, Order::Linear) => split_run::<false>(tile.n_elems(), source, planes),
                (_, Order::Linear) => {
                    planes.copy_from_slice(&source[..planes.len()]);
                    planes.len()
                }
            }
        }

        /// Joins the first elements of a tile; returns how many.
        ///
        /// # Safety
        ///
        /// The instruction set is available.
        #[target_feature(enable = $features)]
        pub(crate) unsafe fn join_tile(
            dtype: Dtype,
            order: Order,
            tile: &Tile,
            planes: [&[u8]; 2],
            target: &mut [u8],
            row_stride_bytes: usize,
        ) -> usize {
            match (dtype, order) {
                (Dtype::Bf16, Order::Fragment) => {
                    join_blocks::<true>(tile, planes, target, row_stride_bytes)
                }
                (Dtype::F16, Order::Fragment) => {
                    join_blocks::<false>(tile, planes, target, row_stride_bytes)
                }
                (_, Order::Fragment) => join_byte_blocks(tile, planes[0], target, row_stride_bytes),
                (Dtype::Bf16, Order::Linear) => join_run::<true>(tile.n_elems(), planes, target),
                (Dtype::F16, Order::Linear) => join_run::<false>(tile.n_elems(), planes, target),
                (_, Order::Linear) => {
                    target[..planes[0].len()].copy_from_slice(planes[0]);
                    planes[0].len()
                }
            }
        }
    };
}
pub(super) use split_and_join;

use crate::tile::{BLOCK, BLOCK_ELEMS, Tile};

/// The halves of every block, eight rows each: byte offset of the first row
/// within the matrix, and index of the first element of the half's left
/// quarter. Its right quarter is 128 elements on.
///
/// Calls `f(offset, at)` for each; every row of 16 elements at `offset` plus
/// up to seven strides is inside the first `len` bytes.
///
/// # Panics
///
/// If the tile does not fit `len` bytes.
#[inline(always)]
pub(super) fn for_each_half(
    tile: &Tile,
    elem_bytes: usize,
    row_stride_bytes: usize,
    len: usize,
    mut f: impl FnMut(usize, usize),
) {
    let last_row = (tile.rows - 1).checked_mul(row_stride_bytes).expect("a row in memory");
    assert!(
        len.checked_sub(last_row) >= Some(tile.cols * elem_bytes),
        "memory ends before the tile"
    );
    let mut at = 0;
    for row in (0..tile.rows / BLOCK).map(|r| r * BLOCK * row_stride_bytes) {
        for col in (0..tile.cols / BLOCK).map(|c| c * BLOCK * elem_bytes) {
            f(row + col, at);
            f(row + col + 8 * row_stride_bytes, at + 64);
            at += BLOCK_ELEMS;
        }
    }
}

/// Splits a run of elements of two bytes; BF16 (`ROTATE`) rotates them first.
#[inline(always)]
pub(super) fn split_run<const ROTATE: bool>(n: usize, source: &[u8], planes: &mut [u8]) -> usize {
    let (high, low) = planes.split_at_mut(n);
    let (words, _) = source[..2 * n].as_chunks::<2>();
    for ((word, high), low) in words.iter().zip(high).zip(low) {
        let word = u16::from_le_bytes(*word);
        let word = if ROTATE { word.rotate_left(1) } else { word };
        *high = (word >> 8) as u8;
        *low = word as u8;
    }
    n
}

/// Joins a run of elements of two bytes; BF16 (`ROTATE`) rotates them back.
#[inline(always)]
pub(super) fn join_run<const ROTATE: bool>(
    n: usize,
    planes: [&[u8]; 2],
    target: &mut [u8],
) -> usize {
    let (words, _) = target[..2 * n].as_chunks_mut::<2>();
    for ((word, high), low) in words.iter_mut().zip(planes[0]).zip(planes[1]) {
        let joined = u16::from_be_bytes([*high, *low]);
        let joined = if ROTATE { joined.rotate_right(1) } else { joined };
        *word = joined.to_le_bytes();
    }
    n
}
