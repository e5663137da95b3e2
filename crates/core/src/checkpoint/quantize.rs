//! A checkpoint directory with INT8 weights from one with floating-point ones.
//!
//! The result has the layout of `compressed-tensors`: a matrix `m.weight` is I8
//! and has beside it `m.weight_scale`, F32 of shape `[rows, 1]` or `[1]`;
//! `config.json` says so under `quantization_config`.
//!
//! Files are made in `.transom-job` inside the destination and moved out when
//! all are whole, `config.json` last. `quantize.json` in there names them, so that
//! a call that follows one that was killed knows what to clear away.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::directory::{CONFIG_NAME, INDEX_NAME, JOB_NAME, list};
use super::error::{At, CheckpointError};
use super::file::{self, Partial, write_file};
use super::manifest::is_packed_directory;
use super::pack::{check_apart, parent};
use super::unpack::copy;
use super::{Options, Progress, open};
use crate::arch::all::product::widen_dense;
use crate::io::ReadAt;
use crate::layout::WeightType;
use crate::quantize::rate::{self, Matrix, RateReport};
use crate::quantize::{Granularity, MAX_F16, absmax_scale, quantise};
use crate::safetensors::{Entry, Header, METADATA};

/// What a matrix's scales are called: its name and this.
pub const SCALE_SUFFIX: &str = "_scale";
/// Elements of a panel, about: what is in memory of a matrix at a time.
const PANEL_ELEMS: usize = 4 << 20;
/// Names of modules that are no linear layers although their weights are matrices.
const EMBEDDINGS: [&str; 4] = ["embed_tokens", "wte", "wpe", "embeddings"];
const HEAD: &str = "lm_head";
const MARKER: &str = "quantize.json";

/// How to quantise.
#[derive(Clone, Copy)]
pub struct QuantizeOptions<'a> {
    /// Whether a scale is shared by a matrix or by a row.
    pub granularity: Granularity,
    /// Says of each linear layer, by the name of its weight, whether to
    /// quantise it. [`is_default`] is the usual choice.
    pub selects: &'a (dyn Fn(&str) -> bool + Sync),
    /// Bits that a weight may take once packed; `None`: scales are those of
    /// the absolute maximum.
    pub target_bits: Option<f64>,
    /// By the name of a weight, the mean square of each of its inputs: with it
    /// the layer's output error is minimised, without it the weights'.
    pub input_squares: &'a HashMap<String, Vec<f32>>,
    /// Choose scales `absmax / L` with one L that meets the target bits, to
    /// compare with.
    pub baseline: bool,
}

/// Whether a linear layer is quantised unless told otherwise: all but the head.
#[must_use]
pub fn is_default(name: &str) -> bool {
    module(name) != HEAD
}

/// What quantising did.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct QuantizeReport {
    /// Bytes of all tensors of the model before.
    pub original_bytes: u64,
    /// Bytes of all tensors of the model after.
    pub quantized_bytes: u64,
    /// The matrices that are integers now.
    pub tensors: Vec<QuantizedTensor>,
}

/// A quantised matrix.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct QuantizedTensor {
    /// Name of its weight.
    pub name: String,
    /// Rows and columns.
    pub shape: [usize; 2],
    /// Root of the sum of squared errors over that of the squared weights.
    pub relative_error: f64,
    /// Size and error, if bits were asked for.
    pub rate: Option<RateReport>,
}

