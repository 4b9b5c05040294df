//! Opening by path: what the kernel lets the acting user reach, but never through a magic link.
//!
//! `/proc/self/fd/3` and `/proc/self/root` name envd's own open files and its own view of the world, whoever asks. Everything else is the
//! kernel's to judge, at the moment of the opening: nothing is looked at first and opened later.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// `at` is where a relative path begins.
pub fn open_at(at: impl AsFd, path: &Path, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC;
    match rustix::fs::openat2(&at, path, flags, mode, ResolveFlags::NO_MAGICLINKS) {
        // Kernels before 5.6. What such a guest gives up is the rule on magic links, not the user's limits.
        Err(Errno::NOSYS) => Ok(rustix::fs::openat(&at, path, flags, mode)?),
        opened => Ok(opened?),
    }
}

pub fn open(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    open_at(CWD, path, flags, Mode::empty())
}

/// For what is read or written: does not wait for the other end of a FIFO, does not take a terminal.
pub fn open_file(path: &Path, flags: OFlags) -> io::Result<File> {
    Ok(File::from(open(path, flags | OFlags::NONBLOCK | OFlags::NOCTTY)?))
}

/// A handle to what is there, good for looking at it and for starting from it.
pub fn handle(path: &Path) -> io::Result<OwnedFd> {
    open(path, OFlags::PATH)
}

/// Where the open file lies, with every link resolved.
pub fn place_of(file: impl AsFd) -> io::Result<PathBuf> {
    fs::read_link(by_descriptor(file))
}

/// A path to the open file itself, for calls that take no handle.
pub fn by_descriptor(file: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magic_links_lead_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "x").unwrap();
        let root = Path::new("/proc/self/root").join(dir.path().strip_prefix("/").unwrap()).join("file");
        let open_elsewhere = File::open(dir.path().join("file")).unwrap();
        for magic in [root, by_descriptor(&open_elsewhere), "/proc/self/cwd".into()] {
            let refused = open_file(&magic, OFlags::RDONLY).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::ELOOP), "{}", magic.display());
        }
        std::os::unix::fs::symlink("file", dir.path().join("link")).unwrap();
        let linked = handle(&dir.path().join("link")).unwrap();
        assert_eq!(place_of(&linked).unwrap(), fs::canonicalize(dir.path().join("file")).unwrap());
    }
}
