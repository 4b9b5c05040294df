//! `GET /v1/sandboxes/{id}/timeline`: what happened to a sandbox in the last seven days, and how long each step took. Also of one that was
//! killed.

use api::v1::errors::ErrorBody;
use api::v1::sandboxes::{Step, TimelineEntry};
use axum::extract::State;
use model::ids::SandboxId;
use store::operations::Phase;
use store::timeline::Entry;

use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/{id}/timeline", tag = "sandboxes", params(("id" = String, Path)),
    responses((status = 200, body = Vec<TimelineEntry>), (status = 404, body = ErrorBody)))]
pub async fn timeline(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
) -> Result<axum::Json<Vec<TimelineEntry>>, ApiError> {
    let entries = app.store.timeline(caller.team, &id).await?.ok_or_else(|| ApiError::not_found("sandbox"))?;
    Ok(axum::Json(entries.into_iter().map(shown).collect()))
}

fn shown(entry: Entry) -> TimelineEntry {
    let (outcome, code, reason) = match entry.phase {
        Phase::Open => ("under_way", None, None),
        Phase::Done => ("done", None, None),
        Phase::Superseded => ("superseded", None, None),
        Phase::Failed { code, message } => ("failed", Some(code), Some(message)),
    };
    let took = entry.ended_at.map(|ended| ended - entry.began_at);
    TimelineEntry {
        // The first run of a sandbox is what its owner calls a create.
        kind: if entry.kind == "run" { "create".to_owned() } else { entry.kind },
        outcome: outcome.to_owned(),
        code,
        reason,
        attempts: entry.attempts.into(),
        began_at: entry.began_at,
        ended_at: entry.ended_at,
        ms: took.and_then(|took| took.num_microseconds()).map(|us| us as f64 / 1000.0),
        steps: entry.steps.into_iter().map(|(name, ms)| Step { name, ms }).collect(),
    }
}
