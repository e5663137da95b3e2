//! Sizes and entropies, tensor by tensor.

use std::path::Path;

use rayon::prelude::*;

use super::error::{At, CheckpointError};
use super::open::{Checkpoint, Tensor, TensorKind};
use super::{Options, Progress};
use crate::dtype::Dtype;
use crate::io::ReadAt;
use crate::isa::Isa;
use crate::record::TensorStatistics;

/// Bytes read at a time.
const CHUNK_BYTES: u64 = 4 << 20;

/// What there is to know of a tensor.
#[derive(Debug, Clone, serde::Serialize)]
pub struct TensorInspection {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Bytes of its elements.
    pub original_bytes: u64,
    /// Bytes of its record; `None` in an original.
    pub packed_bytes: Option<u64>,
    /// Order-0 floor in bits a weight.
    pub entropy_bits: f64,
    /// Bits a weight takes in this file.
    pub bits_per_weight: f64,
    /// How often each high byte occurs (of BF16: each exponent); empty if the
    /// dtype is never coded.
    #[serde(skip)]
    pub histogram: Vec<u64>,
}

/// What there is to know of a checkpoint.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Inspection {
    /// Whether it is packed.
    pub packed: bool,
    /// Bytes of all tensors' elements.
    pub original_bytes: u64,
    /// Bytes of all records; `None` in an original.
    pub packed_bytes: Option<u64>,
    /// Number of weights.
    pub weights: u64,
    /// Bits a weight takes in this file, headers left out.
    pub bits_per_weight: f64,
    /// Order-0 floor in bits a weight.
    pub entropy_bits: f64,
    /// The tensors, file after file, in the order of their data.
    pub tensors: Vec<TensorInspection>,
}

/// Reads every tensor of a checkpoint, original or packed, and measures it.
///
/// # Errors
///
/// [`CheckpointError`] if a file or a record is not valid.
pub fn inspect(
    path: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Inspection, CheckpointError> {
    let checkpoint = Checkpoint::open(path)?;
    progress.start(checkpoint.tensors().map(|tensor| tensor.original_bytes).sum());
    let names: Vec<&str> = checkpoint.tensors().map(|tensor| tensor.name.as_str()).collect();
    let tensors: Vec<TensorInspection> = options.install(|| {
        names
            .par_iter()
            .map(|name| {
                let tensor = checkpoint.tensor(name)?.expect("it was listed");
                let inspection = inspect_tensor(&tensor, options.isa)?;
                progress.advance(inspection.original_bytes);
                Ok(inspection)
            })
            .collect()
    })?;
    // Shapes of unknown dtypes may claim anything.
    let weights = tensors.iter().map(n_weights).fold(0, u64::saturating_add);
    let mean = |bits: &dyn Fn(&TensorInspection) -> f64| {
        let total: f64 = tensors.iter().map(|t| bits(t) * n_weights(t) as f64).sum();
        total / weights.max(1) as f64
    };
    let packed = checkpoint.is_packed();
    Ok(Inspection {
        packed,
        original_bytes: tensors.iter().map(|tensor| tensor.original_bytes).sum(),
        packed_bytes: packed.then(|| checkpoint.tensors().map(|t| t.stored_bytes).sum()),
        weights,
        bits_per_weight: mean(&|tensor| tensor.bits_per_weight),
        entropy_bits: mean(&|tensor| tensor.entropy_bits),
        tensors,
    })
}

fn n_weights(tensor: &TensorInspection) -> u64 {
    tensor.shape.iter().map(|&dim| dim as u64).product()
}

fn inspect_tensor(tensor: &Tensor<'_>, isa: Isa) -> Result<TensorInspection, CheckpointError> {
    let info = tensor.info;
    let dtype = Dtype::from_safetensors(&info.dtype);
    let mut statistics = TensorStatistics::new(dtype);
    match &tensor.kind {
        TensorKind::Packed(record) => record
            .stream_with(tensor.source(), isa, |bytes| {
                statistics.add(bytes);
                Ok(())
            })
            .map_err(|error| error.in_tensor(&info.name))
            .at(&info.path)?,
        TensorKind::Dense => {
            let mut buffer = vec![0; CHUNK_BYTES.min(info.original_bytes) as usize];
            let mut done = 0;
            while done < info.original_bytes {
                let n = CHUNK_BYTES.min(info.original_bytes - done);
                let chunk = &mut buffer[..n as usize];
                tensor.source().read_exact_at(chunk, tensor.start() + done).at(&info.path)?;
                statistics.add(chunk);
                done += n;
            }
        }
    }
    let n_elems: u64 = info.shape.iter().map(|&dim| dim as u64).product();
    let bits = |n_bytes: u64| n_bytes as f64 * 8.0 / n_elems.max(1) as f64;
    let entropy_bits = match dtype {
        Dtype::Opaque => bits(info.original_bytes),
        _ if n_elems == 0 => 0.0,
        _ => statistics.floor_bits(),
    };
    let packed = matches!(tensor.kind, TensorKind::Packed(_));
    Ok(TensorInspection {
        name: info.name.clone(),
        dtype: info.dtype.clone(),
        shape: info.shape.clone(),
        original_bytes: info.original_bytes,
        packed_bytes: packed.then_some(info.stored_bytes),
        entropy_bits,
        bits_per_weight: bits(info.stored_bytes),
        histogram: match dtype {
            Dtype::Opaque => Vec::new(),
            _ => statistics.histogram(0).counts.to_vec(),
        },
    })
}
