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
//!
//! Each answer brings a ticket, which the agent keeps on its disk and shows in its next heartbeat. Its number tells how old the disk is:
//!
//! ```text
//!   the one issued last                        in order
//!   the one shown last                         the answer was not heard, or not written down: the same is issued once more
//!   a later one                                this database is older than the host, as after a restore: it follows
//!   an earlier one                             a copy of an old state of the disk: it is refused, and told to operators if it goes on
//!   none, from an agent that keeps none        as its run is
//! ```
//!
//! Who shows the right ticket goes on to be the host while a copy is refused.

use model::ids::{HostId, TeamId};
use serde_json::json;
use sqlx::PgExecutor;
use uuid::Uuid;

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
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    News(News),
    /// One that came later was taken in already, or it is of a run that has ended.
    Old {
        epoch: u64,
    },
    Fenced,
    /// Of a copy of an old state of the host's disk. The host itself goes on.
    Copy,
    /// There is no such host.
    Unknown,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct News {
    pub epoch: u64,
    /// To be shown next.
    pub ticket: i64,
    /// What is noted as unclaimed until now.
    pub unclaimed: Vec<String>,
    /// Operations that were put off may go on.
    pub is_back: bool,
    pub digested: Digested,
}

/// What the rows say to the digest of a heartbeat; nothing to none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Digested {
    /// The host has what it should have, and each as it should be.
    pub agrees: bool,
    /// The idle time of some of them may count.
    pub counts_idleness: bool,
}

/// The tickets of a host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tickets {
    pub(crate) issued: i64,
    /// None: whoever comes next begins.
    pub(crate) shown: Option<i64>,
}

impl Tickets {
    /// The same as in [`take`]. `None` is of an agent that keeps none.
    pub(crate) fn are_past(self, shown: Option<i64>) -> bool {
        matches!((shown, self.shown), (Some(shown), Some(last)) if shown < self.issued && shown != last)
    }
}

impl Store {
    /// Takes in a heartbeat. What was put off because the host did not answer is not put off any longer when it is heard of again.
    pub async fn beat(&self, id: HostId, beat: &Beat) -> Result<Heard, StoreError> {
        let heard = match take(&self.pool, id, beat, false).await? {
            Some(news) => Heard::News(news),
            None => self.beat_of_another_run(id, beat).await?,
        };
        if let Heard::News(News { is_back: true, .. }) = heard {
            self.hurry(id).await?;
        }
        Ok(heard)
    }