/// Quantises the linear layers of a checkpoint directory.
///
/// # Errors
///
/// [`CheckpointError`]; [`CheckpointError::Unquantisable`] for a weight that is
/// not finite or above 65,504. Nothing that looks like a checkpoint is left
/// behind, and the same call starts anew.
///
/// # Cost
///
/// Reads every selected matrix once, twice if it has one scale. Holds a few
/// rows of it, or with a target a whole one in f32.
pub fn quantize(
    source: &Path,
    target: &Path,
    quantize: &QuantizeOptions<'_>,
    options: &Options,
    progress: &dyn Progress,
) -> Result<QuantizeReport, CheckpointError> {
    check_apart(source, target)?;
    if is_packed_directory(source) {
        return Err(CheckpointError::AlreadyPacked { path: source.to_owned() });
    }
    let shards = open::shards(source)?;
    // Finds tensors with one name.
    let checkpoint = open::Checkpoint::open(source)?;
    if checkpoint.is_packed() {
        return Err(CheckpointError::AlreadyPacked { path: source.to_owned() });
    }
    let plan = Plan::new(source, &checkpoint, quantize)?;
    let job = Job::begin(source, target)?;
    progress.start(plan.matrices.iter().map(|info| info.original_bytes).sum());
    let mut report = QuantizeReport { original_bytes: 0, quantized_bytes: 0, tensors: Vec::new() };
    let mut weight_map = Map::new();
    options.install(|| {
        for shard in &shards {
            let names = quantize_file(&job, shard, &plan, quantize, &mut report, progress)?;
            weight_map.extend(names.into_iter().map(|name| (name, shard.as_str().into())));
        }
        Ok(())
    })?;
    for item in list(source)? {
        let (from, to) = (source.join(&item.name), job.staged(&item.name)?);
        match item.name.as_str() {
            name if shards.iter().any(|shard| shard == name) => {}
            CONFIG_NAME => {
                let text = std::fs::read_to_string(&from).at(&from)?;
                let text = plan.rewrite_config(&text, quantize.granularity).at(&from)?;
                write_file(&to, &job.notes, text.as_bytes())?;
            }
            INDEX_NAME => {
                let text = std::fs::read_to_string(&from).at(&from)?;
                let text = rewrite_index(&text, &weight_map, report.quantized_bytes).at(&from)?;
                write_file(&to, &job.notes, text.as_bytes())?;
            }
            _ => {
                copy(&from, &to, &job.notes)?;
            }
        }
    }
    job.end()?;
    Ok(report)
}

/// The module of a tensor.
fn module(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// Whether a tensor is the weight of a linear layer, as far as its name and
/// shape tell.
fn is_linear(name: &str, dtype: &str, shape: &[usize]) -> bool {
    let last = module(name).rsplit('.').next().unwrap_or_default();
    let is_float = matches!(dtype, "BF16" | "F16" | "F32");
    is_float && shape.len() == 2 && name.ends_with(".weight") && !EMBEDDINGS.contains(&last)
}

// ---------------------------------------------------------------------------
// What to quantise

struct Plan {
    matrices: Vec<open::TensorInfo>,
    /// Modules that stay as they are although they are linear layers.
    ignored: Vec<String>,
}

impl Plan {
    fn new(
        source: &Path,
        checkpoint: &open::Checkpoint,
        quantize: &QuantizeOptions<'_>,
    ) -> Result<Self, CheckpointError> {
        let config = checkpoint.file_bytes(CONFIG_NAME)?;
        let config = config.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
        let is_quantised = config
            .and_then(|config| config.get("quantization_config").cloned())
            .is_some_and(|quantization| !quantization.is_null());
        if is_quantised {
            return Err(CheckpointError::AlreadyQuantised { path: source.to_owned() });
        }
        let linear = checkpoint.tensors().filter(|t| is_linear(&t.name, &t.dtype, &t.shape));
        let (matrices, others): (Vec<_>, Vec<_>) =
            linear.cloned().partition(|tensor| (quantize.selects)(&tensor.name));
        if matrices.is_empty() {
            return Err(CheckpointError::NothingToQuantise { path: source.to_owned() });
        }
        let names = |info: &open::TensorInfo| info.name.clone() + SCALE_SUFFIX;
        if let Some(name) = matrices.iter().map(names).find(|name| checkpoint.has(name)) {
            return Err(CheckpointError::AlreadyScaled { path: source.to_owned(), tensor: name });
        }
        let mut ignored: Vec<String> =
            others.iter().map(|tensor| module(&tensor.name).to_owned()).collect();
        // A head that is the embedding has no tensor, but is a module.
        let head = HEAD.to_owned();
        if !matrices.iter().any(|tensor| module(&tensor.name) == HEAD) && !ignored.contains(&head) {
            ignored.push(head);
        }
        Ok(Self { matrices, ignored })
    }

    fn has(&self, name: &str) -> bool {
        self.matrices.iter().any(|info| info.name == name)
    }

    /// `config.json` with what readers of `compressed-tensors` look for. The
    /// format stands in the group too: at the top alone, `transformers` ignores it.
    fn rewrite_config(&self, original: &str, granularity: Granularity) -> std::io::Result<String> {
        let mut config: Map<String, Value> = serde_json::from_str(original)?;
        let group = json!({
            "format": "int-quantized",
            "input_activations": null,
            "output_activations": null,
            "targets": ["Linear"],
            "weights": {
                "dynamic": false,
                "group_size": null,
                "num_bits": 8,
                "strategy": granularity.name(),
                "symmetric": true,
                "type": "int",
            },
        });
        let quantization = json!({
            "config_groups": { "group_0": group },
            "format": "int-quantized",
            "ignore": self.ignored,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        });
        config.insert("quantization_config".to_owned(), quantization);
        Ok(serde_json::to_string_pretty(&config)? + "\n")
    }
}

fn rewrite_index(
    original: &str,
    weight_map: &Map<String, Value>,
    total_size: u64,
) -> std::io::Result<String> {
    let mut index: Map<String, Value> = serde_json::from_str(original)?;
    if let Some(metadata) = index.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.insert("total_size".to_owned(), total_size.into());
    }
    index.insert("weight_map".to_owned(), weight_map.clone().into());
    Ok(serde_json::to_string_pretty(&index)? + "\n")
}

