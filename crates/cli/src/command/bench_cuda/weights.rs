//! Matrices to measure: synthetic ones, or put together from a checkpoint.

use std::path::Path;

use anyhow::Context as _;
use rayon::prelude::*;
use transom::checkpoint::TensorKind;
use transom::{Checkpoint, Dtype, Isa, ReadAt as _, Record, RecordWriter, TensorStatistics};
use transom_cuda::bench::{self, Encoded, Weights};
use transom_cuda::fixed::{DeviceMatrix, FixedMatrix, WeightFormat};
use transom_cuda::product::Product;
use transom_cuda::rans::{Rans, RansError, RansMatrix};

use super::report::Gpu;
use crate::args::{LayoutName, WeightName};
use crate::{output, synthetic};

const SEED: u64 = 42;
/// Rows of a tile of records; a matrix is repeated by whole tiles.
const TILE_ROWS: usize = 128;
/// Rows that are encoded at most, if they divide the matrix.
const MOST_ROWS: usize = 2048;

/// A matrix that repeats its first rows, so that only those have to be encoded.
pub(super) struct Source {
    pub(super) dtype: WeightName,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// How often the part is repeated.
    times: usize,
    /// The first rows, row-major.
    part: Vec<u8>,
}

impl Source {
    /// Synthetic weights, or BF16 ones of a checkpoint.
    pub(super) fn new(
        dtype: WeightName,
        (rows, cols): (usize, usize),
        checkpoint: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let times = repetitions(rows);
        let part_rows = rows / times;
        let part = match checkpoint {
            None => synthetic::weights(dtype, part_rows, cols, SEED),
            Some(path) => from_checkpoint(path, dtype, part_rows, cols)?,
        };
        Ok(Self { dtype, rows, cols, times, part })
    }

    const fn part_rows(&self) -> usize {
        self.rows / self.times
    }

    /// Elements as a record has them.
    pub(super) const fn dtype(&self) -> Dtype {
        match self.dtype {
            WeightName::Bf16 => Dtype::Bf16,
            WeightName::F16 => Dtype::F16,
            WeightName::Int8 => Dtype::I8,
        }
    }

    /// Of INT8 weights one, of others none.
    fn scales(&self) -> Vec<f32> {
        scale(self.dtype()).unwrap_or_default()
    }

    /// What a library multiplies with: BF16, or FP16 (dequantised INT8).
    pub(super) fn dense(&self) -> Vec<u16> {
        let part: Vec<u16> = match self.dtype {
            WeightName::Int8 => self.part.iter().map(|&q| dequantise(q)).collect(),
            _ => {
                let pairs = self.part.as_chunks::<2>().0.iter();
                pairs.map(|&pair| u16::from_le_bytes(pair)).collect()
            }
        };
        part.repeat(self.times)
    }

