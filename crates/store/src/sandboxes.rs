//! Sandboxes: wishes in, what hosts say in, rows out.
//!
//! A wish raises the revision and opens an operation in the same transaction. What a host says is taken only for the revision it was
//! said about.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use model::ids::{HostId, OperationId, SandboxId, SnapshotId, TeamId};
use model::sandbox::{Desired, Kept, Observed, Status};
use model::shape::{Shape, TemplateName};
use serde_json::Value;
use uuid::Uuid;

use crate::audit::{self, Actor};
use crate::events;
use crate::idempotency::{self, Claim};
use crate::operations::{self, Kind, Lease};
use crate::placement::{self, Asked, Shortage, Strategy, Wanted};
use crate::policy::{self, Policy};
use crate::quotas::{self, Exceeded, Refused};
use crate::{BATCH_MAX, HOST_SILENCE_MAX, Store, StoreError, Tx};

/// Of one answer of the list.
pub const LIST_MAX: u32 = 10_000;
/// Sandboxes of one host about which it is asked in one look.
const ABSENT_OF_HOST_MAX: i64 = 10;
/// `last_active_at` is written at most this often.
const ACTIVE_STEP_SEC: f64 = 10.0;

#[derive(Debug, Clone, PartialEq)]
pub struct Sandbox {
    pub id: SandboxId,
    pub team: TeamId,
    pub template: String,
    /// What it began with instead of the template; that may be gone.
    pub snapshot: Option<SnapshotId>,
    pub shape: Shape,
    pub envs: BTreeMap<String, String>,
    pub metadata: BTreeMap<String, String>,
    /// Empty: the template's own.
    pub default_user: String,
    pub policy: Policy,
    /// What its create asked of its host.
    pub asked: Asked,
    /// What its last pause was to keep.
    pub kept: Kept,
    /// None while it works, and when its idle time does not count.
    pub idle_since: Option<DateTime<Utc>>,
    /// When its time is over; none while none runs.
    pub deadline: Option<DateTime<Utc>>,
    pub desired: Desired,
    pub revision: i64,
    pub observed: Observed,
    pub reason: Option<String>,
    pub incarnation: Option<String>,
    pub host: Option<Placed>,
    pub isolation: Option<String>,
    pub versions: BTreeMap<String, String>,
    /// Name and milliseconds.
    pub steps: Vec<(String, f64)>,
    pub created_at: DateTime<Utc>,
    pub started_at: Option<DateTime<Utc>>,
    pub last_active_at: Option<DateTime<Utc>>,
    pub updated_at: DateTime<Utc>,
}

/// Where a sandbox is.
#[derive(Debug, Clone, PartialEq)]
pub struct Placed {
    pub host: HostId,
    pub epoch: u64,
    pub address: String,
    /// Nothing was heard of the host for longer than [`HOST_SILENCE_MAX`].
    pub is_silent: bool,
    /// Whose host it is; none: the platform's.
    pub owner: Option<TeamId>,
}

impl Sandbox {
    pub fn status(&self) -> Status {
        Status::of(self.desired, self.observed)
    }

    /// Paused, it is to run again when a call needs that. Of its disk alone nothing runs again by itself: what would answer has ended.
    pub fn runs_again(&self) -> bool {
        self.policy.auto_resume && self.kept == Kept::Memory
    }
}

#[derive(Debug, Clone)]
pub struct NewSandbox {
    pub id: SandboxId,
    pub team: TeamId,
    pub template: TemplateName,
    /// What it begins with instead of the template, on the host where that lies.
    pub snapshot: Option<SnapshotId>,
    pub shape: Shape,
    pub envs: BTreeMap<String, String>,
    pub metadata: BTreeMap<String, String>,
    pub default_user: String,
    pub policy: Policy,
    pub asked: Asked,
}

pub enum Created {
    /// Placed; the operation is leased to the caller.
    Made(Box<Sandbox>, operations::Operation),
    /// What the first call under this key made, and its operation.
    Repeated(SandboxId, OperationId),
    OtherArguments,
    /// No host has room; nothing was written.
    NoHost(Shortage),
    /// The team has as much as it may have; nothing was written.
    OverQuota(Exceeded),
    /// The snapshot is not there any more; nothing was written.
    NoSnapshot,
    /// The team was deleted; nothing was written.
    NoTeam,
}

/// Which sandboxes of a list; by default all.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Which {
    /// None of them: whatever they are.
    pub statuses: Vec<Status>,
    pub template: Option<String>,
    /// All of these.
    pub metadata: BTreeMap<String, String>,
    pub created_after: Option<DateTime<Utc>>,
    pub created_before: Option<DateTime<Utc>>,
}

