//! GPUs: which there are, and a handle on one.

use std::cell::Cell;
use std::ffi::c_int;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use crate::error::{Context as _, Error, Result};
use crate::module::{self, Function, Module};
use crate::stream::Stream;

/// CUDA version of the compiler that makes the kernels.
const CUDA_VERSION: c_int = 13_000;

/// What a GPU is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Number of the GPU, from 0.
    pub ordinal: usize,
    /// As the driver names it.
    pub name: String,
    /// Memory in bytes.
    pub memory_bytes: usize,
    /// Level 2 cache in bytes.
    pub l2_bytes: usize,
    /// Streaming multiprocessors.
    pub n_sms: u32,
    /// Shared memory in bytes that one block may have, opt-in included.
    pub shared_bytes: u32,
    /// Compute capability: major, minor.
    pub capability: (u32, u32),
    /// CUDA version that the driver supports: 1000 * major + 10 * minor.
    pub driver_version: i32,
}

impl DeviceInfo {
    /// The architecture whose kernels this GPU takes, `ptx` if the driver has
    /// to compile them, or `None` if this build holds none for it.
    #[must_use]
    pub fn image(&self) -> Option<&'static str> {
        module::image(self.capability)
    }

    /// The driver's CUDA version, such as `13.0`.
    #[must_use]
    pub fn driver(&self) -> String {
        crate::error::version(self.driver_version)
    }
}

/// How many GPUs there are: at least one.
///
/// # Errors
///
/// [`Error::NoDriver`], [`Error::NoGpu`] or [`Error::DriverTooOld`].
pub fn count() -> Result<usize> {
    // SAFETY: it only opens and closes the driver's library.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoDriver);
    }
    let mut found = 0;
    // SAFETY: `found` outlives the call; it may be called before cuInit.
    unsafe { sys::cuDriverGetVersion(&raw mut found) }.result().context("cuDriverGetVersion")?;
    if found < CUDA_VERSION {
        return Err(Error::DriverTooOld { found, needed: CUDA_VERSION });
    }
    match result::init() {
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Err(Error::NoGpu),
        other => other.context("cuInit")?,
    }
    match result::device::get_count().context("cuDeviceGetCount")? {
        0 => Err(Error::NoGpu),
        n => Ok(n as usize),
    }
}

/// What every GPU of this machine is.
///
/// # Errors
///
/// As [`count`], and what the driver reports.
pub fn list() -> Result<Vec<DeviceInfo>> {
    (0..count()?).map(|ordinal| info(ordinal).map(|(_, info)| info)).collect()
}

fn info(ordinal: usize) -> Result<(sys::CUdevice, DeviceInfo)> {
    let count = count()?;
    if ordinal >= count {
        return Err(Error::NoSuchGpu { ordinal, count });
    }
    let raw = result::device::get(ordinal as c_int).context("cuDeviceGet")?;
    let attribute = |attribute| {
        // SAFETY: `raw` is a device that the driver has just returned.
        unsafe { result::device::get_attribute(raw, attribute) }.context("cuDeviceGetAttribute")
    };
    let mut driver_version = 0;
    // SAFETY: `driver_version` outlives the call.
    unsafe { sys::cuDriverGetVersion(&raw mut driver_version) }
        .result()
        .context("cuDriverGetVersion")?;
    let info = DeviceInfo {
        ordinal,
        name: result::device::get_name(raw).context("cuDeviceGetName")?,
        // SAFETY: as above.
        memory_bytes: unsafe { result::device::total_mem(raw) }.context("cuDeviceTotalMem")?,
        l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        n_sms: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
            as u32,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32,
        ),
        driver_version,
    };
    Ok((raw, info))
}

/// A GPU with the kernels loaded; a clone is another handle on the same.
///
/// Everything made from it keeps it alive. It may be used from any thread.
#[derive(Debug, Clone)]
pub struct Device(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    info: DeviceInfo,
    raw: sys::CUdevice,
    context: sys::CUcontext,
    /// Unloaded in `drop`, before the context is released.
    modules: Vec<Module>,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Inner {}
// SAFETY: likewise; the driver locks what it has to.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        let _alone = Alone::begin("cuModuleUnload");
        // SAFETY: the context is alive until it is released below.
        let _ = unsafe { result::ctx::set_current(self.context) };
        self.modules.clear();
        // SAFETY: it was retained by `open`, and everything made in it is gone.
        // A failure leaves nothing to be done.
        let _ = unsafe { result::primary_ctx::release(self.raw) };
    }
}

