//! The accept loop, one task per connection, and what happens to connections around a snapshot.
//!
//! The loop is our own because a restored guest keeps TCP connections whose peers are gone: each connection is known
//! ([`registry::Registry`]) and can be ended politely (prepare) or at once (restore).

pub mod bodies;
pub mod registry;
pub mod routes;
mod stream;
pub mod sync;

use std::convert::Infallible;
use std::fs::File;
use std::future::{Future as _, poll_fn};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};

use crate::console::say;
use crate::freezer::Freezer;
use crate::metrics::Sampler;
use crate::ports::{self, Ports};
use crate::process::spawn;
use crate::process::starter::Starter;
use crate::process::table::Table;
use crate::session::Session;
use bodies::Bodies;
use registry::{Connection, Order, Registry};
use stream::Stream;
use sync::{Flush, Quiet};

/// From the first byte of a request to the last of its head.
const HEAD_TIME_MAX: Duration = Duration::from_secs(30);
/// A connection on which nothing is asked for so long is closed. Much longer than the host's pool keeps one (30 s), so that it is the host
/// who closes and no request meets a connection that is just going.
const IDLE_TIME_MAX: Duration = Duration::from_secs(600);
/// A peer that takes nothing of what was sent for so long is gone; a user who reads slowly takes something now and then.
const TAKE_TIME_MAX: Duration = Duration::from_secs(300);
const HEADERS_MAX: usize = 100;
/// One request's head, and what is read ahead of its body.
const BUFFER_BYTES_MAX: usize = 64 * 1024;
/// How long after accept fails (no descriptors, no memory) it is tried again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// All that a request can reach.
pub struct Guest {
    pub bodies: Arc<Bodies>,
    /// One `/init` at a time.
    pub introduction: tokio::sync::Mutex<()>,
    pub session: Session,
    pub registry: Registry,
    pub table: Arc<Table>,
    pub starter: Starter,
    pub freezer: Freezer,
    pub sampler: Sampler,
    pub quiet: Quiet,
    pub flush: Flush,
    pub ports: Ports,
}

/// Serves until the process ends. `standalone` prints the port that it got, and forwards only where it is told to.
pub async fn serve(address: SocketAddr, standalone: bool, forwards_at: Option<IpAddr>) -> io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    if standalone {
        use std::io::Write as _;
        writeln!(io::stdout(), "{}", listener.local_addr()?.port())?;
    }
    let guest = Arc::new(Guest {
        bodies: Arc::default(),
        introduction: tokio::sync::Mutex::default(),
        session: Session::new(standalone),
        registry: Registry::default(),
        table: Table::new(spawn::processes_max()),
        starter: Starter::new(),
        freezer: if standalone { Freezer::none() } else { Freezer::new() },
        sampler: Sampler::default(),
        quiet: Quiet::default(),
        flush: Flush::default(),
        ports: Ports::new(forwards_at),
    });
    let rpc = routes::rpc(&guest);
    tokio::spawn(ports::forward(guest.clone()));
    // A descriptor in hand: when no other is left it becomes the next connection's, so that somebody can still ask and be answered.
    let mut spare = None;
    loop {
        if spare.is_none() {
            spare = File::open("/dev/null").ok();
        }
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                let is_full = matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE));
                if is_full && spare.take().is_some() {
                    guest.registry.make_room();
                    continue;
                }
                say(format_args!("accept: {e}"));
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Err(e) = tune(&stream) {
            say(format_args!("{peer}: {e}"));
            continue;
        }
        let own = stream.local_addr().map_or(peer.ip(), |address| address.ip());
        // Without room the stream is dropped: a refusal that the client sees is better than a connection that nobody serves.
        let local = !standalone && is_of_the_guest(peer.ip(), own);
        let Some(connection) = guest.registry.enter(peer, local) else { continue };
        tokio::spawn(converse(guest.clone(), rpc.clone(), connection, own, stream));
    }
}

/// Whether a peer sits in this guest, at whichever of its addresses or behind a bridge of its own. Whoever is outside is reached from the
/// address that it came to; an own address from itself; a container from its bridge's.
fn is_of_the_guest(peer: IpAddr, own: IpAddr) -> bool {
    if peer.is_loopback() || peer == own {
        return true;
    }
    let any: IpAddr = if peer.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // Nothing is sent: it only asks the kernel for the way. Any port does.
    let source = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect((peer, 9))?;
        socket.local_addr()
    });
    source.is_ok_and(|source| source.ip() != own)
}

