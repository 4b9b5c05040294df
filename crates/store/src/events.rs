//! What happened to teams' things, in an order in which nobody who remembers how far they have read misses anything.
//!
//! ```text
//!   a change, in its own transaction  ->  events_written  ->  (numbered, one transaction at a time)  ->  events  ->  who listens
//! ```
//!
//! States of sandboxes and ends of operations are written down by triggers ([`0015_events.sql`]): there is one place for each, whatever
//! statement makes the change. The rest is [`record`]ed beside its change. Ids of what is written come in the order of the writing; a
//! transaction that began earlier may end later, and whoever has seen the later id would never see its own. So what is written gets its
//! number when it is moved, under a lock that is held until the numbers are there for all to see.

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, Utc};
use model::ids::{SandboxId, TeamId};
use serde_json::Value;
use uuid::Uuid;

use crate::audit::Actor;
use crate::sandboxes::Sandbox;
use crate::{Store, StoreError, Tx, channels};

/// Name of the lock under which events are numbered.
const NUMBERING: i64 = 0x7772_6576;
/// That are numbered at once: the lock is held for milliseconds.
const NUMBERED_MAX: i64 = 1000;
/// Of one answer.
pub const PAGE_MAX: i64 = 1000;

/// Who is behind an event; the platform itself has no id.
#[derive(Debug, Clone, PartialEq)]
pub struct Behind {
    /// user, api_key, host, platform
    pub kind: String,
    pub id: String,
    /// What they are called now; empty when nobody knows.
    pub name: String,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Grows; of one team as well.
    pub id: i64,
    pub at: DateTime<Utc>,
    pub team: TeamId,
    pub kind: String,
    pub outcome: Option<String>,
    pub resource_type: String,
    pub resource_id: String,
    pub actor: Option<Behind>,
    pub metadata: BTreeMap<String, String>,
    pub error: Option<String>,
    /// More, for who wants to know exactly.
    pub details: Value,
    /// What it is of, as it is when the event is read.
    pub sandbox: Option<Box<Sandbox>>,
}

/// Which of a team's events.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Asked {
    pub after: i64,
    pub limit: i64,
    /// None of them: all kinds.
    pub kinds: Vec<String>,
    pub sandbox: Option<SandboxId>,
}

pub(crate) struct New<'a> {
    pub team: TeamId,
    pub kind: &'a str,
    pub outcome: Option<&'a str>,
    pub resource_type: &'a str,
    pub resource_id: &'a str,
    pub actor: Option<&'a Actor>,
    pub metadata: Value,
}

