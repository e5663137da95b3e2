//! Which kernel takes how many tokens, and how its blocks share the work.
//! Nothing here changes a bit of a result.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::fixed::WeightFormat;
use crate::module::{Function, Launch};

const MAX_SLICES: usize = 16;
/// Stages of a warp's ring of weights.
const STAGES: usize = 2;
/// Warps of a block of `kernels/product.cuh`.
const STRIP_WARPS: usize = 8;
/// Warps of a block of `kernels/product_batch.cuh`, at most.
const BATCH_WARPS: usize = 16;
/// Stages of its ring of activations.
const BATCH_X_STAGES: usize = 3;
/// From so many tokens on it is its turn.
pub(super) const BATCH_TOKENS: usize = 17;
/// Blocks of a cluster: 2 to the power of 0 to 3.
const LOG_PARTS: std::ops::RangeInclusive<u32> = 0..=3;

/// A weight matrix, all segments of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weights {
    pub format: WeightFormat,
    pub chunk_bytes: usize,
    /// Tiles of 16 rows.
    pub n_tiles: usize,
    /// Slices of K; see `kernels/reduction.cuh`.
    pub n_slices: usize,
}

/// A kernel and how it is launched for one matrix.
#[derive(Debug, Clone)]
pub(super) struct Variant {
    pub function: Function,
    pub launch: Launch,
    /// Tiles that a cluster takes at a time, and 2 to the power of its blocks; 0 for `product.cuh`.
    pub strips: u32,
    pub log_parts: u32,
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

/// Rings and planes of patches of `warps` warps.
fn warp_bytes(weights: Weights, warps: usize) -> usize {
    let ring = (STAGES * weights.chunk_bytes).next_multiple_of(128);
    let plane = if weights.format.is_dense() { 0 } else { 2048 };
    warps * (ring + plane + 8 * STAGES) + 128
}

impl Variant {
    /// For up to 8 or 16 tokens (1 or 2 `groups`): `together` tiles a block.
    fn strips(
        device: &Device,
        weights: Weights,
        suffix: &str,
        groups: usize,
        together: usize,
    ) -> Result<Self> {
        let function = function(device, weights, suffix)?;
        // As product_shared_bytes of kernels/product.cuh.
        let slots = sum_slots(weights.n_slices, STRIP_WARPS / together);
        let x_row_bytes = if groups == 1 { 272 } else { 144 };
        let x = STRIP_WARPS * groups * 8 * x_row_bytes;
        let bytes = warp_bytes(weights, STRIP_WARPS) + x + 2 * together * slots * 512 * groups;
        function.allow_shared(bytes as u32)?;
        let threads = 32 * STRIP_WARPS as u32;
        let per_sm = function.blocks_per_sm(threads, bytes as u32)?.max(1);
        let at_once = (per_sm * device.info().n_sms) as usize;
        let n_blocks = weights.n_tiles.div_ceil(together).min(at_once);
        let launch = Launch::new(n_blocks as u32, threads).shared(bytes as u32).dependent(true);
        Ok(Self { function, launch, strips: 0, log_parts: 0, workspace_floats: 0 })
    }

    /// For up to 32 or 64 tokens (4 or 8 `groups`).
    fn batch(device: &Device, weights: Weights, suffix: &str, groups: usize) -> Result<Self> {
        let function = function(device, weights, suffix)?;
        let launch = |per_sm: usize, strips: usize, log_parts: u32, clusters: usize| {
            let warps = strips.next_multiple_of(4).min(BATCH_WARPS / per_sm);
            // As batch_shared_bytes of kernels/product_batch.cuh.
            let x = BATCH_X_STAGES * (groups * 2048 + 16);
            let parts = 1 << log_parts;
            Launch { grid: [clusters as u32, parts, 1], ..Launch::new(0, 32 * warps as u32) }
                .shared((warp_bytes(weights, warps) + x) as u32)
                .cluster([1, parts, 1])
                .dependent(true)
        };
        let largest = device.info().shared_bytes;
        function.allow_shared(largest)?;
        let mut at_once = Vec::new();
        for per_sm in [1, 2] {
            for log_parts in LOG_PARTS {
                let launch = launch(per_sm, BATCH_WARPS / per_sm, log_parts, 1);
                if launch.shared_bytes <= largest {
                    let clusters = function.clusters_at_once(launch)? as usize;
                    at_once.push(AtOnce { per_sm, log_parts, clusters });
                }
            }
        }
        let Some(shape) = batch_shape(weights.n_tiles, weights.n_slices, &at_once) else {
            let capability = device.info().capability;
            return Err(Error::Unsupported { operation: "product of many tokens", capability });
        };
        let BatchShape { per_sm, strips, log_parts, clusters } = shape;
        let slots = sum_slots(weights.n_slices, 1 << log_parts);
        let workspace_floats =
            if log_parts == 0 { 0 } else { clusters * 2 * strips * slots * groups * 128 };
        Ok(Self {
            function,
            launch: launch(per_sm, strips, log_parts, clusters),
            strips: strips as u32,
            log_parts,
            workspace_floats,
        })
    }
}

/// Clusters of 2 to the power of `log_parts` blocks, `per_sm` a multiprocessor,
/// that a GPU has room for at a time.
#[derive(Debug, Clone, Copy)]
struct AtOnce {
    per_sm: usize,
    log_parts: u32,
    clusters: usize,
}

/// How `kernels/product_batch.cuh` shares the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct BatchShape {
    per_sm: usize,
    /// Tiles a cluster.
    strips: usize,
    log_parts: u32,
    clusters: usize,
}

