//! Where teams are told of what happens, and what is still to be told.
//!
//! A notification is a row of the outbox, written with the event that it is about. Of each channel only the oldest is delivered at a
//! time: in order, and one that hangs holds up nobody else's.

use chrono::{DateTime, Utc};
use model::ids::{ChannelId, TeamId};
use serde_json::Value;
use uuid::Uuid;

use crate::audit::{self, Actor};
use crate::idempotency::{self, Claim};
use crate::outbox::{LEASE_SEC, Taken};
use crate::{Store, StoreError, Tx, teams};

/// By which rows of the outbox say that they are notifications.
pub const KIND: &str = "notification";
/// Of one team.
pub const CHANNELS_MAX: i64 = 50;
/// What may wait for one channel; what comes while so many wait is not told there.
const WAITING_MAX: i64 = 1000;
/// Older news help nobody.
const NEWS_HOURS: i32 = 24;
/// Of the words why something was not delivered.
const PROBLEM_CHARS_MAX: usize = 300;

#[derive(Debug, Clone, PartialEq)]
pub struct Channel {
    pub id: ChannelId,
    pub team: TeamId,
    pub name: String,
    pub provider: String,
    /// Sealed.
    pub config: Vec<u8>,
    pub events: Vec<String>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
    /// When something was last delivered.
    pub delivered_at: Option<DateTime<Utc>>,
    /// When and why something last was not.
    pub problem_at: Option<DateTime<Utc>>,
    pub problem: Option<String>,
}

pub struct NewChannel {
    pub id: ChannelId,
    pub team: TeamId,
    pub name: String,
    pub provider: String,
    pub config: Vec<u8>,
    pub events: Vec<String>,
}

#[derive(Debug, PartialEq)]
pub enum Created {
    Made(Channel),
    /// What the first call under the same idempotency key made.
    Repeated(Channel),
    OtherArguments,
    /// The first call's channel was deleted since.
    Gone,
    NameTaken,
    /// The team has [`CHANNELS_MAX`].
    TooMany,
    NoTeam,
}

#[derive(Debug, PartialEq)]
pub enum Changed {
    Done(Channel),
    NameTaken,
    Missing,
}

/// A notification that a deliverer has taken, and where it goes.
#[derive(Debug, Clone, PartialEq)]
pub struct Notification {
    pub taken: Taken,
    pub channel: ChannelId,
    pub provider: String,
    /// Sealed.
    pub config: Vec<u8>,
}

struct Row {
    id: Uuid,
    team_id: Uuid,
    name: String,
    provider: String,
    config: Vec<u8>,
    events: Vec<String>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
    delivered_at: Option<DateTime<Utc>>,
    problem_at: Option<DateTime<Utc>>,
    problem: Option<String>,
}

impl From<Row> for Channel {
    fn from(row: Row) -> Self {
        Self {
            id: ChannelId(row.id),
            team: TeamId(row.team_id),
            name: row.name,
            provider: row.provider,
            config: row.config,
            events: row.events,
            created_at: row.created_at,
            updated_at: row.updated_at,
            delivered_at: row.delivered_at,
            problem_at: row.problem_at,
            problem: row.problem,
        }
    }
}

