//! What users note about their files: extended attributes `user.e2b.<key>`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;

use http::HeaderMap;
use rustix::fs::{XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr, getxattr, listxattr};
use rustix::io::Errno;

/// Header of an upload that names a key.
const HEADER_PREFIX: &str = "x-metadata-";
const XATTR_PREFIX: &str = "user.e2b.";
/// The longest name of an extended attribute is 255 bytes.
const KEY_BYTES_MAX: usize = 255 - XATTR_PREFIX.len();
/// Keys and values of one file: what every file system has room for.
const ALL_BYTES_MAX: usize = 4096;
/// The kernel's own limits of a list of names and of a value (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const XATTR_BYTES_MAX: usize = 64 * 1024;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes(pub BTreeMap<String, String>);

impl Attributes {
    /// An error is a text for the caller.
    pub fn of_upload(headers: &HeaderMap) -> Result<Self, String> {
        let mut all = BTreeMap::new();
        for (name, value) in headers {
            // Header names are lower case here whatever was sent.
            let Some(key) = name.as_str().strip_prefix(HEADER_PREFIX) else { continue };
            if key.is_empty() || key.len() > KEY_BYTES_MAX {
                return Err(format!("a metadata key must have 1 to {KEY_BYTES_MAX} bytes"));
            }
            let printable = value.as_bytes().iter().all(|byte| matches!(byte, b' '..=b'~'));
            let value = value.to_str().ok().filter(|_| printable);
            let value = value.ok_or_else(|| format!("the metadata value of '{key}' must be printable ASCII"))?;
            if all.insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(format!("the metadata key '{key}' is given twice"));
            }
        }
        let bytes: usize = all.iter().map(|(key, value)| key.len() + value.len()).sum();
        if bytes > ALL_BYTES_MAX {
            return Err(format!("metadata of more than {ALL_BYTES_MAX} bytes"));
        }
        Ok(Self(all))
    }

    /// None where the file system keeps none, or where they may not be read.
    pub fn of(file: &File) -> Self {
        let mut list = Vec::with_capacity(XATTR_BYTES_MAX);
        let list = match flistxattr(file, rustix::buffer::spare_capacity(&mut list)) {
            Ok(_) => list,
            Err(_) => return Self::default(),
        };
        Self::collect(&list, |name, value| fgetxattr(file, name, value))
    }

    pub fn at(path: &Path) -> Self {
        // Most files have none, and then this is all there is to do.
        let length = rustix::fs::listxattr_query(path).unwrap_or(0);
        if length == 0 {
            return Self::default();
        }
        let mut list = Vec::with_capacity(length);
        match listxattr(path, rustix::buffer::spare_capacity(&mut list)) {
            Ok(_) => Self::collect(&list, |name, value| getxattr(path, name, value)),
            Err(_) => Self::default(),
        }
    }

    fn collect(list: &[u8], read: impl Fn(&str, &mut [u8]) -> Result<usize, Errno>) -> Self {
        let all = keys(list).filter_map(|key| {
            let mut value = vec![0; ALL_BYTES_MAX];
            let length = read(&format!("{XATTR_PREFIX}{key}"), &mut value).ok()?;
            Some((key.to_owned(), String::from_utf8_lossy(&value[..length]).into_owned()))
        });
        Self(all.collect())
    }

    /// Whether nothing would be lost with the file's attributes but what an upload replaces anyway.
    pub fn are_all_ours(file: &File) -> bool {
        let mut list = Vec::with_capacity(XATTR_BYTES_MAX);
        match flistxattr(file, rustix::buffer::spare_capacity(&mut list)) {
            // A label is given to every new file by the same rules.
            Ok(_) => names(&list).all(|name| name.starts_with(XATTR_PREFIX) || name == "security.selinux"),
            Err(Errno::NOTSUP) => true,
            Err(_) => false,
        }
    }

    /// To a file that has none.
    pub fn add_to(&self, file: &File) -> io::Result<()> {
        for (key, value) in &self.0 {
            fsetxattr(file, format!("{XATTR_PREFIX}{key}"), value.as_bytes(), XattrFlags::empty())?;
        }
        Ok(())
    }

    pub fn replace_on(&self, file: &File) -> io::Result<()> {
        let mut list = Vec::with_capacity(XATTR_BYTES_MAX);
        if flistxattr(file, rustix::buffer::spare_capacity(&mut list)).is_ok() {
            for key in keys(&list).filter(|key| !self.0.contains_key(*key)) {
                fremovexattr(file, format!("{XATTR_PREFIX}{key}"))?;
            }
        }
        self.add_to(file)
    }
}

fn names(list: &[u8]) -> impl Iterator<Item = &str> {
    list.split(|byte| *byte == 0).filter(|name| !name.is_empty()).map(|name| std::str::from_utf8(name).unwrap_or("?"))
}

fn keys(list: &[u8]) -> impl Iterator<Item = &str> {
    names(list).filter_map(|name| name.strip_prefix(XATTR_PREFIX)).filter(|key| !key.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(all: &[(&str, &str)]) -> HeaderMap {
        all.iter().map(|(name, value)| (name.parse::<http::HeaderName>().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn headers_are_attributes() {
        let sent = headers(&[("X-Metadata-Author", "me"), ("x-metadata-empty", ""), ("x-other", "no")]);
        let read = Attributes::of_upload(&sent).unwrap();
        assert_eq!(read.0, BTreeMap::from([("author".into(), "me".into()), ("empty".into(), String::new())]));
        let long = "k".repeat(KEY_BYTES_MAX + 1);
        for bad in [
            headers(&[("x-metadata-", "x")]),
            headers(&[(&format!("x-metadata-{long}"), "x")]),
            headers(&[("x-metadata-a", "a\tb")]),
            headers(&[("x-metadata-a", &"v".repeat(ALL_BYTES_MAX))]),
        ] {
            assert!(Attributes::of_upload(&bad).is_err(), "{bad:?}");
        }
        let mut twice = headers(&[("x-metadata-a", "1")]);
        twice.append("x-metadata-a", "2".parse().unwrap());
        assert!(Attributes::of_upload(&twice).is_err());
    }

    #[test]
    fn a_file_keeps_only_the_last_ones() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let some = |all: &[(&str, &str)]| {
            Attributes(all.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
        };
        some(&[("a", "1"), ("b", "2")]).add_to(file.as_file()).unwrap();
        assert!(Attributes::are_all_ours(file.as_file()));
        some(&[("b", "3"), ("c", "")]).replace_on(file.as_file()).unwrap();
        assert_eq!(Attributes::at(file.path()), some(&[("b", "3"), ("c", "")]));
        assert_eq!(Attributes::of(file.as_file()), Attributes::at(file.path()));
        fsetxattr(file.as_file(), "user.other", b"x", XattrFlags::empty()).unwrap();
        assert!(!Attributes::are_all_ours(file.as_file()));
        assert_eq!(Attributes::at(file.path()), some(&[("b", "3"), ("c", "")]));
        Attributes::default().replace_on(file.as_file()).unwrap();
        assert_eq!(Attributes::at(file.path()), Attributes::default());
    }
}
