//! Wishes for sandboxes: to pause, to run again, to end, to have other time. Each raises the revision and opens an operation in one
//! transaction; when a sandbox's time is over, the wish is nobody's but the time's.

use model::ids::{OperationId, SandboxId, TeamId};
use model::sandbox::{Desired, Kept, Observed, OnTimeout, Status};

use crate::audit::{self, Actor};
use crate::events;
use crate::operations::{self, Cause, Kind, Lease};
use crate::placement::{self, Asked, Wanted};
use crate::policy::{self, PolicyChange};
use crate::quotas::{self, Exceeded, Refused};
use crate::sandboxes::{self, Sandbox};
use crate::{BATCH_MAX, Store, StoreError, Tx, teams};

/// After a pause for want of time that did not come about.
pub(crate) const PAUSE_AGAIN_SEC: f64 = 60.0;

pub enum KillWish {
    /// The operation, leased to the caller.
    Opened(operations::Operation),
    /// Somebody wished it before.
    UnderWay(OperationId),
    /// It has ended already.
    Ended,
    Missing,
}

/// What became of the wish for another time.
pub enum Timed {
    Set(Box<Sandbox>),
    /// It has ended, or is about to.
    Ended(Status),
    Missing,
}

/// Who wishes that a sandbox run again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResumeOf {
    Wish,
    /// A call that needs it to run: only where its policy says so.
    Call,
}

/// What became of the wish that a sandbox pause, or run again.
pub enum Turned {
    /// The operation, leased to the caller.
    Opened(operations::Operation),
    /// Somebody wished it before.
    UnderWay(OperationId),
    /// It is so already.
    Is,
    /// Nothing of the kind can be wished in this state.
    Wrong(Status),
    /// Its host has no room for it; nothing was written.
    NoRoom,
    /// The team has as much as it may have; nothing was written.
    OverQuota(Exceeded),
    Missing,
}

impl Store {
    /// The wish that `kept` of a running sandbox be saved and its microVM end. One that is paused, or being paused, already stays what it is.
    pub async fn wish_paused(
        &self,
        team: TeamId,
        id: &SandboxId,
        kept: Kept,
        lease: &Lease,
        actor: &Actor,
    ) -> Result<Turned, StoreError> {
        let mut tx = self.begin().await?;
        let Some(sandbox) = sandboxes::locked(&mut tx, team, id).await? else { return Ok(Turned::Missing) };
        match sandbox.status() {
            Status::Running | Status::Resuming => {}
            Status::Pausing => return Ok(Turned::UnderWay(operations::latest(&mut tx, id, Kind::Pause).await?)),
            Status::Paused => return Ok(Turned::Is),
            other => return Ok(Turned::Wrong(other)),
        }
        let operation = turn(&mut tx, id, sandbox.revision, Turn::Pause(kept), Some(lease), actor.into()).await?;
        let facts = serde_json::json!({ "kept": kept.as_str() });
        audit::record(&mut tx, actor, "sandbox.pause", id.as_str(), facts).await?;
        tx.commit().await?;
        Ok(Turned::Opened(operation))
    }

