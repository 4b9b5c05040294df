//! Snapshots: saved states of sandboxes that other sandboxes begin with. They lie on one host each.
//!
//! ```text
//!  making -> ready -> removing -> (no row)        with a name: until it is deleted, or, of the platform's, another takes its name
//!                                                 without one, of a fork: until all its sandboxes have begun, or failed to
//! ```

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use model::ids::{HostId, OperationId, SandboxId, SnapshotId, TeamId};
use model::sandbox::Status;
use model::shape::{Shape, TemplateName};
use uuid::Uuid;

use crate::audit::{self, Actor};
use crate::builds::Taking;
use crate::events;
use crate::idempotency::{self, Claim};
use crate::idleness;
use crate::operations::{self, Kind, Lease, Operation};
use crate::placement::{self, Asked, Wanted};
use crate::policy::PolicyChange;
use crate::quotas::{self, Exceeded, Refused};
use crate::sandboxes::{Birth, Placed, Sandbox, insert, locked};
use crate::{BATCH_MAX, HOST_SILENCE_MAX, Store, StoreError, Tx, Update, builds, teams, wishes};

/// Of one answer of the list.
const LIST_MAX: i64 = 10_000;

#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    pub id: SnapshotId,
    pub team: TeamId,
    /// None: a fork's.
    pub name: Option<String>,
    /// What it is of.
    pub sandbox: SandboxId,
    pub host: Placed,
    pub template: String,
    pub shape: Shape,
    pub default_user: String,
    /// What begins with it has them.
    pub envs: BTreeMap<String, String>,
    pub is_ready: bool,
    /// Of the platform, for all teams to begin with.
    pub is_published: bool,
    pub size_bytes: i64,
    pub created_at: DateTime<Utc>,
}

/// A snapshot that is to have a name.
pub struct NewSnapshot<'a> {
    pub team: TeamId,
    pub of: &'a SandboxId,
    pub name: &'a TemplateName,
    /// A template of the platform: one that has its name gives way when it is there, and what it is of ends then.
    pub is_published: bool,
    /// It is what comes of a build.
    pub built: Option<Built<'a>>,
}

/// What a build gives to its template, beside what is in the sandbox.
#[derive(Debug, Clone, Copy)]
pub struct Built<'a> {
    pub taking: Taking,
    pub user: &'a str,
    pub envs: &'a BTreeMap<String, String>,
}

/// What becomes of the wish for a snapshot with a name.
pub enum SnapshotWish {
    /// The operation, leased to the caller.
    Opened(SnapshotId, Operation),
    /// What the first call under this key made, and its operation.
    Repeated(SnapshotId, OperationId),
    OtherArguments,
    /// Another one of this sandbox is being made.
    UnderWay,
    Wrong(Status),
    /// The platform has a template of that name.
    NameReserved,
    NameTaken,
    Missing,
}

/// One sandbox of a fork. What is none is as the source has it.
pub struct Child {
    pub id: SandboxId,
    pub envs: BTreeMap<String, String>,
    pub metadata: BTreeMap<String, String>,
    pub policy: PolicyChange,
}

pub enum ForkWish {
    /// The operation of each child, leased to the caller.
    Opened(Vec<Operation>),
    /// What the first call under this key made, and the operations.
    Repeated(Vec<(SandboxId, OperationId)>),
    OtherArguments,
    Wrong(Status),
    /// The source's host has no room for all of them, or takes no new ones; nothing was written.
    NoRoom,
    /// The team has as much as it may have; nothing was written.
    OverQuota(Exceeded),
    Missing,
}

struct Row {
    id: Uuid,
    team_id: Uuid,
    is_published: bool,
    name: Option<String>,
    becomes: Option<String>,
    envs: serde_json::Value,
    sandbox_id: String,
    host_id: Uuid,
    host_epoch: i64,
    host_address: Option<String>,
    host_silent: Option<bool>,
    host_team: Option<Uuid>,
    template: String,
    vcpus: i32,
    memory_mib: i32,
    disk_mib: i32,
    default_user: String,
    state: String,
    size_bytes: i64,
    created_at: DateTime<Utc>,
}