/// In the transaction of what it tells of.
pub(crate) async fn record(tx: &mut Tx, new: &New<'_>) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into events_written (team_id, kind, outcome, resource_type, resource_id, actor_kind, actor_id, metadata)
         values ($1, $2, $3, $4, $5, $6, $7, $8)",
        new.team.0,
        new.kind,
        new.outcome,
        new.resource_type,
        new.resource_id,
        new.actor.map(|actor| actor.kind.as_str()),
        new.actor.map(|actor| actor.id.as_str()),
        new.metadata,
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

struct Row {
    id: i64,
    at: DateTime<Utc>,
    team_id: Uuid,
    kind: String,
    outcome: Option<String>,
    resource_type: String,
    resource_id: String,
    actor_kind: Option<String>,
    actor_id: Option<String>,
    metadata: Value,
    error: Option<String>,
    details: Value,
}

impl Store {
    /// Gives numbers to what was written; how many got one. Nothing is done when somebody else is at it.
    pub async fn number_events(&self) -> Result<u64, StoreError> {
        let is_any = sqlx::query_scalar!(r#"select exists (select 1 from events_written) as "any!""#);
        if !is_any.fetch_one(&self.pool).await? {
            return Ok(0);
        }
        let mut tx = self.begin().await?;
        let is_mine = sqlx::query_scalar!(r#"select pg_try_advisory_xact_lock($1) as "mine!""#, NUMBERING);
        if !is_mine.fetch_one(&mut *tx).await? {
            return Ok(0);
        }
        // A statement of its own: it must see what was committed before the lock was taken.
        let numbered = sqlx::query_scalar!(
            "with moved as (
                 delete from events_written where id in (select id from events_written order by id limit $1) returning *)
             insert into events (at, team_id, kind, outcome, resource_type, resource_id, actor_kind, actor_id, metadata, error, details)
             select at, team_id, kind, outcome, resource_type, resource_id, actor_kind, actor_id, metadata, error, details
             from moved order by id
             returning id",
            NUMBERED_MAX
        )
        .fetch_all(&mut *tx)
        .await?;
        if let (Some(first), Some(last)) = (numbered.iter().min(), numbered.iter().max()) {
            channels::tell(&mut tx, *first, *last).await?;
        }
        tx.commit().await?;
        Ok(u64::try_from(numbered.len()).unwrap_or(u64::MAX))
    }

    /// The number of the newest, and of the oldest that is kept; 0 when there is none.
    pub async fn events_kept(&self) -> Result<(i64, i64), StoreError> {
        let row =
            sqlx::query!(r#"select coalesce(max(id), 0) as "newest!", coalesce(min(id), 0) as "oldest!" from events"#)
                .fetch_one(&self.pool)
                .await?;
        Ok((row.newest, row.oldest))
    }

    /// What happened to some teams' things after one event and up to another one, oldest first.
    pub async fn events_of_teams(
        &self,
        teams: &[TeamId],
        after: i64,
        until: i64,
        limit: i64,
    ) -> Result<Vec<Event>, StoreError> {
        let teams: Vec<Uuid> = teams.iter().map(|team| team.0).collect();
        let rows = sqlx::query_as!(
            Row,
            "select id, at, team_id, kind, outcome, resource_type, resource_id, actor_kind, actor_id, metadata, error, details
             from events where id > $1 and id <= $2 and team_id = any($3) order by id limit $4",
            after,
            until,
            &teams,
            limit
        )
        .fetch_all(&self.pool)
        .await?;
        self.whole(rows).await
    }

    /// A team's events after one, oldest first.
    pub async fn events(&self, team: TeamId, asked: &Asked) -> Result<Vec<Event>, StoreError> {
        let sandbox = asked.sandbox.as_ref().map(SandboxId::as_str);
        let rows = sqlx::query_as!(
            Row,
            "select id, at, team_id, kind, outcome, resource_type, resource_id, actor_kind, actor_id, metadata, error, details
             from events
             where team_id = $1 and id > $2 and (cardinality($3::text[]) = 0 or kind = any($3))
                 and ($4::text is null or resource_id = $4 or metadata->>'sandbox_id' = $4)
             order by id limit $5",
            team.0,
            asked.after,
            &asked.kinds,
            sandbox,
            asked.limit.min(PAGE_MAX)
        )
        .fetch_all(&self.pool)
        .await?;
        self.whole(rows).await
    }

    async fn whole(&self, rows: Vec<Row>) -> Result<Vec<Event>, StoreError> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let names = self.names_of(rows.iter().filter_map(|row| row.actor_id.as_deref())).await?;
        let of_sandboxes = rows.iter().filter(|row| row.resource_type == "capsule");
        let mut ids: Vec<String> = of_sandboxes.map(|row| row.resource_id.clone()).collect();
        ids.sort_unstable();
        ids.dedup();
        let sandboxes: HashMap<String, Sandbox> =
            self.sandboxes_of_ids(&ids).await?.into_iter().map(|sandbox| (sandbox.id.to_string(), sandbox)).collect();
        let whole = |row: Row| {
            let actor = row.actor_kind.map(|kind| {
                let id = row.actor_id.unwrap_or_default();
                Behind { kind, name: names.get(&id).cloned().unwrap_or_default(), id }
            });
            let metadata = serde_json::from_value(row.metadata)
                .map_err(|_| StoreError::Damaged { row: row.id.to_string(), column: "metadata" })?;
            Ok(Event {
                // Whoever has it now: an id is never given to another team.
                sandbox: sandboxes.get(&row.resource_id).filter(|it| it.team.0 == row.team_id).cloned().map(Box::new),
                id: row.id,
                at: row.at,
                team: TeamId(row.team_id),
                kind: row.kind,
                outcome: row.outcome,
                resource_type: row.resource_type,
                resource_id: row.resource_id,
                actor,
                metadata,
                error: row.error,
                details: row.details,
            })
        };
        rows.into_iter().map(whole).collect()
    }
}
