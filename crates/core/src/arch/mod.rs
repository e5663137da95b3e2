//! Implementations by instruction set, and the choice between them.
//!
//! `all` defines the result. The functions here hand the bulk of the work to
//! the chosen instruction set and leave the rest to the caller.

pub mod all;
pub(crate) mod rank_table;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub(crate) use rank_table::{EncodeRanks, RankTable};

use crate::coder::rans::{DecodeTable, EncodeTable, LANES, MAX_STREAMS, Stream};
use crate::dtype::Dtype;
use crate::isa::Isa;
use crate::layout::{Band, CHUNK_ELEMS, Coding, Values, WeightType};
use crate::tile::{BLOCK, BLOCK_ELEMS, Order, Tile};

/// Encodes planes whose length is a multiple of 32, backwards. False if a
/// symbol has no frequency. The instruction set is available.
#[must_use]
pub(crate) fn encode_whole_steps(
    isa: Isa,
    states: &mut [u32; LANES],
    planes: &[&[u8]],
    tables: &[&EncodeTable],
    words: &mut [u16],
    next: &mut usize,
) -> bool {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set is available.
        Isa::Avx512 => unsafe {
            x86_64::avx512::encode_whole_steps(states, planes, tables, words, next)
        },
        // AVX2 gains nothing here: dividing and gathering cost what they save.
        _ => (1..=planes[0].len() / LANES).rev().map(|step| step * LANES).all(|end| {
            planes.iter().zip(tables).rev().all(|(plane, table)| {
                all::rans::encode_step(states, &plane[end - LANES..end], table, words, next)
            })
        }),
    }
}

/// Decodes as many whole steps of each stream as it can; returns how many
/// symbols of each plane of it that were. The instruction set is available and
/// all slices have one length.
pub(crate) fn decode_whole_steps(
    isa: Isa,
    tables: &[&DecodeTable],
    streams: &mut [Stream<'_, '_, '_>],
) -> [usize; MAX_STREAMS] {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set is available, the slices have one length.
        Isa::Avx512 => unsafe {
            [x86_64::avx512::decode_whole_steps(tables, streams); MAX_STREAMS]
        },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            let mut done = [0; MAX_STREAMS];
            for (done, stream) in done.iter_mut().zip(streams) {
                // SAFETY: the instruction set is available, the slices have one length.
                *done = unsafe { x86_64::avx2::decode_whole_steps(tables, stream) };
            }
            done
        }
        _ => {
            let _ = (tables, streams);
            [0; MAX_STREAMS]
        }
    }
}

/// See [`crate::split::split_tile_with`], which has checked `planes`.
pub(crate) fn split_tile(
    isa: Isa,
    dtype: Dtype,
    order: Order,
    tile: &Tile,
    source: &[u8],
    row_stride_bytes: usize,
    planes: &mut [u8],
) {
    let done = match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set is available.
        Isa::Avx512 => unsafe {
            x86_64::avx512::split_tile(dtype, order, tile, source, row_stride_bytes, planes)
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set is available.
        Isa::Avx2 => unsafe {
            x86_64::avx2::split_tile(dtype, order, tile, source, row_stride_bytes, planes)
        },
        _ => 0,
    };
    all::split::split_from(done, dtype, order, tile, source, row_stride_bytes, planes);
}

/// See [`crate::split::join_tile_with`], which has checked `planes`.
pub(crate) fn join_tile(
    isa: Isa,
    dtype: Dtype,
    order: Order,
    tile: &Tile,
    planes: [&[u8]; 2],
    target: &mut [u8],
    row_stride_bytes: usize,
) {
    let done = match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set is available.
        Isa::Avx512 => unsafe {
            x86_64::avx512::join_tile(dtype, order, tile, planes, target, row_stride_bytes)
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set is available.
        Isa::Avx2 => unsafe {
            x86_64::avx2::join_tile(dtype, order, tile, planes, target, row_stride_bytes)
        },
        _ => 0,
    };
    all::split::join_from(done, dtype, order, tile, planes, target, row_stride_bytes);
}