pub enum Relabelled {
    Done(Box<Sandbox>),
    /// It would have more labels than it may.
    TooMany,
    Ended(Status),
    Missing,
}

/// What a host says of a sandbox.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    pub observed: Observed,
    pub reason: String,
    pub incarnation: String,
    pub isolation: String,
    pub versions: BTreeMap<String, String>,
    pub steps: Vec<(String, f64)>,
    /// What its saved state is of, if it has one.
    pub kept: Kept,
}

/// One line of a heartbeat.
#[derive(Debug, Clone, PartialEq)]
pub struct Sighting {
    pub id: String,
    pub observed: Observed,
    pub revision: i64,
    pub incarnation: String,
    pub reason: String,
    /// For how long nothing has happened in it; none when the host does not say.
    pub idle_sec: Option<i64>,
}

pub(crate) struct Row {
    id: String,
    team_id: Uuid,
    template: String,
    snapshot_id: Option<Uuid>,
    vcpus: i32,
    memory_mib: i32,
    disk_mib: i32,
    envs: Value,
    metadata: Value,
    default_user: String,
    timeout_sec: i64,
    on_timeout: String,
    timeout_keeps: String,
    kept: String,
    auto_resume: bool,
    host_tags: Vec<String>,
    strategy: Option<String>,
    idle_timeout_sec: i64,
    idle_since: Option<DateTime<Utc>>,
    deadline: Option<DateTime<Utc>>,
    desired: String,
    revision: i64,
    observed: String,
    reason: Option<String>,
    incarnation: Option<String>,
    host_id: Option<Uuid>,
    host_epoch: Option<i64>,
    host_address: Option<String>,
    host_silent: Option<bool>,
    host_team: Option<Uuid>,
    isolation: Option<String>,
    versions: Value,
    steps: Value,
    created_at: DateTime<Utc>,
    started_at: Option<DateTime<Utc>>,
    last_active_at: Option<DateTime<Utc>>,
    updated_at: DateTime<Utc>,
}

impl TryFrom<Row> for Sandbox {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let damaged = |column| StoreError::Damaged { row: row.id.clone(), column };
        let shape =
            Shape::new(row.vcpus.into(), row.memory_mib.into(), row.disk_mib.into()).map_err(|_| damaged("shape"))?;
        let host = match (row.host_id, row.host_epoch, row.host_address.clone()) {
            (Some(host), Some(epoch), Some(address)) => Some(Placed {
                host: HostId(host),
                epoch: u64::try_from(epoch).map_err(|_| damaged("host_epoch"))?,
                address,
                is_silent: row.host_silent.unwrap_or(true),
                owner: row.host_team.map(TeamId),
            }),
            _ => None,
        };
        Ok(Self {
            id: row.id.parse().map_err(|_| damaged("id"))?,
            team: TeamId(row.team_id),
            shape,
            envs: serde_json::from_value(row.envs.clone()).map_err(|_| damaged("envs"))?,
            metadata: serde_json::from_value(row.metadata.clone()).map_err(|_| damaged("metadata"))?,
            versions: serde_json::from_value(row.versions.clone()).map_err(|_| damaged("versions"))?,
            steps: serde_json::from_value(row.steps.clone()).map_err(|_| damaged("steps"))?,
            desired: row.desired.parse().map_err(|_| damaged("desired"))?,
            observed: row.observed.parse().map_err(|_| damaged("observed"))?,
            host,
            template: row.template,
            snapshot: row.snapshot_id.map(SnapshotId),
            default_user: row.default_user,
            policy: Policy {
                timeout_sec: row.timeout_sec,
                on_timeout: policy::on_timeout(&row.on_timeout, &row.timeout_keeps)
                    .ok_or_else(|| damaged("on_timeout"))?,
                idle_timeout_sec: row.idle_timeout_sec,
                auto_resume: row.auto_resume,
            },
            asked: Asked {
                strategy: row.strategy.as_deref().map(str::parse).transpose().map_err(|_| damaged("strategy"))?,
                tags: row.host_tags,
            },
            kept: row.kept.parse().map_err(|_| damaged("kept"))?,
            idle_since: row.idle_since,
            deadline: row.deadline,
            revision: row.revision,
            reason: row.reason,
            incarnation: row.incarnation,
            isolation: row.isolation,
            created_at: row.created_at,
            started_at: row.started_at,
            last_active_at: row.last_active_at,
            updated_at: row.updated_at,
        })
    }
}

