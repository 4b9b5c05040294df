//! What a child does to itself before it becomes a VMM, whichever that is: it enters its control groups and a session of its own, holds
//! back no signals, and leaves no core files.

use std::ffi::CString;
use std::io;

use crate::{Error, Jail, path_text};

const NO_CORE: libc::rlimit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };

pub struct Session {
    cgroups: Vec<CString>,
}

impl Session {
    pub fn of(jail: &Jail) -> Result<Self, Error> {
        let text = |path: &std::path::PathBuf| {
            CString::new(path_text(path)).map_err(|e| Error::io("name a control group")(e.into()))
        };
        Ok(Self { cgroups: jail.cgroups.iter().map(text).collect::<Result<_, _>>()? })
    }

    /// Between fork and exec: only async-signal-safe calls; each that matters is checked.
    pub fn enter(&self) -> io::Result<()> {
        // SAFETY: plain system calls; every pointer is to memory of `self` or of this frame.
        unsafe {
            for cgroup in &self.cgroups {
                let fd = libc::open(cgroup.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                check(fd)?;
                check(libc::write(fd, c"0".as_ptr().cast(), 1) as libc::c_int)?;
                libc::close(fd);
            }
            // The caller may be spared where memory is short; a guest is not. Where it cannot be said, it is as it was.
            let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            if fd >= 0 {
                libc::write(fd, c"0".as_ptr().cast(), 1);
                libc::close(fd);
            }
            // Signals to the agent's group are not for the VMM; it outlives the agent.
            check(libc::setsid())?;
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            libc::umask(0o077);
            check(libc::setrlimit(libc::RLIMIT_CORE, &NO_CORE))
        }
    }
}

pub fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
