//! A VMM's process, held by a pidfd: its end is noticed at once, and a number that the kernel has given to another process is never
//! signalled or adopted.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::{Error, Stamp, Stats};

/// A killed process is gone when the kernel has freed its memory: for a large guest on a busy machine seconds.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// What another run needs to take a microVM over. Small, serialisable, written to the caller's journal before the guest matters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    pub driver: String,
    pub vmm_version: String,
    pub pid: i32,
    /// Clock ticks from boot to the process's start: with the pid and the boot id it names one process for ever.
    pub start_ticks: u64,
    pub boot_id: String,
    /// The run directory with the control socket.
    pub dir: PathBuf,
    /// The guest's memory file, and whether it is mapped privately.
    pub memory: PathBuf,
    pub memory_private: bool,
    pub memory_mib: u32,
    /// What its saved states are made by; none where an earlier program has written this.
    #[serde(default)]
    pub made_by: Option<Stamp>,
}

/// How a process ended, as far as can be known: one that was adopted is no child, and its status went to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitCause {
    Code(i32),
    Signal(i32),
    Unknown,
}

impl fmt::Display for ExitCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "the microVM's process ended with status {code}"),
            Self::Signal(signal) => write!(f, "the microVM's process was ended by signal {signal}"),
            Self::Unknown => f.write_str("the microVM's process ended"),
        }
    }
}

/// A child that is not yet what it should become. Dropped, also by a start that was given up half way, it is killed and collected; once
/// disarmed, nothing is.
#[derive(Debug)]
pub struct Unborn {
    pidfd: Option<OwnedFd>,
}

impl Unborn {
    /// Of a child right after the spawn, while nothing else can have collected it.
    pub fn of(pid: i32) -> io::Result<Self> {
        let number = Pid::from_raw(pid).ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
        Ok(Self { pidfd: Some(rustix::process::pidfd_open(number, PidfdFlags::empty())?) })
    }

    /// Blocks until it has ended, and no longer than that.
    pub fn ends_within(&self, limit: Duration) -> bool {
        let Some(pidfd) = &self.pidfd else { return false };
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = rustix::event::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let mut watched = [rustix::event::PollFd::new(pidfd, rustix::event::PollFlags::IN)];
            match rustix::event::poll(&mut watched, Some(&left)) {
                // A signal that is somebody else's.
                Err(rustix::io::Errno::INTR) => {}
                Ok(count) => return count > 0,
                Err(_) => return false,
            }
        }
    }

    pub fn disarm(mut self) {
        self.pidfd = None;
    }
}

impl Drop for Unborn {
    fn drop(&mut self) {
        let Some(pidfd) = &self.pidfd else { return };
        let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
        // Waits for as long as the kernel frees its memory.
        let mut watched = [rustix::event::PollFd::new(pidfd, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: KILL_LIMIT.as_secs() as i64, tv_nsec: 0 };
        let _ = rustix::event::poll(&mut watched, Some(&limit));
        // When a watching task was first, or it is no child, there is nothing to collect.
        status_of(pidfd.as_raw_fd(), libc::WNOHANG);
    }
}

#[derive(Debug)]
pub struct Process {
    pid: Pid,
    pidfd: std::sync::Arc<AsyncFd<OwnedFd>>,
    ended: watch::Receiver<Option<ExitCause>>,
}

impl Process {
    /// A child that was just spawned.
    pub fn of_child(pid: i32) -> io::Result<Self> {
        Self::hold(pid)
    }

    /// The process of a record, when it is still that very one.
    pub fn of_record(record: &ProcessRecord) -> Result<Self, Error> {
        if boot_id().map_err(Error::io("read the boot id"))? != record.boot_id {
            return Err(Error::Gone);
        }
        // Held first, compared then: between the two the number cannot change hands.
        let process = Self::hold(record.pid).map_err(|_| Error::Gone)?;
        // One that has ended keeps its number until its parent, who may be anybody, has asked how.
        if start_ticks(record.pid).map_err(|_| Error::Gone)? != record.start_ticks || has_ended(record.pid) {
            return Err(Error::Gone);
        }
        Ok(process)
    }

