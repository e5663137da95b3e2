//! What the benchmarks on a GPU print and write.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;
use transom_cuda::bench::{self, Ceilings};
use transom_cuda::{Device, Stream};

use crate::Outcome;
use crate::output::{self, Style};
use crate::table::{Align, Table};

/// A GPU, and what its memory can do.
pub(super) struct Gpu {
    pub(super) device: Device,
    pub(super) stream: Stream,
    pub(super) ceilings: Ceilings,
}

impl Gpu {
    pub(super) fn open() -> anyhow::Result<Self> {
        let device = Device::open(0)?;
        let stream = device.stream()?;
        let ceilings = bench::ceilings(&stream)?;
        Ok(Self { device, stream, ceilings })
    }
}

#[derive(Serialize)]
struct Report {
    gpu: String,
    read_gbps: f64,
    copy_gbps: f64,
    /// Whether all layouts gave the same bits everywhere.
    identical: bool,
    results: Vec<Line>,
    means: Vec<Mean>,
}

/// A row of the CSV files under `bench/record`; the names are those of its columns.
#[derive(Serialize, Clone)]
pub(super) struct Line {
    pub(super) op: &'static str,
    pub(super) device: &'static str,
    pub(super) dtype: &'static str,
    pub(super) layout: &'static str,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) batch: usize,
    pub(super) bits_per_weight: f64,
    pub(super) us: f64,
    /// For `decode` of what is written, otherwise of the weights as they are stored.
    pub(super) weight_gbps: f64,
    pub(super) frac_read_bandwidth: f64,
    pub(super) twin_us: Option<f64>,
    pub(super) cublas_us: Option<f64>,
    pub(super) speedup_vs_twin: Option<f64>,
    pub(super) speedup_vs_cublas: Option<f64>,
    /// Not in the CSV: slowest and fastest replay.
    pub(super) us_range: [f64; 2],
    /// Not in the CSV: whether the result has the bits that it should have.
    pub(super) identical: bool,
    /// Not in the CSV: of cuBLAS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) algorithm: Option<String>,
}

const COLUMNS: &str = "op,device,dtype,layout,rows,cols,batch,bits_per_weight,us,weight_gbps,\
                       frac_read_bandwidth,twin_us,cublas_us,speedup_vs_twin,speedup_vs_cublas";