/// `select` of a sandbox with its host; `$1` is [`HOST_SILENCE_MAX`] in seconds.
macro_rules! sandboxes {
    ($rest:literal $(, $argument:expr)*) => {
        sqlx::query_as!(
            Row,
            r#"select s.id, s.team_id, s.template, s.snapshot_id, s.vcpus, s.memory_mib, s.disk_mib, s.envs, s.metadata, s.default_user,
                   s.timeout_sec, s.on_timeout, s.timeout_keeps, s.kept, s.auto_resume, s.host_tags, s.strategy, s.idle_timeout_sec, s.idle_since, s.deadline, s.desired, s.revision, s.observed, s.reason, s.incarnation, s.host_id, s.host_epoch,
                   case when h.state <> 'fenced' then h.address else '' end as "host_address?",
                   (h.state = 'fenced' or h.last_heartbeat_at < now() - make_interval(secs => $1)) as "host_silent?", h.team_id as "host_team?",
                   s.isolation, s.versions, s.steps, s.created_at, s.started_at, s.last_active_at, s.updated_at
               from sandboxes s left join hosts h on h.id = s.host_id "# + $rest,
            HOST_SILENCE_MAX.as_secs_f64()
            $(, $argument)*
        )
    };
}

impl Store {
    /// Row, reservation, operation, idempotency key and audit entry, or nothing.
    pub async fn create_sandbox(
        &self,
        new: &NewSandbox,
        lease: &Lease,
        key: Option<&idempotency::Key>,
        actor: &Actor,
    ) -> Result<Created, StoreError> {
        let mut tx = self.begin().await?;
        if let Some(key) = key {
            match idempotency::claim(&mut tx, key, new.id.as_str()).await? {
                Claim::New => {}
                Claim::OtherArguments => return Ok(Created::OtherArguments),
                Claim::Repeated(subject) => {
                    let id: SandboxId =
                        subject.parse().map_err(|_| StoreError::Damaged { row: key.key.clone(), column: "subject" })?;
                    let operation = operations::latest(&mut tx, &id, Kind::Run).await?;
                    return Ok(Created::Repeated(id, operation));
                }
            }
        }
        let asked = quotas::of_new(new.shape, 1);
        match quotas::claim(&mut tx, &self.rules.quotas, new.team, &asked).await? {
            None => {}
            Some(Refused::Over(exceeded)) => return Ok(Created::OverQuota(exceeded)),
            Some(Refused::NoTeam) => return Ok(Created::NoTeam),
        }
        let template = new.template.as_str();
        let wanted = Wanted { team: new.team, template, shape: new.shape, count: 1, asked: &new.asked, refused: &[] };
        let rules = &self.rules.placement;
        let placed = match new.snapshot {
            None => placement::choose(&mut tx, rules, &wanted).await?,
            Some(id) => {
                // Whoever deletes it waits until this sandbox is there to be seen.
                let host = sqlx::query_scalar!(
                    "select host_id from snapshots where id = $1 and state = 'ready' and (team_id = $2 or is_published) for share",
                    id.0,
                    new.team.0
                )
                .fetch_optional(&mut *tx)
                .await?;
                let Some(host) = host.map(HostId) else { return Ok(Created::NoSnapshot) };
                placement::reserve_on(&mut tx, host, rules, &wanted).await?.map(|epoch| (host, epoch))
            }
        };
        let (host, epoch) = match placed {
            Ok(placed) => placed,
            Err(shortage) => return Ok(Created::NoHost(shortage)),
        };
        let birth = Birth {
            id: &new.id,
            team: new.team,
            template: new.template.as_str(),
            shape: new.shape,
            envs: serde_json::json!(new.envs),
            metadata: serde_json::json!(new.metadata),
            default_user: &new.default_user,
            policy: new.policy,
            asked: &new.asked,
            host,
            epoch,
            snapshot: new.snapshot,
        };
        insert(&mut tx, &birth).await?;
        let operation = operations::open(&mut tx, &new.id, Kind::Run, 1, Some(lease), None, actor.into()).await?;
        audit::record(&mut tx, actor, "sandbox.create", new.id.as_str(), serde_json::json!({})).await?;
        let sandbox = read(&mut tx, &new.id).await?;
        tx.commit().await?;
        Ok(Created::Made(Box::new(sandbox), operation))
    }

    /// A team's sandbox, whatever its state.
    pub async fn sandbox(&self, team: TeamId, id: &SandboxId) -> Result<Option<Sandbox>, StoreError> {
        let row =
            sandboxes!("where s.id = $2 and s.team_id = $3", id.as_str(), team.0).fetch_optional(&self.pool).await?;
        row.map(Sandbox::try_from).transpose()
    }

