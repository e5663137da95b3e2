//! How kernels are timed, in one place.
//!
//! Weights are read cold: a job has copies of its weights that together exceed
//! the level 2 cache by a factor of three, and takes them in turns. A graph
//! holds many launches, so that the host's cost of a launch does not count.
//! Jobs run in turns, so that a GPU that slows down does so for all of them;
//! the result of a job is the median, and ratios are of one run.

use std::cell::RefCell;

use transom::Dtype;

use crate::buffer::DeviceBuffer;
use crate::cublas::{self, Algorithm, Cublas};
use crate::device::Device;
use crate::error::{Result, of_rans};
use crate::fixed::{Decoder, DeviceMatrix, FixedMatrix, Part};
use crate::prefill::{self, Prefill};
use crate::probe::Probe;
use crate::product::{INVARIANT_TOKENS, Product};
use crate::rans::{Rans, RansMatrix};
use crate::stream::{Event, Graph, Stream};

/// Copies together exceed the level 2 cache by this factor.
const COLD_FACTOR: usize = 3;
/// Small matrices stay in the cache rather than take for ever to copy.
const MAX_COPIES: usize = 64;
/// As many launches as take this long, if that is more than [`Effort::launches`].
const MIN_GRAPH_US: f64 = 1000.0;
const MAX_LAUNCHES: usize = 400;

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effort {
    /// A graph holds at least so many launches.
    pub launches: usize,
    /// Replays of a graph that are timed.
    pub rounds: usize,
}

impl Effort {
    /// For what takes microseconds.
    pub const FULL: Self = Self { launches: 20, rounds: 11 };
    /// For what takes milliseconds.
    pub const LONG: Self = Self { launches: 8, rounds: 5 };
}

/// Copies of something of `n_bytes` that a job needs to read it cold.
#[must_use]
pub fn n_copies(device: &Device, n_bytes: usize) -> usize {
    (COLD_FACTOR * device.info().l2_bytes).div_ceil(n_bytes.max(1)).clamp(1, MAX_COPIES)
}

/// Something to be timed: gives one launch to the stream; the number counts
/// launches from 0 in each graph and selects the copy of the weights.
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
    effort: Effort,
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
        let first = capture(effort.launches)?;
        first.launch(stream)?;
        let us = replay(stream, &first, &start, &end)? / effort.launches as f64;
        let wanted = ((MIN_GRAPH_US / us.max(0.1)) as usize).clamp(effort.launches, MAX_LAUNCHES);
        // All copies equally often.
        let n_launches = wanted.div_ceil(n_copies) * n_copies;
        graphs.push((capture(n_launches)?, n_launches));
    }
    let mut timings: Vec<Timing> = graphs
        .iter()
        .map(|(_, n_launches)| Timing { us: Vec::new(), n_launches: *n_launches })
        .collect();
    // The first round is warm-up.
    for round in 0..=effort.rounds {
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
    let to = RefCell::new(DeviceBuffer::<u32>::new(device, n_words)?);
    let sums = RefCell::new(DeviceBuffer::<u32>::new(device, probe.n_sums())?);
    let jobs: [Job<'_>; 2] = [
        Box::new(|stream, _| probe.read(stream, &from, &mut sums.borrow_mut())),
        Box::new(|stream, _| stream.copy(&from, &mut to.borrow_mut())),
    ];
    // SAFETY: buffers and kernels live beyond the call.
    let timings = unsafe { interleaved(stream, &jobs, &[1, 1], Effort::FULL) }?;
    let gb = from.n_bytes() as f64 / 1e9;
    Ok(Ceilings {
        read_gbps: gb / (timings[0].median() / 1e6),
        copy_gbps: 2.0 * gb / (timings[1].median() / 1e6),
    })
}

