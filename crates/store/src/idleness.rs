//! Idle sandboxes: for how long their hosts say that nothing has happened in them, and the end of those for which that is too long.
//!
//! A sandbox is idle by its host's word alone, and no longer than since its last use that the control plane itself knows of: a ping, a
//! call. Its idle time is over only when a report has said so and that report is fresh: a host that is silent says nothing, and neither
//! does one that has not been heard since the control plane was away.

use chrono::{DateTime, TimeDelta, Utc};
use model::ids::{HostId, SandboxId, TeamId};
use model::sandbox::{Observed, Status};

use crate::sandboxes::{Sighting, locked};
use crate::{BATCH_MAX, Store, StoreError, Tx, wishes};

/// What happens more often than this is no idleness that is worth a write.
const IDLE_MIN: TimeDelta = TimeDelta::seconds(20);
/// Reports come in whole seconds and by networks: what differs by less is the same instant.
const SAME_WITHIN: TimeDelta = TimeDelta::seconds(5);
/// A report says what was so when it was made. Reconcilers look every second, so this is enough; the next report says it again.
const FRESH_SEC: f64 = 10.0;
/// Of one answer to a host; as many as it may report.
const TIMEOUTS_MAX: i64 = 10_000;

/// A sandbox whose idle time counts, as its host is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdleTimeout {
    pub id: String,
    pub timeout_sec: i64,
    /// Since its last use that is known here.
    pub active_sec_ago: i64,
}

/// What became of a ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pinged {
    /// Its idle time begins anew.
    Noted,
    /// It does not run.
    Wrong(Status),
    Missing,
}

/// What is known of a sandbox whose idle time counts.
struct Known {
    timeout: TimeDelta,
    last_active_at: Option<DateTime<Utc>>,
    idle_since: Option<DateTime<Utc>>,
}

impl Known {
    /// Since when it is idle, after a report that it has been so for this long; none: it works, or nobody says.
    fn idle_since(&self, idle: Option<TimeDelta>, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        // The report may have been under way when somebody used it.
        let since = (now - idle?).max(self.last_active_at.unwrap_or(DateTime::UNIX_EPOCH));
        (now - since >= IDLE_MIN.min(self.timeout)).then_some(since)
    }

    /// Whether what is written down means something else than this.
    fn differs(&self, since: Option<DateTime<Utc>>, now: DateTime<Utc>) -> bool {
        let is_over = |since: DateTime<Utc>| now - since >= self.timeout;
        match (self.idle_since, since) {
            (None, None) => false,
            (Some(old), Some(new)) => (old - new).abs() > SAME_WITHIN || is_over(old) != is_over(new),
            _ => true,
        }
    }
}

impl Store {
    /// Takes in for how long the sandboxes of a host have been idle, and tells whose idle time counts. Writes only what means something
    /// new. Nothing when another heartbeat of the host came meanwhile: that one says more.
    pub async fn note_idleness(
        &self,
        host: HostId,
        agent_run: &str,
        sequence: i64,
        sightings: &[Sighting],
    ) -> Result<Vec<IdleTimeout>, StoreError> {
        let rows = sqlx::query!(
            r#"select id, incarnation, observed, idle_timeout_sec, last_active_at, idle_since, now() as "now!" from sandboxes
               where host_id = $1 and idle_timeout_sec > 0 and observed <> 'killed' and desired = 'running' order by id limit $2"#,
            host.0,
            TIMEOUTS_MAX
        )
        .fetch_all(&self.pool)
        .await?;
        let Some(now) = rows.first().map(|row| row.now) else { return Ok(Vec::new()) };
        let said: std::collections::HashMap<&str, &Sighting> =
            sightings.iter().map(|seen| (seen.id.as_str(), seen)).collect();
        let mut timeouts = Vec::with_capacity(rows.len());
        let (mut ids, mut were, mut since, mut active) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for row in rows {
            let known = Known {
                timeout: TimeDelta::seconds(row.idle_timeout_sec),
                last_active_at: row.last_active_at,
                idle_since: row.idle_since,
            };
            let idle = said.get(row.id.as_str()).filter(|seen| {
                seen.observed == Observed::Running
                    && row.observed == Observed::Running.as_str()
                    && row.incarnation.as_deref() == Some(&seen.incarnation)
            });
            let idle = idle.and_then(|seen| seen.idle_sec).map(TimeDelta::seconds);
            let is_since = known.idle_since(idle, now);
            let last_used = row.last_active_at.unwrap_or(DateTime::UNIX_EPOCH);
            timeouts.push(IdleTimeout {
                id: row.id.clone(),
                timeout_sec: row.idle_timeout_sec,
                active_sec_ago: (now - last_used).num_seconds().max(0),
            });
            if known.differs(is_since, now) {
                ids.push(row.id);
                were.push(row.idle_since);
                active.push(row.last_active_at);
                since.push(is_since);
            }
        }
        let mut tx = self.begin().await?;
        if !ids.is_empty() {
            // Whoever used it meanwhile has said so in the row, and then this says nothing.
            sqlx::query!(
                "update sandboxes s set idle_since = new.since
                 from unnest($2::text[], $3::timestamptz[], $4::timestamptz[], $5::timestamptz[]) as new (id, was, active, since)
                 where s.id = new.id and s.host_id = $1 and s.idle_since is not distinct from new.was
                     and s.last_active_at is not distinct from new.active",
                host.0,
                &ids,
                &were as &[Option<DateTime<Utc>>],
                &active as &[Option<DateTime<Utc>>],
                &since as &[Option<DateTime<Utc>>],
            )
            .execute(&mut *tx)
            .await?;
        }
        // In the same transaction: what is over is so by this report, and by none that is only about to be taken in.
        let noted = sqlx::query!(
            "update hosts set idle_reported_at = $4 where id = $1 and agent_run = $2 and heartbeat_sequence = $3",
            host.0,
            agent_run,
            sequence,
            now
        )
        .execute(&mut *tx)
        .await?;
        if noted.rows_affected() == 1 {
            tx.commit().await?;
        }
        Ok(timeouts)
    }

