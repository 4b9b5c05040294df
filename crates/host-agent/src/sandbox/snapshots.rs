//! Snapshots: saved states that outlive the sandbox that they are of. Sandboxes begin with them, as with a template's booted state, but
//! these are customers' data: one goes when that is wished, and never to make room.
//!
//! ```text
//!  <pool>/snapshots/<id>/gen-00001/     a generation like a sandbox's
//!  <pool>/tombstones/<id>               it was removed: no late call makes it again
//! ```

use std::io;
use std::path::{Path, PathBuf};

use model::ids::SnapshotId;

use super::generation;
use super::journal::Journal;
use super::shelf::{GENERATION, Lease, Making, Shelf};

pub const FOLDER: &str = "snapshots";

#[derive(Debug)]
pub struct Snapshots {
    shelf: Shelf,
    journal: Journal,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Bytes that it takes, also those that it shares.
    Ready(u64),
    Absent,
    /// It was removed for good.
    Removed,
}

impl Snapshots {
    /// Removes what an earlier agent had half made, or not wholly removed.
    pub fn open(pool: &Path, journal: &Journal) -> io::Result<Self> {
        let is_wanted = |key: &str| match key.parse() {
            // Of one of which nothing can be said now nothing is removed.
            Ok(id) => !journal.is_buried(id).unwrap_or(false),
            Err(_) => false,
        };
        let shelf = Shelf::open(pool.join(FOLDER), usize::MAX, is_wanted)?;
        Ok(Self { shelf, journal: journal.clone() })
    }

    pub fn place(&self, id: SnapshotId) -> PathBuf {
        self.shelf.place(&id.to_string())
    }

    pub fn standing(&self, id: SnapshotId) -> io::Result<Standing> {
        if self.journal.is_buried(id)? {
            return Ok(Standing::Removed);
        }
        if !self.shelf.is_there(&id.to_string())? {
            return Ok(Standing::Absent);
        }
        generation::size(&generation::sealed_files(&self.place(id), GENERATION)).map(Standing::Ready)
    }

    pub fn lease(&self, id: SnapshotId) -> Option<Lease> {
        self.shelf.lease(&id.to_string())
    }

    /// None when it is there, was removed, or is being made or removed.
    pub fn begin(&self, id: SnapshotId) -> io::Result<Option<Making>> {
        if self.journal.is_buried(id)? {
            return Ok(None);
        }
        self.shelf.begin(&id.to_string())
    }

    /// Nobody begins with it any more, and nobody makes it again. Repeatable; sandboxes that began with it live on.
    pub fn remove(&self, id: SnapshotId) -> io::Result<()> {
        let key = id.to_string();
        match self.journal.bury_snapshot(id) {
            Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                // This is what makes room for the note.
                self.shelf.remove(&key);
                self.journal.bury_snapshot(id)?;
            }
            other => other?,
        }
        self.shelf.remove(&key);
        Ok(())
    }

    /// All of them, for good.
    pub fn remove_all(&self) -> io::Result<()> {
        for entry in std::fs::read_dir(self.shelf.folder())? {
            if let Some(Ok(id)) = entry?.file_name().to_str().map(str::parse) {
                self.remove(id)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use model::ids::SnapshotId;

    use super::*;

    #[test]
    fn what_was_removed_does_not_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path(), "0a1b2c3d").unwrap();
        let snapshots = Snapshots::open(dir.path(), &journal).unwrap();
        let id = SnapshotId(uuid::Uuid::from_u128(7));
        assert_eq!(snapshots.standing(id).unwrap(), Standing::Absent);
        let making = snapshots.begin(id).unwrap().unwrap();
        let files = generation::begin(making.place(), GENERATION).unwrap();
        for path in [files.memory(), files.device(), files.disk()] {
            std::fs::write(path, "x").unwrap();
        }
        std::fs::rename(making.place().join("gen-00001.tmp"), making.place().join("gen-00001")).unwrap();
        drop(making);
        assert!(matches!(snapshots.standing(id).unwrap(), Standing::Ready(bytes) if bytes > 0));
        let lease = snapshots.lease(id).unwrap();
        snapshots.remove(id).unwrap();
        assert_eq!(snapshots.standing(id).unwrap(), Standing::Removed);
        assert!(snapshots.place(id).exists() && snapshots.lease(id).is_none());
        // An agent that ends before the lease does leaves it to the next one.
        let _lease = std::mem::ManuallyDrop::new(lease);
        let snapshots = Snapshots::open(dir.path(), &journal).unwrap();
        assert!(!snapshots.place(id).exists() && snapshots.begin(id).unwrap().is_none());
        snapshots.remove(id).unwrap();
    }
}
