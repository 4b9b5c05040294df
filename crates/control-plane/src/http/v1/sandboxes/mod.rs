//! `/v1/sandboxes` (and `/v1/capsules`): wishes for sandboxes, and what one does in them.

mod console;
pub(super) mod create;
mod exec;
mod exec_stream;
mod files;
mod fork;
mod get;
mod kill;
mod list;
mod metrics;
mod output;
mod pause;
mod ping;
mod process_stream;
mod processes;
mod pty;
mod publish;
mod relabel;
mod resume;
mod signal;
mod stats;
mod streams;
mod terminal;
mod timeline;
mod timeout;
mod usage;
pub(in crate::http) mod view;

use std::time::Duration;

use http::StatusCode;
use model::ids::SandboxId;
use model::sandbox::Status;
use store::operations::Phase;
use store::sandboxes::Sandbox;
use store::wishes::Turned;
use tokio::time::Instant;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::agents::Agent;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::errors::ApiError;
use crate::wake::{self, NotAwake};

/// For a call that waits for its sandbox to run again.
const WAKE_TIME_MAX: Duration = Duration::from_secs(30);

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(create::create, list::list))
        .routes(routes!(get::get, relabel::relabel, kill::kill))
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
        .routes(routes!(process_stream::process_stream))
        .routes(routes!(pty::pty))
        .routes(routes!(console::console))
        .routes(routes!(metrics::metrics))
        .routes(routes!(stats::stats))
        .routes(routes!(usage::usage))
        .merge(files::router())
}

/// `/v1/admin/capsules`: the sandboxes of the platform's own team, for administrators to look after and to make templates of.
pub fn admin_router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(create::create, list::list))
        .routes(routes!(get::get, kill::kill))
        .routes(routes!(publish::publish))
        .routes(routes!(exec::exec))
        .routes(routes!(exec_stream::exec_stream))
        .routes(routes!(processes::processes))
        .routes(routes!(signal::signal))
        .routes(routes!(process_stream::process_stream))
        .routes(routes!(pty::pty))
        .routes(routes!(metrics::metrics))
        .merge(files::admin_router())
}

impl From<NotAwake> for ApiError {
    fn from(why: NotAwake) -> Self {
        match why {
            NotAwake::State(status) => Self::invalid_state(status),
            NotAwake::NoRoom => Self::no_hosts_available(),
            NotAwake::OverQuota(exceeded) => Self::over_quota(&exceeded),
            NotAwake::Failed { code, message } => Self::of_operation(&code, &message),
            NotAwake::Late => Self::deadline_exceeded("the sandbox was not resumed in time"),
            NotAwake::Gone => Self::not_found("sandbox"),
            NotAwake::Mistake => Self::internal(),
            NotAwake::Store(error) => error.into(),
        }
    }
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
        Turned::OverQuota(exceeded) => return Err(ApiError::over_quota(&exceeded)),
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

/// The agent of a sandbox that runs, or that runs again for this call if its policy says so; its use is noted.
async fn awake(app: &App, caller: &Caller, id: &SandboxId) -> Result<Agent, ApiError> {
    let deadline = Instant::now() + WAKE_TIME_MAX;
    let sandbox = wake::awake(app, find(app, caller, id).await?, &caller.actor(), deadline).await?;
    let paused = match used(app, caller, sandbox).await? {
        Ok(agent) => return Ok(agent),
        // In this very moment.
        Err(paused) => paused,
    };
    let sandbox = wake::awake(app, paused, &caller.actor(), deadline).await?;
    used(app, caller, sandbox).await?.map_err(|sandbox| ApiError::invalid_state(sandbox.status()))
}

/// The agent of a sandbox that runs; its use is noted.
async fn running(app: &App, caller: &Caller, id: &SandboxId) -> Result<Agent, ApiError> {
    let used = used(app, caller, find(app, caller, id).await?).await?;
    used.map_err(|sandbox| ApiError::invalid_state(sandbox.status()))
}

/// The agent; or the sandbox as it is, when it does not run.
async fn used(app: &App, caller: &Caller, mut sandbox: Sandbox) -> Result<Result<Agent, Sandbox>, ApiError> {
    let id = &sandbox.id.clone();
    let is_noted = |sandbox: &Sandbox| {
        sandbox.last_active_at.is_some_and(|at| chrono::Utc::now() - at < chrono::TimeDelta::seconds(10))
    };
    if sandbox.policy.idle_timeout_sec > 0 && (sandbox.idle_since.is_some() || !is_noted(&sandbox)) {
        // Its idle time may be over in this moment: either its use is written down before that is seen, or it does not run any more.
        let (worker, of) = (app.clone(), id.clone());
        super::detached(app, async move { worker.store.touch_sandbox(&of).await }).await?;
        sandbox = find(app, caller, id).await?;
    }
    if sandbox.status() != Status::Running {
        return Ok(Err(sandbox));
    }
    let placed = sandbox.host.as_ref().ok_or_else(ApiError::host_unavailable)?;
    let agent = app.agents.of(placed)?;
    if !is_noted(&sandbox) {
        let (store, id) = (app.store.clone(), id.clone());
        app.tracker.spawn(async move { store.touch_sandbox(&id).await });
    }
    Ok(Ok(agent))
}
