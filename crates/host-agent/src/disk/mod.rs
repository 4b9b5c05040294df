//! The storage pool: where sandboxes' disks, memory and journals lie, on a file system with reflinks, so that a copy costs nothing.
//!
//! ```text
//!   WRENN_DIR with reflinks (XFS, btrfs):  pool/ is a plain directory
//!   without (ext4, ...):                   pool.img, preallocated XFS of the agent's own, loop-mounted at pool/
//!
//!   pool/images/<digest>[-<mib>].ext4   pristine root file systems, one per content and size
//!   pool/sandboxes/<id>/disk            a clone of one, or what device-mapper keeps beside one (`drivers`)
//! ```
//!
//! It never mounts, parses or repairs what a guest has written: file systems inside images are touched before the first guest sees them
//! and never after. Everything here blocks but
//! [`Makings`].

mod bases;
mod device_mapper;
mod drivers;
pub mod extents;
mod loops;
mod makings;
mod mounts;
mod own_xfs;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tracing::info;

pub(crate) use bases::clone;
pub use bases::{Base, DiskError};
pub use device_mapper::{DeviceMapper, is_store};
pub use drivers::{DiskChoice, DiskDriver, Disks, Reflink};
pub use loops::all as all_loops;
pub use makings::Makings;
pub use mounts::{Mount, all as all_mounts};
use own_xfs::OwnXfs;

use crate::durable;
use crate::sandbox::journal::SANDBOXES;
use crate::tool::ToolError;

