//! What is to be told to the world outside, written in the transaction of what it is about, and delivered by whichever replica comes
//! first. One that dies between commit and delivery loses nothing; one that dies after it may deliver twice.
//!
//! ```text
//!   written -> taken (nobody else looks until the lease is over) -> delivered: no row
//!                ^                          |-> failed: again, later ---|
//!                '---------------------------------------------------- '-> given up: kept for a while, without what it held
//! ```

use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::{Store, StoreError, Tx};

/// Longer than any one delivery takes.
pub(crate) const LEASE_SEC: f64 = 60.0;
/// Of the words why it was given up.
const PROBLEM_CHARS_MAX: usize = 300;

/// Something to be delivered. What it holds is sealed by a key that the database does not have: it may be a link that opens an account.
#[derive(Debug, Clone, PartialEq)]
pub struct Outgoing {
    pub id: Uuid,
    /// By which deliverers know what it is.
    pub kind: &'static str,
    pub sealed: Vec<u8>,
    /// After it, it helps nobody any more.
    pub expires_at: DateTime<Utc>,
}

/// What a deliverer has taken for [`LEASE_SEC`].
#[derive(Debug, Clone, PartialEq)]
pub struct Taken {
    pub id: Uuid,
    pub kind: String,
    pub sealed: Vec<u8>,
    pub expires_at: DateTime<Utc>,
    /// With this one. It tells this taking from later ones, too.
    pub attempts: i32,
}

impl Store {
    /// What is due, at most so much, for nobody else until the lease is over. Notifications are [`crate::channels`]'.
    pub async fn take_outgoing(&self, limit: i64) -> Result<Vec<Taken>, StoreError> {
        let taken = sqlx::query_as!(
            Taken,
            "update outbox set attempts = attempts + 1, lease_until = now() + make_interval(secs => $2)
             where id in (select id from outbox
                 where channel_id is null and given_up_at is null and next_at <= now() and (lease_until is null or lease_until < now())
                 order by next_at limit $1 for update skip locked)
             returning id, kind, sealed, expires_at, attempts",
            limit,
            LEASE_SEC
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(taken)
    }

    pub async fn outgoing_delivered(&self, taken: &Taken) -> Result<(), StoreError> {
        sqlx::query!("delete from outbox where id = $1 and attempts = $2", taken.id, taken.attempts)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// It is tried again after that time.
    pub async fn put_off_outgoing(&self, taken: &Taken, after: Duration) -> Result<(), StoreError> {
        sqlx::query!(
            "update outbox set lease_until = null, next_at = now() + make_interval(secs => $3) where id = $1 and attempts = $2",
            taken.id,
            taken.attempts,
            after.as_secs_f64()
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Nobody tries again. What it held is gone.
    pub async fn give_up_outgoing(&self, taken: &Taken, problem: &str) -> Result<(), StoreError> {
        let problem: String = problem.chars().take(PROBLEM_CHARS_MAX).collect();
        sqlx::query!(
            "update outbox set lease_until = null, given_up_at = now(), problem = $3, sealed = '' where id = $1 and attempts = $2",
            taken.id,
            taken.attempts,
            problem
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}

/// In the transaction of what it is about.
pub(crate) async fn put(tx: &mut Tx, outgoing: &Outgoing) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into outbox (id, kind, sealed, expires_at) values ($1, $2, $3, $4)",
        outgoing.id,
        outgoing.kind,
        outgoing.sealed,
        outgoing.expires_at
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}
