//! The logs of the programs that `up` runs: files in `WRENN_DIR/logs`, written by the programs themselves, so that they outlive `up`.
//!
//! Bounded: at each start of `up` and whenever it has grown too large, a log becomes `NAME.log.1` and begins anew.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use crate::failure::{Doing as _, Failure};

/// Two files of this size are kept for each program.
const SIZE_MAX: u64 = 16 << 20;
/// How often sizes are looked at. A program that logs 3 MiB a second would overshoot by 15 MiB.
pub const CHECK_EVERY: Duration = Duration::from_secs(5);
/// How much of the end is read to show the last lines.
const TAIL_BYTES: u64 = 16 << 10;

pub fn place(dir: &Path, name: &str) -> PathBuf {
    dir.join("logs").join(format!("{name}.log"))
}

/// The log, open for appending: every writer writes at the end, also after it was emptied.
pub fn open(dir: &Path, name: &str) -> Result<File, Failure> {
    let place = place(dir, name);
    // The control plane prints the administrator's first password into its log.
    std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&place)
        .doing(|| format!("open the log {}", place.display()))
}

pub fn stdio(dir: &Path, name: &str) -> Result<(Stdio, Stdio), Failure> {
    let file = open(dir, name)?;
    let second = file.try_clone().doing(|| format!("open the log of {name} twice"))?;
    Ok((file.into(), second.into()))
}

/// Begins a new log and keeps the last one. Only while nobody writes.
pub fn begin(dir: &Path, name: &str) {
    let place = place(dir, name);
    if place.metadata().is_ok_and(|file| file.len() > 0) {
        let _ = std::fs::rename(&place, place.with_extension("log.1"));
    }
}

/// Cuts a log that has grown too large, under its writer: what is there is copied away, then the file is emptied.
pub fn keep_bounded(dir: &Path, name: &str) {
    let place = place(dir, name);
    if place.metadata().is_ok_and(|file| file.len() > SIZE_MAX)
        && std::fs::copy(&place, place.with_extension("log.1")).is_ok()
    {
        let _ = std::fs::OpenOptions::new().write(true).open(&place).and_then(|file| file.set_len(0));
    }
}

/// The last lines, for a message about why the program is not there.
pub fn tail(dir: &Path, name: &str, lines: usize) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(place(dir, name))?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut text = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    let text = read().unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_log_is_bounded_under_its_writer_and_its_end_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("logs")).unwrap();
        let mut log = open(dir.path(), "x").unwrap();
        log.write_all(&vec![b'a'; usize::try_from(SIZE_MAX).unwrap() + 1]).unwrap();
        keep_bounded(dir.path(), "x");
        log.write_all(b"one\ntwo\nthree\n").unwrap();
        assert_eq!(tail(dir.path(), "x", 2), "two\nthree");
        assert_eq!(place(dir.path(), "x").metadata().unwrap().len(), 14);
        begin(dir.path(), "x");
        assert_eq!(tail(dir.path(), "x", 2), "");
    }
}
