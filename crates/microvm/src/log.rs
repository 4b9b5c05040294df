//! A VMM's complaints, bounded.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{MemfdFlags, SealFlags};

use crate::Error;
use crate::process::Process;

/// Kept in memory that cannot grow: a guest may be able to make its VMM complain without end.
const LOG_BYTES: u64 = 64 * 1024;
/// Of them in the error of a start that failed.
const COMPLAINTS_MAX: usize = 2048;

/// The VMM's standard error: a piece of memory of fixed size. What does not fit is lost; it stays as long as the VMM has it open.
pub struct Log {
    file: File,
}

impl Log {
    pub fn new() -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("vmm-log", flags)?);
        file.set_len(LOG_BYTES)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(Self { file })
    }

    /// Another handle, for the child's standard error.
    pub fn handle(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// The last words, for people.
    pub fn complaints(&self) -> String {
        let mut text = vec![0; LOG_BYTES as usize];
        let read = self.file.read_at(&mut text, 0).unwrap_or(0);
        let end = text[..read].iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let text = &text[end.saturating_sub(COMPLAINTS_MAX)..end];
        String::from_utf8_lossy(text).trim().replace(|c: char| c.is_control() && c != '\n', "?").replace('\n', "; ")
    }

    /// Ends what there is of a start that failed, so that nothing of it is left when the error is seen; and says why in the VMM's own words
    /// where it has any.
    pub async fn end_of(&self, process: &Process, error: Error) -> Error {
        if let Err(error) = process.kill().await {
            return error;
        }
        let said = self.complaints();
        match error {
            Error::Control { .. } | Error::Silent { .. } | Error::Gone if !said.is_empty() => Error::Stillborn(said),
            other => other,
        }
    }
}
