//! Files that are either the old one or the new one after any crash: temp in the same directory, fsync, rename, fsync of the directory.
//!
//! Blocking on purpose: async callers go through `spawn_blocking`. It refuses to know what is in the files.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Ends in this when a writer died in the middle; removed at start.
pub const TEMPORARY_SUFFIX: &str = ".tmp";

/// Replaces `path` by `bytes`. When it returns, a power loss cannot take the new content back.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    exchange(path, bytes, mode, true)?;
    sync_directory(path.parent().ok_or_else(|| io::Error::other("the file has no directory"))?)
}

/// The same without a word to the disk: whole for every program, whichever dies, but a power loss may leave the old content, the new, or
/// half of it.
pub fn note(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    exchange(path, bytes, mode, false)
}

fn exchange(path: &Path, bytes: &[u8], mode: u32, is_synced: bool) -> io::Result<()> {
    let mut name = path.file_name().ok_or_else(|| io::Error::other("the file has no name"))?.to_owned();
    name.push(TEMPORARY_SUFFIX);
    let temporary = path.with_file_name(name);
    // A leftover of a former writer may have another mode, so it is not reused.
    remove(&temporary)?;
    let written = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .custom_flags(libc::O_CLOEXEC)
            .open(&temporary)?;
        file.write_all(bytes)?;
        if is_synced {
            file.sync_all()?;
        }
        fs::rename(&temporary, path)
    };
    let written = written();
    if written.is_err() {
        // What there is of it takes room, of which there may be none.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Makes renames, creations and removals in `directory` last.
pub fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Removes a file; that it is gone already is what was wanted.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes a directory with all that is in it; that it is gone already is what was wanted.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Reads a file of at most `limit` bytes, so that a file that grew wild cannot fill the memory.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    use io::Read as _;
    let mut bytes = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > limit {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("larger than {limit} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_and_leaves_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write(&path, b"one", 0o600).unwrap();
        fs::write(dir.path().join("a.tmp"), b"half a wri").unwrap();
        write(&path, b"two", 0o600).unwrap();
        assert_eq!(read(&path, 100).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(read(&path, 2).is_err());
    }
}
