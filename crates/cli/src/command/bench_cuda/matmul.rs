//! `transom bench matmul --device cuda`: products in every layout against cuBLAS.

use transom::layout::Layout;
use transom_cuda::DeviceBuffer;
use transom_cuda::bench::{self, ProductTimes, Timing};
use transom_cuda::cublas::{Algorithm, Cublas, Half, Product, Shape};
use transom_cuda::product::INVARIANT_TOKENS;
use transom_cuda::rans::Rans;

use super::report::{self, Gpu, Line};
use super::weights::{Host, Source, is_unsupported};
use crate::args::{BenchMatmul, LayoutName, WeightName};
use crate::{Outcome, synthetic, threads};

const SEED: u64 = 42;

/// A matrix in one layout, several times over on the GPU.
struct Subject<T> {
    layout: LayoutName,
    bits_per_weight: f64,
    weights: T,
}

/// What all measurements of a matrix share.
struct Bench<'a> {
    gpu: &'a Gpu,
    cublas: &'a Cublas<'a>,
    source: &'a Source,
    /// Copies for cuBLAS.
    dense: Vec<DeviceBuffer<u16>>,
}

/// Runs the benchmark of products.
pub(crate) fn matmul(args: &BenchMatmul) -> anyhow::Result<Outcome> {
    let gpu = Gpu::open()?;
    let cublas = Cublas::new(&gpu.stream)?;
    let rans = Rans::new(&gpu.device)?;
    let shapes: Vec<(usize, usize)> = args.shapes.iter().flat_map(|s| s.0.clone()).collect();
    let is_ahead = |batch: &usize| args.ahead && *batch > INVARIANT_TOKENS;
    let (many, few): (Vec<usize>, Vec<usize>) =
        args.batch.iter().partition(|batch| is_ahead(batch));
    let mut results = Vec::new();
    for &dtype in &args.dtype {
        for &sides in &shapes {
            // Encoding is parallel, and not part of what is measured.
            let (source, dense, hosts) = threads::with(args.threads.count(), || {
                let source = Source::new(dtype, sides, args.weights.as_deref())?;
                let dense = source.dense();
                let hosts = args.layouts.iter().map(|&layout| Ok((layout, source.host(layout)?)));
                let hosts = hosts.collect::<anyhow::Result<Vec<(LayoutName, Host)>>>()?;
                Ok((source, dense, hosts))
            })?;
            let n_copies = bench::n_copies(&gpu.device, dense.len() * 2);
            let dense =
                (0..n_copies).map(|_| gpu.stream.upload(&dense)).collect::<Result<_, _>>()?;
            let bench = Bench { gpu: &gpu, cublas: &cublas, source: &source, dense };
            if args.chain || !few.is_empty() {
                let mut subjects = Vec::new();
                for (layout, host) in &hosts {
                    match host.weights(&gpu, &rans) {
                        Err(error) if is_unsupported(&error, dtype.name()) => {}
                        weights => subjects.push(Subject::new(*layout, weights?)),
                    }
                }
                if args.chain {
                    results.extend(bench.chain(&subjects)?);
                } else {
                    for &batch in &few {
                        results.extend(bench.products(&subjects, batch)?);
                    }
                }
            }
            if !args.chain && !many.is_empty() {
                let mut subjects = Vec::new();
                for (layout, host) in &hosts {
                    // Nothing is decoded, or to bytes that nothing dequantises.
                    let is_bytes = *layout == LayoutName::Rans && dtype == WeightName::Int8;
                    if *layout == LayoutName::Dense || is_bytes {
                        continue;
                    }
                    match host.encoded(&gpu, &rans) {
                        Err(error) if is_unsupported(&error, dtype.name()) => {}
                        weights => subjects.push(Subject::new(*layout, weights?)),
                    }
                }
                for &batch in &many {
                    results.extend(bench.prefill(&subjects, batch)?);
                }
            }
        }
    }
    drop(cublas);
    report::finish(&gpu, results, args.json.wanted, args.csv.as_deref())
}

impl<T> Subject<T> {
    fn new(layout: LayoutName, (weights, bits_per_weight): (T, f64)) -> Self {
        Self { layout, bits_per_weight, weights }
    }
}

