//! Which kernel takes how many tokens, and how its blocks share the work.
//! Nothing here changes a bit of a result.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::fixed::WeightFormat;
use crate::module::{Function, Launch};

const MAX_SLICES: usize = 16;
/// Stages of a warp's ring of weights.
const STAGES: usize = 2;
/// Warps of a block of `kernels/product_batch.cuh`, at most.
const BATCH_WARPS: usize = 16;
/// Stages of its ring of activations.
const BATCH_X_STAGES: usize = 3;
/// From so many tokens on it is its turn.
pub(super) const BATCH_TOKENS: usize = 17;
/// Bytes of what the warps of such a block share beside activations.
const BATCH_COMMON: usize = 256;

/// A weight matrix, all segments of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weights {
    pub format: WeightFormat,
    pub chunk_bytes: usize,
    /// Tiles of 16 rows.
    pub n_tiles: usize,
    /// Chunks of a tile.
    pub across: usize,
    /// Slices of K; see `kernels/reduction.cuh`.
    pub n_slices: usize,
}

/// A kernel and how it is launched for one matrix.
#[derive(Debug, Clone)]
pub(super) struct Variant {
    pub function: Function,
    pub launch: Launch,
    /// How the blocks share the work; `product.cuh` does not read it.
    pub shape: BatchShape,
    /// Blocks that the GPU holds.
    at_once: usize,
    /// Sums of a tile that meet in the workspace.
    pub slots: usize,
    pub workspace_floats: usize,
}

/// As `slices` of `kernels/reduction.cuh`.
pub(super) fn n_slices(cols: usize) -> usize {
    cols.div_ceil(256).clamp(1, MAX_SLICES)
}

/// As `sum_slots` of `kernels/reduction.cuh`.
fn sum_slots(n_slices: usize, apart: usize) -> usize {
    let own = n_slices / apart;
    n_slices - own + usize::from(own > 0)
}

fn function(device: &Device, weights: Weights, suffix: &str) -> Result<Function> {
    device.function(&format!("product_{}_{suffix}", weights.format.name()))
}

/// Rings, and planes of patches for `tiles` tiles, of `warps` warps.
fn warp_bytes(weights: Weights, warps: usize, tiles: usize) -> usize {
    let ring = (STAGES * weights.chunk_bytes).next_multiple_of(128);
    let (plane, scales) = weights.format.patch_bytes();
    warps * (ring + plane + tiles * scales + 8 * STAGES)
}

impl Variant {
    /// For up to 8 or 16 tokens (1 or 2 `groups`): `tiles` tiles at a time and `apart` warps a block.
    fn strips(
        device: &Device,
        weights: Weights,
        suffix: &str,
        groups: usize,
        (tiles, apart): (usize, usize),
    ) -> Result<Self> {
        let function = function(device, weights, suffix)?;
        // As product_shared_bytes of kernels/product.cuh.
        let slots = sum_slots(weights.n_slices, apart);
        let x_row_bytes = if groups == 1 { 272 } else { 144 };
        let x = apart * groups * 8 * x_row_bytes;
        let sums = 2 * tiles * slots * 512 * groups;
        let bytes = warp_bytes(weights, apart, tiles) + 128 + x + sums;
        function.allow_shared(bytes as u32)?;
        let threads = 32 * apart as u32;
        let per_sm = function.blocks_per_sm(threads, bytes as u32)?.max(1);
        let at_once = (per_sm * device.info().n_sms) as usize;
        let n_blocks = weights.n_tiles.div_ceil(tiles).min(at_once);
        let launch = Launch::new(n_blocks as u32, threads).shared(bytes as u32).dependent(true);
        let shape = BatchShape { per_sm: 1, strips: 0, parts: 1, groups: 0 };
        Ok(Self { function, launch, shape, at_once, slots: 0, workspace_floats: 0 })
    }

    /// For up to 32 or 64 tokens (4 or 8 `token_groups`).
    fn batch(device: &Device, weights: Weights, suffix: &str, token_groups: usize) -> Result<Self> {
        let function = function(device, weights, suffix)?;
        let warps_of =
            |per_sm: usize, strips: usize| strips.next_multiple_of(4).min(BATCH_WARPS / per_sm);
        // As batch_shared_bytes of kernels/product_batch.cuh.
        let x = BATCH_X_STAGES * token_groups * 2048;
        let shared = |warps: usize| (warp_bytes(weights, warps, 1) + x + BATCH_COMMON) as u32;
        function.allow_shared(device.info().shared_bytes)?;
        let mut per_sm = Vec::new();
        for n in [1, 2] {
            let warps = BATCH_WARPS / n;
            if function.blocks_per_sm(32 * warps as u32, shared(warps))? as usize >= n {
                per_sm.push(n);
            }
        }
        let n_sms = device.info().n_sms as usize;
        let Some(shape) = batch_shape(weights, token_groups, n_sms, &per_sm) else {
            let capability = device.info().capability;
            return Err(Error::Unsupported { operation: "product of many tokens", capability });
        };
        let BatchShape { per_sm, strips, parts, groups } = shape;
        let slots = sum_slots(weights.n_slices, parts);
        let workspace_floats =
            if parts == 1 { 0 } else { groups * strips * slots * token_groups * 128 };
        let warps = warps_of(per_sm, strips);
        let launch = Launch {
            grid: [parts as u32, groups as u32, 1],
            ..Launch::new(0, 32 * warps as u32).shared(shared(warps)).dependent(true)
        };
        let at_once = n_sms * shape.per_sm;
        Ok(Self { function, launch, shape, at_once, slots, workspace_floats })
    }
}

