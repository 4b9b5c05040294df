//! What hosts say of their sandboxes, and what follows from it.
//!
//! ```text
//!   the row    the host says           what is done
//!   running    failed                  it has failed, with the host's reason
//!   paused     running                 it is paused again
//!   lost       paused, as it was       it is paused: it was not lost
//!   killed     anything                it is killed again
//!   any other  a newer wish            the database is older than the host, as after a restore: it is what the host says
//!   none       anything                it is `unclaimed`: left alone, shown to operators
//!   any        nothing, complete       the host is asked about this one; running: failed, paused: lost
//!   any        nothing, or silence     nothing
//! ```
//!
//! Rows are never deleted because something was not heard of.

use std::collections::HashMap;

use model::ids::{HostId, SandboxId};
use model::sandbox::Observed;

use crate::audit::{self, Actor};
use crate::beats::Digested;
use crate::sandboxes::Sighting;
use crate::{Store, StoreError, Tx, Update};

/// More wishes of one sandbox than could be made since any backup: from here on a host's word is none.
const CATCH_UP_MAX: i64 = 1_000_000;

/// What came of a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// The ids that no row of the host claims.
    pub unclaimed: Vec<String>,
    /// Rows may have changed.
    pub is_news: bool,
    /// The idle time of some of them may count.
    pub counts_idleness: bool,
}

/// What it means that a report does not name a sandbox of its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Others {
    /// The host does not have it.
    Missing,
    Nothing,
    /// It is known by other means that it is as it should be.
    Known,
}