impl Bench<'_> {
    fn product(&self, batch: usize) -> anyhow::Result<(Product<'_>, Vec<u16>)> {
        let half = match self.source.dtype {
            WeightName::Bf16 => Half::Bf16,
            WeightName::F16 | WeightName::Int8 => Half::F16,
        };
        let Source { rows, cols, .. } = *self.source;
        let product = self.cublas.product(Shape { m: batch, n: rows, k: cols }, half)?;
        let round = |value: f32| match half {
            Half::Bf16 => half::bf16::from_f32(value).to_bits(),
            Half::F16 => half::f16::from_f32(value).to_bits(),
        };
        let x = synthetic::activations(batch * cols, SEED).into_iter().map(round).collect();
        Ok((product, x))
    }

    fn baseline(
        &self,
        op: &'static str,
        batch: usize,
        algorithm: &Algorithm,
        timing: &Timing,
    ) -> Line {
        let line = self.line(op, batch, "cublas", 16.0, timing, [None, Some(timing.median())]);
        Line { algorithm: Some(algorithm.name()), ..line }
    }

    fn line(
        &self,
        op: &'static str,
        batch: usize,
        layout: &'static str,
        bits_per_weight: f64,
        timing: &Timing,
        [twin_us, cublas_us]: [Option<f64>; 2],
    ) -> Line {
        let Source { dtype, rows, cols, .. } = *self.source;
        let us = timing.median();
        let weight_gbps = (rows * cols) as f64 * bits_per_weight / 8.0 / 1e3 / us;
        Line {
            op,
            device: "cuda",
            dtype: dtype.name(),
            layout,
            rows,
            cols,
            batch,
            bits_per_weight,
            us,
            weight_gbps,
            frac_read_bandwidth: weight_gbps / self.gpu.ceilings.read_gbps,
            twin_us,
            cublas_us,
            speedup_vs_twin: twin_us.map(|twin| twin / us),
            speedup_vs_cublas: cublas_us.map(|cublas| cublas / us),
            us_range: timing.range(),
            identical: true,
            algorithm: None,
        }
    }

    /// Lines of the layouts, whose twin is the dense one.
    fn layouts<T>(
        &self,
        op: &'static str,
        batch: usize,
        subjects: &[&Subject<T>],
        timings: &[Timing],
        cublas_us: f64,
    ) -> Vec<Line> {
        let dense = subjects.iter().position(|subject| subject.layout == LayoutName::Dense);
        let times = [dense.map(|at| timings[at].median()), Some(cublas_us)];
        let line = |(subject, timing): (&&Subject<T>, &Timing)| {
            let layout = Layout::from(subject.layout).name();
            self.line(op, batch, layout, subject.bits_per_weight, timing, times)
        };
        subjects.iter().zip(timings).map(line).collect()
    }

    fn products(
        &self,
        subjects: &[Subject<bench::Weights<'_>>],
        batch: usize,
    ) -> anyhow::Result<Vec<Line>> {
        let (product, x) = self.product(batch)?;
        let takes = |subject: &&Subject<bench::Weights<'_>>| {
            batch <= INVARIANT_TOKENS || subject.layout != LayoutName::Rans
        };
        let subjects: Vec<_> = subjects.iter().filter(takes).collect();
        let weights: Vec<_> = subjects.iter().map(|subject| &subject.weights).collect();
        let stream = &self.gpu.stream;
        let ProductTimes { cublas: (algorithm, baseline), layouts, results } =
            bench::products(stream, &product, &self.dense, &weights, &x)?;
        let mut lines = vec![self.baseline("product", batch, &algorithm, &baseline)];
        let others = self.layouts("product", batch, &subjects, &layouts, baseline.median());
        // The twin's weights are the original bytes; without it, the first layout decides.
        let dense = subjects.iter().position(|subject| subject.layout == LayoutName::Dense);
        let expected = results.get(dense.unwrap_or(0));
        lines.extend(
            others
                .into_iter()
                .zip(&results)
                .map(|(line, result)| Line { identical: Some(result) == expected, ..line }),
        );
        Ok(lines)
    }

    fn chain(&self, subjects: &[Subject<bench::Weights<'_>>]) -> anyhow::Result<Vec<Line>> {
        let (product, x) = self.product(1)?;
        let weights: Vec<_> = subjects.iter().map(|subject| &subject.weights).collect();
        let (algorithm, timings) =
            bench::chain(&self.gpu.stream, &product, &self.dense, &weights, &x)?;
        let mut lines = vec![self.baseline("chain", 1, &algorithm, &timings[0])];
        let subjects: Vec<_> = subjects.iter().collect();
        lines.extend(self.layouts("chain", 1, &subjects, &timings[1..], timings[0].median()));
        Ok(lines)
    }

    fn prefill(
        &self,
        subjects: &[Subject<bench::Encoded<'_>>],
        batch: usize,
    ) -> anyhow::Result<Vec<Line>> {
        let (product, x) = self.product(batch)?;
        let encoded: Vec<_> = subjects.iter().map(|subject| &subject.weights).collect();
        let ((algorithm, baseline), found) =
            bench::prefill(self.cublas, &product, &self.dense, &encoded, &x)?;
        let mut lines = vec![self.baseline("prefill", batch, &algorithm, &baseline)];
        let timings: Vec<Timing> = found.iter().map(|found| found.timing.clone()).collect();
        let subjects: Vec<_> = subjects.iter().collect();
        let others = self.layouts("prefill", batch, &subjects, &timings, baseline.median());
        lines.extend(others.into_iter().zip(found).map(|(line, found)| {
            let limit = if found.limited { "limited " } else { "" };
            let (sms, name) = (found.decoding_sms, found.algorithm.name());
            Line {
                identical: found.identical,
                algorithm: Some(format!("{sms} SMs decode, {limit}{name}")),
                ..line
            }
        }));
        Ok(lines)
    }
}
