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

/// What is told on the channel when there is something to work on; the id of an operation says that it has ended.
pub(crate) const OPENED: &str = "opened";

/// The number of a replica; positive, random. None: it works on nothing, and what it opens is leased to nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replica(Option<i32>);

impl Replica {
    pub fn from_random(random: u32) -> Self {
        Self(Some(i32::try_from(random >> 1).expect("31 bits fit")))
    }

    pub fn idle() -> Self {
        Self(None)
    }

    pub(crate) fn number(self) -> Option<i32> {
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

/// What replicas tell each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hint {
    Ended(OperationId),
    /// There is something that nobody works on yet.
    Opened,
    /// Hints may have been lost.
    Missed,
}

/// Hints, as they are told.
pub struct Hints {
    listener: PgListener,
}

impl Hints {
    pub async fn next(&mut self) -> Result<Hint, StoreError> {
        loop {
            let Some(notice) = self.listener.try_recv().await? else { return Ok(Hint::Missed) };
            if notice.payload() == OPENED {
                return Ok(Hint::Opened);
            }
            if let Ok(id) = notice.payload().parse::<Uuid>() {
                return Ok(Hint::Ended(OperationId(id)));
            }
        }
    }
}

impl Store {
    /// Of a replica that works; another one's lock would say nothing.
    pub async fn be_present(&self, replica: Replica) -> Result<Presence, StoreError> {
        let number = replica.number().unwrap_or_default();
        let options: &PgPool = &self.pool;
        let mut connection = PgConnection::connect_with(&options.connect_options()).await?;
        sqlx::query!("select pg_advisory_lock($1, $2)", LOCK_CLASS, number).execute(&mut connection).await?;
        Ok(Presence { connection })
    }

    pub async fn hints(&self) -> Result<Hints, StoreError> {
        let mut listener = PgListener::connect_with(&self.pool).await?;
        listener.listen(CHANNEL).await?;
        Ok(Hints { listener })
    }
}
