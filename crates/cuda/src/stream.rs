//! Streams, events and graphs.

use cudarc::driver::{result, sys};

use crate::buffer::{DeviceBuffer, Element};
use crate::device::{Capturing, Device};
use crate::error::{Context as _, Error, Result};

/// A queue of work on a GPU; dropping it waits for that work.
#[derive(Debug)]
pub struct Stream {
    device: Device,
    raw: sys::CUstream,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: likewise.
unsafe impl Sync for Stream {}

impl Stream {
    pub(crate) fn new(device: &Device) -> Result<Self> {
        device.bind()?;
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking)
            .context("cuStreamCreate")?;
        Ok(Self { device: device.clone(), raw })
    }

    /// A stream whose blocks the GPU starts before those of ordinary streams.
    pub(crate) fn urgent(device: &Device) -> Result<Self> {
        device.bind()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: both numbers outlive the call.
        unsafe { sys::cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest) }
            .result()
            .context("cuCtxGetStreamPriorityRange")?;
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: `raw` outlives the call; `drop` destroys the stream.
        unsafe { sys::cuStreamCreateWithPriority(&raw mut raw, flags, greatest) }
            .result()
            .context("cuStreamCreateWithPriority")?;
        Ok(Self { device: device.clone(), raw })
    }

    /// The GPU.
    #[must_use]
    pub const fn device(&self) -> &Device {
        &self.device
    }

    /// The driver's handle.
    #[must_use]
    pub const fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Waits until everything in the stream is done.
    ///
    /// # Errors
    ///
    /// Also those of the work waited for.
    pub fn synchronize(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: the stream lives until `self` is dropped.
        unsafe { result::stream::synchronize(self.raw) }.context("cuStreamSynchronize")
    }

    /// Copies `values` into a new buffer; returns when that is done.
    ///
    /// # Errors
    ///
    /// Out of memory.
    pub fn upload<T: Element>(&self, values: &[T]) -> Result<DeviceBuffer<T>> {
        let mut buffer = DeviceBuffer::new(&self.device, values.len())?;
        self.write(values, &mut buffer)?;
        Ok(buffer)
    }

    /// Copies `values` to a buffer of the same length; returns when that is done.
    ///
    /// # Errors
    ///
    /// [`Error::Length`], and what the driver reports.
    pub fn write<T: Element>(&self, values: &[T], buffer: &mut DeviceBuffer<T>) -> Result<()> {
        check_length("values to write", values.len(), buffer.len())?;
        self.device.bind()?;
        if !values.is_empty() {
            // SAFETY: source and destination are of the same length and live beyond the wait below.
            unsafe { result::memcpy_htod_async(buffer.address(), values, self.raw) }
                .context("cuMemcpyHtoDAsync")?;
        }
        self.synchronize()
    }

    /// Waits for the stream and copies a buffer to the host.
    ///
    /// # Errors
    ///
    /// Also those of the work waited for.
    pub fn download<T: Element>(&self, buffer: &DeviceBuffer<T>) -> Result<Vec<T>> {
        self.device.bind()?;
        let mut values = vec![T::ZERO; buffer.len()];
        if !values.is_empty() {
            // SAFETY: source and destination are of the same length and live beyond the wait below.
            unsafe { result::memcpy_dtoh_async(&mut values, buffer.address(), self.raw) }
                .context("cuMemcpyDtoHAsync")?;
        }
        self.synchronize()?;
        Ok(values)
    }

    /// Fills a buffer with one byte, in the order of the stream.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn fill<T: Element>(&self, buffer: &mut DeviceBuffer<T>, byte: u8) -> Result<()> {
        self.device.bind()?;
        // SAFETY: the range is the buffer's; freeing it waits for the GPU.
        unsafe { result::memset_d8_async(buffer.address(), byte, buffer.n_bytes(), self.raw) }
            .context("cuMemsetD8Async")
    }

    /// Copies a buffer to another of the same length, in the order of the stream.
    ///
    /// # Errors
    ///
    /// [`Error::Length`], and what the driver reports.
    pub fn copy<T: Element>(&self, from: &DeviceBuffer<T>, to: &mut DeviceBuffer<T>) -> Result<()> {
        check_length("buffer to copy", from.len(), to.len())?;
        self.device.bind()?;
        // SAFETY: both ranges are the buffers'; freeing them waits for the GPU.
        unsafe { result::memcpy_dtod_async(to.address(), from.address(), from.n_bytes(), self.raw) }
            .context("cuMemcpyDtoDAsync")
    }

    /// Marks this place of the stream.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn record(&self, event: &Event) -> Result<()> {
        self.device.bind()?;
        // SAFETY: both live.
        unsafe { result::event::record(event.raw, self.raw) }.context("cuEventRecord")
    }

    /// Lets this stream go on only after the place that `event` marks.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.device.bind()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both live.
        unsafe { result::stream::wait_event(self.raw, event.raw, flags) }
            .context("cuStreamWaitEvent")
    }

    /// Collects what `work` gives to this stream into a graph, instead of doing it.
    ///
    /// # Errors
    ///
    /// Those of `work`, and work that waits or allocates.
    ///
    /// # Safety
    ///
    /// The memory and kernels that the collected work uses live, and are used
    /// by nothing else at the same time, whenever the graph runs.
    pub unsafe fn capture(&self, work: impl FnOnce(&Self) -> Result<()>) -> Result<Graph> {
        self.device.bind()?;
        let capturing = Capturing::begin();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        unsafe { result::stream::begin_capture(self.raw, mode) }.context("cuStreamBeginCapture")?;
        let done = work(self);
        // SAFETY: the capture began above; it ends also if `work` failed.
        let graph = unsafe { result::stream::end_capture(self.raw) };
        drop(capturing);
        done?;
        let graph = graph.context("cuStreamEndCapture")?;
        // SAFETY: the graph was made above, and nobody else destroys it.
        let exec = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
        // SAFETY: likewise; what was instantiated is a copy.
        let _ = unsafe { result::graph::destroy(graph) };
        Ok(Graph { device: self.device.clone(), raw: exec.context("cuGraphInstantiate")? })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.synchronize();
        // SAFETY: it was created by `new`, and nobody else destroys it.
        let _ = unsafe { result::stream::destroy(self.raw) };
    }
}