// ---------------------------------------------------------------------------
// A file

/// A tensor of the new file.
struct Target<'a> {
    name: String,
    dtype: &'a str,
    shape: Vec<usize>,
    n_bytes: u64,
    content: Content<'a>,
}

enum Content<'a> {
    Copy(&'a Entry),
    Integers(&'a Entry),
    Scales,
}

/// Quantises a shard; returns the names of its tensors.
fn quantize_file(
    job: &Job<'_>,
    shard: &str,
    plan: &Plan,
    quantize: &QuantizeOptions<'_>,
    report: &mut QuantizeReport,
    progress: &dyn Progress,
) -> Result<Vec<String>, CheckpointError> {
    let path = job.source.join(shard);
    let (file, header) = file::open(&path)?;
    let before = file::identity(&file, &path)?;
    let targets = targets(&header, plan, quantize.granularity);
    let (bytes, starts) = header_bytes(&header, &targets);
    let out = Partial::create(&job.staged(shard)?, &job.notes)?;
    out.write_at(&bytes, 0)?;
    let start_of: HashMap<&str, u64> =
        targets.iter().zip(&starts).map(|(target, start)| (target.name.as_str(), *start)).collect();
    for target in &targets {
        let start = start_of[target.name.as_str()];
        match target.content {
            Content::Copy(entry) => copy_tensor(&file, &path, &header, entry, &out, start)?,
            // Written with the integers.
            Content::Scales => {}
            Content::Integers(entry) => {
                let scales_start = start_of[(entry.name.clone() + SCALE_SUFFIX).as_str()];
                let tensor = Tensor::new(&file, &path, &header, entry)?;
                let done = tensor.quantise(quantize, &out, [start, scales_start], progress)?;
                report.tensors.push(done);
            }
        }
    }
    if file::identity(&file, &path)? != before {
        return Err(CheckpointError::Changed { path });
    }
    out.finish()?;
    report.original_bytes += header.entries().iter().map(Entry::n_bytes).sum::<u64>();
    report.quantized_bytes += targets.iter().map(|target| target.n_bytes).sum::<u64>();
    Ok(targets.into_iter().map(|target| target.name).collect())
}

/// The tensors of the new file in the order of their data: wide elements
/// first, so that all are aligned.
fn targets<'a>(header: &'a Header, plan: &Plan, granularity: Granularity) -> Vec<Target<'a>> {
    let mut targets = Vec::new();
    for entry in header.entries() {
        if !plan.has(&entry.name) {
            targets.push(Target {
                name: entry.name.clone(),
                dtype: &entry.dtype,
                shape: entry.shape.clone(),
                n_bytes: entry.n_bytes(),
                content: Content::Copy(entry),
            });
            continue;
        }
        let (rows, cols) = (entry.shape[0], entry.shape[1]);
        let scale_shape = match granularity {
            Granularity::Tensor => vec![1],
            Granularity::Channel => vec![rows, 1],
        };
        targets.push(Target {
            name: entry.name.clone(),
            dtype: "I8",
            shape: entry.shape.clone(),
            n_bytes: (rows * cols) as u64,
            content: Content::Integers(entry),
        });
        targets.push(Target {
            name: entry.name.clone() + SCALE_SUFFIX,
            dtype: "F32",
            n_bytes: 4 * scale_shape[0] as u64,
            shape: scale_shape,
            content: Content::Scales,
        });
    }
    let elem_bytes = |target: &Target<'_>| {
        let n_elems: usize = target.shape.iter().product();
        target.n_bytes / (n_elems as u64).max(1)
    };
    targets.sort_by_key(|target| std::cmp::Reverse(elem_bytes(target)));
    targets
}

