//! Which replicas of the control plane live, and the hints that operations have ended.
//!
//! A replica holds an advisory lock by its number on a connection of its own for as long as it lives, so that what it worked on when it
//! was killed is taken over at once and not after its leases ran out. Hints may be lost: whoever waits for one also looks.

use std::time::Duration;

use model::ids::OperationId;
use sqlx::postgres::{PgConnection, PgListener};
use sqlx::{Connection as _, PgPool};
use uuid::Uuid;

use crate::{Store, StoreError};

/// First half of the lock's name; the second is the replica's number.
pub(crate) const LOCK_CLASS: i32 = 0x7772;
pub(crate) const CHANNEL: &str = "wrenn_operations";

/// The number of a replica; positive, random.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replica(i32);

impl Replica {
    pub fn from_random(random: u32) -> Self {
        Self(i32::try_from(random >> 1).expect("31 bits fit"))
    }

    pub(crate) fn number(self) -> i32 {
        self.0
    }
}

/// Being there: ends when the connection does.
pub struct Presence {
    connection: PgConnection,
}

impl Presence {
    /// Returns when the connection is no more; the caller then becomes present again.
    pub async fn held(mut self, check_every: Duration) -> StoreError {
        loop {
            tokio::time::sleep(check_every).await;
            // A server that vanished says nothing at all.
            match tokio::time::timeout(check_every, self.connection.ping()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return error.into(),
                Err(_) => return sqlx::Error::from(std::io::Error::from(std::io::ErrorKind::TimedOut)).into(),
            }
        }
    }
}

/// Ended operations, as they are told.
pub struct Hints {
    listener: PgListener,
}

impl Hints {
    /// The next ended operation; `None` when hints may have been lost.
    pub async fn next(&mut self) -> Result<Option<OperationId>, StoreError> {
        loop {
            match self.listener.try_recv().await? {
                None => return Ok(None),
                Some(notice) => {
                    if let Ok(id) = notice.payload().parse::<Uuid>() {
                        return Ok(Some(OperationId(id)));
                    }
                }
            }
        }
    }
}

impl Store {
    pub async fn be_present(&self, replica: Replica) -> Result<Presence, StoreError> {
        let options: &PgPool = &self.pool;
        let mut connection = PgConnection::connect_with(&options.connect_options()).await?;
        sqlx::query!("select pg_advisory_lock($1, $2)", LOCK_CLASS, replica.number()).execute(&mut connection).await?;
        Ok(Presence { connection })
    }

    pub async fn hints(&self) -> Result<Hints, StoreError> {
        let mut listener = PgListener::connect_with(&self.pool).await?;
        listener.listen(CHANNEL).await?;
        Ok(Hints { listener })
    }
}