/// How `kernels/product_batch.cuh` shares the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BatchShape {
    /// Blocks a multiprocessor.
    per_sm: usize,
    /// Tiles a block.
    pub strips: usize,
    /// Blocks that share the slices of K.
    pub parts: usize,
    /// Groups of `strips` tiles at a time; all of them if there are several parts.
    groups: usize,
}

/// The shape that takes the fewest clocks by a rough count, and of those that
/// take as many the one with the most tiles a block. A chunk of each of n warps
/// takes a multiprocessor 1240 + 73 n clocks: more warps hide more of what each
/// waits for (measured with 10 to 16); two blocks, which read activations twice,
/// take a tenth longer. Several parts have to be
/// there at once, or nearly: their meeting takes 2000 clocks and one for every
/// 64 bytes of sums.
fn batch_shape(
    weights: Weights,
    token_groups: usize,
    n_sms: usize,
    per_sm: &[usize],
) -> Option<BatchShape> {
    let Weights { n_tiles, across, n_slices, .. } = weights;
    let mut best = None;
    for &per_sm in per_sm {
        let at_once = n_sms * per_sm;
        for parts in 1..=n_slices {
            for strips in 1..=BATCH_WARPS / per_sm {
                let n_groups = n_tiles.div_ceil(strips);
                let rounds = (n_groups * parts).div_ceil(at_once);
                if parts > 1 && rounds > 1 {
                    continue;
                }
                let chunks = across * n_slices.div_ceil(parts) / n_slices;
                let row = 124 + 73 * per_sm * strips / 10;
                let products = rounds * chunks * row * (9 + per_sm);
                let sums = sum_slots(n_slices, parts) * strips * per_sm * token_groups * 8 / parts;
                let clocks = products + if parts == 1 { 0 } else { 2000 + sums };
                if best.is_none_or(|(least, _)| clocks <= least) {
                    let groups = if parts > 1 { n_groups } else { n_groups.min(at_once) };
                    best = Some((clocks, BatchShape { per_sm, strips, parts, groups }));
                }
            }
        }
    }
    best.map(|(_, shape)| shape)
}

/// The kernels for one matrix and up to 64 tokens.
#[derive(Debug)]
pub(super) struct Variants {
    m8: Variant,
    m16: Variant,
    m32: Variant,
    m64: Variant,
}

impl Variants {
    /// # Errors
    ///
    /// What the driver reports, and a GPU with too little shared memory.
    pub fn new(device: &Device, weights: Weights) -> Result<Self> {
        let few = FEW_TOKENS
            .into_iter()
            .map(|(suffix, shape)| Variant::strips(device, weights, suffix, 1, shape))
            .collect::<Result<Vec<_>>>()?;
        let at_once = [few[0].at_once, few[1].at_once, few[2].at_once];
        Ok(Self {
            m8: few[fastest(weights.format, weights.n_tiles, at_once)].clone(),
            m16: Variant::strips(device, weights, "m16", 2, (1, 8))?,
            m32: Variant::batch(device, weights, "m32", 4)?,
            m64: Variant::batch(device, weights, "m64", 8)?,
        })
    }

    pub fn choose(&self, n_tokens: usize) -> &Variant {
        match n_tokens {
            0..=8 => &self.m8,
            9..BATCH_TOKENS => &self.m16,
            BATCH_TOKENS..=32 => &self.m32,
            _ => &self.m64,
        }
    }

    /// The most that a variant needs.
    pub fn workspace_floats(&self) -> usize {
        self.m32.workspace_floats.max(self.m64.workspace_floats)
    }

    /// Two for every group of tiles.
    pub fn meeting_words(&self) -> usize {
        2 * self.m32.shape.groups.max(self.m64.shape.groups)
    }
}

/// Kernels for up to 8 tokens: the ends of their names, tiles at a time, and warps.
const FEW_TOKENS: [(&str, (usize, usize)); 3] =
    [("m8", (1, 8)), ("m8_pair", (2, 8)), ("m8_deep", (1, 16))];