/// The header, and where in the file each tensor starts.
fn header_bytes(original: &Header, targets: &[Target<'_>]) -> (Vec<u8>, Vec<u64>) {
    let mut object = Map::new();
    let metadata = original.metadata().cloned();
    let usual = || Map::from_iter([("format".to_owned(), "pt".into())]);
    object.insert(METADATA.to_owned(), metadata.unwrap_or_else(usual).into());
    let (mut start, mut starts) = (0, Vec::new());
    for target in targets {
        let end = start + target.n_bytes;
        let entry = json!({
            "dtype": target.dtype, "shape": target.shape, "data_offsets": [start, end],
        });
        object.insert(target.name.clone(), entry);
        starts.push(start);
        start = end;
    }
    let mut json = serde_json::to_vec(&object).expect("strings and numbers");
    json.resize(json.len().next_multiple_of(8), b' ');
    let bytes = [&(json.len() as u64).to_le_bytes()[..], &json].concat();
    starts.iter_mut().for_each(|start| *start += bytes.len() as u64);
    (bytes, starts)
}

fn copy_tensor(
    file: &File,
    path: &Path,
    header: &Header,
    entry: &Entry,
    out: &Partial,
    start: u64,
) -> Result<(), CheckpointError> {
    let mut buffer = Vec::new();
    for done in (0..entry.n_bytes()).step_by(PANEL_ELEMS) {
        buffer.resize((entry.n_bytes() - done).min(PANEL_ELEMS as u64) as usize, 0);
        file.read_exact_at(&mut buffer, header.data_start() + entry.start + done).at(path)?;
        out.write_at(&buffer, start + done)?;
    }
    Ok(())
}

// ---------------------------------------------------------------------------
// A matrix

struct Tensor<'a> {
    file: &'a File,
    path: &'a Path,
    name: &'a str,
    start: u64,
    shape: [usize; 2],
    weight: WeightType,
}

/// Sums of squares, of errors and of weights.
#[derive(Default, Clone, Copy)]
struct Squares {
    error: f64,
    weight: f64,
}

impl<'a> Tensor<'a> {
    fn new(
        file: &'a File,
        path: &'a Path,
        header: &Header,
        entry: &'a Entry,
    ) -> Result<Self, CheckpointError> {
        let weight = WeightType::from_safetensors(&entry.dtype).expect("a selected tensor");
        let shape = [entry.shape[0], entry.shape[1]];
        let start = header.data_start() + entry.start;
        Ok(Self { file, path, name: &entry.name, start, shape, weight })
    }

