//! Ends every process of one sandbox's uid. The uid is that sandbox's alone, so whatever runs under it is its VMM or a child of it.

use std::collections::BTreeSet;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How long a killed process may take to end: its memory has to be given back first.
const END_TIME_MAX: Duration = Duration::from_secs(10);

/// Blocking. Returns how many processes there were, when none is left.
pub fn sweep(uid: u32) -> io::Result<usize> {
    let end = Instant::now() + END_TIME_MAX;
    let mut ended = 0;
    loop {
        // Again until nothing is found: a process may have forked between being seen and being killed.
        let found = processes(uid)?;
        if found.is_empty() {
            return Ok(ended);
        }
        for pidfd in found {
            ended += 1;
            match pidfd_send_signal(&pidfd, Signal::KILL) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(errno) => return Err(errno.into()),
            }
            let left = end.saturating_duration_since(Instant::now());
            let timeout = rustix::event::Timespec::try_from(left).map_err(io::Error::other)?;
            if poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout))? == 0 {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "a killed process does not end"));
            }
        }
    }
}

/// The uids of the range under which something runs.
pub fn living(uids: RangeInclusive<u32>) -> io::Result<BTreeSet<u32>> {
    Ok(pids()?.filter_map(owner).filter(|uid| uids.contains(uid)).collect())
}

fn pids() -> io::Result<impl Iterator<Item = Pid>> {
    let number = |entry: std::fs::DirEntry| entry.file_name().to_str()?.parse::<i32>().ok();
    Ok(std::fs::read_dir("/proc")?.flatten().filter_map(number).filter_map(Pid::from_raw))
}

/// The living processes of the uid, held by descriptors that no reused pid can take the place of.
fn processes(uid: u32) -> io::Result<Vec<OwnedFd>> {
    let mut found = Vec::new();
    for pid in pids()? {
        if owner(pid) != Some(uid) {
            continue;
        }
        match pidfd_open(pid, PidfdFlags::empty()) {
            // Looked at again: between the two the pid may have become another's.
            Ok(pidfd) if owner(pid) == Some(uid) => found.push(pidfd),
            Ok(_) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(found)
}

/// The real uid of a process; None when it is gone or only waits to be reaped.
fn owner(pid: Pid) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).ok()?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    if field("State:")?.starts_with(['Z', 'X']) {
        return None;
    }
    field("Uid:")?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn ends_what_has_the_uid_and_nothing_else() {
        // No other test uses it, and no package gives it to anyone.
        let uid = 0x7ab1_2345;
        let start = |uid| Command::new("sleep").arg("300").uid(uid).spawn().unwrap();
        let (mut ours, mut other) = (start(uid), start(uid + 1));
        assert_eq!(living(uid..=uid + 1).unwrap(), [uid, uid + 1].into());
        assert_eq!(sweep(uid).unwrap(), 1);
        assert_eq!(sweep(uid).unwrap(), 0);
        ours.wait().unwrap();
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