/// Accumulators of an output; see [`crate::product`].
pub(crate) const LANES_PER_ROW: usize = 16;

/// Decodes the fields of [`crate::layout::Layout::Fixed`] into high bytes, all
/// but those of escapes. `high` has room for whole groups.
pub(crate) fn unpack_highs(
    isa: Isa,
    coding: Coding,
    palette: &[u8; 16],
    fields: &[u8],
    high: &mut [u8; CHUNK_ELEMS],
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set is available.
        Isa::Avx512 => unsafe {
            x86_64::product_avx512::unpack_highs(coding, palette, fields, high);
        },
        _ => crate::layout::unpack_highs(coding, palette, fields, high),
    }
}

/// Activations of one or more tokens in the columns of a strip.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Inputs<'a> {
    /// From the strip's first column of the first token on.
    pub(crate) x: &'a [f32],
    /// From one token to the next.
    pub(crate) stride: usize,
    /// Columns of the strip.
    pub(crate) n_cols: usize,
}

impl<'a> Inputs<'a> {
    pub(crate) fn token(&self, token: usize) -> &'a [f32] {
        &self.x[token * self.stride..][..self.n_cols]
    }
}

/// What integers of one row stand for; see [`crate::quantize`]. As many as
/// both `integers` and `out` have.
pub(crate) fn dequantise_row(isa: Isa, integers: &[u8], scale: f32, out: &mut [f32]) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set is available.
        Isa::Avx512 => unsafe { x86_64::product_avx512::dequantise_row(integers, scale, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set is available.
        Isa::Avx2 => unsafe { x86_64::product_avx2::dequantise_row(integers, scale, out) },
        _ => all::product::dequantise_row(integers, scale, out),
    }
}

/// Adds the products of a strip of 16x16 blocks with one token to 256
/// accumulators, whose order is the instruction set's own; see
/// [`accumulator_indices`]. `x` is as long as the strip is wide. Integers have
/// 16 scales.
pub(crate) fn accumulate_blocks(
    isa: Isa,
    values: Values<'_>,
    planes: [&[u8]; 2],
    x: &[f32],
    sums: &mut [f32; BLOCK_ELEMS],
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set is available.
        Isa::Avx512 => unsafe {
            x86_64::product_avx512::accumulate_blocks(values, planes, x, sums);
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set is available.
        Isa::Avx2 => unsafe { x86_64::product_avx2::accumulate_blocks(values, planes, x, sums) },
        _ => all::product::accumulate_blocks(values, planes, x, sums),
    }
}

/// Adds the products of 16 rows in fixed-rate codes, as [`accumulate_blocks`].
pub(crate) fn accumulate_band(
    isa: Isa,
    values: Values<'_>,
    band: Band<'_>,
    x: &[f32],
    sums: &mut [f32; BLOCK_ELEMS],
) {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 {
        // SAFETY: the instruction set is available.
        return unsafe { x86_64::product_avx512::accumulate_band(values, band, x, sums) };
    }
    let mut x = x;
    band.for_each_chunk(isa, |planes| {
        let now;
        (now, x) = x.split_at(planes[0].len() / BLOCK);
        accumulate_blocks(isa, values, planes, now, sums);
    });
}

/// Adds the products of rows of row-major weights, as wide as `inputs` and no
/// integers, with `n_tokens` tokens; `sums` are `[row][token]`.
pub(crate) fn accumulate_rows(
    isa: Isa,
    weight: WeightType,
    weights: &[u8],
    inputs: Inputs<'_>,
    n_tokens: usize,
    sums: &mut [[f32; LANES_PER_ROW]],
) {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 {
        // SAFETY: the instruction set is available.
        return unsafe {
            x86_64::product_avx512::accumulate_rows(weight, weights, inputs, n_tokens, sums);
        };
    }
    let rows = weights.chunks_exact(inputs.n_cols * weight.elem_bytes());
    for (weights, sums) in rows.zip(sums.chunks_mut(n_tokens)) {
        for (token, sums) in sums.iter_mut().enumerate() {
            let x = inputs.token(token);
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the instruction set is available.
                Isa::Avx2 => unsafe {
                    x86_64::product_avx2::accumulate_row(weight, weights, x, sums);
                },
                _ => all::product::accumulate_row(weight, weights, x, sums),
            }
        }
    }
}

