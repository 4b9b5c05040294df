//! Works on operations: those that handlers of this replica have just opened, and those that nobody works on.
//!
//! ```text
//!   opened by a handler -+-> task under a lease, renewed --> done | failed | superseded
//!   claimed (new, put off, owner gone) -+                 \-> put off, to be claimed again
//! ```

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use futures::FutureExt as _;
use model::ids::{OperationId, SnapshotId, TeamId};
use store::operations::{Full, LEASE, Operation};
use store::{StoreError, Update};
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;
use tracing::{Instrument as _, error, info, info_span, warn};

use crate::app::App;

/// Operations at once on one replica; each waits for a host most of the time.
const AT_ONCE: usize = 256;
/// Of them, for hosts of one team: who keeps us waiting there keeps nobody else waiting.
const OF_TEAM_MAX: usize = AT_ONCE / 4;
/// And those of all teams together: the platform's own never wait for teams' that hang.
const OF_TEAMS_MAX: usize = AT_ONCE / 2;
/// Looked for at least this often; wakes come sooner.
const CLAIM_EVERY: Duration = Duration::from_millis(500);
const CLAIM_MAX: i64 = 32;
/// The database has answered long before, or given up: 3 s for a connection, 10 s for a statement.
const CLAIM_ANSWER_MAX: Duration = Duration::from_secs(14);
const CLAIM_TIME_MAX: Duration = Duration::from_secs(20);
/// Its name among the reconcilers.
const CLAIM: &str = "claim";

/// Whoever has it may ask. It tells when somebody was last told to ask again later.
pub type Turn = tokio::sync::Mutex<Option<Instant>>;

pub struct Driver {
    running: Mutex<HashSet<OperationId>>,
    room: Arc<Semaphore>,
    wake: Notify,
    /// Whose turn it is to ask for a snapshot.
    turns: Mutex<HashMap<SnapshotId, Weak<Turn>>>,
    /// Operations that are for hosts of each team.
    seats: Seats,
}

type Seats = Arc<Mutex<HashMap<TeamId, usize>>>;

/// Room for an operation among those for hosts of its team; of the platform's hosts there is always some.
pub struct Seat(Option<(Seats, TeamId)>);

impl Drop for Seat {
    fn drop(&mut self) {
        let Some((seats, team)) = &self.0 else { return };
        let mut seats = seats.lock().unwrap_or_else(PoisonError::into_inner);
        let left = seats.get(team).map_or(0, |taken| taken - 1);
        if left == 0 {
            seats.remove(team);
        } else {
            seats.insert(*team, left);
        }
    }
}

