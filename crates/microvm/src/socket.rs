//! Control sockets of VMMs, in directories of which a VMM that was taken over may be the owner.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use tokio::net::UnixStream;

/// Of the file of that name in this very directory, never of what a link there leads to.
pub async fn connect(dir: &Path, name: &str) -> io::Result<UnixStream> {
    let socket = within(dir, name, OFlags::PATH)?;
    // By descriptor: a socket address holds 107 bytes, a path may be longer.
    UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
}

/// Opens what is in a directory that may be an attacker's: no links, nothing outside.
pub fn within(dir: &Path, name: &str, flags: OFlags) -> io::Result<OwnedFd> {
    let dir = rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    Ok(rustix::fs::openat2(&dir, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), resolve)?)
}
