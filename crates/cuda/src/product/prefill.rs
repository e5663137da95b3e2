//! Products of more than 64 tokens (`kernels/product_prefill.cuh`).

use cudarc::driver::sys;

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
const COMMON: usize = 128 + 8 * (2 * 2 * STAGES + WARPS * STAGES);
const STAGING: usize = 512;

/// Tokens of a block, and clocks that it takes for a chunk of each warp, measured on an H200: with 128 tokens decoding takes longer than the
/// products.
const TOKENS: [(usize, usize); 2] = [(128, 1700), (256, 2250)];
/// Clocks before the first product and after the last.
const AROUND: usize = 8000;

/// A kernel and the shared memory that its blocks need.
#[derive(Debug)]
struct Variant {
    function: Function,
    shared_bytes: usize,
}

/// The kernels for one matrix.
#[derive(Debug)]
pub(super) struct Prefill {
    /// By [`TOKENS`]; the last is missing if its blocks do not fit a multiprocessor.
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
}

impl Prefill {
    /// `None` for a GPU without these kernels: only compute capability 9.0 has them.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn new(device: &Device, weights: Weights) -> Result<Option<Self>> {
        if device.info().capability != (9, 0) {
            return Ok(None);
        }
        // As prefill_shared_bytes of kernels/product_prefill.cuh.
        let (plane, scales) = weights.format.patch_bytes();
        let warp = STAGES * weights.chunk_bytes + plane + scales + STAGING;
        let mut variants = Vec::new();
        for (n_tokens, _) in TOKENS {
            let shared_bytes = 1024 + 2 * STAGES * n_tokens * 128 + COMMON + WARPS * warp;
            if shared_bytes > device.info().shared_bytes as usize {
                break;
            }
            let name = format!("prefill_{}_{n_tokens}", weights.format.name());
            let function = device.function(&name)?;
            function.allow_shared(shared_bytes as u32)?;
            variants.push(Variant { function, shared_bytes });
        }
        let Weights { n_tiles, across, .. } = weights;
        let n_sms = device.info().n_sms as usize;
        Ok((!variants.is_empty()).then_some(Self { variants, n_tiles, across, n_sms }))
    }

    /// How to launch a product of that many tokens, `None` if products of 64 at a time are faster. Which it is depends on rows,
    /// columns and tokens alone, not on the format: it decides on the order of addition.
    pub fn choose(&self, n_tokens: usize) -> Option<PrefillLaunch<'_>> {
        let clocks = |i: usize| clocks(TOKENS[i], self.n_tiles, self.across, n_tokens, self.n_sms);
        let fastest = (0..TOKENS.len()).map(clocks).min()?;
        if fastest >= clocks_by_64(self.n_tiles, self.across, n_tokens, self.n_sms) {
            return None;
        }
        let at = (0..self.variants.len()).min_by_key(|&i| clocks(i))?;
        let Variant { function, shared_bytes } = &self.variants[at];
        let (tokens, _) = TOKENS[at];
        let n_clusters = n_pieces(self.n_tiles, n_tokens, tokens).min(self.n_sms / CLUSTER);
        let launch = Launch::new((CLUSTER * n_clusters) as u32, THREADS)
            .shared(*shared_bytes as u32)
            .dependent(true);
        Some(PrefillLaunch { function, launch, box_tokens: tokens / CLUSTER })
    }
}

/// Pieces of work of a cluster.
fn n_pieces(n_tiles: usize, n_tokens: usize, tokens: usize) -> usize {
    n_tiles.div_ceil(CLUSTER * WARPS) * n_tokens.div_ceil(tokens)
}

/// An estimate for blocks of `tokens` tokens.
fn clocks(
    (tokens, chunk): (usize, usize),
    n_tiles: usize,
    across: usize,
    n_tokens: usize,
    n_sms: usize,
) -> usize {
    let rounds = n_pieces(n_tiles, n_tokens, tokens).div_ceil((n_sms / CLUSTER).max(1));
    rounds * across * chunk + AROUND
}

/// An estimate for products of 64 tokens at a time, of which a multiprocessor decodes 8 weights a clock.
fn clocks_by_64(n_tiles: usize, across: usize, n_tokens: usize, n_sms: usize) -> usize {
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

    fn fastest(rows: usize, cols: usize, n_tokens: usize) -> usize {
        let (n_tiles, across) = (rows.div_ceil(16), cols.div_ceil(CHUNK_COLS));
        let by_64 = clocks_by_64(n_tiles, across, n_tokens, 132);
        let of = |tokens| (clocks(tokens, n_tiles, across, n_tokens, 132), tokens.0);
        TOKENS.map(of).into_iter().chain([(by_64, 64)]).min().unwrap().1
    }

    #[test]
    fn many_tokens_take_large_blocks_where_they_fill_the_gpu() {
        for (rows, cols) in [(28_672, 4096), (8192, 8192), (57_344, 8192), (8192, 28_672)] {
            for n_tokens in [512, 2048, 8192] {
                assert_eq!(fastest(rows, cols, n_tokens), 256, "{rows}x{cols}, {n_tokens}");
            }
        }
        // 64 blocks of 256 tokens, 128 of 128.
        assert_eq!(fastest(4096, 4096, 512), 128);
        assert_eq!(fastest(4096, 14_336, 512), 128);
        assert_eq!(fastest(4096, 4096, 2048), 256);
    }

    #[test]
    fn a_few_more_than_64_tokens_are_several_products() {
        assert_eq!(fastest(4096, 4096, 65), 64);
        assert_eq!(fastest(16, 128, 100), 64);
    }

    #[test]
    fn pieces_cover_rows_and_tokens() {
        assert_eq!(n_pieces(1, 65, 128), 1);
        assert_eq!(n_pieces(16, 128, 128), 1);
        assert_eq!(n_pieces(17, 129, 128), 4);
    }
}
