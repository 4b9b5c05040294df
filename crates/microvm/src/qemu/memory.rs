//! A microVM's memory as one flat, complete file: a clone of the file it came from, with the pages that are the microVM's own written in.
//!
//! A page is its own when it is swapped out, or present and not backed by the file. Whatever it holds is copied, zeros too: nothing is
//! ever decided by content.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use crate::process::ProcessRecord;
use crate::{Error, reflink};

const PAGE: u64 = 4096;
const PIECE: u64 = 1 << 20;
/// admin-guide/mm/pagemap: bit 63 present, bit 62 swapped, bit 61 file-backed or shared.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_THE_FILE: u64 = 1 << 61;

/// Bytes copied into the new file, which is not synced. The vCPUs must stand still.
pub fn write(record: &ProcessRecord, target: &Path) -> Result<u64, Error> {
    let source = File::open(&record.memory).map_err(Error::io("open the memory file"))?;
    // Always a new file: emptying an old one frees its extents first, which takes longer than everything else here.
    let target = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(target)
        .map_err(Error::io("create the saved memory"))?;
    if !record.memory_private {
        // The guest has written into the file itself, which has all its room reserved: what was never written stays behind.
        reflink::clone_written(&source, &target).map_err(Error::io("clone the memory file"))?;
        return Ok(0);
    }
    reflink::clone(&source, &target).map_err(Error::io("clone the memory file"))?;
    copy_own_pages(record.pid, &source, &target).map_err(Error::io("copy the microVM's own pages"))
}

fn copy_own_pages(pid: i32, source: &File, target: &File) -> io::Result<u64> {
    let file = Name::of(source)?;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let mut copied = 0;
    let mut buffer = vec![0; PIECE as usize];
    // The VMM may have split its mapping of the file into several.
    let mappings: Vec<Mapping> = maps.lines().filter_map(|line| Mapping::parse(line, &file)).collect();
    let mapped: u64 = mappings.iter().map(|mapping| mapping.end - mapping.begin).sum();
    // Less would be a memory with holes, more another use of the file: neither is a saved state.
    if mapped != source.metadata()?.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the VMM does not map its memory file once and whole"));
    }
    for mapping in mappings {
        let pages = (mapping.end - mapping.begin) / PAGE;
        let mut entries = vec![0u8; usize::try_from(pages * 8).map_err(io::Error::other)?];
        pagemap.read_exact_at(&mut entries, mapping.begin / PAGE * 8)?;
        for run in own_runs(&entries) {
            let (begin, end) = (run.start * PAGE, run.end * PAGE);
            let mut at = begin;
            while at < end {
                let count = usize::try_from((end - at).min(PIECE)).expect("a piece fits");
                memory.read_exact_at(&mut buffer[..count], mapping.begin + at)?;
                target.write_all_at(&buffer[..count], mapping.offset + at)?;
                at += count as u64;
            }
            copied += end - begin;
        }
    }
    Ok(copied)
}

/// How the kernel names a file in `/proc/<pid>/maps`: device and inode. An inode alone is a number that every file system has. Not from
/// the file's metadata, which on btrfs tell another device than maps do.
#[derive(Debug, PartialEq, Eq)]
struct Name {
    device: String,
    inode: u64,
}

impl Name {
    fn of(file: &File) -> io::Result<Self> {
        // SAFETY: a new mapping of one page of an open file, never looked at.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), PAGE as usize, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0)
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let maps = fs::read_to_string("/proc/self/maps");
        // SAFETY: the mapping was made above and nothing refers to it.
        unsafe { libc::munmap(at, PAGE as usize) };
        let maps = maps?;
        let begin = at as u64;
        // The kernel joins neighbours of one file into one line.
        let line = maps.lines().find(|line| range(line).is_some_and(|(from, to)| (from..to).contains(&begin)));
        let name = line.and_then(|line| Some(fields(line)?.1));
        name.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a mapping of our own is not in maps"))
    }
}

struct Mapping {
    begin: u64,
    end: u64,
    /// In the file.
    offset: u64,
}

impl Mapping {
    /// From a line of `/proc/<pid>/maps`, when it maps that file.
    fn parse(line: &str, file: &Name) -> Option<Self> {
        let (begin, end) = range(line)?;
        let (offset, name) = fields(line)?;
        (name == *file).then_some(Self { begin, end, offset })
    }
}

