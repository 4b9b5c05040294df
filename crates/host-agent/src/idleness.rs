//! For how long nothing has happened in the sandboxes whose idle time counts. Told to the control plane, which decides.
//!
//! Something happens while a call for a user is under way, and while the guest says that it works. The guest is not believed further than
//! that: its word can only keep itself running, and silence, nonsense and numbers that fall are no word. Asking costs it one short
//! connection in ten seconds, below what counts as work.
//!
//! Whose idle time counts, and from how long on it is to be told at once, comes with the answer to each heartbeat and is kept in memory
//! alone. So a timeout that is changed while the sandbox runs, a ping that only the control plane hears, and a restart of either side need
//! nothing of their own: half a minute later both know the same again. (A part of `Spec` could not be changed, and one of `Fence` would
//! make a wish of each ping.) Until a sandbox is named, nothing is said of it: idle time begins too late and never too early, with each
//! incarnation and each start of the agent anew.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::guest::Activity;
use api::v1::hosts::IdleTimeout;
use futures::{StreamExt as _, stream};
use model::ids::{Incarnation, SandboxId};
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::guest::Guest;
use crate::sandbox::Sandboxes;

/// A guest is asked at most this often: its work and the end of its idle time are seen so late at the most.
const ASK_EVERY: Duration = Duration::from_secs(10);
/// How often it is looked for guests that are to be asked; spreads the questions over the time.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Questions at once. One that hangs has an end (`Guest::activity`) and takes the place of no other until there are as many.
const ASKED_AT_ONCE: usize = 256;

/// A twentieth of one CPU. An idle guest's kernel and envd took six milliseconds a second, emulated, beside one that computed.
const CPU_MS_PER_SEC: u64 = 50;
/// A question costs 1.1 KiB, in ten seconds, and neighbours are looked up now and then.
const NETWORK_BYTES_PER_SEC: u64 = 2 * 1024;
/// What was written before is flushed for half a minute after (10 KiB a second after a create); a program that works with its disk moves
/// more.
const DISK_BYTES_PER_SEC: u64 = 64 * 1024;

pub struct Idleness {
    /// Woken when the control plane should hear of it at once.
    changed: Arc<Notify>,
    /// Somebody is named who was not.
    told: Notify,
    watched: Mutex<HashMap<SandboxId, Watched>>,
}

/// A sandbox whose idle time counts.
struct Watched {
    timeout: Duration,
    /// The last use that the control plane knows of.
    active: Instant,
    /// None while it does not run.
    run: Option<Run>,
}

/// What is known of one incarnation.
struct Run {
    incarnation: Incarnation,
    /// It worked then, or was seen first.
    since: Instant,
    heard: Option<(Instant, Activity)>,
    asked: Option<Instant>,
    /// Its time was over when it was last asked, which the control plane was told at once.
    is_over: bool,
}

impl Idleness {
    pub fn new(changed: Arc<Notify>) -> Arc<Self> {
        Arc::new(Self { changed, told: Notify::new(), watched: Mutex::default() })
    }

    /// These are all.
    pub fn tell(&self, timeouts: Vec<IdleTimeout>) {
        let now = Instant::now();
        let mut watched = self.lock();
        let mut before = std::mem::take(&mut *watched);
        let mut is_new = false;
        for named in timeouts {
            let Ok(id) = named.id.parse::<SandboxId>() else { continue };
            let run = match before.remove(&id) {
                Some(known) => known.run,
                None => {
                    is_new = true;
                    None
                }
            };
            // Longer ago than this machine is up says as much as nothing.
            let active = now.checked_sub(Duration::from_secs(named.active_sec_ago));
            let active = active.or_else(|| run.as_ref().map(|run| run.since)).unwrap_or(now);
            watched.insert(id, Watched { timeout: Duration::from_secs(named.timeout_sec), active, run });
        }
        if is_new {
            self.told.notify_one();
        }
    }

