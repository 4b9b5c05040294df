//! What tells that nobody has been told of a sandbox yet, so that what is written down of it need not be on the disk: a file in its directory,
//! with the boot of the host. Whatever becomes of the agent, the kernel has what was written. A host that goes down in between may keep the
//! directory and lose what is in it; its microVM ended with it, and there is nothing of a sandbox there.

use std::io;
use std::path::Path;

use crate::durable;

const NAME: &str = "unsettled";
const BYTES_MAX: u64 = 128;

/// Before anything else is in the directory: a file system that loses the mark has lost what came after it.
pub(super) fn put(directory: &Path) -> io::Result<()> {
    std::fs::write(directory.join(NAME), microvm::process::boot_id()?)
}

pub(super) fn is_there(directory: &Path) -> io::Result<bool> {
    directory.join(NAME).try_exists()
}

/// What is written down is on the disk.
pub(super) fn remove(directory: &Path) -> io::Result<()> {
    durable::remove(&directory.join(NAME))
}

pub(super) fn is_one(name: &std::ffi::OsStr) -> bool {
    name == NAME
}

pub(super) fn is_of_an_earlier_boot(directory: &Path) -> bool {
    let marked = durable::read(&directory.join(NAME), BYTES_MAX).ok();
    marked.zip(microvm::process::boot_id().ok()).is_some_and(|(marked, now)| marked != now.as_bytes())
}
