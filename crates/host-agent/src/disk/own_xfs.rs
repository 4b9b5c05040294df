//! The agent's own XFS, for hosts whose WRENN_DIR has no reflinks: a preallocated file `pool.img`, mounted over a loop device at `pool/`.
//!
//! Preallocated, so that a full outer disk cannot take the ground from under running guests. The loop device lets go of the file by itself
//! when its last user is gone, so a death between attaching and mounting leaves nothing. An image that exists is never formatted again.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::FallocateFlags;

use super::loops::{self, Attachment};
use super::{PoolError, free_mib, mounts};
use crate::tool;
use crate::{durable, sandbox};

/// At least room for the minimal template and some sandboxes.
const SIZE_MIN_MIB: u64 = 4096;
const SIZE_MAX_MIB: u64 = 32 * 1024;
/// Stays free around the image: logs, credentials, the database of a platform on one machine.
const OUTER_RESERVE_MIB: u64 = 512;
/// Formatting writes a few MiB; preallocating writes extents only. For a busy disk.
const FORMAT_LIMIT: Duration = Duration::from_secs(120);
/// A VMM that was just killed may still be giving its files back.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(15);
/// The sector size of image, loop device and file system: what direct I/O is possible with on any disk.
const SECTOR: u32 = 4096;

/// How the names of images begin that are not whole yet.
const HALF_MADE: &str = "pool.img.";

pub struct OwnXfs {
    pub image: PathBuf,
    pub point: PathBuf,
}

/// Programs and devices work in it: the jails of VMMs that have a jailer lie beside the sandboxes' disks, so that files can have names in
/// both. Nothing that a guest writes is a file of this file system.
const FLAGS: MsFlags = MsFlags::MS_NOATIME.union(MsFlags::MS_NOSUID);

impl OwnXfs {
    /// Both paths free of symbolic links, as the kernel will name them.
    pub fn new(dir: &Path) -> Self {
        Self { image: dir.join("pool.img"), point: dir.join("pool") }
    }

    pub fn exists(&self) -> bool {
        self.image.exists()
    }

