//! How much a team runs and has run: statistics and usage.
//!
//! ```text
//!   sandboxes ── trigger, in the transaction of the change ──> stretches ── every six hours ──> usage_quarters
//!                                                              exact, of two days               maxima and sums, of a hundred days
//! ```
//!
//! Nothing is sampled. A stretch begins when a sandbox is known to run and ends when that is known to be over or wished, so maxima and sums are
//! those of what was known, however short a sandbox lived, and a control plane that is away misses nothing. It is a trigger that writes them
//! because a dozen statements change that state, and programs of other versions have others. What it costs is a row for each run of a
//! microVM, kept for two days, and a row for each team and quarter of a day in which it ran anything. What waits to start, and what is paused,
//! takes no processor and is not counted.
//!
//! Times are arguments; quarters of days are of UTC.

use std::collections::BTreeMap;

use chrono::{DateTime, NaiveDate, TimeDelta, Utc};
use model::ids::TeamId;

use crate::{Store, StoreError};

/// Length of a quarter of a day.
pub const QUARTER: TimeDelta = TimeDelta::hours(6);
/// A stretch bears the time at which its transaction began; none of them takes that long.
const SETTLED_AFTER: TimeDelta = TimeDelta::minutes(5);
/// Of one statement, which has ten seconds: a team with a hundred thousand stretches in a quarter takes a part of one.
const TEAMS_MAX: i64 = 20;

/// What runs at one moment, or the most that ran within a time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    pub running: i64,
    pub vcpus: i64,
    pub memory_mib: i64,
}

impl Load {
    pub fn max(self, other: Self) -> Self {
        Self {
            running: self.running.max(other.running),
            vcpus: self.vcpus.max(other.vcpus),
            memory_mib: self.memory_mib.max(other.memory_mib),
        }
    }
}

/// What was used in a day.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Used {
    pub vcpu_seconds: f64,
    pub memory_mib_seconds: f64,
}

struct BucketRow {
    bucket: i64,
    running: i64,
    vcpus: i64,
    memory_mib: i64,
}

struct DayRow {
    day: NaiveDate,
    vcpu_seconds: f64,
    memory_mib_seconds: f64,
}

impl Store {
    pub async fn load_now(&self, team: TeamId) -> Result<Load, StoreError> {
        let load = sqlx::query_as!(
            Load,
            r#"select count(*) as "running!", coalesce(sum(vcpus), 0)::bigint as "vcpus!",
                   coalesce(sum(memory_mib), 0)::bigint as "memory_mib!"
               from stretches where team_id = $1 and ended_at = 'infinity'"#,
            team.0
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(load)
    }

    /// The most that ran in each of `count` buckets of whole seconds that begin at `from`. Of the last day only.
    pub async fn load_series(
        &self,
        team: TeamId,
        from: DateTime<Utc>,
        width: TimeDelta,
        count: u16,
    ) -> Result<Vec<Load>, StoreError> {
        let to = from + width * i32::from(count);
        // What changes is summed up in order of time; each bucket begins with a change by nothing, at which what went on before it is seen.
        let rows = sqlx::query_as!(
            BucketRow,
            r#"with s as (
                   select began_at, ended_at, vcpus::bigint as vcpus, memory_mib::bigint as memory_mib from stretches
                   where team_id = $1 and ended_at > $2 and began_at < $3),
               changes as (
                   select greatest(began_at, $2) as at, 1::bigint as n, vcpus as v, memory_mib as m from s
                   union all select ended_at, -1, -vcpus, -memory_mib from s where ended_at < $3
                   union all select $2 + make_interval(secs => ($4::bigint * i)::double precision), 0, 0, 0
                       from generate_series(0, $5::bigint - 1) i),
               summed as (select at, sum(n) as n, sum(v) as v, sum(m) as m from changes group by at),
               levels as (
                   select at, sum(n) over up_to as n, sum(v) over up_to as v, sum(m) over up_to as m from summed
                   window up_to as (order by at))
               select floor(extract(epoch from at - $2) / $4::bigint)::bigint as "bucket!", max(n)::bigint as "running!",
                   max(v)::bigint as "vcpus!", max(m)::bigint as "memory_mib!"
               from levels group by 1 order by 1"#,
            team.0,
            from,
            to,
            width.num_seconds(),
            i64::from(count)
        )
        .fetch_all(&self.pool)
        .await?;
        let mut series = vec![Load::default(); usize::from(count)];
        for row in rows {
            if let Some(bucket) = usize::try_from(row.bucket).ok().and_then(|bucket| series.get_mut(bucket)) {
                *bucket = Load { running: row.running, vcpus: row.vcpus, memory_mib: row.memory_mib };
            }
        }
        Ok(series)
    }

    /// The most that ran in each of `count` quarters of days; `from` is the beginning of one.
    pub async fn quarters(&self, team: TeamId, from: DateTime<Utc>, count: u16) -> Result<Vec<Load>, StoreError> {
        let to = from + QUARTER * i32::from(count);
        let summed = self.usage_summed_until().await?.clamp(from, to);
        let rows = sqlx::query!(
            r#"select began_at, running_max, vcpus_max, memory_mib_max from usage_quarters
               where team_id = $1 and began_at >= $2 and began_at < $3"#,
            team.0,
            from,
            summed
        )
        .fetch_all(&self.pool)
        .await?;
        let mut series = vec![Load::default(); usize::from(count)];
        for row in rows {
            let load = Load { running: row.running_max, vcpus: row.vcpus_max, memory_mib: row.memory_mib_max };
            if let Some(quarter) = series.get_mut(quarters_between(from, row.began_at)) {
                *quarter = load;
            }
        }
        let first = quarters_between(from, summed);
        let rest = u16::try_from(usize::from(count) - first).unwrap_or_default();
        let unsummed = self.load_series(team, summed, QUARTER, rest).await?;
        series[first..].copy_from_slice(&unsummed);
        Ok(series)
    }

