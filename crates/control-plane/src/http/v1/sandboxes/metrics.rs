//! `GET /v1/sandboxes/{id}/metrics`: what a sandbox takes of its host, and took in the last day. The host's word, not the guest's. Of one that
//! has ended there is nothing any more.

use api::host::GetMetricsRequest;
use api::v1::errors::ErrorBody;
use api::v1::metrics::{MetricPoint, Metrics};
use axum::extract::State;
use model::ids::SandboxId;
use model::sandbox::Status;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::agents::{AgentError, ask};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Query};
use crate::http::errors::ApiError;

/// Words and seconds.
const RANGES: [(&str, u32); 7] =
    [("5m", 300), ("10m", 600), ("1h", 3600), ("2h", 7200), ("6h", 21_600), ("12h", 43_200), ("24h", 86_400)];
const RANGE_DEFAULT: &str = "10m";

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Asked {
    /// `5m`, `10m` (default), `1h`, `2h`, `6h`, `12h` or `24h`; of a paused sandbox, counted back from when it last ran.
    range: Option<String>,
}

#[utoipa::path(get, path = "/{id}/metrics", tag = "sandboxes", params(("id" = String, Path), Asked),
    responses((status = 200, body = Metrics), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 503, body = ErrorBody)))]
pub async fn metrics(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Query(asked): Query<Asked>,
) -> Result<axum::Json<Metrics>, ApiError> {
    let range = asked.range.unwrap_or_else(|| RANGE_DEFAULT.to_owned());
    let Some((_, range_sec)) = RANGES.iter().find(|(word, _)| *word == range) else {
        return Err(ApiError::invalid("range", "must be one of 5m, 10m, 1h, 2h, 6h, 12h and 24h"));
    };
    let sandbox = super::find(&app, &caller, &id).await?;
    let has_metrics = matches!(
        sandbox.status(),
        Status::Running | Status::Paused | Status::Pausing | Status::Resuming | Status::Snapshotting
    );
    let placed = sandbox.host.as_ref().filter(|_| has_metrics).ok_or_else(|| ApiError::not_found("running sandbox"))?;
    let request = GetMetricsRequest { sandbox_id: id.to_string(), range_sec: *range_sec, ..Default::default() };
    let agent = app.agents.of(placed)?;
    let answer = agent.get_metrics_with_options(request, ask()).await.map_err(|error| match error.into() {
        AgentError::UnknownSandbox | AgentError::NotRunning => ApiError::not_found("running sandbox"),
        error => error.into(),
    })?;
    let shown = |point: api::host::MetricPoint| MetricPoint {
        timestamp_unix: point.timestamp_unix,
        // A host of a team's own may say anything.
        cpu_pct: if point.cpu_pct.is_finite() { point.cpu_pct } else { 0.0 },
        mem_bytes: point.mem_bytes,
        disk_bytes: point.disk_bytes,
    };
    let points = answer.into_owned().points.into_iter().map(shown).collect();
    Ok(axum::Json(Metrics { sandbox_id: id.to_string(), range, points }))
}
