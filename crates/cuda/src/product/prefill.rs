//! Products of more than 64 tokens (`kernels/product_prefill.cuh`).

use cudarc::driver::sys;

use super::check;
use super::params::TensorMap;
use super::shape::Weights;
use crate::device::Device;
use crate::error::{Context as _, Result};
use crate::fixed::CHUNK_COLS;
use crate::module::{Function, Launch};

/// Warps of a block that multiply, a tile of 16 rows each.
const WARPS: usize = 8;
/// Threads of a block.
const THREADS: u32 = 32 * (WARPS as u32 + 4);
/// Blocks that share activations.
const CLUSTER: usize = 2;
/// Columns of a box of activations.
const BOX_COLS: u32 = 64;
/// Stages of a warp's ring of weights; there are twice as many of activations.
const STAGES: usize = 2;
/// Bytes of symbols and barriers; of a warp's results on their way.
const COMMON: usize = 128 + 8 * 2 * (2 * STAGES + WARPS * STAGES);
const STAGING: usize = 512;

/// Tokens of a block, and clocks that it takes for a chunk of each warp, measured on an H200: with 128 tokens decoding takes
/// longer than the products.
const BLOCKS: [Block; 2] = [Block { tokens: 128, chunk: 1700 }, Block { tokens: 256, chunk: 2250 }];
/// Clocks before the first product and after the last.
const AROUND: usize = 8000;

#[derive(Debug, Clone, Copy)]
struct Block {
    tokens: usize,
    chunk: usize,
}

/// How the clusters share the pieces of work, and an estimate of the clocks that they take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    clocks: usize,
    n_clusters: usize,
    /// Pieces that one cluster each multiplies; the chunks of the others are shared by all.
    whole: usize,
    /// All of them.
    n_pieces: usize,
}

/// A matrix and how many are multiplied with it.
#[derive(Debug, Clone, Copy)]
struct Size {
    n_tiles: usize,
    across: usize,
    n_tokens: usize,
    n_sms: usize,
}

/// A kernel and the shared memory that its blocks need.
#[derive(Debug)]
struct Variant {
    function: Function,
    shared_bytes: usize,
}

/// The kernels for one matrix.
#[derive(Debug)]
pub(super) struct Prefill {
    /// Of [`BLOCKS`].
    variants: Vec<Variant>,
    n_tiles: usize,
    across: usize,
    n_sms: usize,
}

/// What a launch is to know besides the product's parameters.
#[derive(Debug)]
pub(super) struct PrefillLaunch<'a> {
    pub function: &'a Function,
    pub launch: Launch,
    /// Tokens of a box of activations.
    pub box_tokens: usize,
    /// Pieces that are not shared.
    pub whole: usize,
}

impl Prefill {
    /// `None` for a GPU without these kernels: only compute capability 9.0 has them.
    ///
    /// # Errors
    ///
    /// Chunks with room for so many escapes that blocks do not fit a multiprocessor, and what the driver reports.
    pub fn new(device: &Device, weights: Weights) -> Result<Option<Self>> {
        if device.info().capability != (9, 0) {
            return Ok(None);
        }
        // As prefill_shared_bytes of kernels/product_prefill.cuh.
        let (plane, scales) = weights.format.patch_bytes();
        let others = |tokens: usize| {
            1024 + 2 * STAGES * tokens * 128 + COMMON + WARPS * (plane + scales + STAGING)
        };
        let mut variants = Vec::new();
        for Block { tokens, .. } in BLOCKS {
            let room = (device.info().shared_bytes as usize).saturating_sub(others(tokens));
            let most = room / (WARPS * STAGES);
            check("bytes of a chunk", weights.chunk_bytes, weights.chunk_bytes.min(most))?;
            let shared_bytes = others(tokens) + WARPS * STAGES * weights.chunk_bytes;
            let function =
                device.function(&format!("prefill_{}_{tokens}", weights.format.name()))?;
            function.allow_shared(shared_bytes as u32)?;
            variants.push(Variant { function, shared_bytes });
        }
        let Weights { n_tiles, across, .. } = weights;
        let n_sms = device.info().n_sms as usize;
        Ok(Some(Self { variants, n_tiles, across, n_sms }))
    }

