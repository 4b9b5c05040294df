//! The way of output from a process to whoever listens.
//!
//! One pump per pipe reads into a ring that all listeners share, and each of them has its place in it. A pump waits for listeners that are
//! too far behind: that is how a slow client slows the process down instead of losing output or filling memory. With nobody listening
//! output is read on, so that a process whose client left does not stand still for ever; what was said last stays in the ring, for whoever
//! comes (back) late.
//!
//! The end: when the process has exited, what lies in the pipe at that moment is its own and comes in full; what grandchildren that
//! hold the pipe say after it comes too, for less than a second.
//!
//! Output has a position: the number of bytes, of all channels together, that came before. A listener is told where its first piece
//! begins, and one that knows how much it has had already asks for the rest.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncRead;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};

/// What is read at once: as much as a pipe holds.
const PIECE: usize = 64 * 1024;
/// A piece that fills less of its buffer is copied out of it, so that a few bytes in the ring do not hold a whole one.
const PIECE_WHOLE: usize = PIECE / 2;
/// What may wait in the ring for one listener, costs of pieces included, before the pumps wait for it.
const BEHIND_MAX: u64 = 512 * 1024;
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
/// Kept of one process's output for who comes late; half of what may be under way to a listener whose connection is reset.
const RING_COST_MAX: u64 = 256 * 1024;
/// Of a process that has ended.
const RING_COST_ENDED: u64 = 64 * 1024;
/// Of each process while all of them together keep more than `RINGS_COST_MAX`.
const RING_COST_SCARCE: u64 = 4 * 1024;
const RINGS_COST_MAX: usize = 8 * 1024 * 1024;
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

/// The listeners of one process, and the ring of what it said.
#[derive(Debug, Default)]
pub struct Listeners {
    state: Mutex<State>,
    /// There is more in the ring, or the end, or a listener was cut off.
    said: Notify,
    /// A listener has taken something or has left.
    taken: Notify,
}

#[derive(Debug, Default)]
struct State {
    ring: Ring,
    places: HashMap<u64, Place>,
    next: u64,
    /// Set when all output has been told.
    end: Option<Ended>,
}

/// How far a listener has heard.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// Of the next piece, counted from the first one ever.
    piece: u64,
    /// Bytes of it that are not to be told, because this listener knows them.
    skip: usize,
    /// When it took something last, or came.
    moved: Instant,
    is_cut: bool,
}

impl Listeners {
    /// What is kept from position `from` on, everything from now on, and the end: each once, in order.
    pub fn listen(self: &Arc<Self>, from: u64) -> Listener {
        let mut state = self.lock();
        let (begin, piece, skip) = state.ring.find(from);
        let id = state.next;
        state.next += 1;
        state.places.insert(id, Place { piece, skip, moved: Instant::now(), is_cut: false });
        Listener { from: begin, id, heard_end: false, listeners: self.clone() }
    }

    /// Puts a piece of output where everybody finds it, and waits until nobody is too far behind.
    async fn tell(&self, channel: Channel, bytes: Bytes) {
        self.lock().push(channel, bytes);
        self.said.notify_waiters();
        loop {
            let taken = self.taken.notified();
            tokio::pin!(taken);
            taken.as_mut().enable();
            if !self.lock().must_wait() {
                return;
            }
            let _ = timeout(LISTENER_LOOK, taken).await;
            if self.lock().cut_off() {
                self.said.notify_waiters();
            }
        }
    }

    /// From now on whoever listens hears the end after what is kept.
    pub fn end(&self, ended: Ended) {
        let mut state = self.lock();
        state.end = Some(ended);
        state.shrink();
        drop(state);
        self.said.notify_waiters();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn push(&mut self, channel: Channel, bytes: Bytes) {
        self.ring.push(channel, bytes);
        self.shrink();
    }

    /// Drops what is beyond the bounds and has been heard by all who listen.
    fn shrink(&mut self) {
        let cost_max = if RINGS_COST.load(Ordering::Relaxed) > RINGS_COST_MAX {
            RING_COST_SCARCE
        } else if self.end.is_some() {
            RING_COST_ENDED
        } else {
            RING_COST_MAX
        };
        let needed = self.listening().map(|place| place.piece).min().unwrap_or(u64::MAX);
        self.ring.shrink(cost_max, needed);
    }

    fn listening(&self) -> impl Iterator<Item = &Place> {
        self.places.values().filter(|place| !place.is_cut)
    }

    fn must_wait(&self) -> bool {
        self.listening().any(|place| self.ring.behind(place.piece) > BEHIND_MAX)
    }

    /// Gives up listeners that have kept others waiting for too long. While nobody waits each may take its time.
    fn cut_off(&mut self) -> bool {
        let is_waited_for = self.listening().any(|place| self.ring.get(place.piece).is_none());
        if !is_waited_for {
            return false;
        }
        let ring = &self.ring;
        let late = self.places.values_mut().filter(|place| {
            !place.is_cut && ring.behind(place.piece) > BEHIND_MAX && place.moved.elapsed() >= LISTENER_PATIENCE
        });
        let mut any = false;
        for place in late {
            place.is_cut = true;
            any = true;
        }
        any
    }
}

/// One who hears a process.
#[derive(Debug)]
pub struct Listener {
    /// Position of the first byte that it hears.
    pub from: u64,
    id: u64,
    heard_end: bool,
    listeners: Arc<Listeners>,
}

impl Listener {
    /// `None` when nothing more comes. Cancel-safe.
    pub async fn hear(&mut self) -> Option<Event> {
        loop {
            let listeners = self.listeners.clone();
            let said = listeners.said.notified();
            tokio::pin!(said);
            said.as_mut().enable();
            match self.next() {
                Next::Event(event) => {
                    listeners.taken.notify_waiters();
                    return Some(event);
                }
                Next::Over => return None,
                Next::Later => said.await,
            }
        }
    }