    /// The elements themselves.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.part.repeat(self.times)
    }

    /// In the smallest fixed-rate code.
    fn fixed(&self) -> (FixedMatrix, f64) {
        let (rows, scales) = (self.part_rows(), self.scales());
        let (format, places) =
            FixedMatrix::choose(self.dtype(), rows, self.cols, &self.part, &scales);
        self.encode(format, places)
    }

    /// Dense, in the order of chunks.
    fn twin(&self) -> (FixedMatrix, f64) {
        self.encode(
            match self.dtype {
                WeightName::Bf16 => WeightFormat::DenseBf16,
                WeightName::F16 => WeightFormat::DenseF16,
                WeightName::Int8 => WeightFormat::DenseInt8,
            },
            0,
        )
    }

    /// With bits a weight, as if the overflow were not shared by the repetitions.
    fn encode(&self, format: WeightFormat, places: usize) -> (FixedMatrix, f64) {
        let (rows, scales) = (self.part_rows(), self.scales());
        let part = FixedMatrix::encode(format, places, rows, self.cols, &self.part, &scales);
        (bench::repeat(&part, self.times), part.bits_per_weight())
    }

    /// In a layout, on the host.
    pub(super) fn host(&self, layout: LayoutName) -> anyhow::Result<Host> {
        Ok(match layout {
            LayoutName::Dense => self.twin().into(),
            LayoutName::Fixed => self.fixed().into(),
            LayoutName::Rans => Host::Record(self.record()?),
        })
    }

    /// As a record, whose tiles repeat.
    fn record(&self) -> anyhow::Result<Vec<u8>> {
        let mut once = TensorStatistics::new(self.dtype());
        once.add(&self.part);
        let mut statistics = TensorStatistics::new(self.dtype());
        (0..self.times).for_each(|_| statistics.merge(&once));
        let writer = RecordWriter::new(&[self.rows, self.cols], &statistics, [0; 32])?;
        let tiling = *writer.tiling();
        let n_elems = self.part_rows() * self.cols;
        let row_bytes = self.part.len() / self.part_rows();
        let n_tiles = tiling.n_tiles() * n_elems / tiling.n_elems();
        let encode = |index: usize| {
            let tile = tiling.tile(index);
            let first = tile.row_start * row_bytes + tile.col_start * self.dtype().elem_bytes();
            writer.encode_tile(Isa::best(), index, &self.part[first..], row_bytes)
        };
        let tiles: Vec<_> = (0..n_tiles).into_par_iter().map(encode).collect::<Result<_, _>>()?;
        let entries: Vec<_> = tiles.iter().map(|t| (t.bytes.len() as u32, t.checksum)).collect();
        let body: Vec<u8> = tiles.into_iter().flat_map(|tile| tile.bytes).collect();
        let mut packed = writer.finish(entries.repeat(self.times));
        (0..self.times).for_each(|_| packed.extend(&body));
        Ok(packed)
    }
}

/// A matrix in one layout, on the host.
pub(super) enum Host {
    /// With bits a weight.
    Chunks(FixedMatrix, f64),
    Record(Vec<u8>),
}

impl From<(FixedMatrix, f64)> for Host {
    fn from((matrix, bits_per_weight): (FixedMatrix, f64)) -> Self {
        Self::Chunks(matrix, bits_per_weight)
    }
}

impl Host {
    /// For products of few tokens: as many copies as are needed to read them cold,
    /// and bits a weight.
    pub(super) fn weights<'a>(
        &self,
        gpu: &Gpu,
        rans: &'a Rans,
    ) -> anyhow::Result<(Weights<'a>, f64)> {
        match self {
            Self::Chunks(matrix, bits_per_weight) => {
                let products = copies(gpu, matrix.chunks.len(), || {
                    let matrices = std::slice::from_ref(matrix);
                    Ok(Product::new(&gpu.device, &gpu.stream, matrices, None)?)
                })?;
                Ok((Weights::Chunks(products), *bits_per_weight))
            }
            Self::Record(packed) => {
                let (matrices, dtype, bits_per_weight) = load(gpu, rans, packed)?;
                let scales = scale(dtype).map(|scale| gpu.stream.upload(&scale)).transpose()?;
                Ok((Weights::Rans(rans, matrices, scales), bits_per_weight))
            }
        }
    }

    /// The same, to be decoded.
    pub(super) fn encoded<'a>(
        &self,
        gpu: &Gpu,
        rans: &'a Rans,
    ) -> anyhow::Result<(Encoded<'a>, f64)> {
        match self {
            Self::Chunks(matrix, bits_per_weight) => {
                let scales = scale(matrix.format.dtype());
                let scales = scales.map(|scale| gpu.stream.upload(&scale)).transpose()?;
                let matrices = copies(gpu, matrix.chunks.len(), || {
                    Ok(DeviceMatrix::new(&gpu.stream, matrix)?)
                })?;
                Ok((Encoded::Fixed(matrices, scales), *bits_per_weight))
            }
            Self::Record(packed) => {
                let (matrices, _, bits_per_weight) = load(gpu, rans, packed)?;
                Ok((Encoded::Rans(rans, matrices), bits_per_weight))
            }
        }
    }
}

