//! Launch parameters, as in `kernels/params.h`.

use super::MAX_SEGMENTS;

/// `transom::Segment`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Segment {
    pub overflow: u64,
    pub symbols: u64,
    pub scales: u64,
    pub end_tile: u32,
    pub scale_step: u32,
}

/// `transom::ProductParams`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Product {
    pub segments: [Segment; MAX_SEGMENTS],
    pub chunks: u64,
    pub x: u64,
    pub y: u64,
    pub bias: u64,
    pub workspace: u64,
    pub meetings: u64,
    pub rows: u32,
    pub cols: u32,
    pub tokens: u32,
    pub n_segments: u32,
    pub n_tiles: u32,
    pub chunk_bytes: u32,
    pub x_stride: u32,
    pub strips: u32,
    pub parts: u32,
    pub slots: u32,
    pub part_share: u32,
    pub patience: u32,
}

/// `transom::TensorMap`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct TensorMap(pub [u64; 16]);

/// `transom::PrefillParams`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Prefill {
    pub product: Product,
    pub x: TensorMap,
    pub whole: u32,
    pub unused: [u32; 15],
}

/// `transom::ActivationOrder`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum ActivationOrder {
    Fragments = 0,
    CoreMatrices = 1,
    Rows = 2,
}

/// `transom::ActivationParams`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Activations {
    pub x: u64,
    pub out: u64,
    pub cols: u32,
    pub tokens: u32,
    pub order: u32,
    pub unused: u32,
}

// As in kernels/params.h.
const _: () = assert!(size_of::<Segment>() == 32);
const _: () = assert!(std::mem::offset_of!(Segment, end_tile) == 24);
const _: () = assert!(size_of::<Product>() == 192);
const _: () = assert!(std::mem::offset_of!(Product, x) == 104);
const _: () = assert!(std::mem::offset_of!(Product, rows) == 144);
const _: () = assert!(size_of::<Prefill>() == 320 + 64);
const _: () = assert!(std::mem::offset_of!(Prefill, x) == 192);
const _: () = assert!(std::mem::offset_of!(Prefill, whole) == 320);
const _: () = assert!(size_of::<Activations>() == 32);