    /// Writes integers and scales where they belong.
    fn quantise(
        &self,
        quantize: &QuantizeOptions<'_>,
        out: &Partial,
        [start, scales_start]: [u64; 2],
        progress: &dyn Progress,
    ) -> Result<QuantizedTensor, CheckpointError> {
        let [rows, cols] = self.shape;
        let n_bytes = (rows * cols * self.weight.elem_bytes()) as u64;
        let mut report = QuantizedTensor {
            name: self.name.to_owned(),
            shape: self.shape,
            relative_error: 0.0,
            rate: None,
        };
        let (scales, squares) = if let Some(bits) = quantize.target_bits {
            let weights = self.read_rows(0, rows)?;
            let input_squares = quantize.input_squares.get(self.name).map(Vec::as_slice);
            let matrix = Matrix { weights: &weights, cols, input_squares };
            let found = rate::quantise(&matrix, quantize.granularity, bits, quantize.baseline);
            out.write_at(&found.integers, start)?;
            report.rate = Some(found.report);
            let scale_of = |row: usize| found.scales[row.min(found.scales.len() - 1)];
            let squares = squares(&weights, cols, &found.integers, scale_of);
            progress.advance(n_bytes);
            (found.scales, squares)
        } else {
            self.quantise_panels(quantize.granularity, out, start, progress)?
        };
        let bytes: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        out.write_at(&bytes, scales_start)?;
        if squares.weight > 0.0 {
            report.relative_error = (squares.error / squares.weight).sqrt();
        }
        Ok(report)
    }

    /// With the scales of the absolute maximum, a few rows at a time.
    fn quantise_panels(
        &self,
        granularity: Granularity,
        out: &Partial,
        start: u64,
        progress: &dyn Progress,
    ) -> Result<(Vec<f32>, Squares), CheckpointError> {
        let [rows, cols] = self.shape;
        let step = (PANEL_ELEMS / cols.max(1)).max(1);
        let mut whole = 0.0f32;
        if granularity == Granularity::Tensor {
            for first in (0..rows).step_by(step) {
                whole = whole.max(absmax(&self.read_rows(first, step)?));
            }
        }
        let (mut scales, mut sums) = (Vec::new(), Squares::default());
        for first in (0..rows).step_by(step) {
            let weights = self.read_rows(first, step)?;
            let panel_scales: Vec<f32> = weights
                .par_chunks(cols.max(1))
                .map(|row| match granularity {
                    Granularity::Tensor => absmax_scale(whole),
                    Granularity::Channel => absmax_scale(absmax(row)),
                })
                .collect();
            let mut integers = vec![0; weights.len()];
            let panel = integers.par_chunks_mut(cols.max(1)).zip(weights.par_chunks(cols.max(1)));
            panel.zip(&panel_scales).for_each(|((integers, weights), scale)| {
                for (q, weight) in integers.iter_mut().zip(weights) {
                    *q = quantise(*weight, *scale) as u8;
                }
            });
            out.write_at(&integers, start + (first * cols) as u64)?;
            let found = squares(&weights, cols, &integers, |row| panel_scales[row]);
            sums.error += found.error;
            sums.weight += found.weight;
            scales.extend(panel_scales);
            progress.advance((weights.len() * self.weight.elem_bytes()) as u64);
        }
        if granularity == Granularity::Tensor {
            scales = vec![absmax_scale(whole)];
        }
        Ok((scales, sums))
    }

    /// At most `n` rows, checked.
    fn read_rows(&self, first: usize, n: usize) -> Result<Vec<f32>, CheckpointError> {
        let [rows, cols] = self.shape;
        let elem_bytes = self.weight.elem_bytes();
        let mut bytes = vec![0; n.min(rows - first) * cols * elem_bytes];
        let start = self.start + (first * cols * elem_bytes) as u64;
        self.file.read_exact_at(&mut bytes, start).at(self.path)?;
        let weights: Vec<f32> = (0..bytes.len() / elem_bytes)
            .into_par_iter()
            .map(|index| widen_dense(self.weight, &bytes, index))
            .collect();
        // NaN is in no range.
        match weights.iter().position(|weight| !(-MAX_F16..=MAX_F16).contains(weight)) {
            None => Ok(weights),
            Some(index) => Err(CheckpointError::Unquantisable {
                path: self.path.to_owned(),
                tensor: self.name.to_owned(),
                row: first + index / cols,
                col: index % cols,
                found: weights[index],
            }),
        }
    }
}