    /// Any team's, as many as there are.
    pub(crate) async fn sandboxes_of_ids(&self, ids: &[String]) -> Result<Vec<Sandbox>, StoreError> {
        let rows = sandboxes!("where s.id = any($2) order by s.id limit $3", ids, i64::from(LIST_MAX));
        let rows = rows.fetch_all(&self.pool).await?;
        rows.into_iter().map(Sandbox::try_from).collect()
    }

    /// Any team's: for what carries out wishes.
    pub async fn sandbox_of_any_team(&self, id: &SandboxId) -> Result<Option<Sandbox>, StoreError> {
        let row = sandboxes!("where s.id = $2", id.as_str()).fetch_optional(&self.pool).await?;
        row.map(Sandbox::try_from).transpose()
    }

    /// Newest first, without those that were killed; with `before`, those that come after that one.
    pub async fn sandboxes(
        &self,
        team: TeamId,
        limit: u32,
        before: Option<(DateTime<Utc>, &SandboxId)>,
        which: &Which,
    ) -> Result<Vec<Sandbox>, StoreError> {
        if *which != Which::default() {
            return self.sandboxes_which(team, limit, before, which).await;
        }
        let rows = sandboxes!(
            "where s.team_id = $2 and s.observed <> 'killed' and s.created_at <= coalesce($4, 'infinity'::timestamptz)
                 and ($5::text is null or s.created_at < $4 or s.id < $5)
             order by s.created_at desc, s.id desc limit $3",
            team.0,
            i64::from(limit),
            before.map(|(at, _)| at),
            before.map(|(_, id)| id.as_str())
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(Sandbox::try_from).collect()
    }

    /// The same, of those that are as asked. What is asked differs from call to call, and with it how they are found best; a statement
    /// that is prepared would be planned once for all.
    async fn sandboxes_which(
        &self,
        team: TeamId,
        limit: u32,
        before: Option<(DateTime<Utc>, &SandboxId)>,
        which: &Which,
    ) -> Result<Vec<Sandbox>, StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query_scalar!("select set_config('plan_cache_mode', 'force_custom_plan', true)")
            .fetch_one(&mut *tx)
            .await?;
        let statuses: Vec<String> = which.statuses.iter().map(|status| status.as_str().to_owned()).collect();
        let labels = (!which.metadata.is_empty()).then(|| serde_json::json!(which.metadata));
        let rows = sandboxes!(
            "where s.team_id = $2 and s.observed <> 'killed' and s.created_at <= coalesce($4, 'infinity'::timestamptz)
                 and ($5::text is null or s.created_at < $4 or s.id < $5)
                 and (cardinality($6::text[]) = 0 or sandbox_status(s.desired, s.observed) = any($6))
                 and ($7::text is null or s.template = $7)
                 and ($8::jsonb is null or s.metadata <> '{}' and s.metadata @> $8)
                 and ($9::timestamptz is null or s.created_at > $9)
                 and ($10::timestamptz is null or s.created_at < $10)
             order by s.created_at desc, s.id desc limit $3",
            team.0,
            i64::from(limit),
            before.map(|(at, _)| at),
            before.map(|(_, id)| id.as_str()),
            &statuses,
            which.template,
            labels,
            which.created_after,
            which.created_before
        )
        .fetch_all(&mut *tx)
        .await?;
        rows.into_iter().map(Sandbox::try_from).collect()
    }

    /// Gives labels other values, or, where there is none, takes them away. It has `count_max` afterwards, at most.
    pub async fn relabel_sandbox(
        &self,
        team: TeamId,
        id: &SandboxId,
        change: &BTreeMap<String, Option<String>>,
        count_max: usize,
        actor: &Actor,
    ) -> Result<Relabelled, StoreError> {
        let mut tx = self.begin().await?;
        let Some(sandbox) = locked(&mut tx, team, id).await? else { return Ok(Relabelled::Missing) };
        let status = sandbox.status();
        if matches!(status, Status::Stopping | Status::Stopped) {
            return Ok(Relabelled::Ended(status));
        }
        let mut metadata = sandbox.metadata;
        for (name, value) in change {
            match value {
                Some(value) => drop(metadata.insert(name.clone(), value.clone())),
                None => drop(metadata.remove(name)),
            }
        }
        if metadata.len() > count_max {
            return Ok(Relabelled::TooMany);
        }
        sqlx::query!(
            "update sandboxes set metadata = $2, updated_at = now() where id = $1",
            id.as_str(),
            serde_json::json!(metadata)
        )
        .execute(&mut *tx)
        .await?;
        let names: Vec<&String> = change.keys().collect();
        audit::record(&mut tx, actor, "sandbox.metadata", id.as_str(), serde_json::json!({ "names": names })).await?;
        let told = events::New {
            team,
            kind: "sandbox.metadata.changed",
            outcome: None,
            resource_type: "capsule",
            resource_id: id.as_str(),
            actor: Some(actor),
            metadata: serde_json::json!({}),
        };
        events::record(&mut tx, &told).await?;
        let sandbox = read(&mut tx, id).await?;
        tx.commit().await?;
        Ok(Relabelled::Done(Box::new(sandbox)))
    }

