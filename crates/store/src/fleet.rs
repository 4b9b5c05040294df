//! What the database knows of the platform as a whole, beside its numbers: its own clock, who works, what waits to be delivered.

use chrono::{DateTime, Utc};

use crate::presence::LOCK_CLASS;
use crate::{Store, StoreError};

/// One moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pulse {
    pub now: DateTime<Utc>,
    /// Replicas that hold their lock, and so take up operations.
    pub workers: i64,
    /// To be delivered.
    pub outgoing: i64,
    pub outgoing_oldest_sec: f64,
    /// Within the last day.
    pub outgoing_given_up: i64,
}

impl Store {
    pub async fn pulse(&self) -> Result<Pulse, StoreError> {
        Ok(sqlx::query_as!(
            Pulse,
            r#"select clock_timestamp() as "now!",
                   (select count(*) from pg_locks l join pg_database d on d.oid = l.database
                    where d.datname = current_database() and l.locktype = 'advisory' and l.granted
                        and l.classid::bigint = $1) as "workers!",
                   (select count(*) from outbox where given_up_at is null) as "outgoing!",
                   (select coalesce(extract(epoch from now() - min(created_at)), 0)::float8 from outbox where given_up_at is null)
                       as "outgoing_oldest_sec!",
                   (select count(*) from outbox where given_up_at > now() - interval '1 day') as "outgoing_given_up!""#,
            i64::from(LOCK_CLASS)
        )
        .fetch_one(&self.pool)
        .await?)
    }
}
