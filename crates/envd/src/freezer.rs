//! Control groups of the guest: envd's own, which gets memory and CPU before anybody else, and those of user processes, one each below
//! `/sys/fs/cgroup/user`, bounded and frozen as a whole (around a snapshot) and killed one by one. Where the guest has no cgroup2,
//! processes run without and are killed by their group of processes.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};

const ROOT: &str = "/sys/fs/cgroup";
/// Ten times what everybody else gets by default: a guest whose users compute on all CPUs still answers.
const OWN_CPU_WEIGHT: &str = "1000";
/// Never reclaimed from envd: what it uses with all its buffers in normal use.
const OWN_MEMORY_BYTES: u64 = 32 << 20;
/// Of the guest's memory, at least an eighth up to this is not the users'.
const SPARE_MEMORY_BYTES: u64 = 128 << 20;
/// Leftover groups looked at each time one is given up.
const SWEEP: usize = 16;
/// It reads small files.
const SWEEPER_STACK_BYTES: usize = 128 * 1024;
/// Kept for the next processes.
const EMPTY_MAX: usize = 8;

#[derive(Debug)]
pub struct Freezer {
    /// `None` where there is no writable cgroup2.
    user: Option<PathBuf>,
    next: AtomicU64,
    leftover: Arc<Leftover>,
}

impl Freezer {
    pub fn new() -> Self {
        let root = Path::new(ROOT);
        let freezer = Self::below(root);
        if let Some(user) = &freezer.user {
            // As far as the kernel has the controllers: envd serves without, too.
            set_apart(root, user);
        }
        freezer
    }

    /// No groups at all: outside a sandbox.
    pub fn none() -> Self {
        Self { user: None, next: AtomicU64::new(1), leftover: Arc::default() }
    }

    fn below(root: &Path) -> Self {
        let user = root.join("user");
        let usable = root.join("cgroup.controllers").exists() && (user.exists() || fs::create_dir(&user).is_ok());
        // Controllers for the processes' groups, as far as the kernel has them; freezing and killing need none.
        if usable {
            for at in [root, &user] {
                for controller in ["+memory", "+pids", "+cpu"] {
                    let _ = fs::write(at.join("cgroup.subtree_control"), controller);
                }
            }
        }
        Self { user: usable.then_some(user), ..Self::none() }
    }

