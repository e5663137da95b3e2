//! One safetensors file <-> one packed file.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rayon::prelude::*;

use super::error::{At, CheckpointError};
use super::trailer::{self, TRAILER_NAME, Trailer};
use super::{Options, Progress};
use crate::dtype::Dtype;
use crate::error::{DecodeError, EncodeError};
use crate::io::ReadAt;
use crate::isa::Isa;
use crate::record::{Record, RecordWriter, TensorStatistics};
use crate::safetensors::{
    Entry, Header, MAX_HEADER_BYTES, METADATA, PREFIX_BYTES, SafetensorsError,
};
use crate::tile::{Order, TILE_ELEMS, Tile};

/// Bytes read at a time while counting.
const CHUNK_BYTES: usize = 8 << 20;
/// Tiles that one thread reads and encodes at a time.
const JOB_TILES: usize = 16;
/// Threads that encode at the same time, so that memory does not grow with the machine.
const MAX_JOBS: usize = 64;
/// Bytes of a record beyond its elements: header with its tables and a shape
/// of ordinary length, and for each tile a directory entry. For the reserve.
const RECORD_BYTES: u64 = 4096;

/// What is known of a file that has been packed or unpacked.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct FileSummary {
    /// Bytes of the original.
    pub bytes: u64,
    /// BLAKE3 of the original.
    pub blake3: String,
    /// Bytes of the packed file.
    pub packed_bytes: u64,
    /// Bytes of the packed file's tensors.
    pub packed_data_bytes: u64,
}

/// A file that is written under another name and renamed when it is whole.
/// What is not renamed is removed.
pub(super) struct Partial {
    file: File,
    partial: PathBuf,
    path: PathBuf,
    done: bool,
}

impl Partial {
    /// `path` is where the file belongs, `scratch` the directory for unfinished ones.
    pub(super) fn create(path: &Path, scratch: &Path) -> Result<Self, CheckpointError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let partial = scratch.join(format!(".{name}.{}.partial", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&partial)
            .at(&partial)?;
        Ok(Self { file, partial, path: path.to_owned(), done: false })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), CheckpointError> {
        write_all_at(&self.file, bytes, offset).at(&self.path)
    }

