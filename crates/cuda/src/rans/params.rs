//! The parameters of the kernels in `rans.cu`, which checks the same sizes.

/// `rans::Matrix`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Matrix {
    pub(super) table: u64,
    pub(super) words: u64,
    pub(super) states: u64,
    pub(super) counts: u64,
    pub(super) positions: u64,
    pub(super) raw: u64,
    pub(super) rows: u32,
    pub(super) cols: u32,
    pub(super) prob_bits: u32,
    pub(super) general: u32,
    pub(super) entry_bytes: u32,
    pub(super) align: u32,
}

/// `rans::LoadArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct LoadArgs {
    pub(super) tiles: u64,
    pub(super) tile_starts: u64,
    pub(super) word_starts: u64,
    pub(super) table: u64,
    pub(super) words: u64,
    pub(super) states: u64,
    pub(super) counts: u64,
    pub(super) positions: u64,
    pub(super) raw: u64,
    pub(super) first_bad: u64,
    pub(super) rows: u32,
    pub(super) cols: u32,
    pub(super) prob_bits: u32,
    pub(super) general: u32,
    pub(super) entry_bytes: u32,
    pub(super) n_tiles: u32,
}

/// `rans::DecodeArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct DecodeArgs {
    pub(super) matrix: Matrix,
    pub(super) out: u64,
    pub(super) stride: u64,
}

/// `rans::BytesArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct BytesArgs {
    pub(super) matrix: Matrix,
    pub(super) out: u64,
    pub(super) flip: u32,
    pub(super) unused: u32,
}

/// `rans::GatherArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct GatherArgs {
    pub(super) matrix: Matrix,
    pub(super) ids: u64,
    pub(super) out: u64,
    pub(super) n_ids: u32,
    pub(super) unused: u32,
}

/// `rans::ProductArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct ProductArgs {
    pub(super) matrix: Matrix,
    pub(super) twin: u64,
    pub(super) x: u64,
    pub(super) scales: u64,
    pub(super) bias: u64,
    pub(super) y: u64,
    pub(super) tokens: u32,
    pub(super) slices: u32,
    pub(super) scale_step: u32,
    pub(super) stride: u32,
}

const _: () = assert!(size_of::<Matrix>() == 72 && std::mem::offset_of!(Matrix, rows) == 48);
const _: () = assert!(size_of::<LoadArgs>() == 104 && std::mem::offset_of!(LoadArgs, rows) == 80);
const _: () = assert!(size_of::<DecodeArgs>() == 88);
const _: () = assert!(size_of::<BytesArgs>() == 88 && std::mem::offset_of!(BytesArgs, flip) == 80);
const _: () =
    assert!(size_of::<GatherArgs>() == 96 && std::mem::offset_of!(GatherArgs, n_ids) == 88);
const _: () =
    assert!(size_of::<ProductArgs>() == 128 && std::mem::offset_of!(ProductArgs, tokens) == 112);

/// Columns of a unit; its rows are 16.
pub(super) const UNIT_COLS: u32 = 256;
/// Shared memory of a warp: `kLoadBytes`, `kDecodeWarpBytes`, `kRowsWarpBytes`.
pub(super) const LOAD_BYTES: u32 = 32 * 130 * 2;
pub(super) const DECODE_WARP_BYTES: u32 = 2 * 2048 + 16 * 128;
pub(super) const ROWS_WARP_BYTES: u32 = 2 * 2048;

/// Bytes of a decode table.
pub(super) const fn table_bytes(prob_bits: u32, general: bool) -> u32 {
    if general { 1024 + (1 << prob_bits) } else { 4 << prob_bits }
}