impl Store {
    pub async fn create_channel(
        &self,
        new: &NewChannel,
        key: Option<&idempotency::Key>,
        actor: &Actor,
    ) -> Result<Created, StoreError> {
        let mut tx = self.begin().await?;
        if let Some(key) = key {
            match idempotency::claim(&mut tx, key, &new.id.to_string()).await? {
                Claim::New => {}
                Claim::OtherArguments => return Ok(Created::OtherArguments),
                Claim::Repeated(subject) => {
                    let id: ChannelId =
                        subject.parse().map_err(|_| StoreError::Damaged { row: key.key.clone(), column: "subject" })?;
                    let first = one(&mut tx, new.team, id).await?;
                    return Ok(first.map_or(Created::Gone, Created::Repeated));
                }
            }
        }
        if !teams::stays(&mut tx, new.team).await? {
            return Ok(Created::NoTeam);
        }
        let count = sqlx::query_scalar!(r#"select count(*) as "count!" from channels where team_id = $1"#, new.team.0)
            .fetch_one(&mut *tx)
            .await?;
        if count >= CHANNELS_MAX {
            return Ok(Created::TooMany);
        }
        let made = sqlx::query_as!(
            Row,
            "insert into channels (id, team_id, name, provider, config, events) values ($1, $2, $3, $4, $5, $6)
             on conflict (team_id, name) do nothing
             returning id, team_id, name, provider, config, events, created_at, updated_at, delivered_at, problem_at, problem",
            new.id.0,
            new.team.0,
            new.name,
            new.provider,
            new.config,
            &new.events
        )
        .fetch_optional(&mut *tx)
        .await?;
        let Some(made) = made else { return Ok(Created::NameTaken) };
        let details = serde_json::json!({ "name": new.name, "provider": new.provider, "events": new.events });
        audit::record(&mut tx, actor, "channel.create", &new.id.to_string(), details).await?;
        tx.commit().await?;
        Ok(Created::Made(made.into()))
    }

    pub async fn channels(&self, team: TeamId) -> Result<Vec<Channel>, StoreError> {
        let rows = sqlx::query_as!(
            Row,
            "select id, team_id, name, provider, config, events, created_at, updated_at, delivered_at, problem_at, problem
             from channels where team_id = $1 order by created_at, id limit $2",
            team.0,
            CHANNELS_MAX
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(Channel::from).collect())
    }

    pub async fn channel(&self, team: TeamId, id: ChannelId) -> Result<Option<Channel>, StoreError> {
        one(&mut self.begin().await?, team, id).await
    }

    /// Its name, and of what it is told, as far as given.
    pub async fn update_channel(
        &self,
        team: TeamId,
        id: ChannelId,
        name: Option<&str>,
        events: Option<&[String]>,
        actor: &Actor,
    ) -> Result<Changed, StoreError> {
        let mut tx = self.begin().await?;
        let updated = sqlx::query_as!(
            Row,
            "update channels set name = coalesce($3, name), events = coalesce($4, events), updated_at = now()
             where id = $1 and team_id = $2
             returning id, team_id, name, provider, config, events, created_at, updated_at, delivered_at, problem_at, problem",
            id.0,
            team.0,
            name,
            events
        )
        .fetch_optional(&mut *tx)
        .await;
        let updated = match updated {
            Err(sqlx::Error::Database(cause)) if cause.constraint() == Some("channels_team_id_name_key") => {
                return Ok(Changed::NameTaken);
            }
            updated => updated?,
        };
        let Some(updated) = updated else { return Ok(Changed::Missing) };
        let details = serde_json::json!({ "name": name, "events": events });
        audit::record(&mut tx, actor, "channel.update", &id.to_string(), details).await?;
        tx.commit().await?;
        Ok(Changed::Done(updated.into()))
    }

    /// What it is reached by, whole.
    pub async fn set_channel_config(
        &self,
        team: TeamId,
        id: ChannelId,
        config: &[u8],
        actor: &Actor,
    ) -> Result<Changed, StoreError> {
        let mut tx = self.begin().await?;
        let updated = sqlx::query_as!(
            Row,
            "update channels set config = $3, updated_at = now() where id = $1 and team_id = $2
             returning id, team_id, name, provider, config, events, created_at, updated_at, delivered_at, problem_at, problem",
            id.0,
            team.0,
            config
        )
        .fetch_optional(&mut *tx)
        .await?;
        let Some(updated) = updated else { return Ok(Changed::Missing) };
        audit::record(&mut tx, actor, "channel.rotate_config", &id.to_string(), serde_json::json!({})).await?;
        tx.commit().await?;
        Ok(Changed::Done(updated.into()))
    }

    /// With what is still to be told there. False: there is none.
    pub async fn delete_channel(&self, team: TeamId, id: ChannelId, actor: &Actor) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        let gone =
            sqlx::query_scalar!("delete from channels where id = $1 and team_id = $2 returning name", id.0, team.0)
                .fetch_optional(&mut *tx)
                .await?;
        let Some(name) = gone else { return Ok(false) };
        audit::record(&mut tx, actor, "channel.delete", &id.to_string(), serde_json::json!({ "name": name })).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Of each channel the oldest that waits, when it is due; for nobody else until the lease is over.
    pub async fn take_notifications(&self, limit: i64) -> Result<Vec<Notification>, StoreError> {
        let rows = sqlx::query!(
            r#"with oldest as (
                   select distinct on (channel_id) id, next_at, lease_until from outbox
                   where channel_id is not null and given_up_at is null order by channel_id, created_at, id),
               due as (
                   select id from outbox where id in (
                       select id from oldest where next_at <= now() and (lease_until is null or lease_until < now()))
                   and (lease_until is null or lease_until < now()) order by next_at limit $1 for update skip locked)
               update outbox o set attempts = attempts + 1, lease_until = now() + make_interval(secs => $2)
               from due, channels c where o.id = due.id and c.id = o.channel_id
               returning o.id, o.kind, o.sealed, o.expires_at, o.attempts, c.id as channel_id, c.provider, c.config"#,
            limit,
            LEASE_SEC
        )
        .fetch_all(&self.pool)
        .await?;
        let notifications = rows.into_iter().map(|row| Notification {
            taken: Taken {
                id: row.id,
                kind: row.kind,
                sealed: row.sealed,
                expires_at: row.expires_at,
                attempts: row.attempts,
            },
            channel: ChannelId(row.channel_id),
            provider: row.provider,
            config: row.config,
        });
        Ok(notifications.collect())
    }