    /// Puts the file in its place, once it is on the disk.
    pub(super) fn finish(mut self) -> Result<(), CheckpointError> {
        self.file.sync_all().at(&self.path)?;
        std::fs::rename(&self.partial, &self.path).at(&self.path)?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.done {
            // The error that led here is the one to report.
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::write_all_at(file, bytes, offset);
    #[cfg(windows)]
    {
        let (mut bytes, mut offset) = (bytes, offset);
        while !bytes.is_empty() {
            match std::os::windows::fs::FileExt::seek_write(file, bytes, offset)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => {
                    bytes = &bytes[n..];
                    offset += n as u64;
                }
            }
        }
        Ok(())
    }
}

/// Writes a small file atomically.
pub(super) fn write_file(path: &Path, scratch: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let partial = Partial::create(path, scratch)?;
    partial.file().write_all(bytes).at(path)?;
    partial.finish()
}

/// Size and time of last change, to notice a file that changes under our feet.
pub(super) fn identity(file: &File, path: &Path) -> Result<(u64, SystemTime), CheckpointError> {
    let metadata = file.metadata().at(path)?;
    Ok((metadata.len(), metadata.modified().at(path)?))
}

/// Opens a safetensors file and reads its header.
pub(super) fn open(path: &Path) -> Result<(File, Header), CheckpointError> {
    let file = File::open(path).at(path)?;
    let (n_bytes, _) = identity(&file, path)?;
    let header = Header::read(&file, n_bytes).at(path)?;
    Ok((file, header))
}

/// Whether a file is a packed one.
///
/// # Errors
///
/// [`CheckpointError::NameClash`] if it only looks like one.
pub(super) fn is_packed(
    path: &Path,
    file: &File,
    header: &Header,
) -> Result<bool, CheckpointError> {
    let Some(entry) = header.entries().iter().find(|entry| entry.name == TRAILER_NAME) else {
        return Ok(false);
    };
    let mut first = vec![0; entry.n_bytes().min(4) as usize];
    file.read_exact_at(&mut first, header.data_start() + entry.start).at(path)?;
    if trailer::is_trailer(&first) {
        return Ok(true);
    }
    Err(CheckpointError::NameClash { path: path.to_owned() })
}

// ---------------------------------------------------------------------------
// Packing

/// Packs a safetensors file into `target`.
pub(super) fn pack_file(
    source: &Path,
    target: &Path,
    scratch: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<FileSummary, CheckpointError> {
    let (file, header) = open(source)?;
    if is_packed(source, &file, &header)? {
        return Err(CheckpointError::AlreadyPacked { path: source.to_owned() });
    }
    let before = identity(&file, source)?;
    let reserved = reserved_header_bytes(&header);
    // What packs to a header that nobody may read must not be packed.
    if reserved > PREFIX_BYTES + MAX_HEADER_BYTES {
        let (found, expected) = (reserved - PREFIX_BYTES, MAX_HEADER_BYTES);
        return Err(SafetensorsError::HeaderTooLarge { found, expected }).at(target);
    }
    let trailer = Trailer::new(header.bytes(), reserved).at(source)?;
    let out = Partial::create(target, scratch)?;
    let mut whole = blake3::Hasher::new();
    whole.update(header.bytes());
    let mut at = 0;
    let mut records = Vec::with_capacity(header.entries().len());
    for entry in header.entries() {
        let packer = TensorPacker { source: &file, start: header.data_start(), entry, options };
        let n_bytes = packer
            .pack(&out, reserved + at, &mut whole, progress)
            .map_err(|error| error.in_tensor(&entry.name))
            .at(source)?;
        records.push((entry.name.as_str(), n_bytes));
        at += n_bytes;
    }
    records.push((TRAILER_NAME, trailer.n_bytes()));
    let packed_header = header_bytes(&header, &records, Some(reserved));
    out.write_at(&trailer.to_bytes(&packed_header), reserved + at)?;
    out.write_at(&packed_header, 0)?;
    if identity(&file, source)? != before {
        return Err(CheckpointError::Changed { path: source.to_owned() });
    }
    out.finish()?;
    let packed_data_bytes = at + trailer.n_bytes();
    Ok(FileSummary {
        bytes: header.file_bytes(),
        blake3: whole.finalize().to_hex().to_string(),
        packed_bytes: reserved + packed_data_bytes,
        packed_data_bytes,
    })
}

/// The header of the packed file: the same names in the order of the data.
/// Padded with spaces to `n_bytes`, if given.
fn header_bytes(original: &Header, records: &[(&str, u64)], n_bytes: Option<u64>) -> Vec<u8> {
    let mut object = serde_json::Map::new();
    if let Some(metadata) = original.metadata() {
        object.insert(METADATA.to_owned(), metadata.clone().into());
    }
    let mut start = 0;
    for &(name, n_bytes) in records {
        let end = start + n_bytes;
        let entry = serde_json::json!({
            "dtype": "U8", "shape": [n_bytes], "data_offsets": [start, end],
        });
        object.insert(name.to_owned(), entry);
        start = end;
    }
    let mut json = serde_json::Value::Object(object).to_string().into_bytes();
    let n_json = n_bytes.map_or(json.len().next_multiple_of(8), |n| n as usize - 8);
    assert!(json.len() <= n_json, "the header was reserved for larger records");
    json.resize(n_json, b' ');
    let mut bytes = (n_json as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    bytes
}

/// Length of the packed header, with every number as long as it may become.
fn reserved_header_bytes(header: &Header) -> u64 {
    let bound = |entry: &Entry| {
        let tiles = entry.n_bytes() / TILE_ELEMS as u64 + 1;
        // Tiles at the right edge are smaller: at most one in two.
        entry.n_bytes() + RECORD_BYTES + 12 * (entry.shape.len() as u64 + 64 * tiles)
    };
    let mut records: Vec<(&str, u64)> =
        header.entries().iter().map(|entry| (entry.name.as_str(), bound(entry))).collect();
    records.push((TRAILER_NAME, 88 + header.data_start()));
    header_bytes(header, &records, None).len() as u64
}

struct TensorPacker<'a> {
    source: &'a File,
    /// Where the data start in the source.
    start: u64,
    entry: &'a Entry,
    options: &'a Options,
}

impl TensorPacker<'_> {
    /// Writes the record at `at`; returns its length.
    fn pack(
        &self,
        out: &Partial,
        at: u64,
        whole: &mut blake3::Hasher,
        progress: &dyn Progress,
    ) -> Result<u64, EncodeError> {
        let dtype = Dtype::from_safetensors(&self.entry.dtype);
        let shape = match dtype {
            Dtype::Opaque => vec![self.entry.n_bytes() as usize],
            _ => self.entry.shape.clone(),
        };
        let mut statistics = TensorStatistics::new(dtype);
        let content_hash = self.count(&mut statistics, whole, progress)?;
        let writer = RecordWriter::new(&shape, &statistics, content_hash)?;
        let tiles =
            self.encode(&writer, dtype, out, at + u64::from(writer.header_bytes()), progress)?;
        let data_bytes: u64 = tiles.iter().map(|&(n_bytes, _)| u64::from(n_bytes)).sum();
        let header = writer.finish(tiles);
        write_all_at(out.file(), &header, at)?;
        Ok(header.len() as u64 + data_bytes)
    }

    /// First pass: statistics and hashes.
    fn count(
        &self,
        statistics: &mut TensorStatistics,
        whole: &mut blake3::Hasher,
        progress: &dyn Progress,
    ) -> io::Result<[u8; 32]> {
        let mut content = blake3::Hasher::new();
        let mut buffer = vec![0; CHUNK_BYTES.min(self.entry.n_bytes() as usize)];
        let mut done = 0;
        while done < self.entry.n_bytes() {
            let n = CHUNK_BYTES.min((self.entry.n_bytes() - done) as usize);
            let chunk = &mut buffer[..n];
            self.source.read_exact_at(chunk, self.start + self.entry.start + done)?;
            let chunk = &*chunk;
            let (counted, ()) = rayon::join(
                || count_parallel(statistics, chunk),
                || {
                    content.update_rayon(chunk);
                    whole.update_rayon(chunk);
                },
            );
            statistics.merge(&counted);
            done += n as u64;
            progress.advance(n as u64 / 2);
        }
        Ok(*content.finalize().as_bytes())
    }

    /// Second pass: tiles, written from `at` on, in order.
    fn encode(
        &self,
        writer: &RecordWriter,
        dtype: Dtype,
        out: &Partial,
        mut at: u64,
        progress: &dyn Progress,
    ) -> Result<Vec<(u32, u64)>, EncodeError> {
        let tiling = writer.tiling();
        let run = match tiling.order() {
            Order::Linear => JOB_TILES,
            Order::Fragment => JOB_TILES.min(tiling.tiles_across()),
        };
        // Runs of tiles that do not leave their row of tiles.
        let mut jobs = Vec::new();
        for first in (0..tiling.n_tiles()).step_by(tiling.tiles_across().max(1)) {
            let end = first + tiling.tiles_across();
            jobs.extend((first..end).step_by(run).map(|tile| tile..end.min(tile + run)));
        }
        let mut entries = Vec::with_capacity(tiling.n_tiles());
        for batch in jobs.chunks(self.options.threads.clamp(1, MAX_JOBS)) {
            let encoded: Vec<Vec<_>> = batch
                .par_iter()
                .map(|tiles| {
                    let (first, last) = (tiling.tile(tiles.start), tiling.tile(tiles.end - 1));
                    let cols = last.col_start + last.cols - first.col_start;
                    let rectangle = Tile { cols, ..first };
                    let bytes = self.read_rectangle(&rectangle, tiling.row_stride(), dtype)?;
                    let row_bytes = cols * dtype.elem_bytes();
                    tiles
                        .clone()
                        .map(|index| {
                            let col = tiling.tile(index).col_start - first.col_start;
                            let source = &bytes[col * dtype.elem_bytes()..];
                            writer.encode_tile(self.options.isa, index, source, row_bytes)
                        })
                        .collect::<Result<_, EncodeError>>()
                })
                .collect::<Result<_, EncodeError>>()?;
            for tile in encoded.into_iter().flatten() {
                write_all_at(out.file(), &tile.bytes, at)?;
                at += tile.bytes.len() as u64;
                entries.push((tile.bytes.len() as u32, tile.checksum));
            }
            let elems: usize =
                batch.iter().flat_map(Clone::clone).map(|t| tiling.tile(t).n_elems()).sum();
            progress.advance((elems * dtype.elem_bytes()) as u64 / 2);
        }
        Ok(entries)
    }

    /// The elements of a rectangle of the matrix, row after row.
    fn read_rectangle(&self, part: &Tile, row_stride: usize, dtype: Dtype) -> io::Result<Vec<u8>> {
        let elem_bytes = dtype.elem_bytes();
        let mut bytes = vec![0; part.n_elems() * elem_bytes];
        let offset = |row: usize| {
            let element = (part.row_start + row) * row_stride + part.col_start;
            self.start + self.entry.start + (element * elem_bytes) as u64
        };
        if part.cols == row_stride || part.rows == 1 {
            self.source.read_exact_at(&mut bytes, offset(0))?;
            return Ok(bytes);
        }
        for (row, line) in bytes.chunks_exact_mut(part.cols * elem_bytes).enumerate() {
            self.source.read_exact_at(line, offset(row))?;
        }
        Ok(bytes)
    }
}

/// Statistics of a chunk, counted in parallel.
fn count_parallel(like: &TensorStatistics, chunk: &[u8]) -> TensorStatistics {
    let empty = || TensorStatistics::new(like.dtype());
    chunk
        .par_chunks(1 << 20)
        .fold(empty, |mut statistics, piece| {
            statistics.add(piece);
            statistics
        })
        .reduce(empty, |mut a, b| {
            a.merge(&b);
            a
        })
}

// ---------------------------------------------------------------------------
// Reading packed files

/// A packed file whose bookkeeping has been checked.
pub(super) struct PackedFile {
    pub(super) file: File,
    pub(super) path: PathBuf,
    /// Header of the packed file.
    pub(super) packed: Header,
    /// Header of the original.
    pub(super) original: Header,
}

impl PackedFile {
    pub(super) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let (file, packed) = open(path)?;
        if !is_packed(path, &file, &packed)? {
            return Err(CheckpointError::NotPacked { path: path.to_owned() });
        }
        Self::new(path, file, packed)
    }

