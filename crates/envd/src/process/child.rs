//! A child process: from clone3 to the program, and to its end.
//!
//! The child shares envd's memory until it is the program (`CLONE_VM`), and the thread that starts it stands still meanwhile
//! (`CLONE_VFORK`): nothing is copied, and no page faults afterwards. It is born in its control group (`CLONE_INTO_CGROUP`), which costs
//! nothing, where moving it there would wait for the whole kernel. The price is that what the child does may touch nothing but memory
//! that was prepared for it, and nothing of the C library that keeps books about threads or users.

use std::ffi::{CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;

use super::starter::Progress;

/// Higher than envd's: the kernel takes a user's process first.
const OOM_SCORE: &[u8] = b"100";
/// Signals below the real-time ones, which nobody is told to ignore by inheritance.
const SIGNALS_PLAIN: c_int = 31;
/// For the steps below, which call nothing deep.
const STACK_BYTES: usize = 64 * 1024;

/// A running process, or one that has ended and has not been waited for.
#[derive(Debug)]
pub struct Child {
    pub pid: u32,
    pub stdin: Option<pipe::Sender>,
    pub stdout: Option<pipe::Receiver>,
    pub stderr: Option<pipe::Receiver>,
    handle: AsyncFd<OwnedFd>,
    is_collected: bool,
}

impl Child {
    /// Returns when it has ended; it stays to be collected.
    pub async fn ended(&self) -> io::Result<()> {
        self.handle.readable().await.map(drop)
    }

    /// How it ended; from now on its number may be another's. `None` when it is not there to be collected: it runs, or somebody who traces
    /// it has not let it go, although it has ended.
    pub fn collect(&mut self) -> io::Result<Option<ExitStatus>> {
        // SAFETY: all zeros is a siginfo_t.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let handle = libc::id_t::try_from(self.handle.as_raw_fd()).map_err(io::Error::other)?;
        // SAFETY: the handle is open, and the kernel fills the struct that it is given.
        while unsafe { libc::waitid(libc::P_PIDFD, handle, &raw mut info, libc::WEXITED | libc::WNOHANG) } != 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        // SAFETY: waitid has filled in the struct, or left its zeros.
        if unsafe { info.si_pid() } == 0 {
            return Ok(None);
        }
        self.is_collected = true;
        // SAFETY: waitid has filled in the fields of a child that ended.
        let status = unsafe { info.si_status() };
        // As wait(2) encodes it.
        let raw = match info.si_code {
            libc::CLD_EXITED => (status & 0xff) << 8,
            libc::CLD_DUMPED => status | 0x80,
            _ => status,
        };
        Ok(Some(ExitStatus::from_raw(raw)))
    }
}

impl Drop for Child {
    /// One that nobody has waited for is nobody's: its start was given up.
    fn drop(&mut self) {
        if !self.is_collected {
            // SAFETY: it has not been collected, so its number and its group's are its own.
            unsafe { libc::kill(-(self.pid as libc::pid_t), libc::SIGKILL) };
            let pid = self.pid as libc::pid_t;
            // It may take its time, which is nobody's here.
            let collecting = std::thread::Builder::new().name("collect".to_owned()).stack_size(STACK_BYTES);
            // SAFETY: as above; its status is not wanted.
            let _ = collecting.spawn(move || unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) });
        }
    }
}

/// What its three streams are.
pub enum Streams<'a> {
    /// Pipes, the first one if it is asked for.
    Pipes { stdin: bool },
    /// One terminal, which becomes the controlling one.
    Terminal(BorrowedFd<'a>),
}

/// What the child is to be.
pub struct Start<'a> {
    /// Tried in this order, as a shell does it with its PATH.
    pub programs: Vec<CString>,
    /// With its name as the first.
    pub arguments: Vec<CString>,
    /// `NAME=value`.
    pub envs: Vec<CString>,
    pub cwd: CString,
    /// Whether the caller named the directory: a home that is missing is no reason not to run.
    pub cwd_asked: bool,
    pub uid: libc::uid_t,
    pub gid: libc::gid_t,
    pub groups: &'a [libc::gid_t],
    pub open_files: Option<libc::rlimit>,
    /// The directory of its control group.
    pub cgroup: Option<BorrowedFd<'a>>,
    pub streams: Streams<'a>,
}

