//! Reading and writing at a position, without a shared cursor.

use std::fs::File;
use std::io;

/// A source that is read at a position: a file by `pread`, or memory.
pub trait ReadAt: Sync {
    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::UnexpectedEof`] if the source ends before `buf` is full.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// The bytes themselves, if the source is memory and has them: saves a copy.
    fn borrow_at(&self, offset: u64, n_bytes: usize) -> Option<&[u8]> {
        let _ = (offset, n_bytes);
        None
    }
}

impl ReadAt for File {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        #[cfg(unix)]
        return std::os::unix::fs::FileExt::read_exact_at(self, buf, offset);
        #[cfg(windows)]
        {
            let (mut buf, mut offset) = (buf, offset);
            while !buf.is_empty() {
                match std::os::windows::fs::FileExt::seek_read(self, buf, offset)? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    n => {
                        buf = &mut buf[n..];
                        offset += n as u64;
                    }
                }
            }
            Ok(())
        }
    }
}

impl ReadAt for [u8] {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.borrow_at(offset, buf.len())
            .map(|bytes| buf.copy_from_slice(bytes))
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn borrow_at(&self, offset: u64, n_bytes: usize) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        self.get(start..start.checked_add(n_bytes)?)
    }
}

impl ReadAt for Vec<u8> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.as_slice().read_exact_at(buf, offset)
    }

    fn borrow_at(&self, offset: u64, n_bytes: usize) -> Option<&[u8]> {
        self.as_slice().borrow_at(offset, n_bytes)
    }
}

impl<T: ReadAt + ?Sized> ReadAt for &T {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buf, offset)
    }

    fn borrow_at(&self, offset: u64, n_bytes: usize) -> Option<&[u8]> {
        (**self).borrow_at(offset, n_bytes)
    }
}
