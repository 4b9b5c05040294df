//! The file of one disk under device-mapper: what the guest has written, as the kernel's snapshot target keeps it, behind a head of our own.
//!
//! ```text
//!   0      head, sealed: the base that it belongs to, how large the disk is
//!   4096   exception store of the kernel (drivers/md/dm-snap-persistent.c), in chunks of 4 KiB:
//!          chunk 0: its header; then areas: one chunk of 256 pairs (chunk of the disk, chunk of the store), and those 256 chunks
//! ```
//!
//! Sparse, and so long that every chunk of the disk has room in it: the kernel never finds it full. A flat disk is whole MiB long, a store
//! is not. That tells them apart, because its length is the one thing of a disk that no guest decides. What is read here was written by this
//! agent and by the kernel; a guest's bytes are only moved.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, fchown};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::sealed;

/// Where the kernel's part begins.
pub const HEAD_BYTES: u64 = 4096;
pub const CHUNK_BYTES: u64 = 4096;
/// The version of the head.
const FORMAT: u32 = 1;
const MIB: u64 = 1 << 20;
/// The head of a file system with its times, and its first tables with the checksums of others.
const BEGIN_BYTES: u64 = 64 * 1024;
/// Larger disks there are not; of a head that says so nothing else is believed.
const DISK_BYTES_MAX: u64 = 1 << 50;

// drivers/md/dm-snap-persistent.c
const MAGIC: u32 = 0x7041_6e53;
const KERNEL_FORMAT: u32 = 1;
const PAIR_BYTES: u64 = 16;
const PAIRS: u64 = CHUNK_BYTES / PAIR_BYTES;
/// What stands before the first area.
const HEADER_CHUNKS: u64 = 1;

/// linux/fs.h: _IOW(0x94, 13, struct file_clone_range)
const FICLONERANGE: libc::c_ulong = 0x4020_940d;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The name of its file among the pool's images.
    pub base: String,
    /// Of the disk that the guest sees.
    pub disk_bytes: u64,
    /// BLAKE3 of how the base begins, which tells when it was made: one that is made again of the same image has other places for the same
    /// files.
    pub begin: String,
}

impl Head {
    pub fn of(base: &str, file: &File) -> io::Result<Self> {
        let disk_bytes = file.metadata()?.len();
        let mut begin = vec![0; usize::try_from(BEGIN_BYTES.min(disk_bytes)).expect("some KiB")];
        file.read_exact_at(&mut begin, 0)?;
        Ok(Self { base: base.to_owned(), disk_bytes, begin: blake3::hash(&begin).to_hex()[..32].to_owned() })
    }
}

#[repr(C)]
struct CloneRange {
    from: i64,
    from_offset: u64,
    length: u64,
    to_offset: u64,
}

/// A stretch of the disk, and where its content lies in the kernel's part; in chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    at: u64,
    stored: u64,
    chunks: u64,
}

/// By how long it is: whether a disk's file is a store.
pub fn is_one(file: &File) -> io::Result<bool> {
    Ok(is_length(file.metadata()?.len()))
}

fn is_length(bytes: u64) -> bool {
    bytes > MIB && bytes % MIB == HEAD_BYTES
}

/// Of the kernel's part, for a disk of this size.
pub fn kernel_bytes(disk_bytes: u64) -> u64 {
    let chunks = disk_bytes.div_ceil(CHUNK_BYTES);
    // One area more than is filled: the kernel clears the next one when it fills one.
    let areas = chunks.div_ceil(PAIRS) + 1;
    ((HEADER_CHUNKS + areas * (PAIRS + 1)) * CHUNK_BYTES).next_multiple_of(MIB)
}

/// An empty one, in place of what is there.
pub fn make(path: &Path, head: &Head, uid: u32) -> io::Result<()> {
    crate::durable::remove(path)?;
    let file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    let text = sealed::encode(FORMAT, head);
    if text.len() as u64 > HEAD_BYTES {
        return Err(damaged("its head is too long"));
    }
    file.write_all_at(&text, 0)?;
    file.set_len(HEAD_BYTES + kernel_bytes(head.disk_bytes))?;
    fchown(&file, Some(uid), Some(uid))
}

pub fn head(file: &File) -> io::Result<Head> {
    let mut bytes = [0; HEAD_BYTES as usize];
    file.read_exact_at(&mut bytes, 0)?;
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let head: Head = sealed::decode(FORMAT, &bytes[..end]).map_err(|broken| damaged(&format!("its head: {broken}")))?;
    if head.disk_bytes > DISK_BYTES_MAX {
        return Err(damaged("its head is of another one"));
    }
    let is_plain = !head.base.is_empty() && !head.base.contains('/') && !head.base.starts_with('.');
    if !is_plain || file.metadata()?.len() != HEAD_BYTES + kernel_bytes(head.disk_bytes) {
        return Err(damaged("its head is of another one"));
    }
    Ok(head)
}

