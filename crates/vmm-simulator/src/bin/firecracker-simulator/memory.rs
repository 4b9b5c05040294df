//! A guest's memory: pages, which of them changed, and one digest of all of them.
//!
//! The digest is what makes a wrong memory file visible. It covers the number and the hash of each page that is not all zeros, so that
//! memory which nobody touched costs nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::ptr::NonNull;

pub const PAGE: usize = 4096;
const ZEROS: [u8; PAGE] = [0; PAGE];
/// How much of a file is read at once while it is checked.
const CHECKED_AT_ONCE: usize = 256 * PAGE;

pub struct Memory {
    map: Map,
    /// Of the pages that are neither zero nor stale.
    hashes: BTreeMap<u32, blake3::Hash>,
    /// Written to since their hash was last taken.
    stale: BTreeSet<u32>,
    /// Written to since the boot, the load or the last snapshot; only kept when that was asked for.
    dirty: Option<BTreeSet<u32>>,
    /// Written to since the boot or the load.
    touched: BTreeSet<u32>,
}

impl Memory {
    pub fn empty(bytes: usize, track: bool) -> io::Result<Self> {
        Ok(Self::of(Map::new(bytes, None)?, track))
    }

    /// Mapped privately, from a descriptor that can only be read: nothing the guest does reaches the file.
    pub fn of_file(file: &File, bytes: usize, track: bool) -> io::Result<Self> {
        let mut memory = Self::of(Map::new(bytes, Some(file))?, track);
        memory.hashes = hashes_of(file, bytes as u64)?;
        Ok(memory)
    }

    fn of(map: Map, track: bool) -> Self {
        let dirty = track.then(BTreeSet::new);
        Self { map, hashes: BTreeMap::new(), stale: BTreeSet::new(), dirty, touched: BTreeSet::new() }
    }

    pub fn bytes(&self) -> u64 {
        self.map.bytes as u64
    }

    pub fn pages(&self) -> u32 {
        u32::try_from(self.map.bytes / PAGE).expect("a guest of less than 16 TiB")
    }

    pub fn read(&self, page: u32) -> &[u8] {
        &self.map.slice()[page as usize * PAGE..][..PAGE]
    }

    pub fn write(&mut self, page: u32) -> &mut [u8] {
        self.stale.insert(page);
        self.touched.insert(page);
        if let Some(dirty) = &mut self.dirty {
            dirty.insert(page);
        }
        &mut self.map.slice_mut()[page as usize * PAGE..][..PAGE]
    }

    /// Of everything, as it is now.
    pub fn digest(&mut self) -> String {
        for page in std::mem::take(&mut self.stale) {
            let content = self.read(page);
            if content == ZEROS {
                self.hashes.remove(&page);
            } else {
                let hash = blake3::hash(content);
                self.hashes.insert(page, hash);
            }
        }
        let mut whole = blake3::Hasher::new();
        for (page, hash) in &self.hashes {
            whole.update(&page.to_le_bytes());
            whole.update(hash.as_bytes());
        }
        whole.finalize().to_hex().to_string()
    }

    /// What a Diff writes: the dirty pages when they were tracked, else each that was ever touched.
    pub fn changed(&self) -> &BTreeSet<u32> {
        self.dirty.as_ref().unwrap_or(&self.touched)
    }

    pub fn forget_changes(&mut self) {
        if let Some(dirty) = &mut self.dirty {
            dirty.clear();
        }
    }

    pub fn is_zero(&self, page: u32) -> bool {
        self.read(page) == ZEROS
    }
}

/// Reads what the file holds; its holes are zeros.
fn hashes_of(file: &File, bytes: u64) -> io::Result<BTreeMap<u32, blake3::Hash>> {
    let mut hashes = BTreeMap::new();
    let mut buffer = vec![0; CHECKED_AT_ONCE];
    let mut at = 0;
    while let Some(data) = seek(file, at, libc::SEEK_DATA)?.filter(|data| *data < bytes) {
        let hole = seek(file, data, libc::SEEK_HOLE)?.unwrap_or(bytes);
        // Extents may begin inside a page when the file system's blocks are smaller.
        at = data / PAGE as u64 * PAGE as u64;
        let end = hole.next_multiple_of(PAGE as u64).min(bytes);
        while at < end {
            let part = usize::try_from(end - at).unwrap_or(usize::MAX).min(CHECKED_AT_ONCE);
            file.read_exact_at(&mut buffer[..part], at)?;
            let first = u32::try_from(at / PAGE as u64).expect("a guest of less than 16 TiB");
            for (page, content) in (first..).zip(buffer[..part].chunks(PAGE)) {
                if content != ZEROS {
                    hashes.insert(page, blake3::hash(content));
                }
            }
            at += part as u64;
        }
    }
    Ok(hashes)
}

/// `None` past the last data.
fn seek(file: &File, at: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let at = libc::off_t::try_from(at).map_err(io::Error::other)?;
    // SAFETY: a plain call on an open descriptor.
    let found = unsafe { libc::lseek(file.as_raw_fd(), at, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

/// A private mapping, unmapped when dropped.
struct Map {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone; nothing of it is bound to a thread.
unsafe impl Send for Map {}

impl Map {
    fn new(bytes: usize, file: Option<&File>) -> io::Result<Self> {
        let (flags, descriptor) = match file {
            Some(file) => (libc::MAP_PRIVATE | libc::MAP_NORESERVE, file.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_ANONYMOUS, -1),
        };
        // SAFETY: the kernel chooses the place, so nothing that exists is replaced.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, descriptor, 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Self { start, bytes })
    }

    fn slice(&self) -> &[u8] {
        // SAFETY: mapped for as long as self lives, readable, and written to through `slice_mut` alone.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    fn slice_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `slice`, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made, of that length; no slice of it outlives self.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_that_of_the_content() {
        let mut memory = Memory::empty(16 * PAGE, true).unwrap();
        let empty = memory.digest();
        memory.write(3)[5] = 1;
        memory.write(7)[0] = 2;
        let two_pages = memory.digest();
        assert_ne!(two_pages, empty);
        assert_eq!(memory.changed().iter().copied().collect::<Vec<_>>(), [3, 7]);

        let file = tempfile::tempfile().unwrap();
        file.set_len(16 * PAGE as u64).unwrap();
        for page in 0..16_u32 {
            file.write_all_at(memory.read(page), u64::from(page) * PAGE as u64).unwrap();
        }
        assert_eq!(Memory::of_file(&file, 16 * PAGE, false).unwrap().digest(), two_pages);

        memory.write(3).fill(0);
        memory.write(7).fill(0);
        assert_eq!(memory.digest(), empty, "a page that was zeroed again counts as never touched");
    }
}