    /// What was used on each day from `from` to `to`, both included, up to `now`. Days without anything are left out.
    pub async fn usage(
        &self,
        team: TeamId,
        from: NaiveDate,
        to: NaiveDate,
        now: DateTime<Utc>,
    ) -> Result<BTreeMap<NaiveDate, Used>, StoreError> {
        let (from, to) = (midnight(from), midnight(to) + TimeDelta::days(1));
        let until = self.usage_summed_until().await?;
        let mut rows = sqlx::query_as!(
            DayRow,
            r#"select (began_at at time zone 'UTC')::date as "day!", sum(vcpu_seconds) as "vcpu_seconds!",
                   sum(memory_mib_seconds) as "memory_mib_seconds!"
               from usage_quarters where team_id = $1 and began_at >= $2 and began_at < least($3::timestamptz, $4::timestamptz)
               group by 1"#,
            team.0,
            from,
            to,
            until
        )
        .fetch_all(&self.pool)
        .await?;
        let (from, to) = (from.max(until), to.min(now));
        if from < to {
            rows.extend(self.unsummed(team, from, to).await?);
        }
        let mut days: BTreeMap<NaiveDate, Used> = BTreeMap::new();
        for row in rows {
            let used = days.entry(row.day).or_default();
            used.vcpu_seconds += row.vcpu_seconds;
            used.memory_mib_seconds += row.memory_mib_seconds;
        }
        Ok(days)
    }

    async fn unsummed(&self, team: TeamId, from: DateTime<Utc>, to: DateTime<Utc>) -> Result<Vec<DayRow>, StoreError> {
        let rows = sqlx::query_as!(
            DayRow,
            r#"with days as (
                   select (d at time zone 'UTC')::date as day, greatest(d, $2) as a, least(d + interval '24 hours', $3) as b
                   from generate_series(date_trunc('day', $2::timestamptz, 'UTC'), $3::timestamptz, interval '24 hours') d)
               select day as "day!",
                   sum(vcpus * extract(epoch from least(ended_at, b) - greatest(began_at, a)))::double precision
                       as "vcpu_seconds!",
                   sum(memory_mib * extract(epoch from least(ended_at, b) - greatest(began_at, a)))::double precision
                       as "memory_mib_seconds!"
               from days join stretches on team_id = $1 and ended_at > a and began_at < b and ended_at > $2 where a < b
               group by 1"#,
            team.0,
            from,
            to
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows)
    }

    /// Sums up the quarters that are over. Repeatable, also by several at once.
    pub async fn sum_stretches(&self, now: DateTime<Utc>) -> Result<(), StoreError> {
        loop {
            let quarter = self.usage_summed_until().await?;
            if quarter + QUARTER + SETTLED_AFTER > now {
                return Ok(());
            }
            while self.sum_teams(quarter).await? > 0 {}
            sqlx::query!("update usage_summed set until = $2 where until = $1", quarter, quarter + QUARTER)
                .execute(&self.pool)
                .await?;
        }
    }

    /// Of some teams that have not been summed up yet; how many.
    async fn sum_teams(&self, quarter: DateTime<Utc>) -> Result<u64, StoreError> {
        // Two at once write the same: that it is written again keeps both from taking the other's work for an end.
        let done = sqlx::query!(
            "with teams as (
                 select distinct team_id from stretches s where began_at < $2 and ended_at > $1
                     and not exists (select 1 from usage_quarters q where q.team_id = s.team_id and q.began_at = $1)
                 limit $3),
             s as (
                 select team_id, vcpus::bigint as vcpus, memory_mib::bigint as memory_mib,
                     greatest(began_at, $1) as a, least(ended_at, $2) as b
                 from stretches join teams using (team_id) where began_at < $2 and ended_at > $1),
             changes as (
                 select team_id, a as at, 1::bigint as n, vcpus as v, memory_mib as m from s
                 union all select team_id, b, -1, -vcpus, -memory_mib from s),
             summed as (select team_id, at, sum(n) as n, sum(v) as v, sum(m) as m from changes group by 1, 2),
             levels as (
                 select team_id, sum(n) over up_to as n, sum(v) over up_to as v, sum(m) over up_to as m from summed
                 window up_to as (partition by team_id order by at)),
             maxima as (select team_id, max(n) as n, max(v) as v, max(m) as m from levels group by 1),
             used as (
                 select team_id, sum(vcpus * extract(epoch from b - a)) as v, sum(memory_mib * extract(epoch from b - a)) as m
                 from s group by 1)
             insert into usage_quarters
                 (team_id, began_at, running_max, vcpus_max, memory_mib_max, vcpu_seconds, memory_mib_seconds)
             select team_id, $1, maxima.n, maxima.v, maxima.m, used.v, used.m from maxima join used using (team_id)
             on conflict (team_id, began_at) do update set running_max = excluded.running_max",
            quarter,
            quarter + QUARTER,
            TEAMS_MAX
        )
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected())
    }

    async fn usage_summed_until(&self) -> Result<DateTime<Utc>, StoreError> {
        Ok(sqlx::query_scalar!("select until from usage_summed").fetch_one(&self.pool).await?)
    }
}

fn midnight(day: NaiveDate) -> DateTime<Utc> {
    day.and_time(chrono::NaiveTime::MIN).and_utc()
}

fn quarters_between(from: DateTime<Utc>, to: DateTime<Utc>) -> usize {
    usize::try_from((to - from).num_seconds() / QUARTER.num_seconds()).unwrap_or_default()
}