/// Puts what the store holds onto a copy of its base: no data is written where the file system can share it.
pub fn flatten(store: &File, onto: &File, disk_bytes: u64) -> io::Result<()> {
    each_stretch(store, disk_bytes, |stretch| {
        let from = HEAD_BYTES + stretch.stored * CHUNK_BYTES;
        let (to, length) = (stretch.at * CHUNK_BYTES, stretch.chunks * CHUNK_BYTES);
        let range = CloneRange { from: store.as_raw_fd().into(), from_offset: from, length, to_offset: to };
        // SAFETY: the argument is a whole file_clone_range, and both descriptors are open.
        if unsafe { libc::ioctl(onto.as_raw_fd(), FICLONERANGE, &raw const range) } == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            // Blocks of another size, or no reflinks.
            error if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EXDEV)) => {
                copy(store, from, onto, to, length)
            }
            error => Err(error),
        }
    })
}

fn copy(from: &File, from_offset: u64, to: &File, to_offset: u64, length: u64) -> io::Result<()> {
    let mut chunk = [0; CHUNK_BYTES as usize];
    for at in (0..length).step_by(CHUNK_BYTES as usize) {
        from.read_exact_at(&mut chunk, from_offset + at)?;
        to.write_all_at(&chunk, to_offset + at)?;
    }
    Ok(())
}

/// In the order in which they were written, area by area: a guest that writes here and there makes many.
fn each_stretch(store: &File, disk_bytes: u64, mut visit: impl FnMut(Stretch) -> io::Result<()>) -> io::Result<()> {
    let Some([magic, _, format, sectors]) = header(store)? else { return Ok(()) };
    if (magic, format, u64::from(sectors) * 512) != (MAGIC, KERNEL_FORMAT, CHUNK_BYTES) {
        return Err(damaged("its kernel part has another format"));
    }
    let chunks = disk_bytes.div_ceil(CHUNK_BYTES);
    let stored_max = kernel_bytes(disk_bytes) / CHUNK_BYTES;
    let mut open: Option<Stretch> = None;
    let mut area = [0; CHUNK_BYTES as usize];
    for number in 0..=chunks.div_ceil(PAIRS) {
        let begin = HEADER_CHUNKS + number * (PAIRS + 1);
        store.read_exact_at(&mut area, HEAD_BYTES + begin * CHUNK_BYTES)?;
        for pair in area.as_chunks::<{ PAIR_BYTES as usize }>().0 {
            let half = |at: usize| u64::from_le_bytes(pair[at..at + 8].try_into().expect("eight bytes"));
            let (at, stored) = (half(0), half(8));
            // No data lies in chunk 0: this is the end.
            if stored == 0 {
                return open.map_or(Ok(()), visit);
            }
            if at >= chunks || stored >= stored_max {
                return Err(damaged("it names a chunk that there is not"));
            }
            match &mut open {
                Some(last) if (last.at + last.chunks, last.stored + last.chunks) == (at, stored) => last.chunks += 1,
                _ => {
                    let next = Stretch { at, stored, chunks: 1 };
                    if let Some(whole) = open.replace(next) {
                        visit(whole)?;
                    }
                }
            }
        }
    }
    open.map_or(Ok(()), visit)
}

/// Magic, valid, format, sectors of a chunk; none of a store that was never used.
fn header(store: &File) -> io::Result<Option<[u32; 4]>> {
    let mut bytes = [0; 16];
    store.read_exact_at(&mut bytes, HEAD_BYTES)?;
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    Ok((bytes != [0; 16]).then(|| [word(0), word(4), word(8), word(12)]))
}

