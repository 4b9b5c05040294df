//! The memory of saved states that several sandboxes begin with, held once for all of them: a clone of the file would be read from the
//! disk anew for each.
//!
//! It is a piece of memory that nobody can write to any more, so that a VMM that was taken over changes no other sandbox's; each maps it
//! privately. It takes as much of the host's memory as was written of it, and grows, up to its size, with what sandboxes touch: few are
//! kept, and none where memory is short.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags, SeekFrom, seek};

/// Kept at once, the ones that were used last.
const KEPT_MAX: usize = 3;
const PIECE: usize = 1 << 20;

#[derive(Debug, Default)]
pub struct SharedMemory {
    /// What was used last comes last.
    kept: Mutex<Vec<(String, Arc<File>)>>,
}

impl SharedMemory {
    /// A handle to the content of `path`, which `name` names for ever. `may_make`: also when it has to be read first.
    pub fn of(&self, name: &str, path: &Path, may_make: bool) -> io::Result<Option<OwnedFd>> {
        // Held while it is read: of several who want the same one, one reads it.
        let mut kept = self.lock();
        let memory = match kept.iter().position(|(known, _)| known == name) {
            Some(place) => kept.remove(place).1,
            None if may_make => Arc::new(sealed(path)?),
            None => return Ok(None),
        };
        let handle = memory.try_clone()?;
        kept.push((name.to_owned(), memory));
        let spare = kept.len().saturating_sub(KEPT_MAX);
        kept.drain(..spare);
        Ok(Some(handle.into()))
    }

    /// Lets go of all. What runs keeps what it began with.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(String, Arc<File>)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sealed(path: &Path) -> io::Result<File> {
    let source = File::open(path)?;
    let length = source.metadata()?.len();
    let memory = File::from(rustix::fs::memfd_create("guest-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    // QEMU opens what it maps for writing, too, and does not write. The seals say that it cannot.
    memory.set_permissions(Permissions::from_mode(0o666))?;
    memory.set_len(length)?;
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while at < length {
        let data = match seek(&source, SeekFrom::Data(at)) {
            Err(rustix::io::Errno::NXIO) => break,
            other => other?,
        };
        let end = seek(&source, SeekFrom::Hole(data))?.min(length);
        at = data;
        while at < end {
            let count = usize::try_from(end - at).map_or(PIECE, |left| left.min(PIECE));
            source.read_exact_at(&mut buffer[..count], at)?;
            memory.write_all_at(&buffer[..count], at)?;
            at += count as u64;
        }
    }
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&memory, seals)?;
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_copy_for_all_that_nobody_can_change() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let file = File::create(&path).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&[7; 5000], 3 << 20).unwrap();
        let shared = SharedMemory::default();
        assert!(shared.of("a", &path, false).unwrap().is_none());
        let handle = File::from(shared.of("a", &path, true).unwrap().unwrap());
        let mut content = vec![1; 8 << 20];
        handle.read_exact_at(&mut content, 0).unwrap();
        assert!(content == std::fs::read(&path).unwrap());
        let path_of_it = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&handle));
        let again = File::options().read(true).write(true).open(path_of_it).unwrap();
        assert!(again.write_all_at(b"x", 0).is_err() && again.set_len(1).is_err());
        // The same one again, without a look at the file; others push it out.
        std::fs::remove_file(&path).unwrap();
        assert!(shared.of("a", &path, true).unwrap().is_some());
        assert!(shared.of("b", &path, true).is_err());
        File::create(&path).unwrap();
        for name in ["b", "c", "d"] {
            assert!(shared.of(name, &path, true).unwrap().is_some());
        }
        assert!(shared.of("a", &path, false).unwrap().is_none());
        shared.clear();
        assert!(shared.of("d", &path, false).unwrap().is_none());
    }
}
