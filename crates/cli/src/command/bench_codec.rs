//! `transom bench codec`: speed and ratio of coding, against others.
//!
//! Every engine codes the same bytes, held in memory, unit by unit: tensors
//! for transom, pieces of 8 MiB for the others. Threads share the units.

use std::cell::RefCell;
use std::ops::Range;
use std::path::Path;

use anyhow::Context as _;
use rayon::prelude::*;
use serde::Serialize;
use transom::safetensors::{Entry, Header};
use transom::{Dtype, Isa, Record, RecordWriter, TensorStatistics};

use crate::args::BenchCodec;
use crate::measure::{self, Job, Samples};
use crate::output::{self, Style};
use crate::progress::Progress;
use crate::table::{Align, Table};
use crate::{Outcome, threads};

/// What zstd and lz4 code at a time.
const PIECE_BYTES: usize = 8 << 20;
/// For each engine and direction.
const MIN_SECONDS: f64 = 1.0;

#[derive(Serialize)]
struct Report {
    input: String,
    bytes: u64,
    tensors: usize,
    results: Vec<Line>,
}

#[derive(Serialize)]
struct Line {
    engine: String,
    threads: usize,
    ratio: f64,
    encode_gbps: f64,
    decode_gbps: f64,
    /// Slowest and fastest run.
    encode_gbps_range: [f64; 2],
    decode_gbps_range: [f64; 2],
    encode_runs: usize,
    decode_runs: usize,
    /// Whether the decoded bytes are those of the input.
    identical: bool,
}

/// Runs the benchmark.
pub(crate) fn run(args: &BenchCodec) -> anyhow::Result<Outcome> {
    let input = Input::read(&args.input)?;
    anyhow::ensure!(!input.data.is_empty(), "{}: holds no data", args.input.display());
    let n_turns = measure::N_ROUNDS * 2 * Engine::all().len();
    let progress = Progress::count(args.json.wanted, "measuring", n_turns as u64);
    let results = threads::with(args.threads, || measure(&input, args.threads, &progress))?;
    progress.finish();
    let identical = results.iter().all(|line| line.identical);
    let report = Report {
        input: args.input.display().to_string(),
        bytes: input.data.len() as u64,
        tensors: input.tensors.len(),
        results,
    };
    if args.json.wanted {
        output::print_json(&report)?;
    } else {
        output::print(&text(&report))?;
    }
    Ok(if identical { Outcome::Done } else { Outcome::Differ })
}

/// A tensor of the input.
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    /// Where its bytes lie in the data.
    range: Range<usize>,
}

/// All tensors of a file, in memory.
struct Input {
    data: Vec<u8>,
    tensors: Vec<Tensor>,
}

impl Input {
    /// Reads a safetensors file, or any other file as one tensor of bytes.
    fn read(path: &Path) -> anyhow::Result<Self> {
        let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
        if path.extension().is_none_or(|extension| extension != "safetensors") {
            let tensor =
                Tensor { dtype: Dtype::U8, shape: vec![bytes.len()], range: 0..bytes.len() };
            return Ok(Self { data: bytes, tensors: vec![tensor] });
        }
        let header =
            Header::read(&bytes, bytes.len() as u64).with_context(|| path.display().to_string())?;
        let data = bytes[header.data_start() as usize..].to_vec();
        let tensors = header.entries().iter().map(Tensor::from).collect();
        Ok(Self { data, tensors })
    }
}