impl Line {
    fn csv(&self) -> String {
        let optional = |value: Option<f64>| value.map_or_else(String::new, |v| format!("{v:.3}"));
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

/// Geometric means over the shapes.
#[derive(Serialize)]
struct Mean {
    op: &'static str,
    dtype: &'static str,
    layout: &'static str,
    batch: usize,
    shapes: usize,
    bits_per_weight: f64,
    weight_gbps: f64,
    speedup_vs_twin: Option<f64>,
    speedup_vs_cublas: Option<f64>,
}

/// `None` of no values, and if one is missing.
fn geometric_mean(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let logarithms: Vec<f64> = values.map(|value| value.map(f64::ln)).collect::<Option<_>>()?;
    let n = logarithms.len();
    (n > 0).then(|| (logarithms.iter().sum::<f64>() / n as f64).exp())
}

fn means(lines: &[Line]) -> Vec<Mean> {
    let mut groups: BTreeMap<_, Vec<&Line>> = BTreeMap::new();
    for line in lines.iter().filter(|line| line.layout != "cublas") {
        groups.entry((line.op, line.dtype, line.layout, line.batch)).or_default().push(line);
    }
    let mean = |((op, dtype, layout, batch), lines): (_, Vec<&Line>)| {
        let of =
            |value: fn(&Line) -> Option<f64>| geometric_mean(lines.iter().map(|line| value(line)));
        Mean {
            op,
            dtype,
            layout,
            batch,
            shapes: lines.len(),
            bits_per_weight: of(|line| Some(line.bits_per_weight)).unwrap_or_default(),
            weight_gbps: of(|line| Some(line.weight_gbps)).unwrap_or_default(),
            speedup_vs_twin: of(|line| line.speedup_vs_twin),
            speedup_vs_cublas: of(|line| line.speedup_vs_cublas),
        }
    };
    groups.into_iter().map(mean).collect()
}

/// Writes the table; bits that differ are exit code 1.
pub(super) fn finish(
    gpu: &Gpu,
    results: Vec<Line>,
    json: bool,
    csv: Option<&Path>,
) -> anyhow::Result<Outcome> {
    let Ceilings { read_gbps, copy_gbps } = gpu.ceilings;
    let report = Report {
        gpu: gpu.device.info().name.clone(),
        read_gbps,
        copy_gbps,
        identical: results.iter().all(|line| line.identical),
        means: means(&results),
        results,
    };
    if let Some(path) = csv {
        let rows = report.results.iter().map(Line::csv);
        let lines: Vec<String> = [COLUMNS.to_owned()].into_iter().chain(rows).collect();
        std::fs::write(path, lines.join("\n") + "\n")
            .with_context(|| path.display().to_string())?;
    }
    if json {
        output::print_json(&report)?;
    } else {
        output::print(&text(&report))?;
    }
    Ok(if report.identical { Outcome::Done } else { Outcome::Differ })
}

fn text(report: &Report) -> String {
    let Report { gpu, read_gbps, copy_gbps, results, means, .. } = report;
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
        ("", Align::Left),
    ]);
    let ratio = |value: Option<f64>| value.map_or_else(|| "-".into(), |v| format!("{v:.3}x"));
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
            match (&line.algorithm, line.identical) {
                (_, false) => "DIFFERS".into(),
                (algorithm, true) => algorithm.clone().unwrap_or_default(),
            },
        ]);
    }
    let mut summary = Table::new(&[
        ("geometric means", Align::Left),
        ("dtype", Align::Left),
        ("layout", Align::Left),
        ("batch", Align::Right),
        ("shapes", Align::Right),
        ("bits/weight", Align::Right),
        ("GB/s", Align::Right),
        ("vs twin", Align::Right),
        ("vs cuBLAS", Align::Right),
    ]);
    for mean in means {
        summary.row([
            mean.op.to_owned(),
            mean.dtype.to_owned(),
            mean.layout.to_owned(),
            mean.batch.to_string(),
            mean.shapes.to_string(),
            format!("{:.3}", mean.bits_per_weight),
            format!("{:.0}", mean.weight_gbps),
            ratio(mean.speedup_vs_twin),
            ratio(mean.speedup_vs_cublas),
        ]);
    }
    let mut text =
        format!("{gpu}, weights cold; reads {read_gbps:.0} GB/s, copies {copy_gbps:.0} GB/s\n");
    for table in [table, summary] {
        let _ = write!(text, "\n{}", table.render(Style::stdout()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(rows: usize, speedup: Option<f64>) -> Line {
        Line {
            op: "product",
            device: "cuda",
            dtype: "bf16",
            layout: "fixed",
            rows,
            cols: 32,
            batch: 1,
            bits_per_weight: 11.31,
            us: 2.5,
            weight_gbps: 1000.0,
            frac_read_bandwidth: 0.25,
            twin_us: Some(3.0),
            cublas_us: None,
            speedup_vs_twin: Some(1.2),
            speedup_vs_cublas: speedup,
            us_range: [2.0, 3.0],
            identical: true,
            algorithm: None,
        }
    }

    #[test]
    fn a_row_has_a_cell_for_each_column() {
        let csv = line(16, None).csv();
        assert_eq!(csv, "product,cuda,bf16,fixed,16,32,1,11.310,2.500,1000.0,0.2500,3.000,,1.200,");
        assert_eq!(csv.split(',').count(), COLUMNS.split(',').count());
    }

    #[test]
    fn means_are_geometric() {
        let found = means(&[line(16, Some(2.0)), line(32, Some(0.5))]);
        assert_eq!((found.len(), found[0].shapes), (1, 2));
        assert!((found[0].speedup_vs_cublas.unwrap() - 1.0).abs() < 1e-12);
        assert_eq!(means(&[line(16, Some(2.0)), line(32, None)])[0].speedup_vs_cublas, None);
    }
}