    /// A group for one process and its children; `None` where there are no groups. An error is final: a process that ran in envd's own
    /// group would be neither bounded nor frozen.
    pub fn group(&self) -> io::Result<Option<Group>> {
        let Some(user) = &self.user else { return Ok(None) };
        while let Some(path) = self.leftover.take() {
            // Whoever is root in the guest may have removed it.
            match fs::File::open(&path) {
                Ok(directory) => return Ok(Some(Group { path, directory, leftover: self.leftover.clone() })),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => {
                    self.leftover.give(path);
                    return Err(e);
                }
            }
        }
        loop {
            let path = user.join(self.next.fetch_add(1, Ordering::Relaxed).to_string());
            match fs::create_dir(&path) {
                Ok(()) => {
                    let opened = fs::File::open(&path);
                    let directory = opened.inspect_err(|_| self.leftover.give(path.clone()))?;
                    return Ok(Some(Group { path, directory, leftover: self.leftover.clone() }));
                }
                // Of an envd before this one.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Stops (or continues) every user process. Nothing to do where there are no groups.
    pub fn freeze(&self, frozen: bool) -> io::Result<()> {
        match &self.user {
            Some(user) => fs::write(user.join("cgroup.freeze"), if frozen { "1" } else { "0" }),
            None => Ok(()),
        }
    }

    /// Asking to freeze only begins it: whether every process stands still by now. True where there are no groups.
    pub fn is_frozen(&self) -> bool {
        if self.user.is_none() {
            return true;
        }
        let events = self.user.as_ref().and_then(|user| fs::read_to_string(user.join("cgroup.events")).ok());
        events.is_some_and(|events| events.lines().any(|line| line == "frozen 1"))
    }
}

impl Default for Freezer {
    fn default() -> Self {
        Self::new()
    }
}

/// envd into a group of its own with what it needs, and bounds for everybody else. Each by itself: an older kernel has some of them.
fn set_apart(root: &Path, user: &Path) {
    let own = root.join("envd");
    let _ = fs::create_dir(&own);
    let _ = fs::write(own.join("cpu.weight"), OWN_CPU_WEIGHT);
    let _ = fs::write(own.join("memory.min"), OWN_MEMORY_BYTES.to_string());
    let _ = fs::write(own.join("cgroup.procs"), "0");
    let number = |path: &str| fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    let tasks = [number("/proc/sys/kernel/threads-max"), number("/proc/sys/kernel/pid_max")];
    if let Some(tasks) = tasks.into_iter().flatten().min() {
        let _ = fs::write(user.join("pids.max"), (tasks - tasks / 10).to_string());
    }
    let memory = crate::metrics::memory_total();
    if memory > 0 {
        let _ = fs::write(user.join("memory.max"), (memory - (memory / 8).min(SPARE_MEMORY_BYTES)).to_string());
    }
}

#[derive(Debug)]
pub struct Group {
    path: PathBuf,
    directory: fs::File,
    leftover: Arc<Leftover>,
}

impl Group {
    /// For a child that is to be born in it.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    fn procs(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// SIGKILL to everything in the group, also to what has left its process group.
    pub fn kill(&self) -> io::Result<()> {
        match fs::write(self.path.join("cgroup.kill"), "1") {
            // Before Linux 5.14. What is born meanwhile escapes; there is no better way.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                for pid in fs::read_to_string(self.procs())?.lines().filter_map(|line| line.parse().ok()) {
                    // SAFETY: kill has no memory effects; the kernel has just said that the number is a member's.
                    unsafe { libc::kill(pid, libc::SIGKILL) };
                }
                Ok(())
            }
            done => done,
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.leftover.give(std::mem::take(&mut self.path));
        self.leftover.wake_sweeper();
    }
}

/// Groups whose process has ended. Those that are empty are the next processes', because making one and removing one take the kernel
/// longer than starting a process in it. Daemons that a user's command started live on, and so does their group; there are never more of
/// these than there are processes.
#[derive(Debug, Default)]
struct Leftover {
    groups: Mutex<Groups>,
    sweeper: OnceLock<Option<mpsc::SyncSender<()>>>,
}

#[derive(Debug, Default)]
struct Groups {
    empty: Vec<PathBuf>,
    inhabited: VecDeque<PathBuf>,
}

impl Leftover {
    fn take(&self) -> Option<PathBuf> {
        self.lock().empty.pop()
    }

    fn give(&self, path: PathBuf) {
        // The newest first: it is empty most of the time.
        self.lock().inhabited.push_front(path);
    }

    /// A thread of its own, which gives way to everybody: the next process starts before the last one's group is looked at.
    fn wake_sweeper(self: &Arc<Self>) {
        let sweeper = self.sweeper.get_or_init(|| {
            let (wake, woken) = mpsc::sync_channel(1);
            let leftover = Arc::downgrade(self);
            let sweep = move || {
                // SAFETY: 0 is the calling thread, and nothing but its own rank changes.
                unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
                while woken.recv().is_ok() {
                    let Some(leftover) = leftover.upgrade() else { return };
                    leftover.sweep();
                }
            };
            let thread = std::thread::Builder::new().name("sweeper".to_owned()).stack_size(SWEEPER_STACK_BYTES);
            thread.spawn(sweep).is_ok().then_some(wake)
        });
        match sweeper {
            // Full: it is about to look.
            Some(wake) => drop(wake.try_send(())),
            None => self.sweep(),
        }
    }

    /// Looks at some, each time at others.
    fn sweep(&self) {
        let (count, mut room) = {
            let groups = self.lock();
            (groups.inhabited.len().min(SWEEP), EMPTY_MAX.saturating_sub(groups.empty.len()))
        };
        for _ in 0..count {
            // Not under the lock: a start must not wait for a thread that gives way to everybody.
            let Some(path) = self.lock().inhabited.pop_front() else { return };
            if room > 0 && is_as_new(&path) {
                room -= 1;
                self.lock().empty.push(path);
                continue;
            }
            match fs::remove_dir(&path) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(_) => self.lock().inhabited.push_back(path),
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Groups> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nothing runs in it, nothing has made groups below it, and nobody has set anything of it: root in the guest may do all of that.
fn is_as_new(group: &Path) -> bool {
    let read = |file: &str| fs::read_to_string(group.join(file));
    let is = |file: &str, content: &str| read(file).is_ok_and(|text| text.trim_end() == content);
    // The kernel may have no such controller.
    let is_limit = |file: &str, content: &str| match read(file) {
        Ok(text) => text.trim_end() == content,
        Err(e) => e.kind() == io::ErrorKind::NotFound,
    };
    // A directory's links are itself, its entry, and those of the directories in it.
    let is_leaf = || fs::metadata(group).is_ok_and(|meta| meta.nlink() <= 2);
    is("cgroup.events", "populated 0\nfrozen 0")
        && is("cgroup.type", "domain")
        && is("cgroup.subtree_control", "")
        && is_limit("memory.max", "max")
        && is_limit("memory.high", "max")
        && is_limit("memory.min", "0")
        && is_limit("memory.swap.max", "max")
        && is_limit("memory.oom.group", "0")
        && is_limit("cpu.weight", "100")
        && is_limit("pids.max", "max")
        && is_limit("cpu.max", "max 100000")
        && is_leaf()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits for the sweeper.
    fn swept(is_so: &dyn Fn() -> bool) {
        let began = std::time::Instant::now();
        while !is_so() {
            assert!(began.elapsed() < std::time::Duration::from_secs(20));
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    #[test]
    fn groups_that_were_not_empty_are_removed_later() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.controllers"), "").unwrap();
        let freezer = Freezer::below(root.path());
        let group = freezer.group().unwrap().unwrap();
        let path = group.path.clone();
        // What stands for a process in a directory that is no control group.
        fs::write(group.procs(), "1").unwrap();
        drop(group);
        assert!(path.exists());
        fs::remove_file(path.join("cgroup.procs")).unwrap();
        let next = freezer.group().unwrap().unwrap();
        assert!(next.path != path);
        // What the kernel says of a group that is empty.
        let as_new =
            [("cgroup.events", "populated 0\nfrozen 0\n"), ("cgroup.type", "domain\n"), ("cgroup.subtree_control", "")];
        for (file, content) in as_new {
            fs::write(next.path.join(file), content).unwrap();
        }
        let reused = next.path.clone();
        drop(next);
        swept(&|| !path.exists() && freezer.leftover.lock().empty == [reused.clone()]);
        let again = freezer.group().unwrap().unwrap();
        assert_eq!(again.path, reused);
        // One that somebody has set something of is nobody's any more.
        fs::write(again.path.join("memory.max"), "1000000\n").unwrap();
        drop(again);
        assert_ne!(freezer.group().unwrap().unwrap().path, reused);
        // A group that cannot be made is no reason to run without.
        fs::remove_dir_all(root.path().join("user")).unwrap();
        assert!(freezer.group().is_err());
        assert!(Freezer::none().group().unwrap().is_none());
    }

    #[test]
    fn a_real_group_is_frozen_and_killed_with_all_that_is_in_it() {
        // Wherever this machine has a cgroup2 that may be written.
        let mounts = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
        let root = mounts.map(|at| (at, at.join(format!("envd-test-{}", std::process::id()))));
        let Some((_, root)) =
            root.iter().find(|(at, root)| at.join("cgroup.controllers").exists() && fs::create_dir(root).is_ok())
        else {
            eprintln!(
                "skipped: no cgroup2 that may be written is mounted here; the whole-machine tests do it in a guest"
            );
            return;
        };
        let freezer = Freezer::below(root);
        let group = freezer.group().unwrap().unwrap();
        let script = format!("echo $$ >{}; setsid sleep 1000 & sleep 1000", group.procs().display());
        let mut child = std::process::Command::new("/bin/sh").args(["-c", &script]).spawn().unwrap();
        let members = || fs::read_to_string(group.procs()).unwrap().lines().count();
        let until = |is_so: &dyn Fn() -> bool| {
            let began = std::time::Instant::now();
            while !is_so() {
                assert!(began.elapsed() < std::time::Duration::from_secs(20));
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        };
        until(&|| members() == 3);
        freezer.freeze(true).unwrap();
        until(&|| freezer.is_frozen());
        freezer.freeze(false).unwrap();
        group.kill().unwrap();
        assert!(!child.wait().unwrap().success());
        until(&|| members() == 0);
        drop(group);
        swept(&|| !freezer.leftover.lock().empty.is_empty());
        let next = freezer.group().unwrap().unwrap();
        assert_eq!(next.path, root.join("user/1"), "an empty one is used again");
        drop(next);
        swept(&|| !freezer.leftover.lock().empty.is_empty());
        fs::remove_dir(freezer.leftover.take().unwrap()).unwrap();
        fs::remove_dir(root.join("user")).unwrap();
        fs::remove_dir(root).unwrap();
    }
}
