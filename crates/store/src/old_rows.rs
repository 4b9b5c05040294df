//! What has served its time, and for how long it is kept. Nothing here is looked at by who is still to act.

use std::future::Future;
use std::time::Duration;

use tokio::time::Instant;

use crate::{Store, StoreError};

/// Ended operations, for those who ask how it went, and for timelines.
const OPERATIONS_DAYS: i32 = 7;
/// Killed sandboxes, for those who ask what became of them. A host that is silent for longer and still has one finds that nobody claims it.
const SANDBOXES_DAYS: i32 = 30;
/// Links that were used, so that they are told from those that never were.
const ACCOUNT_TOKENS_DAYS: i32 = 1;
/// People who signed up and did not follow their link.
const SIGN_UPS_DAYS: i32 = 1;
/// Invitations that nobody took, for people to see that.
const INVITATIONS_DAYS: i32 = 30;
/// What could not be delivered, for operators to see.
const OUTBOX_DAYS: i32 = 7;
/// What happened, for listeners that come back after a weekend, and some.
const EVENTS_DAYS: i32 = 7;
/// The longest range of statistics that is looked up in stretches themselves is a day.
const STRETCHES_DAYS: i32 = 2;
/// The longest range of usage is 92 days, and may end some days ago.
const QUARTERS_DAYS: i32 = 100;
/// How templates were made, for those who ask what is in them.
const BUILDS_DAYS: i32 = 90;
/// Files that were sent for a build that never was.
const ARCHIVES_HOURS: i32 = 2;

/// Of one statement: it holds its locks for milliseconds.
const ROWS_MAX: i64 = 1000;
/// Of one run. Removal is faster than anything that makes rows, and a backlog is the next run's.
const TIME_MAX: Duration = Duration::from_secs(60);

impl Store {
    /// Removes all of it, some at a time. Audit records are kept for so many days; 0: for ever.
    pub async fn remove_old_rows(&self, audit_days: u32) -> Result<(), StoreError> {
        let end = Instant::now() + TIME_MAX;
        until_none(end, || self.old_idempotency()).await?;
        until_none(end, || self.old_operations()).await?;
        until_none(end, || self.old_sandboxes()).await?;
        until_none(end, || self.old_sessions()).await?;
        until_none(end, || self.old_account_tokens()).await?;
        until_none(end, || self.old_sign_ups()).await?;
        until_none(end, || self.old_invitations()).await?;
        until_none(end, || self.old_attempts()).await?;
        until_none(end, || self.old_outbox()).await?;
        until_none(end, || self.old_events()).await?;
        until_none(end, || self.old_stretches()).await?;
        until_none(end, || self.old_quarters()).await?;
        until_none(end, || self.old_builds()).await?;
        until_none(end, || self.old_archives()).await?;
        if let Ok(days @ 1..) = i32::try_from(audit_days) {
            until_none(end, || self.old_audit(days)).await?;
        }
        Ok(())
    }

    async fn old_idempotency(&self) -> Result<u64, StoreError> {
        let removed = sqlx::query!(
            "delete from idempotency where (scope, key) in (select scope, key from idempotency where expires_at < now() limit $1)",
            ROWS_MAX
        );
        Ok(removed.execute(&self.pool).await?.rows_affected())
    }

