//! What happened to a sandbox: its operations, as long as they are kept, with the time that each step took.

use chrono::{DateTime, Utc};
use model::ids::{SandboxId, TeamId};
use serde_json::Value;

use crate::operations::Phase;
use crate::{Store, StoreError};

/// Of one answer.
const LIST_MAX: i64 = 1000;

/// One operation, under way or ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// run, pause, resume, kill, clean, snapshot, exit
    pub kind: String,
    pub phase: Phase,
    pub attempts: i32,
    pub began_at: DateTime<Utc>,
    pub ended_at: Option<DateTime<Utc>>,
    /// Name and milliseconds.
    pub steps: Vec<(String, f64)>,
}

struct Row {
    kind: String,
    phase: String,
    attempts: i32,
    created_at: DateTime<Utc>,
    finished_at: Option<DateTime<Utc>>,
    steps: Value,
    error_code: Option<String>,
    error_message: Option<String>,
}

impl Store {
    /// Newest last, the last thousand. None: the team has no such sandbox.
    pub async fn timeline(&self, team: TeamId, id: &SandboxId) -> Result<Option<Vec<Entry>>, StoreError> {
        let rows = sqlx::query_as!(
            Row,
            r#"select kind as "kind!", phase as "phase!", attempts as "attempts!", created_at as "created_at!", finished_at,
                   steps as "steps!", error_code, error_message
               from (select * from operations where sandbox_id = $1 order by created_at desc, id limit $3) newest
               where exists (select 1 from sandboxes where id = $1 and team_id = $2)
               order by created_at, id"#,
            id.as_str(),
            team.0,
            LIST_MAX
        )
        .fetch_all(&self.pool)
        .await?;
        if rows.is_empty() && self.sandbox(team, id).await?.is_none() {
            return Ok(None);
        }
        rows.into_iter().map(|row| entry(id, row)).collect::<Result<_, _>>().map(Some)
    }
}

fn entry(id: &SandboxId, row: Row) -> Result<Entry, StoreError> {
    let damaged = |column| StoreError::Damaged { row: id.to_string(), column };
    Ok(Entry {
        phase: Phase::of(&row.phase, row.error_code, row.error_message).ok_or_else(|| damaged("phase"))?,
        steps: serde_json::from_value(row.steps).map_err(|_| damaged("steps"))?,
        kind: row.kind,
        attempts: row.attempts,
        began_at: row.created_at,
        ended_at: row.finished_at,
    })
}
