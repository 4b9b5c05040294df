//! Every connection there is: whether it is busy, which incarnation its peer has shown, and how to end it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use futures::task::AtomicWaker;

/// Connections from outside the guest at once: the host's and, through it, the users'.
const REMOTE_MAX: usize = 1024;
/// From the guest's own processes.
const LOCAL_MAX: usize = 128;
/// Beyond `REMOTE_MAX`: who comes then is heard, because it may be the host, whose control requests are always answered. Others are told
/// to come back later.
const SPARE_MAX: usize = 64;
/// When even these are taken the oldest is reset, which takes until its task runs: this many may be there at that time.
const SPARE_HARD_MAX: usize = 4 * SPARE_MAX;

/// Who has asked nothing for so long after connecting is idle.
const FIRST_REQUEST_TIME: Duration = Duration::from_secs(5);

/// Ordered: a ruder order replaces a polite one, never the other way round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Order {
    Serve,
    /// Answer what is under way, then close; at once when idle.
    FinishAndClose,
    /// RST, now.
    Reset,
}

#[derive(Debug)]
pub struct Connection {
    pub id: u64,
    pub peer: SocketAddr,
    shown: Mutex<Option<String>>,
    /// Requests whose answer has not ended yet.
    busy: AtomicUsize,
    entered: Instant,
    /// Requests that have begun.
    asked: AtomicU64,
    order: AtomicU8,
    /// Of the task that serves the connection. A channel instead would cost each of a thousand idle connections ten times as much.
    serving: AtomicWaker,
    /// Comes from the guest itself.
    local: bool,
    /// Has none of the places that others than the host may have.
    spare: AtomicBool,
    /// Has shown the host's own token.
    control: AtomicBool,
}

impl Connection {
    /// For the task that serves the connection: what it has been told, and a wake-up when there is more.
    pub fn listen(&self, serving: &Waker) -> Order {
        self.serving.register(serving);
        self.order()
    }

    fn order(&self) -> Order {
        match self.order.load(Ordering::SeqCst) {
            0 => Order::Serve,
            1 => Order::FinishAndClose,
            _ => Order::Reset,
        }
    }

    pub fn show(&self, incarnation: &str) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.as_deref() != Some(incarnation) {
            *shown = Some(incarnation.to_owned());
        }
    }

    /// Never evicted from now on.
    pub fn is_the_hosts(&self) {
        self.control.store(true, Ordering::Relaxed);
    }

    /// How many requests have begun.
    pub fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::SeqCst) > 0
    }

    pub fn begin(self: &Arc<Self>) -> Busy {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.busy.fetch_add(1, Ordering::SeqCst);
        Busy(self.clone())
    }

    /// One that is new is about to ask.
    fn is_idle(&self) -> bool {
        !self.is_busy() && (self.asked() > 0 || self.entered.elapsed() > FIRST_REQUEST_TIME)
    }

    fn is_served(&self) -> bool {
        self.order() == Order::Serve
    }

    fn tell(&self, order: Order) {
        if self.order.fetch_max(order as u8, Ordering::SeqCst) < order as u8 {
            self.serving.wake();
        }
    }
}

/// Lives as long as the answer does.
pub struct Busy(Arc<Connection>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(Debug, Default)]
pub struct Registry {
    next: AtomicU64,
    connections: Mutex<HashMap<u64, Arc<Connection>>>,
}

impl Registry {
    /// `None` when there is no room: connections of the guest's own processes never take the room of the host's, and the oldest idle
    /// one is closed so that the next caller finds a place. From outside everybody is let in at first: only a request tells who it is.
    pub fn enter(&self, peer: SocketAddr, local: bool) -> Option<Arc<Connection>> {
        let mut all = self.all();
        let is_full = taken(&all, local) >= if local { LOCAL_MAX } else { REMOTE_MAX };
        if is_full {
            close_oldest_idle(&all, local);
        }
        let spares = || all.values().filter(|connection| connection.spare.load(Ordering::Relaxed));
        if is_full && (local || spares().count() >= SPARE_HARD_MAX) {
            return None;
        }
        if is_full && spares().count() >= SPARE_MAX {
            let others = spares().filter(|spare| !spare.control.load(Ordering::Relaxed) && spare.is_served());
            if let Some(oldest) = others.min_by_key(|spare| spare.id) {
                oldest.tell(Order::Reset);
            }
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection {
            id,
            peer,
            shown: Mutex::default(),
            busy: AtomicUsize::new(0),
            entered: Instant::now(),
            asked: AtomicU64::new(0),
            order: AtomicU8::new(Order::Serve as u8),
            serving: AtomicWaker::new(),
            local,
            spare: AtomicBool::new(is_full),
            control: AtomicBool::new(false),
        });
        all.insert(id, connection.clone());
        Some(connection)
    }