/// Returns when the child is the program. Call it where blocking is fine, within the runtime that the pipes are for.
pub fn start(start: &Start<'_>, progress: &Progress) -> io::Result<Child> {
    let null;
    let (mut stdin, mut stdout, mut stderr) = (None, None, None);
    let mut theirs: Vec<OwnedFd> = Vec::new();
    let (streams, terminal) = match start.streams {
        Streams::Terminal(terminal) => ([terminal.as_raw_fd(); 3], true),
        Streams::Pipes { stdin: asked } => {
            let input = if asked {
                let (reader, writer) = io::pipe()?;
                stdin = Some(pipe::Sender::from_owned_fd(writer.into())?);
                theirs.push(reader.into());
                theirs[0].as_raw_fd()
            } else {
                null = std::fs::File::open("/dev/null")?;
                null.as_raw_fd()
            };
            let mut output = |pipe: &mut Option<pipe::Receiver>| -> io::Result<RawFd> {
                let (reader, writer) = io::pipe()?;
                *pipe = Some(pipe::Receiver::from_owned_fd(reader.into())?);
                let descriptor = writer.as_raw_fd();
                theirs.push(writer.into());
                Ok(descriptor)
            };
            ([input, output(&mut stdout)?, output(&mut stderr)?], false)
        }
    };
    let pointers = |texts: &[CString]| -> Vec<*const c_char> {
        texts.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let steps = Steps {
        arguments: pointers(&start.arguments),
        envs: pointers(&start.envs),
        start,
        streams,
        terminal,
        ignored: ignored_signals(),
        progress,
        failed: AtomicI32::new(0),
    };
    let (pid, handle) = bear(&steps, start.cgroup, progress)?;
    // SAFETY: an owned descriptor stays the same and open for as long as it is owned.
    let handle = unsafe { AsyncFd::register(handle) }.map_err(|e| {
        // Nobody would ever hear of its end.
        // SAFETY: it has not been collected, so its number and its group's are its own; its status is not wanted.
        unsafe {
            libc::kill(-(pid as libc::pid_t), libc::SIGKILL);
            libc::waitpid(pid as libc::pid_t, std::ptr::null_mut(), 0);
        }
        e.into_parts().1
    })?;
    let mut child = Child { pid, stdin, stdout, stderr, handle, is_collected: false };
    match steps.failed.load(Ordering::SeqCst) {
        0 => Ok(child),
        errno => {
            // It has ended, or is about to: what it leaves is collected when it is dropped.
            let _ = child.collect();
            Err(io::Error::from_raw_os_error(errno))
        }
    }
}

/// The child's number and its pidfd, once it is the program or has ended.
fn bear(steps: &Steps<'_>, cgroup: Option<BorrowedFd<'_>>, progress: &Progress) -> io::Result<(u32, OwnedFd)> {
    let mut handle: c_int = -1;
    let mut stack = vec![0u128; STACK_BYTES / size_of::<u128>()];
    let into = if cgroup.is_some() { CLONE_INTO_CGROUP } else { 0 };
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::CLONE_PARENT_SETTID;
    let arguments = CloneArguments {
        flags: flags as u64 | CLONE_CLEAR_SIGHAND | into,
        pidfd: (&raw mut handle) as u64,
        // Written before the child runs: a start that hangs is known by it.
        parent_tid: progress.pid() as u64,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.as_mut_ptr() as u64,
        stack_size: STACK_BYTES as u64,
        cgroup: cgroup.map_or(0, |cgroup| cgroup.as_raw_fd() as u64),
        ..CloneArguments::default()
    };
    // A signal's handler would run in the child, on envd's memory.
    // SAFETY: both sets are initialised by the calls that are given them.
    let before = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        before
    };
    // SAFETY: steps, arguments and stack live until this thread runs on, which is after the child has left them.
    let born = unsafe { clone3(&arguments, live, (&raw const *steps).cast_mut().cast()) };
    // SAFETY: the mask was filled in above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    match u32::try_from(born) {
        // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
        Ok(pid) => Ok((pid, unsafe { OwnedFd::from_raw_fd(handle) })),
        Err(_) => Err(io::Error::from_raw_os_error(-born as i32)),
    }
}

/// linux/sched.h: all handlers back to default; what is ignored stays so.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// linux/sched.h: `struct clone_args`, as of Linux 5.7.
#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// The child's number, or minus the error. The child calls `run`, on its own stack.
///
/// # Safety
/// Everything that the arguments and `with` point to outlives the call, and `run` never returns.
#[cfg(target_arch = "x86_64")]
unsafe fn clone3(arguments: &CloneArguments, run: unsafe extern "C" fn(*mut c_void) -> !, with: *mut c_void) -> isize {
    let born: isize;
    // SAFETY: the system call keeps all registers but these three. In the child the stack is new and aligned, and what follows never
    // comes back here.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r13",
            "call r12",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 as isize => born,
            in("rdi") arguments,
            in("rsi") size_of::<CloneArguments>(),
            in("r12") run,
            in("r13") with,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    born
}