impl From<&Entry> for Tensor {
    fn from(entry: &Entry) -> Self {
        let dtype = Dtype::from_safetensors(&entry.dtype);
        let range = entry.start as usize..entry.end as usize;
        // Bytes of a type without a scheme are one long row.
        let shape = if dtype == Dtype::Opaque { vec![range.len()] } else { entry.shape.clone() };
        Self { dtype, shape, range }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Engine {
    Transom(Isa),
    Zstd(i32),
    Lz4,
    Memcpy,
}

impl Engine {
    fn all() -> Vec<Self> {
        let ours = Isa::ALL.into_iter().filter(|isa| isa.is_available()).map(Self::Transom);
        ours.chain([Self::Zstd(1), Self::Zstd(3), Self::Lz4, Self::Memcpy]).collect()
    }

    fn name(self) -> String {
        match self {
            Self::Transom(isa) => format!("transom/{}", isa.name()),
            Self::Zstd(level) => format!("zstd-{level}"),
            Self::Lz4 => "lz4".into(),
            Self::Memcpy => "memcpy".into(),
        }
    }

    /// What is coded independently, in order and without gaps.
    fn units(self, input: &Input) -> Vec<Range<usize>> {
        let n = input.data.len();
        match self {
            Self::Transom(_) => input.tensors.iter().map(|t| t.range.clone()).collect(),
            _ => (0..n).step_by(PIECE_BYTES).map(|i| i..n.min(i + PIECE_BYTES)).collect(),
        }
    }

    /// Room that the encoded form of `n_bytes` may need.
    fn max_encoded_bytes(self, n_bytes: usize) -> usize {
        match self {
            Self::Zstd(_) => zstd::zstd_safe::compress_bound(n_bytes),
            Self::Lz4 => lz4_flex::block::get_maximum_output_size(n_bytes),
            // Allocated as the record comes.
            Self::Transom(_) => 0,
            Self::Memcpy => n_bytes,
        }
    }

    /// Encodes all units into `encoded`, whose buffers are used again.
    fn encode(self, input: &Input, encoded: &mut [Vec<u8>]) -> anyhow::Result<()> {
        let units = self.units(input);
        let unit = |index: usize| &input.data[units[index].clone()];
        match self {
            Self::Transom(isa) => {
                encoded.par_iter_mut().enumerate().try_for_each(|(index, out)| {
                    *out = encode_tensor(isa, &input.tensors[index], unit(index))?;
                    Ok(())
                })
            }
            Self::Zstd(level) => encoded.par_iter_mut().enumerate().try_for_each_init(
                || zstd::bulk::Compressor::new(level),
                |compressor, (index, out)| {
                    let compressor = compressor.as_mut().map_err(|e| anyhow::anyhow!("{e}"))?;
                    out.clear();
                    compressor.compress_to_buffer(unit(index), out)?;
                    Ok(())
                },
            ),
            Self::Lz4 => encoded.par_iter_mut().enumerate().try_for_each(|(index, out)| {
                out.resize(self.max_encoded_bytes(units[index].len()), 0);
                let n = lz4_flex::block::compress_into(unit(index), out)?;
                out.truncate(n);
                Ok(())
            }),
            Self::Memcpy => encoded.par_iter_mut().enumerate().try_for_each(|(index, out)| {
                out.clear();
                out.extend_from_slice(unit(index));
                Ok(())
            }),
        }
    }

    /// Decodes all units into `out`, as long as the input.
    fn decode(self, units: &[Range<usize>], encoded: &[Vec<u8>], out: &mut [u8]) -> Decoded {
        let mut jobs = Vec::with_capacity(units.len());
        let mut rest = out;
        for (range, bytes) in units.iter().zip(encoded) {
            let (target, after) = rest.split_at_mut(range.len());
            jobs.push((bytes.as_slice(), target));
            rest = after;
        }
        match self {
            Self::Transom(isa) => jobs.into_par_iter().try_for_each(|(bytes, target)| {
                let record = Record::read(bytes, 0, bytes.len() as u64)?;
                Ok(record.decode_to_slice_with(bytes, isa, target)?)
            }),
            Self::Zstd(_) => jobs.into_par_iter().try_for_each_init(
                zstd::bulk::Decompressor::new,
                |decompressor, (bytes, target)| {
                    let decompressor = decompressor.as_mut().map_err(|e| anyhow::anyhow!("{e}"))?;
                    decompressor.decompress_to_buffer(bytes, target)?;
                    Ok(())
                },
            ),
            Self::Lz4 => jobs.into_par_iter().try_for_each(|(bytes, target)| {
                lz4_flex::block::decompress_into(bytes, target)?;
                Ok(())
            }),
            Self::Memcpy => jobs.into_par_iter().try_for_each(|(bytes, target)| {
                target.copy_from_slice(bytes);
                Ok(())
            }),
        }
    }
}

type Decoded = anyhow::Result<()>;

/// As `pack` does, but for the BLAKE3 of the content.
fn encode_tensor(isa: Isa, tensor: &Tensor, data: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut statistics = TensorStatistics::new(tensor.dtype);
    statistics.add(data);
    let writer = RecordWriter::new(&tensor.shape, &statistics, [0; 32])?;
    let tiling = *writer.tiling();
    let elem_bytes = tensor.dtype.elem_bytes();
    let row_stride_bytes = tiling.row_stride() * elem_bytes;
    let mut tiles = Vec::with_capacity(tiling.n_tiles());
    for index in 0..tiling.n_tiles() {
        let tile = tiling.tile(index);
        let first = tile.row_start * row_stride_bytes + tile.col_start * elem_bytes;
        tiles.push(writer.encode_tile(isa, index, &data[first..], row_stride_bytes)?);
    }
    let mut record =
        writer.finish(tiles.iter().map(|tile| (tile.bytes.len() as u32, tile.checksum)));
    tiles.iter().for_each(|tile| record.extend_from_slice(&tile.bytes));
    Ok(record)
}

/// An engine with its buffers.
struct Bench {
    engine: Engine,
    units: Vec<Range<usize>>,
    encoded: RefCell<Vec<Vec<u8>>>,
    encoded_bytes: usize,
    identical: bool,
}

impl Bench {
    /// Encodes and decodes once, and compares.
    fn new(engine: Engine, input: &Input, out: &mut [u8]) -> anyhow::Result<Self> {
        let units = engine.units(input);
        let mut encoded: Vec<Vec<u8>> = (units.iter())
            .map(|unit| Vec::with_capacity(engine.max_encoded_bytes(unit.len())))
            .collect();
        engine.encode(input, &mut encoded)?;
        // Nothing of the previous engine's output may pass for this one's.
        out.fill(0xA5);
        engine.decode(&units, &encoded, out)?;
        let encoded_bytes = encoded.iter().map(Vec::len).sum();
        let identical = out == input.data;
        Ok(Self { engine, units, encoded: encoded.into(), encoded_bytes, identical })
    }
}

fn measure(input: &Input, n_threads: usize, progress: &Progress) -> anyhow::Result<Vec<Line>> {
    let mut out = vec![0; input.data.len()];
    let benches: Vec<Bench> = Engine::all()
        .into_iter()
        .map(|engine| {
            Bench::new(engine, input, &mut out).with_context(|| format!("engine {}", engine.name()))
        })
        .collect::<anyhow::Result<_>>()?;
    let out = RefCell::new(out);
    let mut jobs: Vec<Job<'_>> = Vec::new();
    for bench in &benches {
        jobs.push(Box::new(|| bench.engine.encode(input, &mut bench.encoded.borrow_mut())));
        jobs.push(Box::new(|| {
            bench.engine.decode(&bench.units, &bench.encoded.borrow(), &mut out.borrow_mut())
        }));
    }
    let samples = measure::interleaved(&mut jobs, MIN_SECONDS, || progress.add(1))?;
    Ok(benches
        .iter()
        .zip(samples.chunks(2))
        .map(|(bench, samples)| line(bench, input.data.len(), n_threads, &samples[0], &samples[1]))
        .collect())
}

fn line(bench: &Bench, n_bytes: usize, threads: usize, encode: &Samples, decode: &Samples) -> Line {
    let gbps = |seconds: f64| n_bytes as f64 / 1e9 / seconds;
    Line {
        engine: bench.engine.name(),
        threads,
        ratio: bench.encoded_bytes as f64 / n_bytes as f64,
        encode_gbps: gbps(encode.median()),
        decode_gbps: gbps(decode.median()),
        encode_gbps_range: [gbps(encode.max()), gbps(encode.min())],
        decode_gbps_range: [gbps(decode.max()), gbps(decode.min())],
        encode_runs: encode.n_runs(),
        decode_runs: decode.n_runs(),
        identical: bench.identical,
    }
}

fn text(report: &Report) -> String {
    let style = Style::stdout();
    let mut table = Table::new(&[
        ("engine", Align::Left),
        ("threads", Align::Right),
        ("ratio", Align::Right),
        ("encode GB/s", Align::Right),
        ("min..max", Align::Right),
        ("decode GB/s", Align::Right),
        ("min..max", Align::Right),
        ("output", Align::Left),
    ]);
    for line in &report.results {
        let range = |[low, high]: [f64; 2]| format!("{low:.2}..{high:.2}");
        table.row([
            line.engine.clone(),
            line.threads.to_string(),
            format!("{:.4}", line.ratio),
            format!("{:.2}", line.encode_gbps),
            range(line.encode_gbps_range),
            format!("{:.2}", line.decode_gbps),
            range(line.decode_gbps_range),
            if line.identical { "identical" } else { "DIFFERS" }.into(),
        ]);
    }
    format!(
        "{}: {} tensors, {}\n\n{}",
        report.input,
        report.tensors,
        output::bytes(report.bytes),
        table.render(style)
    )
}
