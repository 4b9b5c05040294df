//! Sockets inside the outer namespace for tasks outside it: a socket belongs for ever to the namespace it was made in, so one thread that
//! lives there makes them and hands them out.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{FromRawFd as _, IntoRawFd as _, OwnedFd};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with, sockopt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{mpsc, oneshot};

use super::namespace;

/// Requests that wait; making a socket takes microseconds.
const WAITING_MAX: usize = 256;
/// A guest is one hop away: what does not answer in this time is not there.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// A guest that vanished is noticed by its silence.
const PEER_SILENCE_MS: u32 = 10_000;

pub struct Doorway {
    requests: mpsc::Sender<oneshot::Sender<io::Result<OwnedFd>>>,
}

impl Doorway {
    pub fn open(namespace: &str) -> io::Result<Self> {
        let namespace = File::open(namespace::path(namespace))?;
        let (requests, mut inbox) = mpsc::channel::<oneshot::Sender<io::Result<OwnedFd>>>(WAITING_MAX);
        let (entered, is_inside) = std::sync::mpsc::channel();
        std::thread::Builder::new().name("doorway".to_owned()).spawn(move || {
            let inside = setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(io::Error::from);
            let failed = inside.is_err();
            let _ = entered.send(inside);
            if failed {
                return;
            }
            // Ends when the last sender is gone.
            while let Some(reply) = inbox.blocking_recv() {
                let _ = reply.send(make());
            }
        })?;
        is_inside.recv().map_err(|_| io::Error::other("the doorway's thread died"))??;
        Ok(Self { requests })
    }

    pub async fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let closed = || io::Error::other("the doorway is closed");
        let (reply, made) = oneshot::channel();
        self.requests.send(reply).await.map_err(|_| closed())?;
        let socket = made.await.map_err(|_| closed())??;
        // SAFETY: the descriptor is a TCP socket of ours that nobody else has.
        let socket = unsafe { TcpSocket::from_raw_fd(socket.into_raw_fd()) };
        tokio::time::timeout(CONNECT_LIMIT, socket.connect(address))
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }
}

fn make() -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_tcp_user_timeout(&socket, PEER_SILENCE_MS)?;
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, Duration::from_secs(15))?;
    sockopt::set_tcp_keepintvl(&socket, Duration::from_secs(5))?;
    Ok(socket)
}