    /// The wish that a paused sandbox run again, where it stood. With it goes the reservation of its room on its host.
    pub async fn wish_resumed(
        &self,
        team: TeamId,
        id: &SandboxId,
        whose: ResumeOf,
        lease: &Lease,
        actor: &Actor,
    ) -> Result<Turned, StoreError> {
        let mut tx = self.begin().await?;
        if !teams::stays(&mut tx, team).await? {
            return Ok(Turned::Missing);
        }
        let Some(sandbox) = sandboxes::locked(&mut tx, team, id).await? else { return Ok(Turned::Missing) };
        match sandbox.status() {
            status @ (Status::Paused | Status::Pausing) if whose == ResumeOf::Call && !sandbox.runs_again() => {
                return Ok(Turned::Wrong(status));
            }
            Status::Paused | Status::Pausing => {}
            Status::Resuming => return Ok(Turned::UnderWay(operations::latest(&mut tx, id, Kind::Resume).await?)),
            Status::Running => return Ok(Turned::Is),
            other => return Ok(Turned::Wrong(other)),
        }
        if sandbox.observed == Observed::Paused
            && let Some(placed) = &sandbox.host
        {
            let again = quotas::of_paused(sandbox.shape, 1);
            match quotas::claim(&mut tx, &self.rules.quotas, team, &again).await? {
                None => {}
                Some(Refused::Over(exceeded)) => return Ok(Turned::OverQuota(exceeded)),
                Some(Refused::NoTeam) => return Ok(Turned::Missing),
            }
            // It is where it is, whatever tags that host has now.
            let anything = Asked::default();
            let wanted = Wanted {
                team,
                template: &sandbox.template,
                shape: sandbox.shape,
                count: 1,
                asked: &anything,
                refused: &[],
            };
            if !placement::has_room(&mut tx, placed.host, &self.rules.placement, &wanted).await? {
                return Ok(Turned::NoRoom);
            }
        }
        let reason = (whose == ResumeOf::Call).then_some("auto_resume");
        let cause = Cause { actor: Some(actor), reason };
        let operation = turn(&mut tx, id, sandbox.revision, Turn::Resume, Some(lease), cause).await?;
        let facts = serde_json::json!({ "by_call": whose == ResumeOf::Call });
        audit::record(&mut tx, actor, "sandbox.resume", id.as_str(), facts).await?;
        tx.commit().await?;
        Ok(Turned::Opened(operation))
    }

    /// The wish that a sandbox end; open operations for older wishes are superseded.
    pub async fn wish_killed(
        &self,
        team: TeamId,
        id: &SandboxId,
        lease: &Lease,
        actor: &Actor,
    ) -> Result<KillWish, StoreError> {
        let mut tx = self.begin().await?;
        let row = sqlx::query!(
            "select desired, observed, revision from sandboxes where id = $1 and team_id = $2 for update",
            id.as_str(),
            team.0
        )
        .fetch_optional(&mut *tx)
        .await?;
        let Some(row) = row else { return Ok(KillWish::Missing) };
        if row.observed == Observed::Killed.as_str() {
            return Ok(KillWish::Ended);
        }
        if row.desired == Desired::Killed.as_str() {
            return Ok(KillWish::UnderWay(operations::latest(&mut tx, id, Kind::Kill).await?));
        }
        let operation = kill(&mut tx, id, row.revision, Some(lease), "requested", actor.into()).await?;
        audit::record(&mut tx, actor, "sandbox.kill", id.as_str(), serde_json::json!({})).await?;
        tx.commit().await?;
        Ok(KillWish::Opened(operation))
    }

    /// Its time begins anew, with what is given changed. Of one that does not run it begins when it does.
    pub async fn set_policy(
        &self,
        team: TeamId,
        id: &SandboxId,
        change: &PolicyChange,
        actor: &Actor,
    ) -> Result<Timed, StoreError> {
        let mut tx = self.begin().await?;
        let Some(sandbox) = sandboxes::locked(&mut tx, team, id).await? else { return Ok(Timed::Missing) };
        let status = sandbox.status();
        if matches!(status, Status::Stopping | Status::Stopped | Status::Error | Status::Missing) {
            return Ok(Timed::Ended(status));
        }
        let words = change.on_timeout.map(policy::words);
        sqlx::query!(
            "update sandboxes set timeout_sec = coalesce($2, timeout_sec), on_timeout = coalesce($3, on_timeout),
                 idle_timeout_sec = coalesce($4, idle_timeout_sec), auto_resume = coalesce($5, auto_resume), idle_since = null,
                 timeout_keeps = coalesce($6, timeout_keeps),
                 last_active_at = case when observed = 'running' then now() else last_active_at end,
                 deadline = case when coalesce($2, timeout_sec) > 0 and observed in ('running', 'pausing')
                     then now() + make_interval(secs => coalesce($2, timeout_sec)) end,
                 updated_at = now()
             where id = $1",
            id.as_str(),
            change.timeout_sec,
            words.map(|(word, _)| word),
            change.idle_timeout_sec,
            change.auto_resume,
            words.map(|(_, keeps)| keeps)
        )
        .execute(&mut *tx)
        .await?;
        let facts = serde_json::json!({
            "timeout_sec": change.timeout_sec,
            "on_timeout": change.on_timeout.map(OnTimeout::as_str),
            "idle_timeout_sec": change.idle_timeout_sec,
            "auto_resume": change.auto_resume,
        });
        let told = events::New {
            team,
            kind: "sandbox.timeout.changed",
            outcome: None,
            resource_type: "capsule",
            resource_id: id.as_str(),
            actor: Some(actor),
            metadata: words_of(&facts),
        };
        events::record(&mut tx, &told).await?;
        audit::record(&mut tx, actor, "sandbox.timeout", id.as_str(), facts).await?;
        let sandbox = sandboxes::read(&mut tx, id).await?;
        tx.commit().await?;
        Ok(Timed::Set(Box::new(sandbox)))
    }

