//! The parameters of the kernels in `rans.cu`, which checks the same sizes.

/// `rans::Matrix`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Matrix {
    pub(super) table: u64,
    pub(super) words: u64,
    pub(super) states: u64,
    pub(super) positions: u64,
    pub(super) raw: u64,
    pub(super) rows: u32,
    pub(super) cols: u32,
    pub(super) prob_bits: u32,
    pub(super) table_bytes: u32,
    pub(super) one: u32,
    pub(super) f16: u32,
}

/// `rans::LoadArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct LoadArgs {
    pub(super) tiles: u64,
    pub(super) tile_starts: u64,
    pub(super) table: u64,
    pub(super) words: u64,
    pub(super) states: u64,
    pub(super) positions: u64,
    pub(super) raw: u64,
    pub(super) first_bad: u64,
    pub(super) rows: u32,
    pub(super) cols: u32,
    pub(super) prob_bits: u32,
    pub(super) table_bytes: u32,
    pub(super) one: u32,
    pub(super) n_tiles: u32,
    pub(super) f16: u32,
    pub(super) unused: u32,
}

/// `rans::Range`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Range {
    pub(super) row: u32,
    pub(super) col: u32,
    pub(super) rows: u32,
    pub(super) cols: u32,
}

/// `rans::DecodeArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct DecodeArgs {
    pub(super) matrix: Matrix,
    pub(super) out: u64,
    pub(super) stride: u64,
    pub(super) range: Range,
}

/// `rans::BytesArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct BytesArgs {
    pub(super) matrix: Matrix,
    pub(super) out: u64,
    pub(super) range: Range,
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
    pub(super) flip: u32,
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

const _: () = assert!(size_of::<Matrix>() == 64 && std::mem::offset_of!(Matrix, rows) == 40);
const _: () = assert!(size_of::<LoadArgs>() == 96 && std::mem::offset_of!(LoadArgs, rows) == 64);
const _: () = assert!(size_of::<DecodeArgs>() == 96);
const _: () = assert!(size_of::<BytesArgs>() == 96 && std::mem::offset_of!(BytesArgs, flip) == 88);
const _: () =
    assert!(size_of::<GatherArgs>() == 88 && std::mem::offset_of!(GatherArgs, n_ids) == 80);
const _: () =
    assert!(size_of::<ProductArgs>() == 120 && std::mem::offset_of!(ProductArgs, tokens) == 104);

/// Columns of a unit; its rows are 16.
pub(super) const UNIT_COLS: u32 = 256;
/// Bytes of a row of words: one for each lane.
pub(super) const ROW_BYTES: u32 = 64;
/// Of a unit's position: its symbols are not coded.
pub(super) const RAW_UNIT: u32 = 1 << 31;
/// Shared memory of a warp: `kLoadBytes`, `kDecodeWarpBytes`, `kRowsWarpBytes`.
pub(super) const LOAD_BYTES: u32 = 8 * 16 * ROW_BYTES;
pub(super) const DECODE_WARP_BYTES: u32 = 2 * 32 * ROW_BYTES + 16 * 128;
pub(super) const ROWS_WARP_BYTES: u32 = 2 * 32 * ROW_BYTES;

/// Shared memory for the words of a warp of a product: `kProductRows`, one buffer or
/// two.
pub(super) const fn product_words_bytes(int8: bool, two_planes: bool) -> u32 {
    if int8 {
        60 * ROW_BYTES
    } else if two_planes {
        32 * ROW_BYTES
    } else {
        2 * 32 * ROW_BYTES
    }
}