impl TryFrom<Row> for Snapshot {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let damaged = |column| StoreError::Damaged { row: row.id.to_string(), column };
        Ok(Self {
            id: SnapshotId(row.id),
            team: TeamId(row.team_id),
            sandbox: row.sandbox_id.parse().map_err(|_| damaged("sandbox_id"))?,
            host: Placed {
                host: HostId(row.host_id),
                epoch: u64::try_from(row.host_epoch).map_err(|_| damaged("host_epoch"))?,
                address: row.host_address.unwrap_or_default(),
                is_silent: row.host_silent.unwrap_or(true),
                owner: row.host_team.map(TeamId),
            },
            shape: Shape::new(row.vcpus.into(), row.memory_mib.into(), row.disk_mib.into())
                .map_err(|_| damaged("shape"))?,
            name: row.becomes.or(row.name),
            template: row.template,
            default_user: row.default_user,
            envs: serde_json::from_value(row.envs)
                .map_err(|_| StoreError::Damaged { row: row.id.to_string(), column: "envs" })?,
            is_published: row.is_published,
            is_ready: row.state == "ready",
            size_bytes: row.size_bytes,
            created_at: row.created_at,
        })
    }
}

/// `select` of a snapshot with its host; `$1` is [`HOST_SILENCE_MAX`] in seconds.
macro_rules! snapshots {
    ($rest:literal $(, $argument:expr)*) => {
        sqlx::query_as!(
            Row,
            r#"select s.id, s.team_id, s.name, s.sandbox_id, s.host_id, h.epoch as host_epoch, case when h.state <> 'fenced' then h.address else '' end as host_address,
                   (h.state = 'fenced' or h.last_heartbeat_at < now() - make_interval(secs => $1)) as host_silent, h.team_id as host_team, s.template, s.vcpus, s.memory_mib,
                   s.disk_mib, s.default_user, s.state, s.size_bytes, s.created_at, s.becomes, s.envs, s.is_published
               from snapshots s join hosts h on h.id = s.host_id "# + $rest,
            HOST_SILENCE_MAX.as_secs_f64()
            $(, $argument)*
        )
    };
}

