//! Builds: makings of templates of the platform.
//!
//! ```text
//!   pending -> running -> success        the snapshot that comes of it is there: the same transaction says so
//!       |         +-----> failed
//!       +---------+-----> cancelled
//! ```
//!
//! Whoever works on one holds a lease, and each taking has a number: what an earlier taking still says is not heard. From the wish for the
//! snapshot on nobody has to hold it, because that is an operation like any other.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use model::ids::{BuildId, HostId, SandboxId, SnapshotId, TeamId};
use model::shape::{Shape, TemplateName};
use uuid::Uuid;

use crate::audit::{self, Actor};
use crate::idempotency::{self, Claim};
use crate::{BATCH_MAX, Store, StoreError, Tx, Update};

/// That wait or run at once: each may have an archive in the database.
pub const UNFINISHED_MAX: i64 = 32;
/// Begun so often, it fails.
const ATTEMPTS_MAX: i32 = 3;
/// From its beginning, however often it was begun.
pub const TIME_MAX: Duration = Duration::from_secs(2 * 3600);
/// Of what is older no sandbox is left: its own time is over long ago.
const LOOKED_AT_DAYS: i32 = 7;
/// Until somebody else takes it.
const LEASE: Duration = Duration::from_secs(15);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Pending,
    Running,
    Success,
    Failed,
    Cancelled,
}

impl State {
    const ALL: [Self; 5] = [Self::Pending, Self::Running, Self::Success, Self::Failed, Self::Cancelled];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Success => "success",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// How the files for `COPY` are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArchiveKind {
    Gzip,
    Tar,
    Zip,
}

