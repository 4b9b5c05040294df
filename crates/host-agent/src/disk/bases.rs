//! Bases: pristine root file systems in the pool, named by content and size, and the disks that are cloned from them.
//!
//! A template is published by exchanging its whole folder, so the folder is opened once and everything is read through it: digest and
//! image are of the same edition. A base by its right name is whole and synced; a clone of one costs no data.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::Duration;

use model::shape::TemplateName;
use rustix::fs::{Mode, OFlags, SeekFrom, openat};
use tracing::info;

use super::drivers::DiskDriver;
use super::{Pool, device_mapper};
use crate::durable;
use crate::tool::{self, ToolError};

/// In the pool.
pub(super) const FOLDER: &str = "images";
const DIGEST_BYTES_MAX: u64 = 256;
/// Resizing writes metadata only, but shrinking may move the template's files: a gigabyte or two on a slow disk.
const RESIZE_LIMIT: Duration = Duration::from_secs(300);
const COPY_CHUNK: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("there is no template {0} on this host")]
    NoTemplate(TemplateName),
    #[error("the template {template} does not fit into {mib} MiB of disk")]
    TooSmall {
        template: TemplateName,
        mib: u32,
        #[source]
        cause: ToolError,
    },
    #[error("the template {template} is damaged")]
    Damaged {
        template: TemplateName,
        #[source]
        cause: ToolError,
    },
    #[error("make the base of template {template}")]
    Base {
        template: TemplateName,
        #[source]
        cause: io::Error,
    },
    #[error("clone a disk")]
    Clone(#[source] io::Error),
}

impl DiskError {
    pub fn is_full(&self) -> bool {
        let full =
            |cause: &io::Error| matches!(cause.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        match self {
            Self::Base { cause, .. } | Self::Clone(cause) => full(cause),
            Self::TooSmall { cause, .. } | Self::Damaged { cause, .. } => {
                cause.to_string().contains("No space left on device")
            }
            Self::NoTemplate(_) => false,
        }
    }
}

/// What disks are made of. Held open, so that it may be removed meanwhile.
pub struct Base {
    /// Of its file in the pool.
    pub name: String,
    pub file: File,
}

/// One edition of a template, held open.
struct Edition {
    digest: String,
    rootfs: File,
}

impl Pool {
    /// A disk for one sandbox: the template's root file system, so many MiB large, the uid's own. Made anew each time.
    pub fn make_disk(
        &self,
        driver: &dyn DiskDriver,
        template: &TemplateName,
        mib: u32,
        disk: &Path,
        uid: u32,
    ) -> Result<(), DiskError> {
        let base = self.base(template, mib)?;
        driver.create(&base, disk, uid).map_err(|cause| {
            // Half a disk is nobody's.
            let _ = durable::remove(disk);
            DiskError::Clone(cause)
        })
    }

    /// The digest of what is published under this name now.
    pub fn edition(&self, template: &TemplateName) -> io::Result<Option<String>> {
        Ok(edition(&self.dir, template)?.map(|edition| edition.digest))
    }

    /// What `make_disk` of this kind clones. Repeatable.
    pub fn make_base(&self, template: &TemplateName, mib: u32) -> Result<(), DiskError> {
        self.base(template, mib).map(drop)
    }

    /// What a disk of this kind was cloned from, if it is still there.
    pub fn open_base(&self, template: &TemplateName, mib: u32) -> io::Result<Option<File>> {
        let Some(edition) = edition(&self.dir, template)? else { return Ok(None) };
        let (_, wanted) = self.place_of(&edition, mib)?;
        open_if_there(&wanted)
    }

