//! A TCP proxy that breaks what goes through it, between any two programs of a test.
//!
//! Each way has a [`Way`] of its own, which holds for open connections and for new ones from the moment it is set. Bytes that are held go
//! on when the way is open again, as TCP's own repetitions do after a partition. With several targets it is a balancer as well: new
//! connections go to them in turn, and past those that refuse.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

const CHUNK_BYTES: usize = 16 * 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// What becomes of the bytes of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Open,
    /// They wait: nobody hears anything, and nobody is told.
    Held,
    Delayed(Duration),
    /// So many of each connection pass, then it ends.
    CutAfter(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weather {
    /// Whether connections come about at all.
    pub accepts: bool,
    /// From those who connect to the target.
    pub there: Way,
    pub back: Way,
}

pub const FAIR: Weather = Weather { accepts: true, there: Way::Open, back: Way::Open };
/// Nothing passes, in silence.
pub const SILENT: Weather = Weather { accepts: true, there: Way::Held, back: Way::Held };
pub const REFUSED: Weather = Weather { accepts: false, there: Way::Open, back: Way::Open };

/// The next reply to a message that holds these bytes is kept back, and the connection ends.
#[derive(Debug, Clone)]
struct Trap {
    needle: Vec<u8>,
    /// So many such messages pass before.
    spared: u64,
}

pub struct CutProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    listening: AbortHandle,
}

struct Shared {
    targets: Mutex<Vec<Target>>,
    turn: AtomicUsize,
    weather: watch::Sender<Weather>,
    /// Grows when all open connections are to end.
    cuts: watch::Sender<u64>,
    trap: Mutex<Option<Trap>>,
    sprung: AtomicU64,
}

impl CutProxy {
    pub async fn start(targets: &[Target]) -> io::Result<Self> {
        Self::start_at([127, 0, 0, 1].into(), targets).await
    }

    /// On a port of this address of the machine.
    pub async fn start_at(own: IpAddr, targets: &[Target]) -> io::Result<Self> {
        let listener = TcpListener::bind((own, 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            targets: Mutex::new(targets.to_vec()),
            turn: AtomicUsize::new(0),
            weather: watch::Sender::new(FAIR),
            cuts: watch::Sender::new(0),
            trap: Mutex::default(),
            sprung: AtomicU64::new(0),
        });
        let listening = tokio::spawn(listen(listener, shared.clone())).abort_handle();
        Ok(Self { address, shared, listening })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn lead_to(&self, targets: &[Target]) {
        *lock(&self.shared.targets) = targets.to_vec();
    }

    pub fn set(&self, weather: Weather) {
        self.shared.weather.send_replace(weather);
    }

    /// Ends all open connections.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|count| *count += 1);
    }

    /// After `spared` others, the next message from this side with `needle` in it reaches the target, whose reply is lost with the
    /// connection.
    pub fn lose_reply_to(&self, needle: &[u8], spared: u64) {
        *lock(&self.shared.trap) = Some(Trap { needle: needle.to_vec(), spared });
    }

    /// No reply is lost any more. True: none was, since it was asked for.
    pub fn spare_replies(&self) -> bool {
        lock(&self.shared.trap).take().is_some()
    }

    /// How many replies were lost in all.
    pub fn replies_lost(&self) -> u64 {
        self.shared.sprung.load(Ordering::Relaxed)
    }
}

impl Drop for CutProxy {
    fn drop(&mut self) {
        // With it go the connections, which are its tasks.
        self.listening.abort();
    }
}

async fn listen(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((near, _)) = accepted else { continue };
                if shared.weather.borrow().accepts {
                    connections.spawn(relay(near, shared.clone()));
                } else {
                    reset(near);
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Ends it with RST, so that who connects does not take it for an end in order.
fn reset(stream: TcpStream) {
    let _ = stream.set_zero_linger();
    drop(stream);
}

async fn relay(near: TcpStream, shared: Arc<Shared>) {
    let mut cuts = shared.cuts.subscribe();
    cuts.mark_unchanged();
    let _ = near.set_nodelay(true);
    let targets = lock(&shared.targets).clone();
    let first = shared.turn.fetch_add(1, Ordering::Relaxed);
    for number in 0..targets.len() {
        match &targets[(first + number) % targets.len()] {
            Target::Tcp(address) => {
                if let Ok(far) = TcpStream::connect(address).await {
                    let _ = far.set_nodelay(true);
                    return both_ways(near, far, &shared, cuts).await;
                }
            }
            Target::Unix(path) => {
                if let Ok(far) = UnixStream::connect(path).await {
                    return both_ways(near, far, &shared, cuts).await;
                }
            }
        }
    }
    reset(near);
}

async fn both_ways<S: AsyncRead + AsyncWrite>(
    mut near: TcpStream,
    far: S,
    shared: &Shared,
    mut cuts: watch::Receiver<u64>,
) {
    let (near_read, near_write) = near.split();
    let (far_read, far_write) = tokio::io::split(far);
    // Whether the reply to what was sent last is kept back.
    let armed = AtomicBool::new(false);
    let there = pass(near_read, far_write, shared, Side::There(&armed));
    let back = pass(far_read, near_write, shared, Side::Back(&armed));
    let is_cut = tokio::select! {
        ended = async { tokio::try_join!(there, back) } => ended.is_err(),
        _ = cuts.changed() => true,
    };
    if is_cut {
        reset(near);
    }
}

enum Side<'a> {
    There(&'a AtomicBool),
    Back(&'a AtomicBool),
}

/// An error ends the other way as well.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    shared: &Shared,
    side: Side<'_>,
) -> io::Result<()> {
    let way = |weather: &Weather| match side {
        Side::There(_) => weather.there,
        Side::Back(_) => weather.back,
    };
    let mut weather = shared.weather.subscribe();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut passed = 0;
    loop {
        let count = from.read(&mut chunk).await?;
        match side {
            Side::There(armed) if shared.springs(&chunk[..count]) => armed.store(true, Ordering::Relaxed),
            Side::Back(armed) if armed.load(Ordering::Relaxed) => {
                shared.sprung.fetch_add(1, Ordering::Relaxed);
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            _ => {}
        }
        let present = weather.wait_for(|weather| way(weather) != Way::Held).await.map(|present| way(&present));
        match present.expect("its sender is in the same place as this") {
            Way::Delayed(time) => tokio::time::sleep(time).await,
            Way::CutAfter(bytes) if passed >= bytes && count > 0 => {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            _ => {}
        }
        if count == 0 {
            return to.shutdown().await;
        }
        to.write_all(&chunk[..count]).await?;
        passed += count as u64;
    }
}

impl Shared {
    fn springs(&self, message: &[u8]) -> bool {
        let mut trap = lock(&self.trap);
        let Some(set) = trap.as_mut() else { return false };
        if !message.windows(set.needle.len()).any(|window| window == set.needle) {
            return false;
        }
        if set.spared > 0 {
            set.spared -= 1;
            return false;
        }
        *trap = None;
        true
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