    /// For people who look at the channel: None, it was delivered; else why not.
    pub async fn note_delivery(&self, id: ChannelId, problem: Option<&str>) -> Result<(), StoreError> {
        let problem: Option<String> = problem.map(|problem| problem.chars().take(PROBLEM_CHARS_MAX).collect());
        sqlx::query!(
            "update channels set
                 delivered_at = case when $2::text is null then now() else delivered_at end,
                 problem_at = case when $2::text is null then null else now() end, problem = $2
             where id = $1 and (problem is distinct from $2 or delivered_at is null or delivered_at < now() - interval '1 minute')",
            id.0,
            problem
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}

async fn one(tx: &mut Tx, team: TeamId, id: ChannelId) -> Result<Option<Channel>, StoreError> {
    let row = sqlx::query_as!(
        Row,
        "select id, team_id, name, provider, config, events, created_at, updated_at, delivered_at, problem_at, problem
         from channels where id = $1 and team_id = $2",
        id.0,
        team.0
    )
    .fetch_optional(&mut **tx)
    .await?;
    Ok(row.map(Channel::from))
}

/// What was just numbered is told to those channels that want to know, in the transaction that numbers it.
pub(crate) async fn tell(tx: &mut Tx, first: i64, last: i64) -> Result<(), StoreError> {
    sqlx::query!(
        r#"with told as (
               select e.*, case
                   when e.kind = 'capsule.create' and e.outcome = 'success' then 'capsule.created'
                   when e.kind = 'capsule.resume' and e.outcome = 'success' then 'capsule.running'
                   when e.kind = 'capsule.pause' and e.outcome = 'success' then 'capsule.paused'
                   when e.kind = 'capsule.destroy' and e.outcome = 'success' then 'capsule.destroyed'
                   when e.kind = 'template.snapshot.create' and e.outcome = 'success' then 'template.snapshot.created'
                   when e.kind = 'template.snapshot.delete' and e.outcome = 'success' then 'template.snapshot.deleted'
                   when e.kind in ('host.up', 'host.down') then e.kind
               end as name
               from events e where e.id between $1 and $2)
           insert into outbox (id, kind, sealed, expires_at, channel_id, created_at)
           select gen_random_uuid(), $3, convert_to(jsonb_strip_nulls(jsonb_build_object(
                   'event', e.name,
                   'timestamp', to_char(e.at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'),
                   'team_id', $4::jsonb->>(e.team_id::text),
                   'actor', jsonb_build_object(
                       'type', case when e.actor_kind in ('user', 'api_key') then e.actor_kind else 'system' end,
                       'id', case when e.actor_kind in ('user', 'api_key') then e.actor_id end),
                   'resource', jsonb_build_object('id', e.resource_id, 'type',
                       case e.resource_type when 'capsule' then 'sandbox' when 'template' then 'snapshot' else e.resource_type end)
               ))::text, 'UTF8'),
               now() + make_interval(hours => $5), c.id,
               -- In their order, although they come in one transaction.
               now() + (e.id - $1) * interval '1 microsecond'
           from told e join channels c on c.team_id = e.team_id and e.name = any(c.events)
           where (select count(*) from (select 1 from outbox o where o.channel_id = c.id limit $6) waiting) < $6"#,
        first,
        last,
        KIND,
        names(tx, first, last).await?,
        NEWS_HOURS,
        WAITING_MAX
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// The public ids of teams that have channels and to which something happened, by those of the database.
async fn names(tx: &mut Tx, first: i64, last: i64) -> Result<Value, StoreError> {
    let teams = sqlx::query_scalar!(
        "select distinct c.team_id from channels c join events e on e.team_id = c.team_id where e.id between $1 and $2",
        first,
        last
    )
    .fetch_all(&mut **tx)
    .await?;
    Ok(teams
        .into_iter()
        .map(|team| (team.to_string(), Value::from(TeamId(team).to_string())))
        .collect::<serde_json::Map<_, _>>()
        .into())
}