impl Store {
    /// The wish for a snapshot of a sandbox that runs or is paused, under a name that its team has not given yet; one that is published may
    /// take the name of another.
    pub async fn wish_snapshot(
        &self,
        new: &NewSnapshot<'_>,
        lease: &Lease,
        key: Option<&idempotency::Key>,
        actor: &Actor,
    ) -> Result<SnapshotWish, StoreError> {
        let NewSnapshot { team, of, name, is_published, built } = *new;
        let mut tx = self.begin().await?;
        let id = Uuid::now_v7();
        if let Some(key) = key {
            match idempotency::claim(&mut tx, key, &id.to_string()).await? {
                Claim::New => {}
                Claim::OtherArguments => return Ok(SnapshotWish::OtherArguments),
                Claim::Repeated(subject) => {
                    let id = subject_of(key, &subject)?;
                    return Ok(SnapshotWish::Repeated(SnapshotId(id), operation_of(&mut tx, id).await?));
                }
            }
        }
        if !teams::stays(&mut tx, team).await? {
            return Ok(SnapshotWish::Missing);
        }
        let Some(sandbox) = locked(&mut tx, team, of).await? else { return Ok(SnapshotWish::Missing) };
        let placed = match (sandbox.status(), &sandbox.host) {
            (Status::Running | Status::Paused, Some(placed)) => placed.host,
            (other, _) => return Ok(SnapshotWish::Wrong(other)),
        };
        lock_name(&mut tx, team, name).await?;
        let standing = sqlx::query!(
            r#"select exists (select 1 from hosts where $1 = any(templates) and (team_id is null or team_id = $3))
                   or exists (select 1 from snapshots where is_published and team_id <> $3 and name = $1 and state = 'ready') as "reserved!",
                   exists (select 1 from snapshots where team_id = $3 and state <> 'removing'
                       and (name = $1 and not is_published or becomes = $1 and not $4)) as "taken!",
                   exists (select 1 from operations where sandbox_id = $2 and kind = 'snapshot' and phase = 'open') as "under_way!""#,
            name.as_str(),
            of.as_str(),
            team.0,
            is_published
        )
        .fetch_one(&mut *tx)
        .await?;
        if standing.reserved {
            return Ok(SnapshotWish::NameReserved);
        }
        if standing.under_way {
            return Ok(SnapshotWish::UnderWay);
        }
        // What is published takes no name from what is not, nor the other way round.
        if standing.taken {
            return Ok(SnapshotWish::NameTaken);
        }
        let named = if is_published { format!("{name}#{id}") } else { name.to_string() };
        if !new_snapshot(&mut tx, id, &sandbox, placed, Some(&named)).await? {
            return Ok(SnapshotWish::NameTaken);
        }
        if is_published {
            sqlx::query!("update snapshots set is_published = true, becomes = $2 where id = $1", id, name.as_str())
                .execute(&mut *tx)
                .await?;
        }
        if let Some(Built { taking, user, envs }) = built {
            let envs = serde_json::json!(envs);
            if !builds::becomes(&mut tx, taking, id, user, &envs).await? {
                return Ok(SnapshotWish::Missing);
            }
            sqlx::query!("update snapshots set envs = $2, default_user = $3 where id = $1", id, envs, user)
                .execute(&mut *tx)
                .await?;
        }
        let (revision, cause) = (sandbox.revision, actor.into());
        let operation = operations::open(&mut tx, of, Kind::Snapshot, revision, Some(lease), Some(id), cause).await?;
        idleness::used(&mut tx, of).await?;
        let facts = if is_published {
            serde_json::json!({"name": name.as_str(), "published": true})
        } else {
            serde_json::json!({"name": name.as_str()})
        };
        audit::record(&mut tx, actor, "sandbox.snapshot", of.as_str(), facts).await?;
        tx.commit().await?;
        Ok(SnapshotWish::Opened(SnapshotId(id), operation))
    }

    /// The wish for sandboxes that begin with what another one is now, on its host: all of them or none.
    pub async fn wish_forked(
        &self,
        team: TeamId,
        of: &SandboxId,
        children: &[Child],
        lease: &Lease,
        key: Option<&idempotency::Key>,
        actor: &Actor,
    ) -> Result<ForkWish, StoreError> {
        let mut tx = self.begin().await?;
        let id = Uuid::now_v7();
        if let Some(key) = key {
            match idempotency::claim(&mut tx, key, &id.to_string()).await? {
                Claim::New => {}
                Claim::OtherArguments => return Ok(ForkWish::OtherArguments),
                Claim::Repeated(subject) => return forked(&mut tx, subject_of(key, &subject)?).await,
            }
        }
        if !teams::stays(&mut tx, team).await? {
            return Ok(ForkWish::Missing);
        }
        let Some(sandbox) = locked(&mut tx, team, of).await? else { return Ok(ForkWish::Missing) };
        let placed = match (sandbox.status(), &sandbox.host) {
            (Status::Running | Status::Paused, Some(placed)) => placed.host,
            (other, _) => return Ok(ForkWish::Wrong(other)),
        };
        let count = i64::try_from(children.len()).unwrap_or(i64::MAX);
        let asked = quotas::of_new(sandbox.shape, count);
        match quotas::claim(&mut tx, &self.rules.quotas, team, &asked).await? {
            None => {}
            Some(Refused::Over(exceeded)) => return Ok(ForkWish::OverQuota(exceeded)),
            Some(Refused::NoTeam) => return Ok(ForkWish::Missing),
        }
        // Its host was what its own create asked for; tags that it has lost since keep nothing from beginning beside it.
        let anything = Asked::default();
        let wanted =
            Wanted { team, template: &sandbox.template, shape: sandbox.shape, count, asked: &anything, refused: &[] };
        let reserved = placement::reserve_on(&mut tx, placed, &self.rules.placement, &wanted).await?;
        let Ok(epoch) = reserved else { return Ok(ForkWish::NoRoom) };
        new_snapshot(&mut tx, id, &sandbox, placed, None).await?;
        idleness::used(&mut tx, of).await?;
        let mut opened = Vec::with_capacity(children.len());
        for child in children {
            let envs: BTreeMap<_, _> = sandbox.envs.iter().chain(&child.envs).collect();
            let metadata: BTreeMap<_, _> = sandbox.metadata.iter().chain(&child.metadata).collect();
            let birth = Birth {
                id: &child.id,
                team,
                template: &sandbox.template,
                shape: sandbox.shape,
                envs: serde_json::json!(envs),
                metadata: serde_json::json!(metadata),
                default_user: &sandbox.default_user,
                policy: sandbox.policy.with(&child.policy),
                asked: &sandbox.asked,
                host: placed,
                epoch,
                snapshot: Some(SnapshotId(id)),
            };
            insert(&mut tx, &birth).await?;
            opened.push(operations::open(&mut tx, &child.id, Kind::Run, 1, Some(lease), None, actor.into()).await?);
            let facts = serde_json::json!({"of": of.as_str()});
            audit::record(&mut tx, actor, "sandbox.fork", child.id.as_str(), facts).await?;
            let told = events::New {
                team,
                kind: "sandbox.forked",
                outcome: None,
                resource_type: "capsule",
                resource_id: child.id.as_str(),
                actor: Some(actor),
                metadata: serde_json::json!({ "sandbox_id": of.as_str() }),
            };
            events::record(&mut tx, &told).await?;
        }
        tx.commit().await?;
        Ok(ForkWish::Opened(opened))
    }

