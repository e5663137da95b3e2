//! The kernels in this build, and how they are launched.

use std::collections::HashMap;
use std::ffi::{CStr, c_void};

use cudarc::driver::{result, sys};

use crate::device::Device;
use crate::error::{Context as _, Result};
use crate::stream::Stream;

/// Name and fatbin of every source file of `kernels`.
static IMAGES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The architectures compiled in, separated by commas.
pub const ARCHITECTURES: &str = env!("TRANSOM_CUDA_ARCHITECTURES");

/// The architecture whose code a GPU of that capability takes; see [`best_image`].
pub(crate) fn image(capability: (u32, u32)) -> Option<&'static str> {
    let names: Vec<&'static str> = ARCHITECTURES.split(',').collect();
    best_image(&names, capability)
}

/// Code for `sm_XY` runs on capability X.Z from Z = Y on; with the letter `a`
/// on X.Y alone. PTX comes with a complete set only, made for the last of it,
/// and runs on everything newer.
fn best_image(names: &[&'static str], (major, minor): (u32, u32)) -> Option<&'static str> {
    let number = |name: &str| name.trim_end_matches('a').parse::<u32>().unwrap_or(u32::MAX);
    let fits = |name: &&&str| match name.ends_with('a') {
        true => number(name) == major * 10 + minor,
        false => number(name) / 10 == major && number(name) % 10 <= minor,
    };
    let newest = names.last().map_or(u32::MAX, |name| number(name));
    let ptx = (names.len() > 1 && major * 10 + minor > newest).then_some("ptx");
    names.iter().filter(fits).max_by_key(|name| number(name)).copied().or(ptx)
}

/// One image, loaded into the context that was current.
#[derive(Debug)]
pub(crate) struct Module {
    raw: sys::CUmodule,
    /// By name. Asking the driver for a name that is not there would be an
    /// error, which memory checkers report.
    functions: HashMap<String, sys::CUfunction>,
}

impl Module {
    fn load(image: &[u8]) -> Result<Self> {
        // SAFETY: the image is a whole fatbin made by nvcc, whose header tells its length.
        let raw = unsafe { result::module::load_data(image.as_ptr().cast()) };
        let mut module = Self { raw: raw.context("cuModuleLoadData")?, functions: HashMap::new() };
        let mut n = 0;
        // SAFETY: the module is loaded; `n` outlives the call.
        unsafe { sys::cuModuleGetFunctionCount(&raw mut n, module.raw) }
            .result()
            .context("cuModuleGetFunctionCount")?;
        let mut functions = vec![std::ptr::null_mut(); n as usize];
        // SAFETY: there is room for `n` handles.
        unsafe { sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), n, module.raw) }
            .result()
            .context("cuModuleEnumerateFunctions")?;
        for function in functions {
            let mut name = std::ptr::null();
            // SAFETY: the handle is of this module; `name` outlives the call.
            unsafe { sys::cuFuncGetName(&raw mut name, function) }
                .result()
                .context("cuFuncGetName")?;
            // SAFETY: the driver returned a C string that lives as long as the module.
            let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
            module.functions.insert(name, function);
        }
        Ok(module)
    }

    /// `None` if it holds no kernel of that name.
    pub(crate) fn function(&self, name: &str) -> Option<sys::CUfunction> {
        self.functions.get(name).copied()
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: it was loaded and nobody else unloads it. A failure leaves nothing to be done.
        let _ = unsafe { result::module::unload(self.raw) };
    }
}

/// Loads every image into the current context.
pub(crate) fn load_all() -> Result<Vec<Module>> {
    IMAGES.iter().map(|(_, image)| Module::load(image)).collect()
}

/// A kernel.
#[derive(Debug, Clone)]
pub struct Function {
    /// Keeps the module loaded.
    device: Device,
    raw: sys::CUfunction,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: likewise.
unsafe impl Sync for Function {}

/// Blocks, threads and memory of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block in bytes. Above 48 KiB, call
    /// [`Function::allow_shared`] once before.
    pub shared_bytes: u32,
    /// Programmatic dependent launch: the kernel may start before the one ahead
    /// of it in the stream has finished, and waits where it says
    /// `griddepcontrol.wait`.
    pub dependent: bool,
}

impl Launch {
    /// `n_blocks` blocks of `n_threads` threads, in one dimension.
    #[must_use]
    pub const fn new(n_blocks: u32, n_threads: u32) -> Self {
        Self { grid: [n_blocks, 1, 1], block: [n_threads, 1, 1], shared_bytes: 0, dependent: false }
    }

