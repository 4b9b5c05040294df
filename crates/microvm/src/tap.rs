//! The guest's network card on the host's side: a tap in a network namespace, made by the caller.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use nix::sched::{CloneFlags, setns};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tap {
    /// The namespace's file. A VMM that opens its tap by itself is put into it; it must be the VMM's alone.
    pub namespace: PathBuf,
    pub name: String,
}

impl Tap {
    /// Plain frames, no offloads, so that saved states fit any tap. One at a time has it open. Blocks.
    pub fn open(&self) -> io::Result<OwnedFd> {
        let namespace = File::open(&self.namespace)?;
        std::thread::scope(|scope| {
            // A thread that entered a namespace never does anything else.
            let worker = std::thread::Builder::new().name("tap".to_owned()).spawn_scoped(scope, move || {
                setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
                open(&self.name)
            })?;
            worker.join().map_err(|_| io::Error::other("opening a tap panicked"))?
        })
    }
}

/// In the calling thread's namespace.
fn open(name: &str) -> io::Result<OwnedFd> {
    // linux/if_tun.h
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let tun = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: all fields of ifreq may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the argument is a whole ifreq.
    if unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tun.into())
}
