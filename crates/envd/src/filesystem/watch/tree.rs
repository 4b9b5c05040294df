//! Which watched directory is which, and what is to be said of it.
//!
//! New directories of a recursive watch are watched as soon as they are seen, and then read: what was made in them before is told then,
//! what is made after comes by itself, and what is both is told once. A rename from one of envd's hidden names is told as what a program
//! would have done that had written the file in place.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use api::guest::filesystem::{EventType, FilesystemEvent};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::raw::{self, Event};
use super::{Refused, Wanted};
use crate::filesystem::temporary::Kind;
use crate::filesystem::{entry, open};

/// Directories of one watch. Beyond it a recursive watch is refused: the kernel's own limit is shared by all of the guest.
const DIRS_MAX: usize = 16_384;
const BUFFER_BYTES: usize = 64 * 1024;
/// Both halves of a rename are made by one system call: in the queue they are next to each other.
const RENAME_TIME_MAX: Duration = Duration::from_millis(100);
/// Entries of newly found directories that are told one by one. More at once, such as a large tree moved in, are events lost.
const FOUND_MAX: usize = 10_000;

/// `f_type` of file systems whose files others change (statfs(2)).
const NETWORK: [u32; 5] = [
    0x6969,      // NFS
    0x517B,      // SMB
    0xFF53_4D42, // CIFS
    0xFE53_4D42, // SMB2
    0x6573_5546, // FUSE
];

const MASK: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR);

pub struct Tree {
    inotify: OwnedFd,
    /// Where the directory is, with links resolved, and how it was called.
    real: PathBuf,
    shown: PathBuf,
    recursive: bool,
    include_entry: bool,
    root: i32,
    dirs: HashMap<i32, Watched>,
    leaving: Vec<Leaving>,
    /// Bytes of events taken from the kernel, and those of them that have been told of.
    taken: u64,
    told: u64,
    gone: bool,
}

struct Watched {
    /// Below the root.
    path: PathBuf,
    /// Entries that were told of when the directory was found. Events in the queue at that time may be about them.
    found: HashSet<OsString>,
    found_until: u64,
}

/// The first half of a rename.
struct Leaving {
    cookie: u32,
    what: Left,
    since: Instant,
}

enum Left {
    Hidden(Kind),
    /// A directory, with the watches in it.
    Dir(PathBuf, Vec<i32>),
}