    /// With dynamic shared memory.
    #[must_use]
    pub const fn shared(self, shared_bytes: u32) -> Self {
        Self { shared_bytes, ..self }
    }

    /// With or without programmatic dependent launch.
    #[must_use]
    pub const fn dependent(self, dependent: bool) -> Self {
        Self { dependent, ..self }
    }

    /// What the driver wants to know besides the sizes.
    fn attributes(&self) -> Vec<sys::CUlaunchAttribute> {
        if !self.dependent {
            return Vec::new();
        }
        let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
        value.programmaticStreamSerializationAllowed = 1;
        vec![sys::CUlaunchAttribute { id, pad: [0; 4], value }]
    }

    fn config(
        &self,
        stream: sys::CUstream,
        attributes: &mut [sys::CUlaunchAttribute],
    ) -> sys::CUlaunchConfig {
        sys::CUlaunchConfig {
            gridDimX: self.grid[0],
            gridDimY: self.grid[1],
            gridDimZ: self.grid[2],
            blockDimX: self.block[0],
            blockDimY: self.block[1],
            blockDimZ: self.block[2],
            sharedMemBytes: self.shared_bytes,
            hStream: stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        }
    }
}

impl Function {
    pub(crate) fn new(device: &Device, raw: sys::CUfunction) -> Self {
        Self { device: device.clone(), raw }
    }

    /// Lets blocks have up to `bytes` of dynamic shared memory. Call it once, not
    /// for each launch.
    ///
    /// # Errors
    ///
    /// If the GPU has less.
    pub fn allow_shared(&self, bytes: u32) -> Result<()> {
        use sys::CUfunction_attribute_enum as Attribute;
        self.device.bind()?;
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the kernel is loaded as long as `self.device` is there.
        unsafe { result::function::set_function_attribute(self.raw, attribute, bytes as i32) }
            .context("cuFuncSetAttribute")
    }

    /// Blocks that one multiprocessor holds at a time.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn blocks_per_sm(&self, n_threads: u32, shared_bytes: u32) -> Result<u32> {
        self.device.bind()?;
        // SAFETY: the kernel is loaded as long as `self.device` is there.
        let n = unsafe {
            result::occupancy::max_active_block_per_multiprocessor(
                self.raw,
                n_threads as i32,
                shared_bytes as usize,
            )
        };
        Ok(n.context("cuOccupancyMaxActiveBlocksPerMultiprocessor")?.max(0) as u32)
    }

    /// Launches the kernel, whose only parameter is `params`, by value.
    ///
    /// # Errors
    ///
    /// What the driver reports of the launch; what goes wrong inside the kernel
    /// is reported by a later call that waits.
    ///
    /// # Safety
    ///
    /// `P` has the layout of the kernel's parameter. Every pointer in it is to
    /// memory of this GPU of the size that the kernel expects, which stays
    /// allocated until the kernel is done, and which nothing else writes, or
    /// reads while the kernel writes it.
    pub unsafe fn launch<P: Copy>(
        &self,
        stream: &Stream,
        launch: Launch,
        params: &P,
    ) -> Result<()> {
        self.device.bind()?;
        let mut attributes = launch.attributes();
        let config = launch.config(stream.raw(), &mut attributes);
        let mut arguments: [*mut c_void; 1] = [std::ptr::from_ref(params).cast_mut().cast()];
        // SAFETY: config, attributes and parameter outlive the call, which copies
        // them; the rest is the caller's obligation.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                self.raw,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .context("cuLaunchKernelEx")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_takes_the_newest_code_that_it_can_run() {
        let all = ["80", "86", "89", "90a", "100a", "120"];
        let cases = [
            ((7, 5), None),
            ((8, 0), Some("80")),
            ((8, 6), Some("86")),
            ((8, 7), Some("86")),
            ((8, 9), Some("89")),
            ((9, 0), Some("90a")),
            ((10, 0), Some("100a")),
            ((10, 3), None),
            ((12, 0), Some("120")),
            ((12, 1), Some("120")),
            ((13, 0), Some("ptx")),
        ];
        for (capability, expected) in cases {
            assert_eq!(best_image(&all, capability), expected, "{capability:?}");
        }
        assert_eq!(best_image(&["90a"], (9, 0)), Some("90a"));
        assert_eq!(best_image(&["90a"], (12, 0)), None);
    }

    #[test]
    fn every_image_is_a_fatbin() {
        assert!(!IMAGES.is_empty());
        for (name, image) in IMAGES {
            assert_eq!(image[..4], 0xBA55_ED50_u32.to_le_bytes(), "{name}");
        }
    }
}
