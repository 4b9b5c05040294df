//! What is mounted where: read from the kernel each time, never remembered.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// One line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `major:minor` of what is mounted.
    pub device: String,
    /// Which part of it.
    pub root: PathBuf,
    pub point: PathBuf,
    pub kind: String,
    /// `rw,relatime,cpu` and the like, of the file system itself.
    pub options: String,
}

pub fn all() -> io::Result<Vec<Mount>> {
    Ok(std::fs::read_to_string("/proc/self/mountinfo")?.lines().filter_map(parse).collect())
}

/// The topmost mount exactly at a path.
pub fn at(point: &Path) -> io::Result<Option<Mount>> {
    Ok(all()?.into_iter().rfind(|mount| mount.point == point))
}

fn parse(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(2);
    let (device, root, point) = (left.next()?.to_owned(), unescape(left.next()?), unescape(left.next()?));
    let mut right = right.split(' ');
    let kind = right.next()?.to_owned();
    let options = right.nth(1).unwrap_or_default().to_owned();
    Some(Mount { device, root, point, kind, options })
}

/// The kernel writes blanks, tabs, line ends and backslashes as `\040` and so on.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        let value = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        out.push(value.unwrap_or(bytes[at]));
        at += if value.is_some() { 4 } else { 1 };
    }
    PathBuf::from(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_spelling() {
        let line = r"36 35 7:3 / /var/lib/my\040wrenn/pool rw,noatime shared:1 - xfs /dev/loop3 rw,attr2,inode64";
        let mount = parse(line).unwrap();
        assert_eq!((mount.device.as_str(), mount.kind.as_str()), ("7:3", "xfs"));
        assert_eq!(mount.point, Path::new("/var/lib/my wrenn/pool"));
        assert_eq!(mount.options, "rw,attr2,inode64");
        assert!(all().unwrap().iter().any(|mount| mount.point == Path::new("/proc")));
        assert_eq!(parse("nonsense"), None);
    }
}
