//! Hosts: their records, what their agents last said of them, and their removal.

use chrono::{DateTime, Utc};
use model::ids::{HostId, SandboxId, TeamId};
use model::sandbox::Status;
use uuid::Uuid;

use crate::audit::{self, Actor};
use crate::idempotency::{self, Claim};
use crate::{Store, StoreError, Tx, registration_tokens, teams};

/// More hosts in one answer than any fleet of today has.
const LIST_MAX: i64 = 5000;
/// Of one team: they are rows that it makes by itself.
pub const OF_TEAM_MAX: i64 = 256;
/// Ids of one answer and of one log line.
pub const NAMED_MAX: i64 = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostState {
    /// Not registered yet.
    Pending,
    Online,
    /// Silent for more than [`HOST_SILENCE_MAX`]. Says nothing about its sandboxes.
    Unreachable,
    Draining,
    /// Two machines speak as it, and neither is believed.
    Fenced,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Host {
    pub id: HostId,
    /// Whose it is; none: the platform's.
    pub owner: Option<Owner>,
    pub provider: Option<String>,
    pub availability_zone: Option<String>,
    pub state: HostState,
    pub epoch: u64,
    pub address: Option<String>,
    pub facts: Option<Facts>,
    pub last_heartbeat_at: Option<DateTime<Utc>>,
    /// When a copy of an old state of its disk was last heard and refused.
    pub copy_heard_at: Option<DateTime<Utc>>,
    pub unclaimed: Vec<String>,
    /// Words and pairs that creates can ask for.
    pub tags: Vec<String>,
    /// It takes nothing new, whether or not it is heard of.
    pub is_draining: bool,
    pub held: Held,
    pub created_by: String,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

/// The team that a host is of, and that it takes sandboxes of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    pub team: TeamId,
    pub name: String,
}

/// Which hosts somebody sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sees {
    All,
    /// The platform's own.
    Platform,
    Of(TeamId),
}

/// What is on a host, and what of it is reserved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// Neither paused nor ended.
    pub running: i64,
    pub paused: i64,
    /// That have failed, and of which something may be left there.
    pub failed: i64,
    /// With a name.
    pub snapshots: i64,
    pub vcpus: i64,
    pub memory_mib: i64,
    /// Of its pool, as it was last heard.
    pub disk_free_mib: Option<i64>,
}

/// What an agent says of its machine.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Facts {
    pub arch: String,
    pub cpu_cores: i64,
    pub memory_mb: i64,
    pub disk_gb: i64,
    pub isolation: String,
    pub agent_version: String,
    pub templates: Vec<String>,
}

/// One heartbeat, without its list of sandboxes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Beat {
    pub agent_run: String,
    pub sequence: i64,
    /// The number of the ticket that it shows, 0 before the first; none: an agent that keeps none.
    pub ticket: Option<i64>,
    /// Of what runs and is paused on it, in the place of a list.
    pub digest: Option<String>,
    pub facts: Facts,
    pub memory_free_mb: i64,
    pub disk_free_mb: i64,
}

pub struct NewHost {
    pub id: HostId,
    /// Whose it is to be; none: the platform's.
    pub team: Option<TeamId>,
    pub provider: Option<String>,
    pub availability_zone: Option<String>,
    pub tags: Vec<String>,
    pub created_by: String,
    pub token_hash: [u8; 32],
}

pub enum Created {
    Made(Host),
    Repeated(Host),
    OtherArguments,
    /// What the first call made is gone.
    Gone,
    /// The team may have no hosts of its own.
    NotByoc,
    /// There is no such team.
    NoTeam,
    /// The team has [`OF_TEAM_MAX`].
    TooMany,
}

pub enum Deleted {
    Done,
    Missing,
    /// What would be lost.
    Holds(Losses),
}

/// What is on a host and would be lost with it: sandboxes that are not known to have ended, and snapshots by their names; of each the
/// oldest [`NAMED_MAX`].
#[derive(Debug, Clone, PartialEq)]
pub struct Losses {
    pub sandboxes: Vec<(SandboxId, Status)>,
    pub snapshots: Vec<String>,
}

/// What came of a change of a host.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    Done(Box<Host>),
    Missing,
    /// It has not registered, has as many tags as it may have, or may be a copy; nothing was written.
    Refused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drain {
    Begin,
    End,
}

