//! Operations: one carrying out of one wish, worked on by whichever replica holds its lease.
//!
//! Every step may run twice at once: a lease is lost by a pause as well as by a death. What an operation writes is conditional on the
//! revision of its wish.

use std::time::Duration;

use chrono::{DateTime, Utc};
use model::ids::{HostId, OperationId, SandboxId, SnapshotId, TeamId};
use model::sandbox::Observed;
use uuid::Uuid;

use crate::audit::Actor;
use crate::measures::Ended;
use crate::placement::{self, Shortage, Wanted};
use crate::presence::{CHANNEL, LOCK_CLASS, OPENED, Replica};
use crate::sandboxes::{Report, Sandbox};
use crate::{Store, StoreError, Tx, Update};

/// A replica that lives renews its leases far sooner.
pub const LEASE: Duration = Duration::from_secs(30);
/// Between the commit that leases an operation to a replica and its beginning there lies a moment, and no more.
const UNBEGUN_MAX: Duration = Duration::from_secs(5);
/// How long a create may take in all: a cold boot on a crowded host, and a host agent that restarts meanwhile.
pub(crate) const RUN_TIME_MAX: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Run,
    Pause,
    Resume,
    Kill,
    /// Of a sandbox that stays what it is.
    Snapshot,
    /// Ends what a failed run may have left on its host; the sandbox stays failed.
    Clean,
    /// Its end that nobody wished: never open.
    Exit,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Kill => "kill",
            Self::Snapshot => "snapshot",
            Self::Clean => "clean",
            Self::Exit => "exit",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    Open,
    Done,
    /// A code of the public API and a sentence.
    Failed {
        code: String,
        message: String,
    },
    /// A newer wish took its place.
    Superseded,
}

impl Phase {
    pub(crate) fn of(word: &str, code: Option<String>, message: Option<String>) -> Option<Self> {
        match word {
            "open" => Some(Self::Open),
            "done" => Some(Self::Done),
            "superseded" => Some(Self::Superseded),
            "failed" => Some(Self::Failed { code: code.unwrap_or_default(), message: message.unwrap_or_default() }),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Operation {
    pub id: OperationId,
    pub sandbox: SandboxId,
    pub kind: Kind,
    pub revision: i64,
    pub phase: Phase,
    pub attempts: i32,
    pub refused_hosts: Vec<HostId>,
    pub deadline: Option<DateTime<Utc>>,
    /// What it makes.
    pub snapshot: Option<SnapshotId>,
}

/// Who works on an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    pub replica: Replica,
}

/// Who wishes something, and why, for those who hear how it ended. None: the platform.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cause<'a> {
    pub actor: Option<&'a Actor>,
    pub reason: Option<&'a str>,
}

impl<'a> From<&'a Actor> for Cause<'a> {
    fn from(actor: &'a Actor) -> Self {
        Self { actor: Some(actor), reason: None }
    }
}

struct Row {
    id: Uuid,
    sandbox_id: String,
    kind: String,
    revision: i64,
    phase: String,
    attempts: i32,
    refused_hosts: Vec<Uuid>,
    deadline: Option<DateTime<Utc>>,
    snapshot_id: Option<Uuid>,
    error_code: Option<String>,
    error_message: Option<String>,
}

impl TryFrom<Row> for Operation {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let damaged = |column| StoreError::Damaged { row: row.id.to_string(), column };
        Ok(Self {
            id: OperationId(row.id),
            sandbox: row.sandbox_id.parse().map_err(|_| damaged("sandbox_id"))?,
            kind: match row.kind.as_str() {
                "run" => Kind::Run,
                "pause" => Kind::Pause,
                "resume" => Kind::Resume,
                "kill" => Kind::Kill,
                "snapshot" => Kind::Snapshot,
                "clean" => Kind::Clean,
                "exit" => Kind::Exit,
                _ => return Err(damaged("kind")),
            },
            revision: row.revision,
            phase: Phase::of(&row.phase, row.error_code.clone(), row.error_message.clone())
                .ok_or_else(|| damaged("phase"))?,
            attempts: row.attempts,
            refused_hosts: row.refused_hosts.into_iter().map(HostId).collect(),
            deadline: row.deadline,
            snapshot: row.snapshot_id.map(SnapshotId),
        })
    }
}