/// Copies of a matrix in one layout, for products; entropy-coded ones of up to 64 tokens.
#[derive(Debug)]
pub enum Weights<'a> {
    /// Dense in the order of chunks, or of a fixed rate.
    Chunks(Vec<Product>),
    /// Entropy-coded, with one scale for all rows if they are INT8.
    Rans(&'a Rans, Vec<RansMatrix>, Option<DeviceBuffer<f32>>),
}

/// Multiplies with the copy of that number: activations, result.
type Multiply<'a> =
    Box<dyn Fn(&Stream, usize, &DeviceBuffer<u16>, &mut DeviceBuffer<u16>) -> Result<()> + 'a>;

impl Weights<'_> {
    const fn n_copies(&self) -> usize {
        match self {
            Self::Chunks(products) => products.len(),
            Self::Rans(_, matrices, _) => matrices.len(),
        }
    }

    fn multiply(&self, device: &Device, n_tokens: usize) -> Result<Multiply<'_>> {
        Ok(match self {
            Self::Chunks(products) => {
                let scratch = RefCell::new(products[0].scratch(device, n_tokens)?);
                Box::new(move |stream, i, x, y| {
                    let product = &products[i % products.len()];
                    product.run(stream, x, y, n_tokens, &mut scratch.borrow_mut())
                })
            }
            Self::Rans(rans, matrices, scales) => {
                let n_words = matrices[0].fragment_words(n_tokens);
                let scratch = RefCell::new(DeviceBuffer::new(device, n_words)?);
                Box::new(move |stream, i, x, y| {
                    let (matrix, scales) = (&matrices[i % matrices.len()], scales.as_ref());
                    let scratch = &mut scratch.borrow_mut();
                    rans.run(stream, matrix, x, n_tokens, scales, None, y, scratch).map_err(of_rans)
                })
            }
        })
    }
}

/// A matrix below itself, `times` in all: large matrices for benchmarks, of
/// which only a part is encoded.
#[must_use]
pub fn repeat(matrix: &FixedMatrix, times: usize) -> FixedMatrix {
    FixedMatrix {
        rows: matrix.rows * times,
        chunks: matrix.chunks.repeat(times),
        n_escapes: matrix.n_escapes * times,
        scales: matrix.scales.repeat(if matrix.scales.len() == matrix.rows { times } else { 1 }),
        ..matrix.clone()
    }
}

/// What the layouts of a matrix took for the same product.
#[derive(Debug)]
pub struct ProductTimes {
    /// The fastest algorithm of cuBLAS, with dense weights.
    pub cublas: (Algorithm, Timing),
    /// Of each layout.
    pub layouts: Vec<Timing>,
    /// Of each layout, `[tokens][rows]`.
    pub results: Vec<Vec<u16>>,
}