/// [`accumulate_rows`] of weights that are widened already.
pub(crate) fn accumulate_floats(
    isa: Isa,
    weights: &[f32],
    inputs: Inputs<'_>,
    n_tokens: usize,
    sums: &mut [[f32; LANES_PER_ROW]],
) {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 {
        // SAFETY: the instruction set is available.
        return unsafe {
            x86_64::product_avx512::accumulate_floats(weights, inputs, n_tokens, sums);
        };
    }
    for (weights, sums) in weights.chunks_exact(inputs.n_cols).zip(sums.chunks_mut(n_tokens)) {
        for (token, sums) in sums.iter_mut().enumerate() {
            let x = inputs.token(token);
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the instruction set is available.
                Isa::Avx2 => unsafe {
                    x86_64::product_avx2::accumulate_floats(weights, x, sums);
                },
                _ => all::product::accumulate_floats(weights, x, sums),
            }
        }
    }
}

/// Where [`accumulate_blocks`] leaves the accumulators of each row of a block.
pub(crate) fn accumulator_indices(isa: Isa, weight: WeightType) -> &'static RowIndices {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => x86_64::product_avx512::row_indices(weight),
        _ => {
            let _ = weight;
            &all::product::ROW_INDICES
        }
    }
}

/// Of the 256 accumulators of a block, those of each row.
pub(crate) type RowIndices = [[u8; LANES_PER_ROW]; BLOCK];

/// Turns row and column of each accumulator round.
const fn rows_of_places(places: &[(u8, u8); BLOCK_ELEMS]) -> RowIndices {
    let mut indices = [[0; LANES_PER_ROW]; BLOCK];
    let mut index = 0;
    while index < BLOCK_ELEMS {
        let (row, lane) = places[index];
        indices[row as usize][lane as usize] = index as u8;
        index += 1;
    }
    indices
}

/// Adds the products of a part of a row, which starts at accumulator `lane`.
/// Integers have one scale.
pub(crate) fn accumulate_run(
    isa: Isa,
    values: Values<'_>,
    planes: [&[u8]; 2],
    x: &[f32],
    lane: usize,
    sums: &mut [f32; LANES_PER_ROW],
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set is available.
        Isa::Avx512 => unsafe {
            x86_64::product_avx512::accumulate_run(values, planes, x, lane, sums);
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set is available.
        Isa::Avx2 => unsafe {
            x86_64::product_avx2::accumulate_run(values, planes, x, lane, sums);
        },
        _ => all::product::accumulate_run(values, planes, x, lane, sums),
    }
}

/// Multiplies rows of row-major weights, no integers, with one or more tokens:
/// `x` is `tokens * cols`, `y` is `tokens * rows`.
pub(crate) fn multiply_dense(
    isa: Isa,
    weight: WeightType,
    weights: &[u8],
    x: &[f32],
    cols: usize,
    y: &mut [f32],
) {
    let n_rows = weights.len() / (cols * weight.elem_bytes());
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 {
        // SAFETY: the instruction set is available.
        return unsafe { x86_64::product_avx512::multiply_dense(weight, weights, x, cols, y) };
    }
    for (x, y) in x.chunks(cols).zip(y.chunks_mut(n_rows)) {
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the instruction set is available.
            Isa::Avx2 => unsafe { x86_64::product_avx2::multiply_dense(weight, weights, x, y) },
            _ => all::product::multiply_dense(weight, weights, x, y),
        }
    }
}