impl ArchiveKind {
    const ALL: [Self; 3] = [Self::Gzip, Self::Tar, Self::Zip];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Tar => "tar",
            Self::Zip => "zip",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Archive {
    pub id: Uuid,
    pub kind: ArchiveKind,
}

pub struct NewBuild {
    pub id: BuildId,
    pub name: TemplateName,
    pub base: TemplateName,
    pub recipe: Vec<String>,
    pub healthcheck: Option<String>,
    pub shape: Shape,
    pub skip_pre_post: bool,
    pub archive: Option<Archive>,
    pub total_steps: i32,
}

#[derive(Debug, PartialEq)]
pub enum Created {
    Made,
    /// What the first call under this key made.
    Repeated(BuildId),
    OtherArguments,
    /// Hosts have an image of that name.
    NameReserved,
    /// The platform's team has a snapshot of that name, which is not published.
    NameTaken,
    /// [`UNFINISHED_MAX`] wait or run.
    TooMany,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Build {
    pub id: BuildId,
    pub name: TemplateName,
    pub base: TemplateName,
    pub recipe: Vec<String>,
    pub healthcheck: Option<String>,
    pub shape: Shape,
    pub skip_pre_post: bool,
    pub archive: Option<Archive>,
    pub state: State,
    /// Steps that have ended.
    pub step: i64,
    pub total_steps: i32,
    pub default_user: String,
    pub default_env: BTreeMap<String, String>,
    pub error: Option<String>,
    pub sandbox: Option<SandboxId>,
    pub host: Option<HostId>,
    pub snapshot: Option<SnapshotId>,
    /// The number of its taking.
    pub attempt: i32,
    pub created_at: DateTime<Utc>,
    pub started_at: Option<DateTime<Utc>>,
    pub completed_at: Option<DateTime<Utc>>,
}

/// A taking of a build: what is said by its number, as long as there is no other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taking {
    pub build: BuildId,
    pub attempt: i32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// From 1.
    pub step: i32,
    pub phase: String,
    pub cmd: String,
    /// Without NUL.
    pub stdout: String,
    pub stderr: String,
    pub exit: i32,
    pub elapsed_ms: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    Done,
    /// It has ended already.
    Ended,
    Missing,
}

struct Row {
    id: Uuid,
    name: String,
    base_template: String,
    recipe: serde_json::Value,
    healthcheck: Option<String>,
    vcpus: i32,
    memory_mib: i32,
    disk_mib: i32,
    skip_pre_post: bool,
    archive_id: Option<Uuid>,
    archive_kind: Option<String>,
    state: String,
    step: i64,
    total_steps: i32,
    default_user: String,
    default_env: serde_json::Value,
    error: Option<String>,
    sandbox_id: Option<String>,
    host_id: Option<Uuid>,
    snapshot_id: Option<Uuid>,
    attempts: i32,
    created_at: DateTime<Utc>,
    started_at: Option<DateTime<Utc>>,
    completed_at: Option<DateTime<Utc>>,
}

impl TryFrom<Row> for Build {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let damaged = |column| StoreError::Damaged { row: row.id.to_string(), column };
        let archive = row.archive_id.zip(row.archive_kind.as_deref()).map(|(id, word)| {
            let kind = ArchiveKind::ALL.into_iter().find(|kind| kind.as_str() == word);
            kind.map(|kind| Archive { id, kind }).ok_or_else(|| damaged("archive_kind"))
        });
        let sandbox = row.sandbox_id.as_deref().map(str::parse).transpose();
        Ok(Self {
            id: BuildId(row.id),
            name: row.name.parse().map_err(|_| damaged("name"))?,
            base: row.base_template.parse().map_err(|_| damaged("base_template"))?,
            recipe: serde_json::from_value(row.recipe.clone()).map_err(|_| damaged("recipe"))?,
            shape: Shape::new(row.vcpus.into(), row.memory_mib.into(), row.disk_mib.into())
                .map_err(|_| damaged("shape"))?,
            skip_pre_post: row.skip_pre_post,
            archive: archive.transpose()?,
            state: State::ALL.into_iter().find(|state| state.as_str() == row.state).ok_or_else(|| damaged("state"))?,
            step: row.step,
            total_steps: row.total_steps,
            default_env: serde_json::from_value(row.default_env.clone()).map_err(|_| damaged("default_env"))?,
            sandbox: sandbox.map_err(|_| damaged("sandbox_id"))?,
            host: row.host_id.map(HostId),
            snapshot: row.snapshot_id.map(SnapshotId),
            attempt: row.attempts,
            healthcheck: row.healthcheck,
            default_user: row.default_user,
            error: row.error,
            created_at: row.created_at,
            started_at: row.started_at,
            completed_at: row.completed_at,
        })
    }
}

/// `select` of a build with where it is made and how far it is.
macro_rules! builds {
    ($rest:literal $(, $argument:expr)*) => {
        sqlx::query_as!(
            Row,
            r#"select b.id, b.name, b.base_template, b.recipe, b.healthcheck, b.vcpus, b.memory_mib, b.disk_mib, b.skip_pre_post,
                   b.archive_id, b.archive_kind, b.state, (select count(*) from build_steps s where s.build_id = b.id) as "step!",
                   b.total_steps, b.default_user, b.default_env, b.error, b.sandbox_id, x.host_id as "host_id?", b.snapshot_id, b.attempts,
                   b.created_at, b.started_at, b.completed_at
               from builds b left join sandboxes x on x.id = b.sandbox_id "# + $rest
            $(, $argument)*
        )
    };
}

impl Store {
    /// A piece of the files for a build that is to be.
    pub async fn put_archive_part(&self, id: Uuid, part: i32, bytes: &[u8]) -> Result<(), StoreError> {
        sqlx::query!("insert into build_archives (id, part, bytes) values ($1, $2, $3)", id, part, bytes)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// None after the last.
    pub async fn archive_part(&self, id: Uuid, part: i32) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(sqlx::query_scalar!("select bytes from build_archives where id = $1 and part = $2", id, part)
            .fetch_optional(&self.pool)
            .await?)
    }

