//! Moving between file systems, where a rename cannot: a copy beside the destination, then two renames, then the old one is removed.
//!
//! Nothing is seen half: the copy has a hidden name until it is whole, and so has what is being removed. Whatever fails before the last
//! rename leaves the source as it was. What a copy cannot be (devices, sockets, FIFOs) is refused before anything has moved.

use std::ffi::{CStr, OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, fchown};
use std::path::Path;

use rustix::fs::{Access, AtFlags, Dir, Mode, OFlags, Timespec, Timestamps};
use rustix::io::Errno;

use super::open;
use super::temporary::Kind;

/// Deeper trees are not moved: each level holds two open directories.
const DEPTH_MAX: usize = 200;

#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error("only files, directories and links can be moved to another file system")]
    Special,
    #[error("the tree is deeper than {DEPTH_MAX} levels")]
    Deep,
}

/// Replaces the destination as a rename would: a file by anything but a directory, an empty directory by a directory.
pub fn between_file_systems(from: &Path, to: &Path) -> io::Result<()> {
    let (from_dir, from_name) = parent_and_name(from)?;
    let (to_dir, to_name) = parent_and_name(to)?;
    let is_dir = fs::symlink_metadata(from)?.is_dir();
    match fs::symlink_metadata(to) {
        Ok(there) if there.is_dir() && !is_dir => return Err(io::Error::from_raw_os_error(libc::EISDIR)),
        Ok(there) if !there.is_dir() && is_dir => return Err(io::Error::from_raw_os_error(libc::ENOTDIR)),
        Ok(there) if there.is_dir() && fs::read_dir(to)?.next().is_some() => {
            return Err(io::Error::from_raw_os_error(libc::ENOTEMPTY));
        }
        _ => {}
    }
    let copied = Kind::New.with_free_name(|name| {
        let copied = copy(from_dir.as_fd(), from_name, to_dir.as_fd(), name, 0);
        if copied.as_ref().is_err_and(|e| e.kind() != io::ErrorKind::AlreadyExists) {
            remove(to_dir.as_fd(), name);
        }
        copied
    });
    let (copy, ()) = copied?;
    let left = Kind::Leaving.with_free_name(|name| {
        Ok(rustix::fs::renameat_with(&from_dir, from_name, &from_dir, name, rustix::fs::RenameFlags::NOREPLACE)?)
    });
    let left = match left {
        Ok((name, ())) => name,
        Err(e) => {
            remove(to_dir.as_fd(), &copy);
            return Err(e);
        }
    };
    if let Err(e) = rustix::fs::renameat(&to_dir, &copy, &to_dir, to_name) {
        // Back to its name, which has been free for a moment.
        let back = rustix::fs::renameat(&from_dir, &left, &from_dir, from_name);
        remove(to_dir.as_fd(), &copy);
        back?;
        return Err(e.into());
    }
    remove(from_dir.as_fd(), &left);
    Ok(())
}

fn parent_and_name(path: &Path) -> io::Result<(OwnedFd, &OsStr)> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    Ok((open::open(parent, OFlags::PATH | OFlags::DIRECTORY)?, name))
}

/// Best effort: what is left over is hidden, and there is nobody to tell.
fn remove(dir: BorrowedFd<'_>, name: &OsStr) {
    let removed = match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => fs::remove_dir_all(open::by_descriptor(dir).join(name)),
        Err(Errno::NOENT) => Ok(()),
        removed => removed.map_err(Into::into),
    };
    if let Err(e) = removed {
        eprintln!("envd: remove what a move has left: {e}");
    }
}

fn copy(from: BorrowedFd<'_>, name: &OsStr, to: BorrowedFd<'_>, new_name: &OsStr, depth: usize) -> io::Result<()> {
    if depth > DEPTH_MAX {
        return Err(io::Error::other(Refused::Deep));
    }
    // Looked at through a handle, so that what is copied is what was looked at.
    let looked = File::from(open::open_at(from, Path::new(name), OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())?);
    let metadata = looked.metadata()?;
    let kind = metadata.file_type();
    if kind.is_symlink() {
        let target = rustix::fs::readlinkat(&looked, "", Vec::new())?;
        rustix::fs::symlinkat(&target, to, new_name)?;
        rustix::fs::chownat(to, new_name, uid(&metadata), gid(&metadata), AtFlags::SYMLINK_NOFOLLOW).or_else(own)?;
    } else if kind.is_file() {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let mut source = File::from(open::open_at(from, Path::new(name), flags, Mode::empty())?);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let mut copied = File::from(open::open_at(to, Path::new(new_name), flags, Mode::from_raw_mode(0o600))?);
        io::copy(&mut source, &mut copied)?;
        finish(&source, &copied, &metadata)?;
    } else if kind.is_dir() {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        let source = open::open_at(from, Path::new(name), flags, Mode::empty())?;
        rustix::fs::mkdirat(to, new_name, Mode::from_raw_mode(0o700))?;
        let copied = open::open_at(to, Path::new(new_name), flags, Mode::empty())?;
        let names = names_in(source.as_fd())?;
        if !names.is_empty() {
            // In the end they are removed from here; that it is forbidden must not turn out then.
            rustix::fs::accessat(&source, ".", Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS)?;
        }
        for name in names {
            copy(source.as_fd(), &name, copied.as_fd(), &name, depth + 1)?;
        }
        finish(&File::from(source), &File::from(copied), &metadata)?;
    } else {
        return Err(io::Error::other(Refused::Special));
    }
    Ok(())
}