impl Store {
    /// Takes in what a host says of its sandboxes.
    ///
    /// With `complete`, rows that the host does not name are marked, for somebody to ask it about each by itself: a create that ended
    /// while the report was under way is not in it.
    pub async fn take_sightings(
        &self,
        host: HostId,
        sightings: &[Sighting],
        complete: bool,
    ) -> Result<Taken, StoreError> {
        let others = if complete { Others::Missing } else { Others::Nothing };
        if let Some(taken) = self.says_nothing_new(host, sightings, others).await? {
            return Ok(taken);
        }
        let ids: Vec<String> = sightings.iter().map(|seen| seen.id.clone()).collect();
        let observed: Vec<String> = sightings.iter().map(|seen| seen.observed.as_str().to_owned()).collect();
        let revisions: Vec<i64> = sightings.iter().map(|seen| seen.revision).collect();
        let incarnations: Vec<String> = sightings.iter().map(|seen| seen.incarnation.clone()).collect();
        let reasons: Vec<String> = sightings.iter().map(|seen| seen.reason.clone()).collect();
        let mut tx = self.begin().await?;
        catch_up(&mut tx, host, &ids, &observed, &revisions, &incarnations).await?;
        // What is under way belongs to its operation, whose end says more than a report.
        let changed = sqlx::query_scalar!(
            "update sandboxes s set observed = seen.observed, reason = nullif(seen.reason, ''),
                 incarnation = coalesce(nullif(seen.incarnation, ''), s.incarnation), updated_at = now()
             from unnest($2::text[], $3::text[], $4::bigint[], $5::text[], $6::text[])
                 as seen (id, observed, revision, incarnation, reason)
             where s.id = seen.id and s.host_id = $1 and s.revision = seen.revision and s.desired = 'running'
                 and s.observed in ('running', 'failed') and seen.observed in ('running', 'failed')
                 and s.observed <> seen.observed
                 and not exists (select 1 from operations o where o.sandbox_id = s.id and o.phase = 'open')
             returning s.id",
            host.0,
            &ids,
            &observed,
            &revisions,
            &incarnations,
            &reasons,
        )
        .fetch_all(&mut *tx)
        .await?;
        note_exits(&mut tx, &changed).await?;
        // The wish stands, and the host has it running all the same: it is told again.
        sqlx::query!(
            "with astray as (
                 update sandboxes s set observed = 'pausing', updated_at = now()
                 from unnest($2::text[], $3::text[], $4::bigint[]) as seen (id, observed, revision)
                 where s.id = seen.id and s.host_id = $1 and s.revision = seen.revision and s.desired = 'paused'
                     and s.observed = 'paused' and seen.observed = 'running'
                     and not exists (select 1 from operations o where o.sandbox_id = s.id and o.phase = 'open')
                 returning s.id, s.revision)
             insert into operations (id, sandbox_id, kind, revision) select gen_random_uuid(), id, 'pause', revision from astray
             on conflict do nothing",
            host.0,
            &ids,
            &observed,
            &revisions,
        )
        .execute(&mut *tx)
        .await?;
        sqlx::query!(
            "update sandboxes s set observed = 'paused', reason = null, updated_at = now()
             from unnest($2::text[], $3::text[], $4::bigint[]) as seen (id, observed, revision)
             where s.id = seen.id and s.host_id = $1 and s.revision = seen.revision and s.desired = 'paused'
                 and s.observed = 'lost' and seen.observed = 'paused'",
            host.0,
            &ids,
            &observed,
            &revisions,
        )
        .execute(&mut *tx)
        .await?;
        // A sandbox that was killed and is there again: whoever brought it back, it ends again.
        sqlx::query!(
            "insert into operations (id, sandbox_id, kind, revision)
             select gen_random_uuid(), s.id, 'kill', s.revision from sandboxes s
             where s.id = any($2) and s.host_id = $1 and s.observed = 'killed'
             on conflict do nothing",
            host.0,
            &ids
        )
        .execute(&mut *tx)
        .await?;
        sqlx::query!(
            "update sandboxes set absent_since = null where host_id = $1 and absent_since is not null and id = any($2)",
            host.0,
            &ids
        )
        .execute(&mut *tx)
        .await?;
        if complete {
            sqlx::query!(
                "update sandboxes set absent_since = now()
                 where host_id = $1 and observed in ('running', 'paused') and absent_since is null and id <> all($2)",
                host.0,
                &ids
            )
            .execute(&mut *tx)
            .await?;
        }
        let claimed = sqlx::query_scalar!("select id from sandboxes where host_id = $1 and id = any($2)", host.0, &ids)
            .fetch_all(&mut *tx)
            .await?;
        tx.commit().await?;
        let unclaimed = ids.into_iter().filter(|id| !claimed.contains(id)).collect();
        Ok(Taken { unclaimed, is_news: true, counts_idleness: true })
    }

    /// Takes in what a host names beside a digest that agrees with the rows: what neither runs nor is paused, or whose idle time counts.
    /// None: it is not what the rows say, and a list is needed.
    pub async fn take_beside_digest(
        &self,
        host: HostId,
        digested: &Digested,
        sightings: &[Sighting],
    ) -> Result<Option<Taken>, StoreError> {
        if !digested.agrees {
            return Ok(None);
        }
        if !sightings.is_empty() && self.says_nothing_new(host, sightings, Others::Known).await?.is_none() {
            return Ok(None);
        }
        Ok(Some(Taken { unclaimed: Vec::new(), is_news: false, counts_idleness: digested.counts_idleness }))
    }

    /// Most reports: each sandbox is here as its host says, and none of the host's is missing. Then no line of the table is for them, and
    /// one question is all that a heartbeat costs.
    async fn says_nothing_new(
        &self,
        host: HostId,
        sightings: &[Sighting],
        others: Others,
    ) -> Result<Option<Taken>, StoreError> {
        let ids: Vec<String> = sightings.iter().map(|seen| seen.id.clone()).collect();
        let rows = sqlx::query!(
            r#"select id as "id!", observed as "observed!", revision as "revision!", absent_since is not null as "is_missed!",
                   idle_timeout_sec > 0 as "counts_idleness!"
               from sandboxes where host_id = $1 and id = any($2)
               union
               select id, observed, revision, absent_since is not null, idle_timeout_sec > 0
               from sandboxes where host_id = $1 and $3 and observed <> 'killed' and observed in ('running', 'paused')"#,
            host.0,
            &ids,
            others != Others::Known
        )
        .fetch_all(&self.pool)
        .await?;
        let known: HashMap<&str, _> = rows.iter().map(|row| (row.id.as_str(), row)).collect();
        let as_said = sightings.iter().all(|seen| {
            let is_settled = matches!(seen.observed, Observed::Running | Observed::Paused | Observed::Failed);
            known.get(seen.id.as_str()).is_some_and(|row| {
                is_settled && row.observed == seen.observed.as_str() && row.revision == seen.revision && !row.is_missed
            })
        });
        // Whoever is in the answer and was not named is missed, if all were named.
        let is_all = as_said && (others != Others::Missing || rows.len() == sightings.len());
        let counts_idleness = rows.iter().any(|row| row.counts_idleness);
        Ok(is_all.then_some(Taken { unclaimed: Vec::new(), is_news: false, counts_idleness }))
    }

    /// The host, asked about this one sandbox, has it after all.
    pub async fn sandbox_is_present(&self, id: &SandboxId) -> Result<(), StoreError> {
        sqlx::query!("update sandboxes set absent_since = null where id = $1", id.as_str()).execute(&self.pool).await?;
        Ok(())
    }

    /// The host, asked about this one sandbox, does not have it. Of one that was paused the row stays, as lost: its host may find it again.
    pub async fn sandbox_is_gone(&self, id: &SandboxId, revision: i64, reason: &str) -> Result<Update, StoreError> {
        let mut tx = self.begin().await?;
        let updated = sqlx::query!(
            "update sandboxes set observed = case when observed = 'paused' then 'lost' else 'failed' end, reason = $3, absent_since = null, updated_at = now()
             where id = $1 and revision = $2 and observed in ('running', 'paused') and absent_since is not null",
            id.as_str(),
            revision,
            reason
        )
        .execute(&mut *tx)
        .await?;
        if updated.rows_affected() == 1 {
            note_exits(&mut tx, &[id.to_string()]).await?;
        }
        tx.commit().await?;
        Ok(Update::of(updated.rows_affected()))
    }
}