impl Device {
    /// Opens GPU number `ordinal` and loads the kernels; takes some 0.1 s.
    ///
    /// # Errors
    ///
    /// Tells apart that there is no driver, no GPU, no GPU of that number, that
    /// the driver is too old and that no kernels fit: see [`Error`].
    pub fn open(ordinal: usize) -> Result<Self> {
        let (raw, info) = info(ordinal)?;
        let no_kernels =
            Error::NoKernels { capability: info.capability, built: module::ARCHITECTURES };
        info.image().ok_or(no_kernels)?;
        let alone = Alone::begin("cuModuleLoadData")?;
        // SAFETY: `raw` is a device; `Inner::drop` releases it.
        let context =
            unsafe { result::primary_ctx::retain(raw) }.context("cuDevicePrimaryCtxRetain")?;
        // SAFETY: the context has just been retained.
        let current = unsafe { result::ctx::set_current(context) }.context("cuCtxSetCurrent");
        let mut inner = Inner { info, raw, context, modules: Vec::new() };
        let modules = current.and_then(|()| module::load_all());
        // Dropping `inner` takes it again.
        drop(alone);
        inner.modules = modules?;
        Ok(Self(Arc::new(inner)))
    }

    /// What it is.
    #[must_use]
    pub fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    /// Makes it the GPU that the driver's calls from this thread are for.
    pub(crate) fn bind(&self) -> Result<()> {
        // SAFETY: the context is alive as long as `self` is.
        unsafe { result::ctx::set_current(self.0.context) }.context("cuCtxSetCurrent")
    }

    /// Memory in bytes: free, all.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        result::mem_get_info().context("cuMemGetInfo")
    }

    /// A new stream that waits for no other.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn stream(&self) -> Result<Stream> {
        Stream::new(self)
    }

    /// The kernel of that name.
    ///
    /// # Errors
    ///
    /// [`Error::NoKernel`].
    pub fn function(&self, name: &str) -> Result<Function> {
        self.bind()?;
        let raw = self.0.modules.iter().find_map(|module| module.function(name));
        raw.map(|raw| Function::new(self, raw)).ok_or_else(|| Error::NoKernel(name.to_owned()))
    }

    /// Waits for everything given to this GPU so far, and for captures of other
    /// threads to end.
    ///
    /// # Errors
    ///
    /// Also those of work that ran before; and if this thread captures a stream.
    pub fn synchronize(&self) -> Result<()> {
        self.synchronize_alone(&Alone::begin("cuCtxSynchronize")?)
    }

    /// As [`Device::synchronize`], for who holds an [`Alone`].
    pub(crate) fn synchronize_alone(&self, _: &Alone) -> Result<()> {
        self.bind()?;
        result::ctx::synchronize().context("cuCtxSynchronize")
    }
}

/// Read while a stream is captured, written by what waits for the whole GPU:
/// that would invalidate the captures of other threads. All handles on a GPU
/// share one context, so there is one lock.
static CAPTURES: RwLock<()> = RwLock::new(());

thread_local! {
    /// Whether this thread captures a stream.
    static CAPTURING: Cell<bool> = const { Cell::new(false) };
}

/// Held while this thread captures a stream.
pub(crate) struct Capturing {
    /// `None` inside another capture of this thread.
    _guard: Option<RwLockReadGuard<'static, ()>>,
    outer: bool,
}

impl Capturing {
    pub(crate) fn begin() -> Self {
        let outer = CAPTURING.get();
        let guard = (!outer).then(|| CAPTURES.read().unwrap_or_else(PoisonError::into_inner));
        CAPTURING.set(true);
        Self { _guard: guard, outer }
    }
}

impl Drop for Capturing {
    fn drop(&mut self) {
        CAPTURING.set(self.outer);
    }
}

/// Held while no thread captures a stream.
pub(crate) struct Alone {
    _guard: RwLockWriteGuard<'static, ()>,
}

impl Alone {
    /// Waits for the captures of other threads; an error if this thread captures.
    pub(crate) fn begin(call: &'static str) -> Result<Self> {
        if CAPTURING.get() {
            let name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED".to_owned();
            return Err(Error::Driver { call, name });
        }
        Ok(Self { _guard: CAPTURES.write().unwrap_or_else(PoisonError::into_inner) })
    }
}