    pub async fn snapshot(&self, id: SnapshotId) -> Result<Option<Snapshot>, StoreError> {
        let row = snapshots!("where s.id = $2", id.0).fetch_optional(&self.pool).await?;
        row.map(Snapshot::try_from).transpose()
    }

    /// That a team's sandboxes can begin with: its own, and else the platform's, unless the team has hosts of its own.
    pub async fn snapshot_named(&self, team: TeamId, name: &TemplateName) -> Result<Option<Snapshot>, StoreError> {
        let row = snapshots!(
            "where s.id = coalesce(
                 (select id from snapshots where team_id = $2 and name = $3 and state = 'ready'),
                 (select id from snapshots where name = $3 and is_published and state = 'ready'
                     and not exists (select 1 from teams where id = $2 and is_byoc)))",
            team.0,
            name.as_str()
        )
        .fetch_optional(&self.pool)
        .await?;
        row.map(Snapshot::try_from).transpose()
    }

    /// That a team's sandboxes can begin with: its own and the platform's, newest first.
    pub async fn snapshots(&self, team: TeamId) -> Result<Vec<Snapshot>, StoreError> {
        let rows = snapshots!(
            "where s.name is not null and s.state = 'ready' and s.id in
                 (select id from snapshots where team_id = $2
                  union select id from snapshots where is_published and state = 'ready'
                      and not exists (select 1 from teams where id = $2 and is_byoc))
             order by s.created_at desc, s.id limit $3",
            team.0,
            LIST_MAX
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(Snapshot::try_from).collect()
    }

    /// Of all teams, newest first.
    pub async fn snapshots_of_all(&self) -> Result<Vec<Snapshot>, StoreError> {
        let rows = snapshots!(
            "where s.name is not null and s.state = 'ready' and not exists (select 1 from teams where id = s.team_id and deleted_at is not null)
             order by s.created_at desc, s.id limit $2",
            LIST_MAX
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(Snapshot::try_from).collect()
    }

    /// The host has it, whole. One that is published takes its place in the same transaction.
    pub async fn snapshot_is_ready(&self, id: SnapshotId, size_bytes: i64) -> Result<Update, StoreError> {
        let mut tx = self.begin().await?;
        builds::lock_of_snapshot(&mut tx, id.0).await?;
        let updated = sqlx::query!(
            "update snapshots set state = 'ready', size_bytes = $2, updated_at = now() where id = $1 and state = 'making'",
            id.0,
            size_bytes
        )
        .execute(&mut *tx)
        .await?;
        if updated.rows_affected() == 0 {
            return Ok(Update::Stale);
        }
        let is_in_place = take_place(&mut tx, id.0).await?;
        tx.commit().await?;
        Ok(if is_in_place { Update::Changed } else { Update::Stale })
    }

    /// The same for those that were made ready by a program that knows nothing of it, while this one came in its place.
    pub async fn let_ready_snapshots_take_their_place(&self) -> Result<(), StoreError> {
        let ready = sqlx::query_scalar!(
            "select id from snapshots where becomes is not null and state = 'ready' limit $1",
            BATCH_MAX
        )
        .fetch_all(&self.pool)
        .await?;
        for id in ready {
            let mut tx = self.begin().await?;
            builds::lock_of_snapshot(&mut tx, id).await?;
            take_place(&mut tx, id).await?;
            tx.commit().await?;
        }
        Ok(())
    }

    /// The snapshot that an operation was to make will not be made. Its name is free again.
    pub async fn fail_snapshot(&self, operation: &Operation, code: &str, message: &str) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        let id = operation.snapshot.map(|id| id.0).unwrap_or_default();
        builds::lock_of_snapshot(&mut tx, id).await?;
        let failed = sqlx::query!(
            "update snapshots set state = 'removing', updated_at = now() where id = $1 and state = 'making'",
            id
        )
        .execute(&mut *tx)
        .await?;
        if failed.rows_affected() > 0 {
            builds::end_of_snapshot(&mut tx, id, Some(message)).await?;
        }
        let ended = operations::end(&mut tx, operation.id, Some((code, message)), &[]).await?;
        tx.commit().await?;
        operations::count(ended);
        Ok(())
    }

    /// From now on nothing begins with it, which is published, or its team's alone. False: there is none.
    pub async fn delete_snapshot(
        &self,
        team: TeamId,
        name: &TemplateName,
        is_published: bool,
        actor: &Actor,
    ) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        let removed = sqlx::query!(
            "update snapshots set state = 'removing', updated_at = now() where team_id = $1 and name = $2 and state = 'ready'
                 and is_published = $3",
            team.0,
            name.as_str(),
            is_published
        )
        .execute(&mut *tx)
        .await?;
        if removed.rows_affected() == 0 {
            return Ok(false);
        }
        audit::record(&mut tx, actor, "snapshot.delete", name.as_str(), serde_json::json!({})).await?;
        let told = events::New {
            team,
            kind: "template.snapshot.delete",
            outcome: Some("success"),
            resource_type: "template",
            resource_id: name.as_str(),
            actor: Some(actor),
            metadata: serde_json::json!({}),
        };
        events::record(&mut tx, &told).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// What no sandbox will begin with any more, for its host to be told so; of hosts that were heard of lately. Those that were tried last
    /// come last.
    pub async fn unwanted_snapshots(&self) -> Result<Vec<Snapshot>, StoreError> {
        let rows = snapshots!(
            "where (s.name is null or s.state = 'removing' or s.state = 'making'
                     and not exists (select 1 from operations o where o.snapshot_id = s.id and o.phase = 'open'))
                 and not exists (select 1 from sandboxes b where b.snapshot_id = s.id and b.observed = 'starting' and b.desired <> 'killed')
                 and h.last_heartbeat_at > now() - make_interval(secs => $1)
             order by s.updated_at limit $2",
            BATCH_MAX
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(Snapshot::try_from).collect()
    }

    /// The host could not be told.
    pub async fn put_off_removal(&self, id: SnapshotId) -> Result<(), StoreError> {
        sqlx::query!("update snapshots set updated_at = now() where id = $1", id.0).execute(&self.pool).await?;
        Ok(())
    }

    /// The host no longer has it.
    pub async fn forget_snapshot(&self, id: SnapshotId) -> Result<(), StoreError> {
        sqlx::query!("delete from snapshots where id = $1", id.0).execute(&self.pool).await?;
        Ok(())
    }
}