macro_rules! operations {
    ($text:literal $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            Row,
            $text + " id, sandbox_id, kind, revision, phase, attempts, refused_hosts, deadline, snapshot_id, error_code, error_message"
            $(, $argument)*
        )
    };
}

pub(crate) async fn open(
    tx: &mut Tx,
    sandbox: &SandboxId,
    kind: Kind,
    revision: i64,
    lease: Option<&Lease>,
    snapshot: Option<Uuid>,
    cause: Cause<'_>,
) -> Result<Operation, StoreError> {
    let time_max = matches!(kind, Kind::Run | Kind::Snapshot).then(|| RUN_TIME_MAX.as_secs_f64());
    let owner = lease.and_then(|lease| lease.replica.number());
    if owner.is_none() {
        sqlx::query!("select pg_notify($1, $2)", CHANNEL, OPENED).execute(&mut **tx).await?;
    }
    let row = operations!(
        "insert into operations (id, sandbox_id, kind, revision, attempts, lease_owner, lease_until, deadline, snapshot_id,
             actor_kind, actor_id, cause)
         values (gen_random_uuid(), $1, $2, $3, $8, $4, now() + make_interval(secs => $5), now() + make_interval(secs => $6), $7, $9, $10, $11)
         returning",
        sandbox.as_str(),
        kind.as_str(),
        revision,
        owner,
        LEASE.as_secs_f64(),
        time_max,
        snapshot,
        // Whoever leases it begins with it; else the one who takes it up does, and must know that no host has heard of it yet.
        i32::from(owner.is_some()),
        cause.actor.map(|actor| actor.kind.as_str()),
        cause.actor.map(|actor| actor.id.as_str()),
        cause.reason,
    )
    .fetch_one(&mut **tx)
    .await?;
    row.try_into()
}

/// The newest operation of a kind; there is one for each wish that was ever made and not yet purged.
pub(crate) async fn latest(tx: &mut Tx, sandbox: &SandboxId, kind: Kind) -> Result<OperationId, StoreError> {
    let id = sqlx::query_scalar!(
        "select id from operations where sandbox_id = $1 and kind = $2 order by created_at desc limit 1",
        sandbox.as_str(),
        kind.as_str()
    )
    .fetch_optional(&mut **tx)
    .await?;
    // One that was purged has ended: nobody waits for an id that is not there.
    Ok(OperationId(id.unwrap_or_default()))
}

/// Ends the open operations of older wishes. A snapshot is no wish for another state, and goes on.
pub(crate) async fn supersede(tx: &mut Tx, sandbox: &SandboxId) -> Result<(), StoreError> {
    let ended = sqlx::query!(
        r#"update operations set phase = 'superseded', finished_at = now() where sandbox_id = $1 and phase = 'open' and kind <> 'snapshot'
         returning id, kind, extract(epoch from now() - created_at)::float8 as "seconds!""#,
        sandbox.as_str()
    )
    .fetch_all(&mut **tx)
    .await?;
    for row in ended {
        tell(tx, OperationId(row.id)).await?;
        // Also where the wish is then given up: it is made again, and that it is one too many is seen by nobody.
        Ended { kind: row.kind, outcome: "superseded", seconds: row.seconds }.count();
    }
    Ok(())
}

/// After the commit.
pub(crate) fn count(ended: Option<Ended>) {
    if let Some(ended) = ended {
        ended.count();
    }
}