/// A revision is written before a host hears of it. Where the host knows a newer one, this database was restored from a copy, and what was
/// wished since then is known to the host alone. Operations that the copy had open are of older wishes, and end by that.
async fn catch_up(
    tx: &mut Tx,
    host: HostId,
    ids: &[String],
    observed: &[String],
    revisions: &[i64],
    incarnations: &[String],
) -> Result<(), StoreError> {
    let behind = sqlx::query!(
        "update sandboxes s set revision = seen.revision, observed = seen.observed, reason = null, absent_since = null,
             desired = case when seen.observed = 'paused' then 'paused' else 'running' end,
             incarnation = coalesce(nullif(seen.incarnation, ''), s.incarnation), updated_at = now()
         from unnest($2::text[], $3::text[], $4::bigint[], $5::text[]) as seen (id, observed, revision, incarnation)
         where s.id = seen.id and s.host_id = $1 and s.revision < seen.revision
             and seen.revision - s.revision <= $6 and s.desired <> 'killed'
             and s.observed <> 'killed' and seen.observed in ('running', 'paused', 'failed')
         returning s.id, s.revision, s.observed",
        host.0,
        ids,
        observed,
        revisions,
        incarnations,
        CATCH_UP_MAX,
    )
    .fetch_all(&mut **tx)
    .await?;
    for row in behind {
        let facts = serde_json::json!({ "revision": row.revision, "observed": row.observed });
        audit::record(tx, &Actor::platform("sightings"), "sandbox.catch_up", &row.id, facts).await?;
    }
    Ok(())
}

/// Of those that have failed: for their timelines.
async fn note_exits(tx: &mut Tx, ids: &[String]) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into operations (id, sandbox_id, kind, revision, phase, error_code, error_message, finished_at)
         select gen_random_uuid(), id, 'exit', revision, 'failed', 'agent_error', reason, now() from sandboxes
         where id = any($1) and observed in ('failed', 'lost')",
        ids
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}