    /// Whether others than the host are served on this connection: it has a place, or there is one by now.
    pub fn admits(&self, connection: &Connection) -> bool {
        if connection.spare.load(Ordering::Relaxed) {
            let has_room = taken(&self.all(), false) < REMOTE_MAX;
            connection.spare.store(!has_room, Ordering::Relaxed);
        }
        !connection.spare.load(Ordering::Relaxed)
    }

    /// For want of descriptors: an idle connection gives way.
    pub fn make_room(&self) {
        let all = self.all();
        close_oldest_idle(&all, true);
        close_oldest_idle(&all, false);
    }

    pub fn leave(&self, connection: &Connection) {
        self.all().remove(&connection.id);
    }

    pub fn len(&self) -> usize {
        self.all().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Before a snapshot: idle connections close, busy ones after their answer. `own` is the one that asks.
    pub fn finish_all(&self, own: u64) {
        self.all()
            .values()
            .filter(|connection| connection.id != own)
            .for_each(|connection| connection.tell(Order::FinishAndClose));
    }

    /// After a restore: resets every connection that has not shown `incarnation`. When a connection was accepted says nothing: one may
    /// have waited in the listener's queue through the snapshot.
    pub fn reset_strangers(&self, incarnation: &str, own: u64) -> usize {
        let all = self.all();
        let strangers = all.values().filter(|connection| {
            let shown = connection.shown.lock().unwrap_or_else(PoisonError::into_inner);
            connection.id != own && shown.as_deref() != Some(incarnation)
        });
        strangers.map(|connection| connection.tell(Order::Reset)).count()
    }

    fn all(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The places that are taken.
fn taken(all: &HashMap<u64, Arc<Connection>>, local: bool) -> usize {
    all.values().filter(|connection| connection.local == local && !connection.spare.load(Ordering::Relaxed)).count()
}

fn close_oldest_idle(all: &HashMap<u64, Arc<Connection>>, local: bool) {
    let idle = all.values().filter(|connection| {
        let is_the_hosts = connection.control.load(Ordering::Relaxed);
        connection.local == local && connection.is_idle() && !is_the_hosts && connection.is_served()
    });
    if let Some(oldest) = idle.min_by_key(|connection| connection.id) {
        oldest.tell(Order::FinishAndClose);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restore_resets_who_has_not_shown_the_incarnation() {
        let registry = Registry::default();
        let peer: SocketAddr = "127.0.0.1:1".parse().unwrap();
        let [own, fresh, old, silent] = std::array::from_fn(|_| registry.enter(peer, false).unwrap());
        own.show("new");
        fresh.show("new");
        old.show("old");
        registry.finish_all(own.id);
        assert_eq!(registry.reset_strangers("new", own.id), 2);
        registry.finish_all(own.id);
        let told = [&own, &fresh, &old, &silent].map(|connection| connection.order());
        assert_eq!(told, [Order::Serve, Order::FinishAndClose, Order::Reset, Order::Reset]);
        registry.leave(&old);
        assert_eq!(registry.len(), 3);
    }

    #[test]
    fn the_guests_own_connections_leave_room_for_the_host() {
        let registry = Registry::default();
        let peer: SocketAddr = "127.0.0.1:1".parse().unwrap();
        let first = registry.enter(peer, true).unwrap();
        drop(first.begin());
        while registry.enter(peer, true).is_some() {}
        assert_eq!(first.order(), Order::FinishAndClose);
        assert_eq!(registry.len(), LOCAL_MAX);
        assert!(registry.enter(peer, false).is_some());
        registry.leave(&first);
        assert!(registry.enter(peer, true).is_some());
    }
    #[test]
    fn a_full_house_still_hears_the_host() {
        let registry = Registry::default();
        let peer: SocketAddr = "127.0.0.1:1".parse().unwrap();
        let mut users: Vec<_> = (0..REMOTE_MAX).map(|_| registry.enter(peer, false).unwrap()).collect();
        let busy: Vec<_> = users.iter().map(|user| user.begin()).collect();
        assert!(users.iter().all(|user| registry.admits(user)));
        let host = registry.enter(peer, false).unwrap();
        host.is_the_hosts();
        let spare = |_| {
            let spare = registry.enter(peer, false).unwrap();
            (spare.begin(), spare)
        };
        let (asking, spares): (Vec<_>, Vec<_>) = (1..SPARE_MAX).map(spare).unzip();
        assert!(!spares.iter().any(|spare| registry.admits(spare)));
        // One more: not the host, not those with a place, but the oldest of the others gives way.
        assert!(registry.enter(peer, false).is_some());
        assert_eq!((host.order(), spares[0].order()), (Order::Serve, Order::Reset));
        assert!(users.iter().all(|user| user.order() == Order::Serve));
        assert!((0..2 * SPARE_HARD_MAX).any(|_| registry.enter(peer, false).is_none()));
        // A place that becomes free is the next one's who asks.
        registry.leave(&users.pop().unwrap());
        assert!(registry.admits(&spares[1]) && !registry.admits(&spares[2]));
        drop((busy, asking));
    }
}
