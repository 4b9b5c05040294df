//! After a restore: the guest's connections to the outside are dead, and nobody tells. Their processes would wait for an answer for many
//! minutes; so they are ended here, by the kernel's `SOCK_DESTROY`, and a program that retries goes on at once.
//!
//! Kept are connections between addresses of the guest, envd's own (the registry knows those better), and all in other network
//! namespaces.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::Duration;

use crate::console::say;

const NETLINK_SOCK_DIAG: libc::c_int = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const HEADER_BYTES: usize = 16;
/// `struct inet_diag_req_v2`.
const REQUEST_BYTES: usize = 56;
/// `struct inet_diag_sockid`, and where it begins in requests and in answers.
const ID_BYTES: usize = 48;
const ID_IN_REQUEST: usize = 8;
const ID_IN_ANSWER: usize = 4;
/// All states but TIME_WAIT (6), which is nobody's socket any more, CLOSE (7) and LISTEN (10).
const STATES: u32 = 0xfff & !(1 << 6 | 1 << 7 | 1 << 10);
/// Connections ended at most; a guest that has more has other worries.
const CONNECTIONS_MAX: usize = 16 * 1024;
/// The kernel answers at once.
const TIME_MAX: Duration = Duration::from_secs(2);
const ANSWER_BYTES_MAX: usize = 32 * 1024;

/// Ends them. Blocks for a moment. A kernel that cannot do that keeps them: they end by their own timeouts.
pub fn end_lost_connections() {
    let own = own_addresses();
    match end(|id| id.local_port != api::guest::PORT && id.is_outside(&own)) {
        Ok(0) => {}
        Ok(count) => say(format_args!("ended {count} connections of before")),
        Err(e) => say(format_args!("end lost connections: {e}")),
    }
}

fn own_addresses() -> Vec<IpAddr> {
    let all = nix::ifaddrs::getifaddrs().into_iter().flatten().filter_map(|interface| interface.address);
    all.filter_map(|address| {
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::from(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::from(address.ip())))
    })
    .collect()
}

/// A connection, as the kernel names it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Id {
    family: u8,
    bytes: [u8; ID_BYTES],
    local_port: u16,
    remote: IpAddr,
}

impl Id {
    /// Of the payload of an answer.
    fn read(answer: &[u8]) -> Option<Self> {
        let family = *answer.first()?;
        let bytes: [u8; ID_BYTES] = answer.get(ID_IN_ANSWER..ID_IN_ANSWER + ID_BYTES)?.try_into().ok()?;
        // Ports are 2 bytes each, then 16 bytes for either address.
        let remote: [u8; 16] = bytes[20..36].try_into().ok()?;
        let remote = match i32::from(family) {
            libc::AF_INET => IpAddr::from(Ipv4Addr::new(remote[0], remote[1], remote[2], remote[3])),
            _ => Ipv6Addr::from(remote).to_canonical(),
        };
        Some(Self { family, bytes, local_port: u16::from_be_bytes([bytes[0], bytes[1]]), remote })
    }

    fn is_outside(&self, own: &[IpAddr]) -> bool {
        !self.remote.is_loopback() && !own.contains(&self.remote)
    }
}