    /// Of a build that does not come to be. One that has come to be keeps it.
    pub async fn remove_archive(&self, id: Uuid) -> Result<(), StoreError> {
        sqlx::query!(
            "delete from build_archives where id = $1 and not exists (select 1 from builds where archive_id = $1)",
            id
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    pub async fn create_build(
        &self,
        new: &NewBuild,
        key: Option<&idempotency::Key>,
        actor: &Actor,
    ) -> Result<Created, StoreError> {
        let mut tx = self.begin().await?;
        if let Some(key) = key {
            match idempotency::claim(&mut tx, key, &new.id.to_string()).await? {
                Claim::New => {}
                Claim::OtherArguments => return Ok(Created::OtherArguments),
                Claim::Repeated(subject) => {
                    let id = subject.parse();
                    let id = id.map_err(|_| StoreError::Damaged { row: key.key.clone(), column: "subject" })?;
                    return Ok(Created::Repeated(id));
                }
            }
        }
        let standing = sqlx::query!(
            r#"select exists (select 1 from hosts where $1 = any(templates) and team_id is null) as "reserved!",
                   exists (select 1 from snapshots where team_id = (select id from teams where is_platform) and name = $1
                       and not is_published and state <> 'removing') as "taken!",
                   (select count(*) from builds where state in ('pending', 'running')) as "unfinished!""#,
            new.name.as_str()
        )
        .fetch_one(&mut *tx)
        .await?;
        if standing.reserved {
            return Ok(Created::NameReserved);
        }
        if standing.taken {
            return Ok(Created::NameTaken);
        }
        if standing.unfinished >= UNFINISHED_MAX {
            return Ok(Created::TooMany);
        }
        sqlx::query!(
            "insert into builds (id, name, base_template, recipe, healthcheck, vcpus, memory_mib, disk_mib, skip_pre_post, archive_id,
                 archive_kind, total_steps)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
            new.id.0,
            new.name.as_str(),
            new.base.as_str(),
            serde_json::json!(new.recipe),
            new.healthcheck,
            i32::from(new.shape.vcpus()),
            crate::sandboxes::mib(new.shape.memory().0),
            crate::sandboxes::mib(new.shape.disk().0),
            new.skip_pre_post,
            new.archive.map(|archive| archive.id),
            new.archive.map(|archive| archive.kind.as_str()),
            new.total_steps
        )
        .execute(&mut *tx)
        .await?;
        let facts = serde_json::json!({ "name": new.name.as_str() });
        audit::record(&mut tx, actor, "build.create", &new.id.to_string(), facts).await?;
        tx.commit().await?;
        Ok(Created::Made)
    }

    pub async fn build(&self, id: BuildId) -> Result<Option<Build>, StoreError> {
        builds!("where b.id = $1", id.0).fetch_optional(&self.pool).await?.map(Build::try_from).transpose()
    }

    /// Newest first.
    pub async fn builds(&self, limit: i64) -> Result<Vec<Build>, StoreError> {
        let rows = builds!("order by b.created_at desc, b.id desc limit $1", limit).fetch_all(&self.pool).await?;
        rows.into_iter().map(Build::try_from).collect()
    }

    /// Those that have ended, in their order.
    pub async fn build_steps(&self, id: BuildId) -> Result<Vec<Step>, StoreError> {
        Ok(sqlx::query_as!(
            Step,
            "select step, phase, cmd, stdout, stderr, exit, elapsed_ms from build_steps where build_id = $1 order by step",
            id.0
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// Nothing comes of it any more; what was made for it is taken away by whoever works on it, or by the next look.
    pub async fn cancel_build(&self, id: BuildId, actor: &Actor) -> Result<Cancelled, StoreError> {
        let mut tx = self.begin().await?;
        let cancelled = sqlx::query!(
            "update builds set state = 'cancelled', completed_at = now(), lease_until = null
             where id = $1 and state in ('pending', 'running') returning snapshot_id",
            id.0
        )
        .fetch_optional(&mut *tx)
        .await?;
        let Some(cancelled) = cancelled else {
            let is_there = sqlx::query_scalar!("select 1 as one from builds where id = $1", id.0);
            let is_there = is_there.fetch_optional(&mut *tx).await?.is_some();
            return Ok(if is_there { Cancelled::Ended } else { Cancelled::Missing });
        };
        sqlx::query!(
            "update snapshots set state = 'removing', updated_at = now() where id = $1 and state = 'making'",
            cancelled.snapshot_id
        )
        .execute(&mut *tx)
        .await?;
        audit::record(&mut tx, actor, "build.cancel", &id.to_string(), serde_json::json!({})).await?;
        tx.commit().await?;
        Ok(Cancelled::Done)
    }

    /// The oldest that waits, or that nobody works on any more, from its beginning. What a taking before had made is in it still.
    pub async fn take_build(&self) -> Result<Option<Build>, StoreError> {
        let mut tx = self.begin().await?;
        let taken = sqlx::query_scalar!(
            "update builds set state = 'running', attempts = attempts + 1, lease_until = now() + make_interval(secs => $1),
                 started_at = coalesce(started_at, now())
             where id = (select id from builds
                 where (state = 'pending' or state = 'running' and snapshot_id is null and lease_until < now())
                     and attempts < $2 and coalesce(started_at, now()) > now() - make_interval(secs => $3)
                 order by created_at, id limit 1 for update skip locked)
             returning id",
            LEASE.as_secs_f64(),
            ATTEMPTS_MAX,
            TIME_MAX.as_secs_f64()
        )
        .fetch_optional(&mut *tx)
        .await?;
        let Some(id) = taken else { return Ok(None) };
        sqlx::query!("delete from build_steps where build_id = $1", id).execute(&mut *tx).await?;
        let row = builds!("where b.id = $1", id).fetch_one(&mut *tx).await?;
        tx.commit().await?;
        Build::try_from(row).map(Some)
    }

    /// Says that somebody works on it still. Stale: it is not to be worked on any more, or by somebody else.
    pub async fn hold_build(&self, taking: Taking) -> Result<Update, StoreError> {
        let held = sqlx::query!(
            "update builds set lease_until = now() + make_interval(secs => $3)
             where id = $1 and attempts = $2 and state = 'running'",
            taking.build.0,
            taking.attempt,
            LEASE.as_secs_f64()
        )
        .execute(&self.pool)
        .await?;
        Ok(Update::of(held.rows_affected()))
    }

    /// Somebody else may take it at once. That it was begun here does not count.
    pub async fn put_down_build(&self, taking: Taking) -> Result<(), StoreError> {
        sqlx::query!(
            "update builds set lease_until = now(), attempts = attempts - 1
             where id = $1 and attempts = $2 and state = 'running' and snapshot_id is null",
            taking.build.0,
            taking.attempt
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    pub async fn build_is_in(&self, taking: Taking, sandbox: &SandboxId) -> Result<Update, StoreError> {
        let updated = sqlx::query!(
            "update builds set sandbox_id = $3 where id = $1 and attempts = $2 and state = 'running'",
            taking.build.0,
            taking.attempt,
            sandbox.as_str()
        )
        .execute(&self.pool)
        .await?;
        Ok(Update::of(updated.rows_affected()))
    }

    pub async fn add_build_step(&self, taking: Taking, step: &Step) -> Result<Update, StoreError> {
        let added = sqlx::query!(
            "insert into build_steps (build_id, step, phase, cmd, stdout, stderr, exit, elapsed_ms)
             select id, $3, $4, $5, $6, $7, $8, $9 from builds where id = $1 and attempts = $2 and state = 'running'",
            taking.build.0,
            taking.attempt,
            step.step,
            step.phase,
            step.cmd,
            step.stdout,
            step.stderr,
            step.exit,
            step.elapsed_ms
        )
        .execute(&self.pool)
        .await?;
        Ok(Update::of(added.rows_affected()))
    }

    pub async fn fail_build(&self, taking: Taking, error: &str) -> Result<Update, StoreError> {
        let failed = sqlx::query!(
            "update builds set state = 'failed', error = $3, completed_at = now(), lease_until = null
             where id = $1 and attempts = $2 and state = 'running' and snapshot_id is null",
            taking.build.0,
            taking.attempt,
            error
        )
        .execute(&self.pool)
        .await?;
        Ok(Update::of(failed.rows_affected()))
    }

    /// Ends those of which nothing can come any more.
    pub async fn fail_lost_builds(&self) -> Result<(), StoreError> {
        sqlx::query!(
            "update builds set state = 'failed', completed_at = now(), lease_until = null,
                 error = case when attempts >= $1 then 'it was begun too often without an end'
                     else 'it did not end in its time' end
             where state = 'running' and snapshot_id is null and lease_until < now()
                 and (attempts >= $1 or started_at < now() - make_interval(secs => $2))",
            ATTEMPTS_MAX,
            TIME_MAX.as_secs_f64()
        )
        .execute(&self.pool)
        .await?;
        // With the host on which the snapshot was being made; or a program that knows nothing of builds has said that there will be none.
        sqlx::query!(
            "update builds b set state = 'failed', completed_at = now(), lease_until = null,
                 error = 'its template was not made, or has gone with its host'
             where state = 'running' and snapshot_id is not null
                 and not exists (select 1 from snapshots s where s.id = b.snapshot_id and s.state <> 'removing')"
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Sandboxes that were there for builds which have ended.
    pub async fn sandboxes_of_ended_builds(&self) -> Result<Vec<(TeamId, SandboxId)>, StoreError> {
        let rows = sqlx::query!(
            "select s.team_id, s.id from builds b join sandboxes s on s.id = b.sandbox_id
             where b.created_at > now() - make_interval(days => $2) and b.state in ('success', 'failed', 'cancelled')
                 and s.desired <> 'killed' and s.observed <> 'killed' limit $1",
            BATCH_MAX,
            LOOKED_AT_DAYS
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter()
            .map(|row| {
                let id = row.id.parse();
                Ok((TeamId(row.team_id), id.map_err(|_| StoreError::Damaged { row: row.id, column: "id" })?))
            })
            .collect()
    }
}

/// What comes of the build is the snapshot, in the transaction that wishes it. False: nothing is to come of it any more.
pub(crate) async fn becomes(
    tx: &mut Tx,
    taking: Taking,
    snapshot: Uuid,
    user: &str,
    envs: &serde_json::Value,
) -> Result<bool, StoreError> {
    let updated = sqlx::query!(
        "update builds set snapshot_id = $3, default_user = $4, default_env = $5
         where id = $1 and attempts = $2 and state = 'running' and snapshot_id is null",
        taking.build.0,
        taking.attempt,
        snapshot,
        user,
        envs
    )
    .execute(&mut **tx)
    .await?;
    Ok(updated.rows_affected() == 1)
}

/// Of a build and its snapshot the build is locked first, whoever locks both.
pub(crate) async fn lock_of_snapshot(tx: &mut Tx, snapshot: Uuid) -> Result<(), StoreError> {
    sqlx::query!("select id from builds where snapshot_id = $1 and state = 'running' for update", snapshot)
        .fetch_optional(&mut **tx)
        .await?;
    Ok(())
}

/// The end of the build whose outcome a snapshot is, if it is one's; with a failure, why there is none.
pub(crate) async fn end_of_snapshot(tx: &mut Tx, snapshot: Uuid, failure: Option<&str>) -> Result<(), StoreError> {
    sqlx::query!(
        "update builds set state = case when $2::text is null then 'success' else 'failed' end, error = $2, completed_at = now(),
             lease_until = null
         where snapshot_id = $1 and state = 'running'",
        snapshot,
        failure
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}
