//! What a process is to be: program, environment, directory and user, as its caller, the sandbox and the user's own entry say it.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::sync::OnceLock;

use connectrpc::ConnectError;

use super::child::{self, Child, Streams};
use super::starter::Progress;
use crate::freezer::Group;
use crate::users::Account;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

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

    /// Where the program may be: as it is named, else below each directory of the process's own PATH.
    fn candidates(&self) -> Vec<Vec<u8>> {
        if self.program.contains('/') {
            return vec![self.program.clone().into_bytes()];
        }
        let path = self.envs.get("PATH").map_or(PATH, String::as_str);
        // An empty one is the present directory.
        let below = |directory: &str| match directory {
            "" => format!("./{}", self.program).into_bytes(),
            _ => format!("{directory}/{}", self.program).into_bytes(),
        };
        path.split(':').map(below).collect()
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

/// Returns when the child is the program. For the starting thread: whatever a path leads to may hang.
pub fn spawn(
    plan: &Plan,
    group: Option<&Group>,
    terminal: Option<&pty_process::Pts>,
    progress: &Progress,
) -> Result<Child, ConnectError> {
    if let Some(terminal) = terminal {
        // Programs that open their terminal by its name do so as the user. Without the right to give it away (tests) it is the user's
        // already.
        // SAFETY: the descriptor is open while `terminal` lives.
        let _ = unsafe { libc::fchown(terminal.as_fd().as_raw_fd(), plan.account.uid, libc::gid_t::MAX) };
    }
    let text = |bytes: &[u8]| CString::new(bytes).map_err(|_| ConnectError::invalid_argument("a text contains NUL"));
    let words = std::iter::once(&plan.program).chain(&plan.arguments);
    let start = child::Start {
        programs: plan.candidates().iter().map(|path| text(path)).collect::<Result<_, _>>()?,
        arguments: words.map(|word| text(word.as_bytes())).collect::<Result<_, _>>()?,
        envs: plan
            .envs
            .iter()
            .map(|(name, value)| text(format!("{name}={value}").as_bytes()))
            .collect::<Result<_, _>>()?,
        cwd: text(plan.cwd.as_os_str().as_bytes())?,
        cwd_asked: plan.cwd_asked,
        uid: plan.account.uid,
        gid: plan.account.gid,
        groups: &plan.account.groups,
        open_files: OPEN_FILES_BEFORE.get().copied(),
        cgroup: group.map(Group::directory),
        streams: terminal.map_or(Streams::Pipes { stdin: plan.stdin }, |terminal| Streams::Terminal(terminal.as_fd())),
    };
    child::start(&start, progress).map_err(|e| spawn_error(plan, progress, &e))
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

/// Connections, pipes and files together are more than the usual 1024; this is room for all bounds of envd at once.
const OPEN_FILES: libc::rlim_t = 16 * 1024;
/// Descriptors that processes leave to connections, files and the runtime.
const OPEN_FILES_OTHERS: libc::rlim_t = 4096;
/// Three pipes, the process's own descriptor and that of its group.
const OPEN_FILES_EACH: libc::rlim_t = 5;
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

#[cfg(test)]
mod tests {
    use std::path::Path;

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