/// The same for many, with the wish of their end, that nobody works on yet.
pub(crate) async fn supersede_with_kills(tx: &mut Tx, sandboxes: &[String]) -> Result<(), StoreError> {
    sqlx::query!(
        r#"with ended as (
               update operations set phase = 'superseded', finished_at = now()
               where sandbox_id = any($1) and phase = 'open' and kind <> 'snapshot' returning id)
           select pg_notify($2, id::text)::text as "told" from ended"#,
        sandboxes,
        CHANNEL
    )
    .fetch_all(&mut **tx)
    .await?;
    sqlx::query!(
        "insert into operations (id, sandbox_id, kind, revision, cause)
         select gen_random_uuid(), id, 'kill', revision, 'team_deleted' from sandboxes where id = any($1)",
        sandboxes
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

async fn tell(tx: &mut Tx, id: OperationId) -> Result<(), StoreError> {
    sqlx::query!("select pg_notify($1, $2)", CHANNEL, id.0.to_string()).execute(&mut **tx).await?;
    Ok(())
}

/// None when somebody else ended it.
pub(crate) async fn end(
    tx: &mut Tx,
    id: OperationId,
    failure: Option<(&str, &str)>,
    steps: &[(String, f64)],
) -> Result<Option<Ended>, StoreError> {
    let ended = sqlx::query!(
        r#"update operations set phase = case when $2::text is null then 'done' else 'failed' end, error_code = $2,
             error_message = $3, steps = $4, finished_at = now(), lease_owner = null
         where id = $1 and phase = 'open'
         returning kind, extract(epoch from now() - created_at)::float8 as "seconds!""#,
        id.0,
        failure.map(|(code, _)| code),
        failure.map(|(_, message)| message),
        serde_json::json!(steps),
    )
    .fetch_optional(&mut **tx)
    .await?;
    tell(tx, id).await?;
    let outcome = if failure.is_some() { "failed" } else { "done" };
    Ok(ended.map(|row| Ended { kind: row.kind, outcome, seconds: row.seconds }))
}

/// Teams of whose hosts a replica has as many operations as it may.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Full {
    pub teams: Vec<TeamId>,
    /// All teams together.
    pub all: bool,
}

impl Store {
    pub async fn operation(&self, id: OperationId) -> Result<Option<Operation>, StoreError> {
        let row = sqlx::query_as!(
            Row,
            "select id, sandbox_id, kind, revision, phase, attempts, refused_hosts, deadline, snapshot_id, error_code, error_message
             from operations where id = $1",
            id.0
        )
        .fetch_optional(&self.pool)
        .await?;
        row.map(Operation::try_from).transpose()
    }

    /// Open operations that nobody works on, leased to this replica: new ones, ones whose time has come again, and ones whose replica
    /// lives no more.
    pub async fn claim_operations(&self, lease: &Lease, count_max: i64) -> Result<Vec<Operation>, StoreError> {
        self.claim_operations_but(lease, count_max, &Full::default()).await
    }