/// Until the transaction ends: two that want one name look at it one after the other. An index cannot say it, because a template that is
/// being made has another name until it is there.
pub(crate) async fn lock_name(tx: &mut Tx, team: TeamId, name: &TemplateName) -> Result<(), StoreError> {
    sqlx::query!("select pg_advisory_xact_lock(hashtextextended($1, 0))", format!("snapshot {team} {name}"))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// One that is published and ready takes its name from whoever had it; the build of which it is the outcome has succeeded, and what it is of
/// ends, which was there for it alone. Of others nothing changes, nor twice. False: a program that knows nothing of this has given the name to
/// one that is not published, which keeps it, and this one goes.
async fn take_place(tx: &mut Tx, id: Uuid) -> Result<bool, StoreError> {
    let template = sqlx::query!(
        "select team_id, sandbox_id, becomes from snapshots where id = $1 and becomes is not null and state = 'ready' for update",
        id
    )
    .fetch_optional(&mut **tx)
    .await?;
    let Some(template) = template else { return Ok(true) };
    let is_taken = sqlx::query_scalar!(
        r#"select exists (select 1 from snapshots
               where team_id = $1 and name = $2 and not is_published and state <> 'removing') as "taken!""#,
        template.team_id,
        template.becomes
    )
    .fetch_one(&mut **tx)
    .await?;
    if is_taken {
        sqlx::query!("update snapshots set state = 'removing', updated_at = now() where id = $1", id)
            .execute(&mut **tx)
            .await?;
        builds::end_of_snapshot(tx, id, Some("its name is that of a snapshot that is not published")).await?;
        return Ok(false);
    }
    sqlx::query!(
        "update snapshots set state = 'removing', updated_at = now()
         where team_id = $1 and name = $2 and is_published and state <> 'removing'",
        template.team_id,
        template.becomes
    )
    .execute(&mut **tx)
    .await?;
    sqlx::query!("update snapshots set name = becomes, becomes = null, updated_at = now() where id = $1", id)
        .execute(&mut **tx)
        .await?;
    builds::end_of_snapshot(tx, id, None).await?;
    wishes::end_of_source(tx, &template.sandbox_id).await?;
    Ok(true)
}