/// Whether a layout cannot have such weights; says so.
pub(super) fn is_unsupported(error: &anyhow::Error, what: &str) -> bool {
    let unsupported = matches!(error.downcast_ref::<RansError>(), Some(RansError::Unsupported(_)));
    if unsupported {
        output::note(&format!("transom: {what} left out: {error}"));
    }
    unsupported
}

fn load(gpu: &Gpu, rans: &Rans, packed: &[u8]) -> anyhow::Result<(Vec<RansMatrix>, Dtype, f64)> {
    let record = Record::read(packed, 0, packed.len() as u64)?;
    let matrices = copies(gpu, packed.len(), || Ok(rans.load(&gpu.stream, &record, packed)?))?;
    let n_elems = matrices[0].rows() * matrices[0].cols();
    let bits_per_weight = matrices[0].resident_bytes() as f64 * 8.0 / n_elems as f64;
    Ok((matrices, record.header().dtype(), bits_per_weight))
}

fn copies<T>(
    gpu: &Gpu,
    n_bytes: usize,
    make: impl Fn() -> anyhow::Result<T>,
) -> anyhow::Result<Vec<T>> {
    (0..bench::n_copies(&gpu.device, n_bytes)).map(|_| make()).collect()
}

/// Of INT8 weights.
fn scale(dtype: Dtype) -> Option<Vec<f32>> {
    (dtype == Dtype::I8).then(|| vec![synthetic::INT8_SCALE])
}

/// As the products do it.
fn dequantise(q: u8) -> u16 {
    half::f16::from_f32(f32::from(q as i8) * synthetic::INT8_SCALE).to_bits()
}

/// The most repetitions that leave whole tiles and not too few rows.
fn repetitions(rows: usize) -> usize {
    let tiles = rows / TILE_ROWS;
    if !rows.is_multiple_of(TILE_ROWS) {
        return 1;
    }
    let most = (MOST_ROWS / TILE_ROWS).min(tiles);
    let part = (1..=most).rev().find(|part| tiles.is_multiple_of(*part));
    tiles / part.unwrap_or(tiles)
}

/// `rows` x `cols` elements of the widest matrices of a checkpoint but embeddings: beside each
/// other in row r are the rows r, r + `rows`, .. of all of them, one below the
/// other.
fn from_checkpoint(
    path: &Path,
    dtype: WeightName,
    rows: usize,
    cols: usize,
) -> anyhow::Result<Vec<u8>> {
    anyhow::ensure!(dtype == WeightName::Bf16, "--weights takes --dtype bf16");
    let checkpoint = Checkpoint::open(path)?;
    // Rows of an embedding are gathered, not multiplied.
    let is_embedding = |name: &str| ["embed", "wte", "wpe"].iter().any(|part| name.contains(part));
    let is_matrix = |info: &&transom::checkpoint::TensorInfo| {
        info.dtype == Dtype::Bf16.name() && info.shape.len() == 2 && !is_embedding(&info.name)
    };
    let widths = checkpoint.tensors().filter(is_matrix).map(|info| info.shape[1]);
    let width = widths.max().filter(|&width| width > 0);
    let width = width.with_context(|| format!("{}: no BF16 matrix", path.display()))?;
    let mut found = Vec::new();
    for info in checkpoint.tensors().filter(is_matrix).filter(|info| info.shape[1] == width) {
        let tensor = checkpoint.tensor(&info.name)?.context("the checkpoint has changed")?;
        let named = || format!("{}: {}", info.path.display(), info.name);
        match &tensor.kind {
            TensorKind::Packed(record) => {
                found.extend(record.to_vec(tensor.source(), Isa::best()).with_context(named)?);
            }
            TensorKind::Dense => {
                let start = found.len();
                found.resize(start + usize::try_from(info.original_bytes)?, 0);
                let into = &mut found[start..];
                tensor.source().read_exact_at(into, tensor.start()).with_context(named)?;
            }
        }
    }
    let n_rows = found.len() / (2 * width);
    anyhow::ensure!(n_rows > 0, "{}: no BF16 matrix has elements", path.display());
    let mut part = vec![0; rows * cols * 2];
    for (row, to) in part.chunks_exact_mut(2 * cols).enumerate() {
        for (i, to) in to.chunks_mut(2 * width).enumerate() {
            let from = (row + i * rows) % n_rows * 2 * width;
            to.copy_from_slice(&found[from..][..to.len()]);
        }
    }
    Ok(part)
}