/// Owner, attributes, mode and time, in an order in which none undoes another.
fn finish(source: &File, copied: &File, metadata: &fs::Metadata) -> io::Result<()> {
    let made = copied.metadata()?;
    if (made.uid(), made.gid()) != (metadata.uid(), metadata.gid()) {
        match fchown(copied, Some(metadata.uid()), Some(metadata.gid())) {
            // A user may not give files away: the copy is his own, as with mv(1).
            Err(e) if e.raw_os_error() != Some(libc::EPERM) => return Err(e),
            _ => {}
        }
    }
    copy_attributes(source, copied)?;
    copied.set_permissions(fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
    let times = Timestamps {
        last_access: Timespec { tv_sec: metadata.atime(), tv_nsec: metadata.atime_nsec() },
        last_modification: Timespec { tv_sec: metadata.mtime(), tv_nsec: metadata.mtime_nsec() },
    };
    Ok(rustix::fs::futimens(copied, &times)?)
}

/// Where both file systems keep them.
fn copy_attributes(source: &File, copied: &File) -> io::Result<()> {
    const BYTES_MAX: usize = 64 * 1024;
    let mut list = Vec::with_capacity(BYTES_MAX);
    if rustix::fs::flistxattr(source, rustix::buffer::spare_capacity(&mut list)).is_err() {
        return Ok(());
    }
    for name in list.split(|byte| *byte == 0).filter(|name| name.starts_with(b"user.")) {
        let mut value = Vec::with_capacity(BYTES_MAX);
        rustix::fs::fgetxattr(source, name, rustix::buffer::spare_capacity(&mut value))?;
        match rustix::fs::fsetxattr(copied, name, &value, rustix::fs::XattrFlags::empty()) {
            Err(Errno::NOTSUP) => return Ok(()),
            set => set?,
        }
    }
    Ok(())
}

fn names_in(dir: BorrowedFd<'_>) -> io::Result<Vec<OsString>> {
    let is_real = |name: &CStr| !matches!(name.to_bytes(), b"." | b"..");
    let names = Dir::read_from(dir)?.map(|entry| entry.map(|entry| entry.file_name().to_owned()));
    let real = names.filter(|name| name.as_ref().map_or(true, |name| is_real(name)));
    Ok(real.map(|name| name.map(|name| OsStr::from_bytes(name.to_bytes()).to_owned())).collect::<Result<_, _>>()?)
}

fn uid(metadata: &fs::Metadata) -> Option<rustix::fs::Uid> {
    Some(rustix::fs::Uid::from_raw(metadata.uid()))
}

fn gid(metadata: &fs::Metadata) -> Option<rustix::fs::Gid> {
    Some(rustix::fs::Gid::from_raw(metadata.gid()))
}

fn own(error: Errno) -> Result<(), Errno> {
    if error == Errno::PERM { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// The same file system will do: nothing here asks.
    #[test]
    fn a_tree_arrives_as_it_was_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let names = || {
            let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        fs::create_dir_all(at("tree/sub")).unwrap();
        fs::write(at("tree/sub/file"), "content").unwrap();
        fs::set_permissions(at("tree/sub/file"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::set_permissions(at("tree/sub"), fs::Permissions::from_mode(0o700)).unwrap();
        symlink("nowhere", at("tree/link")).unwrap();
        let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
        File::open(at("tree/sub/file")).unwrap().set_modified(old).unwrap();
        between_file_systems(&at("tree"), &at("moved")).unwrap();
        assert_eq!(names(), ["moved"]);
        let file = fs::metadata(at("moved/sub/file")).unwrap();
        assert_eq!((file.mode() & 0o7777, file.modified().unwrap()), (0o4751, old));
        assert_eq!(fs::metadata(at("moved/sub")).unwrap().mode() & 0o7777, 0o700);
        assert_eq!(fs::read_link(at("moved/link")).unwrap(), Path::new("nowhere"));
        assert_eq!(fs::read(at("moved/sub/file")).unwrap(), b"content");

        nix::unistd::mkfifo(&at("moved/sub/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(between_file_systems(&at("moved"), &at("again")).is_err());
        assert_eq!(names(), ["moved"]);
        fs::create_dir_all(at("full/x")).unwrap();
        fs::write(at("plain"), "new").unwrap();
        for (from, to, refused) in [
            ("plain", "full", libc::EISDIR),
            ("full", "plain", libc::ENOTDIR),
            ("full", "moved", libc::ENOTEMPTY),
            ("none", "x", libc::ENOENT),
        ] {
            let error = between_file_systems(&at(from), &at(to)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(refused), "{from} to {to}");
        }
        fs::write(at("target"), "old").unwrap();
        between_file_systems(&at("plain"), &at("target")).unwrap();
        assert_eq!((names().len(), fs::read(at("target")).unwrap()), (3, b"new".to_vec()));
    }
}