impl Tree {
    /// With the rights of the user who watches.
    pub fn watch(wanted: &Wanted) -> Result<Self, Refused> {
        let failed = |e: io::Error| Refused::Watch(e);
        let dir = open::open(&wanted.path, OFlags::PATH | OFlags::DIRECTORY).map_err(failed)?;
        let kind = rustix::fs::fstatfs(&dir).map_err(|e| failed(e.into()))?.f_type;
        if !wanted.allow_network_mounts && NETWORK.iter().any(|network| i64::from(*network) == kind) {
            return Err(Refused::NetworkMount);
        }
        let inotify = match inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK) {
            Err(Errno::MFILE) => return Err(Refused::TooMany),
            made => made.map_err(|e| failed(e.into()))?,
        };
        let real = open::place_of(&dir).map_err(failed)?;
        let root = match inotify::add_watch(&inotify, open::by_descriptor(&dir), MASK) {
            Err(Errno::NOSPC) => return Err(Refused::TooMany),
            added => added.map_err(|e| failed(e.into()))?,
        };
        let mut tree = Self {
            inotify,
            real,
            shown: wanted.path.clone(),
            recursive: wanted.recursive,
            include_entry: wanted.include_entry,
            root,
            dirs: HashMap::from([(root, Watched::new(PathBuf::new()))]),
            leaving: Vec::new(),
            taken: 0,
            told: 0,
            gone: false,
        };
        if tree.recursive {
            tree.explore(PathBuf::new(), None).map_err(|e| if is_full(&e) { Refused::TooMany } else { failed(e) })?;
        }
        Ok(tree)
    }

    pub fn inotify(&self) -> &OwnedFd {
        &self.inotify
    }

    pub fn awaits_rename(&self) -> bool {
        !self.leaving.is_empty()
    }

    pub fn is_gone(&self) -> bool {
        self.gone
    }

    /// What has waited long enough for its second half has left the tree.
    pub fn give_up_renames(&mut self) {
        let overdue: Vec<_> =
            self.leaving.extract_if(.., |leaving| leaving.since.elapsed() >= RENAME_TIME_MAX).collect();
        for leaving in overdue {
            if let Left::Dir(_, watches) = leaving.what {
                self.unwatch(&watches);
            }
        }
    }

    /// `None` when nothing has happened since.
    pub fn read(&mut self) -> io::Result<Option<Vec<FilesystemEvent>>> {
        let mut buffer = vec![0; BUFFER_BYTES];
        let length = match rustix::io::read(&self.inotify, &mut buffer[..]) {
            Err(Errno::AGAIN) => return Ok(None),
            read => read?,
        };
        self.taken += length as u64;
        let mut told = Vec::new();
        for event in raw::events(&buffer[..length]) {
            self.told += event.length as u64;
            self.tell(&event, &mut told);
        }
        Ok(Some(told))
    }

    fn tell(&mut self, event: &Event, told: &mut Vec<FilesystemEvent>) {
        let is = |flag: WatchFlags| event.mask & flag.bits() != 0;
        if event.mask & libc::IN_Q_OVERFLOW != 0 {
            self.say(EventType::EVENT_TYPE_UNSPECIFIED, Path::new(""), told);
            self.leaving.clear();
            if self.recursive {
                // Directories may have been made meanwhile.
                let _ = self.explore(PathBuf::new(), None);
            }
            return;
        }
        if event.mask & libc::IN_IGNORED != 0 {
            self.dirs.remove(&event.watch);
            self.gone |= event.watch == self.root;
            return;
        }
        let Some(dir) = self.dirs.get_mut(&event.watch) else { return };
        if self.told > dir.found_until {
            dir.found.clear();
        }
        if event.name.is_empty() {
            // Of a directory below, its parent tells.
            let kind = [
                (WatchFlags::DELETE_SELF, EventType::EVENT_TYPE_REMOVE),
                (WatchFlags::MOVE_SELF, EventType::EVENT_TYPE_RENAME),
                (WatchFlags::ATTRIB, EventType::EVENT_TYPE_CHMOD),
            ];
            let kind = kind.iter().find(|(flag, _)| is(*flag)).filter(|_| event.watch == self.root);
            if let Some((_, kind)) = kind {
                self.say(*kind, Path::new(""), told);
            }
            return;
        }
        let path = dir.path.join(&event.name);
        let is_dir = event.mask & libc::IN_ISDIR != 0;
        let hidden = Kind::of(&event.name);
        let known = is(WatchFlags::CREATE | WatchFlags::MOVED_TO) && dir.found.remove(&event.name);
        if is(WatchFlags::DELETE | WatchFlags::MOVED_FROM) {
            dir.found.remove(&event.name);
        }
        if is(WatchFlags::MOVED_FROM) {
            let what = match hidden {
                Some(kind) => Some(Left::Hidden(kind)),
                None if is_dir && self.recursive => Some(Left::Dir(path.clone(), self.watches_in(&path))),
                None => None,
            };
            self.leaving.extend(what.map(|what| Leaving { cookie: event.cookie, what, since: Instant::now() }));
        }
        let came_from = is(WatchFlags::MOVED_TO).then(|| self.arrival(event.cookie)).flatten();
        if hidden.is_some() {
            if let Some(Left::Dir(_, watches)) = came_from {
                self.unwatch(&watches);
            }
            return;
        }
        if is(WatchFlags::CREATE | WatchFlags::MOVED_TO) {
            if known {
                return;
            }
            use EventType::{EVENT_TYPE_CHMOD as CHMOD, EVENT_TYPE_CREATE as CREATE, EVENT_TYPE_WRITE as WRITE};
            let kinds: &[EventType] = match came_from {
                Some(Left::Hidden(Kind::New)) if !is_dir => &[CREATE, CHMOD, WRITE],
                Some(Left::Hidden(Kind::Replacing)) => &[WRITE, CHMOD, WRITE],
                _ => &[CREATE],
            };
            for kind in kinds {
                self.say(*kind, &path, told);
            }
            match came_from {
                Some(Left::Dir(old, watches)) => self.follow_rename(&old, &path, &watches),
                // That a directory cannot be watched any more (it is gone, or may not be read) is no event of its parent.
                _ if is_dir && self.recursive && self.explore(path, Some(told)).is_err_and(|e| is_full(&e)) => {
                    self.say(EventType::EVENT_TYPE_UNSPECIFIED, Path::new(""), told);
                }
                _ => {}
            }
            return;
        }
        for (flag, kind) in [
            (WatchFlags::MODIFY, EventType::EVENT_TYPE_WRITE),
            (WatchFlags::ATTRIB, EventType::EVENT_TYPE_CHMOD),
            (WatchFlags::DELETE, EventType::EVENT_TYPE_REMOVE),
            (WatchFlags::MOVED_FROM, EventType::EVENT_TYPE_RENAME),
        ] {
            if is(flag) {
                self.say(kind, &path, told);
            }
        }
    }

    fn say(&self, kind: EventType, path: &Path, told: &mut Vec<FilesystemEvent>) {
        let has_entry =
            matches!(kind, EventType::EVENT_TYPE_CREATE | EventType::EVENT_TYPE_WRITE | EventType::EVENT_TYPE_CHMOD);
        let entry = (self.include_entry && has_entry)
            .then(|| entry::describe(&self.real.join(path), &self.shown.join(path)).ok())
            .flatten();
        let name = if path.as_os_str().is_empty() { ".".into() } else { path.to_string_lossy().into_owned() };
        told.push(FilesystemEvent { name, r#type: kind.into(), entry: entry.into(), ..Default::default() });
    }

    /// Watches the directory, unless it is watched, and all below it; tells what it finds if asked to.
    fn explore(&mut self, path: PathBuf, mut told: Option<&mut Vec<FilesystemEvent>>) -> io::Result<()> {
        let mut unexplored = vec![path];
        while let Some(path) = unexplored.pop() {
            let watch = if path.as_os_str().is_empty() {
                self.root
            } else {
                match self.add(&path) {
                    Ok((watch, true)) => watch,
                    Ok((_, false)) if told.is_some() => continue,
                    Ok((watch, false)) => watch,
                    Err(e) if is_full(&e) => return Err(e),
                    // Gone again, or not for this user.
                    Err(_) => continue,
                }
            };
            let Ok(entries) = self.entries(&path) else { continue };
            let mut found = HashSet::new();
            if let Some(all) = told.take_if(|all| all.len() + entries.len() > FOUND_MAX) {
                self.say(EventType::EVENT_TYPE_UNSPECIFIED, Path::new(""), all);
            }
            for (name, kind) in entries {
                let below = path.join(&name);
                if let Some(told) = told.as_deref_mut() {
                    self.say(EventType::EVENT_TYPE_CREATE, &below, told);
                    if kind == FileType::RegularFile
                        && std::fs::metadata(self.real.join(&below)).is_ok_and(|it| it.len() > 0)
                    {
                        self.say(EventType::EVENT_TYPE_WRITE, &below, told);
                    }
                    found.insert(name);
                }
                if kind == FileType::Directory {
                    unexplored.push(below);
                }
            }
            let queued = rustix::io::ioctl_fionread(&self.inotify).unwrap_or(0);
            if let Some(dir) = self.dirs.get_mut(&watch) {
                dir.found = found;
                dir.found_until = self.taken + queued;
            }
        }
        Ok(())
    }

    /// And whether it was not watched before.
    fn add(&mut self, path: &Path) -> io::Result<(i32, bool)> {
        if self.dirs.len() >= DIRS_MAX {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let watch = inotify::add_watch(&self.inotify, self.real.join(path), MASK | WatchFlags::DONT_FOLLOW)?;
        match self.dirs.get_mut(&watch) {
            // The root again, mounted below itself: it keeps its name.
            Some(_) if watch == self.root => Ok((watch, false)),
            Some(watched) => {
                watched.path = path.to_owned();
                Ok((watch, false))
            }
            None => {
                self.dirs.insert(watch, Watched::new(path.to_owned()));
                Ok((watch, true))
            }
        }
    }

    fn entries(&self, path: &Path) -> io::Result<Vec<(OsString, FileType)>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        let dir = open::open_at(rustix::fs::CWD, &self.real.join(path), flags, Mode::empty())?;
        let mut entries = Vec::new();
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." && Kind::of(name).is_none() {
                entries.push((name.to_owned(), entry.file_type()));
            }
        }
        entries.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(entries)
    }

    fn watches_in(&self, path: &Path) -> Vec<i32> {
        self.dirs.iter().filter(|(_, dir)| dir.path.starts_with(path)).map(|(watch, _)| *watch).collect()
    }

    fn arrival(&mut self, cookie: u32) -> Option<Left> {
        let at = self.leaving.iter().position(|leaving| leaving.cookie == cookie)?;
        Some(self.leaving.swap_remove(at).what)
    }

    fn follow_rename(&mut self, old: &Path, new: &Path, watches: &[i32]) {
        for watch in watches {
            if let Some(dir) = self.dirs.get_mut(watch)
                && let Ok(below) = dir.path.strip_prefix(old)
            {
                // Joining an empty path would leave a slash at the end.
                dir.path = if below.as_os_str().is_empty() { new.to_owned() } else { new.join(below) };
            }
        }
    }

    fn unwatch(&mut self, watches: &[i32]) {
        for watch in watches {
            self.dirs.remove(watch);
            // Gone by itself when its directory is.
            let _ = inotify::remove_watch(&self.inotify, *watch);
        }
    }
}

impl Watched {
    fn new(path: PathBuf) -> Self {
        Self { path, found: HashSet::new(), found_until: 0 }
    }
}

fn is_full(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOSPC)
}
