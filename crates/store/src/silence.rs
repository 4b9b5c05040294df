//! Hosts that nothing is heard of. Silence says nothing about sandboxes; when most hosts fall silent together it says something about us,
//! and then the brake is on: what would end, fail or remove anything by what hosts say or do not say waits.
//!
//! Only the platform's own hosts count for that: a team could have its own fall silent, and hold everybody else up. What a team is told of
//! its hosts is when one has gone and when it is back.

use chrono::{DateTime, Utc};
use model::ids::{HostId, TeamId};
use serde_json::json;
use uuid::Uuid;

use crate::audit::{self, Actor};
use crate::events;
use crate::{HOST_SILENCE_MAX, Store, StoreError, Tx};

/// Hosts that fall silent within this time do so together: two periods of their heartbeats.
const TOGETHER_SEC: f64 = 60.0;

/// When the brake comes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Brake {
    /// So many at least: of one or two hosts that fall silent nothing follows about the platform.
    pub hosts_min: i64,
}

impl Default for Brake {
    fn default() -> Self {
        Self { hosts_min: 3 }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Silence {
    /// Of the platform, that have ever been heard of.
    pub hosts: i64,
    /// Of them, those that were silent for longer than [`HOST_SILENCE_MAX`].
    pub silent: i64,
    pub brake_since: Option<DateTime<Utc>>,
}

/// What a look at the silence has changed, for the one replica that has changed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weighed {
    On(Silence),
    Off(Silence),
    /// It is as it was.
    Same(Silence),
}

/// Hosts of teams of which this look has told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Marked {
    pub back: Vec<HostId>,
    pub gone: Vec<HostId>,
}

/// Whether this replica has listened for long enough to tell the hosts' silence from its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listened {
    Enough,
    NotYet,
}

impl Store {
    /// Puts the brake on when more than half of the hosts, and not too few, have fallen silent together; off when no more than half are
    /// silent, however they became so.
    pub async fn weigh_silence(&self, listened: Listened) -> Result<Weighed, StoreError> {
        let mut tx = self.begin().await?;
        let counted = sqlx::query!(
            r#"select count(*) as "hosts!",
                   count(*) filter (where last_heartbeat_at < now() - make_interval(secs => $1)) as "silent!",
                   count(*) filter (where last_heartbeat_at < now() - make_interval(secs => $1)
                       and last_heartbeat_at >= now() - make_interval(secs => $1) - make_interval(secs => $2)) as "together!",
                   (select since from silence_brake) as since
               from hosts where state <> 'pending' and last_heartbeat_at is not null and team_id is null"#,
            HOST_SILENCE_MAX.as_secs_f64(),
            TOGETHER_SEC
        )
        .fetch_one(&mut *tx)
        .await?;
        let silence = Silence { hosts: counted.hosts, silent: counted.silent, brake_since: counted.since };
        let fell = counted.together * 2 > counted.hosts && counted.together >= self.rules.brake.hosts_min;
        let facts = json!({ "silent": silence.silent, "hosts": silence.hosts });
        let actor = Actor::platform("silent_hosts");
        if counted.since.is_none() && fell && listened == Listened::Enough {
            // Of replicas that see it at the same time one writes it.
            let since = sqlx::query_scalar!(
                "insert into silence_brake (silent, hosts) values ($1, $2) on conflict do nothing returning since",
                silence.silent,
                silence.hosts
            )
            .fetch_optional(&mut *tx)
            .await?;
            if since.is_some() {
                audit::record(&mut tx, &actor, "silence_brake.on", "hosts", facts).await?;
                tx.commit().await?;
                return Ok(Weighed::On(Silence { brake_since: since, ..silence }));
            }
        }
        if counted.since.is_some() && silence.silent * 2 <= silence.hosts {
            let removed = sqlx::query!("delete from silence_brake").execute(&mut *tx).await?;
            if removed.rows_affected() == 1 {
                audit::record(&mut tx, &actor, "silence_brake.off", "hosts", facts).await?;
                tx.commit().await?;
                return Ok(Weighed::Off(Silence { brake_since: None, ..silence }));
            }
        }
        Ok(Weighed::Same(silence))
    }

    /// How many hosts are silent, and since when the brake is on.
    pub async fn silence(&self) -> Result<Silence, StoreError> {
        let counted = sqlx::query!(
            r#"select count(*) as "hosts!",
                   count(*) filter (where last_heartbeat_at < now() - make_interval(secs => $1)) as "silent!",
                   (select since from silence_brake) as since
               from hosts where state <> 'pending' and last_heartbeat_at is not null and team_id is null"#,
            HOST_SILENCE_MAX.as_secs_f64()
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(Silence { hosts: counted.hosts, silent: counted.silent, brake_since: counted.since })
    }

    pub async fn is_braked(&self) -> Result<bool, StoreError> {
        Ok(sqlx::query_scalar!(r#"select exists (select 1 from silence_brake) as "on!""#).fetch_one(&self.pool).await?)
    }

    /// Tells teams of their hosts that have gone, and of those that are back: each once, whoever looks. A replica that has not listened for
    /// long enough says of none that it has gone; nor does anybody while the brake is on.
    pub async fn mark_team_hosts(&self, listened: Listened) -> Result<Marked, StoreError> {
        let mut tx = self.begin().await?;
        let back = sqlx::query!(
            r#"update hosts set marked_down_at = null
               where marked_down_at is not null and team_id is not null and state in ('active', 'draining')
                   and last_heartbeat_at >= now() - make_interval(secs => $1)
               returning id, team_id as "team_id!""#,
            HOST_SILENCE_MAX.as_secs_f64()
        )
        .fetch_all(&mut *tx)
        .await?;
        let back: Vec<(Uuid, Uuid)> = back.into_iter().map(|row| (row.id, row.team_id)).collect();
        let gone = match listened {
            Listened::NotYet => Vec::new(),
            Listened::Enough => {
                let gone = sqlx::query!(
                    r#"update hosts set marked_down_at = now()
                       where marked_down_at is null and team_id is not null and state in ('active', 'draining')
                           and last_heartbeat_at < now() - make_interval(secs => $1) and not exists (select 1 from silence_brake)
                       returning id, team_id as "team_id!""#,
                    HOST_SILENCE_MAX.as_secs_f64()
                )
                .fetch_all(&mut *tx)
                .await?;
                gone.into_iter().map(|row| (row.id, row.team_id)).collect()
            }
        };
        let back = tell(&mut tx, "host.marked_up", back).await?;
        let gone = tell(&mut tx, "host.marked_down", gone).await?;
        tx.commit().await?;
        Ok(Marked { back, gone })
    }
}

async fn tell(tx: &mut Tx, action: &str, hosts: Vec<(Uuid, Uuid)>) -> Result<Vec<HostId>, StoreError> {
    let mut told = Vec::with_capacity(hosts.len());
    for (id, team) in hosts {
        let id = HostId(id);
        let actor = Actor { team: Some(TeamId(team)), ..Actor::platform("silent_hosts") };
        audit::record(tx, &actor, action, &id.to_string(), json!({})).await?;
        let event = events::New {
            team: TeamId(team),
            kind: if action == "host.marked_up" { "host.up" } else { "host.down" },
            outcome: None,
            resource_type: "host",
            resource_id: &id.to_string(),
            actor: None,
            metadata: json!({}),
        };
        events::record(tx, &event).await?;
        told.push(id);
    }
    Ok(told)
}
