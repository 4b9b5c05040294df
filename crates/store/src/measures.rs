//! What is counted where it is written, and what is looked up for whoever reads the platform's numbers. The names stand in the control
//! plane's table of metrics.

use crate::{HOST_SILENCE_MAX, Store, StoreError};

/// From the wish to its end, by what it was and how it ended.
pub const OPERATION_SECONDS: &str = "wrenn_operation_duration_seconds";
/// So long after its time an operation that is still open was forgotten: whoever works on it looks at its time more often.
const OVERDUE_SEC: f64 = 30.0;

/// An operation that was ended by what is written just now.
#[derive(Debug)]
pub(crate) struct Ended {
    pub kind: String,
    pub outcome: &'static str,
    pub seconds: f64,
}

impl Ended {
    /// To be called when it is committed.
    pub fn count(self) {
        // The kinds are a closed list, which the table's check holds.
        metrics::histogram!(OPERATION_SECONDS, "kind" => self.kind, "outcome" => self.outcome)
            .record(self.seconds.max(0.0));
    }
}

/// The platform in numbers, of one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Numbers {
    /// The platform's own, by state; `silent` is the state of those that should be heard of and are not.
    pub hosts: Vec<(String, i64)>,
    /// Teams' own, likewise: they come and go as their teams like.
    pub team_hosts: Vec<(String, i64)>,
    /// Of which a copy was heard.
    pub copied_hosts: i64,
    /// By what was last observed; those that were killed are not counted.
    pub sandboxes: Vec<(String, i64)>,
    pub operations: Vec<OpenOperations>,
    /// Sandboxes that hosts of the platform name and no row claims. What a team's host names is that team's to look at.
    pub unclaimed: i64,
    pub is_braked: bool,
}

/// Of one kind.
#[derive(Debug, Clone, PartialEq)]
pub struct OpenOperations {
    pub kind: String,
    pub count: i64,
    pub oldest_sec: f64,
    /// Whose time is over, and who are open all the same.
    pub overdue: i64,
}

/// This replica's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connections {
    pub used: u32,
    pub idle: u32,
    pub max: u32,
}

impl Store {
    pub async fn numbers(&self) -> Result<Numbers, StoreError> {
        let hosts = sqlx::query!(
            r#"select case when state in ('active', 'draining') and coalesce(last_heartbeat_at, created_at) < now() - make_interval(secs => $1)
                   then 'silent' else state end as "state!",
                   team_id is not null as "of_team!", count(*) as "count!", count(copy_heard_at) as "copied!",
                   coalesce(sum(cardinality(unclaimed)), 0)::bigint as "unclaimed!"
               from hosts group by 1, 2"#,
            HOST_SILENCE_MAX.as_secs_f64()
        )
        .fetch_all(&self.pool)
        .await?;
        let sandboxes = sqlx::query!(
            r#"select observed, count(*) as "count!" from sandboxes s
               where observed <> 'killed' and not (observed = 'lost'
                   and exists (select 1 from hosts h where h.id = s.host_id and h.team_id is not null))
               group by 1"#
        )
        .fetch_all(&self.pool)
        .await?;
        let operations = sqlx::query!(
            r#"select kind, count(*) as "count!", extract(epoch from now() - min(created_at))::float8 as "oldest_sec!",
                   count(*) filter (where deadline < now() - make_interval(secs => $1) and not exists (
                       select 1 from sandboxes s join hosts h on h.id = s.host_id
                       where s.id = operations.sandbox_id and h.team_id is not null)) as "overdue!"
               from operations where phase = 'open' group by 1"#,
            OVERDUE_SEC
        )
        .fetch_all(&self.pool)
        .await?;
        let (of_teams, hosts): (Vec<_>, Vec<_>) = hosts.into_iter().partition(|row| row.of_team);
        Ok(Numbers {
            unclaimed: hosts.iter().map(|row| row.unclaimed).sum(),
            copied_hosts: hosts.iter().map(|row| row.copied).sum(),
            hosts: hosts.into_iter().map(|row| (row.state, row.count)).collect(),
            team_hosts: of_teams.into_iter().map(|row| (row.state, row.count)).collect(),
            sandboxes: sandboxes.into_iter().map(|row| (row.observed, row.count)).collect(),
            operations: operations
                .into_iter()
                .map(|row| OpenOperations {
                    kind: row.kind,
                    count: row.count,
                    oldest_sec: row.oldest_sec,
                    overdue: row.overdue,
                })
                .collect(),
            is_braked: self.is_braked().await?,
        })
    }

    pub fn connections(&self) -> Connections {
        let idle = u32::try_from(self.pool.num_idle()).unwrap_or(u32::MAX);
        Connections {
            used: self.pool.size().saturating_sub(idle),
            idle,
            max: self.pool.options().get_max_connections(),
        }
    }
}