    fn next(&mut self) -> Next {
        let mut state = self.listeners.lock();
        let State { ring, places, end, .. } = &mut *state;
        let Some(place) = places.get_mut(&self.id).filter(|place| !place.is_cut) else { return Next::Over };
        if let Some(piece) = ring.get(place.piece) {
            let event = Event::Data(piece.channel, piece.bytes.slice(place.skip..));
            *place = Place { piece: place.piece + 1, skip: 0, moved: Instant::now(), is_cut: false };
            state.shrink();
            return Next::Event(event);
        }
        match end {
            Some(_) if self.heard_end => Next::Over,
            Some(end) => {
                self.heard_end = true;
                Next::Event(Event::End(end.clone()))
            }
            None => Next::Later,
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut state = self.listeners.lock();
        state.places.remove(&self.id);
        state.shrink();
        drop(state);
        self.listeners.taken.notify_waiters();
    }
}

enum Next {
    Event(Event),
    Later,
    Over,
}

/// The last pieces of output.
#[derive(Debug, Default)]
struct Ring {
    pieces: VecDeque<Piece>,
    /// Pieces that were in it and are no more.
    dropped: u64,
    /// Position after the last piece.
    said: u64,
    /// What all pieces that ever were have cost.
    cost: u64,
}

#[derive(Debug)]
struct Piece {
    channel: Channel,
    bytes: Bytes,
    /// Position of its first byte.
    at: u64,
    /// What all pieces before it have cost.
    cost_before: u64,
}

/// What all rings cost together.
static RINGS_COST: AtomicUsize = AtomicUsize::new(0);

impl Ring {
    fn push(&mut self, channel: Channel, bytes: Bytes) {
        let cost = bytes.len() + PIECE_COST;
        let (at, cost_before) = (self.said, self.cost);
        self.said += bytes.len() as u64;
        self.cost += cost as u64;
        RINGS_COST.fetch_add(cost, Ordering::Relaxed);
        self.pieces.push_back(Piece { channel, bytes, at, cost_before });
    }

    /// Down to `cost_max`, but not beyond the piece `needed`.
    fn shrink(&mut self, cost_max: u64, needed: u64) {
        while self.dropped < needed && self.behind(self.dropped) > cost_max {
            let Some(oldest) = self.pieces.pop_front() else { return };
            self.dropped += 1;
            RINGS_COST.fetch_sub(oldest.bytes.len() + PIECE_COST, Ordering::Relaxed);
        }
    }

    fn get(&self, piece: u64) -> Option<&Piece> {
        self.pieces.get(usize::try_from(piece.checked_sub(self.dropped)?).ok()?)
    }

    /// What the pieces from this one on cost.
    fn behind(&self, piece: u64) -> u64 {
        self.get(piece).map_or(0, |piece| self.cost - piece.cost_before)
    }