pub(crate) struct Row {
    pub(crate) id: Uuid,
    pub(crate) team_id: Option<Uuid>,
    pub(crate) team_name: Option<String>,
    pub(crate) provider: Option<String>,
    pub(crate) availability_zone: Option<String>,
    pub(crate) state: String,
    pub(crate) silent: bool,
    pub(crate) epoch: i64,
    pub(crate) address: Option<String>,
    pub(crate) arch: Option<String>,
    pub(crate) cpu_cores: Option<i64>,
    pub(crate) memory_mb: Option<i64>,
    pub(crate) disk_gb: Option<i64>,
    pub(crate) isolation: Option<String>,
    pub(crate) agent_version: Option<String>,
    pub(crate) templates: Vec<String>,
    pub(crate) last_heartbeat_at: Option<DateTime<Utc>>,
    pub(crate) copy_heard_at: Option<DateTime<Utc>>,
    pub(crate) was_draining: bool,
    pub(crate) unclaimed: Vec<String>,
    pub(crate) tags: Vec<String>,
    pub(crate) running: i64,
    pub(crate) paused: i64,
    pub(crate) failed: i64,
    pub(crate) snapshots: i64,
    pub(crate) reserved_vcpus: i64,
    pub(crate) reserved_memory_mib: i64,
    pub(crate) disk_free_mb: Option<i64>,
    pub(crate) created_by: String,
    pub(crate) created_at: DateTime<Utc>,
    pub(crate) updated_at: DateTime<Utc>,
}

impl From<Row> for Host {
    fn from(row: Row) -> Self {
        let state = match row.state.as_str() {
            "pending" => HostState::Pending,
            "fenced" => HostState::Fenced,
            _ if row.silent => HostState::Unreachable,
            "draining" => HostState::Draining,
            _ => HostState::Online,
        };
        let facts = row.arch.map(|arch| Facts {
            arch,
            cpu_cores: row.cpu_cores.unwrap_or_default(),
            memory_mb: row.memory_mb.unwrap_or_default(),
            disk_gb: row.disk_gb.unwrap_or_default(),
            isolation: row.isolation.unwrap_or_default(),
            agent_version: row.agent_version.unwrap_or_default(),
            templates: row.templates,
        });
        Self {
            id: HostId(row.id),
            owner: row.team_id.zip(row.team_name).map(|(team, name)| Owner { team: TeamId(team), name }),
            provider: row.provider,
            availability_zone: row.availability_zone,
            state,
            epoch: u64::try_from(row.epoch).unwrap_or_default(),
            address: row.address,
            facts,
            last_heartbeat_at: row.last_heartbeat_at,
            copy_heard_at: row.copy_heard_at,
            unclaimed: row.unclaimed,
            tags: row.tags,
            is_draining: row.state == "draining" || row.state == "fenced" && row.was_draining,
            held: Held {
                running: row.running,
                paused: row.paused,
                failed: row.failed,
                snapshots: row.snapshots,
                vcpus: row.reserved_vcpus,
                memory_mib: row.reserved_memory_mib,
                disk_free_mib: row.disk_free_mb,
            },
            created_by: row.created_by,
            created_at: row.created_at,
            updated_at: row.updated_at,
        }
    }
}

/// `select` of a host; `$1` is [`HOST_SILENCE_MAX`] in seconds, and what follows comes after `from hosts`.
macro_rules! hosts {
    ($rest:literal $(, $argument:expr)*) => {
        sqlx::query_as!(
            crate::hosts::Row,
            r#"select id, team_id, (select t.name from teams t where t.id = hosts.team_id) as team_name, provider, availability_zone, state,
                   coalesce(last_heartbeat_at < now() - make_interval(secs => $1), true) as "silent!",
                   epoch, address, arch, cpu_cores, memory_mb, disk_gb, isolation, agent_version, templates, last_heartbeat_at, copy_heard_at, was_draining,
                   unclaimed, tags, disk_free_mb, created_by, created_at, updated_at, held.running as "running!", held.paused as "paused!",
                   held.failed as "failed!", held.reserved_vcpus as "reserved_vcpus!", held.reserved_memory_mib as "reserved_memory_mib!",
                   (select count(*) from snapshots k where k.host_id = hosts.id and k.name is not null and k.state = 'ready') as "snapshots!"
               from hosts cross join lateral (
                   select count(*) filter (where s.observed not in ('paused', 'failed', 'lost')) as running,
                       count(*) filter (where s.observed = 'paused') as paused,
                       count(*) filter (where s.observed in ('failed', 'lost')) as failed,
                       coalesce(sum(s.vcpus) filter (where s.observed not in ('paused', 'failed', 'lost')), 0)::bigint as reserved_vcpus,
                       coalesce(sum(s.memory_mib) filter (where s.observed not in ('paused', 'failed', 'lost')), 0)::bigint
                           as reserved_memory_mib
                   from sandboxes s where s.host_id = hosts.id and s.observed <> 'killed') held "# + $rest,
            crate::HOST_SILENCE_MAX.as_secs_f64()
            $(, $argument)*
        )
    };
}
pub(crate) use hosts;