/// The bases that stores below a directory belong to.
pub fn bases_below(directory: &Path, levels: u32, found: &mut BTreeSet<String>) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() && levels > 0 {
            bases_below(&entry.path(), levels - 1, found)?;
        } else if kind.is_file() && is_length(entry.metadata()?.len()) && entry.file_name() == "disk" {
            found.insert(head(&File::open(entry.path())?)?.base);
        }
    }
    Ok(())
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("the disk's store is damaged: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: u64 = 8 * MIB;

    fn head_of(base: &str) -> Head {
        Head { base: base.to_owned(), disk_bytes: DISK, begin: String::new() }
    }

    fn stretches(store: &File, disk_bytes: u64) -> io::Result<Vec<Stretch>> {
        let mut found = Vec::new();
        each_stretch(store, disk_bytes, |stretch| {
            found.push(stretch);
            Ok(())
        })?;
        Ok(found)
    }

    fn owner() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    fn store(dir: &Path, pairs: &[(u64, u64)]) -> File {
        let path = dir.join("disk");
        make(&path, &head_of("base.ext4"), owner()).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let words = [MAGIC, 1, KERNEL_FORMAT, 8].map(u32::to_le_bytes).concat();
        file.write_all_at(&words, HEAD_BYTES).unwrap();
        for (number, (at, stored)) in (0_u64..).zip(pairs) {
            let area = HEADER_CHUNKS + number / PAIRS * (PAIRS + 1);
            let place = HEAD_BYTES + area * CHUNK_BYTES + number % PAIRS * PAIR_BYTES;
            file.write_all_at(&[at.to_le_bytes(), stored.to_le_bytes()].concat(), place).unwrap();
            let content = vec![u8::try_from(at % 251).unwrap() + 1; CHUNK_BYTES as usize];
            file.write_all_at(&content, HEAD_BYTES + stored * CHUNK_BYTES).unwrap();
        }
        file
    }

    #[test]
    fn a_store_is_known_by_its_length_and_says_whose_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let file = store(dir.path(), &[]);
        assert!(is_one(&file).unwrap());
        assert_eq!(head(&file).unwrap(), head_of("base.ext4"));
        let flat = File::create(dir.path().join("flat")).unwrap();
        flat.set_len(DISK).unwrap();
        assert!(!is_one(&flat).unwrap());
        for mib in [1, 300, 1024, 65_536] {
            let bytes = kernel_bytes(mib * MIB);
            assert!(
                bytes > mib * MIB && bytes < mib * MIB * 102 / 100 + 3 * MIB && is_length(HEAD_BYTES + bytes),
                "{mib}"
            );
        }
    }

    #[test]
    fn a_head_that_is_not_whole_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = store(dir.path(), &[]);
        for name in ["", "../x", "a/b", ".hidden"] {
            make(&dir.path().join("disk"), &head_of(name), owner()).unwrap();
            assert!(head(&File::open(dir.path().join("disk")).unwrap()).is_err(), "{name:?}");
        }
        file.write_all_at(b"x", 40).unwrap();
        assert_eq!(head(&file).unwrap_err().kind(), ErrorKind::InvalidData);
    }

    #[test]
    fn what_was_written_lies_on_the_copy_of_the_base() {
        let dir = tempfile::tempdir().unwrap();
        // More than one area, in and out of order, the last chunk, and one that two writes share an area's border with.
        let mut pairs: Vec<(u64, u64)> = (0..300).map(|n| (n * 3 % 1000, 2 + n + n / 256)).collect();
        pairs.push((DISK / CHUNK_BYTES - 1, 700));
        let file = store(dir.path(), &pairs);
        let onto = File::options().read(true).write(true).create_new(true).open(dir.path().join("flat")).unwrap();
        onto.set_len(DISK).unwrap();
        flatten(&file, &onto, DISK).unwrap();
        let mut chunk = [0; CHUNK_BYTES as usize];
        for at in 0..DISK / CHUNK_BYTES {
            onto.read_exact_at(&mut chunk, at * CHUNK_BYTES).unwrap();
            let is_written = pairs.iter().any(|(written, _)| *written == at);
            let expected = if is_written { u8::try_from(at % 251).unwrap() + 1 } else { 0 };
            assert_eq!(chunk, [expected; CHUNK_BYTES as usize], "chunk {at}");
        }
        assert_eq!(onto.metadata().unwrap().len(), DISK);
    }

    #[test]
    fn neighbours_are_moved_together() {
        let dir = tempfile::tempdir().unwrap();
        let file = store(dir.path(), &[(10, 2), (11, 3), (12, 4), (40, 5), (41, 7)]);
        let found = stretches(&file, DISK).unwrap();
        let stretch = |at, stored, chunks| Stretch { at, stored, chunks };
        assert_eq!(found, [stretch(10, 2, 3), stretch(40, 5, 1), stretch(41, 7, 1)]);
    }

    #[test]
    fn nonsense_is_refused_and_moves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        for pair in [(DISK / CHUNK_BYTES, 2), (0, u64::MAX), (u64::MAX, 3), (0, kernel_bytes(DISK) / CHUNK_BYTES)] {
            let path = dir.path().join("disk");
            let file = store(dir.path(), &[]);
            let bytes = [pair.0.to_le_bytes(), pair.1.to_le_bytes()].concat();
            file.write_all_at(&bytes, HEAD_BYTES + CHUNK_BYTES).unwrap();
            assert_eq!(stretches(&File::open(path).unwrap(), DISK).unwrap_err().kind(), ErrorKind::InvalidData);
        }
        let other = store(dir.path(), &[]);
        other.write_all_at(&16_u32.to_le_bytes(), HEAD_BYTES + 12).unwrap();
        assert!(stretches(&other, DISK).is_err(), "chunks of another size");
    }

    #[test]
    fn bases_are_found_wherever_their_stores_lie() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("sandboxes/a/gen-00001");
        std::fs::create_dir_all(&deep).unwrap();
        make(&deep.join("disk"), &head_of("one.ext4"), owner()).unwrap();
        std::fs::create_dir_all(dir.path().join("standbys/b")).unwrap();
        make(&dir.path().join("standbys/b/disk"), &head_of("two.ext4"), owner()).unwrap();
        std::fs::write(dir.path().join("sandboxes/a/disk"), vec![0; 2 << 20]).unwrap();
        let mut found = BTreeSet::new();
        bases_below(dir.path(), 4, &mut found).unwrap();
        assert_eq!(found, ["one.ext4".to_owned(), "two.ext4".to_owned()].into());
        File::options().write(true).open(deep.join("disk")).unwrap().write_all_at(b"?", 0).unwrap();
        assert!(bases_below(dir.path(), 4, &mut found).is_err(), "of one that cannot be read nobody knows the base");
    }
}
