//! `transom bench decode`: how fast a GPU decodes matrices.

use transom::layout::Layout;
use transom_cuda::bench;
use transom_cuda::rans::Rans;

use super::report::{self, Gpu, Line};
use super::weights::{Source, is_unsupported};
use crate::args::{BenchDecode, DeviceName, LayoutName, WeightName};
use crate::{Outcome, threads};

/// Elements, layout, and whether INT8 becomes FP16.
const CASES: [(WeightName, LayoutName, bool); 7] = [
    (WeightName::Bf16, LayoutName::Fixed, false),
    (WeightName::Bf16, LayoutName::Rans, false),
    (WeightName::F16, LayoutName::Fixed, false),
    (WeightName::F16, LayoutName::Rans, false),
    (WeightName::Int8, LayoutName::Fixed, false),
    (WeightName::Int8, LayoutName::Fixed, true),
    (WeightName::Int8, LayoutName::Rans, false),
];

/// Runs the benchmark of decoding.
pub(crate) fn decode(args: &BenchDecode) -> anyhow::Result<Outcome> {
    anyhow::ensure!(args.device == DeviceName::Cuda, "`bench codec` decodes on the processor");
    let gpu = Gpu::open()?;
    let rans = Rans::new(&gpu.device)?;
    let mut results = Vec::new();
    for &sides in args.shapes.iter().flat_map(|shapes| &shapes.0) {
        for (dtype, layout, to_half) in CASES {
            if args.weights.is_some() && dtype != WeightName::Bf16 {
                continue;
            }
            let (source, host) = threads::with(args.threads.count(), || {
                let source = Source::new(dtype, sides, args.weights.as_deref())?;
                let host = source.host(layout)?;
                Ok((source, host))
            })?;
            let (encoded, bits_per_weight) = match host.encoded(&gpu, &rans) {
                Err(error) if is_unsupported(&error, dtype.name()) => continue,
                encoded => encoded?,
            };
            let sides = [source.rows, source.cols];
            let (timing, decoded) =
                bench::decode(&gpu.stream, &encoded, sides, source.dtype(), to_half)?;
            let expected = match to_half {
                true => source.dense().into_iter().flat_map(u16::to_le_bytes).collect(),
                false => source.bytes(),
            };
            let us = timing.median();
            let weight_gbps = decoded.len() as f64 / 1e3 / us;
            results.push(Line {
                op: if to_half { "dequantise" } else { "decode" },
                device: "cuda",
                dtype: dtype.name(),
                layout: Layout::from(layout).name(),
                rows: source.rows,
                cols: source.cols,
                batch: 0,
                bits_per_weight,
                us,
                weight_gbps,
                frac_read_bandwidth: weight_gbps / gpu.ceilings.read_gbps,
                twin_us: None,
                cublas_us: None,
                speedup_vs_twin: None,
                speedup_vs_cublas: None,
                us_range: timing.range(),
                identical: decoded == expected,
                algorithm: None,
            });
        }
    }
    report::finish(&gpu, results, args.json.wanted, args.csv.as_deref())
}
