//! Starting a process as a user: session, control group, groups, gid, uid, each step checked in the child before it becomes the
//! program. A step that fails ends the start; nothing runs with rights that were not asked for.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;

use connectrpc::{ConnectError, ErrorCode};
use tokio::process::{Child, Command};

use super::starter::{Hand, Progress};
use crate::freezer::Group;
use crate::users::Account;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Higher than envd's: the kernel takes a user's process first.
const OOM_SCORE: &[u8] = b"100";
/// Signals below the real-time ones, which nobody is told to ignore by inheritance.
const SIGNALS_PLAIN: libc::c_int = 31;

/// A process to start, with everything decided.
pub struct Plan {
    pub program: String,
    pub arguments: Vec<String>,
    pub envs: BTreeMap<String, String>,
    pub cwd: PathBuf,
    /// Whether the caller named the directory: a home that is missing is no reason not to run.
    pub cwd_asked: bool,
    pub account: Account,
    pub stdin: bool,
}

impl Plan {
    /// The sandbox's environment below, the call's above it; what identifies the user in between.
    pub fn environment(
        account: &Account,
        session: &BTreeMap<String, String>,
        call: impl IntoIterator<Item = (String, String)>,
    ) -> BTreeMap<String, String> {
        let own = std::env::var("PATH").ok().filter(|path| !path.is_empty()).unwrap_or_else(|| PATH.to_owned());
        let mut envs = BTreeMap::from([
            ("PATH".to_owned(), own),
            ("HOME".to_owned(), account.home.to_string_lossy().into_owned()),
            ("USER".to_owned(), account.name.clone()),
            ("LOGNAME".to_owned(), account.name.clone()),
            ("SHELL".to_owned(), account.shell.to_string_lossy().into_owned()),
        ]);
        envs.extend(session.iter().map(|(name, value)| (name.clone(), value.clone())));
        envs.extend(call);
        envs
    }

    pub fn check(&self) -> Result<(), ConnectError> {
        let invalid = |what: &str| Err(ConnectError::invalid_argument(what));
        if self.program.is_empty() {
            return invalid("cmd is empty");
        }
        if self.program.contains('\0') || self.arguments.iter().any(|argument| argument.contains('\0')) {
            return invalid("cmd and args must not contain NUL");
        }
        if self.envs.iter().any(|(name, value)| name.is_empty() || name.contains(['=', '\0']) || value.contains('\0')) {
            return invalid("envs: a name is empty or contains '=' or NUL, or a value contains NUL");
        }
        // Whether the directory can be entered shows in the child, as the user: a path may lead to a mount that hangs.
        Ok(())
    }
}

/// The directory that a path of a call means: absolute, below `~`, or relative to the default directory.
pub fn resolve(path: &str, account: &Account, default_workdir: &str) -> PathBuf {
    let base = if default_workdir.is_empty() { account.home.clone() } else { PathBuf::from(default_workdir) };
    match path {
        "" => base,
        "~" => account.home.clone(),
        _ => match path.strip_prefix("~/") {
            Some(below) => account.home.join(below),
            None => base.join(path),
        },
    }
}