    async fn old_operations(&self) -> Result<u64, StoreError> {
        let removed = sqlx::query!(
            "delete from operations where id in (
                 select id from operations where phase <> 'open' and finished_at < now() - make_interval(days => $1) limit $2)",
            OPERATIONS_DAYS,
            ROWS_MAX
        );
        Ok(removed.execute(&self.pool).await?.rows_affected())
    }

    async fn old_sandboxes(&self) -> Result<u64, StoreError> {
        let removed = sqlx::query!(
            "delete from sandboxes where id in (
                 select id from sandboxes s where observed = 'killed' and killed_at < now() - make_interval(days => $1)
                     and not exists (select 1 from operations o where o.sandbox_id = s.id and o.phase = 'open')
                 order by killed_at limit $2)",
            SANDBOXES_DAYS,
            ROWS_MAX
        );
        Ok(removed.execute(&self.pool).await?.rows_affected())
    }

    async fn old_sessions(&self) -> Result<u64, StoreError> {
        let removed = sqlx::query!(
            "delete from sessions where id in (select id from sessions where expires_at < now() limit $1)",
            ROWS_MAX
        );
        Ok(removed.execute(&self.pool).await?.rows_affected())
    }

    async fn old_account_tokens(&self) -> Result<u64, StoreError> {
        let removed = sqlx::query!(
            "delete from account_tokens where token_hash in
                 (select token_hash from account_tokens where expires_at < now() - make_interval(days => $1) limit $2)",
            ACCOUNT_TOKENS_DAYS,
            ROWS_MAX
        );
        Ok(removed.execute(&self.pool).await?.rows_affected())
    }

    /// Those whom an administrator made, who have no password yet, are waited for.
    async fn old_sign_ups(&self) -> Result<u64, StoreError> {
        let removed = sqlx::query!(
            "delete from users where id in
                 (select id from users u where status = 'pending' and password_hash is not null
                      and created_at < now() - make_interval(days => $1)
                      and not exists (select 1 from account_tokens t where t.user_id = u.id and t.expires_at > now())
                  limit $2)",
            SIGN_UPS_DAYS,
            ROWS_MAX
        );
        Ok(removed.execute(&self.pool).await?.rows_affected())
    }

    async fn old_invitations(&self) -> Result<u64, StoreError> {
        let removed = sqlx::query!(
            "delete from invitations where id in
                 (select id from invitations where expires_at < now() - make_interval(days => $1) limit $2)",
            INVITATIONS_DAYS,
            ROWS_MAX
        );
        Ok(removed.execute(&self.pool).await?.rows_affected())
    }

    async fn old_attempts(&self) -> Result<u64, StoreError> {
        let removed = sqlx::query!(
            "delete from attempts where subject in (select subject from attempts where window_ends_at < now() limit $1)",
            ROWS_MAX
        );
        Ok(removed.execute(&self.pool).await?.rows_affected())
    }

    async fn old_outbox(&self) -> Result<u64, StoreError> {
        let removed = sqlx::query!(
            "delete from outbox where id in
                 (select id from outbox where given_up_at < now() - make_interval(days => $1) limit $2)",
            OUTBOX_DAYS,
            ROWS_MAX
        );
        Ok(removed.execute(&self.pool).await?.rows_affected())
    }

    /// As with audit records; those that nobody has numbered, because no replica answers the API, go as well.
    async fn old_events(&self) -> Result<u64, StoreError> {
        let numbered = sqlx::query!(
            "delete from events where at < now() - make_interval(days => $1) and id in (select id from events order by id limit $2)",
            EVENTS_DAYS,
            ROWS_MAX
        );
        let numbered = numbered.execute(&self.pool).await?.rows_affected();
        let written = sqlx::query!(
            "delete from events_written where at < now() - make_interval(days => $1)
                 and id in (select id from events_written order by id limit $2)",
            EVENTS_DAYS,
            ROWS_MAX
        );
        Ok(numbered + written.execute(&self.pool).await?.rows_affected())
    }

    /// Those that have not come into quarters yet stay, however old they are.
    async fn old_stretches(&self) -> Result<u64, StoreError> {
        let removed = sqlx::query!(
            "delete from stretches where ctid in
                 (select ctid from stretches
                  where ended_at < now() - make_interval(days => $1) and ended_at <= (select until from usage_summed) limit $2)",
            STRETCHES_DAYS,
            ROWS_MAX
        );
        Ok(removed.execute(&self.pool).await?.rows_affected())
    }

    async fn old_quarters(&self) -> Result<u64, StoreError> {
        let removed = sqlx::query!(
            "delete from usage_quarters where (team_id, began_at) in
                 (select team_id, began_at from usage_quarters where began_at < now() - make_interval(days => $1) limit $2)",
            QUARTERS_DAYS,
            ROWS_MAX
        );
        Ok(removed.execute(&self.pool).await?.rows_affected())
    }

    async fn old_builds(&self) -> Result<u64, StoreError> {
        let removed = sqlx::query!(
            "delete from builds where id in (select id from builds where completed_at < now() - make_interval(days => $1) limit $2)",
            BUILDS_DAYS,
            ROWS_MAX
        );
        Ok(removed.execute(&self.pool).await?.rows_affected())
    }

    /// Of builds that have ended, too.
    async fn old_archives(&self) -> Result<u64, StoreError> {
        let removed = sqlx::query!(
            "delete from build_archives where (id, part) in
                 (select a.id, a.part from build_archives a left join builds b on b.archive_id = a.id
                  where b.state not in ('pending', 'running')
                      or b.id is null and a.created_at < now() - make_interval(hours => $1) limit $2)",
            ARCHIVES_HOURS,
            ROWS_MAX
        );
        Ok(removed.execute(&self.pool).await?.rows_affected())
    }

    /// Ids grow with time, so the first are looked at, and no index by time is needed.
    async fn old_audit(&self, days: i32) -> Result<u64, StoreError> {
        let removed = sqlx::query!(
            "delete from audit where at < now() - make_interval(days => $1) and id in (select id from audit order by id limit $2)",
            days,
            ROWS_MAX
        );
        Ok(removed.execute(&self.pool).await?.rows_affected())
    }
}

/// Again and again, until one has found nothing, or the time is over.
async fn until_none<F, Batch>(end: Instant, batch: F) -> Result<(), StoreError>
where
    F: Fn() -> Batch,
    Batch: Future<Output = Result<u64, StoreError>>,
{
    while batch().await? > 0 && Instant::now() < end {}
    Ok(())
}
