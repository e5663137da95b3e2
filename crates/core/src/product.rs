//! The product `y = x W^T` from any layout, with one arithmetic.
//!
//! Weights are widened to f32, integers after what [`crate::quantize`] makes of
//! them, activations are f32, and every multiplication is fused with its
//! addition. Each output has 16 accumulators that start at
//! zero: column `c` goes to accumulator `c % 16`, columns ascending. At the
//! end accumulator `j` takes `j + 8`, then `j + 4`, `j + 2` and `j + 1`.
//!
//! So the result depends on the weights, the activations and the shape alone:
//! not on layout, instruction set, number of threads or of tokens.

use std::ops::Range;

use rayon::prelude::*;

use crate::arch::{self, Inputs, LANES_PER_ROW};
use crate::error::DecodeError;
use crate::isa::Isa;
use crate::layout::{Body, FixedMatrix, Matrix, RansMatrix, Values, WeightType};
use crate::split::join_tile_with;
use crate::tile::{
    BLOCK, BLOCK_ELEMS, Order, STRIP_ELEMS, TILE_COLS, TILE_ELEMS, TILE_ROWS, Tile, Tiling,
};

/// Tokens that share one decoding of the weights.
const MAX_TOKENS: usize = 64;
/// Most rows that one task multiplies in linear order: bounds the accumulators
/// of very narrow matrices.
const MAX_RUN_ROWS: usize = 4096;
/// Rows of a dense matrix that one task multiplies.
const DENSE_ROWS: usize = 64;
/// The same for fixed-rate codes in fragment order: whole bands.
const FIXED_ROWS: usize = 64;
/// Rows and columns of integers that are dequantised before they are multiplied.
const PANEL: [usize; 2] = [BLOCK, 128];

impl Matrix {
    /// Multiplies: `y[t][r] = sum over c of x[t][c] * W[r][c]`.
    ///
    /// # Shapes and units
    ///
    /// | argument | length | unit |
    /// |---|---|---|
    /// | `x` | `tokens * cols` | activations |
    /// | `y` | `tokens * rows` | overwritten |
    ///
    /// # Errors
    ///
    /// [`DecodeError::Tile`] if a tile does not decode although its checksum
    /// was right: the record was made to deceive. [`DecodeError::Overflow`] if an
    /// integer stands for more than FP16 can hold.
    ///
    /// # Panics
    ///
    /// If the lengths do not fit, or the instruction set is not available.
    ///
    /// # Cost
    ///
    /// Reads the weights once for every 64 tokens, in parallel on the current
    /// rayon pool; each thread decodes at most four strips of 8,192 elements at
    /// a time.
    pub fn multiply_with(&self, isa: Isa, x: &[f32], y: &mut [f32]) -> Result<(), DecodeError> {
        assert!(isa.is_available(), "{isa:?} is not available on this machine");
        if self.rows == 0 {
            assert!(y.is_empty(), "a matrix without rows has no output");
            return Ok(());
        }
        let n_tokens = y.len() / self.rows;
        assert_eq!(y.len(), n_tokens * self.rows, "y is not a number of rows");
        assert_eq!(x.len(), n_tokens * self.cols, "x and y differ in tokens");
        if self.cols == 0 {
            y.fill(0.0);
            return Ok(());
        }
        let (xs, ys) = (x.chunks(MAX_TOKENS * self.cols), y.chunks_mut(MAX_TOKENS * self.rows));
        xs.zip(ys).try_for_each(|(x, y)| self.multiply_tokens(isa, x, y))?;
        self.check_overflow(isa, y)
    }

    /// Finds integers that FP16 cannot hold. Such a weight is infinite, and so
    /// every output it is a part of is infinite or not a number: as long as all
    /// are finite, there is none.
    fn check_overflow(&self, isa: Isa, y: &[f32]) -> Result<(), DecodeError> {
        if !self.may_overflow() {
            return Ok(());
        }
        let suspects = (0..self.rows)
            .filter(|row| y[*row..].iter().step_by(self.rows).any(|output| !output.is_finite()));
        let mut weights = vec![0.0; self.cols];
        for row in suspects {
            self.row_with(isa, row, &mut weights)?;
        }
        Ok(())
    }

    fn multiply_tokens(&self, isa: Isa, x: &[f32], y: &mut [f32]) -> Result<(), DecodeError> {
        let ranges = self.row_ranges();
        let parts: Vec<(Range<usize>, Vec<f32>)> = ranges
            .into_par_iter()
            .map(|rows| {
                let mut part = vec![0.0; rows.len() * (x.len() / self.cols)];
                self.multiply_rows(isa, x, rows.clone(), &mut part)?;
                Ok((rows, part))
            })
            .collect::<Result<_, DecodeError>>()?;
        for (rows, part) in parts {
            for (y, part) in y.chunks_mut(self.rows).zip(part.chunks(rows.len())) {
                y[rows.clone()].copy_from_slice(part);
            }
        }
        Ok(())
    }

