//! Waiting for the end of an operation: by hint, and by looking when no hint comes.

use std::sync::Arc;
use std::time::Duration;

use model::ids::OperationId;
use store::operations::{Operation, Phase};
use store::presence::Hint;
use store::{Store, StoreError};
use tokio::sync::broadcast;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::reconcile::driver::Driver;

/// Ended operations told at once to those who wait; who falls behind looks into the database instead.
const HINTS_MAX: usize = 1024;
/// Hints may be lost with the connection that brings them.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Another replica takes up at once what this one has handed back, if there is another.
const HANDED_BACK_TIME_MAX: Duration = Duration::from_secs(5);
const RECONNECT_AFTER: Duration = Duration::from_secs(1);

pub struct Outcomes {
    store: Store,
    ended: broadcast::Sender<OperationId>,
    /// This replica ends.
    stop: CancellationToken,
}

impl Outcomes {
    pub fn new(store: Store, stop: CancellationToken) -> Arc<Self> {
        Arc::new(Self { store, ended: broadcast::Sender::new(HINTS_MAX), stop })
    }

    /// Brings the hints of all replicas to those who wait here, and to this replica's driver.
    pub async fn listen(self: Arc<Self>, driver: Arc<Driver>, end: CancellationToken) {
        let mut is_down = false;
        loop {
            let failed = tokio::select! {
                () = end.cancelled() => return,
                failed = self.relay(&driver, &mut is_down) => failed,
            };
            if !std::mem::replace(&mut is_down, true) {
                warn!("hints of ended operations stay away: {failed}");
            }
            tokio::select! {
                () = end.cancelled() => return,
                () = tokio::time::sleep(RECONNECT_AFTER) => {}
            }
        }
    }

    async fn relay(&self, driver: &Driver, is_down: &mut bool) -> StoreError {
        let mut hints = match self.store.hints().await {
            Ok(hints) => hints,
            Err(error) => return error,
        };
        if std::mem::replace(is_down, false) {
            info!("hints of ended operations come again");
        }
        loop {
            match hints.next().await {
                Ok(Hint::Ended(id)) => self.tell(id),
                Ok(Hint::Opened | Hint::Missed) => driver.wake(),
                Err(error) => return error,
            }
        }
    }

    /// Nobody may be waiting.
    pub fn tell(&self, id: OperationId) {
        let _ = self.ended.send(id);
    }

    /// The operation once it has ended, or as it stands at the deadline, which comes sooner when this replica ends. None: it was purged, so it ended long ago.
    pub async fn wait(&self, id: OperationId, deadline: Instant) -> Result<Option<Operation>, StoreError> {
        let mut ended = self.ended.subscribe();
        let (mut deadline, mut is_ending) = (deadline, false);
        loop {
            let operation = self.store.operation(id).await?;
            let is_open = operation.as_ref().is_some_and(|operation| operation.phase == Phase::Open);
            let now = Instant::now();
            if self.stop.is_cancelled() && !std::mem::replace(&mut is_ending, true) {
                deadline = deadline.min(now + HANDED_BACK_TIME_MAX);
            }
            if !is_open || now >= deadline {
                return Ok(operation);
            }
            let look = (now + LOOK_EVERY).min(deadline);
            let hint = async {
                loop {
                    match ended.recv().await {
                        Ok(told) if told != id => {}
                        _ => return,
                    }
                }
            };
            tokio::select! {
                () = hint => {}
                () = tokio::time::sleep_until(look) => {}
                () = self.stop.cancelled(), if !is_ending => {}
            }
        }
    }
}