    /// The same, without those for hosts of teams of which enough is worked on. What is overdue is taken all the same, to end.
    pub async fn claim_operations_but(
        &self,
        lease: &Lease,
        count_max: i64,
        full: &Full,
    ) -> Result<Vec<Operation>, StoreError> {
        let teams: Vec<Uuid> = full.teams.iter().map(|team| team.0).collect();
        let rows = operations!(
            "update operations set lease_owner = $1, lease_until = now() + make_interval(secs => $2), attempts = attempts + 1
             where id in (
                 select o.id from operations o
                 where o.phase = 'open' and o.not_before <= now()
                     and (not ($5 or cardinality($6::uuid[]) > 0) or o.deadline < now() or not exists (
                         select 1 from sandboxes s join hosts h on h.id = s.host_id
                         where s.id = o.sandbox_id and h.team_id is not null and ($5 or h.team_id = any($6))))
                     and (o.lease_owner is null or o.lease_until < now() or not exists (
                         select 1 from pg_locks l
                         where l.locktype = 'advisory' and l.classid = $3::bigint::oid and l.objid = o.lease_owner::bigint::oid
                             and l.objsubid = 2 and l.database = (select d.oid from pg_database d where d.datname = current_database())))
                 order by o.not_before limit $4 for update skip locked)
             returning",
            lease.replica.number(),
            LEASE.as_secs_f64(),
            i64::from(LOCK_CLASS),
            count_max,
            full.all,
            &teams,
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(Operation::try_from).collect()
    }

    /// Puts down what is leased to this replica and is none of what it works on: the answer to the commit was lost, or the work ended when
    /// the database was away.
    pub async fn put_down_all_but(&self, lease: &Lease, known: &[OperationId]) -> Result<u64, StoreError> {
        let known: Vec<Uuid> = known.iter().map(|id| id.0).collect();
        let put_down = sqlx::query!(
            "update operations set lease_owner = null
             where phase = 'open' and lease_owner = $1 and id <> all($2) and lease_until < now() + make_interval(secs => $3)",
            lease.replica.number(),
            &known,
            (LEASE - UNBEGUN_MAX).as_secs_f64()
        )
        .execute(&self.pool)
        .await?;
        Ok(put_down.rows_affected())
    }

    /// Stale when somebody else works on it now, or it has ended.
    pub async fn renew_lease(&self, id: OperationId, lease: &Lease) -> Result<Update, StoreError> {
        let renewed = sqlx::query!(
            "update operations set lease_until = now() + make_interval(secs => $3)
             where id = $1 and lease_owner = $2 and phase = 'open'",
            id.0,
            lease.replica.number(),
            LEASE.as_secs_f64()
        )
        .execute(&self.pool)
        .await?;
        Ok(Update::of(renewed.rows_affected()))
    }

    /// Puts an operation down that this replica works on, for another one to take it up at once.
    pub async fn hand_back(&self, id: OperationId, lease: &Lease) -> Result<Update, StoreError> {
        let mut tx = self.begin().await?;
        let given = sqlx::query!(
            "update operations set lease_owner = null, not_before = now() where id = $1 and lease_owner = $2 and phase = 'open'",
            id.0,
            lease.replica.number()
        )
        .execute(&mut *tx)
        .await?;
        sqlx::query!("select pg_notify($1, $2)", CHANNEL, OPENED).execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(Update::of(given.rows_affected()))
    }

    /// Puts an operation down, to be taken up again after a while. Nothing happens when somebody else has taken it up meanwhile.
    pub async fn put_off(&self, operation: &Operation, pause: Duration, reason: &str) -> Result<(), StoreError> {
        self.put_down(operation, pause, reason, 0).await
    }

    /// The same, of one for which no host was asked: that was no attempt.
    pub async fn put_off_unasked(
        &self,
        operation: &Operation,
        pause: Duration,
        reason: &str,
    ) -> Result<(), StoreError> {
        self.put_down(operation, pause, reason, 1).await
    }

    async fn put_down(
        &self,
        operation: &Operation,
        pause: Duration,
        reason: &str,
        given_back: i32,
    ) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        let put_down = sqlx::query!(
            "update operations set lease_owner = null, not_before = now() + make_interval(secs => $2), attempts = attempts - $4
             where id = $1 and phase = 'open' and attempts = $3",
            operation.id.0,
            pause.as_secs_f64(),
            operation.attempts,
            given_back
        )
        .execute(&mut *tx)
        .await?;
        if put_down.rows_affected() == 0 {
            return Ok(());
        }
        sqlx::query!(
            "update sandboxes set reason = $3, updated_at = now()
             where id = $1 and revision = $2 and reason is distinct from $3 and observed not in ('killed', 'failed') and $4",
            operation.sandbox.as_str(),
            operation.revision,
            reason,
            // The sandbox is what it was.
            operation.kind != Kind::Snapshot
        )
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(())
    }

