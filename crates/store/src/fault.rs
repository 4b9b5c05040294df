//! What can go wrong with the database, as callers need to tell it apart.

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
        let is_unavailable = match &error {
            E::Io(_) | E::PoolTimedOut | E::PoolClosed | E::Tls(_) | E::WorkerCrashed | E::Protocol(_) => true,
            // Class 57: shutdown and cancelled; 53: out of connections, disk, memory; 08: connection; 55P03: lock timeout;
            // 25P03: idle in transaction for too long; 40: serialisation and deadlocks.
            E::Database(cause) => cause.code().is_some_and(|code| {
                ["57", "53", "08", "40"].iter().any(|class| code.starts_with(class))
                    || code == "55P03"
                    || code == "25P03"
            }),
            _ => false,
        };
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
