//! Where the elements of a tensor lie: tiles, and the order inside a tile.

/// Rows of a full tile.
pub const TILE_ROWS: usize = 128;
/// Columns of a full tile.
pub const TILE_COLS: usize = 512;
/// Elements of a full tile.
pub const TILE_ELEMS: usize = TILE_ROWS * TILE_COLS;
/// Side of a block, the unit of the fragment order.
pub const BLOCK: usize = 16;
/// Elements of a block.
pub const BLOCK_ELEMS: usize = BLOCK * BLOCK;

/// Most elements of a strip, the part of a tile that is decoded at a time.
pub const STRIP_ELEMS: usize = BLOCK * TILE_COLS;

/// The order of elements inside a tile (spec section 5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Row-major, over the whole tensor; a tile is 65,536 consecutive elements.
    Linear,
    /// 16x16 blocks, row by row of blocks; inside a block the order in which
    /// the lanes of `mma.m16n8k16` hold an A fragment. For matrices whose
    /// sides are multiples of 16.
    Fragment,
}

/// How a tensor is cut into tiles. A function of the shape alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    order: Order,
    /// 1 in linear order.
    rows: usize,
    /// All elements in linear order.
    cols: usize,
}

/// One tile: a rectangle of the matrix, or in linear order a run of elements
/// seen as one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tile {
    /// First row.
    pub row_start: usize,
    /// First column; the first element in linear order.
    pub col_start: usize,
    /// Rows, 1 in linear order.
    pub rows: usize,
    /// Columns; the number of elements in linear order.
    pub cols: usize,
}

impl Tile {
    /// Number of elements.
    #[must_use]
    pub const fn n_elems(&self) -> usize {
        self.rows * self.cols
    }

    /// The strips of the tile, in order: 16 rows each, or in linear order at
    /// most 8,192 elements. Elements of a strip are consecutive in the tile,
    /// and a strip is a tile in itself.
    pub fn strips(&self, order: Order) -> impl ExactSizeIterator<Item = Self> + use<> {
        let tile = *self;
        let n_strips = match order {
            Order::Linear => tile.cols.div_ceil(STRIP_ELEMS),
            Order::Fragment => tile.rows / BLOCK,
        };
        (0..n_strips).map(move |strip| match order {
            Order::Linear => Self {
                col_start: tile.col_start + strip * STRIP_ELEMS,
                cols: STRIP_ELEMS.min(tile.cols - strip * STRIP_ELEMS),
                ..tile
            },
            Order::Fragment => {
                Self { row_start: tile.row_start + strip * BLOCK, rows: BLOCK, ..tile }
            }
        })
    }
}

impl Tiling {
    /// The tiling of a tensor of this shape, or `None` if the number of
    /// elements does not fit a `usize`.
    ///
    /// A matrix with both sides positive multiples of 16 is cut into tiles of
    /// 128 x 512 in fragment order, everything else into runs of 65,536.
    #[must_use]
    pub fn of(shape: &[usize]) -> Option<Self> {
        let n_elems = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        // A product with a zero in it must not hide an overflow before it.
        Some(match *shape {
            [rows, cols] if n_elems > 0 && rows % BLOCK == 0 && cols % BLOCK == 0 => {
                Self { order: Order::Fragment, rows, cols }
            }
            _ => Self { order: Order::Linear, rows: 1, cols: n_elems },
        })
    }

    /// The order inside each tile.
    #[must_use]
    pub const fn order(&self) -> Order {
        self.order
    }

    /// Number of elements of the tensor.
    #[must_use]
    pub const fn n_elems(&self) -> usize {
        self.rows * self.cols
    }

    /// Columns of the tiled rectangle: the distance, in elements, from an
    /// element to the one below it.
    #[must_use]
    pub const fn row_stride(&self) -> usize {
        self.cols
    }

    const fn tile_sides(&self) -> (usize, usize) {
        match self.order {
            Order::Linear => (1, TILE_ELEMS),
            Order::Fragment => (TILE_ROWS, TILE_COLS),
        }
    }

    /// Tiles from left to right.
    #[must_use]
    pub const fn tiles_across(&self) -> usize {
        self.cols.div_ceil(self.tile_sides().1)
    }

    /// Tiles from top to bottom.
    #[must_use]
    pub const fn tiles_down(&self) -> usize {
        if self.cols == 0 { 0 } else { self.rows.div_ceil(self.tile_sides().0) }
    }

    /// Number of tiles; 0 for an empty tensor.
    #[must_use]
    pub const fn n_tiles(&self) -> usize {
        self.tiles_across() * self.tiles_down()
    }

    /// Tile `index`, counted row-major.
    ///
    /// # Panics
    ///
    /// If `index` is not below [`Tiling::n_tiles`].
    #[must_use]
    pub fn tile(&self, index: usize) -> Tile {
        assert!(index < self.n_tiles(), "tile {index} of {}", self.n_tiles());
        let (tile_rows, tile_cols) = self.tile_sides();
        let row_start = index / self.tiles_across() * tile_rows;
        let col_start = index % self.tiles_across() * tile_cols;
        Tile {
            row_start,
            col_start,
            rows: tile_rows.min(self.rows - row_start),
            cols: tile_cols.min(self.cols - col_start),
        }
    }
}

/// Row and column, inside its block, of element `index` in fragment order.
///
/// Element `index = 32 * i + lane` is register element `i` of lane `lane` in
/// the A fragment of `mma.m16n8k16` (PTX ISA, "Matrix fragments for
/// mma.m16n8k16"): rows `lane / 4` and eight below, columns
/// `2 * (lane % 4)`, its neighbour, and the same eight to the right.
#[must_use]
pub const fn fragment_position(index: usize) -> (usize, usize) {
    let (i, lane) = (index / 32, index % 32);
    let row = lane / 4 + 8 * (i >> 1 & 1);
    let col = lane % 4 * 2 + (i & 1) + 8 * (i >> 2);
    (row, col)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fragment_order_visits_every_position_of_a_block_once() {
        let mut seen = [[false; BLOCK]; BLOCK];
        for index in 0..BLOCK_ELEMS {
            let (row, col) = fragment_position(index);
            assert!(!std::mem::replace(&mut seen[row][col], true));
        }
        assert!(seen.iter().flatten().all(|&s| s));
    }

    #[test]
    fn tiles_cover_every_shape_exactly() {
        for shape in
            [vec![], vec![0], vec![1], vec![65_536], vec![65_537], vec![16, 16], vec![144, 528]]
                .into_iter()
                .chain([vec![17, 16], vec![0, 16], vec![256, 1024], vec![16, 0], vec![3, 5, 7]])
        {
            let tiling = Tiling::of(&shape).unwrap();
            let n_elems: usize = shape.iter().product();
            assert_eq!(tiling.n_elems(), n_elems, "{shape:?}");
            let covered: usize = (0..tiling.n_tiles()).map(|t| tiling.tile(t).n_elems()).sum();
            assert_eq!(covered, n_elems, "{shape:?}");
        }
    }

    #[test]
    fn a_shape_whose_size_overflows_is_refused() {
        assert_eq!(Tiling::of(&[usize::MAX, 2]), None);
        assert_eq!(Tiling::of(&[usize::MAX, 2, 0]), None);
    }
}
