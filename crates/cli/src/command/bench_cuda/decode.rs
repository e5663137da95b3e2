//! `transom bench decode`: how fast a GPU decodes matrices.

use super::report::{self, Gpu};
use crate::Outcome;
use crate::args::{BenchDecode, DeviceName};

/// Runs the benchmark of decoding.
pub(crate) fn decode(args: &BenchDecode) -> anyhow::Result<Outcome> {
    anyhow::ensure!(args.device == DeviceName::Cuda, "`bench codec` decodes on the processor");
    let gpu = Gpu::open()?;
    report::finish(&gpu, Vec::new(), args.json.wanted, args.csv.as_deref())
}