    /// Gives the sandbox to another host than those that refused it, or says why none takes it.
    pub async fn place(
        &self,
        operation: &Operation,
        sandbox: &Sandbox,
    ) -> Result<Result<HostId, Shortage>, StoreError> {
        let mut tx = self.begin().await?;
        let refused: Vec<Uuid> = operation.refused_hosts.iter().map(|host| host.0).collect();
        let wanted = Wanted {
            team: sandbox.team,
            template: &sandbox.template,
            shape: sandbox.shape,
            count: 1,
            asked: &sandbox.asked,
            refused: &refused,
        };
        let (host, epoch) = match placement::choose(&mut tx, &self.rules.placement, &wanted).await? {
            Ok(placed) => placed,
            Err(shortage) => return Ok(Err(shortage)),
        };
        sqlx::query!(
            "update sandboxes set host_id = $3, host_epoch = $4, updated_at = now() where id = $1 and revision = $2 and host_id is null",
            operation.sandbox.as_str(),
            operation.revision,
            host.0,
            epoch
        )
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(Ok(host))
    }

    /// The host has no room, or could not be reached at all: whatever it was asked for, it has not got. Stale: somebody else works on the
    /// operation now, and may have reached it.
    pub async fn refuse_host(&self, operation: &Operation, host: HostId) -> Result<Update, StoreError> {
        let mut tx = self.begin().await?;
        let refused = sqlx::query!(
            "update operations set refused_hosts = array_append(array_remove(refused_hosts, $2), $2) where id = $1 and attempts = $3",
            operation.id.0,
            host.0,
            operation.attempts
        )
        .execute(&mut *tx)
        .await?;
        if refused.rows_affected() == 0 {
            return Ok(Update::Stale);
        }
        sqlx::query!(
            "update sandboxes set host_id = null, host_epoch = null where id = $1 and revision = $2 and host_id = $3",
            operation.sandbox.as_str(),
            operation.revision,
            host.0
        )
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(Update::Changed)
    }

    /// The sandbox is paused.
    pub async fn finish_pause(&self, operation: &Operation, report: &Report) -> Result<Update, StoreError> {
        let mut tx = self.begin().await?;
        let updated = sqlx::query!(
            "update sandboxes set observed = 'paused', reason = null, steps = $3, kept = $4, absent_since = null, deadline = null, updated_at = now()
             where id = $1 and revision = $2 and desired = 'paused' and observed not in ('killed', 'failed')",
            operation.sandbox.as_str(),
            operation.revision,
            serde_json::json!(report.steps),
            report.kept.as_str(),
        )
        .execute(&mut *tx)
        .await?;
        // Somebody else who worked on it has said how it ended: nothing of this is kept.
        let Some(ended) = end(&mut tx, operation.id, None, &report.steps).await? else {
            return Ok(Update::Stale);
        };
        tx.commit().await?;
        ended.count();
        Ok(Update::of(updated.rows_affected()))
    }

    /// The host says that the wish could not be fulfilled and that the sandbox is what it was before: that is what is wished again.
    pub async fn take_back(
        &self,
        operation: &Operation,
        is: Observed,
        code: &str,
        message: &str,
        steps: &[(String, f64)],
    ) -> Result<Update, StoreError> {
        let mut tx = self.begin().await?;
        let updated = sqlx::query!(
            "update sandboxes set desired = $3, observed = $3, reason = $4, absent_since = null, updated_at = now()
             where id = $1 and revision = $2 and desired <> 'killed' and observed not in ('killed', 'failed')",
            operation.sandbox.as_str(),
            operation.revision,
            is.as_str(),
            message
        )
        .execute(&mut *tx)
        .await?;
        // Somebody else who worked on it has said how it ended: nothing of this is kept.
        let Some(ended) = end(&mut tx, operation.id, Some((code, message)), steps).await? else {
            return Ok(Update::Stale);
        };
        tx.commit().await?;
        ended.count();
        Ok(Update::of(updated.rows_affected()))
    }