    /// How to launch a product of that many tokens, `None` if products of 64 at a time are faster. It depends on rows,
    /// columns and tokens alone, not on the format: it decides on the order of addition.
    pub fn choose(&self, n_tokens: usize) -> Option<PrefillLaunch<'_>> {
        let Self { n_tiles, across, n_sms, .. } = *self;
        let size = Size { n_tiles, across, n_tokens, n_sms };
        let (at, plan) = fastest(size)?;
        let (Variant { function, shared_bytes }, Block { tokens, .. }) =
            (&self.variants[at], BLOCKS[at]);
        let launch = Launch::new((CLUSTER * plan.n_clusters) as u32, THREADS)
            .shared(*shared_bytes as u32)
            .dependent(true);
        Some(PrefillLaunch { function, launch, box_tokens: tokens / CLUSTER, whole: plan.whole })
    }

    /// As prefill_workspace_floats of `kernels/product_prefill.cuh`, for the most clusters and tokens.
    pub fn workspace_floats(&self) -> usize {
        let most = BLOCKS.iter().map(|block| block.tokens).max().unwrap_or(0);
        self.meeting_words() * most * 16
    }

    /// A word for each warp that multiplies.
    pub fn meeting_words(&self) -> usize {
        self.n_sms / CLUSTER * CLUSTER * WARPS
    }
}

/// Which of [`BLOCKS`], and how; `None` if 64 tokens at a time are faster.
fn fastest(size: Size) -> Option<(usize, Plan)> {
    let plans = BLOCKS.map(|block| plan(block, size));
    let best = plans.into_iter().enumerate().min_by_key(|(_, plan)| plan.clocks)?;
    (best.1.clocks < clocks_by_64(size)).then_some(best)
}

/// A piece after the other for each cluster; or all but the last one or two of each, of which all have as many chunks, so
/// that none is without work at the end. For that sums of a block go through L2: 16 clocks for each token are written, and as many
/// read for each cluster that has an earlier share of the piece. And chunks take a tenth longer, for clusters at different
/// columns read different activations.
fn plan(Block { tokens, chunk }: Block, size: Size) -> Plan {
    let Size { n_tiles, across, n_tokens, n_sms } = size;
    let most = (n_sms / CLUSTER).max(1);
    let n_pieces = n_tiles.div_ceil(CLUSTER * WARPS) * n_tokens.div_ceil(tokens);
    let whole = Plan {
        clocks: n_pieces.div_ceil(most) * across * chunk + AROUND,
        n_clusters: n_pieces.min(most),
        whole: n_pieces,
        n_pieces,
    };
    let shared = |n_clusters: usize| {
        let whole = (n_pieces / n_clusters).saturating_sub(1) * n_clusters;
        let n_chunks = (n_pieces - whole) * across;
        let share = n_chunks.div_ceil(n_clusters);
        let exact = n_chunks.is_multiple_of(n_clusters);
        let parts = across.div_ceil(share.max(1)) + usize::from(!exact);
        let clocks = (whole / n_clusters * across * 10 + share * 11) * chunk / 10 + AROUND;
        Plan { clocks: clocks + 16 * tokens * parts, n_clusters, whole, n_pieces }
    };
    // As many clusters as share pieces evenly, or all.
    let even = if n_pieces < most { most / n_pieces.max(1) * n_pieces } else { most };
    let plans = [Some(whole), Some(shared(most)), (even > n_pieces).then(|| shared(even))];
    let plans = plans.into_iter().flatten();
    plans.min_by_key(|plan| plan.clocks).unwrap_or(whole)
}

/// An estimate for products of 64 tokens at a time, of which a multiprocessor decodes 8 weights a clock.
fn clocks_by_64(Size { n_tiles, across, n_tokens, n_sms }: Size) -> usize {
    let n_weights = n_tiles * 16 * across * CHUNK_COLS;
    n_tokens.div_ceil(64) * (n_weights / (8 * n_sms.max(1)) + 5000)
}

