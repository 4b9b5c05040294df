//! One listener at the guest's own address for each that is on loopback alone, and what it carries.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::list::Listener;
use crate::server::Guest;

/// Ports forwarded at once; the lowest win.
const PORTS_MAX: usize = 128;
/// Connections carried at once, of all ports: two descriptors and two buffers each.
const CONNECTIONS_MAX: usize = 256;
/// Each way. Larger than one read of a browser, small enough for all connections at once.
const BUFFER_BYTES: usize = 16 * 1024;
const BACKLOG: u32 = 128;

pub struct Forwarder {
    guest: Arc<Guest>,
    own: IpAddr,
    ports: HashMap<u16, Forward>,
    connections: Arc<Semaphore>,
}

/// Ends with its drop: nobody new is taken. What it carries goes on as long as both sides do.
struct Forward {
    to: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Forwarder {
    pub fn new(guest: Arc<Guest>, own: IpAddr) -> Self {
        Self { guest, own, ports: HashMap::new(), connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)) }
    }

    pub fn ports(&self) -> Vec<u16> {
        self.ports.keys().copied().collect()
    }

    /// Forwards what these listeners need, and no more.
    pub fn follow(&mut self, listeners: &[Listener]) {
        let wanted = wanted(listeners, self.own, &self.ports());
        // A port whose task has ended is tried again.
        self.ports.retain(|port, forward| wanted.get(port) == Some(&forward.to) && !forward.task.is_finished());
        for (port, to) in wanted {
            if self.ports.contains_key(&port) {
                continue;
            }
            // Taken by somebody else since the look, or not ours to take: the next look says.
            let Ok(listener) = listen(SocketAddr::from((self.own, port))) else { continue };
            let carrying = carry_all(self.guest.clone(), listener, to, self.connections.clone());
            self.ports.insert(port, Forward { to, task: tokio::spawn(carrying) });
        }
    }
}

/// Where each port that is on loopback alone is to be forwarded. `ours` are those that we listen on ourselves.
fn wanted(listeners: &[Listener], own: IpAddr, ours: &[u16]) -> HashMap<u16, SocketAddr> {
    let mut on_loopback: Vec<SocketAddr> = Vec::new();
    for (port, loopback) in listeners.iter().filter_map(|listener| Some((listener.port, loopback_of(listener, own)?))) {
        // IPv4 first: most servers that have both mean the same by them.
        on_loopback.retain(|it| it.port() != port || it.is_ipv4());
        if !on_loopback.iter().any(|it| it.port() == port) {
            on_loopback.push(SocketAddr::from((loopback, port)));
        }
    }
    // Who listens at the own address, or at all of them, needs nobody.
    let is_reachable = |port: u16| {
        listeners.iter().any(|listener| {
            let is_own = listener.address == own && !ours.contains(&port);
            listener.port == port && (is_own || listener.address.is_unspecified())
        })
    };
    on_loopback.retain(|it| it.port() != api::guest::PORT && !is_reachable(it.port()));
    on_loopback.sort_by_key(SocketAddr::port);
    on_loopback.into_iter().take(PORTS_MAX).map(|to| (to.port(), to)).collect()
}

fn loopback_of(listener: &Listener, own: IpAddr) -> Option<IpAddr> {
    let is_it =
        listener.address != own && (listener.address == Ipv4Addr::LOCALHOST || listener.address == Ipv6Addr::LOCALHOST);
    is_it.then_some(listener.address)
}

fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    let socket = if at.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A port whose connections linger can be listened on again.
    socket.set_reuseaddr(true)?;
    socket.bind(at)?;
    socket.listen(BACKLOG)
}

async fn carry_all(guest: Arc<Guest>, listener: TcpListener, to: SocketAddr, connections: Arc<Semaphore>) {
    loop {
        let Ok(place) = connections.clone().acquire_owned().await else { return };
        let Ok((outer, _)) = listener.accept().await else { return };
        let restores = guest.ports.restores.subscribe();
        // The server stands still while the guest is being saved; and after a restore nobody is there any more who came meanwhile.
        guest.quiet.over().await;
        if restores.has_changed().unwrap_or(true) {
            let _ = crate::server::reset_at_close(&outer);
            continue;
        }
        // The server behind it has gone: so does its stand-in, at once, so that a new one can take the port.
        let Ok(inner) = TcpStream::connect(to).await else { return };
        tokio::spawn(async move {
            carry(outer, inner, restores).await;
            drop(place);
        });
    }
}

/// To the end of both sides, or of the incarnation.
async fn carry(mut outer: TcpStream, mut inner: TcpStream, mut restores: tokio::sync::watch::Receiver<u64>) {
    // Small pieces go on as they come: who wants them gathered has gathered them.
    // A peer that vanishes is noticed as on envd's own connections.
    let _ = (crate::server::tune(&outer), inner.set_nodelay(true));
    let is_lost = {
        let both = tokio::io::copy_bidirectional_with_sizes(&mut outer, &mut inner, BUFFER_BYTES, BUFFER_BYTES);
        tokio::select! {
            _ = both => false,
            _ = restores.changed() => true,
        }
    };
    if is_lost {
        // The peer is gone with its incarnation: nothing is said to it any more, while the server hears that it is over.
        let _ = crate::server::reset_at_close(&outer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_on_loopback_alone_is_forwarded() {
        let own: IpAddr = "169.254.0.21".parse().unwrap();
        let listener = |at: &str| {
            let at: SocketAddr = at.parse().unwrap();
            Listener { address: at.ip(), port: at.port(), inode: 0 }
        };
        let listeners = [
            "127.0.0.1:8000",
            "[::1]:8001",
            "[::1]:8002",
            "127.0.0.1:8002",
            "127.0.0.1:8003",
            "0.0.0.0:8003",
            "127.0.0.1:8004",
            "169.254.0.21:8004",
            "127.0.0.1:8005",
            "[::]:8005",
            "127.0.0.1:49983",
            "127.0.0.53:53",
            "169.254.0.21:8006",
        ]
        .map(listener);
        let wanted_with = |ours: &[u16]| {
            let mut all: Vec<_> = wanted(&listeners, own, ours).into_values().map(|to| to.to_string()).collect();
            all.sort();
            all
        };
        assert_eq!(wanted_with(&[]), ["127.0.0.1:8000", "127.0.0.1:8002", "[::1]:8001"]);
        // What is at the own address is our own listener.
        assert_eq!(wanted_with(&[8004]), ["127.0.0.1:8000", "127.0.0.1:8002", "127.0.0.1:8004", "[::1]:8001"]);
    }
}
