//! `GET /v1/sandboxes/{id}/console`: the last bytes of the guest's console, for who looks for a cause.

use api::host::GetConsoleRequest;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::header;
use model::ids::SandboxId;

use crate::agents::{AgentError, ask};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/{id}/console", tag = "sandboxes", params(("id" = String, Path)),
    responses((status = 200, body = String, content_type = "text/plain"), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody)))]
pub async fn console(State(app): State<App>, caller: Caller, Id(id): Id<SandboxId>) -> Result<Response, ApiError> {
    // In any state: it is asked for when a sandbox does not run.
    let sandbox = super::find(&app, &caller, &id).await?;
    let placed = sandbox.host.as_ref().ok_or_else(|| ApiError::invalid_state(sandbox.status()))?;
    let agent = app.agents.of(placed)?;
    let request = GetConsoleRequest { sandbox_id: id.to_string(), ..Default::default() };
    let answer = agent.get_console_with_options(request, ask()).await.map_err(AgentError::from)?.into_owned();
    let text = String::from_utf8_lossy(&answer.tail).into_owned();
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response())
}