    /// Notes that somebody uses the sandbox.
    pub async fn touch_sandbox(&self, id: &SandboxId) -> Result<(), StoreError> {
        sqlx::query!(
            "update sandboxes set last_active_at = now(), idle_since = null
             where id = $1 and (last_active_at is null or last_active_at < now() - make_interval(secs => $2) or idle_since is not null)",
            id.as_str(),
            ACTIVE_STEP_SEC
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Running and paused sandboxes that their hosts did not name, for which nothing is under way; a few of each host, at random: those whose
    /// host never says a word about them keep the others from nothing.
    pub async fn absent_sandboxes(&self) -> Result<Vec<Sandbox>, StoreError> {
        let rows = sandboxes!(
            "join (select a.id, row_number() over (partition by a.host_id order by random()) as place from sandboxes a
                   where a.absent_since is not null and a.observed in ('running', 'paused') and a.desired <> 'killed'
                       and not exists (select 1 from operations o where o.sandbox_id = a.id and o.phase = 'open')) absent
                 on absent.id = s.id and absent.place <= $3
             order by random() limit $2",
            BATCH_MAX,
            ABSENT_OF_HOST_MAX
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(Sandbox::try_from).collect()
    }
}

/// What the row of a new sandbox holds.
pub(crate) struct Birth<'a> {
    pub id: &'a SandboxId,
    pub team: TeamId,
    pub template: &'a str,
    pub shape: Shape,
    pub envs: Value,
    pub metadata: Value,
    pub default_user: &'a str,
    pub policy: Policy,
    pub asked: &'a Asked,
    pub host: HostId,
    pub epoch: i64,
    pub snapshot: Option<SnapshotId>,
}

pub(crate) async fn insert(tx: &mut Tx, birth: &Birth<'_>) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into sandboxes (id, team_id, template, vcpus, memory_mib, disk_mib, envs, metadata, default_user, timeout_sec,
             on_timeout, desired, revision, observed, host_id, host_epoch, snapshot_id, idle_timeout_sec,
             auto_resume, timeout_keeps, host_tags, strategy)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $13, 'running', 1, 'starting', $11, $12, $14, $15, $16, $17, $18, $19)",
        birth.id.as_str(),
        birth.team.0,
        birth.template,
        i32::from(birth.shape.vcpus()),
        mib(birth.shape.memory().0),
        mib(birth.shape.disk().0),
        birth.envs,
        birth.metadata,
        birth.default_user,
        birth.policy.timeout_sec,
        birth.host.0,
        birth.epoch,
        policy::words(birth.policy.on_timeout).0,
        birth.snapshot.map(|id| id.0),
        birth.policy.idle_timeout_sec,
        birth.policy.auto_resume,
        policy::words(birth.policy.on_timeout).1,
        &birth.asked.tags,
        birth.asked.strategy.map(Strategy::as_str),
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// One that is known to be there.
pub(crate) async fn read(tx: &mut Tx, id: &SandboxId) -> Result<Sandbox, StoreError> {
    sandboxes!("where s.id = $2", id.as_str()).fetch_one(&mut **tx).await?.try_into()
}

/// A team's sandbox, that nobody else changes before this transaction ends.
pub(crate) async fn locked(tx: &mut Tx, team: TeamId, id: &SandboxId) -> Result<Option<Sandbox>, StoreError> {
    sqlx::query!("select id from sandboxes where id = $1 and team_id = $2 for update", id.as_str(), team.0)
        .fetch_optional(&mut **tx)
        .await?;
    let row = sandboxes!("where s.id = $2 and s.team_id = $3", id.as_str(), team.0).fetch_optional(&mut **tx).await?;
    row.map(Sandbox::try_from).transpose()
}

pub(crate) fn mib(value: u32) -> i32 {
    i32::try_from(value).expect("a shape's sizes are below 2^21")
}
