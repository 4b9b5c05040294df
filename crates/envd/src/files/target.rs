//! Where an upload goes: beside its place under a hidden name until it is whole, or into what is there where a rename would break something.
//!
//! A rename makes a new inode. What hangs on the old one would be lost, so these are written in place, as any program would: a file with
//! several names, somebody else's file, one with attributes that are not ours to copy, a device; and a file in a directory that does not
//! let its user make or rename one (not writable, sticky, the file a mount point). A link stays and its target is written.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, fchown};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, readlinkat};
use rustix::io::Errno;

use crate::filesystem::metadata::Attributes;
use crate::filesystem::open;
use crate::filesystem::temporary::{Kind, Temporary};
use crate::users::Account;

const NEW_FILE_MODE: u32 = 0o644;
/// As many as the kernel follows in one path.
const LINKS_MAX: usize = 40;

pub struct Target {
    file: File,
    place: Place,
    /// `None` when the place itself is written.
    beside: Option<Temporary>,
}

impl Target {
    /// To be called with the account's rights to files.
    pub fn open(account: &Account, path: &Path, attributes: &Attributes) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let place = Place::of(path)?;
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        // Replacing needs the right to write the file, not just its directory.
        let there = match open::open_at(&place.dir, Path::new(&place.name), flags, Mode::empty()) {
            Ok(there) => File::from(there),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Self::beside(account, place, None, attributes),
            Err(e) => return Err(e),
        };
        let metadata = there.metadata()?;
        if metadata.is_dir() {
            return Err(io::Error::from_raw_os_error(libc::EISDIR));
        }
        if metadata.file_type().is_fifo() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let his_own = account.uid == 0 || account.uid == metadata.uid();
        if metadata.is_file() && metadata.nlink() == 1 && his_own && Attributes::are_all_ours(&there) {
            match Self::beside(account, place.clone(), Some(&metadata), attributes) {
                Err(e) if forbids(&e) => {}
                made => return made,
            }
        }
        Self::in_place(there, place, attributes)
    }

    /// With the mode and owner of what is there.
    fn beside(
        account: &Account,
        place: Place,
        there: Option<&fs::Metadata>,
        attributes: &Attributes,
    ) -> io::Result<Self> {
        let kind = if there.is_some() { Kind::Replacing } else { Kind::New };
        let mode = there.map_or(NEW_FILE_MODE, |there| there.mode() & 0o777);
        // Readable too, for the case that it has to be copied in the end.
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let (name, file) = kind.with_free_name(|name| {
            open::open_at(&place.dir, Path::new(name), flags, Mode::from_raw_mode(mode)).map(File::from)
        })?;
        let beside = Temporary::new(account, place.dir.clone(), name);
        if let Some(there) = there {
            let made = file.metadata()?;
            if (made.uid(), made.gid()) != (there.uid(), there.gid()) {
                fchown(&file, Some(there.uid()), Some(there.gid()))?;
            }
            file.set_permissions(fs::Permissions::from_mode(there.mode() & 0o7777))?;
        }
        attributes.add_to(&file)?;
        Ok(Self { file, place, beside: Some(beside) })
    }

    fn in_place(file: File, place: Place, attributes: &Attributes) -> io::Result<Self> {
        if file.metadata()?.is_file() {
            // First what may be refused: then the content is still whole.
            attributes.replace_on(&file)?;
            file.set_len(0)?;
        }
        Ok(Self { file, place, beside: None })
    }

    /// The same open file, to write with.
    pub fn writer(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// The whole content has been written: now it is what one finds under the path. With the account's rights again.
    pub fn commit(mut self, durably: bool) -> io::Result<()> {
        if durably {
            self.file.sync_all()?;
        }
        let Some(beside) = &mut self.beside else { return Ok(()) };
        match beside.rename(&self.place.name) {
            Ok(()) => {}
            Err(e) if forbids(&e) => self.copy_into_place(durably)?,
            Err(e) => return Err(e),
        }
        if durably { self.place.sync() } else { Ok(()) }
    }

    /// The place turned out to be a mount point or another's: what is there is overwritten.
    fn copy_into_place(&mut self, durably: bool) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let mut there = File::from(open::open_at(&self.place.dir, Path::new(&self.place.name), flags, Mode::empty())?);
        if !there.metadata()?.is_file() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Attributes::of(&self.file).replace_on(&there)?;
        there.set_len(0)?;
        io::Seek::rewind(&mut self.file)?;
        io::copy(&mut self.file, &mut there)?;
        if durably { there.sync_all() } else { Ok(()) }
    }
}

/// What a directory answers that does not let its user make or rename a file, and a mount point.
fn forbids(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EBUSY | libc::EROFS))
}

/// A name in an open directory: what happens to the path above it meanwhile does not matter.
#[derive(Clone)]
struct Place {
    dir: Arc<OwnedFd>,
    name: OsString,
}

impl Place {
    /// Through links, as an editor would; also through the last one to nothing, whose target is to be made.
    fn of(path: &Path) -> io::Result<Self> {
        let mut path = path.to_owned();
        for _ in 0..LINKS_MAX {
            let name = path.file_name().ok_or_else(|| io::Error::from_raw_os_error(libc::EISDIR))?.to_owned();
            let parent = path.parent().unwrap_or(Path::new("/"));
            let dir = open::open(parent, OFlags::PATH | OFlags::DIRECTORY)?;
            let target = match readlinkat(&dir, &name, Vec::new()) {
                Err(Errno::INVAL | Errno::NOENT) => return Ok(Self { dir: Arc::new(dir), name }),
                target => target?,
            };
            // The kernel does not follow every link (sticky directories: proc_sys_fs(5), protected_symlinks).
            match open::open_at(dir.as_fd(), Path::new(&name), OFlags::PATH, Mode::empty()) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => path = parent.join(Path::new(OsStr::from_bytes(target.to_bytes()))),
            }
        }
        Err(io::Error::from_raw_os_error(libc::ELOOP))
    }

    fn sync(&self) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        match open::open_at(&self.dir, Path::new("."), flags, Mode::empty()) {
            Ok(dir) => Ok(rustix::fs::fsync(dir)?),
            // A directory that may be written and not read cannot be asked for.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            Err(e) => Err(e),
        }
    }
}