    /// One row of weights, widened to f32: an embedding lookup.
    ///
    /// # Errors
    ///
    /// As [`Matrix::multiply_with`].
    ///
    /// # Panics
    ///
    /// If there is no such row, `out` is not `cols` long, or the instruction
    /// set is not available.
    ///
    /// # Cost
    ///
    /// Decodes the tiles the row crosses.
    pub fn row_with(&self, isa: Isa, row: usize, out: &mut [f32]) -> Result<(), DecodeError> {
        assert!(isa.is_available(), "{isa:?} is not available on this machine");
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.cols, "out is not a row");
        self.widen_row(isa, row, out)?;
        match out.iter().position(|weight| weight.is_infinite()) {
            Some(col) if self.weight == WeightType::I8 => Err(DecodeError::Overflow { row, col }),
            _ => Ok(()),
        }
    }

    fn widen_row(&self, isa: Isa, row: usize, out: &mut [f32]) -> Result<(), DecodeError> {
        let cols = self.cols;
        let weight = self.weight;
        let values = self.values(row..row + 1);
        let copy = |strip: &Tile, order: Order, planes: [&[u8]; 2], out: &mut [f32]| {
            let run = |index: usize| arch::all::product::widen(values, planes, index);
            match order {
                Order::Fragment => {
                    for index in 0..strip.n_elems() {
                        let (block, inside) = (index / BLOCK_ELEMS, index % BLOCK_ELEMS);
                        let (r, c) = crate::tile::fragment_position(inside);
                        if strip.row_start + r == row {
                            out[strip.col_start + block * BLOCK + c] = run(index);
                        }
                    }
                }
                Order::Linear => {
                    let first = (row * cols).max(strip.col_start);
                    let end = ((row + 1) * cols).min(strip.col_start + strip.cols);
                    for element in first..end {
                        out[element - row * cols] = run(element - strip.col_start);
                    }
                }
            }
        };
        match &self.body {
            Body::Dense(dense) => {
                let bytes = &dense.bytes[row * cols * weight.elem_bytes()..];
                if weight == WeightType::I8 {
                    arch::dequantise_row(isa, bytes, values.scales[0], out);
                    return Ok(());
                }
                for (c, out) in out.iter_mut().enumerate() {
                    *out = arch::all::product::widen_dense(weight, bytes, c);
                }
                Ok(())
            }
            body => {
                let strips = Strips::of(body);
                let order = strips.tiling().order();
                strips.for_each(isa, self.cols, row..row + 1, |strip, planes| {
                    let holds_row = order == Order::Linear
                        || (strip.row_start..strip.row_start + strip.rows).contains(&row);
                    if holds_row {
                        copy(strip, order, planes, out);
                    }
                })
            }
        }
    }

    /// Rows that one task multiplies: whole bands or rows of tiles where there are.
    fn row_ranges(&self) -> Vec<Range<usize>> {
        let step = match &self.body {
            Body::Dense(_) => DENSE_ROWS,
            Body::Fixed(fixed) if fixed.tiling().order() == Order::Fragment => FIXED_ROWS,
            body => match Strips::of(body).tiling().order() {
                Order::Fragment => TILE_ROWS,
                Order::Linear => (4 * TILE_ELEMS).div_ceil(self.cols).min(MAX_RUN_ROWS),
            },
        };
        (0..self.rows).step_by(step).map(|row| row..self.rows.min(row + step)).collect()
    }

    fn multiply_rows(
        &self,
        isa: Isa,
        x: &[f32],
        rows: Range<usize>,
        y: &mut [f32],
    ) -> Result<(), DecodeError> {
        match &self.body {
            Body::Dense(dense) => {
                let row_bytes = self.cols * self.weight.elem_bytes();
                let weights = &dense.bytes[rows.start * row_bytes..rows.end * row_bytes];
                if self.weight == WeightType::I8 {
                    multiply_integers(isa, self.values(rows), weights, x, self.cols, y);
                } else {
                    arch::multiply_dense(isa, self.weight, weights, x, self.cols, y);
                }
                Ok(())
            }
            body => {
                let strips = Strips::of(body);
                match strips.tiling().order() {
                    Order::Fragment if x.len() == self.cols => {
                        self.multiply_one(isa, &strips, x, rows, y)
                    }
                    Order::Fragment => self.multiply_several(isa, &strips, x, rows, y),
                    Order::Linear => self.multiply_runs(isa, &strips, x, rows, y),
                }
            }
        }
    }

    /// Fragment order, one token: sums stay in the order of the blocks.
    fn multiply_one(
        &self,
        isa: Isa,
        strips: &Strips<'_>,
        x: &[f32],
        rows: Range<usize>,
        y: &mut [f32],
    ) -> Result<(), DecodeError> {
        let mut sums = vec![[0.0; BLOCK_ELEMS]; rows.len() / BLOCK];
        match strips {
            Strips::Fixed(fixed) => {
                for (band, sums) in (rows.start / BLOCK..).zip(&mut sums) {
                    let values = self.values(band * BLOCK..(band + 1) * BLOCK);
                    arch::accumulate_band(isa, values, fixed.band(band), x, sums);
                }
            }
            Strips::Rans(_) => strips.for_each(isa, self.cols, rows.clone(), |strip, planes| {
                let x = &x[strip.col_start..strip.col_start + strip.cols];
                let sums = &mut sums[(strip.row_start - rows.start) / BLOCK];
                let values = self.values(strip.row_start..strip.row_start + BLOCK);
                arch::accumulate_blocks(isa, values, planes, x, sums);
            })?,
        }
        let indices = arch::accumulator_indices(isa, self.weight);
        for (sums, y) in sums.iter().zip(y.chunks_mut(BLOCK)) {
            for (y, indices) in y.iter_mut().zip(indices) {
                *y = arch::all::product::reduce(indices.map(|index| sums[usize::from(index)]));
            }
        }
        Ok(())
    }

    /// Fragment order, several tokens: strips become rows again, and are then
    /// multiplied as dense ones are.
    fn multiply_several(
        &self,
        isa: Isa,
        strips: &Strips<'_>,
        x: &[f32],
        rows: Range<usize>,
        y: &mut [f32],
    ) -> Result<(), DecodeError> {
        let (cols, weight, n_tokens) = (self.cols, self.weight, x.len() / self.cols);
        // [row][token]
        let mut sums = vec![[0.0; LANES_PER_ROW]; rows.len() * n_tokens];
        let mut weights = [0; STRIP_ELEMS * 2];
        strips.for_each(isa, cols, rows.clone(), |strip, planes| {
            // A fixed-rate chunk is narrower than a strip: sums would be loaded
            // and stored too often.
            let first_col = strip.col_start / TILE_COLS * TILE_COLS;
            let n_cols = TILE_COLS.min(cols - first_col);
            let row_bytes = n_cols * weight.elem_bytes();
            let weights = &mut weights[..BLOCK * row_bytes];
            let target = &mut weights[(strip.col_start - first_col) * weight.elem_bytes()..];
            join_tile_with(isa, weight.dtype(), Order::Fragment, strip, planes, target, row_bytes);
            if strip.col_start + strip.cols < first_col + n_cols {
                return;
            }
            let inputs = Inputs { x: &x[first_col..], stride: cols, n_cols };
            let first = (strip.row_start - rows.start) * n_tokens;
            let sums = &mut sums[first..first + BLOCK * n_tokens];
            if weight == WeightType::I8 {
                let values = self.values(strip.row_start..strip.row_start + BLOCK);
                accumulate_integers(isa, values, weights, inputs, n_tokens, sums);
            } else {
                arch::accumulate_rows(isa, weight, weights, inputs, n_tokens, sums);
            }
        })?;
        for (row, sums) in sums.chunks(n_tokens).enumerate() {
            for (y, sums) in y.chunks_mut(rows.len()).zip(sums) {
                y[row] = arch::all::product::reduce(*sums);
            }
        }
        Ok(())
    }

    /// Linear order: strips are runs of elements that cross rows anywhere.
    fn multiply_runs(
        &self,
        isa: Isa,
        strips: &Strips<'_>,
        x: &[f32],
        rows: Range<usize>,
        y: &mut [f32],
    ) -> Result<(), DecodeError> {
        let n_tokens = x.len() / self.cols;
        let mut sums = vec![[0.0; LANES_PER_ROW]; rows.len() * n_tokens];
        let cols = self.cols;
        strips.for_each(isa, cols, rows.clone(), |strip, planes| {
            let elements = strip.col_start..strip.col_start + strip.cols;
            let first_row = (elements.start / cols).max(rows.start);
            let end_row = elements.end.div_ceil(cols).min(rows.end);
            for row in first_row..end_row {
                let start = elements.start.max(row * cols);
                let end = elements.end.min((row + 1) * cols);
                let inside = start - elements.start..end - elements.start;
                let part = planes.map(|plane| plane.get(inside.clone()).unwrap_or_default());
                let values = self.values(row..row + 1);
                let col = start - row * cols;
                for (token, x) in x.chunks(cols).enumerate() {
                    let sums = &mut sums[token * rows.len() + row - rows.start];
                    let x = &x[col..col + part[0].len()];
                    arch::accumulate_run(isa, values, part, x, col % LANES_PER_ROW, sums);
                }
            }
        })?;
        for (y, sums) in y.iter_mut().zip(sums) {
            *y = arch::all::product::reduce(sums);
        }
        Ok(())
    }
}

