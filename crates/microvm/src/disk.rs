//! What a guest's disk is to its VMM: a file, or a block device.

use std::fs::{self, File};
use std::io::{self, Seek as _};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

/// In bytes. A device's node itself has none.
pub fn size(disk: &Path) -> io::Result<u64> {
    let about = fs::metadata(disk)?;
    if !about.file_type().is_block_device() {
        return Ok(about.len());
    }
    File::open(disk)?.seek(io::SeekFrom::End(0))
}
