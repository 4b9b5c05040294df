//! All SQL of Wrenn: one file per aggregate, private rows in, types of the model out, every query checked at compile time.
//!
//! PostgreSQL is the only shared truth. A wish, the operation that carries it out, its idempotency key and its audit entry are written
//! in one transaction; states change by conditional updates that answer [`Update`]. This crate refuses to decide anything, and to call
//! anybody. Used by the control plane alone.

pub mod account_tokens;
pub mod all_teams;
pub mod api_keys;
mod attempts;
pub mod audit;
pub mod audit_log;
pub mod beats;
pub mod builds;
pub mod channels;
pub mod deletions;
pub mod events;
mod fault;
pub mod fleet;
pub mod hosts;
pub mod idempotency;
pub mod identities;
pub mod idleness;
pub mod invitations;
pub mod keyring;
pub mod measures;
pub mod members;
mod old_rows;
pub mod operations;
pub mod outbox;
pub mod placement;
pub mod policy;
pub mod presence;
pub mod quotas;
pub mod registration_tokens;
pub mod sandboxes;
pub mod schema;
mod servers;
pub mod sessions;
pub mod sightings;
pub mod silence;
pub mod snapshots;
pub mod teams;
mod templates;
pub mod timeline;
pub mod usage;
pub mod users;
pub mod wishes;

use std::time::Duration;

use sqlx::{PgPool, Postgres, Transaction};

pub use fault::StoreError;
use servers::Servers;

/// A host that was silent for longer is shown as unreachable and gets no new sandboxes. Heartbeats come every 30 s.
pub const HOST_SILENCE_MAX: Duration = Duration::from_secs(90);

/// Rows that one run of a reconciler takes.
const BATCH_MAX: i64 = 100;

/// What came of a conditional update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Update {
    Changed,
    /// The row is there, and newer than what the caller knew.
    Stale,
}

impl Update {
    fn of(rows: u64) -> Self {
        if rows == 0 { Self::Stale } else { Self::Changed }
    }
}

#[derive(Debug, Clone)]
pub struct Store {
    pool: PgPool,
    servers: Servers,
    rules: Rules,
}

/// What a platform's operator decides of it; the same for all replicas.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rules {
    pub placement: placement::Rules,
    /// Of teams that have none of their own.
    pub quotas: quotas::Limits,
    pub brake: silence::Brake,
}

type Tx = Transaction<'static, Postgres>;

impl Store {
    /// Does not connect yet: the database may come later than the program.
    pub fn new(url: &str) -> Result<Self, StoreError> {
        let servers = Servers::parse(url)?;
        Ok(Self { pool: servers.pool(), servers, rules: Rules::default() })
    }

    pub fn with_rules(self, rules: Rules) -> Self {
        Self { rules, ..self }
    }

    pub async fn ping(&self) -> Result<(), StoreError> {
        sqlx::query_scalar!(r#"select 1 as "one!""#).fetch_one(&self.pool).await?;
        Ok(())
    }

    /// Where the url names several servers: from now on, the one that takes writes.
    pub async fn follow_primary(&self) {
        self.servers.follow_primary(&self.pool).await;
    }

    pub async fn close(&self) {
        self.pool.close().await;
    }

    async fn begin(&self) -> Result<Tx, StoreError> {
        Ok(self.pool.begin().await?)
    }
}