    /// Whole seconds for which nothing has happened in a running sandbox; none when nobody has said that it counts.
    pub fn of(&self, id: &SandboxId, guest: &Guest) -> Option<u64> {
        let now = Instant::now();
        let watched = self.lock();
        let known = watched.get(id)?;
        let run = known.run.as_ref().filter(|run| run.incarnation == *guest.incarnation())?;
        let mut idle = known.idle(run, guest, now);
        if !run.is_over {
            // Not over before the guest was asked once more: what it said last may be ten seconds old.
            idle = idle.min(known.timeout.saturating_sub(Duration::from_secs(1)));
        }
        Some(idle.as_secs())
    }

    /// Asks those whose turn it is, for ever.
    pub async fn watch(self: Arc<Self>, sandboxes: Arc<Sandboxes>, stop: CancellationToken) {
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
                () = self.told.notified() => {}
            }
            let look = self.look(|id| sandboxes.guest(id).ok());
            if stop.run_until_cancelled(look).await.is_none() {
                return;
            }
        }
    }

    /// `guest_of`: that of a sandbox, while it runs.
    async fn look(&self, guest_of: impl Fn(&SandboxId) -> Option<Arc<Guest>>) {
        let turn = self.whose_turn(Instant::now(), guest_of);
        stream::iter(turn)
            .map(|(id, guest)| async move {
                let said = guest.activity().await.ok();
                (id, guest, said)
            })
            .buffer_unordered(ASKED_AT_ONCE)
            .for_each(|(id, guest, said)| {
                self.hear(&id, &guest, said, Instant::now());
                std::future::ready(())
            })
            .await;
    }

    fn whose_turn(
        &self,
        now: Instant,
        guest_of: impl Fn(&SandboxId) -> Option<Arc<Guest>>,
    ) -> Vec<(SandboxId, Arc<Guest>)> {
        let mut turn = Vec::new();
        for (id, known) in self.lock().iter_mut() {
            let Some(guest) = guest_of(id) else {
                known.run = None;
                continue;
            };
            if known.run.as_ref().is_none_or(|run| run.incarnation != *guest.incarnation()) {
                known.run = Some(Run::new(guest.incarnation().clone(), now));
            }
            let Some(run) = &mut known.run else { continue };
            if run.asked.is_none_or(|asked| now - asked >= ASK_EVERY) {
                run.asked = Some(now);
                turn.push((id.clone(), guest));
            }
        }
        turn
    }

    /// `said`: none when the guest did not answer, or not what can be read.
    fn hear(&self, id: &SandboxId, guest: &Guest, said: Option<Activity>, now: Instant) {
        let mut watched = self.lock();
        let Some(known) = watched.get_mut(id) else { return };
        let Some(mut run) = known.run.take_if(|run| run.incarnation == *guest.incarnation()) else { return };
        if let Some(said) = said {
            run.hear(said, now);
        }
        let is_over = known.idle(&run, guest, now) >= known.timeout;
        if std::mem::replace(&mut run.is_over, is_over) != is_over {
            self.changed.notify_one();
        }
        known.run = Some(run);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SandboxId, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watched {
    fn idle(&self, run: &Run, guest: &Guest, now: Instant) -> Duration {
        let last = run.since.max(self.active).max(guest.last_used(now));
        now.saturating_duration_since(last)
    }
}

impl Run {
    fn new(incarnation: Incarnation, now: Instant) -> Self {
        Self { incarnation, since: now, heard: None, asked: None, is_over: false }
    }

    fn hear(&mut self, said: Activity, now: Instant) {
        if let Some((at, before)) = &self.heard
            && is_at_work(before, &said, now - *at)
        {
            self.since = now;
        }
        self.heard = Some((now, said));
    }
}

/// Whether a guest that says these sums has worked in the time between them.
fn is_at_work(before: &Activity, after: &Activity, took: Duration) -> bool {
    let ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX).max(1);
    // Sums that fall are no sums.
    let is_above = |before: u64, after: u64, per_sec: u64| {
        after.saturating_sub(before).saturating_mul(1000) > per_sec.saturating_mul(ms)
    };
    is_above(before.cpu_ms, after.cpu_ms, CPU_MS_PER_SEC)
        || is_above(before.network_bytes, after.network_bytes, NETWORK_BYTES_PER_SEC)
        || is_above(before.disk_bytes, after.disk_bytes, DISK_BYTES_PER_SEC)
        || after.input_bytes > before.input_bytes
}