    /// Wishes for sandboxes whose time is over; how many. Paused ones have time.
    pub async fn expire_sandboxes(&self) -> Result<usize, StoreError> {
        let mut tx = self.begin().await?;
        let due = sqlx::query!(
            "select id, revision, on_timeout, timeout_keeps, observed = 'failed' as \"failed!\" from sandboxes
             where deadline < now() and desired = 'running' and observed <> 'killed'
                 and (on_timeout = 'kill' or observed in ('running', 'failed'))
             order by deadline limit $1 for update skip locked",
            BATCH_MAX
        )
        .fetch_all(&mut *tx)
        .await?;
        for row in &due {
            let id: SandboxId =
                row.id.parse().map_err(|_| StoreError::Damaged { row: row.id.clone(), column: "id" })?;
            let kept = kept(&id, &row.on_timeout, &row.timeout_keeps)?.filter(|_| !row.failed);
            end_of_time(&mut tx, &id, row.revision, kept, "deadline").await?;
            if kept.is_some() {
                // One that does not come about is wished again, but not at once.
                sqlx::query!(
                    "update sandboxes set deadline = now() + make_interval(secs => $2) where id = $1",
                    id.as_str(),
                    PAUSE_AGAIN_SEC
                )
                .execute(&mut *tx)
                .await?;
            }
        }
        tx.commit().await?;
        Ok(due.len())
    }

    /// Operations for wishes that have none and are not fulfilled; how many.
    pub async fn reopen_unfulfilled(&self) -> Result<u64, StoreError> {
        let opened = sqlx::query!(
            "insert into operations (id, sandbox_id, kind, revision, deadline)
             select gen_random_uuid(), s.id,
                 case when s.desired = 'killed' then 'kill' when s.desired = 'paused' then 'pause'
                     when s.observed = 'starting' then 'run' else 'resume' end,
                 s.revision,
                 case when s.desired = 'running' and s.observed = 'starting' then now() + make_interval(secs => $2) end
             from sandboxes s
             where (s.desired = 'killed' and s.observed <> 'killed'
                     or s.desired = 'running' and s.observed in ('starting', 'pausing', 'paused', 'resuming')
                     or s.desired = 'paused' and s.observed in ('running', 'pausing', 'resuming'))
                 and not exists (select 1 from operations o where o.sandbox_id = s.id and o.phase = 'open')
             limit $1
             on conflict do nothing",
            BATCH_MAX,
            operations::RUN_TIME_MAX.as_secs_f64()
        )
        .execute(&self.pool)
        .await?;
        Ok(opened.rows_affected())
    }
}

/// The wish that all sandboxes of a team end, which this transaction has locked for its deletion; how many. Snapshots that are being made
/// come to nothing by themselves.
pub(crate) async fn end_of_team(tx: &mut Tx, team: TeamId) -> Result<usize, StoreError> {
    // In one order, so that two that lock many never wait for each other.
    let ids = sqlx::query_scalar!(
        "select id from sandboxes where team_id = $1 and desired <> 'killed' and observed <> 'killed' order by id for update",
        team.0
    )
    .fetch_all(&mut **tx)
    .await?;
    sqlx::query!(
        "update sandboxes set desired = 'killed', revision = revision + 1, reason = 'team deleted', idle_since = null, updated_at = now()
         where id = any($1)",
        &ids
    )
    .execute(&mut **tx)
    .await?;
    operations::supersede_with_kills(tx, &ids).await?;
    Ok(ids.len())
}

