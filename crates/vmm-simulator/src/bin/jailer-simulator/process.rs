//! What the process gives up and takes on before it is the program.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use nix::sched::CloneFlags;
use nix::sys::resource::{Resource, setrlimit};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::ForkResult;

use crate::arguments::{Arguments, Limits};
use crate::jail::Jail;

/// When the jailer started; the program counts from there.
pub struct Clocks {
    wall_us: i64,
    cpu_us: i64,
}

impl Clocks {
    pub fn now() -> Self {
        Self {
            wall_us: microseconds(ClockId::CLOCK_MONOTONIC),
            cpu_us: microseconds(ClockId::CLOCK_PROCESS_CPUTIME_ID),
        }
    }
}

/// Everything over standard error, whoever left it open.
pub fn close_inherited() -> anyhow::Result<()> {
    // SAFETY: this program has opened nothing yet.
    let done = unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE.cast_signed()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()).context("Failed to close file descriptors") }
}

pub fn join_netns(path: &Path) -> anyhow::Result<()> {
    let namespace = File::open(path).with_context(|| format!("Failed to open file {}", path.display()))?;
    nix::sched::setns(namespace, CloneFlags::CLONE_NEWNET)
        .map_err(io::Error::from)
        .context("Failed to set network namespace")
}

pub fn set_limits(limits: &Limits) -> anyhow::Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, limits.files, limits.files)
        .map_err(io::Error::from)
        .context("Failed to set limit for resource no-file")?;
    if let Some(bytes) = limits.file_bytes {
        setrlimit(Resource::RLIMIT_FSIZE, bytes, bytes)
            .map_err(io::Error::from)
            .context("Failed to set limit for resource fsize")?;
    }
    Ok(())
}

/// True in the parent, whose part is over.
pub fn daemonize(null: File) -> anyhow::Result<bool> {
    // SAFETY: this program has one thread.
    let forked = unsafe { nix::unistd::fork() };
    if let ForkResult::Parent { .. } = forked.map_err(io::Error::from).context("Failed to daemonize")? {
        return Ok(true);
    }
    nix::unistd::setsid().map_err(io::Error::from).context("Failed to daemonize")?;
    for standard in 0..=2 {
        // SAFETY: both are descriptors of this process, and nothing owns the standard ones.
        if unsafe { libc::dup2(null.as_raw_fd(), standard) } < 0 {
            return Err(io::Error::last_os_error()).context("Failed to daemonize");
        }
    }
    Ok(false)
}

/// Returns only in the parent of a new pid namespace, or when the program cannot be started.
pub fn become_program(arguments: &Arguments, jail: &Jail, clocks: &Clocks) -> anyhow::Result<()> {
    let used_us = microseconds(ClockId::CLOCK_PROCESS_CPUTIME_ID) - clocks.cpu_us;
    if !arguments.new_pid_ns {
        return Err(exec(arguments, jail, clocks, clocks.cpu_us, 0)).context("Failed to exec into Firecracker");
    }
    // SAFETY: without CLONE_VM and with one thread this is a fork, whose child goes on with copies of everything.
    let child = unsafe {
        libc::syscall(libc::SYS_clone, libc::c_long::from(libc::CLONE_NEWPID), 0_usize, 0_usize, 0_usize, 0_usize)
    };
    match child {
        ..0 => Err(io::Error::last_os_error()).context("Failed cloning into a new child process"),
        0 => Err(exec(arguments, jail, clocks, 0, used_us)).context("Failed to exec into Firecracker"),
        pid => {
            let path = format!("/{}.pid", jail.program);
            let file = fs::OpenOptions::new().write(true).create_new(true).open(&path);
            let mut file = file.with_context(|| format!("Failed to open file {path}"))?;
            write!(file, "{pid}").with_context(|| format!("Failed to write to {path}"))
        }
    }
}

/// With an environment of nothing, and of the user's groups only the given one.
fn exec(arguments: &Arguments, jail: &Jail, clocks: &Clocks, start_cpu_us: i64, parent_cpu_us: i64) -> io::Error {
    Command::new(format!("/{}", jail.program))
        .args(["--id", &arguments.id])
        .args(["--start-time-us", &clocks.wall_us.to_string()])
        .args(["--start-time-cpu-us", &start_cpu_us.to_string()])
        .args(["--parent-cpu-time-us", &parent_cpu_us.to_string()])
        .args(&arguments.extra)
        .env_clear()
        .gid(arguments.gid)
        .uid(arguments.uid)
        .exec()
}

fn microseconds(clock: ClockId) -> i64 {
    clock_gettime(clock).map_or(0, |time| time.tv_sec() * 1_000_000 + time.tv_nsec() / 1000)
}