    /// Of the edition as it was published, and of the one with a disk of this size: the same where it has that size already.
    fn place_of(&self, edition: &Edition, mib: u32) -> io::Result<(PathBuf, PathBuf)> {
        let place = |name: String| self.path.join(FOLDER).join(name);
        let pristine = place(format!("{}.ext4", edition.digest));
        let as_published = edition.rootfs.metadata()?.len() == u64::from(mib) << 20;
        let wanted = if as_published { pristine.clone() } else { place(format!("{}-{mib}.ext4", edition.digest)) };
        Ok((pristine, wanted))
    }

    /// Removes bases of editions that are no longer published. Clones do not need them; what device-mapper keeps beside one does. How many
    /// there were.
    pub fn remove_unused_bases(&self) -> io::Result<usize> {
        let _turn = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept = BTreeSet::new();
        let templates = match std::fs::read_dir(self.dir.join("images")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            other => other?,
        };
        for name in templates {
            let name = name?.file_name();
            let Some(name) = name.to_str().and_then(|name| name.parse::<TemplateName>().ok()) else { continue };
            if let Some(edition) = edition(&self.dir, &name)? {
                kept.insert(edition.digest);
            }
        }
        let in_use = device_mapper::bases_in_use(&self.path)?;
        let mut removed = 0;
        for entry in std::fs::read_dir(self.path.join(FOLDER))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let digest = name.trim_end_matches(".ext4").split('-').next().unwrap_or_default();
            if name.ends_with(".ext4") && !kept.contains(digest) && !in_use.contains(&name) {
                durable::remove(&entry.path())?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// What makers that died were writing.
    pub(super) fn remove_half_made(&self) -> io::Result<()> {
        for entry in std::fs::read_dir(self.path.join(FOLDER))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "tmp") {
                durable::remove(&path)?;
            }
        }
        Ok(())
    }

    fn base(&self, template: &TemplateName, mib: u32) -> Result<Base, DiskError> {
        let failed = |cause| DiskError::Base { template: template.clone(), cause };
        let edition =
            edition(&self.dir, template).map_err(failed)?.ok_or_else(|| DiskError::NoTemplate(template.clone()))?;
        let (pristine, wanted) = self.place_of(&edition, mib).map_err(failed)?;
        let named = |file| Base { name: wanted.file_name().unwrap_or_default().to_string_lossy().into_owned(), file };
        if let Some(base) = open_if_there(&wanted).map_err(failed)? {
            return Ok(named(base));
        }
        let _turn = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(base) = open_if_there(&wanted).map_err(failed)? {
            return Ok(named(base));
        }
        let begin = std::time::Instant::now();
        if !pristine.exists() {
            self.publish(&pristine, |new, _| copy(&edition.rootfs, new).map_err(failed)).map_err(|e| e.or(failed))?;
        }
        if pristine != wanted {
            let pristine = File::open(&pristine).map_err(failed)?;
            self.publish(&wanted, |new, path| resize(template, &pristine, new, path, mib)).map_err(|e| e.or(failed))?;
        }
        info!(duration_ms = begin.elapsed().as_millis(), "made the base of template {template} with {mib} MiB");
        File::open(&wanted).map(named).map_err(failed)
    }

    /// A file that has its right name only when it is whole and synced.
    fn publish(&self, path: &Path, fill: impl FnOnce(&File, &Path) -> Result<(), DiskError>) -> Result<(), Publish> {
        let mut name = path.file_name().expect("bases have names").to_owned();
        name.push(durable::TEMPORARY_SUFFIX);
        let temporary = path.with_file_name(name);
        let made = || -> Result<(), Publish> {
            durable::remove(&temporary)?;
            let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&temporary)?;
            fill(&file, &temporary).map_err(Publish::Fill)?;
            file.sync_all()?;
            std::fs::rename(&temporary, path)?;
            Ok(durable::sync_directory(&self.path.join(FOLDER))?)
        };
        let made = made();
        if made.is_err() {
            let _ = durable::remove(&temporary);
        }
        made
    }
}

enum Publish {
    Io(io::Error),
    Fill(DiskError),
}