#[cfg(test)]
mod tests {
    use std::io;

    use futures::FutureExt as _;
    use futures::future::BoxFuture;
    use tokio::net::TcpStream;
    use tokio::time::advance;

    use super::*;
    use crate::guest::Dial;

    struct Nowhere;

    impl Dial for Nowhere {
        fn dial(&self) -> BoxFuture<'static, io::Result<TcpStream>> {
            Box::pin(async { Err(io::ErrorKind::ConnectionRefused.into()) })
        }
    }

    fn sum(cpu_ms: u64, network_bytes: u64, disk_bytes: u64, input_bytes: u64) -> Activity {
        Activity { cpu_ms, network_bytes, disk_bytes, input_bytes, processes: 0 }
    }

    const TEN: Duration = Duration::from_secs(10);

    /// One sandbox, and what its guest says when it is asked.
    struct Bench {
        idleness: Arc<Idleness>,
        id: SandboxId,
        guest: Arc<Guest>,
    }

    impl Bench {
        fn new() -> Self {
            let (idleness, id) = (Idleness::new(Arc::default()), SandboxId::from_random(1));
            Self { idleness, id, guest: guest(1) }
        }

        fn tell(&self, timeout_sec: u64, active_sec_ago: u64) {
            let id = self.id.to_string();
            self.idleness.tell(vec![IdleTimeout { id, timeout_sec, active_sec_ago }]);
        }

        /// A look: whether it was its turn.
        fn ask(&self, said: Option<Activity>) -> bool {
            let turn = self.idleness.whose_turn(Instant::now(), |id| (*id == self.id).then(|| self.guest.clone()));
            for (id, guest) in &turn {
                self.idleness.hear(id, guest, said.clone(), Instant::now());
            }
            !turn.is_empty()
        }

        /// Ten seconds later.
        async fn later(&self, said: Option<Activity>) {
            advance(TEN).await;
            assert!(self.ask(said));
        }

        fn idle(&self) -> Option<u64> {
            self.idleness.of(&self.id, &self.guest)
        }

        fn is_woken(&self) -> bool {
            self.idleness.changed.notified().now_or_never().is_some()
        }
    }

    fn guest(incarnation: u128) -> Arc<Guest> {
        Arc::new(Guest::new(Arc::new(Nowhere), Incarnation::from_random(incarnation), "aa"))
    }

    #[test]
    fn what_counts_as_work() {
        let zero = sum(0, 0, 0, 0);
        for (after, expected) in [
            (sum(0, 0, 0, 0), false),
            (sum(500, 20 << 10, 640 << 10, 0), false),
            (sum(501, 0, 0, 0), true),
            (sum(0, (20 << 10) + 1, 0, 0), true),
            (sum(0, 0, (640 << 10) + 1, 0), true),
            (sum(0, 0, 0, 1), true),
            (sum(u64::MAX, u64::MAX, u64::MAX, u64::MAX), true),
        ] {
            assert_eq!(is_at_work(&zero, &after, TEN), expected, "{after:?}");
        }
        // A guest that answers seldom, and one whose sums fall.
        assert!(!is_at_work(&zero, &sum(2000, 0, 0, 0), 6 * TEN));
        assert!(!is_at_work(&sum(9, 9, 9, 9), &zero, TEN));
        assert!(!is_at_work(&zero, &zero, Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_said_of_whom_nobody_has_named() {
        let bench = Bench::new();
        assert!(!bench.ask(None));
        assert_eq!(bench.idle(), None);
        bench.tell(60, 0);
        assert_eq!(bench.idle(), None, "not looked at yet");
        assert!(bench.ask(None));
        assert_eq!(bench.idle(), Some(0));
        bench.idleness.tell(Vec::new());
        assert_eq!((bench.ask(None), bench.idle()), (false, None));
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_asked_every_ten_seconds_and_told_at_once_when_its_time_is_over_and_when_it_works_again() {
        let bench = Bench::new();
        bench.tell(30, 0);
        assert!(bench.ask(Some(sum(1, 0, 0, 0))));
        advance(Duration::from_secs(9)).await;
        assert!(!bench.ask(None), "not yet again");
        advance(Duration::from_secs(1)).await;
        assert!(bench.ask(Some(sum(2, 0, 0, 0))));
        bench.later(Some(sum(3, 0, 0, 0))).await;
        assert_eq!((bench.idle(), bench.is_woken()), (Some(20), false));
        advance(Duration::from_secs(9)).await;
        bench.tell(30, 40);
        assert_eq!(bench.idle(), Some(29));
        advance(Duration::from_secs(6)).await;
        assert_eq!(bench.idle(), Some(29), "not over before it was asked");
        assert!(bench.ask(Some(sum(4, 0, 0, 0))));
        assert_eq!((bench.idle(), bench.is_woken()), (Some(35), true));
        bench.later(Some(sum(5, 0, 0, 0))).await;
        assert_eq!((bench.idle(), bench.is_woken()), (Some(45), false), "told once");
        bench.later(Some(sum(5000, 0, 0, 0))).await;
        assert_eq!((bench.idle(), bench.is_woken()), (Some(0), true));
    }

    #[tokio::test(start_paused = true)]
    async fn calls_under_way_keep_it_busy_and_silence_does_not() {
        let bench = Bench::new();
        bench.tell(20, 0);
        bench.ask(Some(sum(0, 0, 0, 0)));
        let call = bench.guest.in_use();
        let other = bench.guest.in_use();
        for _ in 0..5 {
            bench.later(None).await;
        }
        drop(other);
        advance(Duration::from_secs(3)).await;
        assert_eq!((bench.idle(), bench.is_woken()), (Some(0), false));
        drop(call);
        bench.later(None).await;
        assert_eq!((bench.idle(), bench.is_woken()), (Some(10), false));
        bench.later(None).await;
        assert_eq!((bench.idle(), bench.is_woken()), (Some(20), true));
        // At once, and not at the next question.
        drop(bench.guest.in_use());
        assert_eq!(bench.idle(), Some(0));
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_control_plane_knows_of_its_use_counts() {
        let bench = Bench::new();
        bench.tell(60, 0);
        bench.ask(None);
        for _ in 0..3 {
            bench.later(None).await;
        }
        bench.tell(60, 4);
        assert_eq!(bench.idle(), Some(4));
        bench.tell(60, 5000);
        assert_eq!(bench.idle(), Some(30), "that it was active long ago says nothing new");
        // Another timeout while it runs.
        bench.tell(20, 30);
        bench.later(None).await;
        assert_eq!((bench.idle(), bench.is_woken()), (Some(40), true));
        bench.tell(600, 40);
        bench.later(None).await;
        assert_eq!((bench.idle(), bench.is_woken()), (Some(50), true), "no longer over");
    }

    #[tokio::test(start_paused = true)]
    async fn each_incarnation_begins_anew() {
        let mut bench = Bench::new();
        bench.tell(60, 0);
        bench.ask(Some(sum(9, 0, 0, 0)));
        bench.later(None).await;
        let before = std::mem::replace(&mut bench.guest, guest(2));
        assert_eq!(bench.idle(), None);
        assert!(bench.ask(Some(sum(9000, 0, 0, 0))));
        assert_eq!(bench.idle(), Some(0));
        // What the one before says late is nobody's.
        bench.idleness.hear(&bench.id, &before, Some(sum(0, 0, 0, 0)), Instant::now());
        bench.later(Some(sum(9000, 0, 0, 0))).await;
        assert_eq!(bench.idle(), Some(10));
        // Paused meanwhile.
        assert!(bench.idleness.whose_turn(Instant::now(), |_| None).is_empty());
        assert_eq!(bench.idle(), None);
    }
}
