//! Calls that may be repeated: the first one under a key makes a thing, the others find it.

use std::time::Duration;

use crate::{Store, StoreError, Tx};

/// Long enough for a client that retries over a weekend's night; documented.
const LIFE: Duration = Duration::from_secs(24 * 3600);

/// A client's key, within the scope of who sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// The team or user, and the route.
    pub scope: String,
    pub key: String,
    /// SHA-256 of the arguments.
    pub args_hash: [u8; 32],
}

pub(crate) enum Claim {
    New,
    /// The subject of the first call.
    Repeated(String),
    OtherArguments,
}

/// Waits for a concurrent first call to end its transaction, for as long as any lock is waited for; then it is [`StoreError::FirstUnderWay`].
pub(crate) async fn claim(tx: &mut Tx, key: &Key, subject: &str) -> Result<Claim, StoreError> {
    let life_sec = LIFE.as_secs_f64();
    let inserted = sqlx::query!(
        "insert into idempotency (scope, key, args_hash, subject, expires_at)
         values ($1, $2, $3, $4, now() + make_interval(secs => $5))
         on conflict (scope, key) do update
             set args_hash = excluded.args_hash, subject = excluded.subject, created_at = now(), expires_at = excluded.expires_at
             where idempotency.expires_at < now()",
        key.scope,
        key.key,
        &key.args_hash,
        subject,
        life_sec,
    )
    .execute(&mut **tx)
    .await
    .map_err(|cause| match StoreError::from(cause) {
        locked if locked.is_locked_out() => StoreError::FirstUnderWay,
        other => other,
    })?;
    if inserted.rows_affected() == 1 {
        return Ok(Claim::New);
    }
    let first =
        sqlx::query!("select args_hash, subject from idempotency where scope = $1 and key = $2", key.scope, key.key)
            .fetch_one(&mut **tx)
            .await?;
    Ok(if first.args_hash == key.args_hash { Claim::Repeated(first.subject) } else { Claim::OtherArguments })
}

impl Store {
    /// What the first call under this key made, when there was one with the same arguments.
    pub async fn idempotency_subject(&self, key: &Key) -> Result<Option<Result<String, OtherArguments>>, StoreError> {
        let first = sqlx::query!(
            "select args_hash, subject from idempotency where scope = $1 and key = $2 and expires_at >= now()",
            key.scope,
            key.key
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(first.map(|first| if first.args_hash == key.args_hash { Ok(first.subject) } else { Err(OtherArguments) }))
    }
}

/// The key was used with other arguments before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OtherArguments;