/// Which of them, if the GPU holds so many blocks of each. Their speeds where all blocks have work were measured on an
/// H200: where decoding takes longest, it is worth much to read activations half as often.
fn fastest(format: WeightFormat, n_tiles: usize, at_once: [usize; 3]) -> usize {
    let is_fixed_int8 = format.dtype() == transom::Dtype::I8 && !format.is_dense();
    let speeds = if is_fixed_int8 { [1.0, 1.1, 0.88] } else { [1.0, 0.97, 0.97] };
    let (mut best, mut most) = (0, 0.0);
    for (i, (_, (tiles, _))) in FEW_TOKENS.into_iter().enumerate() {
        let score = speeds[i] * fill(n_tiles / tiles, at_once[i]);
        if n_tiles.is_multiple_of(tiles) && score > most {
            (best, most) = (i, score);
        }
    }
    best
}

/// Share of the blocks' time that has work.
fn fill(n_groups: usize, n_blocks: usize) -> f64 {
    let rounds = n_groups.div_ceil(n_blocks.max(1)).max(1);
    n_groups as f64 / (rounds * n_blocks) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn h200(rows: usize, cols: usize, token_groups: usize) -> BatchShape {
        let weights = Weights {
            format: WeightFormat::Bf16x3,
            chunk_bytes: 2912,
            n_tiles: rows.div_ceil(16),
            across: cols.div_ceil(128),
            n_slices: n_slices(cols),
        };
        batch_shape(weights, token_groups, 132, &[1, 2]).unwrap()
    }

    #[test]
    fn the_kernel_of_few_tokens_leaves_few_blocks_without_work() {
        let of = |format, rows: usize| {
            let at_once = [264, 264, 132];
            FEW_TOKENS[fastest(format, rows.div_ceil(16), at_once)].0
        };
        let int8 = [4096, 6144, 8192, 10_240, 28_672, 57_344].map(|n| of(WeightFormat::Int8x6, n));
        assert_eq!(int8, ["m8", "m8_deep", "m8_pair", "m8_deep", "m8", "m8_pair"]);
        let bf16 = [4096, 6144, 8192, 10_240, 28_672].map(|n| of(WeightFormat::Bf16x3, n));
        assert_eq!(bf16, ["m8", "m8_deep", "m8", "m8_deep", "m8"]);
        // An odd number of tiles has no pairs; none at all is a product of nothing.
        assert_eq!(of(WeightFormat::Int8x6, 8192 - 16), "m8");
        assert_eq!(of(WeightFormat::Int8x6, 0), "m8");
    }

    #[test]
    fn many_rows_are_not_cut_along_k() {
        for (rows, cols) in [(28_672, 4096), (57_344, 8192), (128_256, 4096)] {
            let shape = h200(rows, cols, 4);
            assert_eq!(shape.parts, 1, "{rows}: {shape:?}");
            let busy = shape.groups * shape.strips;
            let rounds = (rows / 16).div_ceil(busy);
            assert!(rows / 16 * 100 >= 93 * rounds * busy, "{rows}: {shape:?}");
        }
    }

    #[test]
    fn few_rows_are_cut_along_k_and_done_in_one_round() {
        for (rows, cols) in [(4096, 4096), (6144, 4096), (8192, 8192), (4096, 14_336)] {
            for token_groups in [4, 8] {
                let shape = h200(rows, cols, token_groups);
                assert!(shape.parts > 1, "{rows}: {shape:?}");
                let blocks = shape.groups * shape.parts;
                assert!(blocks > 120 * shape.per_sm, "{rows}: {shape:?}");
                assert!(blocks <= 132 * shape.per_sm, "{rows}: {shape:?}");
            }
        }
    }

    #[test]
    fn every_size_has_a_shape_that_covers_it() {
        for n_tiles in 1..400 {
            for cols in (1..=16).map(|slices| 256 * slices) {
                let shape = h200(16 * n_tiles, cols, 8);
                assert!(shape.parts <= n_slices(cols), "{n_tiles} {cols}: {shape:?}");
                assert!(shape.strips >= 1 && shape.strips * shape.per_sm <= BATCH_WARPS);
                let covers = shape.groups * shape.strips >= n_tiles;
                assert!(shape.groups >= 1 && (shape.parts == 1 || covers), "{shape:?}");
            }
        }
        let weights = Weights {
            format: WeightFormat::DenseBf16,
            chunk_bytes: 4096,
            n_tiles: 8,
            across: 8,
            n_slices: 4,
        };
        assert_eq!(batch_shape(weights, 4, 132, &[]), None);
    }

    #[test]
    fn slices_and_slots() {
        assert_eq!([1, 256, 257, 4096, 1 << 20].map(n_slices), [1, 1, 2, 16, 16]);
        assert_eq!([(16, 1), (16, 8), (5, 8), (1, 1)].map(|(s, p)| sum_slots(s, p)), [1, 15, 5, 1]);
    }
}