    /// Wishes for sandboxes that have been idle for too long; how many.
    pub async fn end_idle_sandboxes(&self) -> Result<usize, StoreError> {
        let mut tx = self.begin().await?;
        // The lock is on what is true when it is taken: one that was used between the look and the lock does not come out.
        let due = sqlx::query!(
            "select s.id, s.revision, s.on_timeout, s.timeout_keeps from sandboxes s join hosts h on h.id = s.host_id
             where s.idle_since is not null and s.idle_timeout_sec > 0 and s.desired = 'running' and s.observed = 'running'
                 and s.idle_since + make_interval(secs => s.idle_timeout_sec) <= h.idle_reported_at
                 and h.idle_reported_at > now() - make_interval(secs => $2)
                 and not exists (select 1 from operations o where o.sandbox_id = s.id
                     and (o.phase = 'open' or o.kind = 'pause' and o.created_at > now() - make_interval(secs => $3)))
             order by s.idle_since limit $1 for update of s skip locked",
            BATCH_MAX,
            FRESH_SEC,
            wishes::PAUSE_AGAIN_SEC
        )
        .fetch_all(&mut *tx)
        .await?;
        for row in &due {
            let id: SandboxId =
                row.id.parse().map_err(|_| StoreError::Damaged { row: row.id.clone(), column: "id" })?;
            wishes::end_of_time(
                &mut tx,
                &id,
                row.revision,
                wishes::kept(&id, &row.on_timeout, &row.timeout_keeps)?,
                "idle",
            )
            .await?;
        }
        tx.commit().await?;
        Ok(due.len())
    }

    /// A sign of life from whoever uses the sandbox.
    pub async fn ping_sandbox(&self, team: TeamId, id: &SandboxId) -> Result<Pinged, StoreError> {
        let mut tx = self.begin().await?;
        let Some(sandbox) = locked(&mut tx, team, id).await? else { return Ok(Pinged::Missing) };
        if sandbox.status() != Status::Running {
            return Ok(Pinged::Wrong(sandbox.status()));
        }
        used(&mut tx, id).await?;
        tx.commit().await?;
        Ok(Pinged::Noted)
    }
}

/// A running sandbox is used: its idle time begins anew.
pub(crate) async fn used(tx: &mut Tx, id: &SandboxId) -> Result<(), StoreError> {
    sqlx::query!(
        "update sandboxes set last_active_at = now(), idle_since = null where id = $1 and observed = 'running'",
        id.as_str()
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_000_000 + second, 0).unwrap()
    }

    #[test]
    fn a_report_is_cut_at_the_last_use_and_short_pauses_are_none() {
        let known = |timeout, active: Option<i64>| Known {
            timeout: TimeDelta::seconds(timeout),
            last_active_at: active.map(at),
            idle_since: None,
        };
        let now = at(100);
        for (timeout, active, idle, expected) in [
            (60, None, Some(70), Some(30)),
            (60, Some(20), Some(70), Some(30)),
            (60, Some(50), Some(70), Some(50)),
            // Used while the report was under way.
            (60, Some(99), Some(70), None),
            (60, None, Some(19), None),
            (60, None, Some(20), Some(80)),
            // A timeout below what counts as idle else.
            (5, None, Some(6), Some(94)),
            (5, None, Some(4), None),
            // Nobody says: an agent that has just started.
            (60, Some(20), None, None),
        ] {
            let since = known(timeout, active).idle_since(idle.map(TimeDelta::seconds), now);
            assert_eq!(since, expected.map(at), "{timeout} {active:?} {idle:?}");
        }
    }

    #[test]
    fn only_what_means_something_else_is_written() {
        let now = at(100);
        for (old, new, expected) in [
            (None, None, false),
            (None, Some(50), true),
            (Some(50), None, true),
            (Some(50), Some(53), false),
            (Some(50), Some(60), true),
            // The same instant, but for the end of its time.
            (Some(41), Some(40), true),
            (Some(39), Some(40), false),
        ] {
            let known = Known { timeout: TimeDelta::seconds(60), last_active_at: None, idle_since: old.map(at) };
            assert_eq!(known.differs(new.map(at), now), expected, "{old:?} {new:?}");
        }
    }
}