impl Driver {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            running: Mutex::default(),
            room: Arc::new(Semaphore::new(AT_ONCE)),
            wake: Notify::new(),
            turns: Mutex::default(),
            seats: Arc::default(),
        })
    }

    /// None: the hosts of that team have as many operations as they may have here.
    pub fn seat(&self, owner: Option<TeamId>) -> Option<Seat> {
        let Some(team) = owner else { return Some(Seat(None)) };
        let mut seats = self.seats.lock().unwrap_or_else(PoisonError::into_inner);
        if seats.values().sum::<usize>() >= OF_TEAMS_MAX || seats.get(&team).is_some_and(|taken| *taken >= OF_TEAM_MAX)
        {
            return None;
        }
        *seats.entry(team).or_default() += 1;
        Some(Seat(Some((self.seats.clone(), team))))
    }

    /// For whose hosts nothing is to be claimed now.
    fn full(&self) -> Full {
        let seats = self.seats.lock().unwrap_or_else(PoisonError::into_inner);
        let full = seats.iter().filter(|(_, taken)| **taken >= OF_TEAM_MAX).map(|(team, _)| *team);
        Full { teams: full.collect(), all: seats.values().sum::<usize>() >= OF_TEAMS_MAX }
    }

    /// There is something to claim.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// One lock for all on this replica who want the same snapshot, as long as somebody does.
    pub fn turn(&self, id: SnapshotId) -> Arc<Turn> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| turn.strong_count() > 0);
        match turns.get(&id).and_then(Weak::upgrade) {
            Some(turn) => turn,
            None => {
                let turn = Arc::default();
                turns.insert(id, Arc::downgrade(&turn));
                turn
            }
        }
    }

    /// How many operations this replica works on.
    pub fn running(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<OperationId>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Works on an operation that is leased to this replica, in a task of its own.
///
/// `since`: when the request that opened it arrived, for the time that the control plane itself took.
pub fn work(app: &App, operation: Operation, since: Option<Instant>) {
    // On a replica that does not work, it was leased to nobody.
    if !app.roles.workers || !app.driver.lock().insert(operation.id) {
        return;
    }
    let app = app.clone();
    let span =
        info_span!("operation", operation.id = %operation.id, sandbox.id = %operation.sandbox, kind = ?operation.kind);
    let tracker = app.tracker.clone();
    tracker.spawn(
        async move {
            let room = app.driver.room.clone();
            let _permit = room.acquire().await.expect("the semaphore is never closed");
            let id = operation.id;
            let worked = std::panic::AssertUnwindSafe(under_lease(&app, operation, since)).catch_unwind().await;
            if worked.is_err() {
                error!("the operation panicked; it is taken up again when its lease is over");
            }
            app.driver.lock().remove(&id);
            app.outcomes.tell(id);
        }
        .instrument(span),
    );
}

async fn under_lease(app: &App, operation: Operation, since: Option<Instant>) {
    let id = operation.id;
    let lease = app.lease();
    let renewal = async {
        loop {
            tokio::time::sleep(LEASE / 3).await;
            match app.store.renew_lease(id, &lease).await {
                Ok(Update::Changed) | Err(_) => {}
                Ok(Update::Stale) => return,
            }
        }
    };
    // Whatever the work writes is conditional, so it may be dropped at any point: it is repeated from its beginning.
    tokio::select! {
        biased;
        () = app.stop.cancelled() => match app.store.hand_back(id, &lease).await {
            Ok(_) => info!("the operation is handed back: this replica ends"),
            Err(cause) => warn!("the operation is not handed back, and taken up when this replica is gone: {cause}"),
        },
        worked = super::run::run(app, &operation, since) => if let Err(cause) = worked {
            if cause.is_unavailable() {
                warn!("the database is away; the operation is taken up again");
            } else {
                error!(error = ?cause, "operation: {cause}");
            }
        },
        () = renewal => warn!("somebody else works on the operation now"),
    }
}

/// Takes up what nobody works on, for ever.
pub async fn claim(app: App) {
    let mut was_down = false;
    app.runs.expect(CLAIM, CLAIM_EVERY, CLAIM_TIME_MAX);
    loop {
        let _ = crashpoint::hit("cp.claim");
        let began = Instant::now();
        let mut outcome = "ok";
        let free = app.driver.room.available_permits();
        let count_max = CLAIM_MAX.min(i64::try_from(free).unwrap_or(CLAIM_MAX));
        if count_max > 0 {
            // A network that swallows everything is no reason for the service manager to take this program for stuck.
            let lease = app.lease();
            let full = app.driver.full();
            let claimed = app.store.claim_operations_but(&lease, count_max, &full);
            match tokio::time::timeout(CLAIM_ANSWER_MAX, claimed).await {
                Ok(Ok(claimed)) => {
                    was_down = false;
                    claimed.into_iter().for_each(|operation| work(&app, operation, None));
                }
                Ok(Err(cause)) if !cause.is_unavailable() => {
                    outcome = "failed";
                    error!(error = ?cause, "claim operations: {cause}");
                }
                Ok(Err(_)) | Err(_) => {
                    outcome = "unavailable";
                    if !std::mem::replace(&mut was_down, true) {
                        warn!("the database is away; open operations wait for it");
                    }
                }
            }
        }
        app.runs.ended(CLAIM, outcome, began.elapsed());
        tokio::select! {
            () = app.stop.cancelled() => return,
            () = app.driver.wake.notified() => {}
            () = tokio::time::sleep(CLAIM_EVERY) => {}
        }
    }
}

/// Puts down what is this replica's by the database and not worked on, so that it is claimed: the answer to a commit may be lost.
pub async fn put_down_forgotten(app: App) -> Result<(), StoreError> {
    // Before the statement: what is begun meanwhile is younger than what the statement looks for.
    let known: Vec<OperationId> = app.driver.lock().iter().copied().collect();
    let count = app.store.put_down_all_but(&app.lease(), &known).await?;
    if count > 0 {
        warn!(count, "{count} operations of this replica were not worked on, and are taken up again");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_teams_hosts_take_a_part_of_the_room_and_give_it_back() {
        let driver = Driver::new();
        let team = |number: u128| Some(TeamId(uuid::Uuid::from_u128(number)));
        let seats: Vec<Seat> = (0..OF_TEAM_MAX).map(|_| driver.seat(team(1)).unwrap()).collect();
        assert!(driver.seat(team(1)).is_none());
        assert!(driver.seat(team(2)).is_some() && driver.seat(None).is_some());
        drop(seats);
        assert!(driver.seat(team(1)).is_some());
        assert!(driver.seats.lock().unwrap().is_empty());
    }

    #[test]
    fn hosts_of_all_teams_together_leave_room_for_the_platforms() {
        let driver = Driver::new();
        let team = |number: usize| Some(TeamId(uuid::Uuid::from_u128(number as u128)));
        let mut seats: Vec<Seat> = (0..OF_TEAMS_MAX).map(|number| driver.seat(team(number % 50)).unwrap()).collect();
        let full = driver.full();
        assert!(full.all && full.teams.is_empty(), "{} teams have their part", full.teams.len());
        for other in [0, 49, 50] {
            assert!(driver.seat(team(other)).is_none(), "team {other}");
        }
        let platform: Vec<Seat> = (0..AT_ONCE).map(|_| driver.seat(None).unwrap()).collect();
        seats.pop();
        assert!(!driver.full().all);
        seats.push(driver.seat(team(50)).unwrap());
        assert!(driver.seat(team(51)).is_none());
        drop((seats, platform));
        assert!(driver.seats.lock().unwrap().is_empty());
    }
}
