//! `transom bench matmul --device cuda`: products in every layout against cuBLAS.

use transom::Record;
use transom::layout::Layout;
use transom_cuda::DeviceBuffer;
use transom_cuda::bench::{self, ProductTimes, Timing, Weights};
use transom_cuda::cublas::{Cublas, Half, Shape};
use transom_cuda::fixed::FixedMatrix;
use transom_cuda::product::{MAX_TOKENS, Product};
use transom_cuda::rans::Rans;

use super::report::{self, Gpu, Line};
use super::weights::Source;
use crate::args::{BenchMatmul, LayoutName, WeightName};
use crate::output;
use crate::{Outcome, synthetic, threads};

const SEED: u64 = 42;

/// A matrix in one layout, on the host.
enum Encoded {
    Chunks(FixedMatrix),
    Record(Vec<u8>),
}

/// The same, several times over on the GPU.
struct Subject<'a> {
    layout: LayoutName,
    bits_per_weight: f64,
    weights: Weights<'a>,
}

/// Runs the benchmark of products.
pub(crate) fn matmul(args: &BenchMatmul) -> anyhow::Result<Outcome> {
    anyhow::ensure!(
        args.batch.iter().all(|&batch| batch <= MAX_TOKENS),
        "--batch: at most {MAX_TOKENS} tokens on a GPU"
    );
    let gpu = Gpu::open()?;
    let cublas = Cublas::new(&gpu.stream)?;
    let rans = Rans::new(&gpu.device)?;
    let shapes: Vec<(usize, usize)> = args.shapes.iter().flat_map(|s| s.0.clone()).collect();
    let mut results = Vec::new();
    for &dtype in &args.dtype {
        let layouts: Vec<LayoutName> =
            args.layouts.iter().copied().filter(|&layout| is_possible(dtype, layout)).collect();
        for &sides in &shapes {
            let (source, dense, encoded) = threads::with(args.threads.count(), || {
                let source = Source::new(dtype, sides, args.weights.as_deref())?;
                let encode = |&layout: &LayoutName| encode(&source, layout);
                let encoded = layouts.iter().map(encode).collect::<anyhow::Result<Vec<_>>>()?;
                let dense = source.dense();
                Ok((source, dense, encoded))
            })?;
            let dense = copies(&gpu, dense.len() * 2, || Ok(gpu.stream.upload(&dense)?))?;
            let subjects = layouts
                .iter()
                .zip(encoded)
                .map(|(&layout, encoded)| subject(&gpu, &rans, layout, encoded))
                .collect::<anyhow::Result<Vec<_>>>()?;
            for &batch in &args.batch {
                results.extend(products(&gpu, &cublas, &source, &dense, &subjects, batch)?);
            }
        }
    }
    drop(cublas);
    report::finish(&gpu, results, args.json.wanted, args.csv.as_deref())
}

fn is_possible(dtype: WeightName, layout: LayoutName) -> bool {
    let possible = (dtype, layout) != (WeightName::F16, LayoutName::Rans);
    if !possible {
        output::note("transom: FP16 cannot stay entropy-coded on a GPU: left out");
    }
    possible
}

fn encode(source: &Source, layout: LayoutName) -> anyhow::Result<Encoded> {
    Ok(match layout {
        LayoutName::Dense => Encoded::Chunks(source.twin()),
        LayoutName::Fixed => Encoded::Chunks(source.fixed()),
        LayoutName::Rans => Encoded::Record(source.record()?),
    })
}

/// As many as are needed to read them cold.
fn copies<T>(
    gpu: &Gpu,
    n_bytes: usize,
    make: impl Fn() -> anyhow::Result<T>,
) -> anyhow::Result<Vec<T>> {
    (0..bench::n_copies(&gpu.device, n_bytes)).map(|_| make()).collect()
}