#[cfg(test)]
mod tests {
    use transom::Record;

    use super::*;

    #[test]
    fn parts_are_whole_tiles() {
        let all = [6144, 4096, 28_672, 128_256, 10_240, 8192, 57_344, 16, 48, 144, 384];
        for rows in all {
            let part = rows / repetitions(rows);
            assert_eq!(part * repetitions(rows), rows);
            assert!(part == rows || part.is_multiple_of(TILE_ROWS), "{rows}");
            assert!(part <= MOST_ROWS, "{rows}");
        }
        assert_eq!(repetitions(128_256), 167);
    }

    #[test]
    fn matrices_of_a_checkpoint_lie_side_by_side() {
        let data: Vec<u8> =
            (0..3 * 4 + 5 * 4 + 2 * 3).flat_map(|i| (i as u16).to_le_bytes()).collect();
        let header = r#"{"a":{"dtype":"BF16","shape":[3,4],"data_offsets":[0,24]},
            "b":{"dtype":"BF16","shape":[5,4],"data_offsets":[24,64]},
            "c":{"dtype":"BF16","shape":[2,3],"data_offsets":[64,76]}}"#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        file.extend(data);
        let path = std::env::temp_dir().join(format!("bench-{}.safetensors", std::process::id()));
        std::fs::write(&path, file).unwrap();
        let found = from_checkpoint(&path, WeightName::Bf16, 2, 10);
        let refused = from_checkpoint(&path, WeightName::F16, 2, 10);
        std::fs::remove_file(&path).unwrap();
        let found = found.unwrap();
        let found: Vec<u16> =
            found.as_chunks::<2>().0.iter().map(|&pair| u16::from_le_bytes(pair)).collect();
        // Rows 0, 2 and half of 4; rows 1, 3 and half of 5. The widest matrices count.
        let expected: [u16; 20] =
            [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21];
        assert_eq!(found, expected);
        assert!(refused.is_err());
    }

    #[test]
    fn every_layout_holds_the_same_matrix() {
        for dtype in [WeightName::Bf16, WeightName::F16, WeightName::Int8] {
            // 4224 rows are 3 x 1408.
            let source = Source::new(dtype, (4224, 48), None).unwrap();
            assert_eq!(source.times, 3);
            let bytes = source.bytes();
            let packed = source.record().unwrap();
            let record = Record::read(&packed, 0, packed.len() as u64).unwrap();
            assert_eq!(record.to_vec(&packed, Isa::best()).unwrap_or_default(), bytes);
            let encode = |format, places| {
                let scales = source.scales();
                FixedMatrix::encode(format, places, source.rows, source.cols, &bytes, &scales)
            };
            let (twin, twin_bits) = source.twin();
            assert_eq!(twin, encode(twin.format, 0));
            let (fixed, fixed_bits) = source.fixed();
            fixed.check().unwrap();
            // The overflow is shared by the repetitions; the elements are the same.
            assert_eq!((fixed.rows, fixed.cols), (source.rows, source.cols));
            assert!(fixed_bits < twin_bits, "{dtype:?}");
            assert_eq!(source.dense().len(), source.rows * source.cols);
        }
    }
}