    /// Where hearing from `from` on really begins, as far as it is kept; in which piece, and after how many bytes of it.
    fn find(&self, from: u64) -> (u64, u64, usize) {
        let oldest = self.pieces.front().map_or(self.said, |piece| piece.at);
        let begin = from.clamp(oldest, self.said);
        // The first piece that ends after it.
        let index = self.pieces.partition_point(|piece| piece.at + piece.bytes.len() as u64 <= begin);
        let skip = self.pieces.get(index).map_or(0, |piece| begin - piece.at);
        (begin, self.dropped + index as u64, usize::try_from(skip).unwrap_or(0))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.shrink(0, u64::MAX);
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
    let mut buffer = BytesMut::new();
    loop {
        let read = tokio::select! {
            // The end first: a grandchild that never stops writing must not hide it.
            biased;
            _ = exited.wait_for(|exited| *exited) => break,
            read = read(&mut pipe, &mut buffer) => read,
        };
        // A PTY whose other side is closed reads as EIO.
        let Ok(count @ 1..) = read else { return };
        listeners.tell(channel, piece(&mut buffer, count)).await;
    }
    // What is certainly its own: it is there, so that reading it does not wait. Nobody tells how much that is of a terminal.
    let mut own = if channel == Channel::Pty { 0 } else { waiting_bytes(&pipe) };
    let mut others = GRANDCHILDREN_BYTES + if channel == Channel::Pty { TERMINAL_BYTES } else { 0 };
    let mut patience = GRANDCHILDREN_TIME;
    while others > 0 {
        let began = Instant::now();
        let read = if own > 0 {
            Ok(read(&mut pipe, &mut buffer).await)
        } else {
            timeout(patience, read(&mut pipe, &mut buffer)).await
        };
        let Ok(Ok(count @ 1..)) = read else { return };
        if own > 0 {
            own = own.saturating_sub(count);
        } else {
            patience = patience.saturating_sub(began.elapsed());
            others = others.saturating_sub(count);
        }
        listeners.tell(channel, piece(&mut buffer, count)).await;
    }
}

/// Into a buffer that has its memory only while it is read into: most processes wait for most of their lives. Cancel-safe.
async fn read(pipe: &mut (impl AsyncRead + Unpin), buffer: &mut BytesMut) -> std::io::Result<usize> {
    std::future::poll_fn(|context| {
        buffer.clear();
        buffer.reserve(PIECE);
        let read = {
            let spare = &mut buffer.spare_capacity_mut()[..PIECE];
            let mut into = tokio::io::ReadBuf::uninit(spare);
            std::pin::Pin::new(&mut *pipe).poll_read(context, &mut into).map_ok(|()| into.filled().len())
        };
        if !matches!(read, std::task::Poll::Ready(Ok(1..))) {
            *buffer = BytesMut::new();
        }
        read
    })
    .await
    .inspect(|count| {
        // SAFETY: so many bytes of the spare capacity have just been filled.
        unsafe { buffer.set_len(*count) }
    })
}

fn piece(buffer: &mut BytesMut, count: usize) -> Bytes {
    if count < PIECE_WHOLE { Bytes::copy_from_slice(&buffer[..count]) } else { std::mem::take(buffer).freeze() }
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
        assert!(listeners.lock().places.is_empty());
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
        let listeners = Arc::new(Listeners::default());
        let mut early = listeners.listen(0);
        say(&listeners, "one").await;
        say(&listeners, "two").await;
        let mut late = listeners.listen(0);
        let mut knows = listeners.listen(4);
        let mut ahead = listeners.listen(1000);
        assert_eq!((late.from, knows.from, ahead.from), (0, 4, 6));
        say(&listeners, "three").await;
        let ended = Ended { code: 3, signal: None };
        listeners.end(ended.clone());
        let mut after = listeners.listen(0);
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
            assert_eq!(listener.hear().await, None);
        }
    }

    #[tokio::test]
    async fn what_is_kept_is_bounded_and_says_where_it_begins() {
        let listeners = Arc::new(Listeners::default());
        let text = "x".repeat(PIECE);
        for _ in 0..100 {
            say(&listeners, &text).await;
        }
        let kept = |listeners: &Listeners| {
            let state = listeners.lock();
            (state.ring.behind(state.ring.dropped), state.ring.pieces.len())
        };
        let late = listeners.listen(0);
        let (cost, pieces) = kept(&listeners);
        assert!(cost <= RING_COST_MAX);
        assert_eq!(late.from, ((100 - pieces) * PIECE) as u64);
        drop(late);
        for _ in 0..100_000 {
            say(&listeners, "y").await;
        }
        assert!(kept(&listeners).0 <= RING_COST_MAX);
        // One who listens and takes nothing is waited for, and what it has not heard stays.
        let mut slow = listeners.listen(u64::MAX);
        let from = slow.from;
        let filling = async {
            loop {
                say(&listeners, &text).await;
            }
        };
        assert!(timeout(Duration::from_millis(50), filling).await.is_err());
        let (cost, pieces) = kept(&listeners);
        assert!((BEHIND_MAX..BEHIND_MAX + 2 * PIECE as u64).contains(&cost), "{cost}");
        for _ in 0..pieces {
            assert_eq!(slow.hear().await, Some(piece(&text)));
        }
        assert_eq!(listeners.lock().ring.said, from + (pieces * PIECE) as u64);
        drop(slow);
        assert!(kept(&listeners).0 <= RING_COST_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn a_listener_for_whom_others_wait_too_long_is_cut_off() {
        let listeners = Arc::new(Listeners::default());
        let [mut stuck, mut lively] = [listeners.listen(0), listeners.listen(0)];
        let text = "x".repeat(PIECE);
        let saying = tokio::spawn({
            let (listeners, text) = (listeners.clone(), text.clone());
            async move {
                for _ in 0..100 {
                    say(&listeners, &text).await;
                }
            }
        });
        let began = Instant::now();
        for _ in 0..100 {
            assert_eq!(lively.hear().await, Some(piece(&text)));
        }
        saying.await.unwrap();
        let waited = began.elapsed();
        assert!((LISTENER_PATIENCE..2 * LISTENER_PATIENCE).contains(&waited), "{waited:?}");
        assert_eq!(stuck.hear().await, None);
    }
}