/// The shape with the least work for the busiest multiprocessor, counted in
/// slices of a tile, and of those with as much the one with the most tiles. Fewer than ten warps do not keep a multiprocessor busy; two
/// blocks, which read activations twice, are a tenth slower than one; where
/// blocks share K, their meeting at the end of a round costs about as much as 16 slices.
fn batch_shape(n_tiles: usize, n_slices: usize, at_once: &[AtOnce]) -> Option<BatchShape> {
    let mut best = None;
    for &AtOnce { per_sm, log_parts, clusters } in at_once {
        if clusters == 0 || 1 << log_parts > n_slices {
            continue;
        }
        for strips in 1..=BATCH_WARPS / per_sm {
            let n_groups = n_tiles.div_ceil(strips);
            let rounds = n_groups.div_ceil(clusters);
            let meeting = if log_parts == 0 { 0 } else { 16 };
            let slices = n_slices.div_ceil(1 << log_parts);
            let work = rounds * ((per_sm * strips).max(10) * slices * (9 + per_sm) + 10 * meeting);
            if best.is_none_or(|(least, _)| work <= least) {
                let clusters = n_groups.min(clusters);
                best = Some((work, BatchShape { per_sm, strips, log_parts, clusters }));
            }
        }
    }
    best.map(|(_, shape)| shape)
}

/// The kernels for one matrix.
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
        let narrow = Variant::strips(device, weights, "m8", 1, 1)?;
        let wide = Variant::strips(device, weights, "m8_wide", 1, 2)?;
        // Two strips a block where that wastes no block: fewer rounds.
        let is_wide = fill(weights.n_tiles.div_ceil(2), wide.launch.grid[0] as usize)
            >= fill(weights.n_tiles, narrow.launch.grid[0] as usize);
        Ok(Self {
            m8: if is_wide { wide } else { narrow },
            m16: Variant::strips(device, weights, "m16", 2, 1)?,
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
}

/// Share of the blocks' time that has work.
fn fill(n_groups: usize, n_blocks: usize) -> f64 {
    let rounds = n_groups.div_ceil(n_blocks.max(1)).max(1);
    n_groups as f64 / (rounds * n_blocks) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What an H200 answers for blocks of 16 warps; twice as many with half the warps.
    fn h200() -> Vec<AtOnce> {
        let one = [132, 66, 30, 15];
        let mut all = Vec::new();
        for per_sm in [1, 2] {
            for (log_parts, clusters) in one.into_iter().enumerate() {
                let log_parts = log_parts as u32;
                all.push(AtOnce { per_sm, log_parts, clusters: clusters * per_sm });
            }
        }
        all
    }

    #[test]
    fn many_rows_are_not_cut_along_k() {
        for rows in [28_672, 57_344, 128_256] {
            let shape = batch_shape(rows / 16, 16, &h200()).unwrap();
            assert_eq!(shape.log_parts, 0, "{rows}: {shape:?}");
            let busy = shape.clusters * shape.strips;
            let rounds = (rows / 16).div_ceil(busy);
            assert!(rows / 16 * 100 >= 93 * rounds * busy, "{rows}: {shape:?}");
        }
    }

    #[test]
    fn few_rows_are_cut_along_k_and_done_in_one_round() {
        for rows in [4096, 6144, 8192] {
            let shape = batch_shape(rows / 16, 16, &h200()).unwrap();
            assert!(shape.log_parts > 0, "{rows}: {shape:?}");
            assert!(shape.clusters * shape.strips >= rows / 16, "{rows}: {shape:?}");
        }
    }

    #[test]
    fn every_size_has_a_shape_that_covers_it() {
        for n_tiles in 1..400 {
            for n_slices in 1..=16 {
                let shape = batch_shape(n_tiles, n_slices, &h200()).unwrap();
                assert!(1 << shape.log_parts <= n_slices, "{n_tiles} {n_slices}: {shape:?}");
                assert!(shape.strips >= 1 && shape.strips * shape.per_sm <= BATCH_WARPS);
                assert!(shape.clusters >= 1 && shape.clusters <= n_tiles);
            }
        }
        assert_eq!(batch_shape(8, 4, &[]), None);
    }

    #[test]
    fn slices_and_slots() {
        assert_eq!([1, 256, 257, 4096, 1 << 20].map(n_slices), [1, 1, 2, 16, 16]);
        assert_eq!([(16, 1), (16, 8), (5, 8), (1, 1)].map(|(s, p)| sum_slots(s, p)), [1, 15, 5, 1]);
    }
}