/// The map of row-major activations with `stride` elements from a token to the next, a multiple of 8, at an address that is
/// a multiple of 16.
///
/// # Errors
///
/// What the driver reports.
pub(super) fn tensor_map(
    x: u64,
    [n_tokens, cols, stride]: [usize; 3],
    box_tokens: usize,
    half: bool,
) -> Result<TensorMap> {
    use sys::CUtensorMapDataType_enum as Type;
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let data_type = if half {
        Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    } else {
        Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    };
    let (sides, strides) = ([cols as u64, n_tokens as u64], [2 * stride as u64]);
    let (box_sides, steps) = ([BOX_COLS, box_tokens as u32], [1, 1]);
    // SAFETY: all arrays have as many elements as there are dimensions (strides one less) and outlive the call, which stores
    // the address and reads nothing there.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            data_type,
            2,
            x as *mut std::ffi::c_void,
            sides.as_ptr(),
            strides.as_ptr(),
            box_sides.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .context("cuTensorMapEncodeTiled")?;
    Ok(TensorMap(map.opaque))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On 132 multiprocessors: tokens of a block, and how.
    fn h200(rows: usize, cols: usize, n_tokens: usize) -> Option<(usize, Plan)> {
        let (n_tiles, across) = (rows.div_ceil(16), cols.div_ceil(CHUNK_COLS));
        let found = fastest(Size { n_tiles, across, n_tokens, n_sms: 132 });
        found.map(|(at, plan)| (BLOCKS[at].tokens, plan))
    }

    const LAYERS: [(usize, usize); 6] =
        [(4096, 4096), (6144, 4096), (28_672, 4096), (4096, 14_336), (10_240, 8192), (8192, 8192)];

    #[test]
    fn layers_take_large_blocks_and_leave_few_clusters_without_work() {
        for (rows, cols) in LAYERS {
            for n_tokens in [512, 2048, 8192] {
                let (tokens, plan) = h200(rows, cols, n_tokens).unwrap();
                assert_eq!(tokens, 256, "{rows}x{cols}, {n_tokens}");
                let of_cluster = plan.whole.div_ceil(plan.n_clusters) * cols.div_ceil(CHUNK_COLS);
                let n_shared = (plan.n_pieces - plan.whole) * cols.div_ceil(CHUNK_COLS);
                let chunks = of_cluster + n_shared.div_ceil(plan.n_clusters);
                let ideal = plan.n_pieces * cols.div_ceil(CHUNK_COLS) / 66;
                assert!(chunks * 93 <= ideal * 100, "{rows}x{cols}, {n_tokens}: {plan:?}");
            }
        }
    }

    #[test]
    fn pieces_are_shared_where_clusters_would_have_none() {
        let shares = |rows, n_tokens| {
            let (_, plan) = h200(rows, 8192, n_tokens).unwrap();
            (plan.n_pieces, plan.n_clusters, plan.whole)
        };
        // One for each but two; half of one; one and a bit; three and a half.
        assert_eq!(shares(8192, 512), (64, 64, 64));
        assert_eq!(shares(4096, 512), (32, 64, 0));
        assert_eq!(shares(10_240, 512), (80, 66, 0));
        assert_eq!(shares(28_672, 512), (224, 66, 132));
    }

    #[test]
    fn small_products_of_few_tokens_are_several_of_64() {
        assert_eq!(h200(272, 2001, 130), None);
        assert_eq!(h200(1040, 8192, 65), None);
        assert!(h200(4096, 4096, 65).is_some());
    }

    #[test]
    fn every_size_has_a_plan_that_covers_it() {
        for n_tiles in (0..400).step_by(7) {
            for n_tokens in (65..3000).step_by(311) {
                for across in [0, 1, 2, 3, 32, 64, 224] {
                    for n_sms in [1, 2, 131, 132] {
                        for block in BLOCKS {
                            let size = Size { n_tiles, across, n_tokens, n_sms };
                            let plan = plan(block, size);
                            assert!(plan.n_clusters <= (n_sms / 2).max(1), "{size:?}: {plan:?}");
                            assert!(plan.whole <= plan.n_pieces, "{size:?}: {plan:?}");
                            assert!(
                                plan.n_clusters > 0 || plan.n_pieces == 0,
                                "{size:?}: {plan:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}
