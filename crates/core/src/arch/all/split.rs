//! Split and join, element by element.

use crate::dtype::Dtype;
use crate::tile::{BLOCK, BLOCK_ELEMS, Order, Tile, fragment_position};

/// Byte offset, from the tile's first element, of element `index` of the tile.
fn source_offset(
    dtype: Dtype,
    order: Order,
    tile: &Tile,
    row_stride_bytes: usize,
    index: usize,
) -> usize {
    match order {
        Order::Linear => index * dtype.elem_bytes(),
        Order::Fragment => {
            let (block, inside) = (index / BLOCK_ELEMS, index % BLOCK_ELEMS);
            let blocks_across = tile.cols / BLOCK;
            let (row, col) = fragment_position(inside);
            let row = block / blocks_across * BLOCK + row;
            let col = block % blocks_across * BLOCK + col;
            row * row_stride_bytes + col * dtype.elem_bytes()
        }
    }
}

/// Splits elements `first..` of a tile; see [`crate::split::split_tile_with`].
pub(crate) fn split_from(
    first: usize,
    dtype: Dtype,
    order: Order,
    tile: &Tile,
    source: &[u8],
    row_stride_bytes: usize,
    planes: &mut [u8],
) {
    let n = tile.n_elems();
    for index in first..n {
        let at = source_offset(dtype, order, tile, row_stride_bytes, index);
        if dtype.elem_bytes() == 1 {
            planes[index] = source[at];
            continue;
        }
        let word = u16::from_le_bytes([source[at], source[at + 1]]);
        let [high, low] = match dtype {
            Dtype::Bf16 => word.rotate_left(1),
            _ => word,
        }
        .to_be_bytes();
        planes[index] = high;
        planes[n + index] = low;
    }
}

/// Joins elements `first..` of a tile; see [`crate::split::join_tile_with`].
pub(crate) fn join_from(
    first: usize,
    dtype: Dtype,
    order: Order,
    tile: &Tile,
    planes: [&[u8]; 2],
    target: &mut [u8],
    row_stride_bytes: usize,
) {
    for index in first..tile.n_elems() {
        let at = source_offset(dtype, order, tile, row_stride_bytes, index);
        if dtype.elem_bytes() == 1 {
            target[at] = planes[0][index];
            continue;
        }
        let word = u16::from_be_bytes([planes[0][index], planes[1][index]]);
        let word = match dtype {
            Dtype::Bf16 => word.rotate_right(1),
            _ => word,
        };
        target[at..at + 2].copy_from_slice(&word.to_le_bytes());
    }
}
