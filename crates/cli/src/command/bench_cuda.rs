//! `transom bench matmul --device cuda` and `transom bench decode`.

use crate::Outcome;
use crate::args::{BenchDecode, BenchMatmul};

#[cfg(not(feature = "cuda"))]
const NO_SUPPORT: &str = "no GPU support in this build: build it with `--features cuda`";

/// Runs the benchmark of products.
#[cfg(not(feature = "cuda"))]
pub(crate) fn matmul(_: &BenchMatmul) -> anyhow::Result<Outcome> {
    anyhow::bail!(NO_SUPPORT)
}

/// Runs the benchmark of decoding.
#[cfg(not(feature = "cuda"))]
pub(crate) fn decode(_: &BenchDecode) -> anyhow::Result<Outcome> {
    anyhow::bail!(NO_SUPPORT)
}

#[cfg(feature = "cuda")]
pub(crate) use with_cuda::{decode, matmul};

#[cfg(feature = "cuda")]
mod with_cuda {
    use std::fmt::Write as _;
    use std::path::Path;

    use anyhow::Context as _;
    use serde::Serialize;
    use transom_cuda::bench::{self, Ceilings};
    use transom_cuda::cublas::{Cublas, Half, Shape};
    use transom_cuda::{Device, DeviceBuffer, Stream};

    use super::{BenchDecode, BenchMatmul, Outcome};
    use crate::args::{DeviceName, WeightName};
    use crate::output::{self, Style};
    use crate::table::{Align, Table};
    use crate::{synthetic, threads};

    const SEED: u64 = 42;

    #[derive(Serialize)]
    struct Report {
        gpu: String,
        read_gbps: f64,
        copy_gbps: f64,
        results: Vec<Line>,
    }

    /// A row of the CSV files under `bench/record`; the names are those of its columns.
    #[derive(Serialize)]
    struct Line {
        op: &'static str,
        device: &'static str,
        dtype: &'static str,
        layout: &'static str,
        rows: usize,
        cols: usize,
        batch: usize,
        bits_per_weight: f64,
        us: f64,
        weight_gbps: f64,
        frac_read_bandwidth: f64,
        twin_us: Option<f64>,
        cublas_us: Option<f64>,
        speedup_vs_twin: Option<f64>,
        speedup_vs_cublas: Option<f64>,
        /// Not in the CSV: slowest and fastest replay.
        us_range: [f64; 2],
        /// Not in the CSV: of cuBLAS.
        #[serde(skip_serializing_if = "Option::is_none")]
        algorithm: Option<String>,
    }

    const COLUMNS: &str = "op,device,dtype,layout,rows,cols,batch,bits_per_weight,us,weight_gbps,\
                           frac_read_bandwidth,twin_us,cublas_us,speedup_vs_twin,speedup_vs_cublas";

    impl Line {
        fn csv(&self) -> String {
            let optional =
                |value: Option<f64>| value.map_or_else(String::new, |v| format!("{v:.3}"));
            [
                self.op.to_owned(),
                self.device.to_owned(),
                self.dtype.to_owned(),
                self.layout.to_owned(),
                self.rows.to_string(),
                self.cols.to_string(),
                self.batch.to_string(),
                format!("{:.3}", self.bits_per_weight),
                format!("{:.3}", self.us),
                format!("{:.1}", self.weight_gbps),
                format!("{:.4}", self.frac_read_bandwidth),
                optional(self.twin_us),
                optional(self.cublas_us),
                optional(self.speedup_vs_twin),
                optional(self.speedup_vs_cublas),
            ]
            .join(",")
        }
    }

    struct Gpu {
        device: Device,
        stream: Stream,
        ceilings: Ceilings,
    }

    impl Gpu {
        fn open() -> anyhow::Result<Self> {
            let device = Device::open(0)?;
            let stream = device.stream()?;
            let ceilings = bench::ceilings(&stream)?;
            Ok(Self { device, stream, ceilings })
        }

        fn report(&self, results: Vec<Line>) -> Report {
            let Ceilings { read_gbps, copy_gbps } = self.ceilings;
            Report { gpu: self.device.info().name.clone(), read_gbps, copy_gbps, results }
        }
    }

    /// Runs the benchmark of products.
    pub(crate) fn matmul(args: &BenchMatmul) -> anyhow::Result<Outcome> {
        let gpu = Gpu::open()?;
        let cublas = Cublas::new(&gpu.stream)?;
        let shapes: Vec<(usize, usize)> = args.shapes.iter().flat_map(|s| s.0.clone()).collect();
        let mut results = Vec::new();
        for &dtype in &args.dtype {
            for &(rows, cols) in &shapes {
                let weights = threads::with(args.threads.count(), || {
                    Ok(words(&synthetic::weights(dtype, rows, cols, SEED)))
                })?;
                let n_copies = bench::n_copies(&gpu.device, weights.len() * 2);
                let copies = (0..n_copies)
                    .map(|_| gpu.stream.upload(&weights))
                    .collect::<Result<Vec<_>, _>>()?;
                for &batch in &args.batch {
                    results.push(baseline(&gpu, &cublas, &copies, dtype, (rows, cols), batch)?);
                }
            }
        }
        drop(cublas);
        finish(&gpu.report(results), args.json.wanted, args.csv.as_deref())
    }

