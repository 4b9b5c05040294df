//! Copies of files that cost nothing where the file system shares blocks.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;

const PIECE: u64 = 1 << 20;
/// linux/fs.h: _IOW(0x94, 9, int)
const FICLONE: libc::c_ulong = 0x4004_9409;
/// linux/fs.h: _IOW(0x94, 13, struct file_clone_range)
const FICLONERANGE: libc::c_ulong = 0x4020_940d;

/// `target` is new and empty.
pub fn clone(source: &File, target: &File) -> io::Result<()> {
    // SAFETY: both descriptors are open; the call takes the source's number.
    if unsafe { libc::ioctl(target.as_raw_fd(), FICLONE, source.as_raw_fd()) } == 0 {
        return Ok(());
    }
    // No reflinks here: a sparse copy, slower and larger.
    let size = source.metadata()?.len();
    target.set_len(size)?;
    let mut at = 0;
    while let Some((begin, end)) = next_data(source, at, size)? {
        let mut buffer = vec![0; PIECE as usize];
        let mut offset = begin;
        while offset < end {
            let count = usize::try_from((end - offset).min(PIECE)).expect("a piece fits");
            source.read_exact_at(&mut buffer[..count], offset)?;
            target.write_all_at(&buffer[..count], offset)?;
            offset += count as u64;
        }
        at = end;
    }
    Ok(())
}

/// The same content, without the room that is reserved and not written to.
pub fn clone_written(source: &File, target: &File) -> io::Result<()> {
    let size = source.metadata()?.len();
    target.set_len(size)?;
    let mut at = 0;
    while let Some((begin, end)) = next_data(source, at, size)? {
        let range = FileCloneRange {
            src_fd: i64::from(source.as_raw_fd()),
            src_offset: begin,
            src_length: end - begin,
            dest_offset: begin,
        };
        // SAFETY: both descriptors are open; the call reads the structure.
        if unsafe { libc::ioctl(target.as_raw_fd(), FICLONERANGE, &raw const range) } != 0 {
            return clone(source, target);
        }
        at = end;
    }
    Ok(())
}

/// linux/fs.h: struct file_clone_range
#[repr(C)]
struct FileCloneRange {
    src_fd: i64,
    src_offset: u64,
    src_length: u64,
    dest_offset: u64,
}

fn next_data(file: &File, from: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    let seek = |offset: u64, whence| {
        // SAFETY: a plain system call on an open descriptor.
        let found = unsafe { libc::lseek(file.as_raw_fd(), offset as libc::off_t, whence) };
        if found < 0 { Err(io::Error::last_os_error()) } else { Ok(found as u64) }
    };
    if from >= size {
        return Ok(None);
    }
    match seek(from, libc::SEEK_DATA) {
        Ok(begin) => Ok(Some((begin, seek(begin, libc::SEEK_HOLE)?))),
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(e) => Err(e),
    }
}
