//! Names of what is not there yet, or not any more: files being uploaded, trees being moved between file systems.
//!
//! They lie where they are to be, so that one rename makes them visible as a whole. Listings and watches hide them, and a watch tells from
//! the name what a rename from it is to be reported as.

use std::ffi::{OsStr, OsString};
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::AtFlags;

use crate::users::{self, Account};

const PREFIX: &str = ".envd-upload-";
/// Names tried before giving up: one in 2^64 is taken by chance, more only by somebody who means it.
const TRIES_MAX: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Becomes what was not there.
    New,
    /// Takes the place of what was there.
    Replacing,
    /// Has been moved away and is being removed.
    Leaving,
}

impl Kind {
    const ALL: [(Self, &str); 3] = [(Self::New, "new-"), (Self::Replacing, "old-"), (Self::Leaving, "out-")];

    /// `None` for a name that is not ours.
    pub fn of(name: &OsStr) -> Option<Self> {
        let rest = name.to_str()?.strip_prefix(PREFIX)?;
        let (kind, digits) = Self::ALL.iter().find_map(|(kind, word)| Some((*kind, rest.strip_prefix(word)?)))?;
        let ours = digits.len() == 16 && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        ours.then_some(kind)
    }

    /// Not to be guessed: whoever may write to the directory could otherwise lie in wait there.
    fn name(self) -> OsString {
        let word = Self::ALL.iter().find(|(kind, _)| *kind == self).map_or("", |(_, word)| word);
        // The standard library keys its hashers by the kernel's randomness.
        format!("{PREFIX}{word}{:016x}", RandomState::new().build_hasher().finish()).into()
    }

    /// Makes something under a free name; `make` answers that one is taken as the kernel does.
    pub fn with_free_name<T>(self, mut make: impl FnMut(&OsStr) -> io::Result<T>) -> io::Result<(OsString, T)> {
        for _ in 1..TRIES_MAX {
            let name = self.name();
            match make(&name) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                made => return made.map(|made| (name, made)),
            }
        }
        let name = self.name();
        make(&name).map(|made| (name, made))
    }
}

/// A file with such a name, removed unless it is renamed.
pub struct Temporary {
    account: Account,
    dir: Arc<OwnedFd>,
    /// `None` once it has its own name.
    name: Option<OsString>,
}

impl Temporary {
    pub fn new(account: &Account, dir: Arc<OwnedFd>, name: OsString) -> Self {
        Self { account: account.clone(), dir, name: Some(name) }
    }

    /// Replaces what has that name in the same directory.
    pub fn rename(&mut self, to: &OsStr) -> io::Result<()> {
        if let Some(name) = &self.name {
            rustix::fs::renameat(&self.dir, name, &self.dir, to)?;
            self.name = None;
        }
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let Some(name) = self.name.take() else { return };
        let dir = self.dir.clone();
        // A thread of its own, because a request may be dropped anywhere, and freeing a large file takes its time. That there may be no
        // thread leaves a hidden file behind, and nothing better can be done without one.
        let _ = users::detached(&self.account, move || Ok(rustix::fs::unlinkat(&dir, &name, AtFlags::empty())?));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_what_they_are_for() {
        for kind in [Kind::New, Kind::Replacing, Kind::Leaving] {
            assert_eq!(Kind::of(&kind.name()), Some(kind));
            assert_ne!(kind.name(), kind.name());
        }
        for other in [
            "",
            ".envd-upload-",
            ".envd-upload-new-",
            ".envd-upload-new-0123456789abcdeg",
            "x.envd-upload-new-0123456789abcdef",
            ".envd-upload-xxx-0123456789abcdef",
        ] {
            assert_eq!(Kind::of(OsStr::new(other)), None, "{other}");
        }
    }

    #[test]
    fn a_taken_name_is_tried_again() {
        let taken = || io::Error::from_raw_os_error(libc::EEXIST);
        let mut tries = 0;
        let made = Kind::New.with_free_name(|_| {
            tries += 1;
            if tries < 3 { Err(taken()) } else { Ok(tries) }
        });
        assert_eq!(made.unwrap().1, 3);
        assert!(Kind::New.with_free_name(|_| Err::<(), _>(taken())).is_err());
    }
}
