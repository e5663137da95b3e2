//! Reading large parts of a file into memory that is used again.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;

use transom::ReadAt;

/// Bytes that a thread reads at a time.
const PIECE_BYTES: usize = 4 << 20;
/// Threads that read a part: one does not keep a fast disk busy.
const N_READERS: usize = 2;
/// What positions, lengths and addresses are multiples of when the file cache
/// is left out: the page size of the systems that have this, and a multiple of
/// every disk's block.
const PAGE_BYTES: usize = 4096;

/// A file to be read from again and again.
#[derive(Debug)]
pub(crate) struct Reader {
    file: File,
    /// Bytes of the file when it was opened.
    file_bytes: u64,
    /// Whether reading leaves out the system's file cache.
    direct: bool,
}

impl Reader {
    /// Opens the file at `path`, which is open as `file` already, once more.
    ///
    /// With `direct`, the system's file cache is left out where the file system
    /// allows. Memory then holds nothing but what was asked for, and the
    /// processor copies nothing; but what is read again comes from the disk again.
    pub(crate) fn new(path: &Path, file: &File, direct: bool) -> io::Result<Self> {
        let file_bytes = file.metadata()?.len();
        if direct && let Some(file) = open_direct(path, file) {
            return Ok(Self { file, file_bytes, direct: true });
        }
        let file = file.try_clone()?;
        #[cfg(target_os = "linux")]
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Sequential)?;
        Ok(Self { file, file_bytes, direct: false })
    }

    /// Memory that [`Reader::read`] may need for `n` bytes.
    pub(crate) const fn buffer_bytes(n: usize) -> usize {
        n + 3 * PAGE_BYTES
    }

    /// Reads `n` bytes from `start` into `buffer`, whose contents are lost and
    /// which grows if need be. Returns where in it they are.
    pub(crate) fn read(
        &self,
        start: u64,
        n: usize,
        buffer: &mut Vec<u8>,
    ) -> io::Result<Range<usize>> {
        if start.saturating_add(n as u64) > self.file_bytes {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // It only grows: what is cut off would be filled with zeros again.
        if buffer.len() < Self::buffer_bytes(n) {
            buffer.resize(Self::buffer_bytes(n), 0);
        }
        if !self.direct {
            self.read_pieces(start, &mut buffer[..n])?;
            return Ok(0..n);
        }
        let first = start / PAGE_BYTES as u64 * PAGE_BYTES as u64;
        let skipped = (start - first) as usize;
        let aligned = buffer.as_ptr().align_offset(PAGE_BYTES);
        let whole = (skipped + n).next_multiple_of(PAGE_BYTES);
        self.read_pieces(first, &mut buffer[aligned..aligned + whole])?;
        let bytes = aligned + skipped;
        Ok(bytes..bytes + n)
    }

    /// Fills `buffer` from `start`, with a few reads at the same time.
    fn read_pieces(&self, start: u64, buffer: &mut [u8]) -> io::Result<()> {
        if buffer.len() <= PIECE_BYTES {
            return self.read_piece(start, buffer);
        }
        let pieces = Mutex::new(buffer.chunks_mut(PIECE_BYTES).enumerate());
        let read = || loop {
            // The lock ends with the statement; a piece is this thread's own.
            let next = pieces.lock().expect("readers do not panic").next();
            let Some((index, piece)) = next else { return Ok(()) };
            self.read_piece(start + (index * PIECE_BYTES) as u64, piece)?;
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..N_READERS).map(|_| scope.spawn(read)).collect();
            let mut result = read();
            for other in others {
                result = result.and(other.join().expect("readers do not panic"));
            }
            result
        })
    }

    /// Fills a piece. Without the file cache the last page is asked for whole,
    /// and the file may end within it.
    fn read_piece(&self, start: u64, piece: &mut [u8]) -> io::Result<()> {
        let in_file = self.file_bytes.saturating_sub(start).min(piece.len() as u64) as usize;
        if in_file == piece.len() {
            return self.file.read_exact_at(piece, start);
        }
        self.read_last(start, piece, in_file)
    }

    #[cfg(unix)]
    fn read_last(&self, start: u64, piece: &mut [u8], in_file: usize) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let mut done = 0;
        while done < in_file {
            match self.file.read_at(&mut piece[done..], start + done as u64)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => done += n,
            }
        }
        Ok(())
    }

    #[cfg(not(unix))]
    fn read_last(&self, start: u64, piece: &mut [u8], in_file: usize) -> io::Result<()> {
        self.file.read_exact_at(&mut piece[..in_file], start)
    }
}

/// The same file once more, for reading without the file cache; `None` if that
/// is not possible, or another file has taken its place.
#[cfg(target_os = "linux")]
fn open_direct(path: &Path, file: &File) -> Option<File> {
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
    let flags = rustix::fs::OFlags::DIRECT.bits();
    let direct = File::options().read(true).custom_flags(flags as i32).open(path).ok()?;
    let (found, expected) = (direct.metadata().ok()?, file.metadata().ok()?);
    let is_same = found.dev() == expected.dev() && found.ino() == expected.ino();
    is_same.then_some(direct)
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_: &Path, _: &File) -> Option<File> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_is_read_with_and_without_the_file_cache() {
        // In the target directory: the usual place for temporary files may be
        // in memory, where there is no reading without the cache.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("file");
        let bytes: Vec<u8> = (0..PIECE_BYTES * 2 + 12_345).map(|i| (i * 7 / 5) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let file = File::open(&path).unwrap();
        let mut buffer = Vec::new();
        for direct in [false, true] {
            let reader = Reader::new(&path, &file, direct).unwrap();
            for start in [0, 1, 511, 4095, 4096, 5000, PIECE_BYTES + 3, bytes.len() - 10] {
                for n in [0, 1, 9, 4096, 8193, PIECE_BYTES, PIECE_BYTES + 4097, bytes.len()] {
                    let n = n.min(bytes.len() - start);
                    buffer.fill(0xA5);
                    let range = reader.read(start as u64, n, &mut buffer).unwrap();
                    assert!(buffer[range] == bytes[start..start + n], "{direct} {start} {n}");
                }
            }
            // Beyond the end.
            assert!(reader.read(bytes.len() as u64 - 5, 6, &mut buffer).is_err(), "{direct}");
        }
    }

    #[test]
    fn a_file_that_has_become_shorter_is_an_error() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![1; 100_000]).unwrap();
        let file = File::open(&path).unwrap();
        for direct in [false, true] {
            std::fs::write(&path, vec![1; 100_000]).unwrap();
            let reader = Reader::new(&path, &file, direct).unwrap();
            File::options().write(true).open(&path).unwrap().set_len(50_000).unwrap();
            let error = reader.read(10, 90_000, &mut Vec::new()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{direct}");
        }
    }
}