fn subject<'a>(
    gpu: &Gpu,
    rans: &'a Rans,
    layout: LayoutName,
    encoded: Encoded,
) -> anyhow::Result<Subject<'a>> {
    let scale = vec![synthetic::INT8_SCALE];
    Ok(match encoded {
        Encoded::Chunks(matrix) => {
            let bits_per_weight = matrix.bits_per_weight();
            let is_int8 = matrix.format.dtype() == transom::Dtype::I8;
            let scales = if is_int8 { vec![scale] } else { Vec::new() };
            let (n_bytes, matrices) = (matrix.chunks.len(), [matrix]);
            let products = copies(gpu, n_bytes, || {
                Ok(Product::new(&gpu.device, &gpu.stream, &matrices, &scales, None)?)
            })?;
            Subject { layout, bits_per_weight, weights: Weights::Chunks(products) }
        }
        Encoded::Record(packed) => {
            let record = Record::read(&packed, 0, packed.len() as u64)?;
            let is_int8 = record.header().dtype() == transom::Dtype::I8;
            let matrices =
                copies(gpu, packed.len(), || Ok(rans.load(&gpu.stream, &record, &packed)?))?;
            let bits = matrices[0].resident_bytes() as f64 * 8.0;
            let bits_per_weight = bits / (matrices[0].rows() * matrices[0].cols()) as f64;
            let scales = is_int8.then(|| gpu.stream.upload(&scale)).transpose()?;
            Subject { layout, bits_per_weight, weights: Weights::Rans(rans, matrices, scales) }
        }
    })
}

/// One product: cuBLAS, then every layout.
fn products(
    gpu: &Gpu,
    cublas: &Cublas<'_>,
    source: &Source,
    dense: &[DeviceBuffer<u16>],
    subjects: &[Subject<'_>],
    batch: usize,
) -> anyhow::Result<Vec<Line>> {
    let half = match source.dtype {
        WeightName::Bf16 => Half::Bf16,
        WeightName::F16 | WeightName::Int8 => Half::F16,
    };
    let x = activations(half, batch * source.cols);
    let product = cublas.product(Shape { m: batch, n: source.rows, k: source.cols }, half)?;
    let weights: Vec<&Weights<'_>> = subjects.iter().map(|subject| &subject.weights).collect();
    let ProductTimes { cublas: (algorithm, baseline), layouts, results } =
        bench::products(&gpu.stream, &product, dense, &weights, &x)?;
    let dense_at = subjects.iter().position(|subject| subject.layout == LayoutName::Dense);
    let twin_us = dense_at.map(|at| layouts[at].median());
    // The twin has the right to be right; without it the first.
    let expected = results.get(dense_at.unwrap_or(0));
    let line = |layout, bits_per_weight: f64, timing: &Timing, twin_us: Option<f64>| {
        let us = timing.median();
        let n_bytes = (source.rows * source.cols) as f64 * bits_per_weight / 8.0;
        let weight_gbps = n_bytes / 1e3 / us;
        Line {
            op: "product",
            device: "cuda",
            dtype: source.dtype.name(),
            layout,
            rows: source.rows,
            cols: source.cols,
            batch,
            bits_per_weight,
            us,
            weight_gbps,
            frac_read_bandwidth: weight_gbps / gpu.ceilings.read_gbps,
            twin_us,
            cublas_us: Some(baseline.median()),
            speedup_vs_twin: twin_us.map(|twin| twin / us),
            speedup_vs_cublas: Some(baseline.median() / us),
            us_range: timing.range(),
            identical: true,
            algorithm: None,
        }
    };
    let first = Line { algorithm: Some(algorithm.name()), ..line("cublas", 16.0, &baseline, None) };
    let others = subjects.iter().zip(&layouts).zip(&results).map(|((subject, timing), result)| {
        let name = Layout::from(subject.layout).name();
        Line {
            identical: Some(result) == expected,
            ..line(name, subject.bits_per_weight, timing, twin_us)
        }
    });
    Ok([first].into_iter().chain(others).collect())
}

pub(super) fn activations(half: Half, n: usize) -> Vec<u16> {
    let round = |value: f32| match half {
        Half::Bf16 => half::bf16::from_f32(value).to_bits(),
        Half::F16 => half::f16::from_f32(value).to_bits(),
    };
    synthetic::activations(n, SEED).into_iter().map(round).collect()
}