/// Times a product in every layout and with cuBLAS, in turns.
/// `dense` are copies of the weights for cuBLAS, `x` the activations. What brings
/// activations into the order of the kernels is part of the time.
///
/// # Errors
///
/// Lengths that do not fit, and what driver and libraries report.
pub fn products(
    stream: &Stream,
    baseline: &cublas::Product<'_>,
    dense: &[DeviceBuffer<u16>],
    layouts: &[&Weights<'_>],
    x: &[u16],
) -> Result<ProductTimes> {
    let shape = baseline.shape();
    let device = stream.device();
    let row_major = stream.upload(x)?;
    let new_y = || DeviceBuffer::<u16>::filled(device, shape.m * shape.n, 0xFF).map(RefCell::new);
    let y = new_y()?;
    let effort = if shape.m > INVARIANT_TOKENS { Effort::LONG } else { Effort::FULL };
    let (algorithm, _) = baseline.time(dense, &row_major, &mut y.borrow_mut(), effort)?;
    let outputs = layouts.iter().map(|_| new_y()).collect::<Result<Vec<_>>>()?;
    let mut jobs: Vec<Job<'_>> = Vec::new();
    let mut n_copies = vec![dense.len()];
    jobs.push(Box::new(|_, i| {
        baseline.multiply(&algorithm, &dense[i % dense.len()], &row_major, &mut y.borrow_mut())
    }));
    for (weights, y) in layouts.iter().zip(&outputs) {
        n_copies.push(weights.n_copies());
        let (multiply, x) = (weights.multiply(device, shape.m)?, &row_major);
        jobs.push(Box::new(move |stream, i| multiply(stream, i, x, &mut y.borrow_mut())));
    }
    // SAFETY: buffers and kernels live beyond the call.
    let mut timings = unsafe { interleaved(stream, &jobs, &n_copies, effort) }?;
    drop(jobs);
    let layouts = timings.split_off(1);
    let results = outputs.iter().map(|y| stream.download(&y.borrow()));
    Ok(ProductTimes {
        cublas: (algorithm.clone(), timings.remove(0)),
        results: results.collect::<Result<_>>()?,
        layouts,
    })
}

/// Times a chain of products of one token in every layout and with cuBLAS, in
/// turns: microseconds of a product of which each waits for the one before. If
/// the matrix is square, the result of one is the input of the next; every 32
/// products `x` is copied there again, lest numbers grow beyond bounds.
///
/// # Errors
///
/// As [`products`].
pub fn chain(
    stream: &Stream,
    baseline: &cublas::Product<'_>,
    dense: &[DeviceBuffer<u16>],
    layouts: &[&Weights<'_>],
    x: &[u16],
) -> Result<(Algorithm, Vec<Timing>)> {
    let (shape, device) = (baseline.shape(), stream.device());
    let buffers = || -> Result<[RefCell<DeviceBuffer<u16>>; 2]> {
        let y = DeviceBuffer::filled(device, shape.m * shape.n, 0)?;
        Ok([RefCell::new(stream.upload(x)?), RefCell::new(y)])
    };
    const FRESH: usize = 32;
    let square = shape.n == shape.k;
    let original = stream.upload(x)?;
    // Input and output of the launch of that number.
    let turn = |i: usize, buffers: &[RefCell<DeviceBuffer<u16>>; 2]| -> Result<[usize; 2]> {
        if square && i.is_multiple_of(FRESH) {
            stream.copy(&original, &mut buffers[0].borrow_mut())?;
        }
        Ok(if square && i % 2 == 1 { [1, 0] } else { [0, 1] })
    };
    let own = (0..=layouts.len()).map(|_| buffers()).collect::<Result<Vec<_>>>()?;
    let algorithm = {
        let [x, y] = &own[0];
        baseline.time(dense, &x.borrow(), &mut y.borrow_mut(), Effort::FULL)?.0
    };
    let mut jobs: Vec<Job<'_>> = Vec::new();
    let mut n_copies = vec![dense.len()];
    jobs.push(Box::new(|_, i| {
        let [from, to] = turn(i, &own[0])?;
        let (x, mut y) = (own[0][from].borrow(), own[0][to].borrow_mut());
        baseline.multiply(&algorithm, &dense[i % dense.len()], &x, &mut y)
    }));
    for (weights, buffers) in layouts.iter().zip(&own[1..]) {
        n_copies.push(weights.n_copies());
        let (multiply, turn) = (weights.multiply(device, shape.m)?, &turn);
        jobs.push(Box::new(move |stream, i| {
            let [from, to] = turn(i, buffers)?;
            multiply(stream, i, &buffers[from].borrow(), &mut buffers[to].borrow_mut())
        }));
    }
    // SAFETY: buffers and kernels live beyond the call.
    let timings = unsafe { interleaved(stream, &jobs, &n_copies, Effort::FULL) }?;
    drop(jobs);
    Ok((algorithm, timings))
}

/// Copies of a matrix in one layout, to be decoded.
#[derive(Debug)]
pub enum Encoded<'a> {
    /// In the order of chunks, with one scale for all rows if they are INT8.
    Fixed(Vec<DeviceMatrix>, Option<DeviceBuffer<f32>>),
    /// Entropy-coded.
    Rans(&'a Rans, Vec<RansMatrix>),
}

impl Encoded<'_> {
    const fn n_copies(&self) -> usize {
        match self {
            Self::Fixed(matrices, _) => matrices.len(),
            Self::Rans(_, matrices) => matrices.len(),
        }
    }

    fn copy(&self, i: usize) -> prefill::Weights<'_> {
        match self {
            Self::Fixed(matrices, scales) => {
                prefill::Weights::Fixed(&matrices[i % matrices.len()], scales.as_ref())
            }
            Self::Rans(_, matrices) => prefill::Weights::Rans(&matrices[i % matrices.len()]),
        }
    }
}