fn range(line: &str) -> Option<(u64, u64)> {
    let (begin, end) = line.split_whitespace().next()?.split_once('-')?;
    Some((u64::from_str_radix(begin, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

/// The offset in the file, and which file.
fn fields(line: &str) -> Option<(u64, Name)> {
    let mut fields = line.split_whitespace().skip(2);
    let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
    Some((offset, Name { device: fields.next()?.to_owned(), inode: fields.next()?.parse().ok()? }))
}

/// Runs of page numbers whose pagemap entries say that they are the process's own.
fn own_runs(entries: &[u8]) -> Vec<std::ops::Range<u64>> {
    let mut runs: Vec<std::ops::Range<u64>> = Vec::new();
    for (page, entry) in (0u64..).zip(entries.chunks_exact(8)) {
        let entry = u64::from_ne_bytes(entry.try_into().expect("eight bytes"));
        let own = entry & SWAPPED != 0 || (entry & PRESENT != 0 && entry & OF_THE_FILE == 0);
        if own {
            match runs.last_mut() {
                Some(run) if run.end == page => run.end += 1,
                _ => runs.push(page..page + 1),
            }
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_pages_are_swapped_or_present_and_not_of_the_file() {
        let entries: Vec<u8> = [0, PRESENT, PRESENT | OF_THE_FILE, SWAPPED, SWAPPED | OF_THE_FILE, 0, PRESENT]
            .iter()
            .flat_map(|e: &u64| e.to_ne_bytes())
            .collect();
        assert_eq!(own_runs(&entries), [1..2, 3..5, 6..7]);
        assert!(own_runs(&[]).is_empty());
    }

    #[test]
    fn mappings_of_other_files_are_not_ours() {
        let line = "7f0000000000-7f0000010000 rw-p 00002000 fd:00 1234   /some where/memory";
        let file = |device: &str, inode| Name { device: device.to_owned(), inode };
        let mapping = Mapping::parse(line, &file("fd:00", 1234)).unwrap();
        assert_eq!((mapping.begin, mapping.end, mapping.offset), (0x7f00_0000_0000, 0x7f00_0001_0000, 0x2000));
        assert!(Mapping::parse(line, &file("fd:00", 1235)).is_none());
        assert!(Mapping::parse(line, &file("fd:01", 1234)).is_none(), "the inode of another file system");
        assert!(Mapping::parse("7f00-", &file("fd:00", 1)).is_none());
    }

    /// Our own process stands for a VMM: a private mapping of a file, with a page changed, a page zeroed, and one left alone.
    #[test]
    fn a_private_clone_is_written_out_flat() {
        let dir = tempfile::tempdir().unwrap();
        let (parent, saved) = (dir.path().join("parent"), dir.path().join("saved"));
        let mut content = vec![7u8; 4 * PAGE as usize];
        content[..4096].fill(1);
        fs::write(&parent, &content).unwrap();
        let file = File::options().read(true).write(true).open(&parent).unwrap();
        // SAFETY: a new mapping of four pages of an open file.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                content.len(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        // SAFETY: the mapping is as long as that and is ours alone.
        let mapped = unsafe { std::slice::from_raw_parts_mut(at.cast::<u8>(), content.len()) };
        mapped[4096..8192].fill(9);
        mapped[8192..12288].fill(0);
        let record = ProcessRecord {
            driver: String::new(),
            vmm_version: String::new(),
            pid: std::process::id() as i32,
            start_ticks: 0,
            boot_id: String::new(),
            dir: dir.path().into(),
            memory: parent.clone(),
            memory_private: true,
            memory_mib: 1,
            made_by: None,
        };
        let copied = write(&record, &saved).unwrap();
        assert_eq!(copied, 2 * PAGE);
        content[4096..8192].fill(9);
        content[8192..12288].fill(0);
        assert!(fs::read(&saved).unwrap() == content);
        assert_eq!(fs::read(&parent).unwrap()[4096], 7, "the parent is as it was");
        assert!(write(&record, &saved).is_err(), "an existing file is never written over");
        // A memory of which the VMM maps only a part is no memory.
        file.set_len(5 * PAGE).unwrap();
        let refused = write(&record, &dir.path().join("part")).unwrap_err();
        assert!(matches!(&refused, Error::Io { cause, .. } if cause.kind() == io::ErrorKind::InvalidData), "{refused}");
        // SAFETY: the mapping is not used after this.
        unsafe { libc::munmap(at, content.len()) };
    }
}
