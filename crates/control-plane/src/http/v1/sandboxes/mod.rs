//! `/v1/sandboxes` (and `/v1/capsules`): wishes for sandboxes, and what one does in them.

mod console;
pub(super) mod create;
mod exec;
mod exec_stream;
mod files_read;
mod files_write;
mod fork;
mod get;
mod kill;
mod list;
mod pause;
mod ping;
mod processes;
mod resume;
mod signal;
mod timeline;
mod timeout;
mod view;

use http::StatusCode;
use model::ids::SandboxId;
use model::sandbox::Status;
use store::operations::Phase;
use store::sandboxes::{Sandbox, Turned};
use tokio::time::Instant;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::agents::Agent;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::errors::ApiError;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(create::create, list::list))
        .routes(routes!(get::get, kill::kill))
        .routes(routes!(pause::pause))
        .routes(routes!(resume::resume))
        .routes(routes!(timeout::timeout))
        .routes(routes!(ping::ping))
        .routes(routes!(fork::fork))
        .routes(routes!(timeline::timeline))
        .routes(routes!(exec::exec))
        .routes(routes!(exec_stream::exec_stream))
        .routes(routes!(processes::processes))
        .routes(routes!(signal::signal))
        .routes(routes!(console::console))
        .routes(routes!(files_read::read))
        .routes(routes!(files_read::stream_read))
        .routes(routes!(files_write::write))
        .routes(routes!(files_write::stream_write))
}

pub(super) async fn find(app: &App, caller: &Caller, id: &SandboxId) -> Result<Sandbox, ApiError> {
    app.store.sandbox(caller.team, id).await?.ok_or_else(|| ApiError::not_found("sandbox"))
}

/// The answer to a wish that a sandbox pause, or run again, when it is fulfilled or `deadline` has come: 200 and 202.
async fn turned(
    app: &App,
    caller: &Caller,
    id: &SandboxId,
    turned: Turned,
    wished: Status,
    deadline: Instant,
) -> Result<(StatusCode, axum::Json<api::v1::sandboxes::Sandbox>), ApiError> {
    let operation = match turned {
        Turned::Opened(operation) => Some(operation.id),
        Turned::UnderWay(operation) => Some(operation),
        Turned::Is => None,
        Turned::Wrong(status) => {
            let message = "only a running sandbox can be paused, and only a paused one resumed";
            return Err(ApiError::wrong_state(message, status));
        }
        Turned::NoRoom => return Err(ApiError::no_hosts_available()),
        Turned::Missing => return Err(ApiError::not_found("sandbox")),
    };
    if let Some(operation) = operation {
        let ended = app.outcomes.wait(operation, deadline).await?;
        if let Some(Phase::Failed { code, message }) = ended.map(|operation| operation.phase) {
            return Err(ApiError::of_operation(&code, &message).with("sandbox_id", id.to_string()));
        }
    }
    let sandbox = find(app, caller, id).await?;
    let status = if sandbox.status() == wished { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((status, axum::Json(view::shown(sandbox))))
}

/// The agent of a sandbox that runs; its use is noted.
async fn running(app: &App, caller: &Caller, id: &SandboxId) -> Result<Agent, ApiError> {
    let mut sandbox = find(app, caller, id).await?;
    let is_noted = |sandbox: &Sandbox| {
        sandbox.last_active_at.is_some_and(|at| chrono::Utc::now() - at < chrono::TimeDelta::seconds(10))
    };
    if sandbox.idle_timeout_sec > 0 && (sandbox.idle_since.is_some() || !is_noted(&sandbox)) {
        // Its idle time may be over in this moment: either its use is written down before that is seen, or it does not run any more.
        let (worker, of) = (app.clone(), id.clone());
        super::detached(app, async move { worker.store.touch_sandbox(&of).await }).await?;
        sandbox = find(app, caller, id).await?;
    }
    if sandbox.status() != Status::Running {
        return Err(ApiError::invalid_state(sandbox.status()));
    }
    let placed = sandbox.host.as_ref().ok_or_else(ApiError::host_unavailable)?;
    let agent = app.agents.at(&placed.address)?;
    if !is_noted(&sandbox) {
        let (store, id) = (app.store.clone(), id.clone());
        app.tracker.spawn(async move { store.touch_sandbox(&id).await });
    }
    Ok(agent)
}
