//! How kernels are timed, in one place.
//!
//! Weights are read cold: a job has copies of its weights that together exceed
//! the level 2 cache by a factor of three, and takes them in turns. A graph
//! holds many launches, so that the host's cost of a launch does not count.
//! Jobs run in turns, so that a GPU that slows down does so for all of them;
//! the result of a job is the median, and ratios are of one run.

use crate::buffer::DeviceBuffer;
use crate::device::Device;
use crate::error::Result;
use crate::probe::Probe;
use crate::stream::{Event, Graph, Stream};

/// Copies together exceed the level 2 cache by this factor.
const COLD_FACTOR: usize = 3;
/// Small matrices stay in the cache rather than take for ever to copy.
const MAX_COPIES: usize = 64;
/// A graph holds at least so many launches ..
const MIN_LAUNCHES: usize = 20;
/// .. or as many as take this long, if that is more.
const MIN_GRAPH_US: f64 = 1000.0;
const MAX_LAUNCHES: usize = 400;
/// Replays of a graph that are timed.
pub const N_ROUNDS: usize = 11;

/// Copies of something of `n_bytes` that a job needs to read it cold.
#[must_use]
pub fn n_copies(device: &Device, n_bytes: usize) -> usize {
    (COLD_FACTOR * device.info().l2_bytes).div_ceil(n_bytes.max(1)).clamp(1, MAX_COPIES)
}

/// Something to be timed: gives one launch to the stream; the number counts
/// launches and selects the copy of the weights.
pub type Job<'a> = Box<dyn Fn(&Stream, usize) -> Result<()> + 'a>;

/// What a job took.
#[derive(Debug, Clone, PartialEq)]
pub struct Timing {
    /// Microseconds of a launch, for each replay of the graph, ascending.
    us: Vec<f64>,
    /// Launches of a graph.
    pub n_launches: usize,
}

impl Timing {
    /// The middle replay: microseconds of a launch.
    #[must_use]
    pub fn median(&self) -> f64 {
        self.us[self.us.len() / 2]
    }

    /// Fastest and slowest replay: microseconds of a launch.
    #[must_use]
    pub fn range(&self) -> [f64; 2] {
        [self.us[0], self.us[self.us.len() - 1]]
    }
}

/// Times jobs in turns; `n_copies[i]` are the copies that job i rotates through.
///
/// # Errors
///
/// The first of a job, and what the driver reports.
///
/// # Panics
///
/// If there is not a number of copies for each job.
///
/// # Safety
///
/// What the jobs launch uses memory and kernels that live until this returns.
pub unsafe fn interleaved(
    stream: &Stream,
    jobs: &[Job<'_>],
    n_copies: &[usize],
) -> Result<Vec<Timing>> {
    assert_eq!(jobs.len(), n_copies.len(), "a number of copies for each job");
    let (start, end) = (Event::new(stream.device())?, Event::new(stream.device())?);
    let mut graphs = Vec::new();
    for (job, &n_copies) in jobs.iter().zip(n_copies) {
        // Whatever a job does only once, and the clocks.
        for i in 0..n_copies.min(4) {
            job(stream, i)?;
        }
        let capture = |n_launches: usize| -> Result<Graph> {
            // SAFETY: the caller's promise; the graphs are gone when this returns.
            unsafe { stream.capture(|stream| (0..n_launches).try_for_each(|i| job(stream, i))) }
        };
        let first = capture(MIN_LAUNCHES)?;
        first.launch(stream)?;
        let us = replay(stream, &first, &start, &end)? / MIN_LAUNCHES as f64;
        let wanted = ((MIN_GRAPH_US / us.max(0.1)) as usize).clamp(MIN_LAUNCHES, MAX_LAUNCHES);
        // All copies equally often.
        let n_launches = wanted.div_ceil(n_copies) * n_copies;
        graphs.push((capture(n_launches)?, n_launches));
    }
    let mut timings: Vec<Timing> = graphs
        .iter()
        .map(|(_, n_launches)| Timing { us: Vec::new(), n_launches: *n_launches })
        .collect();
    // The first round is warm-up.
    for round in 0..=N_ROUNDS {
        for ((graph, n_launches), timing) in graphs.iter().zip(&mut timings) {
            let us = replay(stream, graph, &start, &end)? / *n_launches as f64;
            if round > 0 {
                timing.us.push(us);
            }
        }
    }
    stream.synchronize()?;
    for timing in &mut timings {
        timing.us.sort_by(f64::total_cmp);
    }
    Ok(timings)
}

fn replay(stream: &Stream, graph: &Graph, start: &Event, end: &Event) -> Result<f64> {
    stream.record(start)?;
    graph.launch(stream)?;
    stream.record(end)?;
    end.microseconds_since(start)
}

/// What the memory of a GPU can do, in 10^9 bytes a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ceilings {
    /// Reading alone.
    pub read_gbps: f64,
    /// Copying from GPU memory to GPU memory: bytes read plus bytes written.
    pub copy_gbps: f64,
}

/// Measures the ceilings with 1 GiB; takes about 0.2 s and twice that memory.
///
/// # Errors
///
/// What the driver reports.
pub fn ceilings(stream: &Stream) -> Result<Ceilings> {
    let n_words = 1 << 28;
    let device = stream.device();
    let probe = Probe::new(device)?;
    let from = DeviceBuffer::<u32>::filled(device, n_words, 0x5A)?;
    let to = std::cell::RefCell::new(DeviceBuffer::<u32>::new(device, n_words)?);
    let sums = std::cell::RefCell::new(DeviceBuffer::<u32>::new(device, probe.n_sums())?);
    let jobs: [Job<'_>; 2] = [
        Box::new(|stream, _| probe.read(stream, &from, &mut sums.borrow_mut())),
        Box::new(|stream, _| stream.copy(&from, &mut to.borrow_mut())),
    ];
    // SAFETY: buffers and kernels live beyond the call.
    let timings = unsafe { interleaved(stream, &jobs, &[1, 1]) }?;
    let gb = from.n_bytes() as f64 / 1e9;
    Ok(Ceilings {
        read_gbps: gb / (timings[0].median() / 1e6),
        copy_gbps: 2.0 * gb / (timings[1].median() / 1e6),
    })
}