/// What the child does until it is the program, with all memory prepared: nothing there may allocate or panic.
struct Steps<'a> {
    start: &'a Start<'a>,
    /// With a null at their end, as all that follows here.
    arguments: Vec<*const c_char>,
    envs: Vec<*const c_char>,
    streams: [RawFd; 3],
    terminal: bool,
    ignored: &'static [c_int],
    progress: &'a Progress,
    /// The error of the step that failed.
    failed: AtomicI32,
}

unsafe extern "C" fn live(steps: *mut c_void) -> ! {
    // SAFETY: `bear` gives its own steps, and its thread stands still until the child has left them.
    unsafe {
        let steps = &*steps.cast::<Steps<'_>>();
        let Err(errno) = steps.take();
        steps.failed.store(errno, Ordering::SeqCst);
        libc::_exit(127)
    }
}

enum Never {}

impl Steps<'_> {
    /// Comes back only with the error of a step: nothing runs with rights that were not asked for.
    fn take(&self) -> Result<Never, c_int> {
        let start = self.start;
        // SAFETY: every pointer is to memory that lives until exec. All of these are plain system calls: those that change the user are
        // made without the C library, which would make them for the threads of envd.
        unsafe {
            // Best effort: without the right to, the process keeps envd's score, which is tests' only.
            let _ = write_file(c"/proc/self/oom_score_adj".as_ptr(), OOM_SCORE);
            check(libc::setsid().into())?;
            if self.terminal {
                check(libc::ioctl(self.streams[0], libc::TIOCSCTTY, 0).into())?;
            }
            for (stream, descriptor) in (0..).zip(self.streams) {
                check(libc::dup2(descriptor, stream).into())?;
            }
            // What envd ignores, also because whoever started it did, outlives exec: then Ctrl-C ends nothing.
            for signal in self.ignored {
                libc::signal(*signal, libc::SIG_DFL);
            }
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            check(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()).into())?;
            libc::umask(0o022);
            if let Some(limit) = &start.open_files {
                libc::setrlimit(libc::RLIMIT_NOFILE, limit);
            }
            if libc::geteuid() == 0 {
                let (uid, gid) = (start.uid, start.gid);
                check(libc::syscall(libc::SYS_setgroups, start.groups.len(), start.groups.as_ptr()))?;
                check(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
                check(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
            }
            if libc::getuid() != start.uid || libc::geteuid() != start.uid || libc::getgid() != start.gid {
                return Err(libc::EPERM);
            }
            self.progress.entering(true);
            if let Err(errno) = check(libc::chdir(start.cwd.as_ptr()).into())
                && (start.cwd_asked || libc::chdir(c"/".as_ptr()) != 0)
            {
                return Err(errno);
            }
            self.progress.entering(false);
            let mut failed = libc::ENOENT;
            for program in &start.programs {
                libc::execve(program.as_ptr(), self.arguments.as_ptr(), self.envs.as_ptr());
                match errno() {
                    libc::EACCES => failed = libc::EACCES,
                    libc::ENOENT | libc::ENOTDIR | libc::ESTALE | libc::ENODEV | libc::ETIMEDOUT => {}
                    errno => return Err(errno),
                }
            }
            Err(failed)
        }
    }
}

fn check(result: libc::c_long) -> Result<(), c_int> {
    if result < 0 { Err(errno()) } else { Ok(()) }
}

fn errno() -> c_int {
    // SAFETY: the C library's own place for it.
    unsafe { *libc::__errno_location() }
}

/// # Safety
/// `path` ends with NUL.
unsafe fn write_file(path: *const c_char, content: &[u8]) -> Result<(), c_int> {
    // SAFETY: the caller's path, and a buffer of the given length.
    unsafe {
        let descriptor = libc::open(path, libc::O_WRONLY | libc::O_CLOEXEC);
        check(descriptor.into())?;
        let written = check(libc::write(descriptor, content.as_ptr().cast(), content.len()) as libc::c_long);
        libc::close(descriptor);
        written
    }
}

/// As envd was started with them and as its runtime has set them; neither changes later.
fn ignored_signals() -> &'static [c_int] {
    static IGNORED: OnceLock<Vec<c_int>> = OnceLock::new();
    IGNORED.get_or_init(|| {
        let is_ignored = |signal: &c_int| {
            // SAFETY: all zeros is a sigaction, which the call fills in.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                libc::sigaction(*signal, std::ptr::null(), &raw mut action) == 0 && action.sa_sigaction == libc::SIG_IGN
            }
        };
        (1..=SIGNALS_PLAIN).filter(is_ignored).collect()
    })
}