/// Pipes for all three (or two) streams. Waits until the child is the program.
pub fn with_pipes(plan: &Plan, group: Option<&Group>, progress: &Progress) -> Result<Child, ConnectError> {
    let mut command = Command::new(&plan.program);
    command
        .args(&plan.arguments)
        .env_clear()
        .envs(&plan.envs)
        .stdin(if plan.stdin { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let steps = Steps::of(plan, group, progress, true)?;
    // SAFETY: `Steps::take` makes plain system calls on memory prepared before the fork.
    unsafe { command.pre_exec(move || steps.take()) };
    command.spawn().map_err(|e| spawn_error(plan, progress, &e))
}

/// A terminal of its own, which belongs to the user; session and controlling terminal are the library's doing.
pub fn with_pty(
    plan: &Plan,
    group: Option<&Group>,
    progress: &Progress,
    terminal: pty_process::Pts,
) -> Result<Child, ConnectError> {
    // Programs that open their terminal by its name do so as the user. Without the right to give it away (tests) it is the user's already.
    // SAFETY: the descriptor is open while `terminal` lives.
    let _ = unsafe { libc::fchown(terminal.as_raw_fd(), plan.account.uid, libc::gid_t::MAX) };
    let steps = Steps::of(plan, group, progress, false)?;
    let command = pty_process::Command::new(&plan.program).args(&plan.arguments).env_clear().envs(&plan.envs);
    // SAFETY: as above.
    let command = unsafe { command.pre_exec(move || steps.take()) };
    command.spawn(terminal).map_err(|e| match e {
        pty_process::Error::Io(e) => spawn_error(plan, progress, &e),
        other => ConnectError::new(ErrorCode::Internal, format!("start a terminal: {other}")),
    })
}

fn spawn_error(plan: &Plan, progress: &Progress, error: &io::Error) -> ConnectError {
    let shown: String = plan.program.chars().filter(|c| !c.is_control()).take(64).collect();
    if progress.was_entering() {
        let cwd = plan.cwd.display();
        return match error.raw_os_error() {
            Some(libc::EACCES) => ConnectError::permission_denied(format!("cwd '{cwd}' may not be entered")),
            _ => ConnectError::invalid_argument(format!("cwd '{cwd}' does not exist or is not a directory")),
        };
    }
    match error.raw_os_error() {
        Some(libc::ENOENT) => ConnectError::not_found(format!("'{shown}' was not found")),
        Some(libc::EACCES | libc::EISDIR | libc::ENOEXEC) => {
            ConnectError::failed_precondition(format!("'{shown}' cannot be executed: {error}"))
        }
        Some(libc::E2BIG) => ConnectError::invalid_argument("arguments and environment are too large"),
        Some(libc::EAGAIN | libc::ENOMEM | libc::EMFILE | libc::ENFILE) => {
            ConnectError::resource_exhausted(format!("the sandbox cannot start another process: {error}"))
        }
        Some(libc::EPERM) => ConnectError::permission_denied(format!("'{shown}' cannot be started as this user")),
        _ => ConnectError::internal(format!("start '{shown}': {error}")),
    }
}

/// What the child does between fork and exec, with all memory prepared: nothing there may allocate.
struct Steps {
    cgroup: Option<CString>,
    cwd: CString,
    cwd_asked: bool,
    groups: Vec<libc::gid_t>,
    uid: libc::uid_t,
    gid: libc::gid_t,
    new_session: bool,
    open_files: Option<libc::rlimit>,
    hand: Hand,
}

/// Connections, pipes and files together are more than the usual 1024; this is room for all bounds of envd at once.
const OPEN_FILES: libc::rlim_t = 16 * 1024;
/// Descriptors that processes leave to connections, files and the runtime.
const OPEN_FILES_OTHERS: libc::rlim_t = 4096;
/// Three pipes and the process's own descriptor.
const OPEN_FILES_EACH: libc::rlim_t = 4;
/// Processes at once, where there are descriptors enough. Each costs envd up to some hundred KiB of output that waits.
const PROCESSES_MAX: libc::rlim_t = 1024;

/// What envd had before it raised its own is what its children get, because programs that use select() break with more.
static OPEN_FILES_BEFORE: OnceLock<libc::rlimit> = OnceLock::new();

pub fn raise_open_files() {
    let Some(limit) = open_files() else { return };
    let hard = libc::rlimit { rlim_cur: limit.rlim_max.max(OPEN_FILES), rlim_max: limit.rlim_max.max(OPEN_FILES) };
    // Without the right to raise the hard limit, all that it allows.
    let soft = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
    for raised in [hard, soft] {
        // SAFETY: setrlimit only reads the struct.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) } == 0 {
            let _ = OPEN_FILES_BEFORE.set(limit);
            return;
        }
    }
}

/// How many processes may run at once, by the descriptors that there are: connections must not fail for lack of them.
pub fn processes_max() -> usize {
    let limit = open_files().map_or(1024, |limit| limit.rlim_cur);
    let left = limit.saturating_sub(OPEN_FILES_OTHERS).max(limit / 2);
    usize::try_from((left / OPEN_FILES_EACH).min(PROCESSES_MAX)).unwrap_or(usize::MAX)
}

fn open_files() -> Option<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: getrlimit fills the struct that it is given.
    (unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0).then_some(limit)
}