/// Times decoding to dense elements; returns what was decoded last, as bytes.
/// INT8 is dequantised to FP16 if `to_half`.
///
/// # Errors
///
/// What the driver reports.
pub fn decode(
    stream: &Stream,
    encoded: &Encoded<'_>,
    [rows, cols]: [usize; 2],
    dtype: Dtype,
    to_half: bool,
) -> Result<(Timing, Vec<u8>)> {
    let device = stream.device();
    let decoder = Decoder::new(device)?;
    let is_half = dtype.elem_bytes() == 2 || to_half;
    let n = |wanted: bool| if wanted { rows * cols } else { 0 };
    let words = RefCell::new(DeviceBuffer::<u16>::filled(device, n(is_half), 0xFF)?);
    let bytes = RefCell::new(DeviceBuffer::<u8>::filled(device, n(!is_half), 0xFF)?);
    let job: Job<'_> = Box::new(|stream, i| {
        let (mut words, mut bytes) = (words.borrow_mut(), bytes.borrow_mut());
        match (encoded, is_half) {
            (Encoded::Fixed(matrices, scales), _) => {
                let matrix = &matrices[i % matrices.len()];
                match scales {
                    _ if !is_half => decoder.decode_int8(stream, matrix, &Part::All, &mut bytes),
                    Some(s) => decoder.dequantise(stream, matrix, s, &Part::All, &mut words),
                    None => decoder.decode(stream, matrix, &Part::All, &mut words),
                }
            }
            (Encoded::Rans(rans, matrices), true) => {
                rans.decode(stream, &matrices[i % matrices.len()], &mut words).map_err(of_rans)
            }
            (Encoded::Rans(rans, matrices), false) => rans
                .decode_bytes(stream, &matrices[i % matrices.len()], &mut bytes)
                .map_err(of_rans),
        }
    });
    let copies = [encoded.n_copies()];
    // SAFETY: buffers and kernels live beyond the call.
    let timing = unsafe { interleaved(stream, &[job], &copies, Effort::FULL) }?.remove(0);
    let words = stream.download(&words.borrow())?;
    let decoded = match is_half {
        true => words.into_iter().flat_map(u16::to_le_bytes).collect(),
        false => stream.download(&bytes.borrow())?,
    };
    Ok((timing, decoded))
}

/// The best way found to decode ahead of a product.
#[derive(Debug)]
pub struct PrefillTime {
    /// SMs that decode.
    pub decoding_sms: u32,
    /// Whether cublasLt was told that the others are left.
    pub limited: bool,
    /// With which it multiplies.
    pub algorithm: Algorithm,
    /// Of decoding and multiplying.
    pub timing: Timing,
    /// Whether the result has the bits of the same algorithm with dense weights.
    pub identical: bool,
}