/// Multiplies rows of row-major integers with one or more tokens.
fn multiply_integers(
    isa: Isa,
    values: Values<'_>,
    integers: &[u8],
    x: &[f32],
    cols: usize,
    y: &mut [f32],
) {
    let (n_rows, n_tokens) = (values.scales.len(), x.len() / cols);
    let inputs = Inputs { x, stride: cols, n_cols: cols };
    let mut sums = vec![[0.0; LANES_PER_ROW]; BLOCK.min(n_rows) * n_tokens];
    let blocks = values.scales.chunks(BLOCK).zip(integers.chunks(BLOCK * cols));
    for (block, (scales, integers)) in blocks.enumerate() {
        let sums = &mut sums[..scales.len() * n_tokens];
        sums.fill([0.0; LANES_PER_ROW]);
        let values = Values { scales, ..values };
        accumulate_integers(isa, values, integers, inputs, n_tokens, sums);
        for (row, sums) in (block * BLOCK..).zip(sums.chunks(n_tokens)) {
            for (y, sums) in y.chunks_mut(n_rows).zip(sums) {
                y[row] = arch::all::product::reduce(*sums);
            }
        }
    }
}

/// [`arch::accumulate_rows`] of at most 16 rows of integers, a panel at a time.
fn accumulate_integers(
    isa: Isa,
    values: Values<'_>,
    integers: &[u8],
    inputs: Inputs<'_>,
    n_tokens: usize,
    sums: &mut [[f32; LANES_PER_ROW]],
) {
    let mut panel = [0.0f32; PANEL[0] * PANEL[1]];
    for first in (0..inputs.n_cols).step_by(PANEL[1]) {
        let n_cols = PANEL[1].min(inputs.n_cols - first);
        let panel = &mut panel[..values.scales.len() * n_cols];
        let rows = integers.chunks(inputs.n_cols).zip(values.scales);
        for (panel, (row, scale)) in panel.chunks_mut(n_cols).zip(rows) {
            arch::dequantise_row(isa, &row[first..], *scale, panel);
        }
        let inputs = Inputs { x: &inputs.x[first..], n_cols, ..inputs };
        arch::accumulate_floats(isa, panel, inputs, n_tokens, sums);
    }
}

