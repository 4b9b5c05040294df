//! How a sandbox's disk is made of its base, and what its VMM opens: two drivers, of which `WRENN_DISK` names the one for new disks.
//!
//! What there is of the other one stays usable: each disk's file says which it is of. A store of device-mapper that is restored on a host
//! that does without becomes a flat disk; a flat disk stays one.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::bases::Base;
use super::device_mapper::{self, DeviceMapper};
use super::{Pool, clone};
use crate::durable;

/// What `WRENN_DISK` may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskChoice {
    Reflink,
    DeviceMapper,
}

impl DiskChoice {
    pub fn name(self) -> &'static str {
        match self {
            Self::Reflink => "reflink",
            Self::DeviceMapper => "device-mapper",
        }
    }
}

/// Everything blocks. `disk` is always the file in the sandbox's directory; what removes that file removes the disk, once it is detached.
pub trait DiskDriver: Send + Sync {
    /// A new disk with the base's content, the uid's own, in place of what is there.
    fn create(&self, base: &Base, disk: &Path, uid: u32) -> io::Result<()>;
    /// A disk with the content of a saved one.
    fn restore(&self, from: &Path, disk: &Path, uid: u32) -> io::Result<()>;
    /// What the VMM opens: the file itself, or a device, which has `node` for a name. Repeatable, but not below a VMM that lives.
    fn attach(&self, slot: u16, disk: &Path, node: &Path, uid: u32) -> io::Result<PathBuf>;
    /// Brings what the VMM has written to the disk, as far as it has not gone there yet.
    fn flush(&self, slot: u16, disk: &Path) -> io::Result<()>;
    /// A copy, root's own, of the disk of a guest that stands still, with all that the guest was told is written. `StorageFull` when
    /// that cannot be had any more.
    fn snapshot(&self, slot: u16, disk: &Path, to: &Path) -> io::Result<()>;
    /// Whether the file is, by its length and its own word, a disk of this driver's with so many bytes.
    fn is_of(&self, disk: &File, bytes: u64) -> io::Result<bool>;
    /// After the VMM's end. Repeatable, also of what was never attached.
    fn detach(&self, slot: u16) -> io::Result<()>;
    /// An image with the content of a disk that nobody writes to, which needs no base and no driver.
    fn flatten(&self, disk: &Path, to: &Path, uid: u32) -> io::Result<()>;
}

/// Copies that share their data, by the file system.
pub struct Reflink;

impl DiskDriver for Reflink {
    fn create(&self, base: &Base, disk: &Path, uid: u32) -> io::Result<()> {
        clone(&base.file, disk, uid)
    }

    fn restore(&self, from: &Path, disk: &Path, uid: u32) -> io::Result<()> {
        clone(&File::open(from)?, disk, uid)
    }

    fn attach(&self, _slot: u16, disk: &Path, _node: &Path, _uid: u32) -> io::Result<PathBuf> {
        Ok(disk.to_owned())
    }

    fn flush(&self, _slot: u16, disk: &Path) -> io::Result<()> {
        File::open(disk)?.sync_data()
    }

    fn snapshot(&self, _slot: u16, disk: &Path, to: &Path) -> io::Result<()> {
        clone(&File::open(disk)?, to, 0)
    }

    fn is_of(&self, disk: &File, bytes: u64) -> io::Result<bool> {
        Ok(disk.metadata()?.len() == bytes)
    }

    fn detach(&self, _slot: u16) -> io::Result<()> {
        Ok(())
    }

    fn flatten(&self, disk: &Path, to: &Path, uid: u32) -> io::Result<()> {
        clone(&File::open(disk)?, to, uid)
    }
}

/// The disks of one host.
pub struct Disks {
    choice: DiskChoice,
    reflink: Reflink,
    mapper: DeviceMapper,
    /// What comes and goes in a slot does so one after the other; slots share these.
    turns: [Mutex<()>; 32],
}

impl Disks {
    /// `in_use`: the slots in which something may live.
    pub fn open(pool: &Pool, tag: &str, in_use: &BTreeSet<u16>, choice: DiskChoice) -> io::Result<Self> {
        let mapper = DeviceMapper::open(pool, tag, in_use)?;
        Ok(Self { choice, reflink: Reflink, mapper, turns: Default::default() })
    }

    pub fn choice(&self) -> DiskChoice {
        self.choice
    }

    /// Of new disks.
    pub fn chosen(&self) -> &dyn DiskDriver {
        match self.choice {
            DiskChoice::Reflink => &self.reflink,
            DiskChoice::DeviceMapper => &self.mapper,
        }
    }

    pub fn restore(&self, from: &Path, disk: &Path, uid: u32) -> io::Result<()> {
        match (is_store(from)?, self.choice) {
            (true, DiskChoice::Reflink) => self.mapper.flatten(from, disk, uid),
            (true, DiskChoice::DeviceMapper) => self.mapper.restore(from, disk, uid),
            (false, _) => self.reflink.restore(from, disk, uid),
        }
    }

    /// `is_wanted`: asked when it is its turn. What nobody wants any more is not attached: its end may have been before.
    pub fn attach(
        &self,
        slot: u16,
        disk: &Path,
        node: &Path,
        uid: u32,
        is_wanted: &dyn Fn() -> bool,
    ) -> io::Result<PathBuf> {
        let _turn = self.turn(slot);
        if !is_wanted() {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "nobody waits for the disk any more"));
        }
        // Of who had the slot before.
        self.mapper.detach(slot)?;
        let driver: &dyn DiskDriver = if is_store(disk)? { &self.mapper } else { &self.reflink };
        driver.attach(slot, disk, node, uid)
    }

    pub fn flush(&self, slot: u16, disk: &Path) -> io::Result<()> {
        self.of_slot(slot).flush(slot, disk)
    }

    /// Of a disk of so many MiB. Which driver a saved disk is of is told by its length, and a VMM that was taken over can write to a flat
    /// disk behind its end: what has another length than it must have is nobody's saved state.
    pub fn snapshot(&self, slot: u16, disk: &Path, to: &Path, mib: u32) -> io::Result<()> {
        let driver = self.of_slot(slot);
        driver.snapshot(slot, disk, to)?;
        let is_right = driver.is_of(&File::open(to)?, u64::from(mib) << 20)?;
        if !is_right {
            durable::remove(to)?;
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the disk has become larger or smaller than it was made",
            ));
        }
        Ok(())
    }

    pub fn detach(&self, slot: u16) -> io::Result<()> {
        let _turn = self.turn(slot);
        self.of_slot(slot).detach(slot)
    }

    fn turn(&self, slot: u16) -> MutexGuard<'_, ()> {
        let turn = &self.turns[usize::from(slot) % self.turns.len()];
        turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The slots that the kernel has devices of.
    pub fn devices(&self) -> io::Result<Vec<u16>> {
        self.mapper.slots()
    }

    /// Takes all devices down. Only when no sandbox is left.
    pub fn close(&self) -> io::Result<()> {
        self.mapper.close()
    }

    fn of_slot(&self, slot: u16) -> &dyn DiskDriver {
        if self.mapper.has(slot) { &self.mapper } else { &self.reflink }
    }
}

fn is_store(disk: &Path) -> io::Result<bool> {
    device_mapper::is_store(&File::open(disk)?)
}