impl Store {
    /// A host record and its first registration token.
    pub async fn create_host(
        &self,
        new: &NewHost,
        key: Option<&idempotency::Key>,
        actor: &Actor,
    ) -> Result<Created, StoreError> {
        let mut tx = self.begin().await?;
        if let Some(key) = key {
            match idempotency::claim(&mut tx, key, &new.id.to_string()).await? {
                Claim::New => {}
                Claim::OtherArguments => return Ok(Created::OtherArguments),
                Claim::Repeated(subject) => {
                    let id: HostId =
                        subject.parse().map_err(|_| StoreError::Damaged { row: key.key.clone(), column: "subject" })?;
                    let first = hosts!("where id = $2", id.0).fetch_optional(&mut *tx).await?;
                    return Ok(first.map_or(Created::Gone, |row| Created::Repeated(row.into())));
                }
            }
        }
        if let Some(team) = new.team {
            match teams::may_have_hosts(&mut tx, team).await? {
                Some(true) => {}
                Some(false) => return Ok(Created::NotByoc),
                None => return Ok(Created::NoTeam),
            }
            let count = sqlx::query_scalar!(r#"select count(*) as "count!" from hosts where team_id = $1"#, team.0)
                .fetch_one(&mut *tx)
                .await?;
            if count >= OF_TEAM_MAX {
                return Ok(Created::TooMany);
            }
        }
        sqlx::query!(
            "insert into hosts (id, kind, team_id, provider, availability_zone, created_by, tags) values ($1, $2, $3, $4, $5, $6, $7)",
            new.id.0,
            if new.team.is_some() { "byoc" } else { "regular" },
            new.team.map(|team| team.0),
            new.provider,
            new.availability_zone,
            new.created_by,
            &new.tags
        )
        .execute(&mut *tx)
        .await?;
        registration_tokens::insert(&mut tx, new.id, &new.token_hash).await?;
        audit::record(&mut tx, actor, "host.create", &new.id.to_string(), serde_json::json!({})).await?;
        let row = hosts!("where id = $2", new.id.0).fetch_one(&mut *tx).await?;
        tx.commit().await?;
        Ok(Created::Made(row.into()))
    }

    pub async fn hosts(&self, sees: Sees) -> Result<Vec<Host>, StoreError> {
        let rows = match sees {
            Sees::All => hosts!("order by created_at, id limit $2", LIST_MAX).fetch_all(&self.pool).await?,
            Sees::Platform => {
                hosts!("where team_id is null order by created_at, id limit $2", LIST_MAX).fetch_all(&self.pool).await?
            }
            Sees::Of(team) => {
                hosts!("where team_id = $2 order by created_at, id limit $3", team.0, LIST_MAX)
                    .fetch_all(&self.pool)
                    .await?
            }
        };
        Ok(rows.into_iter().map(Host::from).collect())
    }

    /// Whose host it is, if there is such a one; of the platform's own the inner one is none.
    pub async fn team_of_host(&self, id: HostId) -> Result<Option<Option<TeamId>>, StoreError> {
        let team =
            sqlx::query_scalar!("select team_id from hosts where id = $1", id.0).fetch_optional(&self.pool).await?;
        Ok(team.map(|team| team.map(TeamId)))
    }

    pub async fn host(&self, id: HostId) -> Result<Option<Host>, StoreError> {
        Ok(hosts!("where id = $2", id.0).fetch_optional(&self.pool).await?.map(Host::from))
    }

    /// The record that was made for an address by the settings of a single machine.
    pub async fn host_created_by(&self, created_by: &str) -> Result<Option<Host>, StoreError> {
        Ok(hosts!("where created_by = $2 order by created_at limit 1", created_by)
            .fetch_optional(&self.pool)
            .await?
            .map(Host::from))
    }

    /// Removes the record, by which the host's credential opens nothing any more. With `force` its sandboxes count as killed and its
    /// snapshots as deleted; what of them is still there is for whoever removed the host to end there.
    pub async fn delete_host(&self, id: HostId, force: bool, actor: &Actor) -> Result<Deleted, StoreError> {
        let mut tx = self.begin().await?;
        if sqlx::query_scalar!("select id from hosts where id = $1 for update", id.0)
            .fetch_optional(&mut *tx)
            .await?
            .is_none()
        {
            return Ok(Deleted::Missing);
        }
        let losses = losses(&mut tx, id).await?;
        if !(force || losses.sandboxes.is_empty() && losses.snapshots.is_empty()) {
            return Ok(Deleted::Holds(losses));
        }
        remove(&mut tx, id, force, actor).await?;
        tx.commit().await?;
        Ok(Deleted::Done)
    }

    /// What would be lost with the host.
    pub async fn losses_of_host(&self, id: HostId) -> Result<Losses, StoreError> {
        let mut tx = self.begin().await?;
        losses(&mut tx, id).await
    }

    /// From now on it takes nothing new, or takes new ones again. What is on it stays, and goes on.
    pub async fn drain_host(&self, id: HostId, drain: Drain, actor: &Actor) -> Result<Change, StoreError> {
        let mut tx = self.begin().await?;
        let state = sqlx::query_scalar!("select state from hosts where id = $1 for no key update", id.0)
            .fetch_optional(&mut *tx)
            .await?;
        let (wished, action) = match drain {
            Drain::Begin => ("draining", "host.drain"),
            Drain::End => ("active", "host.undrain"),
        };
        match state.as_deref() {
            None => return Ok(Change::Missing),
            Some("pending" | "fenced") => return Ok(Change::Refused),
            Some(is) if is == wished => {}
            Some(_) => {
                sqlx::query!("update hosts set state = $2, updated_at = now() where id = $1", id.0, wished)
                    .execute(&mut *tx)
                    .await?;
                audit::record(&mut tx, actor, action, &id.to_string(), serde_json::json!({})).await?;
            }
        }
        let row = hosts!("where id = $2", id.0).fetch_one(&mut *tx).await?;
        tx.commit().await?;
        Ok(Change::Done(Box::new(row.into())))
    }

    /// Gives it a tag, if it has not got it and has fewer than `count_max`.
    pub async fn tag_host(&self, id: HostId, tag: &str, count_max: usize, actor: &Actor) -> Result<Change, StoreError> {
        let mut tx = self.begin().await?;
        let tags = sqlx::query_scalar!("select tags from hosts where id = $1 for no key update", id.0)
            .fetch_optional(&mut *tx)
            .await?;
        let Some(tags) = tags else { return Ok(Change::Missing) };
        if !tags.iter().any(|has| has == tag) {
            if tags.len() >= count_max {
                return Ok(Change::Refused);
            }
            sqlx::query!("update hosts set tags = array_append(tags, $2), updated_at = now() where id = $1", id.0, tag)
                .execute(&mut *tx)
                .await?;
            audit::record(&mut tx, actor, "host.tag", &id.to_string(), serde_json::json!({ "tag": tag })).await?;
        }
        let row = hosts!("where id = $2", id.0).fetch_one(&mut *tx).await?;
        tx.commit().await?;
        Ok(Change::Done(Box::new(row.into())))
    }

    /// Takes a tag from it. What is on it because of that tag stays.
    pub async fn untag_host(&self, id: HostId, tag: &str, actor: &Actor) -> Result<Change, StoreError> {
        let mut tx = self.begin().await?;
        let untagged = sqlx::query!(
            "update hosts set tags = array_remove(tags, $2), updated_at = now() where id = $1 and $2 = any(tags)",
            id.0,
            tag
        )
        .execute(&mut *tx)
        .await?;
        if untagged.rows_affected() == 1 {
            audit::record(&mut tx, actor, "host.untag", &id.to_string(), serde_json::json!({ "tag": tag })).await?;
        }
        let Some(row) = hosts!("where id = $2", id.0).fetch_optional(&mut *tx).await? else {
            return Ok(Change::Missing);
        };
        tx.commit().await?;
        Ok(Change::Done(Box::new(row.into())))
    }

    /// Whoever speaks next is the host, with whatever ticket: from then on those before are old. What it was fenced for is forgotten.
    pub async fn unfence_host(&self, id: HostId, actor: &Actor) -> Result<Change, StoreError> {
        let mut tx = self.begin().await?;
        let host = sqlx::query!(
            r#"select state = 'fenced' or copy_heard_at is not null
                   or exists (select 1 from past_agent_runs where host_id = $1 and is_copy) as "is_doubted!"
               from hosts where id = $1 for no key update"#,
            id.0
        )
        .fetch_optional(&mut *tx)
        .await?;
        let Some(host) = host else { return Ok(Change::Missing) };
        if host.is_doubted {
            sqlx::query!("delete from past_agent_runs where host_id = $1", id.0).execute(&mut *tx).await?;
            sqlx::query!(
                "update hosts set state = case when state <> 'fenced' then state when was_draining then 'draining' else 'active' end,
                     was_draining = false, agent_run = '', heartbeat_sequence = 0, ticket_shown = null, copy_heard_at = null,
                     updated_at = now()
                 where id = $1",
                id.0
            )
            .execute(&mut *tx)
            .await?;
            audit::record(&mut tx, actor, "host.unfence", &id.to_string(), serde_json::json!({})).await?;
        }
        let row = hosts!("where id = $2", id.0).fetch_one(&mut *tx).await?;
        tx.commit().await?;
        Ok(Change::Done(Box::new(row.into())))
    }

    /// Sandboxes that a host reports and that no row claims.
    pub async fn note_unclaimed(&self, id: HostId, sandboxes: &[String]) -> Result<(), StoreError> {
        sqlx::query!("update hosts set unclaimed = $2 where id = $1 and unclaimed <> $2", id.0, sandboxes)
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}

/// The host with what is on it. Its row must be locked.
async fn remove(tx: &mut Tx, id: HostId, force: bool, actor: &Actor) -> Result<(), StoreError> {
    sqlx::query!(
        "update operations set phase = 'superseded', finished_at = now()
         where phase = 'open' and sandbox_id in (select id from sandboxes where host_id = $1)",
        id.0
    )
    .execute(&mut **tx)
    .await?;
    sqlx::query!(
        "update sandboxes set desired = 'killed', observed = 'killed', revision = revision + 1, killed_at = now(), envs = '{}',
             reason = 'host_removed', updated_at = now()
         where host_id = $1 and observed <> 'killed'",
        id.0
    )
    .execute(&mut **tx)
    .await?;
    sqlx::query!("update sandboxes set host_id = null where host_id = $1", id.0).execute(&mut **tx).await?;
    sqlx::query!("delete from hosts where id = $1", id.0).execute(&mut **tx).await?;
    audit::record(tx, actor, "host.delete", &id.to_string(), serde_json::json!({ "force": force })).await
}

/// All hosts of a team that ends, with what is on them; how many there were. The team's row must be locked.
pub(crate) async fn end_of_team(tx: &mut Tx, team: TeamId, actor: &Actor) -> Result<usize, StoreError> {
    // In one order, so that two that lock many never wait for each other.
    let ids = sqlx::query_scalar!("select id from hosts where team_id = $1 order by id for update", team.0)
        .fetch_all(&mut **tx)
        .await?;
    for id in &ids {
        remove(tx, HostId(*id), true, actor).await?;
    }
    Ok(ids.len())
}

async fn losses(tx: &mut Tx, id: HostId) -> Result<Losses, StoreError> {
    let live = sqlx::query!(
        "select id, desired, observed from sandboxes where host_id = $1 and observed <> 'killed' order by created_at, id limit $2",
        id.0,
        NAMED_MAX
    )
    .fetch_all(&mut **tx)
    .await?;
    let snapshots = sqlx::query_scalar!(
        r#"select name as "name!" from snapshots where host_id = $1 and name is not null and state = 'ready'
           order by created_at, id limit $2"#,
        id.0,
        NAMED_MAX
    )
    .fetch_all(&mut **tx)
    .await?;
    let mut sandboxes = Vec::with_capacity(live.len());
    for row in live {
        let damaged = |column| StoreError::Damaged { row: row.id.clone(), column };
        let desired = row.desired.parse().map_err(|_| damaged("desired"))?;
        let observed = row.observed.parse().map_err(|_| damaged("observed"))?;
        sandboxes.push((row.id.parse().map_err(|_| damaged("id"))?, Status::of(desired, observed)));
    }
    Ok(Losses { sandboxes, snapshots })
}