    /// Once for each start of an agent, and for what is no news.
    async fn beat_of_another_run(&self, id: HostId, beat: &Beat) -> Result<Heard, StoreError> {
        let mut tx = self.begin().await?;
        let host = sqlx::query!(
            "select epoch, state, agent_run, heartbeat_sequence, ticket_issued, ticket_shown from hosts
             where id = $1 and state <> 'pending' for no key update",
            id.0
        )
        .fetch_optional(&mut *tx)
        .await?;
        let Some(host) = host else { return Ok(Heard::Unknown) };
        if host.state == "fenced" {
            return Ok(Heard::Fenced);
        }
        let old = Heard::Old { epoch: u64::try_from(host.epoch).unwrap_or_default() };
        let is_copy = Tickets { issued: host.ticket_issued, shown: host.ticket_shown }.are_past(beat.ticket);
        if host.agent_run == beat.agent_run {
            if !is_copy {
                return Ok(old);
            }
            // A process shows its tickets in their order: this is another one, from a copy of the machine's memory; or a word of the host
            // itself that was under way for long, and whose answer nobody waits for.
            if beat.sequence > host.heartbeat_sequence {
                note_copy(&mut tx, id, &beat.agent_run).await?;
                tx.commit().await?;
            }
            return Ok(Heard::Copy);
        }
        let past = sqlx::query!(
            r#"select last_sequence, is_copy, heard_at < now() - make_interval(secs => $3) as goes_on from past_agent_runs
               where host_id = $1 and agent_run = $2"#,
            id.0,
            beat.agent_run,
            UNDER_WAY_SEC
        )
        .fetch_optional(&mut *tx)
        .await?;
        // What was a copy, and is not: an older database was put back.
        let past = past.filter(|past| is_copy || !past.is_copy);
        let heard = match past {
            // It may be that this one process has died and its word was under way: it is refused, and nothing said yet.
            None if is_copy => {
                remember(&mut tx, id, (&beat.agent_run, beat.sequence), true).await?;
                Heard::Copy
            }
            None => {
                if !host.agent_run.is_empty() {
                    remember(&mut tx, id, (&host.agent_run, host.heartbeat_sequence), false).await?;
                }
                let news = take(&mut *tx, id, beat, true).await?;
                news.map_or(Heard::Unknown, |news| Heard::News(News { is_back: true, ..news }))
            }
            Some(past) => {
                let is_later = beat.sequence > past.last_sequence;
                let goes_on = is_later && past.goes_on == Some(true);
                if goes_on && !past.is_copy {
                    fence(&mut tx, id, (&host.agent_run, &beat.agent_run)).await?;
                    tx.commit().await?;
                    return Ok(Heard::Fenced);
                }
                if goes_on {
                    note_copy(&mut tx, id, &beat.agent_run).await?;
                }
                if is_later {
                    sqlx::query!(
                        "update past_agent_runs set last_sequence = $3, heard_at = coalesce(heard_at, now())
                         where host_id = $1 and agent_run = $2",
                        id.0,
                        beat.agent_run,
                        beat.sequence
                    )
                    .execute(&mut *tx)
                    .await?;
                }
                if past.is_copy { Heard::Copy } else { old }
            }
        };
        tx.commit().await?;
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

/// Writes down what a heartbeat says, if it is the next of its run, or follows the run before, and its ticket is right. In the same
/// question its digest is compared with the rows', which is made as `api::v1::hosts::digest` is.
async fn take(
    executor: impl PgExecutor<'_>,
    id: HostId,
    beat: &Beat,
    follows: bool,
) -> Result<Option<News>, StoreError> {
    let row = sqlx::query!(
        r#"update hosts set agent_run = $2, heartbeat_sequence = $3, arch = $4, cpu_cores = $5, memory_mb = $6, disk_gb = $7,
             isolation = $8, agent_version = $9, templates = $10, memory_free_mb = $11, disk_free_mb = $12,
             last_heartbeat_at = now(), updated_at = now(), ticket_shown = coalesce($14::bigint, ticket_shown),
             ticket_issued = case when $14::bigint is null or $14 = ticket_shown then ticket_issued else greatest(ticket_issued, $14) + 1 end
         from (select id, last_heartbeat_at from hosts where id = $1) before, lateral (
             select encode(sha256(convert_to(coalesce(string_agg(
                        id || ' ' || observed || ' ' || revision, E'\n' order by id collate "C"), ''), 'UTF8')), 'hex') as digest,
                 coalesce(bool_or(absent_since is not null), false) as is_one_missed,
                 coalesce(bool_or(idle_timeout_sec > 0), false) as counts_idleness
             from sandboxes where $16::text is not null and host_id = before.id and observed <> 'killed'
                 and observed in ('running', 'paused')) held
         where hosts.id = before.id and state in ('active', 'draining') and ($15 or agent_run = $2 and heartbeat_sequence < $3)
             and ($14::bigint is null or ticket_shown is null or $14 = ticket_shown or $14 >= ticket_issued)
         returning epoch, ticket_issued, unclaimed, before.last_heartbeat_at < now() - make_interval(secs => $13) as was_silent,
             coalesce(held.digest = $16 and not held.is_one_missed, false) as "agrees!", held.counts_idleness as "counts_idleness!""#,
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
        beat.ticket,
        follows,
        beat.digest,
    )
    .fetch_optional(executor)
    .await?;
    Ok(row.map(|row| News {
        epoch: u64::try_from(row.epoch).unwrap_or_default(),
        ticket: row.ticket_issued,
        unclaimed: row.unclaimed,
        is_back: row.was_silent == Some(true),
        digested: Digested { agrees: row.agrees, counts_idleness: row.counts_idleness },
    }))
}

/// A run that is not the host's: one that another has followed, or a copy's.
async fn remember(tx: &mut Tx, id: HostId, (run, sequence): (&str, i64), is_copy: bool) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into past_agent_runs as past (host_id, agent_run, last_sequence, is_copy, heard_at)
         values ($1, $2, $3, $4, case when $4 then now() end)
         on conflict (host_id, agent_run) do update set last_sequence = excluded.last_sequence, is_copy = excluded.is_copy,
             heard_at = excluded.heard_at, followed_at = now()",
        id.0,
        run,
        sequence,
        is_copy
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
    Ok(())
}

/// Shown until somebody has looked, and recorded once until then.
async fn note_copy(tx: &mut Tx, id: HostId, run: &str) -> Result<(), StoreError> {
    let before = sqlx::query!(r#"select copy_heard_at is null as "first!", team_id from hosts where id = $1"#, id.0)
        .fetch_one(&mut **tx)
        .await?;
    sqlx::query!("update hosts set copy_heard_at = now() where id = $1", id.0).execute(&mut **tx).await?;
    if before.first {
        audit::record(tx, &watcher(before.team_id), "host.fence", &id.to_string(), json!({ "copy": run })).await?;
    }
    Ok(())
}

async fn fence(tx: &mut Tx, id: HostId, (one, other): (&str, &str)) -> Result<(), StoreError> {
    let team = sqlx::query_scalar!(
        "update hosts set was_draining = state = 'draining', state = 'fenced', updated_at = now() where id = $1 returning team_id",
        id.0
    )
    .fetch_one(&mut **tx)
    .await?;
    let facts = json!({ "agent_runs": [one, other] });
    audit::record(tx, &watcher(team), "host.fence", &id.to_string(), facts).await
}

/// Of a team's own host its team is told, who can look at the machine.
fn watcher(team: Option<Uuid>) -> Actor {
    Actor { team: team.map(TeamId), ..Actor::platform("heartbeat") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_older_than_what_was_shown_is_past() {
        for (issued, last, shown, expected) in [
            // Nobody has come yet, or whoever comes next begins.
            (0, None, Some(0), false),
            (7, None, Some(3), false),
            (1, Some(0), Some(0), false),
            (1, Some(0), Some(1), false),
            (7, Some(6), Some(7), false),
            (7, Some(6), Some(6), false),
            (7, Some(6), Some(5), true),
            (7, Some(6), Some(0), true),
            // A chain that was begun anew from an old disk.
            (7, Some(2), Some(2), false),
            (7, Some(2), Some(6), true),
            // The database was restored.
            (7, Some(6), Some(9), false),
            (7, Some(6), None, false),
        ] {
            let tickets = Tickets { issued, shown: last };
            assert_eq!(tickets.are_past(shown), expected, "{tickets:?} {shown:?}");
        }
    }
}
