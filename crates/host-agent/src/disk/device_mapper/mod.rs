//! Disks as snapshots of device-mapper: the base behind a loop device that all its disks share, read-only, and what one guest writes in a
//! sparse file of its own.
//!
//! ```text
//!   pool/images/<base>.ext4 ── loop, read-only ──┐
//!                                                ├── snapshot wrenn-<tag>-<slot> ── <sandbox>/run/<incarnation>/disk (a node)
//!   <sandbox>/disk (a store) ── loop ────────────┘
//! ```
//!
//! The device belongs to a slot, as the network does, and lives as long as a VMM may have it open. Paused there is only the store, which
//! is copied, kept and shared as a flat disk is; resumed, a new device shows the copy. Loop devices go by themselves when the device does.

mod kernel;
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crashpoint::hit;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use tracing::{info, warn};

use super::bases::Base;
use super::drivers::DiskDriver;
use super::loops::{self, Attachment};
use super::{Pool, bases};
use crate::durable;
use kernel::SECTOR_BYTES;
use store::{CHUNK_BYTES, HEAD_BYTES, Head};

pub use store::is_one as is_store;

/// A VMM that was just killed may still be closing it, and other programs of the host may be looking at it.
const REMOVE_TIME_MAX: Duration = Duration::from_secs(5);
const REMOVE_AGAIN: Duration = Duration::from_millis(20);
/// Without it what was written waits for ever.
const RESUME_TRIES: u32 = 3;
/// What the kernel says of a snapshot that it has stopped to use.
const GIVEN_UP: &str = "Invalid";
/// linux/magic.h
const XFS: rustix::fs::FsWord = 0x5846_5342;
/// How deep the pool's directories are in which disks lie: `sandboxes/<id>/<generation>/disk`.
const LEVELS: u32 = 4;

pub struct DeviceMapper {
    images: PathBuf,
    prefix: String,
    /// The devices by their slots, with their `major:minor`.
    attached: Mutex<BTreeMap<u16, String>>,
    /// Held while a base is shown, so that it is shown once.
    showing: Mutex<()>,
}

impl DeviceMapper {
    /// What an earlier agent had suspended goes on. Before anything else: what has such a device open cannot even end.
    pub fn resume_all(tag: &str) -> io::Result<()> {
        for mapping in kernel::all(&prefix(tag))?.into_iter().filter(|mapping| mapping.is_suspended) {
            warn!("device {} was left suspended and goes on", mapping.name);
            kernel::resume(&mapping.name)?;
        }
        Ok(())
    }

    /// Takes up what an earlier agent left: what belongs to no slot in use goes away.
    pub fn open(pool: &Pool, tag: &str, in_use: &BTreeSet<u16>) -> io::Result<Self> {
        let prefix = prefix(tag);
        let mut attached = BTreeMap::new();
        for mapping in kernel::all(&prefix)? {
            let slot: Option<u16> = mapping.name.strip_prefix(&prefix).and_then(|slot| slot.parse().ok());
            match slot.filter(|slot| in_use.contains(slot)) {
                Some(slot) => _ = attached.insert(slot, mapping.number),
                // One that somebody has open stays: the kernel does not take it away below its user.
                None => match kernel::remove(&mapping.name) {
                    Ok(()) => info!("removed device {}, which belongs to nothing", mapping.name),
                    Err(error) => warn!("device {} belongs to nothing and stays: {error}", mapping.name),
                },
            }
        }
        let images = pool.path().join(bases::FOLDER);
        Ok(Self { images, prefix, attached: Mutex::new(attached), showing: Mutex::default() })
    }

    /// What this kernel lacks for new disks of this kind.
    pub fn missing() -> Option<String> {
        match kernel::has_snapshots() {
            Ok(true) => None,
            Ok(false) => Some("this kernel's device-mapper has no snapshots".to_owned()),
            Err(error) => Some(format!("this kernel has no device-mapper ({error})")),
        }
    }

    pub fn has(&self, slot: u16) -> bool {
        self.lock().contains_key(&slot)
    }

    /// The slots of the devices that the kernel has now, whoever made them.
    pub fn slots(&self) -> io::Result<Vec<u16>> {
        let slot = |name: &str| name.strip_prefix(&self.prefix)?.parse().ok();
        Ok(kernel::all(&self.prefix)?.iter().filter_map(|mapping| slot(&mapping.name)).collect())
    }

    /// Only when no sandbox is left.
    pub fn close(&self) -> io::Result<()> {
        kernel::all(&self.prefix)?.iter().try_for_each(|mapping| remove(&mapping.name))?;
        self.lock().clear();
        Ok(())
    }

    fn name(&self, slot: u16) -> String {
        format!("{}{slot}", self.prefix)
    }

    /// Who maps it must hold this until the device does.
    fn show(&self, head: &Head) -> io::Result<loops::Device> {
        self.base_of(head)?;
        let path = self.images.join(&head.base);
        let _turn = self.showing.lock().unwrap_or_else(PoisonError::into_inner);
        match loops::find_read_only(&path)? {
            Some(device) => Ok(device),
            // Through the page cache: what one guest has read is there for all.
            None => loops::attach(&path, Attachment { is_read_only: true, ..Attachment::default() }),
        }
    }