/// Ends each connection that `is_lost`, and counts them.
fn end(is_lost: impl Fn(&Id) -> bool) -> io::Result<usize> {
    let socket = open()?;
    let mut lost = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let family = u8::try_from(family).expect("families are small numbers");
        send(&socket, SOCK_DIAG_BY_FAMILY, libc::NLM_F_DUMP, family, &[0; ID_BYTES])?;
        let listed = receive(&socket, |kind, payload| {
            if kind == SOCK_DIAG_BY_FAMILY && lost.len() < CONNECTIONS_MAX {
                lost.extend(Id::read(payload).filter(&is_lost));
            }
        });
        // A kernel without IPv6 has no such connections.
        listed.or_else(|e| if e.raw_os_error() == Some(libc::ENOENT) { Ok(()) } else { Err(e) })?;
    }
    let mut count = 0;
    for id in lost {
        send(&socket, SOCK_DESTROY, libc::NLM_F_ACK, id.family, &id.bytes)?;
        match receive(&socket, |_, _| {}) {
            Ok(()) => count += 1,
            // It has ended by itself.
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(count)
}

fn open() -> io::Result<OwnedFd> {
    // SAFETY: socket has no memory effects.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, NETLINK_SOCK_DIAG) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::net::sockopt::set_socket_timeout(&socket, rustix::net::sockopt::Timeout::Recv, Some(TIME_MAX))?;
    Ok(socket)
}

fn send(socket: &OwnedFd, kind: u16, flags: libc::c_int, family: u8, id: &[u8; ID_BYTES]) -> io::Result<()> {
    let mut message = [0u8; HEADER_BYTES + REQUEST_BYTES];
    let length = u32::try_from(message.len()).expect("72 fits");
    let flags = u16::try_from(flags | libc::NLM_F_REQUEST).expect("flags are 16 bits");
    message[0..4].copy_from_slice(&length.to_ne_bytes());
    message[4..6].copy_from_slice(&kind.to_ne_bytes());
    message[6..8].copy_from_slice(&flags.to_ne_bytes());
    let request = &mut message[HEADER_BYTES..];
    request[0] = family;
    request[1] = u8::try_from(libc::IPPROTO_TCP).expect("6 fits");
    request[4..8].copy_from_slice(&STATES.to_ne_bytes());
    request[ID_IN_REQUEST..].copy_from_slice(id);
    // SAFETY: the buffer is valid for its length.
    let sent = unsafe { libc::send(socket.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Hands each message's kind and payload to `take`, up to the end of the answer.
fn receive(socket: &OwnedFd, mut take: impl FnMut(u16, &[u8])) -> io::Result<()> {
    let cut = || io::Error::from(io::ErrorKind::InvalidData);
    let mut buffer = vec![0u8; ANSWER_BYTES_MAX];
    loop {
        // SAFETY: the buffer is valid for its length.
        let count = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        let mut left = &buffer[..count];
        if left.is_empty() {
            return Err(cut());
        }
        while !left.is_empty() {
            let length = u32::from_ne_bytes(left.get(0..4).ok_or_else(cut)?.try_into().map_err(|_| cut())?) as usize;
            let kind = u16::from_ne_bytes(left.get(4..6).ok_or_else(cut)?.try_into().map_err(|_| cut())?);
            let payload = left.get(HEADER_BYTES..length).ok_or_else(cut)?;
            match i32::from(kind) {
                libc::NLMSG_DONE => return Ok(()),
                libc::NLMSG_ERROR => {
                    let code = i32::from_ne_bytes(payload.get(0..4).ok_or_else(cut)?.try_into().map_err(|_| cut())?);
                    return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                }
                _ => take(kind, payload),
            }
            left = left.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn own_addresses_are_not_outside() {
        let own = own_addresses();
        assert!(own.contains(&IpAddr::from(Ipv4Addr::LOCALHOST)));
        let id = |remote: &str| Id { family: 2, bytes: [0; ID_BYTES], local_port: 1, remote: remote.parse().unwrap() };
        assert!(id("192.0.2.1").is_outside(&own));
        assert!(!id("127.0.0.5").is_outside(&own) && !id("::1").is_outside(&own));
        assert!(!id("10.0.0.1").is_outside(&["10.0.0.1".parse().unwrap()]));
    }

    #[test]
    fn a_lost_connection_ends_and_others_go_on() {
        let connection = || {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (near, listener.accept().unwrap().0)
        };
        let ((mut lost, _far), (mut kept, mut other)) = (connection(), connection());
        let port = lost.local_addr().unwrap().port();
        match end(|id| id.local_port == port) {
            Ok(count) => assert_eq!(count, 1),
            // A kernel without it, or no right to.
            Err(e) => {
                assert!(matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EPERM)), "{e}");
                return;
            }
        }
        assert_eq!(lost.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        kept.write_all(b"x").unwrap();
        assert_eq!(other.read(&mut [0]).unwrap(), 1);
        assert_eq!(end(|_| false).unwrap(), 0);
    }
}
