//! What is said of one directory entry.
//!
//! The type of a symbolic link is its target's, its permissions string says that it is a link, its target is fully resolved.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use api::guest::filesystem::{EntryInfo, FileType};
use buffa_types::google::protobuf::Timestamp;
use rustix::fs::{CWD, Mode, OFlags, readlinkat};

use super::metadata::Attributes;
use super::open;
use crate::users;

/// `shown` is the path as the caller asked for it, `path` where it is.
pub fn describe(path: &Path, shown: &Path) -> io::Result<EntryInfo> {
    describe_at(CWD, path, shown, &mut Owners::default())
}

/// The names that were looked up last: most entries of a listing have the same owner, and each look reads the guest's user files.
#[derive(Default)]
pub struct Owners {
    user: Option<(u32, String)>,
    group: Option<(u32, String)>,
}

impl Owners {
    fn name(last: &mut Option<(u32, String)>, id: u32, look_up: impl FnOnce(u32) -> String) -> String {
        match last {
            Some((known, name)) if *known == id => name.clone(),
            _ => last.insert((id, look_up(id))).1.clone(),
        }
    }
}

/// Looked at through a handle: all that is said is said of one and the same entry.
pub fn describe_at(at: impl AsFd, path: &Path, shown: &Path, owners: &mut Owners) -> io::Result<EntryInfo> {
    let entry = File::from(open::open_at(&at, path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())?);
    let own = entry.metadata()?;
    let is_link = own.file_type().is_symlink();
    let target =
        if is_link { open::open_at(&at, path, OFlags::PATH, Mode::empty()).ok().map(File::from) } else { None };
    let of_target = target.as_ref().and_then(|target| target.metadata().ok());
    let kind = match if is_link { of_target.as_ref() } else { Some(&own) } {
        Some(metadata) if metadata.is_dir() => FileType::FILE_TYPE_DIRECTORY,
        Some(metadata) if metadata.is_file() => FileType::FILE_TYPE_FILE,
        // A dangling link, a device, a socket.
        _ => FileType::FILE_TYPE_UNSPECIFIED,
    };
    let symlink_target = if is_link {
        let resolved = target.as_ref().and_then(|target| open::place_of(target).ok());
        let written = || Ok::<_, io::Error>(readlinkat(&entry, "", Vec::new())?.to_string_lossy().into_owned());
        Some(resolved.map_or_else(written, |place| Ok(place.to_string_lossy().into_owned()))?)
    } else {
        None
    };
    let metadata = match kind {
        FileType::FILE_TYPE_FILE => Attributes::at(&open::by_descriptor(target.as_ref().unwrap_or(&entry))).0,
        _ => Default::default(),
    };
    let mode_of = of_target.as_ref().unwrap_or(&own);
    Ok(EntryInfo {
        name: shown.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_else(|| "/".to_owned()),
        r#type: kind.into(),
        path: shown.to_string_lossy().into_owned(),
        size: i64::try_from(own.size()).unwrap_or(i64::MAX),
        mode: mode_of.mode() & 0o777,
        permissions: permissions(&own),
        owner: Owners::name(&mut owners.user, own.uid(), users::user_name),
        group: Owners::name(&mut owners.group, own.gid(), users::group_name),
        modified_time: Timestamp {
            seconds: own.mtime(),
            nanos: i32::try_from(own.mtime_nsec()).unwrap_or(0),
            ..Default::default()
        }
        .into(),
        symlink_target,
        metadata: metadata.into_iter().collect(),
        is_symlink: is_link,
        ..Default::default()
    })
}

/// As Go prints file modes: `-rw-r--r--`, `drwxr-xr-x`, `Lrwxrwxrwx`, `Srwxr-xr-x`, `Dcrw-rw----`, `dtrwxrwxrwx`.
fn permissions(metadata: &Metadata) -> String {
    let mode = metadata.mode();
    let mut kind = String::new();
    match mode & libc::S_IFMT {
        libc::S_IFDIR => kind.push('d'),
        libc::S_IFLNK => kind.push('L'),
        libc::S_IFSOCK => kind.push('S'),
        libc::S_IFIFO => kind.push('p'),
        libc::S_IFBLK => kind.push('D'),
        libc::S_IFCHR => kind.push_str("Dc"),
        _ => {}
    }
    for (bit, letter) in [(libc::S_ISUID, 'u'), (libc::S_ISGID, 'g'), (libc::S_ISVTX, 't')] {
        if mode & bit != 0 {
            kind.push(letter);
        }
    }
    if kind.is_empty() {
        kind.push('-');
    }
    let bits =
        (0..9).rev().zip("rwxrwxrwx".chars()).map(|(bit, letter)| if mode >> bit & 1 == 1 { letter } else { '-' });
    kind.extend(bits);
    kind
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn entries_say_what_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "12345").unwrap();
        fs::set_permissions(at("file"), fs::Permissions::from_mode(0o640)).unwrap();
        fs::create_dir(at("folder")).unwrap();
        fs::set_permissions(at("folder"), fs::Permissions::from_mode(0o1777)).unwrap();
        symlink("file", at("link")).unwrap();
        symlink("folder", at("folder-link")).unwrap();
        symlink("nowhere", at("dangling")).unwrap();
        for (name, kind, permissions, mode) in [
            ("file", FileType::FILE_TYPE_FILE, "-rw-r-----", 0o640),
            ("folder", FileType::FILE_TYPE_DIRECTORY, "dtrwxrwxrwx", 0o777),
            ("link", FileType::FILE_TYPE_FILE, "Lrwxrwxrwx", 0o640),
            ("folder-link", FileType::FILE_TYPE_DIRECTORY, "Lrwxrwxrwx", 0o777),
            ("dangling", FileType::FILE_TYPE_UNSPECIFIED, "Lrwxrwxrwx", 0o777),
        ] {
            let entry = describe(&at(name), &at(name)).unwrap();
            assert_eq!((entry.name.as_str(), entry.permissions.as_str(), entry.mode), (name, permissions, mode));
            assert_eq!(entry.r#type.as_known(), Some(kind), "{name}");
        }
        let link = describe(&at("link"), Path::new("shown/link")).unwrap();
        assert_eq!(link.symlink_target.as_deref(), fs::canonicalize(at("file")).unwrap().to_str());
        assert_eq!(link.path, "shown/link");
        assert!(link.is_symlink && !describe(&at("file"), &at("file")).unwrap().is_symlink);
        let dangling = describe(&at("dangling"), &at("dangling")).unwrap();
        assert_eq!(dangling.symlink_target.as_deref(), Some("nowhere"));
        assert!(describe(&at("missing"), &at("missing")).is_err());
    }
}
