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
pub mod deletions;
mod fault;
pub mod hosts;
pub mod idempotency;
pub mod identities;
pub mod idleness;
pub mod invitations;
pub mod keyring;
pub mod members;
pub mod operations;
pub mod outbox;
pub mod placement;
pub mod policy;
pub mod presence;
pub mod quotas;
pub mod registration_tokens;
pub mod sandboxes;
pub mod sessions;
mod sightings;
pub mod silence;
pub mod snapshots;
pub mod teams;
pub mod timeline;
pub mod users;
pub mod wishes;

use std::str::FromStr as _;
use std::time::Duration;

use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{PgPool, Postgres, Transaction};

pub use fault::StoreError;

/// Embedded, so that a program brings its own schema.
static MIGRATIONS: Migrator = sqlx::migrate!();

/// A replica's share of the server's connections (100 by default): handlers wait for one, and for no longer than [`ACQUIRE_MAX`].
const CONNECTIONS_MAX: u32 = 16;
/// A handler that gets no connection in this time answers 503 while its client still listens.
const ACQUIRE_MAX: Duration = Duration::from_secs(3);
/// No query of ours takes longer on a healthy server; what a vanished client left must not hold locks.
const SESSION: [(&str, &str); 4] = [
    ("statement_timeout", "10s"),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "15s"),
    ("timezone", "UTC"),
];
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
        let options = connect_options(url)?;
        let pool = PgPoolOptions::new()
            .max_connections(CONNECTIONS_MAX)
            .acquire_timeout(ACQUIRE_MAX)
            // A connection that broke while idle is noticed by the query that fails; asking each time before costs a round trip.
            .test_before_acquire(false)
            .connect_lazy_with(options);
        Ok(Self { pool, rules: Rules::default() })
    }

    pub fn with_rules(self, rules: Rules) -> Self {
        Self { rules, ..self }
    }

    /// Brings the schema to this program's version. Concurrent starts wait for each other.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        MIGRATIONS.run(&self.pool).await.map_err(StoreError::from)
    }

    pub async fn ping(&self) -> Result<(), StoreError> {
        sqlx::query_scalar!(r#"select 1 as "one!""#).fetch_one(&self.pool).await?;
        Ok(())
    }

    pub async fn close(&self) {
        self.pool.close().await;
    }

    async fn begin(&self) -> Result<Tx, StoreError> {
        Ok(self.pool.begin().await?)
    }
}

fn connect_options(url: &str) -> Result<PgConnectOptions, StoreError> {
    let options = PgConnectOptions::from_str(url)?.application_name("wrenn-cp").options(SESSION);
    Ok(options)
}
