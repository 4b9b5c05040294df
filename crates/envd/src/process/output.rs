//! The way of output from a process to whoever listens.
//!
//! One pump per pipe reads and hands each piece to every listener, and waits for slow ones: that is how a slow client slows the process
//! down instead of losing output or filling memory. With nobody listening output is read on, so that a process whose client left does
//! not stand still for ever; what was said last is kept in a ring, for whoever comes (back) late.
//!
//! The end: when the process has exited, what lies in the pipe at that moment is its own and comes in full; what grandchildren that
//! hold the pipe say after it comes too, for less than a second.
//!
//! Output has a position: the number of bytes, of all channels together, that came before. A listener is told where its first piece
//! begins, and one that knows how much it has had already asks for the rest.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::sync::mpsc::error::SendTimeoutError;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

/// Pieces of 32 KiB that may wait for one listener.
const WAITING_MAX: usize = 16;
const PIECE: usize = 32 * 1024;
/// A listener that takes nothing for so long while others wait for the same output is cut off.
const LISTENER_PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether others wait.
const LISTENER_LOOK: Duration = Duration::from_secs(1);
/// After exit a pipe that grandchildren hold is read for so long, without the time that listeners take: the end event is promised
/// within a second.
const GRANDCHILDREN_TIME: Duration = Duration::from_millis(800);
/// And for so many bytes: a grandchild that writes without end must not hide the end of its parent.
const GRANDCHILDREN_BYTES: usize = 1024 * 1024;
/// What the kernel holds for a terminal at most (its flip buffers and its line): its own ioctl only tells of the line.
const TERMINAL_BYTES: usize = 128 * 1024;
/// Kept of one process's output; half of what may be under way to a listener whose connection is reset.
const RING_BYTES_MAX: usize = 256 * 1024;
/// Of a process that has ended.
const RING_BYTES_ENDED: usize = 64 * 1024;
/// Of each process while all of them together keep more than `RINGS_BYTES_MAX`.
const RING_BYTES_SCARCE: usize = 4 * 1024;
const RINGS_BYTES_MAX: usize = 8 * 1024 * 1024;
/// What a kept piece costs beside its bytes: a process may say a million times one byte.
const PIECE_COST: usize = 96;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    Stdout,
    Stderr,
    Pty,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Data(Channel, Bytes),
    End(Ended),
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// -1 when a signal ended it.
    pub code: i32,
    pub signal: Option<&'static str>,
}

/// What a listener hears: first what was kept, then what comes.
#[derive(Debug)]
pub struct Listener {
    /// Position of the first byte that it hears.
    pub from: u64,
    kept: VecDeque<Event>,
    coming: mpsc::Receiver<Event>,
}

impl Listener {
    /// `None` when nothing more comes. Cancel-safe.
    pub async fn hear(&mut self) -> Option<Event> {
        match self.kept.pop_front() {
            Some(event) => Some(event),
            None => self.coming.recv().await,
        }
    }
}

/// The listeners of one process, and the ring of what it said last.
#[derive(Debug, Default)]
pub struct Listeners(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    listeners: Vec<mpsc::Sender<Event>>,
    ring: Ring,
    /// Set when all output has been told.
    end: Option<Ended>,
}

impl Listeners {
    /// What is kept from position `from` on, everything from now on, and the end: each once, in order.
    pub fn listen(&self, from: u64) -> Listener {
        let (sender, coming) = mpsc::channel(WAITING_MAX);
        let mut state = self.lock();
        let (from, mut kept) = state.ring.since(from);
        match state.end.clone() {
            Some(end) => kept.push_back(Event::End(end)),
            None => state.listeners.push(sender),
        }
        Listener { from, kept, coming }
    }

    /// Hands a piece of output to everybody, waiting for room.
    async fn tell(&self, channel: Channel, bytes: Bytes) {
        // Kept and told to those who listen at one instant: who comes later finds it in the ring.
        let listeners = {
            let mut state = self.lock();
            state.ring.push(channel, bytes.clone());
            state.listeners.clone()
        };
        for listener in &listeners {
            if !self.give(listener, Event::Data(channel, bytes.clone())).await {
                self.lock().listeners.retain(|it| !it.same_channel(listener));
            }
        }
    }

