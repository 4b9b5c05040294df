//! `GET /v1/sandboxes/{id}/processes`: what was started through the API and still runs.

use api::host::ListProcessesRequest;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use model::ids::SandboxId;
use serde::Serialize;
use utoipa::ToSchema;

use crate::agents::{AgentError, ask};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[derive(Serialize, ToSchema)]
pub struct Processes {
    processes: Vec<Process>,
}

#[derive(Serialize, ToSchema)]
pub struct Process {
    pid: u32,
    #[serde(skip_serializing_if = "String::is_empty")]
    tag: String,
    cmd: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    args: Vec<String>,
}

#[utoipa::path(get, path = "/{id}/processes", tag = "sandboxes", params(("id" = String, Path)),
    responses((status = 200, body = Processes), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn processes(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
) -> Result<axum::Json<Processes>, ApiError> {
    let agent = super::running(&app, &caller, &id).await?;
    let request = ListProcessesRequest { sandbox_id: id.to_string(), ..Default::default() };
    let answer = agent.list_processes_with_options(request, ask()).await.map_err(AgentError::from)?.into_owned();
    let shown = |process: api::host::Process| Process {
        pid: process.pid,
        tag: process.tag,
        cmd: process.cmd,
        args: process.args,
    };
    Ok(axum::Json(Processes { processes: answer.processes.into_iter().map(shown).collect() }))
}