    /// The one that was there when the disk was made: by the same name there may be one that was made again.
    fn base_of(&self, head: &Head) -> io::Result<File> {
        let Head { base, .. } = head;
        let file = File::open(self.images.join(base))
            .map_err(|error| io::Error::new(error.kind(), format!("the disk's base {base} cannot be had: {error}")))?;
        if Head::of(base, &file)? != *head {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("the disk's base {base} is another one")));
        }
        Ok(file)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u16, String>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DiskDriver for DeviceMapper {
    fn create(&self, base: &Base, disk: &Path, uid: u32) -> io::Result<()> {
        store::make(disk, &Head::of(&base.name, &base.file)?, uid)
    }

    fn restore(&self, from: &Path, disk: &Path, uid: u32) -> io::Result<()> {
        super::clone(&File::open(from)?, disk, uid)
    }

    fn attach(&self, slot: u16, disk: &Path, node: &Path, uid: u32) -> io::Result<PathBuf> {
        self.detach(slot)?;
        let name = self.name(slot);
        // Of a start that did not get as far as to remember it.
        remove(&name)?;
        let head = store::head(&File::open(disk)?)?;
        let disk_bytes = head.disk_bytes;
        let origin = self.show(&head)?;
        let wish = Attachment {
            offset: HEAD_BYTES,
            bytes: store::kernel_bytes(disk_bytes),
            // What the guest writes is cached once, above. On btrfs, pages that change while they are written would not fit their checksums.
            is_direct: rustix::fs::statfs(disk)?.f_type == XFS,
            block_bytes: u32::try_from(CHUNK_BYTES).expect("some KiB"),
            ..Attachment::default()
        };
        let written = loops::attach(disk, wish)?;
        hit("disk.attach.looped")?;
        let chunk_sectors = CHUNK_BYTES / SECTOR_BYTES;
        let parameters = format!("{} {} P {chunk_sectors}", origin.number, written.number);
        let mapping = kernel::create(&name, disk_bytes, "snapshot", &parameters).map_err(|error| {
            io::Error::new(error.kind(), format!("make device {name} with this kernel's device-mapper: {error}"))
        })?;
        self.lock().insert(slot, mapping.number.clone());
        hit("disk.attach.mapped")?;
        durable::remove(node)?;
        let wrong = || io::Error::other(format!("device {name} has no number"));
        let (major, minor) = mapping.number.split_once(':').ok_or_else(wrong)?;
        let device = makedev(major.parse().map_err(|_| wrong())?, minor.parse().map_err(|_| wrong())?);
        // A name of its own for the VMM's user: the one in /dev is udev's.
        mknod(node, SFlag::S_IFBLK, Mode::S_IRUSR | Mode::S_IWUSR, device)?;
        std::os::unix::fs::chown(node, Some(uid), Some(uid))?;
        Ok(node.to_owned())
    }

    fn flush(&self, slot: u16, _disk: &Path) -> io::Result<()> {
        let number = self.lock().get(&slot).cloned();
        let Some(number) = number else { return Ok(()) };
        let minor = number.split_once(':').map_or(number.as_str(), |(_, minor)| minor);
        match File::open(format!("/dev/dm-{minor}")) {
            // A /dev that the kernel does not fill; suspending it will do the same.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            // What cannot be written is told by the copy, which has to have all of it.
            device => device?.sync_data().or_else(|error| {
                warn!("write the disk in slot {slot}: {error}");
                Ok(())
            }),
        }
    }

    fn snapshot(&self, slot: u16, disk: &Path, to: &Path) -> io::Result<()> {
        let name = self.name(slot);
        // Newer kernels say here that something could not be written; what could not be is forgotten the next time, and told below.
        kernel::suspend(&name).or_else(|_| kernel::suspend(&name))?;
        // The next agent resumes what is suspended.
        let copy = || -> io::Result<()> {
            hit("disk.snapshot.suspended")?;
            if kernel::status(&name)? == GIVEN_UP {
                return Err(io::Error::new(
                    io::ErrorKind::StorageFull,
                    "the kernel has given the disk up, because what the guest wrote had no room in the pool",
                ));
            }
            super::clone(&File::open(disk)?, to, 0)?;
            Ok(hit("disk.snapshot.copied")?)
        };
        let copied = copy();
        let mut resumed = kernel::resume(&name);
        for _ in 1..RESUME_TRIES {
            if resumed.is_err() {
                resumed = kernel::resume(&name);
            }
        }
        resumed.and(copied)
    }

    fn is_of(&self, disk: &File, bytes: u64) -> io::Result<bool> {
        Ok(store::is_one(disk)? && store::head(disk)?.disk_bytes == bytes)
    }

    fn detach(&self, slot: u16) -> io::Result<()> {
        if !self.has(slot) {
            return Ok(());
        }
        remove(&self.name(slot))?;
        hit("disk.detach.removed")?;
        self.lock().remove(&slot);
        Ok(())
    }

    fn flatten(&self, disk: &Path, to: &Path, uid: u32) -> io::Result<()> {
        let store = File::open(disk)?;
        let head = store::head(&store)?;
        super::clone(&self.base_of(&head)?, to, uid)?;
        hit("disk.flatten.cloned")?;
        store::flatten(&store, &File::options().write(true).open(to)?, head.disk_bytes)
    }
}

fn prefix(tag: &str) -> String {
    format!("wrenn-{tag}-")
}

/// Waits for those who still have it open. What is suspended goes on first: who closes it writes what is left.
fn remove(name: &str) -> io::Result<()> {
    let end = Instant::now() + REMOVE_TIME_MAX;
    loop {
        match kernel::remove(name) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end => {
                if kernel::all(name)?.iter().any(|mapping| mapping.name == name && mapping.is_suspended) {
                    kernel::resume(name)?;
                }
                std::thread::sleep(REMOVE_AGAIN);
            }
            // Without device-mapper there is nothing to remove.
            Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV) => {
                return Ok(());
            }
            other => return other,
        }
    }
}

/// The bases that stores in the pool belong to.
pub(super) fn bases_in_use(pool: &Path) -> io::Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    store::bases_below(pool, LEVELS, &mut found)?;
    Ok(found)
}
