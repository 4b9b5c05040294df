//! One look at what a microVM takes, from outside: its process and its disk's file. No word of the guest's is in it.
//!
//! The process and not its control group: there is one on every host, and what the kernel keeps of files for the group counts as its memory,
//! which says how much was read and not how much is needed. It is one file of procfs, some ten microseconds.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use microvm::ProcessRecord;

/// In which procfs counts on x86-64 and arm64, whatever the kernel's own tick is.
pub const TICKS_PER_SECOND: f64 = 100.0;
const PAGE_KIB: u64 = 4;
/// In which `stat` counts.
const BLOCK_BYTES: u64 = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Time of all its threads, since it began.
    pub cpu_ticks: u64,
    pub memory_kib: u64,
    pub disk_kib: u64,
}

/// None when the process is no more, or another one has its number.
pub fn read(process: &ProcessRecord, disk: &Path) -> Option<Reading> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid)).ok()?;
    let (cpu_ticks, memory_kib) = of_stat(&stat, process.start_ticks)?;
    // What is allocated, so that holes count nothing.
    let disk_kib = fs::metadata(disk).map(|metadata| metadata.blocks() * BLOCK_BYTES / 1024).unwrap_or_default();
    Some(Reading { cpu_ticks, memory_kib, disk_kib })
}

/// Fields 14 (user), 15 (system), 22 (start) and 24 (resident pages) of proc(5), counted from the third, after the name in brackets.
fn of_stat(stat: &str, start_ticks: u64) -> Option<(u64, u64)> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    if number(22)? != start_ticks {
        return None;
    }
    Some((number(14)? + number(15)?, number(24)? * PAGE_KIB))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_fields_that_are_meant() {
        let stat =
            "77 (a) b) S 1 77 77 0 -1 4194560 1 2 3 4 150 25 6 7 20 0 3 0 4242 1000000 256 18446744073709551615 1";
        assert_eq!(of_stat(stat, 4242), Some((175, 1024)));
        assert_eq!(of_stat(stat, 4243), None);
        assert_eq!(of_stat("77 (a", 1), None);
        assert_eq!(of_stat("77 (a) S 1", 1), None);
    }
}