pub(crate) const fn check_length(what: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Length { what, found, expected }) }
}

/// A place in a stream, with the time at which it was reached.
#[derive(Debug)]
pub struct Event {
    device: Device,
    raw: sys::CUevent,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: likewise.
unsafe impl Sync for Event {}

impl Event {
    /// An event that marks nothing yet.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn new(device: &Device) -> Result<Self> {
        device.bind()?;
        let raw =
            result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).context("cuEventCreate")?;
        Ok(Self { device: device.clone(), raw })
    }

    /// Waits for both events; microseconds from `start` to `self`.
    ///
    /// # Errors
    ///
    /// Also those of the work waited for.
    pub fn microseconds_since(&self, start: &Self) -> Result<f64> {
        self.device.bind()?;
        // SAFETY: both live until the calls return.
        unsafe {
            result::event::synchronize(self.raw).context("cuEventSynchronize")?;
            let milliseconds =
                result::event::elapsed(start.raw, self.raw).context("cuEventElapsedTime")?;
            Ok(f64::from(milliseconds) * 1e3)
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: it was created by `new`, and nobody else destroys it.
        let _ = unsafe { result::event::destroy(self.raw) };
    }
}

/// Work that was collected once and can be done many times, for the cost of
/// one launch; made by [`Stream::capture`].
#[derive(Debug)]
pub struct Graph {
    device: Device,
    raw: sys::CUgraphExec,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Graph {}

impl Graph {
    /// Does the work, in the order of the stream.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        self.device.bind()?;
        // SAFETY: graph and stream live; what the work uses does too, as
        // whoever captured it has promised.
        unsafe { result::graph::launch(self.raw, stream.raw()) }.context("cuGraphLaunch")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: it was instantiated by `capture`, and nobody else destroys it.
        let _ = unsafe { result::graph::exec_destroy(self.raw) };
    }
}