fn absmax(weights: &[f32]) -> f32 {
    weights.iter().fold(0.0, |max, weight| max.max(weight.abs()))
}

fn squares(
    weights: &[f32],
    cols: usize,
    integers: &[u8],
    scale_of: impl Fn(usize) -> f32,
) -> Squares {
    let mut sums = Squares::default();
    let rows = weights.chunks(cols.max(1)).zip(integers.chunks(cols.max(1)));
    for (row, (weights, integers)) in rows.enumerate() {
        let scale = scale_of(row);
        for (weight, q) in weights.iter().zip(integers) {
            let back = crate::quantize::dequantise(*q as i8, scale);
            sums.error += f64::from(weight - back).powi(2);
            sums.weight += f64::from(*weight).powi(2);
        }
    }
    sums
}

// ---------------------------------------------------------------------------
// The destination

struct Job<'a> {
    source: &'a Path,
    target: &'a Path,
    notes: std::path::PathBuf,
    names: Vec<String>,
    /// Held until the job ends.
    _lock: File,
}

impl<'a> Job<'a> {
    fn begin(source: &'a Path, target: &'a Path) -> Result<Self, CheckpointError> {
        let notes = target.join(JOB_NAME);
        let exists = || CheckpointError::DestinationNotEmpty { path: target.to_owned() };
        if target.exists() && !target.is_dir() {
            return Err(exists());
        }
        if target.exists() {
            // Files that a killed job has moved out already.
            let marker = std::fs::read(notes.join(MARKER)).unwrap_or_default();
            let ours: Vec<String> = serde_json::from_slice(&marker).unwrap_or_default();
            for item in list(target)? {
                if !ours.contains(&item.name) {
                    return Err(exists());
                }
            }
            if notes.exists() && marker.is_empty() {
                return Err(exists());
            }
        }
        std::fs::create_dir_all(&notes).at(&notes)?;
        let lock_path = notes.join("lock");
        let lock = File::options().create(true).append(true).open(&lock_path).at(&lock_path)?;
        lock.try_lock().map_err(|_| exists())?;
        let names: Vec<String> = list(source)?.into_iter().map(|item| item.name).collect();
        let marker = serde_json::to_vec(&names).expect("strings");
        write_file(&notes.join(MARKER), &notes, &marker)?;
        for name in &names {
            remove(&target.join(name))?;
        }
        let staged = notes.join("files");
        if staged.exists() {
            std::fs::remove_dir_all(&staged).at(&staged)?;
        }
        Ok(Self { source, target, notes, names, _lock: lock })
    }

    /// Where a file is made.
    fn staged(&self, name: &str) -> Result<std::path::PathBuf, CheckpointError> {
        let path = self.notes.join("files").join(name);
        let folder = parent(&path);
        std::fs::create_dir_all(&folder).at(&folder)?;
        Ok(path)
    }

    /// Moves everything to its place.
    fn end(self) -> Result<(), CheckpointError> {
        let (last, names): (Vec<_>, Vec<_>) =
            self.names.iter().partition(|name| *name == CONFIG_NAME);
        for name in names.into_iter().chain(last) {
            let to = self.target.join(name);
            let folder = parent(&to);
            std::fs::create_dir_all(&folder).at(&folder)?;
            std::fs::rename(self.staged(name)?, &to).at(&to)?;
        }
        std::fs::remove_dir_all(&self.notes).at(&self.notes)
    }
}

fn remove(path: &Path) -> Result<(), CheckpointError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).at(path),
        _ => Ok(()),
    }
}