/// A matrix that is decoded strip by strip.
enum Strips<'a> {
    Fixed(&'a FixedMatrix),
    Rans(&'a RansMatrix),
}

impl<'a> Strips<'a> {
    fn new(body: &'a Body) -> Option<Self> {
        match body {
            Body::Dense(_) => None,
            Body::Fixed(fixed) => Some(Self::Fixed(fixed)),
            Body::Rans(rans) => Some(Self::Rans(rans)),
        }
    }

    fn of(body: &'a Body) -> Self {
        Self::new(body).expect("a layout that is decoded")
    }

    fn tiling(&self) -> &Tiling {
        match self {
            Self::Fixed(fixed) => fixed.tiling(),
            Self::Rans(rans) => rans.tiling(),
        }
    }

    /// Decodes the strips that hold any of `rows`, of `cols` elements each.
    /// Those of the same rows come with columns ascending, those of linear
    /// order with elements ascending.
    fn for_each(
        &self,
        isa: Isa,
        cols: usize,
        rows: Range<usize>,
        mut sink: impl FnMut(&Tile, [&[u8]; 2]),
    ) -> Result<(), DecodeError> {
        let linear_tiles = rows.start * cols / TILE_ELEMS..(rows.end * cols).div_ceil(TILE_ELEMS);
        match (self, self.tiling().order()) {
            (Self::Fixed(fixed), Order::Linear) => fixed.for_each_chunk(isa, linear_tiles, sink),
            (Self::Fixed(fixed), Order::Fragment) => {
                let bands = rows.start / BLOCK..rows.end.div_ceil(BLOCK);
                fixed.for_each_chunk(isa, bands, sink);
            }
            // Tiles decoded together give their strips in turn, so in linear
            // order, where a row goes on in the next tile, one at a time.
            (Self::Rans(rans), Order::Linear) => {
                for tile in linear_tiles {
                    rans.for_each_strip(isa, tile..tile + 1, |_, s, p| sink(s, p))?;
                }
            }
            (Self::Rans(rans), Order::Fragment) => {
                let across = self.tiling().tiles_across();
                let tiles = rows.start / TILE_ROWS * across..rows.end.div_ceil(TILE_ROWS) * across;
                rans.for_each_strip(isa, tiles, |_, strip, planes| sink(strip, planes))?;
            }
        }
        Ok(())
    }
}

/// The element type of a strip's planes; F32 is never in strips.
impl WeightType {
    pub(crate) const fn is_half(self) -> bool {
        matches!(self, Self::F16)
    }
}