/// False: its team has one of that name.
async fn new_snapshot(
    tx: &mut Tx,
    id: Uuid,
    of: &Sandbox,
    host: HostId,
    name: Option<&str>,
) -> Result<bool, StoreError> {
    let made = sqlx::query!(
        "insert into snapshots (id, team_id, name, sandbox_id, host_id, template, vcpus, memory_mib, disk_mib, default_user)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
         on conflict (team_id, name) where name is not null and state <> 'removing' do nothing",
        id,
        of.team.0,
        name,
        of.id.as_str(),
        host.0,
        of.template,
        i32::from(of.shape.vcpus()),
        crate::sandboxes::mib(of.shape.memory().0),
        crate::sandboxes::mib(of.shape.disk().0),
        of.default_user,
    )
    .execute(&mut **tx)
    .await?;
    Ok(made.rows_affected() == 1)
}

/// What a fork made before.
async fn forked(tx: &mut Tx, snapshot: Uuid) -> Result<ForkWish, StoreError> {
    let ids = sqlx::query_scalar!("select id from sandboxes where snapshot_id = $1 order by id", snapshot)
        .fetch_all(&mut **tx)
        .await?;
    let mut children = Vec::with_capacity(ids.len());
    for text in ids {
        let id: SandboxId = text.parse().map_err(|_| StoreError::Damaged { row: text.clone(), column: "id" })?;
        let operation = operations::latest(tx, &id, Kind::Run).await?;
        children.push((id, operation));
    }
    Ok(ForkWish::Repeated(children))
}

async fn operation_of(tx: &mut Tx, snapshot: Uuid) -> Result<OperationId, StoreError> {
    let id = sqlx::query_scalar!("select id from operations where snapshot_id = $1", snapshot)
        .fetch_optional(&mut **tx)
        .await?;
    // One that was purged has ended: nobody waits for an id that is not there.
    Ok(OperationId(id.unwrap_or_default()))
}

fn subject_of(key: &idempotency::Key, subject: &str) -> Result<Uuid, StoreError> {
    subject.parse().map_err(|_| StoreError::Damaged { row: key.key.clone(), column: "subject" })
}