    pub(super) fn new(path: &Path, file: File, packed: Header) -> Result<Self, CheckpointError> {
        let (trailer, records) = packed.entries().split_last().expect("it has a trailer");
        if trailer.name != TRAILER_NAME {
            let what = "last tensor";
            return Err(super::error::damaged(path, what, &trailer.name, TRAILER_NAME));
        }
        // A stored header is at most as long as any header may be.
        let most = trailer::MAX_BYTES;
        if trailer.n_bytes() > most {
            let expected = format!("at most {most}");
            let what = "length of the trailer";
            return Err(super::error::damaged(path, what, trailer.n_bytes(), expected));
        }
        let mut bytes = vec![0; trailer.n_bytes() as usize];
        file.read_exact_at(&mut bytes, packed.data_start() + trailer.start).at(path)?;
        let original = trailer::read(path, &bytes, packed.bytes())?;
        let original = Header::parse_alone(original).at(path)?;
        let names = |entries: &[Entry]| entries.iter().map(|e| e.name.clone()).collect::<Vec<_>>();
        let (found, expected) = (names(records), names(original.entries()));
        if found != expected {
            let show = |names: Vec<String>| format!("{} tensors, {names:?}", names.len());
            return Err(super::error::damaged(
                path,
                "list of tensors",
                show(found),
                show(expected),
            ));
        }
        Ok(Self { file, path: path.to_owned(), packed, original })
    }

