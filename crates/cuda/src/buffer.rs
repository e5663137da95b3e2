//! Memory of a GPU.

use std::marker::PhantomData;

use cudarc::driver::{result, sys};

use crate::device::{Alone, Device};
use crate::error::{Context as _, Result};

/// Plain values that mean the same on host and GPU: every bit pattern is one.
/// BF16 and FP16 travel as `u16`.
///
/// # Safety
///
/// The type has no padding, no pointers to the host, and every bit pattern is valid.
pub unsafe trait Element: Copy + Send + Sync + 'static {
    /// All bits zero.
    const ZERO: Self;
}

macro_rules! elements {
    ($($t:ty)*) => {$(
        // SAFETY: a number.
        unsafe impl Element for $t {
            const ZERO: Self = 0 as $t;
        }
    )*};
}
elements!(u8 i8 u16 i16 u32 i32 u64 i64 f32 f64);

/// Values in the memory of a GPU. Allocating and dropping wait for the GPU:
/// neither belongs into a loop, or into the capture of a graph.
#[derive(Debug)]
pub struct DeviceBuffer<T: Element> {
    device: Device,
    address: sys::CUdeviceptr,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> DeviceBuffer<T> {
    /// `len` elements, zero; 256-byte aligned.
    ///
    /// # Errors
    ///
    /// Out of memory.
    pub fn new(device: &Device, len: usize) -> Result<Self> {
        Self::filled(device, len, 0)
    }

    /// `len` elements, each byte of them `byte`.
    ///
    /// # Errors
    ///
    /// Out of memory.
    pub fn filled(device: &Device, len: usize, byte: u8) -> Result<Self> {
        let alone = Alone::begin("cuMemAlloc")?;
        device.bind()?;
        // An empty buffer has an address too.
        let n_bytes = (len * size_of::<T>()).max(1);
        // SAFETY: the range is freed once, by `drop`.
        let address = unsafe { result::malloc_sync(n_bytes) }.context("cuMemAlloc")?;
        // SAFETY: the range was allocated above. The fill is in the default
        // stream, which always exists and which other streams do not wait for.
        let filled = unsafe {
            result::memset_d8_sync(address, byte, n_bytes)
                .context("cuMemsetD8")
                .and_then(|()| device.synchronize_alone(&alone))
        };
        // Dropping the buffer takes it again.
        drop(alone);
        let buffer = Self { device: device.clone(), address, len, element: PhantomData };
        filled.map(|()| buffer)
    }

    /// Elements.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes.
    #[must_use]
    pub const fn n_bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Where it starts, for the parameters of kernels.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// The GPU.
    #[must_use]
    pub const fn device(&self) -> &Device {
        &self.device
    }
}

impl<T: Element> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        // Memory that is dropped while this thread captures a stream cannot be
        // freed then: it is lost.
        let Ok(alone) = Alone::begin("cuMemFree") else { return };
        // Kernels may still use it. If they failed, it is freed all the same.
        let _ = self.device.synchronize_alone(&alone);
        // SAFETY: it was allocated by `filled` and is freed once.
        let _ = unsafe { result::free_sync(self.address) };
    }
}
