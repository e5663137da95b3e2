//! The transform: elements of a tile <-> byte planes in tile order.
//!
//! An element of two bytes splits into a plane of high bytes and a plane of
//! low bytes. A BF16 element `s eeeeeeee mmmmmmm` is rotated left by one bit
//! first: the high byte is then the exponent, the low byte `mmmmmmm s`. Every
//! bit pattern survives, because a rotation and a regrouping lose nothing.
//! (Spec section 4.)

#![forbid(unsafe_code)]

use crate::arch;
use crate::dtype::Dtype;
use crate::isa::Isa;
use crate::tile::{Order, Tile};

/// Splits the elements of one tile into planes.
///
/// # Shapes and units
///
/// | argument | what it is |
/// |---|---|
/// | `source` | bytes of the matrix, row-major, from the tile's first element on |
/// | `row_stride_bytes` | from one row of `source` to the next; not used in linear order |
/// | `planes` | `elem_bytes * n_elems` bytes: plane 0, then plane 1, each in tile order |
///
/// # Panics
///
/// If `planes` has another length or `source` ends before the tile does.
pub fn split_tile_with(
    isa: Isa,
    dtype: Dtype,
    order: Order,
    tile: &Tile,
    source: &[u8],
    row_stride_bytes: usize,
    planes: &mut [u8],
) {
    assert_eq!(planes.len(), tile.n_elems() * dtype.elem_bytes(), "planes differ from the tile");
    assert!(isa.is_available(), "{isa:?} is not available on this machine");
    arch::split_tile(isa, dtype, order, tile, source, row_stride_bytes, planes);
}

/// Joins planes into the elements of one tile: the opposite of [`split_tile_with`].
///
/// `planes` are plane 0 and plane 1; plane 1 is empty for elements of one byte.
///
/// # Panics
///
/// If a plane has another length or `target` ends before the tile does.
pub fn join_tile_with(
    isa: Isa,
    dtype: Dtype,
    order: Order,
    tile: &Tile,
    planes: [&[u8]; 2],
    target: &mut [u8],
    row_stride_bytes: usize,
) {
    let n = tile.n_elems();
    let lens = [n, n * (dtype.elem_bytes() - 1)];
    assert_eq!(planes.map(<[u8]>::len), lens, "planes differ from the tile");
    assert!(isa.is_available(), "{isa:?} is not available on this machine");
    arch::join_tile(isa, dtype, order, tile, planes, target, row_stride_bytes);
}