    fn hold(pid: i32) -> io::Result<Self> {
        let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        // SAFETY: the descriptor is owned by what is registered and closed only with it.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }.map_err(io::Error::from)?;
        let pidfd = std::sync::Arc::new(pidfd);
        let (sender, ended) = watch::channel(None);
        let watched = pidfd.clone();
        tokio::spawn(async move {
            // A pidfd becomes readable when its process ends, and stays so.
            let cause = match watched.readable().await {
                Ok(_) => status_of(watched.get_ref().as_raw_fd(), libc::WNOHANG),
                Err(_) => ExitCause::Unknown,
            };
            sender.send_replace(Some(cause));
        });
        Ok(Self { pid, pidfd, ended })
    }

    pub fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    pub async fn exited(&self) -> ExitCause {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(cause) => cause.clone().expect("waited for that"),
            // The watching task died with its runtime.
            Err(_) => ExitCause::Unknown,
        }
    }

    pub async fn kill(&self) -> Result<(), Error> {
        if !self.has_ended() {
            match rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(e) => return Err(Error::Io { what: "kill the VMM", cause: e.into() }),
            }
        }
        let gone = tokio::time::timeout(KILL_LIMIT, self.exited()).await;
        gone.map(|_| ()).map_err(|_| Error::Silent { command: "SIGKILL", limit: KILL_LIMIT })
    }

    /// Of the process of this handle only: after its end there is nothing to look at.
    pub fn stats(&self) -> Result<Stats, Error> {
        if self.has_ended() {
            return Err(Error::Gone);
        }
        let pid = self.pid.as_raw_nonzero();
        let text = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).map_err(|_| Error::Gone);
        let pages: u64 =
            text("statm")?.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).ok_or(Error::Gone)?;
        let stat = text("stat")?;
        let ticks: u64 = fields_after_name(&stat).skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
        let per_second = rustix::param::clock_ticks_per_second().max(1);
        Ok(Stats {
            rss_bytes: pages * rustix::param::page_size() as u64,
            cpu: Duration::from_millis(ticks * 1000 / per_second),
        })
    }
}

/// Takes the status of a child; of a process that is no child there is none to take.
fn status_of(pidfd: RawFd, options: libc::c_int) -> ExitCause {
    // SAFETY: all fields of siginfo_t may be zero; the call fills it.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let id = libc::id_t::try_from(pidfd).expect("a descriptor is not negative");
    // SAFETY: `info` is a whole siginfo_t.
    let done = unsafe { libc::waitid(libc::P_PIDFD, id, &raw mut info, libc::WEXITED | options) };
    if done != 0 {
        return ExitCause::Unknown;
    }
    // SAFETY: waitid has filled the fields of a child's end.
    let status = unsafe { info.si_status() };
    match info.si_code {
        libc::CLD_EXITED => ExitCause::Code(status),
        libc::CLD_KILLED | libc::CLD_DUMPED => ExitCause::Signal(status),
        _ => ExitCause::Unknown,
    }
}

pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Field 22 of `/proc/<pid>/stat`.
pub fn start_ticks(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    fields_after_name(&stat)
        .nth(19)
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no start time"))
}

fn has_ended(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !fields_after_name(&stat).next().is_some_and(|state| !matches!(state, "Z" | "X"))
}

/// Fields from the third (state) on. The second is the program's name in brackets and may hold anything, brackets too.
fn fields_after_name(stat: &str) -> impl Iterator<Item = &str> {
    stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let mut fields = fields_after_name("7 (a) b) (c) S 1 2 3");
        assert_eq!(fields.next(), Some("S"));
        assert_eq!(fields.next(), Some("1"));
        assert!(start_ticks(std::process::id() as i32).unwrap() > 0);
    }

    #[tokio::test]
    async fn a_record_of_another_time_is_refused() {
        let record = ProcessRecord {
            driver: "fake".into(),
            vmm_version: String::new(),
            pid: std::process::id() as i32,
            start_ticks: start_ticks(std::process::id() as i32).unwrap(),
            boot_id: boot_id().unwrap(),
            dir: "/".into(),
            memory: "/".into(),
            memory_private: false,
            memory_mib: 1,
            made_by: None,
        };
        assert!(Process::of_record(&record).is_ok());
        for other in [
            ProcessRecord { start_ticks: record.start_ticks + 1, ..record.clone() },
            ProcessRecord { boot_id: "another".into(), ..record.clone() },
            ProcessRecord { pid: 0, ..record.clone() },
            ProcessRecord { pid: i32::MAX, ..record.clone() },
        ] {
            assert!(matches!(Process::of_record(&other), Err(Error::Gone)), "{other:?}");
        }
    }
}