    /// What makers that died were writing: of no use.
    pub fn remove_half_made(dir: &Path) -> io::Result<()> {
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(HALF_MADE) && name.ends_with(durable::TEMPORARY_SUFFIX) {
                durable::remove(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Made under another name first: an image by its right name is whole.
    pub fn make(&self, wanted_mib: Option<u32>) -> Result<(), PoolError> {
        let dir = self.image.parent().expect("the image lies in WRENN_DIR");
        let failed = |cause| PoolError::Make { path: self.image.clone(), cause };
        // This process's own: a formatting program that outlived an agent before this one must not write into it.
        let temporary = dir.join(format!("{HALF_MADE}{}{}", std::process::id(), durable::TEMPORARY_SUFFIX));
        durable::remove(&temporary).map_err(failed)?;
        let mib = size(free_mib(dir).map_err(failed)?, wanted_mib, dir)?;
        let file = File::options().write(true).create_new(true).mode(0o600).open(&temporary).map_err(failed)?;
        let made = || -> Result<(), PoolError> {
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, mib << 20)
                .map_err(|cause| failed(cause.into()))?;
            let name = temporary.to_str().ok_or_else(|| failed(io::Error::other("the path is not UTF-8")))?;
            let sector = format!("size={SECTOR}");
            // No discard of the empty file: that would give the preallocated blocks back.
            tool::run_within(
                "mkfs.xfs",
                &["-q", "-K", "-m", "reflink=1", "-s", &sector, "-L", "wrenn-pool", name],
                "",
                FORMAT_LIMIT,
                &[0],
            )?;
            file.sync_all().map_err(failed)?;
            std::fs::rename(&temporary, &self.image).map_err(failed)?;
            durable::sync_directory(dir).map_err(failed)
        };
        let made = made();
        if made.is_err() {
            // Gigabytes that nobody would use.
            let _ = durable::remove(&temporary);
        }
        made
    }

    /// Mounts the image, or finds it mounted. Never twice.
    pub fn ensure_mounted(&self) -> Result<(), PoolError> {
        let failed = |cause| PoolError::Mount { image: self.image.clone(), point: self.point.clone(), cause };
        std::fs::create_dir_all(&self.point).map_err(failed)?;
        if let Some(present) = mounts::at(&self.point).map_err(failed)? {
            if loops::backing_file(&present.device).as_deref() == Some(&*self.image) {
                // An agent of before has mounted it its own way.
                let again = MsFlags::MS_REMOUNT | FLAGS;
                return mount(None::<&str>, &self.point, None::<&str>, again, None::<&str>)
                    .map_err(|errno| failed(errno.into()));
            }
            return Err(PoolError::Occupied { point: self.point.clone(), kind: present.kind });
        }
        // Sandboxes of a time without an image would vanish below it.
        let mut hidden = std::fs::read_dir(self.point.join(sandbox::journal::SANDBOXES)).into_iter().flatten();
        if hidden.next().is_some() {
            return Err(PoolError::InTheWay { point: self.point.clone() });
        }
        // Direct I/O: the pool's pages are cached once, not twice.
        let wish = Attachment { block_bytes: SECTOR, is_direct: true, ..Attachment::default() };
        let device = loops::attach(&self.image, wish).map_err(failed)?;
        mount(Some(&device.path), &self.point, Some("xfs"), FLAGS, None::<&str>).map_err(|errno| {
            // XFS refuses to be mounted twice, and says no more than that.
            let others = loops::all().unwrap_or_default();
            let other = others.into_iter().find(|(number, file)| *file == self.image && *number != device.number);
            match other {
                Some((device, _)) => PoolError::Elsewhere { image: self.image.clone(), device },
                None => failed(errno.into()),
            }
        })
    }

    /// Unmounts and waits until the loop device has let go of the file. Also of what is not mounted.
    pub fn unmount(&self) -> Result<(), PoolError> {
        let failed = |cause| PoolError::Unmount { point: self.point.clone(), cause };
        let end = Instant::now() + UNMOUNT_LIMIT;
        while let Some(present) = mounts::at(&self.point).map_err(failed)? {
            if loops::backing_file(&present.device).as_deref() != Some(&*self.image) {
                break;
            }
            match umount2(&self.point, MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) => {}
                Err(Errno::EBUSY) if Instant::now() < end => std::thread::sleep(Duration::from_millis(20)),
                Err(errno) => return Err(failed(errno.into())),
            }
        }
        loop {
            let held = loops::all().map_err(failed)?;
            let Some((device, _)) = held.into_iter().find(|(_, file)| *file == self.image) else { return Ok(()) };
            // One that was attached by hand does not let go by itself.
            loops::detach(&device).map_err(failed)?;
            if Instant::now() >= end {
                return Err(failed(io::Error::new(io::ErrorKind::TimedOut, format!("loop device {device} stays"))));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn mib(&self) -> u64 {
        std::fs::metadata(&self.image).map_or(0, |meta| meta.len() >> 20)
    }
}

/// Half of what is free within the bounds, or what is wished; never so much that nothing is left around it.
fn size(free_mib: u64, wanted: Option<u32>, dir: &Path) -> Result<u64, PoolError> {
    let mib = wanted.map_or((free_mib / 2).clamp(SIZE_MIN_MIB, SIZE_MAX_MIB), u64::from);
    if mib + OUTER_RESERVE_MIB > free_mib {
        return Err(PoolError::NoSpace { dir: dir.to_owned(), wanted_mib: mib + OUTER_RESERVE_MIB, free_mib });
    }
    Ok(mib)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_half_of_what_is_free_within_bounds() {
        let size = |free, wanted| size(free, wanted, Path::new("/x"));
        assert_eq!(size(20_000, None).unwrap(), 10_000);
        assert_eq!(size(5_000, None).unwrap(), 4096);
        assert_eq!(size(1 << 20, None).unwrap(), 32 * 1024);
        assert_eq!(size(5_000, Some(512)).unwrap(), 512);
        for (free, wanted) in [(4_200, None), (5_000, Some(4_900)), (0, None)] {
            let refused = size(free, wanted).unwrap_err().to_string();
            assert!(refused.contains("WRENN_POOL_MIB") && refused.contains(&format!("{free} MiB")), "{refused}");
        }
    }
}