    /// From now on whoever listens hears the end after what is kept. Those who listen already are still to be told.
    pub fn end(&self, ended: Ended) -> Told {
        let mut state = self.lock();
        state.ring.shrink(RING_BYTES_ENDED);
        state.end = Some(ended.clone());
        Told { listeners: std::mem::take(&mut state.listeners), ended }
    }

    /// False when the listener has left, or has kept others waiting for too long. One that is alone may take its time, until another
    /// comes.
    async fn give(&self, listener: &mpsc::Sender<Event>, mut event: Event) -> bool {
        let mut waited = Duration::ZERO;
        loop {
            event = match listener.send_timeout(event, LISTENER_LOOK).await {
                Ok(()) => return true,
                Err(SendTimeoutError::Closed(_)) => return false,
                Err(SendTimeoutError::Timeout(event)) => event,
            };
            waited += LISTENER_LOOK;
            let others = self.lock().listeners.iter().any(|it| !it.is_closed() && !it.same_channel(listener));
            if others && waited >= LISTENER_PATIENCE {
                return false;
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An end that its listeners are still to be told.
pub struct Told {
    listeners: Vec<mpsc::Sender<Event>>,
    ended: Ended,
}

impl Told {
    /// As long as the slowest of them takes: there is nothing after it that could wait.
    pub async fn everybody(self) {
        let tell = self.listeners.iter().map(|listener| listener.send(Event::End(self.ended.clone())));
        futures::future::join_all(tell).await;
    }
}

/// The last pieces of output, bounded for one process and for all together.
#[derive(Debug, Default)]
struct Ring {
    pieces: VecDeque<(Channel, Bytes)>,
    /// Bytes in `pieces`.
    kept: usize,
    /// Position after the last piece.
    said: u64,
}

/// What all rings cost together.
static RINGS_COST: AtomicUsize = AtomicUsize::new(0);

impl Ring {
    fn push(&mut self, channel: Channel, bytes: Bytes) {
        self.said += bytes.len() as u64;
        self.kept += bytes.len();
        let cost = bytes.len() + PIECE_COST;
        let all = RINGS_COST.fetch_add(cost, Ordering::Relaxed) + cost;
        self.pieces.push_back((channel, bytes));
        self.shrink(if all > RINGS_BYTES_MAX { RING_BYTES_SCARCE } else { RING_BYTES_MAX });
    }

    fn shrink(&mut self, cost_max: usize) {
        while self.cost() > cost_max {
            let Some((_, oldest)) = self.pieces.pop_front() else { return };
            self.kept -= oldest.len();
            RINGS_COST.fetch_sub(oldest.len() + PIECE_COST, Ordering::Relaxed);
        }
    }

    fn cost(&self) -> usize {
        self.kept + self.pieces.len() * PIECE_COST
    }

    /// The pieces from `from` on, as far as they are kept, and where they really begin.
    fn since(&self, from: u64) -> (u64, VecDeque<Event>) {
        let oldest = self.said - self.kept as u64;
        let begin = from.clamp(oldest, self.said);
        let mut skip = usize::try_from(begin - oldest).unwrap_or(usize::MAX);
        let mut events = VecDeque::new();
        for (channel, bytes) in &self.pieces {
            if skip >= bytes.len() {
                skip -= bytes.len();
                continue;
            }
            events.push_back(Event::Data(*channel, bytes.slice(skip..)));
            skip = 0;
        }
        (begin, events)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.shrink(0);
    }
}

/// Reads `pipe` to its end, or, once `exited` says so, all that the process itself has written and a little of what its grandchildren
/// write after it.
pub async fn pump(
    mut pipe: impl AsyncRead + AsRawFd + Unpin,
    channel: Channel,
    listeners: Arc<Listeners>,
    mut exited: watch::Receiver<bool>,
) {
    let mut buffer = vec![0u8; PIECE];
    loop {
        let read = tokio::select! {
            // The end first: a grandchild that never stops writing must not hide it.
            biased;
            _ = exited.wait_for(|exited| *exited) => break,
            read = pipe.read(&mut buffer) => read,
        };
        // A PTY whose other side is closed reads as EIO.
        let Ok(count @ 1..) = read else { return };
        listeners.tell(channel, Bytes::copy_from_slice(&buffer[..count])).await;
    }
    // What is certainly its own: it is there, so that reading it does not wait. Nobody tells how much that is of a terminal.
    let mut own = if channel == Channel::Pty { 0 } else { waiting_bytes(&pipe) };
    let mut others = GRANDCHILDREN_BYTES + if channel == Channel::Pty { TERMINAL_BYTES } else { 0 };
    let mut patience = GRANDCHILDREN_TIME;
    while others > 0 {
        let began = Instant::now();
        let read =
            if own > 0 { Ok(pipe.read(&mut buffer).await) } else { timeout(patience, pipe.read(&mut buffer)).await };
        let Ok(Ok(count @ 1..)) = read else { return };
        if own > 0 {
            own = own.saturating_sub(count);
        } else {
            patience = patience.saturating_sub(began.elapsed());
            others = others.saturating_sub(count);
        }
        listeners.tell(channel, Bytes::copy_from_slice(&buffer[..count])).await;
    }
}

fn waiting_bytes(pipe: &impl AsRawFd) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one c_int; the descriptor is open while `pipe` lives.
    unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    usize::try_from(count).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(text: &str) -> Event {
        Event::Data(Channel::Stdout, Bytes::copy_from_slice(text.as_bytes()))
    }

    async fn say(listeners: &Listeners, text: &str) {
        listeners.tell(Channel::Stdout, Bytes::copy_from_slice(text.as_bytes())).await;
    }

    #[tokio::test]
    async fn a_listener_that_left_is_forgotten_and_a_slow_one_is_waited_for() {
        let listeners = Arc::new(Listeners::default());
        drop(listeners.listen(0));
        say(&listeners, "lost").await;
        assert!(listeners.lock().listeners.is_empty());
        let mut slow = listeners.listen(4);
        let teller = tokio::spawn({
            let listeners = listeners.clone();
            async move {
                for n in 0..100u8 {
                    say(&listeners, &n.to_string()).await;
                }
            }
        });
        for n in 0..100u8 {
            tokio::task::yield_now().await;
            assert_eq!(slow.hear().await, Some(piece(&n.to_string())));
        }
        teller.await.unwrap();
    }

    #[tokio::test]
    async fn a_late_listener_hears_what_it_missed_once_and_the_end() {
        let listeners = Listeners::default();
        let mut early = listeners.listen(0);
        say(&listeners, "one").await;
        say(&listeners, "two").await;
        let mut late = listeners.listen(0);
        let mut knows = listeners.listen(4);
        let mut ahead = listeners.listen(1000);
        assert_eq!((late.from, knows.from, ahead.from), (0, 4, 6));
        say(&listeners, "three").await;
        let ended = Ended { code: 3, signal: None };
        let told = listeners.end(ended.clone());
        let mut after = listeners.listen(0);
        told.everybody().await;
        for (listener, pieces) in [
            (&mut early, &["one", "two", "three"][..]),
            (&mut late, &["one", "two", "three"]),
            (&mut knows, &["wo", "three"]),
            (&mut ahead, &["three"]),
            (&mut after, &["one", "two", "three"]),
        ] {
            for text in pieces {
                assert_eq!(listener.hear().await, Some(piece(text)));
            }
            assert_eq!(listener.hear().await, Some(Event::End(ended.clone())));
        }
    }

    #[tokio::test]
    async fn what_is_kept_is_bounded_and_says_where_it_begins() {
        let listeners = Listeners::default();
        let text = "x".repeat(PIECE);
        for _ in 0..100 {
            say(&listeners, &text).await;
        }
        let late = listeners.listen(0);
        assert!(listeners.lock().ring.cost() <= RING_BYTES_MAX);
        assert_eq!(late.from, (100 * PIECE - late.kept.len() * PIECE) as u64);
        drop(late);
        for _ in 0..100_000 {
            say(&listeners, "y").await;
        }
        assert!(listeners.lock().ring.cost() <= RING_BYTES_MAX);
    }
}