impl Steps {
    fn of(plan: &Plan, group: Option<&Group>, progress: &Progress, new_session: bool) -> Result<Self, ConnectError> {
        let text = |path: &Path| {
            CString::new(path.as_os_str().as_bytes()).map_err(|_| ConnectError::invalid_argument("a path contains NUL"))
        };
        Ok(Self {
            cgroup: group.map(|group| text(&group.procs())).transpose()?,
            cwd: text(&plan.cwd)?,
            cwd_asked: plan.cwd_asked,
            groups: plan.account.groups.clone(),
            uid: plan.account.uid,
            gid: plan.account.gid,
            new_session,
            open_files: OPEN_FILES_BEFORE.get().copied(),
            hand: progress.hand(),
        })
    }

    /// Runs in the child. Only async-signal-safe calls.
    fn take(&self) -> io::Result<()> {
        // SAFETY: every pointer is to memory of `self`, which lives until exec; all of these are plain system calls.
        unsafe {
            self.hand.born();
            if let Some(cgroup) = &self.cgroup {
                write_file(cgroup.as_ptr(), b"0")?;
            }
            // Best effort: without the right to, the process keeps envd's score, which is tests' only.
            let _ = write_file(c"/proc/self/oom_score_adj".as_ptr(), OOM_SCORE);
            if self.new_session && libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            // The signal mask and dispositions of envd's runtime are not the user's business.
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            // Nor what envd was told to ignore by whoever started it: that alone outlives exec, and then Ctrl-C ends nothing.
            for signal in 1..=SIGNALS_PLAIN {
                libc::signal(signal, libc::SIG_DFL);
            }
            libc::umask(0o022);
            if let Some(limit) = &self.open_files {
                libc::setrlimit(libc::RLIMIT_NOFILE, limit);
            }
            if libc::geteuid() == 0 {
                if libc::setgroups(self.groups.len(), self.groups.as_ptr()) != 0 {
                    return Err(io::Error::last_os_error());
                }
                if libc::setresgid(self.gid, self.gid, self.gid) != 0
                    || libc::setresuid(self.uid, self.uid, self.uid) != 0
                {
                    return Err(io::Error::last_os_error());
                }
            }
            if libc::getuid() != self.uid || libc::geteuid() != self.uid || libc::getgid() != self.gid {
                return Err(io::Error::from_raw_os_error(libc::EPERM));
            }
            self.hand.entering(true);
            if libc::chdir(self.cwd.as_ptr()) != 0 {
                let error = io::Error::last_os_error();
                if self.cwd_asked || libc::chdir(c"/".as_ptr()) != 0 {
                    return Err(error);
                }
            }
            self.hand.entering(false);
        }
        Ok(())
    }
}

/// # Safety
/// `path` ends with NUL.
unsafe fn write_file(path: *const libc::c_char, content: &[u8]) -> io::Result<()> {
    // SAFETY: the caller's path, and a buffer of the given length.
    unsafe {
        let fd = libc::open(path, libc::O_WRONLY | libc::O_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let written = libc::write(fd, content.as_ptr().cast(), content.len());
        let result = if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        libc::close(fd);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_mean_home_or_the_default_directory() {
        let account = Account {
            name: "u".into(),
            uid: 1,
            gid: 1,
            groups: vec![1],
            home: "/home/u".into(),
            shell: "/bin/sh".into(),
        };
        for (path, workdir, means) in [
            ("", "", "/home/u"),
            ("", "/code", "/code"),
            ("~", "/code", "/home/u"),
            ("~/x", "/code", "/home/u/x"),
            ("x", "/code", "/code/x"),
            ("x", "", "/home/u/x"),
            ("/x", "/code", "/x"),
            ("~x", "", "/home/u/~x"),
        ] {
            assert_eq!(resolve(path, &account, workdir), Path::new(means), "{path:?} in {workdir:?}");
        }
    }
}
