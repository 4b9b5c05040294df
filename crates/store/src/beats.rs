//! Heartbeats: what a host says of itself, from which run of its agent it comes, and whether two machines say it.
//!
//! ```text
//!   a run that is known, a later sequence      news
//!   a run that was never heard                 news: the agent was started again; the run before it is past
//!   a past run, once                           nothing: it was under way
//!   a past run that goes on to speak           two machines have one identity: the host is fenced
//! ```
//!
//! A host that is fenced gets nothing new and is told nothing, and nothing follows from what it says, until an operator has looked which of
//! the two it is.

use model::ids::HostId;
use serde_json::json;

use crate::audit::{self, Actor};
use crate::hosts::Beat;
use crate::{Store, StoreError, Tx};

/// Heard again after longer than one heartbeat's time: operations that were put off meanwhile are hurried.
const MISSED_BEAT_SEC: f64 = 45.0;
/// No heartbeat is under way for longer: a client gives up before.
const UNDER_WAY_SEC: f64 = 20.0;
/// Of one host; an agent that starts more often has other troubles.
const PAST_RUNS_MAX: i64 = 32;

/// What a heartbeat is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    News {
        epoch: u64,
    },
    /// One that came later was taken in already, or it is of a run that has ended.
    Old {
        epoch: u64,
    },
    Fenced,
    /// There is no such host.
    Unknown,
}

impl Store {
    /// Takes in a heartbeat. What was put off because the host did not answer is not put off any longer when it is heard of again.
    pub async fn beat(&self, id: HostId, beat: &Beat) -> Result<Heard, StoreError> {
        let of_the_run = sqlx::query!(
            "update hosts set heartbeat_sequence = $3, arch = $4, cpu_cores = $5, memory_mb = $6, disk_gb = $7, isolation = $8,
                 agent_version = $9, templates = $10, memory_free_mb = $11, disk_free_mb = $12, last_heartbeat_at = now(),
                 updated_at = now()
             from (select id, last_heartbeat_at from hosts where id = $1) before
             where hosts.id = before.id and state in ('active', 'draining') and agent_run = $2 and heartbeat_sequence < $3
             returning epoch, before.last_heartbeat_at < now() - make_interval(secs => $13) as was_silent",
            id.0,
            beat.agent_run,
            beat.sequence,
            beat.facts.arch,
            beat.facts.cpu_cores,
            beat.facts.memory_mb,
            beat.facts.disk_gb,
            beat.facts.isolation,
            beat.facts.agent_version,
            &beat.facts.templates,
            beat.memory_free_mb,
            beat.disk_free_mb,
            MISSED_BEAT_SEC,
        )
        .fetch_optional(&self.pool)
        .await?;
        if let Some(row) = of_the_run {
            if row.was_silent == Some(true) {
                self.hurry(id).await?;
            }
            return Ok(Heard::News { epoch: u64::try_from(row.epoch).unwrap_or_default() });
        }
        self.beat_of_another_run(id, beat).await
    }

    /// Once for each start of an agent, and for what is no news.
    async fn beat_of_another_run(&self, id: HostId, beat: &Beat) -> Result<Heard, StoreError> {
        let mut tx = self.begin().await?;
        let host = sqlx::query!(
            "select epoch, state, agent_run, heartbeat_sequence from hosts where id = $1 and state <> 'pending' for no key update",
            id.0
        )
        .fetch_optional(&mut *tx)
        .await?;
        let Some(host) = host else { return Ok(Heard::Unknown) };
        if host.state == "fenced" {
            return Ok(Heard::Fenced);
        }
        let epoch = u64::try_from(host.epoch).unwrap_or_default();
        if host.agent_run == beat.agent_run {
            return Ok(Heard::Old { epoch });
        }
        let past = sqlx::query!(
            r#"select last_sequence, heard_at < now() - make_interval(secs => $3) as goes_on from past_agent_runs
               where host_id = $1 and agent_run = $2"#,
            id.0,
            beat.agent_run,
            UNDER_WAY_SEC
        )
        .fetch_optional(&mut *tx)
        .await?;
        let heard = match past {
            None => {
                follow(&mut tx, id, beat, (&host.agent_run, host.heartbeat_sequence)).await?;
                Heard::News { epoch }
            }
            Some(past) if beat.sequence <= past.last_sequence => Heard::Old { epoch },
            Some(past) if past.goes_on == Some(true) => {
                fence(&mut tx, id, (&host.agent_run, &beat.agent_run)).await?;
                Heard::Fenced
            }
            Some(_) => {
                sqlx::query!(
                    "update past_agent_runs set last_sequence = $3, heard_at = coalesce(heard_at, now())
                     where host_id = $1 and agent_run = $2",
                    id.0,
                    beat.agent_run,
                    beat.sequence
                )
                .execute(&mut *tx)
                .await?;
                Heard::Old { epoch }
            }
        };
        tx.commit().await?;
        if let Heard::News { .. } = heard {
            self.hurry(id).await?;
        }
        Ok(heard)
    }

    /// What is open for a host is taken up at once.
    async fn hurry(&self, id: HostId) -> Result<(), StoreError> {
        sqlx::query!(
            "update operations o set not_before = now() from sandboxes s
             where s.id = o.sandbox_id and s.host_id = $1 and o.phase = 'open' and o.lease_owner is null and o.not_before > now()",
            id.0
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}

/// The agent was started again.
async fn follow(tx: &mut Tx, id: HostId, beat: &Beat, (before, sequence): (&str, i64)) -> Result<(), StoreError> {
    if !before.is_empty() {
        sqlx::query!(
            "insert into past_agent_runs (host_id, agent_run, last_sequence) values ($1, $2, $3) on conflict do nothing",
            id.0,
            before,
            sequence
        )
        .execute(&mut **tx)
        .await?;
        sqlx::query!(
            "delete from past_agent_runs where host_id = $1 and agent_run in (
                 select agent_run from past_agent_runs where host_id = $1 order by followed_at desc offset $2)",
            id.0,
            PAST_RUNS_MAX
        )
        .execute(&mut **tx)
        .await?;
    }
    sqlx::query!(
        "update hosts set agent_run = $2, heartbeat_sequence = $3, arch = $4, cpu_cores = $5, memory_mb = $6, disk_gb = $7,
             isolation = $8, agent_version = $9, templates = $10, memory_free_mb = $11, disk_free_mb = $12,
             last_heartbeat_at = now(), updated_at = now()
         where id = $1",
        id.0,
        beat.agent_run,
        beat.sequence,
        beat.facts.arch,
        beat.facts.cpu_cores,
        beat.facts.memory_mb,
        beat.facts.disk_gb,
        beat.facts.isolation,
        beat.facts.agent_version,
        &beat.facts.templates,
        beat.memory_free_mb,
        beat.disk_free_mb,
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

async fn fence(tx: &mut Tx, id: HostId, (one, other): (&str, &str)) -> Result<(), StoreError> {
    sqlx::query!("update hosts set state = 'fenced', updated_at = now() where id = $1", id.0)
        .execute(&mut **tx)
        .await?;
    let facts = json!({ "agent_runs": [one, other] });
    audit::record(tx, &Actor::platform("heartbeat"), "host.fence", &id.to_string(), facts).await
}