/// Times a sequence of products of more than 64 tokens whose weights are decoded
/// ahead, against the fastest algorithm of cuBLAS with `dense` weights, in turns:
/// microseconds of a product. Tries several numbers of SMs for each layout.
///
/// # Errors
///
/// Lengths that do not fit, and what driver and libraries report.
pub fn prefill(
    cublas: &Cublas<'_>,
    baseline: &cublas::Product<'_>,
    dense: &[DeviceBuffer<u16>],
    layouts: &[&Encoded<'_>],
    x: &[u16],
) -> Result<((Algorithm, Timing), Vec<PrefillTime>)> {
    let (shape, half) = (baseline.shape(), baseline.half());
    let (stream, effort) = (baseline.stream(), Effort::LONG);
    let (device, n_sms) = (stream.device(), stream.device().info().n_sms);
    let x = stream.upload(x)?;
    let y = RefCell::new(DeviceBuffer::<u16>::filled(device, shape.m * shape.n, 0xFF)?);
    let (fastest, _) = baseline.time(dense, &x, &mut y.borrow_mut(), effort)?;
    struct Way<'a> {
        layout: usize,
        decoding_sms: u32,
        limited: Option<cublas::Product<'a>>,
        algorithm: Algorithm,
    }
    let mut ways = Vec::new();
    for (layout, encoded) in layouts.iter().enumerate() {
        let estimate = encoded.copy(0).decoding_sms(shape.m, n_sms);
        let tried = [estimate / 2, estimate, 2 * estimate];
        for decoding_sms in tried.map(|sms| sms.clamp(1, n_sms / 2)) {
            let algorithm = fastest.clone();
            ways.push(Way { layout, decoding_sms, limited: None, algorithm });
            // A library that knows no algorithm for fewer SMs is no error.
            let Ok(limited) = cublas.product_on(n_sms - decoding_sms, shape, half) else {
                continue;
            };
            let (algorithm, _) = limited.time(dense, &x, &mut y.borrow_mut(), effort)?;
            ways.push(Way { layout, decoding_sms, limited: Some(limited), algorithm });
        }
    }
    let prefill = RefCell::new(Prefill::new(stream, shape.n * shape.k)?);
    let multiply = |way: &Way<'_>, i: usize| {
        let mut prefill = prefill.borrow_mut();
        if i == 0 {
            prefill.begin(stream)?;
        }
        let product = way.limited.as_ref().unwrap_or(baseline);
        let (weights, mut y) = (layouts[way.layout].copy(i), y.borrow_mut());
        prefill.multiply((product, &way.algorithm), &weights, &x, &mut y, way.decoding_sms)
    };
    let mut jobs: Vec<Job<'_>> = vec![Box::new(|_, i| {
        baseline.multiply(&fastest, &dense[i % dense.len()], &x, &mut y.borrow_mut())
    })];
    let mut n_copies = vec![dense.len()];
    for way in &ways {
        jobs.push(Box::new(|_, i| multiply(way, i)));
        n_copies.push(layouts[way.layout].n_copies());
    }
    // SAFETY: buffers and kernels live beyond the call.
    let mut timings = unsafe { interleaved(stream, &jobs, &n_copies, effort) }?;
    drop(jobs);
    let of_ways = timings.split_off(1);
    let mut best = Vec::new();
    for layout in 0..layouts.len() {
        let own = ways.iter().zip(&of_ways).filter(|(way, _)| way.layout == layout);
        let (way, timing) = own
            .min_by(|(_, a), (_, b)| a.median().total_cmp(&b.median()))
            .expect("several ways were tried");
        let product = way.limited.as_ref().unwrap_or(baseline);
        let result = |run: &dyn Fn() -> Result<()>| {
            stream.fill(&mut y.borrow_mut(), 0xFF)?;
            run()?;
            stream.download(&y.borrow())
        };
        let expected =
            result(&|| product.multiply(&way.algorithm, &dense[0], &x, &mut y.borrow_mut()))?;
        best.push(PrefillTime {
            decoding_sms: way.decoding_sms,
            limited: way.limited.is_some(),
            algorithm: way.algorithm.clone(),
            timing: timing.clone(),
            identical: result(&|| multiply(way, 0))? == expected,
        });
    }
    Ok(((fastest.clone(), timings.remove(0)), best))
}
