//! `/snapshot/prepare`: makes this guest ready to be saved, and unready again when nothing comes of it.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedRwLockReadGuard, RwLock, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::Guest;
use crate::console::say;

/// Flushing dirty pages to the disk is worth this much of the host's patience (it waits 3 s in all).
const SYNC_TIME_MAX: Duration = Duration::from_secs(2);
/// User processes that do not stand still by then are in a long system call; they stand still when it returns.
const FREEZE_TIME_MAX: Duration = Duration::from_millis(300);
const FREEZE_LOOK: Duration = Duration::from_millis(2);
/// Guest time after which a prepare without a restore is taken back. Longer than the host's deadline for `/init` (10 s).
const WATCHDOG: Duration = Duration::from_secs(15);

/// Starts that are under way have so long to get to their end: one that entered a frozen group would hang there.
const STARTS_TIME_MAX: Duration = Duration::from_millis(300);
/// As good as for ever.
const HELD: Duration = Duration::from_secs(365 * 24 * 3600);

/// On between prepare and the next `/init` (or the watchdog): answers close their connections, no process is started.
#[derive(Debug, Default)]
pub struct Quiet {
    /// When it ends by itself; `None` when it is off.
    until: watch::Sender<Option<Instant>>,
    /// Read by starts of processes, written by prepare.
    starts: Arc<RwLock<()>>,
}

impl Quiet {
    pub fn is_on(&self) -> bool {
        self.until.borrow().is_some()
    }

    /// Returns when it is off.
    pub async fn over(&self) {
        // Only fails when the sender is gone, and it is ours.
        let _ = self.until.subscribe().wait_for(Option::is_none).await;
    }

    /// Returns when it is off: at the latest when the watchdog has ended it. A process that enters a frozen group stands still before it
    /// is the program, and whoever starts it with it; so nobody starts one meanwhile, and prepare waits for whoever holds the answer.
    pub async fn start(&self) -> OwnedRwLockReadGuard<()> {
        loop {
            self.over().await;
            let start = self.starts.clone().read_owned().await;
            if !self.is_on() {
                return start;
            }
        }
    }
}

/// Idempotent; asked again, it lasts longer. Returns when idle connections are told to close, user processes stand still and the disk is
/// flushed, as far as the time allowed; whether it has for the disk is the answer.
pub async fn prepare(guest: &Arc<Guest>, own_connection: u64) -> io::Result<bool> {
    let already = guest.quiet.until.send_replace(Some(Instant::now() + WATCHDOG)).is_some();
    guest.registry.finish_all(own_connection);
    if timeout(STARTS_TIME_MAX, guest.quiet.starts.write()).await.is_err() {
        say(format_args!("a process is still being started"));
    }
    if let Err(e) = guest.freezer.freeze(true) {
        end(guest);
        return Err(e);
    }
    if !already {
        tokio::spawn(watch_over(guest.clone()));
    }
    let frozen = async {
        while !guest.freezer.is_frozen() {
            sleep(FREEZE_LOOK).await;
        }
    };
    if timeout(FREEZE_TIME_MAX, frozen).await.is_err() {
        say(format_args!("some user processes do not stand still yet"));
    }
    let flushed = timeout(SYNC_TIME_MAX, guest.flush.whole()).await.is_ok();
    if !flushed {
        say(format_args!("the disk is not flushed yet"));
    }
    Ok(flushed)
}

/// Flushes the disk, on a thread of its own: one that hangs (a mount whose server is gone) takes nobody's place but its own.
#[derive(Debug)]
pub struct Flush {
    /// The flush under way, and whether it has ended.
    last: Mutex<Option<watch::Receiver<bool>>>,
    flush: fn(),
}

impl Default for Flush {
    fn default() -> Self {
        // SAFETY: sync takes and changes nothing of ours.
        Self { last: Mutex::default(), flush: || unsafe { libc::sync() } }
    }
}

impl Flush {
    /// Returns when all that was written before is on the disk.
    async fn whole(&self) {
        loop {
            let (mut ended, is_own) = self.begin();
            // An error is that the thread has panicked, which a system call cannot.
            let _ = ended.wait_for(|ended| *ended).await;
            // One that had begun already may have passed by what was written since.
            if is_own {
                return;
            }
        }
    }

    fn begin(&self) -> (watch::Receiver<bool>, bool) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(under_way) = last.as_ref().filter(|ended| !*ended.borrow() && ended.has_changed().is_ok()) {
            return (under_way.clone(), false);
        }
        let (end, ended) = watch::channel(false);
        let flush = self.flush;
        let thread = std::thread::Builder::new().name("flush".to_owned()).stack_size(64 * 1024).spawn(move || {
            flush();
            end.send_replace(true);
        });
        if let Err(e) = thread {
            say(format_args!("flush: {e}"));
        }
        *last = Some(ended.clone());
        (ended, true)
    }
}

/// Users' processes stand still until an `/init` that does not hold them: whoever holds them knows that it will come, however late. False
/// when they run.
pub fn hold(guest: &Guest) -> bool {
    let mut is_held = false;
    guest.quiet.until.send_if_modified(|until| {
        is_held = until.is_some();
        *until = until.map(|_| Instant::now() + HELD);
        is_held
    });
    is_held
}

/// User processes run on: the last step of `/init`.
pub fn end(guest: &Guest) {
    if let Err(e) = guest.freezer.freeze(false) {
        say(format_args!("thaw: {e}"));
    }
    guest.quiet.until.send_replace(None);
}

/// Lives as long as one quiet time: an `/init` ends it, so that it can never cut the next one short.
async fn watch_over(guest: Arc<Guest>) {
    let mut changes = guest.quiet.until.subscribe();
    loop {
        let Some(until) = *changes.borrow_and_update() else { return };
        tokio::select! {
            _ = changes.changed() => {}
            () = sleep_until(until) => {
                say(format_args!("no restore came; going on"));
                end(&guest);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn a_flush_that_hangs_takes_one_thread_and_the_next_is_whole() {
        static BEGUN: AtomicUsize = AtomicUsize::new(0);
        static HANGS: AtomicBool = AtomicBool::new(true);
        fn slow() {
            BEGUN.fetch_add(1, Ordering::SeqCst);
            while HANGS.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let flush = Flush { last: Mutex::default(), flush: slow };
        for _ in 0..3 {
            assert!(timeout(Duration::from_millis(50), flush.whole()).await.is_err());
        }
        assert_eq!(BEGUN.load(Ordering::SeqCst), 1);
        HANGS.store(false, Ordering::SeqCst);
        // The one that hung may have passed by what was written since: it counts for nobody who came later.
        timeout(Duration::from_secs(10), flush.whole()).await.unwrap();
        assert_eq!(BEGUN.load(Ordering::SeqCst), 2);
    }
}