    /// A sandbox that was there has ended by itself. Its host keeps what it keeps of those.
    pub async fn fail_sandbox(&self, operation: &Operation, code: &str, message: &str) -> Result<Update, StoreError> {
        let mut tx = self.begin().await?;
        let updated = sqlx::query!(
            "update sandboxes set observed = 'failed', reason = $3, absent_since = null, updated_at = now()
             where id = $1 and revision = $2 and observed not in ('killed', 'failed')",
            operation.sandbox.as_str(),
            operation.revision,
            message
        )
        .execute(&mut *tx)
        .await?;
        // Somebody else who worked on it has said how it ended: nothing of this is kept.
        let Some(ended) = end(&mut tx, operation.id, Some((code, message)), &[]).await? else {
            return Ok(Update::Stale);
        };
        tx.commit().await?;
        ended.count();
        Ok(Update::of(updated.rows_affected()))
    }

    /// The sandbox runs.
    pub async fn finish_run(&self, operation: &Operation, report: &Report) -> Result<Update, StoreError> {
        let mut tx = self.begin().await?;
        let updated = sqlx::query!(
            "update sandboxes set observed = $3, reason = nullif($4, ''), started_at = case when incarnation is distinct from $5
                     then now() else started_at end,
                 incarnation = $5, isolation = $6, versions = $7, steps = $8, absent_since = null, last_active_at = now(),
                 idle_since = null,
                 deadline = case when timeout_sec > 0 then coalesce(deadline, now() + make_interval(secs => timeout_sec)) end,
                 updated_at = now()
             where id = $1 and revision = $2 and observed not in ('killed', 'failed')",
            operation.sandbox.as_str(),
            operation.revision,
            report.observed.as_str(),
            report.reason,
            report.incarnation,
            report.isolation,
            serde_json::json!(report.versions),
            serde_json::json!(report.steps),
        )
        .execute(&mut *tx)
        .await?;
        let ended = end(&mut tx, operation.id, None, &report.steps).await?;
        tx.commit().await?;
        count(ended);
        Ok(Update::of(updated.rows_affected()))
    }

    /// The sandbox will not run. When it may have left something on a host, an operation that cleans up there is opened.
    pub async fn fail_run(
        &self,
        operation: &Operation,
        code: &str,
        message: &str,
        steps: &[(String, f64)],
    ) -> Result<Update, StoreError> {
        let mut tx = self.begin().await?;
        let failed = sqlx::query!(
            "update sandboxes set observed = 'failed', reason = $3, revision = revision + 1, envs = '{}', updated_at = now()
             where id = $1 and revision = $2 and observed not in ('killed', 'failed')
             returning host_id, revision",
            operation.sandbox.as_str(),
            operation.revision,
            message
        )
        .fetch_optional(&mut *tx)
        .await?;
        let ended = end(&mut tx, operation.id, Some((code, message)), steps).await?;
        if let Some(row) = &failed
            && row.host_id.is_some()
        {
            open(&mut tx, &operation.sandbox, Kind::Clean, row.revision, None, None, Cause::default()).await?;
        }
        tx.commit().await?;
        count(ended);
        Ok(if failed.is_some() { Update::Changed } else { Update::Stale })
    }

    /// Nothing of the sandbox is left.
    pub async fn finish_kill(&self, operation: &Operation, steps: &[(String, f64)]) -> Result<Update, StoreError> {
        let mut tx = self.begin().await?;
        let updated = sqlx::query!(
            "update sandboxes set observed = 'killed', killed_at = now(), envs = '{}', absent_since = null, updated_at = now()
             where id = $1 and revision = $2 and observed <> 'killed'",
            operation.sandbox.as_str(),
            operation.revision
        )
        .execute(&mut *tx)
        .await?;
        let ended = end(&mut tx, operation.id, None, steps).await?;
        tx.commit().await?;
        count(ended);
        Ok(Update::of(updated.rows_affected()))
    }

    /// An operation that changes nothing more of its sandbox.
    pub async fn finish_operation(&self, operation: &Operation, steps: &[(String, f64)]) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        let ended = end(&mut tx, operation.id, None, steps).await?;
        tx.commit().await?;
        count(ended);
        Ok(())
    }
}
