//! What can go wrong with the database, as callers need to tell it apart.

use crate::servers;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The server is away, restarting, or too busy to give a connection: the same call may work in a moment.
    #[error("the database is not available")]
    Unavailable(#[source] sqlx::Error),
    #[error("migrate the database")]
    Migration(#[source] sqlx::migrate::MigrateError),
    /// A row that no version of this program wrote.
    #[error("row {row} holds a wrong {column}")]
    Damaged { row: String, column: &'static str },
    /// The first call under this idempotency key is still at it.
    #[error("the first call under an idempotency key has not ended")]
    FirstUnderWay,
    #[error("ask the database")]
    Query(#[source] sqlx::Error),
}

impl StoreError {
    pub fn is_unavailable(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }

    /// Somebody else has had a lock for longer than we wait.
    pub fn is_locked_out(&self) -> bool {
        matches!(self, Self::Unavailable(sqlx::Error::Database(cause)) if cause.code().as_deref() == Some("55P03"))
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        use sqlx::Error as E;
        let code = error.as_database_error().and_then(|cause| cause.code()).unwrap_or_default().into_owned();
        let is_broken = match &error {
            E::Io(_) | E::Tls(_) | E::WorkerCrashed | E::Protocol(_) => true,
            // Shutdown and crash; 08: connection; 25006: the server takes no writes any more, as after a fail-over.
            _ => ["57P01", "57P02", "25006"].contains(&code.as_str()) || code.starts_with("08"),
        };
        if is_broken {
            servers::note_break();
        }
        // Class 57: shutdown and cancelled; 53: out of connections, disk, memory; 58: the server's own files;
        // 55P03: lock timeout; 25P03: idle in transaction for too long; 40: serialisation and deadlocks.
        let is_busy = ["57", "53", "58", "40"].iter().any(|class| code.starts_with(class))
            || ["55P03", "25P03"].contains(&code.as_str());
        let is_unavailable = is_broken || is_busy || matches!(error, E::PoolTimedOut | E::PoolClosed);
        if is_unavailable { Self::Unavailable(error) } else { Self::Query(error) }
    }
}

impl From<sqlx::migrate::MigrateError> for StoreError {
    fn from(error: sqlx::migrate::MigrateError) -> Self {
        use sqlx::migrate::MigrateError as M;
        match error {
            M::Execute(cause) => match Self::from(cause) {
                Self::Query(cause) => Self::Migration(M::Execute(cause)),
                other => other,
            },
            M::ExecuteMigration(cause, version) => match Self::from(cause) {
                Self::Query(cause) => Self::Migration(M::ExecuteMigration(cause, version)),
                other => other,
            },
            other => Self::Migration(other),
        }
    }
}