#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    #[error(
        "there is too little room for the storage pool: {dir} has {free_mib} MiB free, the pool and what stays around it take {wanted_mib} MiB; make room or set WRENN_POOL_MIB"
    )]
    NoSpace { dir: PathBuf, wanted_mib: u64, free_mib: u64 },
    #[error("make the storage pool {path}")]
    Make {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("format the storage pool (Debian: apt-get install xfsprogs)")]
    Format(#[from] ToolError),
    #[error("mount the storage pool {image} at {point}")]
    Mount {
        image: PathBuf,
        point: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error(
        "the storage pool {image} is mounted in another mount namespace ({device}), where sandboxes or an agent of before hold it; start the agent there (nsenter --mount), or end what runs there"
    )]
    Elsewhere { image: PathBuf, device: String },
    #[error("{point} has a {kind} mounted that is not this agent's pool; unmount it")]
    Occupied { point: PathBuf, kind: String },
    #[error("{point}/sandboxes holds sandboxes that the pool's mount would hide; move them away")]
    InTheWay { point: PathBuf },
    #[error("unmount the storage pool {point}")]
    Unmount {
        point: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("look at the storage pool {path}")]
    Look {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
}

impl PoolError {
    /// Starting again does not help: somebody has to change something first.
    pub fn is_config(&self) -> bool {
        matches!(self, Self::NoSpace { .. } | Self::Elsewhere { .. } | Self::Occupied { .. } | Self::InTheWay { .. })
    }
}

pub struct Pool {
    /// WRENN_DIR, as the kernel names it.
    dir: PathBuf,
    path: PathBuf,
    own: Option<OwnXfs>,
    notes: Vec<String>,
    /// Held while a base is made, so that it is made once.
    making: Mutex<()>,
}

impl Pool {
    /// Finds, makes or mounts the pool. The caller holds the lock of WRENN_DIR.
    pub fn open(dir: &Path, wanted_mib: Option<u32>) -> Result<Self, PoolError> {
        let look = |cause| PoolError::Look { path: dir.to_owned(), cause };
        let dir = dir.canonicalize().map_err(look)?;
        let path = dir.join("pool");
        let own = OwnXfs::new(&dir);
        OwnXfs::remove_half_made(&dir).map_err(look)?;
        let mut notes = Vec::new();
        let outer = kind(&dir);
        let own = if own.exists() || !can_reflink(&dir).map_err(look)? {
            if !own.exists() {
                own.make(wanted_mib)?;
                info!("made the storage pool {}: {} MiB of XFS", own.image.display(), own.mib());
            }
            own.ensure_mounted()?;
            let mib = own.mib();
            notes.push(format!(
                "Storage: the pool is an XFS of the agent's own with reflinks (pool.img, {mib} MiB, preallocated), because WRENN_DIR is on {outer}."
            ));
            if let Some(wanted) = wanted_mib.map(u64::from).filter(|wanted| *wanted != mib) {
                notes.push(format!(
                    "Storage: WRENN_POOL_MIB is {wanted}, but pool.img was made with {mib} MiB and stays so."
                ));
            }
            Some(own)
        } else {
            notes.push(format!("Storage: WRENN_DIR is on {outer} with reflinks; the pool is the directory pool/."));
            None
        };
        Self { dir, path, own, notes, making: Mutex::default() }.furnished()
    }

    /// For taking down: what is not there is not made.
    pub fn open_to_close(dir: &Path) -> Result<Self, PoolError> {
        let dir = dir.canonicalize().map_err(|cause| PoolError::Look { path: dir.to_owned(), cause })?;
        let (path, own) = (dir.join("pool"), OwnXfs::new(&dir));
        let own = own.exists().then_some(own);
        own.as_ref().map_or(Ok(()), OwnXfs::ensure_mounted)?;
        Self { dir, path, own, notes: Vec::new(), making: Mutex::default() }.furnished()
    }

    fn furnished(mut self) -> Result<Self, PoolError> {
        let path = self.path.clone();
        self.furnish().map_err(|cause| PoolError::Look { path, cause })?;
        Ok(self)
    }

    fn furnish(&mut self) -> io::Result<()> {
        for name in [SANDBOXES, "snapshots", bases::FOLDER] {
            std::fs::create_dir_all(self.path.join(name))?;
        }
        for name in [SANDBOXES, "snapshots"] {
            if !link(&self.dir.join(name), &Path::new("pool").join(name))? {
                self.notes.push(format!(
                    "Storage: {name}/ in WRENN_DIR is not the agent's and was left alone; the agent's is pool/{name}/."
                ));
            }
        }
        self.remove_half_made()
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// WRENN_DIR, free of symbolic links.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Plain sentences for people.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// 0 when the kernel does not tell, so that nothing is admitted on a guess.
    pub fn free_mib(&self) -> u64 {
        free_mib(&self.path).unwrap_or(0)
    }

    /// 0 when the kernel does not tell.
    pub fn total_mib(&self) -> u64 {
        rustix::fs::statvfs(&self.path).map_or(0, |fs| (fs.f_blocks * fs.f_frsize) >> 20)
    }

    /// Whether a device can be opened by a name in it.
    pub fn has_devices(&self) -> bool {
        use rustix::fs::StatVfsMountFlags;
        rustix::fs::statvfs(&self.path).is_ok_and(|fs| !fs.f_flag.contains(StatVfsMountFlags::NODEV))
    }

    /// Unmounts what the agent itself has mounted. Only when no sandbox is left. Repeatable.
    pub fn close(&self) -> Result<(), PoolError> {
        self.own.as_ref().map_or(Ok(()), OwnXfs::unmount)
    }
}

/// A symbolic link where operators look for the folder. False when something of theirs is there, which stays.
fn link(at: &Path, to: &Path) -> io::Result<bool> {
    if std::fs::read_link(at).is_ok_and(|present| present == to) {
        return Ok(true);
    }
    match std::fs::symlink_metadata(at) {
        Ok(meta) if meta.is_symlink() => durable::remove(at)?,
        // An empty directory says nothing.
        Ok(meta) if meta.is_dir() => match std::fs::remove_dir(at) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => return Ok(false),
            other => other?,
        },
        Ok(_) => return Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    std::os::unix::fs::symlink(to, at)?;
    Ok(true)
}

/// Tries it: no table of file systems knows how one was made.
fn can_reflink(dir: &Path) -> io::Result<bool> {
    let (from, to) = (dir.join(".reflink-probe.tmp"), dir.join(".reflink-probe-clone.tmp"));
    let probe = || -> io::Result<bool> {
        std::fs::write(&from, [1_u8; 4096])?;
        match rustix::fs::ioctl_ficlone(File::create(&to)?, File::open(&from)?) {
            Ok(()) => Ok(true),
            // What file systems without it say: unsupported, invalid, not a thing for this file, another device.
            Err(
                rustix::io::Errno::OPNOTSUPP
                | rustix::io::Errno::INVAL
                | rustix::io::Errno::NOTTY
                | rustix::io::Errno::XDEV
                | rustix::io::Errno::NOSYS,
            ) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    };
    let result = probe();
    durable::remove(&from)?;
    durable::remove(&to)?;
    result
}

fn free_mib(path: &Path) -> io::Result<u64> {
    let fs = rustix::fs::statvfs(path)?;
    Ok((fs.f_bavail * fs.f_frsize) >> 20)
}

/// The name of the file system that a path is on.
fn kind(path: &Path) -> String {
    let mounts = mounts::all().unwrap_or_default();
    let longest =
        mounts.iter().filter(|mount| path.starts_with(&mount.point)).max_by_key(|mount| mount.point.as_os_str().len());
    longest.map_or_else(|| "an unknown file system".to_owned(), |mount| mount.kind.clone())
}