    /// The fastest algorithm of cuBLAS.
    fn baseline(
        gpu: &Gpu,
        cublas: &Cublas<'_>,
        weights: &[DeviceBuffer<u16>],
        dtype: WeightName,
        (rows, cols): (usize, usize),
        batch: usize,
    ) -> anyhow::Result<Line> {
        let half = match dtype {
            WeightName::Bf16 => Half::Bf16,
            WeightName::F16 => Half::F16,
        };
        let x: Vec<u16> = synthetic::activations(batch * cols, SEED)
            .into_iter()
            .map(|value| match half {
                Half::Bf16 => half::bf16::from_f32(value).to_bits(),
                Half::F16 => half::f16::from_f32(value).to_bits(),
            })
            .collect();
        let x = gpu.stream.upload(&x)?;
        let mut y = DeviceBuffer::filled(&gpu.device, batch * rows, 0xFF)?;
        let product = cublas.product(Shape { m: batch, n: rows, k: cols }, half)?;
        let (algorithm, timing) = product.time(weights, &x, &mut y)?;
        let us = timing.median();
        let weight_gbps = (rows * cols * 2) as f64 / 1e3 / us;
        Ok(Line {
            op: "product",
            device: "cuda",
            dtype: dtype.name(),
            layout: "cublas",
            rows,
            cols,
            batch,
            bits_per_weight: 16.0,
            us,
            weight_gbps,
            frac_read_bandwidth: weight_gbps / gpu.ceilings.read_gbps,
            twin_us: None,
            cublas_us: Some(us),
            speedup_vs_twin: None,
            speedup_vs_cublas: Some(1.0),
            us_range: timing.range(),
            algorithm: Some(algorithm.name()),
        })
    }

    /// Runs the benchmark of decoding.
    pub(crate) fn decode(args: &BenchDecode) -> anyhow::Result<Outcome> {
        anyhow::ensure!(args.device == DeviceName::Cuda, "`bench codec` decodes on the processor");
        let gpu = Gpu::open()?;
        finish(&gpu.report(Vec::new()), args.json.wanted, args.csv.as_deref())
    }

    fn finish(report: &Report, json: bool, csv: Option<&Path>) -> anyhow::Result<Outcome> {
        if let Some(path) = csv {
            let rows = report.results.iter().map(Line::csv);
            let lines: Vec<String> = [COLUMNS.to_owned()].into_iter().chain(rows).collect();
            std::fs::write(path, lines.join("\n") + "\n")
                .with_context(|| path.display().to_string())?;
        }
        if json {
            output::print_json(report)?;
        } else {
            output::print(&text(report))?;
        }
        Ok(Outcome::Done)
    }

    fn text(report: &Report) -> String {
        let Report { gpu, read_gbps, copy_gbps, results } = report;
        let mut text =
            format!("{gpu}, weights cold; reads {read_gbps:.0} GB/s, copies {copy_gbps:.0} GB/s\n");
        if results.is_empty() {
            return text;
        }
        let mut table = Table::new(&[
            ("op", Align::Left),
            ("dtype", Align::Left),
            ("rows x cols", Align::Right),
            ("batch", Align::Right),
            ("layout", Align::Left),
            ("bits/weight", Align::Right),
            ("us", Align::Right),
            ("min..max", Align::Right),
            ("GB/s", Align::Right),
            ("of reading", Align::Right),
            ("vs twin", Align::Right),
            ("vs cuBLAS", Align::Right),
            ("algorithm", Align::Left),
        ]);
        let ratio = |value: Option<f64>| value.map_or_else(|| "-".into(), |v| format!("{v:.2}x"));
        for line in results {
            table.row([
                line.op.to_owned(),
                line.dtype.to_owned(),
                format!("{}x{}", line.rows, line.cols),
                line.batch.to_string(),
                line.layout.to_owned(),
                format!("{:.2}", line.bits_per_weight),
                format!("{:.2}", line.us),
                format!("{:.2}..{:.2}", line.us_range[0], line.us_range[1]),
                format!("{:.0}", line.weight_gbps),
                format!("{:.0} %", 100.0 * line.frac_read_bandwidth),
                ratio(line.speedup_vs_twin),
                ratio(line.speedup_vs_cublas),
                line.algorithm.clone().unwrap_or_default(),
            ]);
        }
        let _ = write!(text, "\n{}", table.render(Style::stdout()));
        text
    }

    fn words(bytes: &[u8]) -> Vec<u16> {
        bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect()
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_row_has_a_cell_for_each_column() {
            let line = Line {
                op: "product",
                device: "cuda",
                dtype: "bf16",
                layout: "fixed",
                rows: 16,
                cols: 32,
                batch: 1,
                bits_per_weight: 11.31,
                us: 2.5,
                weight_gbps: 1000.0,
                frac_read_bandwidth: 0.25,
                twin_us: Some(3.0),
                cublas_us: None,
                speedup_vs_twin: Some(1.2),
                speedup_vs_cublas: None,
                us_range: [2.0, 3.0],
                algorithm: None,
            };
            assert_eq!(
                line.csv(),
                "product,cuda,bf16,fixed,16,32,1,11.310,2.500,1000.0,0.2500,3.000,,1.200,"
            );
            assert_eq!(line.csv().split(',').count(), COLUMNS.split(',').count());
        }
    }
}