impl From<io::Error> for Publish {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Publish {
    fn or(self, failed: impl FnOnce(io::Error) -> DiskError) -> DiskError {
        match self {
            Self::Io(cause) => failed(cause),
            Self::Fill(error) => error,
        }
    }
}

/// None when there is no such template.
fn edition(dir: &Path, template: &TemplateName) -> io::Result<Option<Edition>> {
    let folder = match File::open(dir.join("images").join(template.as_str())) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let open = |name: &str| -> io::Result<Option<File>> {
        match openat(&folder, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(None),
            other => Ok(Some(File::from(other?))),
        }
    };
    let Some(rootfs) = open("rootfs.ext4")? else { return Ok(None) };
    let mut digest = String::new();
    if let Some(file) = open("digest")? {
        file.take(DIGEST_BYTES_MAX).read_to_string(&mut digest)?;
    }
    let digest = digest.trim().trim_start_matches("sha256:").trim_start_matches("blake3:").to_owned();
    let is_name = (32..=128).contains(&digest.len()) && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
    let digest = if is_name { digest } else { stand_in(&rootfs)? };
    Ok(Some(Edition { digest, rootfs }))
}

/// For an image that somebody put there by hand: what changes when the file does, because reading gigabytes would take too long.
fn stand_in(rootfs: &File) -> io::Result<String> {
    let meta = rootfs.metadata()?;
    let facts = format!("{} {} {} {} {}", meta.dev(), meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec());
    Ok(blake3::hash(facts.as_bytes()).to_hex().to_string())
}

fn open_if_there(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// A new file that shares all data with the base.
pub(crate) fn clone(base: &File, disk: &Path, uid: u32) -> io::Result<()> {
    durable::remove(disk)?;
    let file = File::options().write(true).create_new(true).mode(0o600).open(disk)?;
    rustix::fs::ioctl_ficlone(&file, base)?;
    std::os::unix::fs::fchown(&file, Some(uid), Some(uid))
}

/// By reflink where both lie on one file system, else what is written of it, hole by hole.
fn copy(from: &File, to: &File) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut from = from.try_clone()?;
    from.rewind()?;
    let mut chunk = vec![0; COPY_CHUNK];
    let mut at = 0;
    while at < length {
        let data = match rustix::fs::seek(&from, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole up to the end.
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        let end = rustix::fs::seek(&from, SeekFrom::Hole(data))?;
        at = data;
        while at < end {
            let want = usize::try_from(end - at).unwrap_or(COPY_CHUNK).min(COPY_CHUNK);
            let read = from.read_at(&mut chunk[..want], at)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            to.write_all_at(&chunk[..read], at)?;
            at += u64::try_from(read).expect("a chunk is small");
        }
    }
    Ok(())
}

/// Grows or shrinks the file system of a copy of the pristine image.
fn resize(template: &TemplateName, pristine: &File, new: &File, path: &Path, mib: u32) -> Result<(), DiskError> {
    let failed = |cause| DiskError::Base { template: template.clone(), cause };
    let bytes = u64::from(mib) << 20;
    rustix::fs::ioctl_ficlone(new, pristine).map_err(|errno| failed(errno.into()))?;
    let name = path.to_str().ok_or_else(|| failed(io::Error::other("the path is not UTF-8")))?;
    // 1: something small was put right, which is as good.
    tool::run_within("e2fsck", &["-f", "-y", name], "", RESIZE_LIMIT, &[0, 1])
        .map_err(|cause| DiskError::Damaged { template: template.clone(), cause })?;
    if new.metadata().map_err(failed)?.len() < bytes {
        new.set_len(bytes).map_err(failed)?;
    }
    tool::run_within("resize2fs", &[name, &format!("{mib}M")], "", RESIZE_LIMIT, &[0])
        .map_err(|cause| DiskError::TooSmall { template: template.clone(), mib, cause })?;
    new.set_len(bytes).map_err(failed)
}