/// Nothing waits for more, and who has gone is noticed.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    // Without this each short answer waits 40 ms for a delayed acknowledgement.
    stream.set_nodelay(true)?;
    // A peer that vanished is noticed after two minutes instead of never.
    for (option, value) in [(libc::TCP_KEEPIDLE, 60), (libc::TCP_KEEPINTVL, 15), (libc::TCP_KEEPCNT, 4)] {
        set_option(stream, libc::IPPROTO_TCP, option, value)?;
    }
    // One that vanished while it is sent to, too: whoever waits for it to take its output waits no longer.
    let milliseconds = libc::c_int::try_from(TAKE_TIME_MAX.as_millis()).expect("five minutes fit");
    set_option(stream, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, milliseconds)?;
    set_option(stream, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)
}

fn set_option(stream: &TcpStream, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let size = libc::socklen_t::try_from(size_of::<libc::c_int>()).expect("four fits");
    // SAFETY: the value is a c_int and the size is its own.
    let done = unsafe { libc::setsockopt(stream.as_raw_fd(), level, option, (&raw const value).cast(), size) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Its peer is told that the connection is over, and nothing that still waits to be sent.
pub fn reset_at_close(stream: &impl AsRawFd) -> io::Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let size = libc::socklen_t::try_from(size_of::<libc::linger>()).expect("eight fits");
    // SAFETY: the value is a linger and the size is its own.
    let done = unsafe {
        libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), size)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

async fn converse(guest: Arc<Guest>, rpc: routes::Rpc, connection: Arc<Connection>, own: IpAddr, stream: TcpStream) {
    let _entry = Entry { guest: guest.clone(), connection: connection.clone() };
    // To reset a connection its socket must be reachable while hyper owns the stream.
    let socket = stream.as_raw_fd();
    let service = {
        let (guest, connection) = (guest.clone(), connection.clone());
        service_fn(move |request| {
            let (guest, rpc, connection) = (guest.clone(), rpc.clone(), connection.clone());
            // Apart, so that a connection whose answer has begun holds nothing of how it came about.
            Box::pin(async move { Ok::<_, Infallible>(routes::answer(guest, rpc, connection, own, request).await) })
        })
    };
    let mut serving = std::pin::pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            // It runs from the answer before on: `Stream` has the time of a head itself.
            .header_read_timeout(IDLE_TIME_MAX)
            .max_headers(HEADERS_MAX)
            .max_buf_size(BUFFER_BYTES_MAX)
            .serve_connection(TokioIo::new(Stream::new(stream, connection.clone(), HEAD_TIME_MAX)), service)
    );
    let mut heard = Order::Serve;
    poll_fn(|context| {
        let order = connection.listen(context.waker());
        if order > heard {
            heard = order;
            if order == Order::Reset {
                // SAFETY: `serving` still owns the stream, so the descriptor is open and that of this connection.
                let _ = reset_at_close(&unsafe { BorrowedFd::borrow_raw(socket) });
                return Poll::Ready(());
            }
            serving.as_mut().graceful_shutdown();
        }
        // How a conversation ends is the peer's business: a broken pipe is no event here.
        serving.as_mut().poll(context).map(drop)
    })
    .await;
}

/// A conversation's place in the registry, given back however it ends.
struct Entry {
    guest: Arc<Guest>,
    connection: Arc<Connection>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.guest.registry.leave(&self.connection);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_of_the_guest_is_known_as_its_own() {
        let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
        for own in ["127.0.0.1", "127.0.0.9", "::1"] {
            assert!(is_of_the_guest(own.parse().unwrap(), loopback), "{own}");
        }
        // The address that this machine has towards the outside, if any: an own one, seen from another.
        let outside = UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
            socket.connect("192.0.2.1:9")?;
            socket.local_addr()
        });
        if let Ok(address) = outside {
            assert!(is_of_the_guest(address.ip(), loopback));
            assert!(!is_of_the_guest("192.0.2.1".parse().unwrap(), address.ip()));
        }
    }
}