    /// Original and packed entry of each tensor.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (&Entry, &Entry)> {
        self.original.entries().iter().zip(self.packed.entries())
    }

    /// The record of a tensor, if its header fits the original entry.
    pub(super) fn record(&self, original: &Entry, packed: &Entry) -> Result<Record, DecodeError> {
        let start = self.packed.data_start() + packed.start;
        let record = Record::read(&self.file, start, packed.n_bytes())?;
        let dtype = Dtype::from_safetensors(&original.dtype);
        let shape_fits = dtype == Dtype::Opaque || record.header().shape() == original.shape;
        let bytes_fit = record.header().content_bytes() == original.n_bytes();
        if record.header().dtype() == dtype && shape_fits && bytes_fit {
            return Ok(record);
        }
        Err(DecodeError::Slice {
            found: format!("{} {:?}", record.header().dtype().name(), record.header().shape()),
            expected: format!("{} {:?}", original.dtype, original.shape),
        })
    }

    /// Decodes every tensor, checks it, and hands its bytes to `sink` with
    /// their place in the original file; the header comes first.
    pub(super) fn restore(
        &self,
        isa: Isa,
        progress: &dyn Progress,
        mut sink: impl FnMut(&[u8], u64) -> io::Result<()>,
    ) -> Result<String, CheckpointError> {
        let mut whole = blake3::Hasher::new();
        whole.update(self.original.bytes());
        sink(self.original.bytes(), 0).at(&self.path)?;
        for (original, packed) in self.tensors() {
            let mut at = self.original.data_start() + original.start;
            let mut content = blake3::Hasher::new();
            let decoded = self.record(original, packed).and_then(|record| {
                record.stream_with(&self.file, isa, |bytes| {
                    content.update_rayon(bytes);
                    whole.update_rayon(bytes);
                    sink(bytes, at)?;
                    at += bytes.len() as u64;
                    progress.advance(bytes.len() as u64);
                    Ok(())
                })?;
                record.check_content_hash(&content.finalize())
            });
            decoded.map_err(|error| error.in_tensor(&original.name)).at(&self.path)?;
        }
        Ok(whole.finalize().to_hex().to_string())
    }
}

/// Restores a packed file at `target`; returns the BLAKE3 of what was written.
pub(super) fn unpack_file(
    packed: &PackedFile,
    target: &Path,
    scratch: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<FileSummary, CheckpointError> {
    let out = Partial::create(target, scratch)?;
    let mut failed_writing = false;
    let result = packed.restore(options.isa, progress, |bytes, at| {
        write_all_at(out.file(), bytes, at).inspect_err(|_| failed_writing = true)
    });
    let blake3 = match result {
        // An error of the destination is not the packed file's.
        Err(CheckpointError::Io { source, .. }) if failed_writing => return Err(source).at(target),
        result => result?,
    };
    out.finish()?;
    Ok(FileSummary {
        bytes: packed.original.file_bytes(),
        blake3,
        packed_bytes: packed.packed.file_bytes(),
        packed_data_bytes: packed.packed.file_bytes() - packed.packed.data_start(),
    })
}