/// The wish that a sandbox end which was there for a snapshot alone.
pub(crate) async fn end_of_source(tx: &mut Tx, id: &str) -> Result<(), StoreError> {
    let revision = sqlx::query_scalar!(
        "select revision from sandboxes where id = $1 and desired <> 'killed' and observed <> 'killed' for update",
        id
    )
    .fetch_optional(&mut **tx)
    .await?;
    let Some(revision) = revision else { return Ok(()) };
    let id: SandboxId = id.parse().map_err(|_| StoreError::Damaged { row: id.to_owned(), column: "sandbox_id" })?;
    let reason = "published";
    kill(tx, &id, revision, None, reason, Cause { actor: None, reason: Some(reason) }).await?;
    let facts = serde_json::json!({ "reason": reason });
    audit::record(tx, &Actor::platform("snapshots"), "sandbox.kill", id.as_str(), facts).await
}

/// What is said of them, without what is not, as words.
fn words_of(facts: &serde_json::Value) -> serde_json::Value {
    let said = facts.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    said.map(|(name, value)| (name.clone(), value.as_str().map_or_else(|| value.to_string(), str::to_owned).into()))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// What is kept of a sandbox whose time is over.
pub(crate) fn kept(id: &SandboxId, word: &str, keeps: &str) -> Result<Option<Kept>, StoreError> {
    let damaged = || StoreError::Damaged { row: id.to_string(), column: "on_timeout" };
    Ok(policy::on_timeout(word, keeps).ok_or_else(damaged)?.kept())
}

/// The wish that nobody has but the time, for a sandbox that this transaction has locked: that it pause, if anything is kept of it, or end.
pub(crate) async fn end_of_time(
    tx: &mut Tx,
    id: &SandboxId,
    revision: i64,
    kept: Option<Kept>,
    reason: &str,
) -> Result<(), StoreError> {
    let cause = Cause { actor: None, reason: Some(if reason == "deadline" { "ttl_expired" } else { reason }) };
    let action = match kept {
        Some(kept) => {
            turn(tx, id, revision, Turn::Pause(kept), None, cause).await?;
            "sandbox.pause"
        }
        None => {
            kill(tx, id, revision, None, reason, cause).await?;
            "sandbox.kill"
        }
    };
    let actor = Actor::platform("expired_sandboxes");
    audit::record(tx, &actor, action, id.as_str(), serde_json::json!({ "reason": reason })).await
}

#[derive(Debug, Clone, Copy)]
enum Turn {
    Pause(Kept),
    Resume,
}

/// Raises the revision to the wish of a pause or of running again, with which its time begins anew.
async fn turn(
    tx: &mut Tx,
    id: &SandboxId,
    revision: i64,
    turn: Turn,
    lease: Option<&Lease>,
    cause: Cause<'_>,
) -> Result<operations::Operation, StoreError> {
    let revision = revision + 1;
    let (desired, observed, kind, kept) = match turn {
        Turn::Pause(kept) => (Desired::Paused, Observed::Pausing, Kind::Pause, Some(kept)),
        Turn::Resume => (Desired::Running, Observed::Resuming, Kind::Resume, None),
    };
    sqlx::query!(
        "update sandboxes set desired = $3, revision = $2, observed = $4, reason = null, idle_since = null,
             kept = coalesce($5, kept), deadline = case when $3 = 'running' then null else deadline end, updated_at = now()
         where id = $1",
        id.as_str(),
        revision,
        desired.as_str(),
        observed.as_str(),
        kept.map(Kept::as_str)
    )
    .execute(&mut **tx)
    .await?;
    operations::supersede(tx, id).await?;
    operations::open(tx, id, kind, revision, lease, None, cause).await
}

/// Raises the revision to the wish of an end.
async fn kill(
    tx: &mut Tx,
    id: &SandboxId,
    revision: i64,
    lease: Option<&Lease>,
    reason: &str,
    cause: Cause<'_>,
) -> Result<operations::Operation, StoreError> {
    sqlx::query!(
        "update sandboxes set desired = 'killed', revision = $2, reason = $3, idle_since = null, updated_at = now() where id = $1",
        id.as_str(),
        revision + 1,
        reason
    )
    .execute(&mut **tx)
    .await?;
    operations::supersede(tx, id).await?;
    operations::open(tx, id, Kind::Kill, revision + 1, lease, None, cause).await
}
