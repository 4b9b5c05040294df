//! The schema, and how it comes to this program's version while other versions of the program serve.
//!
//! Migrations expand: programs of the version before go on with the newer schema, and start on it. Only one program migrates at a time
//! (an advisory lock of its connection). A statement waits for no lock for long: behind one that waits for a table, every query of that
//! table waits too. What does not get its lock is rolled back, lets the queries through, and is tried again.

use std::time::Duration;

use sqlx::migrate::Migrator;
use sqlx::postgres::PgPoolOptions;
use tokio::time::Instant;

use crate::servers::ACQUIRE_MAX;
use crate::{Store, StoreError};

/// Queries behind a migration that waits wait for this long, and no longer.
const LOCK_WAIT_MAX: &str = "1s";
/// An index over many rows; whoever needs longer must be made without a lock, and in steps.
const STATEMENT_MAX: &str = "60s";
/// For as long as it is tried again.
const TRIES_TIME_MAX: Duration = Duration::from_secs(50);
/// Longer than the queries that were held up need.
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(300);

/// What the database's schema is, beside what this program knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchemaVersion {
    /// The newest migration of the database.
    pub database: i64,
    /// The newest of this program.
    pub program: i64,
}

/// Embedded, so that a program brings its own schema. One that is older than the schema serves it all the same.
fn migrations() -> Migrator {
    let mut migrations = sqlx::migrate!();
    migrations.set_ignore_missing(true);
    migrations
}

impl Store {
    /// Brings the schema to this program's version. Concurrent starts wait for each other; whoever dies in the middle leaves what was.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        let began = Instant::now();
        loop {
            match self.migrate_once().await {
                Err(error) if error.is_locked_out() && began.elapsed() < TRIES_TIME_MAX => {
                    tracing::info!("a migration waits for a lock, and is tried again");
                    tokio::time::sleep(TRY_AGAIN_AFTER).await;
                }
                ended => return ended,
            }
        }
    }

    async fn migrate_once(&self) -> Result<(), StoreError> {
        let options = self.pool.connect_options();
        let options =
            (*options).clone().options([("lock_timeout", LOCK_WAIT_MAX), ("statement_timeout", STATEMENT_MAX)]);
        // A connection of its own: the lock goes with it, however this ends.
        let own = PgPoolOptions::new().max_connections(1).acquire_timeout(ACQUIRE_MAX).connect_lazy_with(options);
        let migrated = migrations().run(&own).await;
        own.close().await;
        migrated.map_err(StoreError::from)
    }

    pub async fn schema_version(&self) -> Result<SchemaVersion, StoreError> {
        // Made by sqlx itself, so that no prepared answer knows it.
        let database: Option<i64> =
            sqlx::query_scalar("select max(version) from _sqlx_migrations where success").fetch_one(&self.pool).await?;
        let program = migrations().iter().map(|migration| migration.version).max();
        Ok(SchemaVersion { database: database.unwrap_or_default(), program: program.unwrap_or_default() })
    }
}
