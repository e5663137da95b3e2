//! Kernels that show whether a GPU works, and how fast it reads.

use crate::buffer::DeviceBuffer;
use crate::device::Device;
use crate::error::Result;
use crate::module::{Function, Launch};
use crate::stream::{Stream, check_length};

/// Of `kernels/probe.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    from: u64,
    to: u64,
    n: u64,
    key: u32,
    unused: u32,
}

const _: () = assert!(size_of::<Params>() == 32);

const THREADS: u32 = 256;
/// Words of a piece of 16 bytes.
const PIECE: usize = 4;
/// Dynamic shared memory of [`Probe::reverse`]: 68 KiB, more than a kernel has unasked.
const SHARED_BYTES: u32 = (4096 + THREADS) * 16;

/// Simple kernels with known answers.
#[derive(Debug)]
pub struct Probe {
    xor: Function,
    shared: Function,
    read: Function,
    n_blocks: u32,
}

impl Probe {
    /// Finds the kernels.
    ///
    /// # Errors
    ///
    /// If they are not there.
    pub fn new(device: &Device) -> Result<Self> {
        let shared = device.function("probe_shared")?;
        shared.allow_shared(SHARED_BYTES)?;
        let read = device.function("probe_read")?;
        let n_blocks = device.info().n_sms * read.blocks_per_sm(THREADS, 0)?;
        Ok(Self { xor: device.function("probe_xor")?, shared, read, n_blocks })
    }

    /// `to[i] = from[i] ^ key`; lengths are equal and multiples of 4. With
    /// `dependent`, by programmatic dependent launch.
    ///
    /// # Errors
    ///
    /// Wrong lengths, and what the driver reports.
    pub fn xor(
        &self,
        stream: &Stream,
        from: &DeviceBuffer<u32>,
        to: &mut DeviceBuffer<u32>,
        key: u32,
        dependent: bool,
    ) -> Result<()> {
        check_length("words to XOR", from.len(), to.len())?;
        check_length("words to XOR", from.len(), from.len() / PIECE * PIECE)?;
        let params = params(from, to, key);
        let launch = Launch::new(self.n_blocks, THREADS).dependent(dependent);
        // SAFETY: both buffers have `params.n` pieces; freeing them waits for the kernel.
        unsafe { self.xor.launch(stream, launch, &params) }
    }

    /// Reverses every 256 pieces of 4 words through shared memory; lengths are
    /// equal and multiples of 1024.
    ///
    /// # Errors
    ///
    /// Wrong lengths, and what the driver reports.
    pub fn reverse(
        &self,
        stream: &Stream,
        from: &DeviceBuffer<u32>,
        to: &mut DeviceBuffer<u32>,
    ) -> Result<()> {
        let block = THREADS as usize * PIECE;
        check_length("words to reverse", from.len(), to.len())?;
        check_length("words to reverse", from.len(), from.len() / block * block)?;
        let launch = Launch::new((from.len() / block) as u32, THREADS).shared(SHARED_BYTES);
        // SAFETY: both buffers have `params.n` pieces, a multiple of a block's;
        // freeing them waits for the kernel.
        unsafe { self.shared.launch(stream, launch, &params(from, to, 0)) }
    }

    /// Words that [`Probe::read`] writes.
    #[must_use]
    pub const fn n_sums(&self) -> usize {
        (self.n_blocks * THREADS) as usize * PIECE
    }

    /// Reads all of `from`, a multiple of 4 words, and writes XORs of it to
    /// `sums`, [`Probe::n_sums`] words: thread t's piece is the XOR of the pieces
    /// t, t + T, t + 2T, .. of `from`, with T threads.
    ///
    /// # Errors
    ///
    /// Wrong lengths, and what the driver reports.
    pub fn read(
        &self,
        stream: &Stream,
        from: &DeviceBuffer<u32>,
        sums: &mut DeviceBuffer<u32>,
    ) -> Result<()> {
        check_length("sums", sums.len(), self.n_sums())?;
        check_length("words to read", from.len(), from.len() / PIECE * PIECE)?;
        let launch = Launch::new(self.n_blocks, THREADS);
        // SAFETY: `from` has `params.n` pieces, `sums` one for each thread;
        // freeing them waits for the kernel.
        unsafe { self.read.launch(stream, launch, &params(from, sums, 0)) }
    }
}

fn params(from: &DeviceBuffer<u32>, to: &DeviceBuffer<u32>, key: u32) -> Params {
    let n = (from.len() / PIECE) as u64;
    Params { from: from.address(), to: to.address(), n, key, unused: 0 }
}
